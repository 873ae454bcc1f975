"""Stable Diffusion 1.x, 2.x and XL against diffusers' own pipelines; runs on a tiny XL; schedulers; precision, memory."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file
from tiny import BETAS, policy_of
from torch import Tensor

from bench_dfusion.builders.dfusion.builder import DFusion, DFusionConfig
from bench_dfusion.diffusion import lora, samplers
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.errors import UsageError
from bench_dfusion.models import schedules
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.models.schedulers import ddim_like
from bench_dfusion.models.sdxl import SDXLAdapter
from bench_dfusion.runs import config
from bench_dfusion.tracks.schema import MemorySection, ModelSection

PROMPTS = ["a red circle", "a capybara and an axolotl"]
SEEDS = torch.tensor([3, 4])
PIPELINES = {"sd": StableDiffusionPipeline, "sd21": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def plain(folder: Path) -> Any:
    """diffusers' pipeline of a saved checkpoint, with the DDIM of its betas."""
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    cls = {c.__name__: c for c in PIPELINES.values()}[name]
    pipe = cls.from_pretrained(folder)
    prediction = pipe.scheduler.config.prediction_type
    pipe.scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=["sd", "sd21", "sdxl"])
def both(request: pytest.FixtureRequest) -> tuple[Policy, Any]:
    """A policy, guided and with a LoRA that adds nothing, and diffusers' pipeline of the same checkpoint."""
    folder = request.getfixturevalue(f"{request.param}_dir")
    return policy_of(folder, lora=0, guidance=5.0), plain(folder)


@pytest.fixture(scope="module")
def xl(sdxl_dir: Path) -> Policy:
    return policy_of(sdxl_dir, lora=0, guidance=3.0)


# ---------------------------------------------------------------- as diffusers' own pipelines


def test_prompts_are_encoded_as_the_pipeline_does(both: tuple[Policy, Any]) -> None:
    policy, pipe = both
    ours = policy.condition(PROMPTS)
    given = pipe.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    states, unconditional, *pooled = given
    torch.testing.assert_close(ours["states"], torch.cat([unconditional, states]), atol=1e-5, rtol=1e-5)
    if pooled:
        torch.testing.assert_close(ours["pooled"], torch.cat(pooled[::-1]), atol=1e-5, rtol=1e-5)
        assert not ours["states"][:2].any() and not ours["pooled"][:2].any()  # the checkpoint says so
        side = (pipe.default_sample_size * pipe.vae_scale_factor,) * 2
        ids = pipe._get_add_time_ids(side, (0, 0), side, torch.float32, pooled[0].shape[-1])
        assert torch.equal(ours["time_ids"], ids.expand(4, -1))


def test_the_empty_prompt_is_encoded_where_the_checkpoint_does_not_say_zeros(sdxl_dir: Path) -> None:
    pipe = plain(sdxl_dir)
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    _, states, _, pooled = pipe.encode_prompt([PROMPTS[0]], device="cpu", do_classifier_free_guidance=True)
    ours = SDXLAdapter(pipe).encode(["", PROMPTS[0]])
    torch.testing.assert_close(ours["states"][:1], states, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours["pooled"][:1], pooled, atol=1e-5, rtol=1e-5)
    assert states.any()


def test_pictures_are_the_pipelines_own_where_nothing_is_random(
    both: tuple[Policy, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At an eta of all but 0 the policy draws what diffusers' DDIM draws at 0: the same guided prediction, steps, VAE."""
    policy, pipe = both
    monkeypatch.setattr(policy, "schedule", schedules.ddim_schedule(policy.adapter.scheduler, 4, 1e-7))
    noise = samplers.sample_noise(SEEDS, 4, policy.adapter.latent_shape)[:, 0]
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "eta": 0.0, "latents": noise}
    latents = pipe(PROMPTS, **options, output_type="latent").images
    drawn = policy.sample(PROMPTS, SEEDS)
    error = (drawn.final - latents).abs().max() / latents.abs().max()
    assert error < 1e-4, f"{error:.1e}"  # of float32 over four guided steps
    images = pipe(PROMPTS, **options, output_type="pt").images
    torch.testing.assert_close(policy.adapter.decode(drawn.final), images, atol=1e-4, rtol=0)
    assert images.std() > 0.05 and (images[0] - images[1]).abs().max() > 0.05


def test_every_steps_mean_is_that_of_diffusers(both: tuple[Policy, Any]) -> None:
    policy, pipe = both
    drawn = policy.sample(PROMPTS, SEEDS)
    pipe.scheduler.set_timesteps(4)
    for i, t in enumerate(pipe.scheduler.timesteps):
        x, step = drawn.latents[:, i], torch.full((2,), i)
        with torch.no_grad():
            output = policy.predict(x, torch.full((2,), int(t)), PROMPTS)
            mean = policy.mean(x, step, PROMPTS)
        expected = pipe.scheduler.step(output, t, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
        if i < 3:  # diffusers' last step goes to another place than the papers', timestep 0
            assert (mean - expected).abs().max() < 2e-5 * expected.abs().max()


# ---------------------------------------------------------------- what is refused


def test_an_unsupported_pipeline_is_refused_with_those_supported(sdxl_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline", "_diffusers_version": "0.42.1"}')
    with pytest.raises(UsageError, match="is a KandinskyPipeline; supported are .*StableDiffusionPipeline, .*XLPipe"):
        load_adapter(ModelSection(id=str(tmp_path)))


def test_pickled_weights_are_refused(sd_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(sd_dir, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UsageError, match=r"the unet has only .*\.bin, and weights must be safetensors"):
        load_adapter(ModelSection(id=str(folder)))


def test_networks_and_tokenizers_that_do_not_fit_are_refused(sdxl_dir: Path) -> None:
    pipe = plain(sdxl_dir)
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="distilled"):
        SDXLAdapter(pipe)
    pipe.unet.register_to_config(time_cond_proj_dim=None)
    pipe.text_encoder_2.config.projection_dim = 8
    with pytest.raises(ValueError, match="added embedding of 60 numbers"):
        SDXLAdapter(pipe)
    pipe.text_encoder_2.config.projection_dim = 12
    assert SDXLAdapter(pipe).image_side == 64
    pipe.tokenizer_2.add_tokens(["<axolotl>"])
    with pytest.raises(ValueError, match="two tokenizers"):
        SDXLAdapter(pipe)


def test_kohyas_names_for_xl_are_read(xl: Policy, tmp_path: Path) -> None:
    """They number the blocks as the original code does."""
    blocks = {
        "input_blocks_3_1": "down_blocks.1.attentions.0",
        "middle_block_1": "mid_block.attentions.0",
        "output_blocks_1_1": "up_blocks.0.attentions.1",
    }
    tensors: dict[str, Tensor] = {}
    for theirs in blocks:
        flat = f"lora_unet_{theirs}_transformer_blocks_0_attn2_to_k"
        down, up = torch.randn(2, 40), torch.randn(16, 2)
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "kohya.safetensors")
    found = lora.read(tmp_path / "kohya.safetensors", xl.adapter)
    modules = {key.partition(".lora_")[0] for key in found.state}
    assert modules == {f"{ours}.transformer_blocks.0.attn2.to_k" for ours in blocks.values()}
    assert found.config.lora_alpha == 1


# ---------------------------------------------------------------- schedulers that checkpoints ship

SHIPPED = {k: v for k, v in BETAS.items() if k != "timestep_spacing"}  # older configurations name no spacing


@pytest.mark.parametrize(
    ("scheduler", "spacing"),
    [
        (PNDMScheduler(**SHIPPED, skip_prk_steps=True), "leading"),  # SD 1.5
        (EulerDiscreteScheduler(**BETAS), "leading"),  # SDXL
        (EulerDiscreteScheduler(**SHIPPED), "linspace"),  # that class's default, not DDIM's
        (EulerDiscreteScheduler(**SHIPPED, timestep_spacing="trailing", prediction_type="v_prediction"), "trailing"),
        (
            DDIMScheduler(**BETAS, clip_sample=False, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
            "leading",
        ),
        (DDPMScheduler(**BETAS, clip_sample=False), "leading"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_schedulers_of_checkpoints_are_read_as_they_are(scheduler: Any, spacing: str, tmp_path: Path) -> None:
    scheduler.save_pretrained(tmp_path)
    ours = ddim_like(type(scheduler).from_pretrained(tmp_path))
    assert ours.config.timestep_spacing == spacing
    assert ours.config.prediction_type == scheduler.config.prediction_type
    last = -1 if scheduler.config.get("rescale_betas_zero_snr") else None
    torch.testing.assert_close(ours.alphas_cumprod[:last], scheduler.alphas_cumprod[:last])
    schedule = schedules.ddim_schedule(ours, 5, 1.0)
    scheduler.set_timesteps(5)
    expected = scheduler.timesteps.float()
    if isinstance(scheduler, PNDMScheduler):  # its second step is taken twice
        expected = torch.cat([expected[:1], expected[2:]])
    torch.testing.assert_close(schedule.timesteps.float(), expected, atol=0.5, rtol=0)
    assert schedule.prediction_type == scheduler.config.prediction_type


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(**BETAS),  # clips
        DPMSolverMultistepScheduler(**BETAS, thresholding=True),
        DDIMScheduler(**BETAS, clip_sample=False, prediction_type="sample"),
        EulerDiscreteScheduler(**BETAS, timestep_type="continuous", prediction_type="v_prediction"),
        DPMSolverMultistepScheduler(**BETAS, use_flow_sigmas=True, prediction_type="flow_prediction"),
        EDMEulerScheduler(),
        FlowMatchEulerDiscreteScheduler(),
        DDPMScheduler(beta_schedule="sigmoid", clip_sample=False),
    ],
    ids=lambda s: type(s).__name__,
)
def test_schedulers_that_are_no_policy_are_refused(scheduler: Any) -> None:
    with pytest.raises(
        ValueError, match="clip|prediction_type|continuous|flow|discrete betas|beta_schedule"
    ) as refused:
        schedules.ddim_schedule(ddim_like(scheduler), 4, 1.0)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_with_another_class_of_scheduler_has_the_same_steps(sd_dir: Path, tmp_path: Path) -> None:
    """PNDM, as SD 1.5 ships it, in the place of the DDIM of the same betas."""
    shutil.copytree(sd_dir, tmp_path, dirs_exist_ok=True)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", "PNDMScheduler"]}))
    PNDMScheduler(**SHIPPED, skip_prk_steps=True).save_pretrained(tmp_path / "scheduler")
    ours, expected = (policy_of(f, lora=0).schedule for f in (tmp_path, sd_dir))
    assert vars(ours).keys() == vars(expected).keys()
    assert all(torch.equal(getattr(ours, k), getattr(expected, k)) for k in ("timesteps", "signal", "signal_s", "std"))


# ---------------------------------------------------------------- precision and memory


def half(folder: Path, memory: MemorySection | None = None, dtype: str = "bfloat16", **options: Any) -> Policy:
    section = ModelSection(id=str(folder), dtype=dtype, resolution=32 if folder.name == "flux" else None)
    adapter, _ = load_adapter(section, memory=memory)
    return Policy(adapter, steps=4, guidance=3.0, **options)


@pytest.mark.parametrize(
    ("name", "dtype"), [("sdxl", "bfloat16"), ("pixart", "float16"), ("sd3", "float16"), ("flux", "bfloat16")]
)
def test_frozen_weights_in_half_precision_and_the_rest_in_float32(
    name: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    policy = half(request.getfixturevalue(f"{name}_dir"), dtype=dtype)
    kinds = {"lora_" in n: p.dtype for n, p in policy.adapter.network.named_parameters()}
    assert kinds == {True: torch.float32, False: getattr(torch, dtype)}
    drawn = policy.sample(PROMPTS, SEEDS)
    assert drawn.latents.dtype == drawn.log_probs.dtype == torch.float32 and drawn.latents.isfinite().all()
    step = torch.full((2,), 1)
    again = policy.log_prob(drawn.latents[:, 1], drawn.latents[:, 2], step, PROMPTS)
    torch.testing.assert_close((again.detach() - drawn.log_probs[:, 1]).exp(), torch.ones(2), atol=1e-5, rtol=0)
    again.sum().backward()
    unused = "transformer_blocks.2.attn.add_q_proj"  # of SD 3's last block, which leaves the text's output out
    gradients = [p.grad for n, p in policy.parameters.items() if "lora_B" in n and not n.startswith(unused)]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients)
    pictures = policy.decode(drawn.final)
    assert pictures.dtype == torch.uint8 and policy.encode(pictures).dtype == torch.float32
    if name == "pixart":
        return
    assert policy.adapter.pipe.vae.dtype == torch.float32  # force_upcast
    if name == "sdxl":  # rounded weights draw the same picture, and not another
        whole = request.getfixturevalue("xl").sample(PROMPTS, SEEDS).final
        assert 0 < (whole - drawn.final).abs().mean() < 0.1 * (whole - whole.flip(0)).abs().mean()
    # D-Fusion too, a reference of another prompt: the capybara's noise with the circle's content.
    target, masks = DFusion(DFusionConfig()).targets(policy, drawn, torch.tensor([0]), torch.tensor([1]))
    assert target.latents.isfinite().all() and 0 < masks.mean() < 1
    assert not torch.allclose(target.final, drawn.final[1:], atol=1e-2)


@pytest.mark.parametrize("name", ["sdxl", "pixart", "sd3", "flux"])
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradient(
    name: str, request: pytest.FixtureRequest
) -> None:
    policy = policy_of(request.getfixturevalue(f"{name}_dir"), guidance=3.0, resolution=32 if name == "flux" else None)
    x = samplers.sample_noise(SEEDS, 0, policy.adapter.latent_shape)[:, 0]
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes * (not isinstance(tensor, torch.nn.Parameter)))
        return tensor

    found = []
    for on in (False, True):
        policy.adapter.save_memory(MemorySection(gradient_checkpointing=on))
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            value = policy.log_prob(x, x, torch.zeros(2, dtype=torch.long), PROMPTS)
        before = sum(kept)
        for p in policy.parameters.values():
            p.grad = None
        value.sum().backward()
        found.append((before, torch.cat([p.grad.flatten() for p in policy.parameters.values()])))
    (whole, expected), (less, gradient) = found
    assert less < whole / 2
    torch.testing.assert_close(gradient, expected)


def test_slicing_decodes_one_picture_at_a_time(sdxl_dir: Path) -> None:
    adapter, _ = load_adapter(ModelSection(id=str(sdxl_dir)), memory=MemorySection(vae_slicing=True))
    vae, sizes = adapter.pipe.vae, []
    vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    latents = torch.randn(3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sliced = adapter.decode(latents)
        vae.disable_slicing()
        torch.testing.assert_close(sliced, adapter.decode(latents), atol=1e-5, rtol=0)
    assert sizes == [1, 1, 1, 3]


def test_tiles_are_decoded_apart_encoded_apart_and_make_another_track(sdxl_dir: Path) -> None:
    section = ModelSection(id=str(sdxl_dir), vae_tile=32)
    adapter, _ = load_adapter(section)
    vae, factor = adapter.pipe.vae, adapter.pipe.vae_scale_factor
    latents = torch.randn(1, 4, 64 // factor, 64 // factor, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vae.disable_tiling()
        whole = adapter.decode(latents)
        vae.enable_tiling()
        sides: list[int] = []
        for part, unit in ((vae.decoder, factor), (vae.encoder, 1)):
            part.register_forward_pre_hook(lambda module, args, unit=unit: sides.append(unit * max(args[0].shape[2:])))
        tiled = adapter.decode(latents)
        again = adapter.encode_images(whole)
    assert sides == ([32] * 8 + [16]) * 2  # three by three, each 24 after the other
    assert tiled.shape == whole.shape and again.shape == latents.shape
    assert not torch.equal(tiled, whole)
    plain = section.model_copy(update={"vae_tile": None})
    assert "vae_tile" in section.model_dump() and "vae_tile" not in plain.model_dump()


def test_tiles_that_no_whole_latents_overlap_are_refused(sdxl_dir: Path) -> None:
    with pytest.raises(ValueError, match="model.vae_tile 33 is no multiple of"):
        load_adapter(ModelSection(id=str(sdxl_dir), vae_tile=33))


def test_text_encoders_are_on_the_device_only_while_they_encode(
    sdxl_dir: Path, xl: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[str] = []
    policy = half(sdxl_dir, MemorySection(offload_text=True), "float32")
    both = ("text_encoder", "text_encoder_2")
    for name in both:
        encoder = getattr(policy.adapter.pipe, name)
        monkeypatch.setattr(encoder, "to", lambda device, name=name: moves.append(f"{name} {device}"))
    policy.device = torch.device("cpu", 0)  # to tell it from the place where they rest
    found, expected = policy.condition(PROMPTS), xl.condition(PROMPTS)
    assert moves == [f"{name} {where}" for where in ("cpu:0", "cpu") for name in both]
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    policy.condition(PROMPTS)
    assert len(moves) == 4  # encoded once


def test_how_memory_is_saved_is_no_part_of_what_a_record_is_compared_by() -> None:
    plain_cell = config.resolve(algo="dpo", reward="clip")
    options = ["track.memory.gradient_checkpointing=true", "track.memory.vae_slicing=true"]
    cell = config.resolve(algo="dpo", reward="clip", settings=options)
    assert cell.track.memory.vae_slicing and cell.track.memory.gradient_checkpointing
    assert (cell.track.id, cell.track.hash, cell.hash) == (plain_cell.track.id, plain_cell.track.hash, plain_cell.hash)


def test_attention_of_xl_is_all_self_or_cross(xl: Policy) -> None:
    adapter = xl.adapter
    names = {n for n, m in adapter.network.named_modules() if isinstance(m, Attention)}
    assert names == adapter.attentions("self").keys() | adapter.attentions("cross").keys()


def test_the_documentation_names_tests_that_are_there() -> None:
    tests = Path(__file__).parent
    text = (tests.parent / "docs" / "models.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)", text))
    assert len(named) > 10
    for file, name in named:
        assert f"def {name}(" in (tests / file).read_text(encoding="utf-8"), name
