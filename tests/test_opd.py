"""opd: the loss written a second time and against dpok's, what each teacher teaches, how teachers are named and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench_dfusion.algorithms.dpok import DPOK, DPOKConfig
from bench_dfusion.algorithms.opd import OPD, OPDConfig
from peft import LoraConfig
from processes import SETTINGS
from pydantic import ValidationError
from rounds import stopped_in_round
from tiny import policy_of
from torch.distributions import Normal, kl_divergence

import bench_dfusion
from bench_dfusion import micro
from bench_dfusion.builders.stored_steps import all_means
from bench_dfusion.diffusion import lora, samplers
from bench_dfusion.errors import UsageError
from bench_dfusion.models import schedules
from bench_dfusion.objectives.denoising import mean_square
from bench_dfusion.publish import verify
from bench_dfusion.results import records
from bench_dfusion.runs.config import resolve
from bench_dfusion.testing.fakes import RED, ddim, draw, fake_policy, shake, with_targets
from bench_dfusion.testing.rounds import PROMPTS, generator, gradient, loss_and_gradient
from bench_dfusion.tracks import schema
from bench_dfusion.util import files

LORA = schema.read("micro")["lora"]


def leave(policy, folder):
    """The policy's LoRA as a peft directory."""
    policy.lora_config.save_pretrained(str(folder))
    files.save_tensors(folder / lora.PEFT_FILE, {f"base_model.model.{k}": v for k, v in policy.state().items()})
    return str(folder)


def teacher(number, **options):
    policy = fake_policy(**options)
    shake(policy, 0.15, seed=10 + number)
    return policy


def round_of(tmp_path, count=2, size=0.1, **options):
    """(policy, samples, algorithm, rows): a moved student drew, was prepared with teachers 0 to `count` - 1, and has moved on."""
    policy = fake_policy(**{k: options.pop(k) for k in ("scheduler", "eta", "guidance") if k in options})
    shake(policy)
    paths = [leave(teacher(k), tmp_path / str(k)) for k in range(count)]
    algorithm = OPD(OPDConfig(teachers=paths, **{"guidance": options.pop("guided", None), **options}))
    state = policy.state()
    algorithm.setup(policy, RED)
    assert all(torch.equal(v, state[k]) for k, v in policy.state().items())
    samples = with_targets(policy, draw(policy, PROMPTS))
    rows = algorithm.prepare(policy, samples, generator())
    assert all(torch.equal(v, state[k]) for k, v in policy.state().items())
    shake(policy, size, seed=2)
    return policy, samples, algorithm, rows


# --- the loss


@pytest.mark.parametrize("form", ["mean", "kl"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_loss_and_its_gradient_are_those_of_the_formula(form, prediction, tmp_path):
    scheduler = {"scheduler": ddim(prediction_type=prediction)}
    policy, samples, algorithm, rows = round_of(tmp_path, form=form, **scheduler)
    teachers = [teacher(k, **scheduler) for k in range(2)]
    trajectory, schedule = samples.samples.trajectory, policy.schedule
    total, count = 0.0, 0
    for i, prompt in enumerate(PROMPTS):  # "one" is the first prompt and teacher 0's, "two" teacher 1's
        for step in range(4):
            where = trajectory.latents[i : i + 1, step], torch.tensor([step]), [prompt]
            ours, its = policy.mean(*where), teachers[prompt == "two"].mean(*where).detach()
            if form == "mean":
                total = total + 0.5 * ((ours - its) ** 2).mean()
            else:
                std = schedule.std[step]
                total = total + kl_divergence(Normal(ours, std), Normal(its, std)).mean()
            count += 1
    expected = total / count
    expected.backward()
    expected = expected.detach(), gradient(policy)
    assert expected[1].norm() > 1e-4 and count == len(rows["row"]) == 8 * 4
    torch.testing.assert_close(loss_and_gradient(policy, samples, algorithm, rows), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("form", ["mean", "kl"])
def test_where_the_teacher_is_the_student_there_is_nothing_to_learn(form, tmp_path):
    policy = teacher(0)
    algorithm = OPD(OPDConfig(teachers=[leave(policy, tmp_path / "own")], form=form))
    algorithm.setup(policy, RED)
    samples = with_targets(policy, draw(policy, PROMPTS))
    value, found = loss_and_gradient(policy, samples, algorithm, algorithm.prepare(policy, samples, generator()))
    assert float(value) == pytest.approx(0, abs=1e-10) and found.abs().max() < 1e-6


def test_its_kl_is_dpoks_with_the_teacher_in_the_place_of_the_base(tmp_path):
    policy, samples, algorithm, rows = round_of(tmp_path, count=1, form="kl")
    dpok = DPOK(DPOKConfig(kl=1.0))
    samples.train = torch.arange(samples.drawn)
    its = dpok.prepare(policy, samples, generator())
    assert torch.equal(its["row"], rows["row"]) and torch.equal(its["step"], rows["step"])
    its |= {"ref_mean": rows["teacher_mean"], "advantage": torch.zeros(len(its["row"]))}
    expected = loss_and_gradient(policy, samples, dpok, its)
    torch.testing.assert_close(loss_and_gradient(policy, samples, algorithm, rows), expected)


def test_of_an_odes_steps_it_is_the_velocitys_distance_times_half_the_steps_square():
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    schedule = schedules.flow_schedule(sigmas, 1000 * sigmas[:-1], 0.0)
    x, one, two = torch.randn(3, 4, 5, generator=generator())
    step = torch.arange(4)
    means = [samplers.step_mean(schedule, step, x, v) for v in (one, two)]
    dt = sigmas[:-1] - sigmas[1:]
    torch.testing.assert_close(mean_square(means[0] - means[1]) / 2, dt**2 / 2 * mean_square(one - two))


def test_rows_are_the_drawn_samples_alone_and_every_step_of_the_window(tmp_path):
    policy, samples, algorithm, rows = round_of(tmp_path, window=(0.5, 1.0), eta=0.0)
    assert rows["row"].tolist() == [i for i in range(8) for _ in range(2)] and rows["step"].tolist() == [2, 3] * 8
    assert samples.drawn == 8 and len(samples.samples) == 16
    again = algorithm.prepare(policy, samples, generator(5))
    assert all(torch.equal(v, again[k]) for k, v in rows.items())  # nothing is random; teachers do not move
    assert all(v.device.type == "cpu" and not v.requires_grad for v in rows.values())


def test_teachers_take_prompts_in_turn_and_each_its_own_guidance(tmp_path):
    policy, _, algorithm, _ = round_of(tmp_path, count=2, guided=(1.0, 4.5), guidance=2.0)
    prompts = ["a", "b", "a", "c", "d", "b"]
    samples = with_targets(policy, draw(policy, prompts))
    rows = algorithm.prepare(policy, samples, generator())
    assert (policy.guidance, policy.branches) == (2.0, 2)
    for row, number in zip(range(6), (0, 1, 0, 0, 1, 1), strict=True):
        own = rows["row"] == row
        its = teacher(number, guidance=(1.0, 4.5)[number])
        expected = all_means(its, samples, rows["row"][own], rows["step"][own])
        torch.testing.assert_close(rows["teacher_mean"][own], expected, rtol=1e-3, atol=1e-4)


def test_two_teachers_pull_each_their_prompts(tmp_path):
    policy = fake_policy()
    paths = [leave(teacher(k), tmp_path / str(k)) for k in range(2)]
    algorithm = OPD(OPDConfig(teachers=paths, learning_rate=2e-2, form="kl"))
    algorithm.setup(policy, RED)

    def apart():
        """The KL of the steps of either prompt to either teacher [2 prompts, 2 teachers]."""
        samples = with_targets(policy, draw(policy, PROMPTS, first=500))
        drawn, steps = torch.arange(8).repeat_interleave(4), torch.arange(4).repeat(8)
        own = all_means(policy, samples, drawn, steps)
        std = policy.schedule.std[steps]
        kls = [samplers.gaussian_kl(own, all_means(teacher(k), samples, drawn, steps), std) for k in range(2)]
        return torch.stack(kls, 1).view(2, 16, 2).mean(1)

    start = apart()
    optimizer = torch.optim.AdamW(policy.parameters.values(), lr=algorithm.config.learning_rate)
    for number in range(60):
        samples = with_targets(policy, draw(policy, PROMPTS, first=8 * number))
        rows = algorithm.prepare(policy, samples, generator())
        optimizer.zero_grad()
        algorithm.loss(policy, samples, rows).value.backward()
        optimizer.step()
    end = apart()
    assert (end.diagonal() < 0.3 * start.diagonal()).all(), (start, end)
    assert (end.diagonal() < 0.5 * end.flip(1).diagonal()).all(), end


# --- how teachers are given


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> list[Path]:
    """Two LoRAs for the embedded world's pipeline, as runs leave them."""
    found = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp(f"teacher{seed}")
        policy = policy_of(micro.PIPELINE, lora=0, rank=LORA["rank"], targets=LORA["targets"])
        shake(policy, 0.05, seed=seed)
        policy.save(folder)
        found.append(folder)
    return found


def cell(*paths: Any, **options: Any):
    options = {"algo": "opd", "builder": "vanilla", "reward": "oracle", "track_source": "micro", **options}
    return resolve(teachers=[str(p) for p in paths], **options)


def refusal(*paths: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as refused:
        cell(*paths, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_teachers_are_named_by_their_files_content_and_order(trained, tmp_path):
    own = cell(*trained)
    hashes = [files.sha256(folder / lora.FILE) for folder in trained]
    assert own.resolved["algorithm"]["sha256"] == hashes and "teachers" not in own.resolved["algorithm"]
    assert own.given["teachers"] == [str(p) for p in trained]
    moved = tmp_path / "elsewhere.safetensors"
    moved.write_bytes((trained[0] / lora.FILE).read_bytes())
    assert cell(moved, trained[1]).hash == own.hash
    assert len({own.hash, cell(trained[0]).hash, cell(*reversed(trained)).hash}) == 3
    assert cell(*trained, settings=[f'algo.sha256=["{hashes[0]}","{hashes[1]}"]']).hash == own.hash


def test_what_cannot_teach_is_one_line(trained, tmp_path):
    assert refusal().startswith("opd distils the LoRAs of other runs: give --teacher RUN_OR_LORA, once for each;")
    assert refusal(trained[0], algo="dpok") == (
        "dpok learns from no teacher: leave --teacher out, or take one of these: opd"
    )
    assert "no LoRA at" in refusal(tmp_path / "none")
    assert "holds no LoRA" in refusal(tmp_path)
    assert "2 teachers and 1 prompts a round" in refusal(*trained, settings=["track.budget.prompts_per_round=1"])
    assert "give track.lora.rank as of theirs, not 0" in refusal(*trained, settings=["track.lora.rank=0"])
    assert "one number for each teacher: 2, not 1" in refusal(*trained, settings=["algo.guidance=[4.5]"])
    assert "not to the algo.sha256" in refusal(trained[0], settings=['algo.sha256=["ab"]'])
    for option in ({"form": "ode"}, {"window": (0.5, 0.5)}, {"guidance": "x"}):
        with pytest.raises(ValidationError):
            OPDConfig(**option)


def beside(folder: Path, base: str) -> None:
    """A record of a run on another base."""
    record = records.read(next((Path(__file__).parent.parent / "leaderboards" / "micro-v1").rglob("record.json")))
    provenance = record.provenance.model_copy(update={"model_sha256": base})
    records.write(folder / "record.json", record.model_copy(update={"provenance": provenance}))


def test_a_lora_of_another_shape_or_base_is_refused_before_any_compute(tmp_path):
    policy, refused = fake_policy(), {}
    own = leave(teacher(0), tmp_path / "own")
    for name, config in {
        "rank": LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
        "alpha": LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
        "patterns": LoraConfig(
            r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], alpha_pattern={"to_k": 8}
        ),
        "modules": LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"]),
    }.items():
        refused[name] = leave(fake_policy(config=config), tmp_path / name)
    refused["network"] = leave(fake_policy(shape=(2, 2, 2)), tmp_path / "network")
    path = tmp_path / "network" / lora.PEFT_FILE
    tensors = {k.replace("attn1", "attn9"): v for k, v in files.load_tensors(path)[0].items()}
    files.save_tensors(path, tensors)
    expected = {
        "rank": "LoRA of rank 2, this track one of 4: give one of these, or set track.lora.rank=2",
        "alpha": "LoRA of alpha 8, this track one of 4: .* track.lora.alpha=8",
        "patterns": "no plain LoRA",
        "modules": "track.lora.targets",
        "network": "another model",
    }
    before = policy.state()
    for name, text in expected.items():
        with pytest.raises(UsageError, match=text) as caught:
            OPD(OPDConfig(teachers=[own, refused[name]])).setup(policy, RED)
        assert "\n" not in str(caught.value) and refused[name] in str(caught.value)
        assert all(torch.equal(v, before[k]) for k, v in policy.state().items())
    with pytest.raises(ValueError, match="none of the 4 stochastic steps"):
        OPD(OPDConfig(teachers=[own], form="kl")).setup(fake_policy(eta=0.0), RED)


def test_a_run_on_another_base_is_no_teacher(tmp_path):
    own = tmp_path / "own"
    policy = policy_of(micro.PIPELINE, lora=0.05)
    policy.save(own)
    beside(own, policy.adapter.sha256)
    OPD(OPDConfig(teachers=[str(own)])).setup(policy, RED)
    beside(own, "0" * 64)
    with pytest.raises(UsageError, match="was trained on another base, 000000000000… and not"):
        OPD(OPDConfig(teachers=[str(own)])).setup(policy, RED)


def test_a_run_keeps_its_teachers_hashes_resumes_and_cannot_be_run_again_without_them(trained, tmp_path):
    settings = [*SETTINGS, "track.budget.reward_queries=16"]
    given: dict[str, Any] = {"algo": "opd", "builder": "vanilla", "reward": "oracle", "track_source": "micro"}
    given |= {"teachers": [str(p) for p in trained], "settings": settings}
    expected = bench_dfusion.run(out=tmp_path / "calm", **given)
    assert expected.status == "finished" and len(expected.rounds) == 2 and expected.cost.updates == 4
    assert expected.resolved["algorithm"]["sha256"] == [files.sha256(p / lora.FILE) for p in trained]
    with stopped_in_round(1):
        bench_dfusion.run(out=tmp_path / "stopped", **given)
    record = bench_dfusion.run(out=tmp_path / "stopped", **given)
    assert record.comparable() == expected.comparable()
    assert not records.check(record)
    with pytest.raises(UsageError, match="other runs' LoRAs, which the record does not hold"):
        verify.cell_of(record)
