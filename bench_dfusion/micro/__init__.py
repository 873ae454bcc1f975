"""The embedded worlds: of each a real text-to-image diffusion pipeline and a CLIP, small enough for a laptop."""

from pathlib import Path

HERE = Path(__file__).parent
PIPELINE = HERE / "weights" / "pipeline"  # for diffusers.DiffusionPipeline.from_pretrained
CLIP = HERE / "weights" / "clip"  # for open_clip, as local-dir:PATH
# By the names that tracks give them.
PIPELINES = {"micro": PIPELINE, "micro-v2": HERE / "v2" / "weights" / "pipeline"}
CLIPS = {"micro": CLIP, "micro-v2": HERE / "v2" / "weights" / "clip"}
RECIPES = {"micro": "bench_dfusion.micro.pretrain", "micro-v2": "bench_dfusion.micro.v2.pretrain"}
