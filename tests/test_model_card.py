"""A run's model card: what the Hub reads of it, what a reader sees, and its way there in one commit."""

from __future__ import annotations

import io
from pathlib import Path

import boards
import pytest
import torch
import yaml
from hub_server import Handler, Hub
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load, save_file

from bench_dfusion.errors import UsageError
from bench_dfusion.publish import model, repository
from bench_dfusion.results import companions, records
from bench_dfusion.results.records import Record
from bench_dfusion.runs import model_card

REPO = "somebody/lora"


def run_folder(folder: Path, record: Record, part: str = "unet") -> Path:
    """What a finished run leaves."""
    where = boards.place(boards.leave(folder, record), record).parent
    save_file({f"{part}.mid.lora_A.weight": torch.ones(2, 2)}, where / companions.LORA)
    Image.new("RGB", (4, 3), "red").save(where / "base_trained.png")
    (where / "peft").mkdir()
    save_file({"base_model.model.mid.lora_A.weight": torch.ones(2, 2)}, where / "peft" / "adapter_model.safetensors")
    (where / "checkpoint.safetensors").write_bytes(b"not to be pushed")
    return where


def on(model: str, **changes) -> Record:
    return boards.record(of=boards.track(model={"id": model, "sha256": None}), **changes)


def push(hub: Hub, folder: Path, **options) -> str:
    return model.push(folder, REPO, hub=repository.connect(REPO, hub.url), **options)


def test_the_header_is_what_the_hub_reads(tmp_path: Path) -> None:
    record = on("org/base")
    folder = run_folder(tmp_path, record)
    data = ModelCard(model_card.card(folder, record)).data
    assert data.base_model == "org/base" and data.library_name == "diffusers" and data.pipeline_tag == "text-to-image"
    assert {e.metric_type: e.metric_value for e in data.eval_results or []} == {
        v.judge: pytest.approx(v.trained) for v in record.verdicts
    }
    assert all(e.dataset_args == {"track_hash": record.track_hash} for e in data.eval_results or [])


def test_a_reader_sees_base_and_trained_and_how_to_load(tmp_path: Path) -> None:
    record = on("org/base")
    text = model_card.card(run_folder(tmp_path, record), record)
    assert "| oracle | 0.500 | 0.750 | +0.250 [+0.150, +0.350] |  |" in text
    assert "| clip | 0.500 | 0.625 | +0.125 [+0.050, +0.200] | training reward |" in text
    assert "(base_trained.png)" in text and "triples.png" not in text, "only the pictures that are there"
    assert "from_pretrained('org/base')" in text and 'load_lora_weights("OWNER/NAME")' in text
    local = on(str(tmp_path / "secret" / "mine"))
    text = model_card.card(run_folder(tmp_path, local, "transformer"), local)
    assert "A LoRA for mine" in text and "secret" not in text, "where a user keeps the base is nobody's business"
    assert "DIRECTORY_OF_THE_BASE_MODEL" in text and "PeftModel" in text and "base_model" not in text.split("---")[1]
    for code in (text, model_card.card(run_folder(tmp_path, on("micro"), "transformer"), on("micro"))):
        compile(code.split("```python\n")[1].split("```")[0], "card", "exec")


def test_what_a_record_says_is_text(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script> ![x](http://evil/x.png) | `a` \x1b[31m"
    record = boards.record(options={"note": bad})
    html = (
        MarkdownIt("commonmark", {"html": True})
        .enable("table")
        .render(model_card.card(run_folder(tmp_path, record), record).split("---\n", 2)[2])
    )
    assert "<script" not in html and "evil/x.png" in html and 'src="http' not in html and "\x1b" not in html


def test_a_push_is_one_commit_of_what_a_user_needs(hub: Hub, tmp_path: Path) -> None:
    record = on("org/base")
    folder = run_folder(tmp_path, record)
    assert push(hub, folder, benchmark="somebody/table") == f"{hub.url}/{REPO}"
    repo = hub.repos[REPO]
    assert len(repo.log) == 2 and repo.titles[repo.log[1]] == f"bench-dfusion: {record.name}"
    lora = "pytorch_lora_weights.safetensors"
    assert set(repo.files) == {
        *(".gitattributes", "README.md", lora, "record.json", "base_trained.png", "peft/adapter_model.safetensors"),
        ".eval_results/bench-dfusion.yaml",
    }
    assert load(repo.files[lora]).keys() == {"unet.mid.lora_A.weight"}
    assert records.parse(repo.files["record.json"], "") == record
    assert f'load_lora_weights("{REPO}")' in repo.files["README.md"].decode()
    Image.open(io.BytesIO(repo.files["base_trained.png"])).load()
    scores = yaml.safe_load(repo.files[".eval_results/bench-dfusion.yaml"])
    assert [(s["dataset"], s["value"]) for s in scores] == [
        ({"id": "somebody/table", "task_id": f"{record.track}/{v.judge}"}, pytest.approx(v.trained))
        for v in record.verdicts
    ]
    push(hub, folder)
    assert len(repo.log) >= 2 and ".eval_results/bench-dfusion.yaml" in repo.files, "others' files stay"


def test_a_conflict_is_tried_again_and_a_failure_says_why(hub: Hub, tmp_path: Path, capsys) -> None:
    folder = run_folder(tmp_path, boards.record())

    def conflict(handler: Handler) -> bool:
        handler.body()
        handler.error(412, "A commit has happened since.")
        return True

    hub.faults = [conflict]
    push(hub, folder)
    assert "was changed by somebody else" in capsys.readouterr().err and len(hub.repos[REPO].log) == 2

    def forbidden(handler: Handler) -> bool:
        handler.body()
        handler.error(403, "no")
        return True

    hub.faults = [forbidden]
    (folder / "base_trained.png").unlink()
    Image.new("RGB", (4, 3), "blue").save(folder / "base_trained.png")
    with pytest.raises(UsageError, match=r"may not write to somebody/lora: use a token that may \(no\)"):
        push(hub, folder)
    with pytest.raises(UsageError, match="exists and is public"):
        push(hub, folder, private=True)
    failed = run_folder(tmp_path, boards.record(seed=1, gains=None))
    with pytest.raises(UsageError, match="the run failed"):
        push(hub, failed)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--push-to-hub", "nowhere"), "'nowhere' is no id on the Hub: write OWNER/NAME"),
        (("--push-to-hub", "a/b"), "no Hugging Face token: run `hf auth login`"),
        (("--push-to-hub", "a/b", "--seeds", "2"), "--push-to-hub takes one run"),
        (("--private",), "give that too"),
        (("--benchmark", "a/b"), "give that too"),
    ],
)
def test_a_mistake_is_said_before_any_compute(words, expected, refused, monkeypatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert expected in refused("run", "--algo", "dpo", "--reward", "clip", *words)
    assert not list(tmp_path.rglob("cell.json"))
