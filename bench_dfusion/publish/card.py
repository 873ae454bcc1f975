"""The card of a published leaderboard: what is in it, under which rules, how to read it, check it and add to it."""

from __future__ import annotations

from collections.abc import Mapping

from bench_dfusion.publish.dataset import COLUMNS, MARK, Content, boards_of, run_path, track_of
from bench_dfusion.results import companions, leaderboard
from bench_dfusion.results.leaderboard import Board
from bench_dfusion.results.tables import markdown
from bench_dfusion.tracks.schema import JudgedSampler, SamplerSection
from bench_dfusion.version import BIBTEX

PAGE_AT = "The same as a page: "  # before the Space's address


def card(content: Content, digests: Mapping[str, str], space: str | None = None) -> str:
    """The dataset's README. `digests`: a hash of each config that has rows; the others cannot be loaded, and are said
    to be absent. `space`: the address of the page in a Space. Texts of records are shown as text, whatever they hold."""
    boards = boards_of(content)
    rows = sum(len(leaderboard.rows(b.at(1))) for b in boards)
    absent = [config for config in COLUMNS if config not in digests]
    missing = f"\nWithout rows yet, and so not declared: {', '.join(f'`{c}`' for c in absent)}.\n" if absent else ""
    return f"""---
license: apache-2.0
pretty_name: bench-dfusion leaderboard
task_categories:
- text-to-image
tags:
- {MARK}
- bench-dfusion
- leaderboard
- benchmark
- diffusion
- preference-optimization
- reinforcement-learning
configs:
{_yaml_configs(digests)}dataset_info:
{_yaml_features(digests)}---
# bench-dfusion leaderboard

Which preference-optimisation method aligns a text-to-image diffusion model best, at what cost: {counted(len(content.records), "run")} in {counted(rows, "row")} of {counted(len(boards), "track")}, measured by bench-dfusion.
A row is an algorithm × builder of training samples × reward; its gain is trained − base on held-out prompts never trained on, before a judge never trained against.

{f"{PAGE_AT}<{space}>{chr(10)}{chr(10)}" if space else ""}```python
from datasets import load_dataset

load_dataset("OWNER/NAME", "leaderboard", split="train")  # this dataset's id, or the directory it lies in
```

{"".join(_track_section(b) for b in boards)}## Rules
- The budget is reward queries: every image the training reward scores, samples that are built included. Offline rows (trained on given pairs) cost none, and say so.
- The first judge of a track ranks. A row trained on it is a ceiling: shown, unranked.
- Base and trained are drawn on the same held-out noise, which depends on (prompt, image index) alone; the gain is paired. From three seeds on its 95 % interval is the two-way t over seeds and prompts; below, it covers the prompts only and there is no rank.
- A rank is a range: all pairs of rows with exactly the track's seeds are compared together, at 5 % for the whole table; rows that are not separated share it.
- A run that collapsed or turned non-finite makes its row a miss: gain −inf, last place. Registered cells without a record make it incomplete. Neither is dropped.
- The evaluated checkpoint is the last one of the budget, at each rung where the track has rungs. Options are fixed for a method, or tuned on validation prompts under the budget that the track states.
- Records of different tracks (the hash decides) are never compared.

## Configs
Every config has the split `train`. Floats are null where there is no value, and −inf in `gain` for a miss.
{missing}
{_columns(digests)}
## Make the tables anew, and check them
`records` holds everything the other tables are made from. The same cells lie as files in `runs/<cell_hash>/`: the record, and beside it what a check of it needs, the trained LoRA (of {_with_lora(content)} of {counted(len(content.records), "run")}) and, of the records that name it, every judge's score of every held-out picture.

```sh
hf download OWNER/NAME --repo-type dataset --local-dir board
bench-dfusion leaderboard board
bench-dfusion verify board --sample 3  # drawn by a hash of all, evaluated again from their LoRAs
```

## Add your runs
```sh
bench-dfusion publish OWNER/NAME --from runs --pr
```
proposes the runs below `runs/` as a pull request; rows that are published stay. Should others be merged before yours, publish again: it reads what is there and makes the tables anew.

## Cite
```bibtex
{BIBTEX}
```
"""


def _with_lora(content: Content) -> int:
    return sum(
        run_path(key, companions.weights_file(record)) in content.companions for key, record in content.records.items()
    )


def _yaml_configs(digests: Mapping[str, str]) -> str:
    # datasets.load_dataset keys its cache of a local directory by this YAML alone: the hash in `description` is what
    # tells it that the files have changed.
    return "".join(
        f"- config_name: {config}\n"
        + ("  default: true\n" if config == "leaderboard" else "")
        + f"  description: content {digests[config]}\n"
        + f"  data_files:\n  - split: train\n    path: {config}/train-*\n"
        for config in COLUMNS
        if config in digests
    )


def _yaml_features(digests: Mapping[str, str]) -> str:
    return "".join(
        f"- config_name: {config}\n  features:\n"
        + "".join(f"  - name: {name}\n    dtype: {kind}\n" for name, (kind, _) in columns.items())
        for config, columns in COLUMNS.items()
        if config in digests
    )


def _columns(digests: Mapping[str, str]) -> str:
    about = {
        "leaderboard": "one row for each algorithm × builder × reward × variant of a track, best first, at each of its rungs",
        "scores": "what every judge said of every run at each of its rungs: of all held-out prompts, of each template, of each prompt",
        "curves": "the training curve of every run, one row for each round and metric",
        "samples": "pictures that runs left",
        "records": "one row a run: the record that everything else is made from",
    }
    return "".join(
        f"### {config}\n{about[config][0].upper()}{about[config][1:]}.\n\n| column | type | what it is |\n|---|---|---|\n"
        + "".join(f"| `{name}` | {kind} | {meaning} |\n" for name, (kind, meaning) in COLUMNS[config].items())
        + "\n"
        for config in COLUMNS
        if config in digests
    )


def _sampler(section: SamplerSection) -> str:
    noise = "the family's eta" if section.eta is None else f"eta {section.eta:g}" if section.eta else "the ODE"
    cps = "cps, " if section.kind == "cps" else ""
    side = f", {section.resolution} pixels" if isinstance(section, JudgedSampler) and section.resolution else ""
    return f"{cps}{section.steps} steps, {noise}, guidance {section.guidance:g}{side}"


def _track_section(board: Board) -> str:
    cell = board.cells[0]
    track = track_of(cell)
    metrics = {v.judge: v.metric for r in board.records for v in r.verdicts}
    weights = sorted({r.provenance.model_sha256 for r in board.records})
    judges = [f"{_text(j)} ({_text(metrics[j])})" if j in metrics else _text(j) for j in track.evaluation.judges]
    p, s, b = track.prompts, track.sampler, track.budget
    rank = f"rank {track.lora.rank}" if track.lora.rank else "none: the network's own weights"
    lora = rank + (f", in {_text(', '.join(track.lora.targets))}" if track.lora.targets else "")
    tuning = next((r.tuning for r in board.records if r.tuning), "")
    facts = {
        "track hash": f"`{_text(board.track_hash)}`",
        "base model": _text(track.model.id)
        + (f", revision {_text(track.model.revision)}" if track.model.revision else ""),
        "its weights, SHA-256": ", ".join(f"`{_text(w)}`" for w in weights) or "–",
        "arithmetic": _text(track.model.dtype + (f", autocast {track.model.autocast}" if track.model.autocast else "")),
        "sampler": _sampler(s),
        **({"sampler of what is judged": _sampler(other)} if (other := track.evaluation.sampler) else {}),
        "LoRA": lora,
        "budget of a run": f"{b.reward_queries} reward queries; {b.prompts_per_round} prompts × {b.samples_per_prompt} samples a round"
        + (f"; ranked at {', '.join(map(str, b.rungs))}" if b.rungs else ""),
        "prompts": f"{len(p.train)} train, {len(p.validation)} validation, {len(p.heldout)} held-out × "
        f"{track.evaluation.images_per_prompt} images; the first held out: {'; '.join(map(_text, p.heldout[:3]))}",
        "judges": f"{'; '.join(judges)}; the first ranks",
        "seeds of a full row": str(track.seeds),
    } | ({"options": _text(tuning)} if tuning else {})
    lines = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    return f"## {_text(board.track)}\n{markdown(board)}\n| the track | |\n|---|---|\n{lines}\n"


def _text(value: str) -> str:
    """Text of a record as one line of Markdown that shows it and does nothing: all but letters, digits and a few signs
    are character references, which Markdown never reads as markup."""
    line = "".join(c for c in " ".join(value.split()) if c.isprintable())
    return "".join(c if c.isalnum() or c in " ,.–−-" else f"&#{ord(c)};" for c in line)


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
