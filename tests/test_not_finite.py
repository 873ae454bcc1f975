"""Every tensor that leaves a network is looked at: the message names the network, its dtype and what to set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.errors import PluginError, UsageError
from bench_dfusion.models.base import Adapter, NotFinite, finite
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.rewards.contract import RewardConfig
from bench_dfusion.runs import config, evaluation, rescore
from bench_dfusion.runs.evaluation import Drawn
from bench_dfusion.testing.fakes import RED, Red, ddim, draw, fake_policy
from bench_dfusion.tracks.schema import ModelSection
from bench_dfusion.util import parallel


@pytest.fixture(scope="module")
def half(sd_dir: Path) -> Adapter:
    """A tiny Stable Diffusion in float16, its autoencoder too, as without force_upcast."""
    adapter = load_adapter(ModelSection(id=str(sd_dir), dtype="float16", resolution=32))[0]
    adapter.pipe.vae.half()
    return adapter


def scaled(module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, factor: float = 1e7) -> None:
    """Weights so large that float16 overflows."""
    for parameter in module.parameters():
        monkeypatch.setattr(parameter, "data", (parameter.data.float() * factor).to(parameter.dtype))


FORCE = r"not finite \(AutoencoderKL, float16\): float16 overflows, set force_upcast in the vae's config.json to true, or track.model.dtype=float32"


def test_a_decoder_and_an_encoder_that_overflow(half: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    vae: Any = half.pipe.vae
    latents, images = torch.ones(2, *half.latent_shape), torch.full((2, 3, 32, 32), 0.5)
    with torch.no_grad():
        assert half.decode(latents).isfinite().all() and half.encode_images(images).isfinite().all()
        with monkeypatch.context() as patch:
            scaled(vae.decoder.conv_in, patch)
            with pytest.raises(NotFinite, match="the decoder's pictures are " + FORCE):
                half.decode(latents)
        scaled(vae.encoder.conv_in, monkeypatch)
        with pytest.raises(NotFinite, match="the encoder's latents are " + FORCE):
            half.encode_images(images)


def test_infinity_is_no_white_picture(half: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half.pipe.vae, "decode", lambda x, return_dict: (torch.full((2, 3, 8, 8), torch.inf),))
    with torch.no_grad(), pytest.raises(NotFinite, match="the decoder's pictures"):
        half.decode(torch.zeros(2, *half.latent_shape))


def test_a_text_encoder_that_overflows_is_named_with_the_prompt(half: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(half, steps=2, batch=2)
    scaled(half.pipe.text_encoder, monkeypatch)
    with pytest.raises(
        NotFinite, match=r"text encoder's states of 'a bus' are not finite \(CLIPTextModel, float16\).*bfloat16"
    ):
        policy.condition(["a bus"])


def test_a_network_is_looked_at_wherever_it_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = fake_policy(scheduler=ddim())
    good = draw(policy, ["a", "b"])
    plain = policy.adapter.predict
    monkeypatch.setattr(policy.adapter, "predict", lambda *inputs: plain(*inputs) * torch.inf)
    what = r"the network's predictions are not finite \(Network, float32\): damaged weights, or training diverged"
    with pytest.raises(NotFinite, match=what):
        policy.sample(["a"], torch.zeros(1, dtype=torch.int64))
    noise = torch.zeros(2, 2, *policy.adapter.latent_shape)
    with pytest.raises(NotFinite, match=what):  # what builders call
        policy.denoise(good.trajectory.latents[:, 2], noise, ["a", "b"])
    with pytest.raises(NotFinite, match=what):
        evaluation.kl(policy, good.trajectory, 1)


def test_a_tensor_without_data_is_not_looked_at() -> None:
    finite(torch.zeros(2, device="meta"), torch.nn.Identity(), "x", torch.float16, "")


class Broken(Red):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().score(images, prompts) / torch.tensor([1.0, 0.0, *[1.0] * (len(images) - 2)])


class Short(Red):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().score(images, prompts)[1:]


@pytest.mark.parametrize(
    ("judge", "why"),
    [(Broken, "judge red returned (inf|nan) for 'a'"), (Short, r"judge red returned shape \(3,\) for 4")],
)
def test_a_judge_that_gives_no_numbers_is_named(judge: type[Red], why: str) -> None:
    samples = draw(fake_policy(scheduler=ddim()), ["a", "a", "b", "b"])
    drawn = Drawn(samples.images, samples.trajectory)
    assert evaluation.judged(RED, "red", drawn, 2).shape == (2, 2)
    with pytest.raises(PluginError, match=why):
        evaluation.judged(judge(RewardConfig()), "red", drawn, 2)


def test_black_pictures_have_a_diversity() -> None:
    found, space = evaluation.diversity(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), 2, None)
    assert found.tolist() == pytest.approx([1.0]) and space == "pixels"


def test_an_evaluation_of_weights_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*inputs: Any) -> None:
        raise NotFinite("the decoder's pictures are not finite")

    monkeypatch.setattr(evaluation, "evaluate", broken)
    with pytest.raises(UsageError, match="my.safetensors on micro-v1: the decoder's pictures are not finite"):
        rescore._evaluated(fake_policy(scheduler=ddim()), config.resolve_track("micro"), {}, {}, None, "my.safetensors")


def test_every_process_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    theirs = NotFinite("theirs")
    for own, others in ((None, theirs), (NotFinite("own"), [2.0])):
        monkeypatch.setattr(parallel, "_gather", lambda value, others=others: [value, others])

        def work(part: int, own: NotFinite | None = own) -> float:
            if own is not None:
                raise own
            return float(part)

        with pytest.raises(NotFinite, match="theirs" if own is None else "own"):
            parallel.each(work, [1, 2])
