"""The embedded world: a real text-to-image diffusion pipeline and a CLIP, small enough for a laptop."""

from pathlib import Path

HERE = Path(__file__).parent
PIPELINE = HERE / "weights" / "pipeline"  # for diffusers.DiffusionPipeline.from_pretrained
CLIP = HERE / "weights" / "clip"  # for open_clip, as local-dir:PATH
