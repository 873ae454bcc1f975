"""The model card of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_dfusion import micro
from bench_dfusion.results import companions, records
from bench_dfusion.results.figures import signed
from bench_dfusion.results.records import Record
from bench_dfusion.results.tables import escaped
from bench_dfusion.tracks.schema import LOCAL
from bench_dfusion.util import files
from bench_dfusion.version import BIBTEX

README = "README.md"
PICTURES = {
    "base_trained.png": "base (left) and trained (right) on the same noise: above the prompts whose picture changed most, below "
    "others, evenly taken",
    "triples.png": "reference, its mask, base and target of the last training round, with rewards",
}


def write(folder: Path, record: Record) -> None:
    """Write the card of a finished run beside what it speaks of."""
    files.write_atomic(folder / README, card(folder, record))


def card(folder: Path, record: Record) -> str:
    """The card of a finished run as a README.md: the Hub's header with every judge's score, then base against trained,
    pictures, how to load the LoRA, and where the figures come from."""
    from huggingface_hub import EvalResult, ModelCardData

    track = record.resolved["track"]
    base, local = track["model"]["id"], track["model"]["id"] == LOCAL
    if local:
        base = str(record.given.get("model", base))
    on_hub = not local and bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base)) and not Path(base).exists()
    whole = companions.weights_file(record) == companions.WHOLE
    in_diffusers = whole or _keys_begin_with(folder / companions.LORA, "unet.")
    name = f"{record.algorithm} on {record.builder} samples, reward {record.reward}, seed {record.seed}"
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="diffusers" if in_diffusers else "peft",
        pipeline_tag="text-to-image",
        tags=["bench-dfusion", *([] if whole else ["lora"]), "text-to-image", record.algorithm],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-to-image",
                dataset_type="bench-dfusion",
                dataset_name=f"{record.track}, held-out prompts",
                dataset_args={"track_hash": record.track_hash},
                metric_type=v.judge,
                metric_name=f"{v.judge}: {v.metric}",
                metric_value=round(v.trained, 6),
            )
            for v in record.verdicts
        ],
    )
    seen = [p for p in PICTURES if (folder / p).exists()]
    options = "".join(
        f"| {short}.{escaped(option)} | {escaped(value)} |\n"
        for section, short in (("algorithm", "algo"), ("builder", "builder"), ("reward", "reward"))
        for option, value in record.resolved[section].items()
        if option != "name"
    )
    cost, source = record.cost, record.provenance
    ema = record.resolved["algorithm"].get("ema")
    averaged = "" if ema is None else f" The weights are an exponential average over the updates, of decay {ema}."
    queries = f"{cost.reward_queries} reward queries" if cost.reward_queries else "offline, no reward query"
    if record.rung is not None:
        queries += f" (rung {record.rung} of {len(track['budget']['rungs'])})"
    return f"""---
{data.to_yaml()}
---

# {escaped(name)}

{"Weights" if whole else "A LoRA"} for {escaped(base if on_hub or base in micro.PIPELINES else Path(base).name)} (weights `{record.provenance.model_sha256[:12]}`), trained and judged by bench-dfusion on the track {escaped(record.track)} (`{record.track_hash[:12]}`).{averaged}

| judge | base | trained | gain, 95 % over prompts | |
|---|---:|---:|---:|---|
{"".join(_verdict(v) for v in record.verdicts)}
{len(record.verdicts[0].per_prompt)} held-out prompts × {track["evaluation"]["images_per_prompt"]} images, base and trained on the same noise. This is one seed: a checkpoint, not a ranking of methods. A judge that was the training reward says nothing about alignment.

{"".join(f"![{PICTURES[p]}]({p}){chr(10)}{chr(10)}" for p in seen)}## Use
```python
{_usage(base, on_hub, in_diffusers, _class_of(folder) if whole else None, track["sampler"])}
```

## Training
| option | value |
|---|---|
{options}
{queries}, {cost.network_evaluations} network evaluations, {cost.updates} updates, {sum(cost.seconds.values()):.0f} s on {escaped(source.hardware)}. Everything else, each prompt's scores and the training curve among it, is in `record.json`; `bench-dfusion eval` recomputes the judges from these weights.

## Cite
```bibtex
{BIBTEX}
```
"""


def _verdict(v: records.Verdict) -> str:
    note = "training reward" if v.trained_on else ""
    gain = f"{signed(v.gain.mean)} [{signed(v.gain.low)}, {signed(v.gain.high)}]"
    return f"| {escaped(v.judge)} | {v.base:.3f} | {v.trained:.3f} | {gain} | {note} |\n"


def _keys_begin_with(path: Path, part: str) -> bool:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return all(key.startswith(part) for key in file.keys())  # noqa: SIM118


def _class_of(folder: Path) -> str:
    """The class in diffusers of a network whose own weights were trained."""
    return str(json.loads((folder / "config.json").read_bytes())["_class_name"])


def _usage(base: str, on_hub: bool, in_diffusers: bool, network: str | None, sampler: Mapping[str, Any]) -> str:
    """How to load the LoRA, or the weights of a class `network`, of a base on the Hub, of an embedded one, or of a
    directory, which is not told."""
    embedded = base in micro.PIPELINES
    draw = ""
    if embedded:  # its pictures are smaller than PixArt's bins, its texts shorter
        draw = (
            f"\n\npipe(PROMPT, num_inference_steps={sampler['steps']}, guidance_scale={sampler['guidance']:g}, "
            "max_sequence_length=16, use_resolution_binning=False)"
        )
    source = f'micro.PIPELINES["{base}"]' if embedded else repr(base) if on_hub else '"DIRECTORY_OF_THE_BASE_MODEL"'
    if network is not None:
        part = "unet" if network.startswith("UNet") else "transformer"
        return (
            ("from bench_dfusion import micro\n" if embedded else "")
            + f"from diffusers import DiffusionPipeline, {network}\n\n"
            f'{part} = {network}.from_pretrained("OWNER/NAME")  # this repository\n'
            f"pipe = DiffusionPipeline.from_pretrained({source}, {part}={part})" + draw
        )
    if in_diffusers:
        return (
            "from diffusers import AutoPipelineForText2Image\n\n"
            f"pipe = AutoPipelineForText2Image.from_pretrained({source})\n"
            'pipe.load_lora_weights("OWNER/NAME")  # this repository'
        )
    return (
        ("from bench_dfusion import micro\n" if embedded else "")
        + "from diffusers import DiffusionPipeline\nfrom huggingface_hub import snapshot_download\n"
        "from peft import PeftModel\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({source})\n"
        "# diffusers has no LoRA loader for this pipeline\n"
        'adapter = snapshot_download("OWNER/NAME", allow_patterns="peft/*") + "/peft"  # this repository\n'
        "pipe.transformer = PeftModel.from_pretrained(pipe.transformer, adapter)" + draw
    )
