"""Every algorithm, with the options that are not its defaults, takes a step on every family's tiny class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench_dfusion.algorithms.awm import AWM, AWMConfig
from bench_dfusion.algorithms.crd import CRD, CRDConfig
from bench_dfusion.algorithms.ddpo import DDPO, DDPOConfig
from bench_dfusion.algorithms.dpo import DPO, DPOConfig
from bench_dfusion.algorithms.fdfo import FDFO, FDFOConfig
from bench_dfusion.algorithms.grpo import GRPO, GRPOConfig
from bench_dfusion.algorithms.nft import NFT, NFTConfig
from bench_dfusion.algorithms.opd import OPD, OPDConfig
from tiny import policy_of

from bench_dfusion.builders.contract import Components, ConsistentSamples, PairConfig, Samples
from bench_dfusion.builders.vanilla import Vanilla
from bench_dfusion.diffusion.policy import Policy
from bench_dfusion.testing.fakes import RED, shake

GARDO: dict[str, Any] = {"share": 0.5, "reset_kl": 1e-9, "diversity": "none"}
STEPS: dict[str, Any] = {
    "Flow-DPPO": lambda: GRPO(GRPOConfig(divergence=1e-6, divergence_sign="exact")),
    "win rates in cps units": lambda: GRPO(GRPOConfig(spread="rank", ratio_scale="cps")),
    "GDPO": lambda: AWM(AWMConfig(components="each", levels="sampler")),
    "GARDO": lambda: GRPO(GRPOConfig(gardo=GARDO)),
    "GARDO of nft": lambda: NFT(NFTConfig(gardo=GARDO)),
    "MixGRPO": lambda: DDPO(DDPOConfig(sde_window={"steps": 1, "place": "random"}, window=(0.0, 0.7))),
    "windows of pairs": lambda: DPO(
        DPOConfig(sde_window={"steps": 1, "place": "scattered"}, window=(0.0, 0.7), ratio_clamp=0.0)
    ),
    "fdfo": lambda: FDFO(FDFOConfig(kl=0.1)),
    "crd": lambda: CRD(CRDConfig(form="bce", kl_guidance=2.0)),
    "opd": lambda: OPD(OPDConfig(form="kl", window=(0.0, 0.7))),
}


def round_of(policy: Policy) -> ConsistentSamples:
    prompts = ["a red circle"] * 4
    trajectory = policy.sample(prompts, torch.arange(4))
    rewards = torch.tensor([0.0, 1.0, 2.0, 4.0])
    drawn = Samples(trajectory, policy.decode(trajectory.final), rewards)
    drawn.components = Components({"main": 1.0, "other": 0.0}, torch.stack([rewards, -rewards], 1))
    return Vanilla(PairConfig()).build(policy, drawn, lambda images, own: torch.zeros(len(own)))


# Each family with one kind of sampler; SDXL, whose network is Stable Diffusion's, and the other halves are slow.
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[pytest.mark.slow] * (name == "sdxl" or (kind == "cps") != (i % 2 == 1)))
        for i, name in enumerate(("sd", "pixart", "sd3", "flux", "sdxl"))
        for kind in ("native", "cps")
    ],
)
def test_every_option_takes_a_step(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    options = {"resolution": 32} if name == "flux" else {}
    folder: Path = request.getfixturevalue(f"{name}_dir")
    policy = policy_of(folder, lora=0.05, steps=3, batch=4, kind=kind, **options)
    teacher = policy.weights()
    for step, make in STEPS.items():
        algorithm = make()
        if isinstance(algorithm, OPD):
            algorithm._teachers = [teacher]
        else:
            algorithm.setup(policy, RED)
        shake(policy, 0.05)
        with policy.noisy_at(algorithm.noisy_steps(policy, 0, 0)):
            with algorithm.collecting(policy):
                samples = round_of(policy)
            rows = algorithm.prepare(policy, samples, torch.Generator().manual_seed(0))
            shake(policy, 0.02, seed=3)  # some losses have no gradient before the first update
            loss = algorithm.loss(policy, samples, algorithm.batch(policy, samples, rows))
        loss.value.backward()
        gradients = [p.grad for p in policy.parameters.values() if p.grad is not None]
        assert loss.value.isfinite() and all(g.isfinite().all() for g in gradients), step
        assert any(g.any() for g in gradients), step
        for p in policy.parameters.values():
            p.grad = None
