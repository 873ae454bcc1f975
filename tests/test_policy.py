"""The policy on the real diffusers classes, tiny: noise, log-probs, the frozen reference, LoRA in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import command
from tiny import policy_of

from bench_dfusion.diffusion.policy import Policy, remove_lora
from bench_dfusion.results import records
from bench_dfusion.runs import evaluation

PROMPTS = ["a red circle", "two blue rings", "a green cross", "a red ring above a blue cross", "a cyan square"]
SEEDS = torch.tensor([1, 2, 3, 4, 5])


@pytest.fixture(params=["sd", "sd_v", "sdxl", "pixart", "sd3", "flux"])
def policy(request: pytest.FixtureRequest) -> Policy:
    options = {"guidance": 1.0 if request.param == "pixart" else 3.0}
    options |= {"resolution": 32} if request.param == "flux" else {}
    return policy_of(request.getfixturevalue(f"{request.param}_dir"), lora=0, steps=4, batch=3, **options)


def stir(policy: Policy) -> None:
    """Move the LoRA off zero."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters.values():
            p.add_(0.2 * torch.randn(p.shape, generator=g))


def test_a_sample_depends_on_its_own_seed_and_prompt_alone(policy: Policy) -> None:
    together = policy.sample(PROMPTS, SEEDS)
    for i in (0, 3):
        alone = policy.sample([PROMPTS[i]], SEEDS[i : i + 1])
        torch.testing.assert_close(alone.latents[0], together.latents[i], atol=1e-4, rtol=1e-4)
    order = torch.tensor([4, 2, 0, 1, 3])
    shuffled = policy.sample([PROMPTS[i] for i in order], SEEDS[order])
    torch.testing.assert_close(shuffled.latents, together.latents[order], atol=1e-4, rtol=1e-4)


def test_recomputed_log_probs_are_the_stored_ones(policy: Policy) -> None:
    stir(policy)
    drawn = policy.sample(PROMPTS[:3], SEEDS[:3])
    for i in range(4):
        step = torch.full((3,), i)
        again = policy.log_prob(drawn.latents[:, i], drawn.latents[:, i + 1], step, PROMPTS[:3])
        ratio = (again.detach() - drawn.log_probs[:, i]).exp()
        torch.testing.assert_close(ratio, torch.ones(3), atol=1e-5, rtol=0)


def test_the_reference_is_the_base_and_leaves_no_trace(policy: Policy) -> None:
    x, step = torch.randn(2, *policy.adapter.latent_shape), torch.zeros(2, dtype=torch.long)
    fresh = policy.mean(x, step, PROMPTS[:2]).detach()
    stir(policy)
    trained = policy.mean(x, step, PROMPTS[:2]).detach()
    assert not torch.allclose(trained, fresh, atol=1e-4)
    with policy.reference():
        torch.testing.assert_close(policy.mean(x, step, PROMPTS[:2]), fresh)
    with pytest.raises(RuntimeError, match="boom"), policy.reference():
        raise RuntimeError("boom")
    assert all(p.requires_grad for p in policy.parameters.values())
    out = policy.mean(x, step, PROMPTS[:2])
    torch.testing.assert_close(out.detach(), trained)
    out.sum().backward()
    assert all(p.grad is not None for p in policy.parameters.values())


@pytest.mark.parametrize("options", [{"kind": "cps"}, {"kind": "cps", "eta": 0.4}, {"eta": 0.0}])
def test_every_family_samples_in_every_way(policy: Policy, options: dict[str, Any]) -> None:
    """Log-probs are those of the steps; where none has a density the pictures follow from the start noise alone."""
    of = policy.adapter
    remove_lora(of.network)
    policy = Policy(of, steps=3, batch=3, guidance=policy.guidance, **options)
    drawn = policy.sample(PROMPTS[:2], SEEDS[:2])
    assert drawn.latents.isfinite().all()
    for i in range(3):
        step = torch.full((2,), i)
        again = policy.log_prob(drawn.latents[:, i], drawn.latents[:, i + 1], step, PROMPTS[:2])
        torch.testing.assert_close(again.detach(), drawn.log_probs[:, i], atol=1e-4, rtol=1e-4)
    noisy = bool(policy.schedule.stochastic.any())
    assert noisy == (options.get("eta") != 0) == bool(drawn.log_probs.any())
    start = drawn.latents[:, 0]
    other, _ = policy.denoise(start, torch.randn(2, 3, *start.shape[1:]), PROMPTS[:2])
    assert torch.allclose(other[:, -1].detach(), drawn.latents[:, -1], atol=1e-4) != noisy
    stir(policy)
    assert evaluation.kl(policy, drawn, 1) > 0


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "sd3", "flux"])
def test_pictures_of_another_side_are_judged(name: str, request: pytest.FixtureRequest) -> None:
    """They are those of a model that was given this side, and training goes on with its own."""
    folder = request.getfixturevalue(f"{name}_dir")
    policy = policy_of(folder, lora=0.3, steps=2, batch=3, resolution=32)
    larger = policy_of(folder, lora=0.3, steps=3, batch=3, eta=0.0, resolution=64)
    before = policy.sample(PROMPTS[:2], SEEDS[:2])
    with policy.sampling(3, 0.0, "native", 1.0, 64):
        drawn = policy.sample(PROMPTS[:2], SEEDS[:2])
        shown = policy.decode(drawn.final)
    assert torch.equal(drawn.latents, larger.sample(PROMPTS[:2], SEEDS[:2]).latents)
    assert shown.shape[1] == 2 * policy.decode(before.final).shape[1]
    assert torch.equal(policy.sample(PROMPTS[:2], SEEDS[:2]).latents, before.latents)
    with pytest.raises(ValueError, match="resolution 33 is no multiple"), policy.sampling(3, 0.0, "native", 1.0, 33):
        pass
    assert torch.equal(policy.sample(PROMPTS[:2], SEEDS[:2]).latents, before.latents)


def test_a_gaussian_lora_begins_as_ddpo_pytorch_draws_it(sd_dir) -> None:
    drawn = {}
    for init in ("peft", "gaussian"):
        policy = policy_of(sd_dir, lora=0, steps=2, rank=4, init=init)
        a = torch.cat([p.detach().flatten() for n, p in policy.parameters.items() if "lora_A" in n])
        assert not any(p.any() for n, p in policy.parameters.items() if "lora_B" in n)
        drawn[init] = a
    assert abs(drawn["gaussian"].std() * 4 - 1) < 0.05  # 1/rank
    kurtosis = ((drawn["gaussian"] / drawn["gaussian"].std()) ** 4).mean()
    assert abs(kurtosis - 3) < 0.3  # a normal distribution's; a uniform one's is 1.8
    assert drawn["peft"].std() < drawn["gaussian"].std()


def test_only_the_lora_trains(policy: Policy) -> None:
    trainable = {n for n, p in policy.adapter.network.named_parameters() if p.requires_grad}
    assert trainable == set(policy.parameters) and all("lora_" in n for n in trainable)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_a_lora_loads_in_plain_diffusers(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    folder = request.getfixturevalue(f"{name}_dir")
    policy = policy_of(folder, lora=0, steps=4, batch=3, resolution=32)
    stir(policy)
    policy.save(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(tmp_path)
    assert_same_network(policy, getattr(pipe, policy.adapter.network_name))


def test_pixart_lora_loads_with_peft(pixart_dir: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline
    from peft import PeftModel

    policy = policy_of(pixart_dir, lora=0, steps=4, batch=3)
    stir(policy)
    policy.save(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(pixart_dir)
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, str(tmp_path / "peft"))
    assert_same_network(policy, pipe.transformer)


def assert_same_network(policy: Policy, network: torch.nn.Module) -> None:
    x, t = torch.randn(2, *policy.adapter.latent_shape), torch.tensor([500, 20])
    with torch.no_grad():
        expected = policy.predict(x, t, PROMPTS[:2])
        with policy.reference():
            assert not torch.allclose(policy.predict(x, t, PROMPTS[:2]), expected, atol=1e-4)
        policy.adapter.network = network.eval()
        torch.testing.assert_close(policy.predict(x, t, PROMPTS[:2]), expected, atol=1e-5, rtol=1e-4)


def test_state_round_trip(policy: Policy) -> None:
    stir(policy)
    state = policy.state()
    before = {n: p.detach().clone() for n, p in policy.parameters.items()}
    stir(policy)
    policy.load_state(state)
    for name, value in before.items():
        torch.testing.assert_close(policy.parameters[name].detach(), value)


def test_a_stable_diffusion_checkpoint_runs_through_the_command(sd_dir: Path, tmp_path: Path) -> None:
    lines = [
        "a cat eating a sandwich",
        "a dog riding a bike",
        "a red bus",
        "two horses",
        "a bird on a table",
        "a pink cup",
    ]
    (tmp_path / "my.txt").write_text("\n".join([*lines, "a woolen bus", "a fox and a hen"]))
    small = ("prompts_per_round=2", "samples_per_prompt=4")
    settings = [f"--set=track.budget.{s}" for s in (*small, "reward_queries=24")] + [
        "--set=track.rewards.clip.model=micro"
    ]
    words = (
        "--model",
        str(sd_dir),
        "--prompts",
        "my.txt",
        "--set=track.sampler.steps=4",
        "--set=track.evaluation.sampler.steps=4",
        *settings,
    )
    done = command("run", "--algo", "dpo", "--reward", "clip", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ((path, record),) = records.find(tmp_path)
    assert record.track == "paper-custom-v2" and len(record.rounds) == 2
    assert len(record.verdicts[0].per_prompt) == 2
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained(sd_dir).load_lora_weights(path.parent)
