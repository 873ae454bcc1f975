"""Checkpoints as people have them: loaded, or refused in one line that names the part; the doctor says the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny import tokenizers_read_once

from bench_dfusion import micro
from bench_dfusion.errors import UsageError, plain
from bench_dfusion.models import layout
from bench_dfusion.models.base import Adapter, square, token_limit
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.tracks.schema import ModelSection

Damage = Callable[[Path], Any]


@pytest.fixture
def folder(pixart_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny PixArt, to be changed."""
    return shutil.copytree(pixart_dir, tmp_path / "model")


def load(folder: Path, device: str = "cpu", **options: Any) -> Adapter:
    return load_adapter(ModelSection(id=str(folder), **options), device)[0]


def weights(folder: Path, part: str = "transformer") -> Path:
    (file,) = (folder / part).glob("*.safetensors")
    return file


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], part: str = "transformer") -> None:
    tensors = load_file(weights(folder, part))
    change(tensors)
    save_file(tensors, weights(folder, part), {"format": "pt"})


def rename(file: Path, variant: str) -> None:
    file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))


def shard(folder: Path, variant: str | None = None) -> list[Path]:
    """The transformer's weights in pieces, as diffusers writes them."""
    network = PixArtTransformer2DModel.from_pretrained(folder / "transformer")
    weights(folder).unlink()
    network.save_pretrained(folder / "transformer", max_shard_size="20KB", variant=variant)
    return sorted((folder / "transformer").glob("*-of-*.safetensors"))


def same(a: Adapter, b: Adapter) -> bool:
    first, second = a.network.state_dict(), b.network.state_dict()
    return first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("parts", [("transformer", "text_encoder", "vae"), ("vae",)])
@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_a_variant_alone_is_taken(variant: str, parts: tuple[str, ...], folder: Path, pixart_dir: Path) -> None:
    for part in parts:
        rename(weights(folder, part), variant)
    assert same(load(folder), load(pixart_dir)) and load(folder, "meta")


def test_the_plain_weights_are_taken_where_there_are_both(folder: Path, pixart_dir: Path) -> None:
    before = layout.read(folder).sha256()
    tensors = {k: v + 1 for k, v in load_file(weights(folder)).items()}
    save_file(tensors, weights(folder).with_name("diffusion_pytorch_model.fp16.safetensors"), {"format": "pt"})
    assert same(load(folder), load(pixart_dir))
    assert layout.read(folder).sha256() == before, "what is not taken is not hashed"


@pytest.mark.parametrize("variant", [None, "bf16"])
def test_shards_are_read_by_their_index(variant: str | None, folder: Path, pixart_dir: Path) -> None:
    assert len(shard(folder, variant)) > 2
    assert same(load(folder), load(pixart_dir)) and load(folder, "meta")
    assert len(layout.read(folder).parts["transformer"].weights.files) > 2  # type: ignore[union-attr]


@pytest.mark.parametrize("left", [None, "pytorch_model.bin"])
def test_parts_that_are_never_asked_are_not_needed(left: str | None, sd_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd_dir, tmp_path / "sd")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit(folder / layout.INDEX, safety_checker=checker, feature_extractor=["transformers", "CLIPImageProcessor"])
    if left:
        (folder / "safety_checker").mkdir()
        (folder / "safety_checker" / left).write_bytes(b"pickled")
    adapter = load(folder)
    assert adapter.pipe.safety_checker is None and adapter.pipe.feature_extractor is None
    assert set(adapter.pipe.components) == set(DiffusionPipeline.from_pretrained(sd_dir).components)
    assert load(folder, "meta")


def test_weights_under_older_names_are_read(folder: Path, sd_dir: Path, tmp_path: Path) -> None:
    """As the first checkpoints have them: CLIP's below text_model, the autoencoder's attention as query, key, value."""
    old = shutil.copytree(sd_dir, tmp_path / "sd")
    clip = {
        f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(weights(old, "text_encoder")).items()
    }
    clip["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(clip, weights(old, "text_encoder"), {"format": "pt"})
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = load_file(weights(old, "vae"))
    for new, name in names.items():
        vae = {k.replace(f".{new}.", f".{name}."): v for k, v in vae.items()}
    assert any("proj_attn" in k for k in vae)
    save_file(vae, weights(old, "vae"), {"format": "pt"})
    ours, theirs = load(old), load(sd_dir)
    for part in ("vae", "text_encoder"):
        a, b = (getattr(x.pipe, part).state_dict() for x in (ours, theirs))
        assert all(torch.equal(a[k], b[k]) for k in b)
    assert load(old, "meta")


# ---------------------------------------------------------------- what is refused


def pickled(folder: Path, part: str = "transformer") -> None:
    file = weights(folder, part)
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def pointer(path: Path) -> None:
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n")


def two_variants(folder: Path) -> None:
    file = weights(folder)
    shutil.copy(file, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    rename(file, "bf16")


REFUSED: dict[str, tuple[Damage, str]] = {
    "no index": (lambda f: (f / layout.INDEX).unlink(), "no diffusers pipeline"),
    "index no JSON": (lambda f: (f / layout.INDEX).write_text("{"), "is no JSON"),
    "index a list": (lambda f: (f / layout.INDEX).write_text("[]"), "no JSON object"),
    "index a pointer": (lambda f: pointer(f / layout.INDEX), "git lfs pull"),
    "no pipeline class": (lambda f: edit(f / layout.INDEX, _class_name=None), "names no pipeline"),
    "a part null": (lambda f: edit(f / layout.INDEX, vae=[None, None]), "has no vae: its model_index.json names none"),
    "a part not named": (lambda f: edit(f / layout.INDEX, tokenizer=...), "has no tokenizer: its model_index.json"),
    "a part half named": (lambda f: edit(f / layout.INDEX, vae=["diffusers"]), "not a library and a class"),
    "a class unknown": (lambda f: edit(f / layout.INDEX, vae=["diffusers", "AutoencoderXL"]), "AutoencoderXL of diff"),
    "a library unknown": (lambda f: edit(f / layout.INDEX, vae=["antigravity", "Vae"]), "Vae of antigravity"),
    "a tokenizer as network": (lambda f: edit(f / layout.INDEX, vae=["transformers", "T5Tokenizer"]), "PixArtSigmaPi"),
    "no part": (lambda f: shutil.rmtree(f / "text_encoder"), "has no text_encoder: its model_index.json names one"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "has no tokenizer"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "has no scheduler"),
    "no padding": (lambda f: edit(f / "tokenizer" / "tokenizer_config.json", pad_token=None), "no pad_token"),
    "no config": (lambda f: (f / "vae" / "config.json").unlink(), "no vae/config.json"),
    "config no JSON": (lambda f: (f / "vae" / "config.json").write_text("nothing"), r"vae.config.json is no JSON"),
    "config a list": (lambda f: (f / "vae" / "config.json").write_text("[1]"), "no JSON object"),
    "config of another class": (
        lambda f: edit(f / "vae" / "config.json", act_fn="nothing"),
        "its vae cannot be loaded as a",
    ),
    "no weights": (lambda f: weights(f).unlink(), "the transformer has no weights"),
    "weights pickled": (pickled, "the transformer has only diffusion_pytorch_model.bin, and weights must be safetensors"),
    "weights empty": (lambda f: weights(f).write_bytes(b""), "is no safetensors file .it is empty"),
    "weights a pointer": (lambda f: pointer(weights(f)), "git lfs pull"),
    "weights cut": (lambda f: weights(f).write_bytes(weights(f).read_bytes()[:-100]), "is damaged"),
    "weights of two variants": (two_variants, "the transformer has the variants bf16, fp16"),
    "weights missing": (lambda f: rewrite(f, lambda t: t.pop("proj_out.weight")), "transformer lacks 1 tensors"),
    "text weights missing": (
        lambda f: rewrite(f, lambda t: t.pop(next(k for k in t if "layer_norm" in k)), "text_encoder"),
        "text_encoder lacks 1 tensors",
    ),
    "weights of another shape": (
        lambda f: rewrite(f, lambda t: t.update({"proj_out.weight": torch.zeros(3, 3)})),
        "proj_out.weight",
    ),
    "text weights of another shape": (
        lambda f: rewrite(f, lambda t: t.update({next(k for k in t if "layer_norm" in k): torch.zeros(3)}), "text_encoder"),
        "1 tensors of its text_encoder are not of the shape",
    ),
    "a shard missing": (lambda f: shard(f)[1].unlink(), "the transformer lacks diffusion_pytorch_model-00002-of"),
    "a shard cut": (lambda f: (s := shard(f)[1]).write_bytes(s.read_bytes()[:-9]), "is damaged"),
    "no index of shards": (
        lambda f: (shard(f), next((f / "transformer").glob("*.index.json")).unlink()),
        "shards and no index",
    ),
    "an index of nothing": (
        lambda f: (shard(f), edit(next((f / "transformer").glob("*.index.json")), weight_map={})),
        "no index of weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_one_line_here_and_in_the_doctor(case: str, folder: Path) -> None:
    damage, expected = REFUSED[case]
    damage(folder)
    for device in ("cpu", "meta"):
        with pytest.raises(UsageError, match=expected) as refused:
            load(folder, device)
        assert "\n" not in str(refused.value)


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    def overflow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["proj_out.weight"][0, 0] = 1e5  # finite, but in float16

    rewrite(folder, overflow)
    load(folder, dtype="bfloat16")
    with pytest.raises(UsageError, match="transformer are not finite in float16, proj_out.weight for one"):
        load(folder, dtype="float16")
    for value in ("nan", "-inf"):
        rewrite(folder, lambda t, value=value: t["proj_out.weight"].__setitem__((0, 1), float(value)))
        with pytest.raises(UsageError, match="the weights of its transformer are not finite, proj_out.weight for one"):
            load(folder)


@pytest.mark.parametrize(
    ("name", "tensors", "expected"),
    [
        ("model.safetensors", {"model.diffusion_model.x": torch.zeros(2)}, "StableDiffusionPipeline as P; P.from_sing"),
        ("model.ckpt", None, "only .safetensors can be converted"),
        ("model.bin", None, "only .safetensors can be converted"),
        ("empty.safetensors", None, "is no safetensors file"),
    ],
)
def test_a_single_file_is_told_how_to_become_a_directory(
    name: str, tensors: dict[str, torch.Tensor] | None, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if tensors is None:
        path.write_bytes(b"")
    else:
        save_file(tensors, path)
    with pytest.raises(UsageError, match=expected) as refused:
        load(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["", "~nobody-of-this-name/x", "x" * 5000, "a\0b", "no/such-dir"])
def test_a_name_that_is_no_model_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="no model") as refused:
        load_adapter(ModelSection(id=name))
    assert "\n" not in plain(refused.value)


# ---------------------------------------------------------------- what configs leave open


@pytest.mark.parametrize(("name", "part"), [("sd", "unet"), ("sdxl", "unet"), ("sd3", "transformer")])
@tokenizers_read_once()
def test_a_sample_size_of_every_form(name: str, part: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue(f"{name}_dir")
    side = load(source, "meta").own_latent_side
    folder = shutil.copytree(source, tmp_path / "model")
    config = folder / part / "config.json"
    edit(config, sample_size=[side, side])
    assert load(folder, "meta").latent_shape[1:] == (side, side)
    for size in (None, [side, side + 8]):
        edit(config, sample_size=size)
        with pytest.raises(UsageError, match="track.model.resolution"):
            assert load(folder, "meta").latent_shape
        assert load(folder, "meta", resolution=32).latent_shape[1:] == (16, 16)
    expected, found = load(source, resolution=32), load(folder, resolution=32)
    assert same(found, expected)


def test_a_sample_size_that_positions_are_made_from(folder: Path, pixart_dir: Path) -> None:
    config = folder / "transformer" / "config.json"
    side = json.loads(config.read_text())["sample_size"]
    edit(config, sample_size=[side, side])
    found, expected = load(folder), load(pixart_dir)
    assert torch.equal(found.network.pos_embed.pos_embed, expected.network.pos_embed.pos_embed)  # type: ignore[union-attr]
    for size in (None, [side, side + 8]):
        edit(config, sample_size=size)
        for resolution in (None, 32):
            with pytest.raises(UsageError, match="sample_size .* positions are made"):
                load(folder, resolution=resolution)


@pytest.mark.parametrize(
    ("name", "tokenizers", "length"),
    [
        ("sd", ("tokenizer",), 77),
        ("sdxl", ("tokenizer", "tokenizer_2"), 77),
        ("sd3", ("tokenizer", "tokenizer_2", "tokenizer_3"), 77),
        ("flux", ("tokenizer", "tokenizer_2"), 512),
        ("pixart", ("tokenizer",), 16),
    ],
)
def test_a_tokenizer_without_a_length(
    name: str, tokenizers: tuple[str, ...], length: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(f"{name}_dir")
    folder = shutil.copytree(source, tmp_path / "model")
    for tokenizer in tokenizers:
        edit(folder / tokenizer / "tokenizer_config.json", model_max_length=...)
    found, expected = load(folder), load(source)
    assert found.text_length == length
    ours, theirs = (a.encode(["a red ring"]) for a in (found, expected))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    found.drop_text()
    assert found.text_length == length


@pytest.mark.parametrize(
    ("own", "positions", "expected"),
    [(10**30, 77, 77), (None, 77, 77), (512, 77, 77), (77, None, 77), (10**30, None, None)],
)
def test_the_length_of_a_text(own: int | None, positions: int | None, expected: int | None) -> None:
    encoder = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=positions))
    assert token_limit(SimpleNamespace(model_max_length=own), encoder) == expected


@pytest.mark.parametrize(
    ("size", "side"), [(16, 16), ([16, 16], 16), ([16, 24], None), ([16], None), ("16", None), (0, None)]
)
def test_the_side_of_a_sample_size(size: Any, side: int | None) -> None:
    assert square(size) == side


def test_a_tokenizer_longer_than_its_encoder(sd_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd_dir, tmp_path / "model")
    edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=512)
    assert load(folder).text_length == 77
    assert load(folder).encode(["a red ring"])["states"].shape[1] == 77


# ---------------------------------------------------------------- the hash


def test_the_hash_is_of_what_is_taken(folder: Path) -> None:
    before = layout.read(folder).sha256()
    (folder / "README.txt").write_text("mine")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    assert layout.read(folder).sha256() == before
    edit(folder / "scheduler" / "scheduler_config.json", beta_end=0.03)
    changed = layout.read(folder).sha256()
    assert changed != before
    rewrite(folder, lambda t: t["proj_out.weight"].add_(1))
    assert layout.read(folder).sha256() not in (before, changed)


def test_the_embedded_models_hash_is_its_tracks() -> None:
    from bench_dfusion.util import files

    assert layout.read(micro.PIPELINE).sha256() == files.tree_sha256(micro.PIPELINE)


# ---------------------------------------------------------------- the Hub


def test_a_hub_pipeline_of_variants_is_downloaded_without_the_rest(hub: Any, hub_home: Path, folder: Path) -> None:
    for part in ("transformer", "vae"):
        rename(weights(folder, part), "fp16")
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    files |= {"all-in-one.safetensors": b"not for us", "transformer/diffusion_pytorch_model.non_ema.bin": b"pickled"}
    hub.create("org/variants", files)
    section = ModelSection(id="org/variants")
    hollow, _ = load_adapter(section, "meta")
    assert not list(hub_home.rglob("*.safetensors")), "the doctor reads headers"
    adapter, digest = load_adapter(section)
    taken = {p.name for p in hub_home.rglob("*") if p.suffix in (".safetensors", ".bin")}
    assert taken == {"diffusion_pytorch_model.fp16.safetensors", "model.safetensors"}
    assert digest == layout.read(folder).sha256()
    assert hollow.network.num_parameters() == adapter.network.num_parameters()
