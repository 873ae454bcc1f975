"""A finished run as a model on the Hub: its weights, card, pictures and record in one commit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from bench_dfusion.errors import UsageError
from bench_dfusion.publish import repository
from bench_dfusion.results import companions, records
from bench_dfusion.runs.model_card import PICTURES, README, card

PUSHED = (README, *companions.HASHES, "config.json", "record.json", *PICTURES, "peft/*", ".eval_results/*")


def push(folder: Path, repo: str, *, private: bool = False, benchmark: str | None = None, hub: Any = None) -> str:
    """Put a finished run's LoRA, card, pictures and record on the Hub as the model `repo`, in one commit; its address.

    benchmark   the dataset that `bench-dfusion publish` made: the scores go to `.eval_results/` too, where the Hub reads
                them for the tables of the benchmarks it knows
    hub         what `publish.connect` returned

    Raises UsageError, in one line with the fix, where the run has not finished, the token is missing or may not write,
    or the Hub cannot be reached.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.errors import RepositoryNotFoundError

    api, token = hub or repository.connect(repo)
    record = records.read(folder / "record.json")
    if record.status != "finished":
        raise UsageError(f"{folder}: the run failed ({record.evidence}); there is nothing to push")
    text = card(folder, record).replace("OWNER/NAME", repo)
    with tempfile.TemporaryDirectory() as work, repository.bars_on_a_terminal():
        made = Path(work)
        (made / README).write_text(text, encoding="utf-8")
        if benchmark is not None:
            import yaml

            notes = f"{record.algorithm} on {record.builder} samples, reward {record.reward}, seed {record.seed}"
            entries = [
                EvalResultEntry(
                    dataset_id=benchmark,
                    task_id=f"{record.track}/{v.judge}",
                    value=round(v.trained, 6),
                    notes=f"{notes}; base {v.base:.4f}" + ("; the training reward" if v.trained_on else ""),
                )
                for v in record.verdicts
            ]
            (made / ".eval_results").mkdir()
            (made / ".eval_results" / "bench-dfusion.yaml").write_text(
                yaml.safe_dump(eval_result_entries_to_yaml(entries))
            )

        def attempt() -> str:
            from huggingface_hub import CommitOperationAdd

            try:
                head = api.model_info(repo)
            except RepositoryNotFoundError:
                api.create_repo(repo, private=private or None, exist_ok=True)
                head = api.model_info(repo)
            if private and not head.private:
                raise UsageError(f"{repo} exists and is public: leave --private out, or change it on its settings page")
            found = {p.relative_to(root).as_posix(): p for root in (folder, made) for p in _pushed(root)}
            operations = [CommitOperationAdd(path, str(source)) for path, source in sorted(found.items())]
            api.create_commit(repo, operations, commit_message=f"bench-dfusion: {record.name}", parent_commit=head.sha)
            return f"{api.endpoint}/{repo}"

        return repository.persist(attempt, repo, token)


def _pushed(root: Path) -> list[Path]:
    return [path for pattern in PUSHED for path in sorted(root.glob(pattern)) if path.is_file()]
