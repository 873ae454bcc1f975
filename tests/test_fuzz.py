"""Whatever a file or an option holds, the outcome is a success or one line that says what is wrong, never a traceback."""

from __future__ import annotations

import copy
import csv
import io
import json
import shutil
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import icc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image as Picture
from PIL import ImageOps

from bench_dfusion import errors, registry
from bench_dfusion.builders import preference_data
from bench_dfusion.errors import UsageError
from bench_dfusion.results import records
from bench_dfusion.runs import config
from bench_dfusion.tracks import prompts, schema
from bench_dfusion.util import picture_reader

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
        shown = errors.plain(error)
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
    return tomllib.loads(registry.shipped_tracks()["micro"].read_text()) | {
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
    tried(schema.validate, schema.Track, content, "track")


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
    from bench_dfusion.diffusion.policy import Policy
    from bench_dfusion.models.loading import load_adapter

    section = schema.ModelSection(id=str(folder))
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


FORMS = [".txt", "", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet"]
NAMES = st.sampled_from(["prompt", "Prompt", "text", "caption", "category", "template", "id", ""]) | st.text(max_size=4)
CELLS = st.sampled_from(["a llama", "A llama.", "a red ring", "", '"', "a, b\tc\nd", "\ufeff", "\x00"]) | VALUES


def given_prompts(path: Path) -> None:
    """Read a file of prompts: those it holds are texts with single spaces."""
    found = tried(prompts.read_prompts, path)
    for prompt in found[0] if found else ():
        assert prompt == " ".join(prompt.split()) and prompts.same(prompt) and not prompts.unprintable(prompt)


@fuzz
@given(
    st.binary(max_size=120) | st.text(max_size=120).map(lambda t: t.encode("utf-8", "replace")),
    st.sampled_from([b"", b"prompt\n", b"id\tprompt\n", b"\xef\xbb\xbf", b"\xff\xfe", b"[", b'{"prompt": ', b"PAR1"]),
    st.sampled_from(FORMS),
)
def test_any_bytes_as_prompts(tmp_path: Path, content: bytes, start: bytes, form: str) -> None:
    path = tmp_path / f"my{form}"
    path.write_bytes(start + content)
    given_prompts(path)
    tried(config.resolve, algo="dpo", reward="clip", prompts=path)


@fuzz
@given(st.lists(st.dictionaries(NAMES, CELLS, max_size=3) | CELLS, max_size=4), st.sampled_from(FORMS), st.data())
def test_any_table_as_prompts(tmp_path: Path, rows: list[Any], form: str, data: st.DataObject) -> None:
    path = tmp_path / f"my{form}"
    if form == ".parquet":
        try:
            pq.write_table(pa.Table.from_pylist([row for row in rows if isinstance(row, dict)]), path)
        except (pa.ArrowException, ValueError, TypeError, OverflowError):  # no table
            assume(False)
    elif form in (".csv", ".tsv"):
        with open(path, "w", encoding="utf-8", errors="replace", newline="") as file:
            writer = csv.writer(file, "excel-tab" if form == ".tsv" else data.draw(st.sampled_from(["excel", "unix"])))
            writer.writerows([list(row) if isinstance(row, dict) else [row, row] for row in rows])
    else:
        text = json.dumps(rows) if data.draw(st.booleans()) else "\n".join(map(json.dumps, rows))
        path.write_text(text, encoding="utf-8", errors="replace")
    given_prompts(path)


@fuzz
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_damaged_table_of_prompts(tmp_path: Path, place: int, byte: int) -> None:
    path = tmp_path / "my.parquet"
    pq.write_table(pa.table({"prompt": ["a llama", "a fox"], "category": ["x", None]}), path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = byte
    path.write_bytes(content)
    given_prompts(path)


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
        (["a llama\x00", "a fox"], False),
        (["\x1b[31ma llama"], False),
        (["\ufeffa llama"], True),
        (["A  RED ring."], False),  # held out, in other letters
    ],
)
def test_prompts_of_every_kind(tmp_path: Path, lines: list[str], works: bool) -> None:
    path = tmp_path / "my.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert (tried(config.resolve, algo="dpo", reward="clip", prompts=path) is not None) == works


# ---------------------------------------------------------------- pictures and pairs

MODES = ("1", "L", "P", "PA", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "I;16B")
KINDS = ("PNG", "TIFF", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TGA", "JPEG2000", "ICO")


@st.composite
def picture_files(draw: st.DrawFn) -> bytes:
    """A picture of any mode, size and content in any file that holds it, sometimes with a byte or its end changed."""
    mode, kind = draw(st.sampled_from(MODES)), draw(st.sampled_from(KINDS))
    width, height = draw(st.sampled_from([(1, 1), (1, 300), (300, 1), (17, 5)]))
    size = len(Picture.new(mode, (width, height)).tobytes())
    content = np.random.default_rng(draw(st.integers(0, 9))).bytes(size)
    if draw(st.booleans()):
        content = bytes([draw(st.integers(0, 255))]) * size
    image = Picture.frombytes(mode, (width, height), content)
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["icc_profile"] = draw(
            st.sampled_from([b"broken", icc.grey(1.8), icc.rgb(icc.GREEN, icc.RED, icc.BLUE)])
        )
    if draw(st.booleans()):
        exif = Picture.Exif()
        exif[0x0112] = draw(st.sampled_from([1, 3, 6, 99]))
        options["exif"] = draw(st.sampled_from([exif.tobytes(), b"Exif\0\0II"]))
    if mode in ("L", "P", "RGB") and kind == "PNG" and draw(st.booleans()):
        options["transparency"] = (1, 2, 3) if mode == "RGB" else draw(st.integers(0, 255))
    data = io.BytesIO()
    try:
        image.save(data, kind, **options)
    except Exception:  # a file that cannot hold this
        assume(False)
    found = bytearray(data.getvalue())
    if draw(st.booleans()):
        found[draw(st.integers(0, len(found) - 1))] ^= draw(st.integers(1, 255))
        found = found[: draw(st.integers(len(found) // 2, len(found)))]
    return bytes(found)


@settings(fuzz, max_examples=300)
@given(picture_files() | st.binary(max_size=60))
def test_any_picture_is_8_bit_rgb_or_one_line(content: bytes) -> None:
    try:
        image = picture_reader.read(content, lambda reason: None)
    except picture_reader.PictureError as error:
        shown = errors.plain(error)
        assert shown.strip() and "\n" not in shown and shown.isprintable()
        return
    pixels = np.asarray(image)
    assert image.mode == "RGB" and pixels.dtype == np.uint8 and pixels.shape == (*image.size[::-1], 3)
    assert ImageOps.fit(image, (8, 8)).size == (8, 8)


COLUMNS = st.one_of(
    st.lists(st.floats() | st.none(), min_size=3, max_size=3),
    st.lists(st.floats(-2, 2, width=16), min_size=3, max_size=3),
    st.lists(st.integers(-3, 2**62) | st.none(), min_size=3, max_size=3),
    st.lists(st.booleans() | st.none(), min_size=3, max_size=3),
    st.lists(st.text(max_size=4), min_size=3, max_size=3),
    st.lists(st.lists(st.floats(), max_size=2), min_size=3, max_size=3),
    st.lists(st.binary(max_size=4) | st.none(), min_size=3, max_size=3),
    st.lists(st.fixed_dictionaries({"a": st.integers(0, 9)}), min_size=3, max_size=3),
)
NAMES = ("prompt", "chosen", "rejected", "chosen_score", "rejected_score", "reward", "mask")


@settings(fuzz, max_examples=30)
@given(
    st.fixed_dictionaries({"chosen_score": COLUMNS, "rejected_score": COLUMNS})
    | st.dictionaries(st.sampled_from(NAMES), COLUMNS, min_size=1, max_size=3)
)
def test_any_columns_of_pairs(tmp_path: Path, columns: dict[str, list[Any]]) -> None:
    white = io.BytesIO()
    Picture.new("RGB", (8, 8), "white").save(white, "PNG")
    picture = {"bytes": white.getvalue(), "path": None}
    content = {"prompt": ["a", "b", "c"], "chosen": [picture] * 3, "rejected": [picture] * 3, **columns}
    kinds = {n: datasets.Image() for n in ("chosen", "rejected") if n not in columns}
    data = datasets.Dataset.from_dict(content)
    for name, kind in kinds.items():
        data = data.cast_column(name, kind)
    data.save_to_disk(tmp_path / "mine")
    found = tried(preference_data.read, str(tmp_path / "mine"))
    if found is not None:
        chosen, rejected = found.scores(range(len(found)))
        assert 0 < len(found) == 3 - found.ties and len(found.sha256) == 64
        assert (chosen > rejected).all() and chosen.isfinite().all() and rejected.isfinite().all()
        assert found.pictures([0], 4)[0].shape == (1, 4, 4, 3)
