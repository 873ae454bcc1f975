"""Whatever a file or an option holds, the outcome is a success or one line that says what is wrong, never a traceback."""

from __future__ import annotations

import copy
import json
import shutil
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench_dfusion import config, records, registry, track
from bench_dfusion.micro import tracks
from bench_dfusion.registry import UsageError

fuzz = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["", "micro", "../../etc/passwd", "\x1b[31m", "=1+1", "<b>", "‮abc", "nan", "1e999", "None"]),
)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3))
SECTIONS = ["algo", "builder", "reward", "track", "trakc", ""]
OPTIONS = [
    *(
        "beta",
        "learning_rate",
        "window",
        "loss_type",
        "steps",
        "layers",
        "threshold",
        "items",
        "model",
        "batch",
        "seeds",
    ),
    *("sampler.steps", "sampler.eta", "budget.reward_queries", "prompts.train", "prompts.heldout", "prompts.source"),
    *("evaluation.judges", "lora.targets", "lora.rank", "memory", "algorithms.dpo", "tuned", "rewards.clip", "nothing"),
    *("prompts", "prompts.templates", "model.id", "model.resolution", "items_file", "thresholds", "name", "version"),
]


def tried(function: Any, *args: Any, **kwargs: Any) -> Any:
    """The result, or None after an error that a user can read: one line of printable characters."""
    try:
        return function(*args, **kwargs)
    except UsageError as error:
        shown = registry.plain(error)
        assert shown.strip() and "\n" not in shown and shown.isprintable()
        return None


# ---------------------------------------------------------------- options


@fuzz
@given(st.sampled_from(SECTIONS), st.sampled_from(OPTIONS), VALUES, st.sampled_from(["dpo", "grpo", "draft", "kto"]))
def test_any_value_of_an_option(section: str, option: str, value: Any, algo: str) -> None:
    tried(config.resolve, algo=algo, reward="clip", settings=[f"{section}.{option}={json.dumps(value)}"])


@fuzz
@given(st.text(max_size=40))
def test_any_text_as_a_setting(text: str) -> None:
    tried(config.resolve, algo="dpo", reward="clip", settings=[text])


@fuzz
@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20), st.text(max_size=20), st.integers())
def test_any_names(algo: str, reward: str, builder: str, source: str, seed: int) -> None:
    for names in ({"algo": algo}, {"reward": reward}, {"builder": builder}, {"track_source": source}, {"seed": seed}):
        tried(config.resolve, **{"algo": "dpo", "reward": "clip", **names})


@fuzz
@given(st.sampled_from(["reward", "builder", "track"]), st.dictionaries(st.text(max_size=8), VALUES, max_size=3))
def test_any_configuration_file(tmp_path: Path, section: str, content: dict[str, Any]) -> None:
    path = tmp_path / "my.toml"
    lines = [f"[{section}]", *(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in content.items())]
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    tried(config.resolve, algo="dpo", reward="clip", config=path)


@fuzz
@given(st.binary(max_size=60))
def test_any_bytes_as_a_configuration_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(content)
    tried(config.resolve, algo="dpo", reward="clip", config=path)


# ---------------------------------------------------------------- changed somewhere


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to every value of nested tables and lists (of long lists the first three)."""
    inside = (
        content.items() if isinstance(content, dict) else enumerate(content[:3]) if isinstance(content, list) else ()
    )
    return [path] * bool(path) + [p for key, value in inside for p in places(value, (*path, key))]


def changed(content: Any, path: tuple[Any, ...], value: Any, how: str) -> Any:
    result = copy.deepcopy(content)
    parent = result
    for key in path[:-1]:
        parent = parent[key]
    if how == "replace":
        parent[path[-1]] = value
    elif how == "remove":
        del parent[path[-1]]
    elif isinstance(parent, dict):
        parent[str(value)[:20]] = value
    return result


@cache
def a_track() -> dict[str, Any]:
    return tomllib.loads(Path(tracks.micro()).read_text()) | {
        "prompts": {"train": ["a red ring"], "heldout": ["a", "b"]}
    }


@cache
def a_record() -> dict[str, Any]:
    folder = Path(__file__).parents[1] / "leaderboards" / "micro-v1"
    content: dict[str, Any] = json.loads(next(iter(sorted(folder.glob("*/record.json")))).read_bytes())
    return content


HOW = st.sampled_from(["replace", "replace", "remove", "add"])


@fuzz
@given(st.data(), VALUES, HOW)
def test_a_track_changed_anywhere(data: st.DataObject, value: Any, how: str) -> None:
    content = changed(a_track(), data.draw(st.sampled_from(places(a_track()))), value, how)
    tried(track.validate, track.Track, content, "track")


@fuzz
@given(st.data(), VALUES, HOW)
def test_a_record_changed_anywhere(data: st.DataObject, value: Any, how: str) -> None:
    content = changed(a_record(), data.draw(st.sampled_from(places(a_record()))), value, how)
    record = tried(records.parse, json.dumps(content), "record.json")
    if record is not None:
        assert all(isinstance(problem, str) for problem in records.check(record))


@fuzz
@given(st.binary(max_size=80) | VALUES.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_as_a_record(content: bytes) -> None:
    assert tried(records.parse, content, "record.json") is None


# ---------------------------------------------------------------- checkpoints


def used(folder: Path) -> None:
    """Load a checkpoint as a run does, up to its first sample, and as the doctor does."""
    from bench_dfusion.models.loading import load_adapter
    from bench_dfusion.policy import Policy

    section = track.ModelSection(id=str(folder))
    for device in ("meta", "cpu"):
        adapter, _ = load_adapter(section, device)
        try:
            Policy(adapter, steps=3, device=device)
        except ValueError as error:  # which a run and the doctor tell as they tell a UsageError
            raise UsageError(str(error)) from None
        assert adapter.text_length > 0 and adapter.image_side > 0


@pytest.fixture(scope="module")
def taken(pixart_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(pixart_dir, tmp_path_factory.mktemp("checkpoint") / "model")


FILES = (
    *("model_index.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    *("scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.safetensors"),
    *("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"),
    *("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
)


@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_with_a_file_taken_away(file: str, taken: Path) -> None:
    path = taken / file
    content = path.read_bytes()
    try:
        for left in (None, b"", content[: len(content) // 2], b"{}", b"null", b"\xff" * 40):
            path.unlink(missing_ok=True)
            if left is not None:
                path.write_bytes(left)
            tried(used, taken)
    finally:
        path.write_bytes(content)


@settings(fuzz, max_examples=40)
@given(st.data(), VALUES, st.sampled_from(["null", "null", "null", "replace", "remove"]))
def test_a_checkpoint_with_a_config_changed_anywhere(taken: Path, data: st.DataObject, value: Any, how: str) -> None:
    file = taken / data.draw(st.sampled_from([f for f in FILES if f.endswith(("config.json", "index.json"))]))
    content = json.loads(file.read_bytes())
    keys = [(key,) for key in content]
    new = changed(
        content, data.draw(st.sampled_from(keys)), None if how == "null" else value, how.replace("null", "replace")
    )
    before = file.read_bytes()
    try:
        file.write_text(json.dumps(new))
        tried(used, taken)
    finally:
        file.write_bytes(before)


# ---------------------------------------------------------------- prompts


@fuzz
@given(st.binary(max_size=120) | st.text(max_size=120).map(lambda t: t.encode("utf-8", "replace")))
def test_any_bytes_as_prompts(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "my.txt"
    path.write_bytes(content)
    tried(config.resolve, algo="dpo", reward="clip", prompts=path)


@pytest.mark.parametrize(
    ("lines", "works"),
    [
        ([], False),
        (["a llama"], True),
        (["a red ring"], False),  # held out
        (["a llama", "a llama"], False),
        ([f"a llama number {i}" for i in range(10_000)], True),
        (["a " + "very " * 30_000 + "red llama"], True),
        (["ein roter Kreis", "赤い円", "دائرة حمراء", "красный круг"], True),
        (["a llama\x00", "\x1b[31ma llama"], True),
        (["\ufeffa llama"], True),
    ],
)
def test_prompts_of_every_kind(tmp_path: Path, lines: list[str], works: bool) -> None:
    path = tmp_path / "my.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert (tried(config.resolve, algo="dpo", reward="clip", prompts=path) is not None) == works
