"""LoRA files of other trainers: read as diffusers and peft read them, or refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import policy_of

from bench_dfusion.diffusion import lora
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.errors import UsageError
from bench_dfusion.models.base import Adapter
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.tracks.schema import ModelSection

PROMPTS = ["a red circle", "two blue rings"]


def read(path: Path, model: Path) -> Policy:
    """A policy with the LoRA of a file, of the file's own shape."""
    adapter, _ = load_adapter(ModelSection(id=str(model)))
    own = lora.read(lora.locate(path), adapter)
    policy = Policy(adapter, steps=4, config=own.config)
    policy.load_state(own.state)
    return policy


def assert_same(policy: Policy, network: torch.nn.Module) -> None:
    """The policy's network and another one, with its LoRA, answer alike; and not like the base."""
    x, t = (
        torch.randn(2, *policy.adapter.latent_shape, generator=torch.Generator().manual_seed(0)),
        torch.tensor([9, 700]),
    )
    with torch.no_grad():
        found = policy.predict(x, t, PROMPTS)
        with policy.reference():
            assert not torch.allclose(policy.predict(x, t, PROMPTS), found, atol=1e-4)
        policy.adapter.network = network.eval()
        torch.testing.assert_close(found, policy.predict(x, t, PROMPTS), atol=1e-5, rtol=1e-4)


def with_diffusers(path: Path, model: Path) -> torch.nn.Module:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(path)
    return pipe.unet


def test_what_a_policy_saves_is_read_like_diffusers_reads_it(sd_dir: Path, tmp_path: Path) -> None:
    policy_of(sd_dir, lora=0.3, rank=2, alpha=7.0, targets=["attn2.to_k", "attn2.to_v"]).save(tmp_path)
    found = read(tmp_path, sd_dir)
    assert (found.lora_config.r, found.lora_config.lora_alpha) == (2, 7)
    assert_same(found, with_diffusers(tmp_path, sd_dir))
    assert_same(read(tmp_path / "peft", sd_dir), found.adapter.network)


def test_pixart_keeps_its_alpha_too(pixart_dir: Path, tmp_path: Path) -> None:
    saved = policy_of(pixart_dir, lora=0.3, rank=2, alpha=6.0)
    saved.save(tmp_path)
    assert_same(read(tmp_path, pixart_dir), saved.adapter.network)
    assert_same(read(tmp_path / "peft", pixart_dir), saved.adapter.network)


def test_kohya_files_bring_an_alpha_for_each_module(sd_dir: Path, tmp_path: Path) -> None:
    tensors, generator = {}, torch.Generator().manual_seed(0)
    network = load_adapter(ModelSection(id=str(sd_dir)))[0].network
    modules = [(n, m) for n, m in network.named_modules() if n.endswith(("attn1.to_q", "attn2.to_out.0", "ff.net.2"))]
    for i, (name, module) in enumerate(modules):
        rank, alpha, flat = 2 + i % 2, 1 + i / 8, "lora_unet_" + name.replace(".", "_")
        down = torch.randn(rank, module.in_features, generator=generator) / 3
        up = torch.randn(module.out_features, rank, generator=generator) / 9
        tensors |= {
            f"{flat}.lora_down.weight": down,
            f"{flat}.lora_up.weight": up,
            f"{flat}.alpha": torch.tensor(alpha),
        }
        module.weight.data += alpha / rank * up @ down
    save_file(tensors, tmp_path / "kohya.safetensors")
    found = read(tmp_path / "kohya.safetensors", sd_dir)
    assert len(found.parameters) == 2 * len(modules)
    assert_same(found, network)


@pytest.mark.parametrize(
    "options",
    [
        {
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"transformer_blocks.0.attn1.to_q": 2},
            "alpha_pattern": {"transformer_blocks.0.attn1.to_q": 1},
        },
        {"r": 4, "lora_alpha": 2, "use_rslora": True},
        {"r": 2, "use_dora": True},
    ],
)
def test_peft_directories_of_every_scale(options: dict[str, Any], pixart_dir: Path, tmp_path: Path) -> None:
    adapter, _ = load_adapter(ModelSection(id=str(pixart_dir)))
    config = LoraConfig(target_modules=r".*attn1\.to_[qk]", lora_dropout=0.5, init_lora_weights=False, **options)
    torch.manual_seed(0)
    model = get_peft_model(adapter.network, config)
    model.save_pretrained(str(tmp_path))
    assert_same(read(tmp_path, pixart_dir), model)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_a_prefix_changes_nothing(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """What diffusers and peft wrote, under the names that other programs give it."""
    model = request.getfixturevalue(f"{name}_dir")
    policy_of(model, lora=0.3, rank=2).save(tmp_path)
    adapter, _ = load_adapter(ModelSection(id=str(model)))
    own, part = lora.read(tmp_path / lora.FILE, adapter), f"{adapter.network_name}."
    bare = {key.removeprefix(part): value for key, value in load_file(tmp_path / lora.FILE).items()}
    shutil.copy(tmp_path / "peft" / lora.PEFT_FILE, tmp_path / "alone.safetensors")  # without its configuration
    files = [tmp_path / "alone.safetensors"]
    for i, prefix in enumerate(["", *lora.PREFIXES, f"base_model.model.{part}", f"{part}base_model.model."]):
        files.append(tmp_path / f"{i}.safetensors")
        save_file({f"{prefix}{key}": value for key, value in bare.items()}, files[-1])
    files.append(tmp_path / "adapter.safetensors")  # a peft model's own state
    save_file({f"base_model.model.{k.replace('.weight', '.default.weight')}": v for k, v in bare.items()}, files[-1])
    for file in files:
        found = lora.read(file, adapter)
        assert found.config.to_dict() == own.config.to_dict(), file
        assert found.state.keys() == own.state.keys()
        assert all(torch.equal(value, own.state[key]) for key, value in found.state.items())


def test_an_alpha_below_a_prefix_is_read(saved: tuple[Path, Adapter], tmp_path: Path) -> None:
    tensors = {}
    for key, value in load_file(saved[0] / lora.FILE).items():
        module, _, rest = key.removeprefix("transformer.").partition(".lora_")
        tensors[f"diffusion_model.{module}.lora_{ {'A': 'down', 'B': 'up'}[rest[0]] }{rest[1:]}"] = value
        tensors[f"diffusion_model.{module}.alpha"] = torch.tensor(6.0)
    save_file(tensors, tmp_path / "x.safetensors")
    found = lora.read(tmp_path / "x.safetensors", saved[1])
    assert (found.config.r, found.config.lora_alpha, found.config.alpha_pattern) == (2, 6.0, {})


@pytest.fixture(scope="module")
def saved(pixart_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Adapter]:
    """The directory of a LoRA for the tiny PixArt, and the adapter of a fresh one."""
    folder = tmp_path_factory.mktemp("lora")
    policy_of(pixart_dir, lora=0.3, rank=2).save(folder)
    return folder, load_adapter(ModelSection(id=str(pixart_dir)))[0]


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / lora.FILE)), folder / lora.FILE)


def set_peft(folder: Path, **values: Any) -> None:
    path = folder / "peft" / lora.PEFT_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "where", "expected"),
    [
        (
            lambda f: rewrite(f, lambda t: {k.replace("blocks.0", "blocks.7"): v for k, v in t.items()}),
            "",
            "another model",
        ),
        (
            lambda f: rewrite(f, lambda t: t | {"text_encoder.x.lora_A.weight": torch.ones(2)}),
            "",
            "text_encoder beside",
        ),
        (lambda f: rewrite(f, lambda t: {"transformer.proj_out.weight": torch.ones(2)}), "", "no LoRA: none of its 1"),
        (
            lambda f: rewrite(f, lambda t: {f"unet.{k}": v for k, v in t.items()}),
            "",
            "of unet, and this one has a transformer",
        ),
        (
            lambda f: rewrite(f, lambda t: t | {next(iter(t)): torch.full((2, 16), float("nan"))}),
            "",
            "not finite, transformer.transformer_blocks.0.*weight for one",
        ),
        (lambda f: rewrite(f, lambda t: {f"{k}.dora_scale": v for k, v in t.items()}), "", "DoRA"),
        (lambda f: (f / lora.FILE).write_bytes(b"nothing"), "", "cannot be read"),
        (lambda f: (f / lora.FILE).unlink(), "", "holds no LoRA"),
        (lambda f: (f / "peft" / lora.PEFT_FILE).unlink(), "peft", lora.PEFT_FILE),
        (lambda f: (f / "peft" / lora.PEFT_CONFIG).write_text("{"), "peft", "cannot be read"),
        (lambda f: set_peft(f, peft_type="LOKR"), "peft", "LOKR"),
        (lambda f: set_peft(f, init_lora_weights="pissa"), "peft", "pissa"),
        (lambda f: set_peft(f, lora_alpha="much"), "peft", "configuration"),
        (lambda f: (f / "weights.bin").write_bytes(b""), "weights.bin", "no .safetensors"),
        (lambda f: None, "nowhere", "no LoRA at"),
    ],
)
def test_what_is_no_lora_of_this_model_is_refused(
    damage: Callable[[Path], None], where: str, expected: str, saved: tuple[Path, Adapter], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved[0], tmp_path / "lora")
    damage(folder)
    with pytest.raises(UsageError, match=expected) as refused:
        lora.read(lora.locate(folder / where), saved[1])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda t: {k: v[:, :-1].contiguous() for k, v in t.items()}, r"has the shape \[2, 15\], not \[1, 16\]"),
        (lambda t: dict(list(t.items())[1:]), "lora_A.weight is missing"),
        (lambda t: t | {"transformer.proj_out.lora_A.weight": torch.ones(2)}, "proj_out.lora_A.weight is more"),
    ],
)
def test_weights_that_do_not_fit_the_modules_are_refused(damage, expected, pixart_dir: Path, tmp_path: Path) -> None:
    policy_of(pixart_dir, lora=0.3, rank=2).save(tmp_path)
    rewrite(tmp_path, damage)
    with pytest.raises(ValueError, match=expected):
        read(tmp_path, pixart_dir)


def test_a_file_of_equal_content_is_an_equal_file(sd_dir: Path, pixart_dir: Path, tmp_path: Path) -> None:
    """Its name for others is its hash, and the library writes what stands beside the weights in another order each time."""
    for folder in (sd_dir, pixart_dir):
        policy = policy_of(folder, lora=0.3, rank=2, alpha=6.0)
        found = set()
        for i in range(6):
            policy.save(tmp_path / f"{folder.name}{i}")
            found.add((tmp_path / f"{folder.name}{i}" / lora.FILE).read_bytes())
        assert len(found) == 1
        assert lora.read(tmp_path / f"{folder.name}0" / lora.FILE, policy.adapter).config.lora_alpha == 6
