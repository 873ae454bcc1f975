"""D-Fusion's builder against a plain reading of the paper, and the rules for masks and pairs by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from plain_fusion import PlainDFusion, Target
from pydantic import ValidationError
from tiny import policy_of
from torch import Tensor, nn

from bench_dfusion.builders.contract import PairConfig, Samples, references_and_bases, winning_pairs
from bench_dfusion.builders.dfusion.attention import AttentionHooks, resize_mask
from bench_dfusion.builders.dfusion.builder import DFusion, DFusionConfig
from bench_dfusion.builders.dfusion.masks import ItemTokens, Rules, item_mask, threshold
from bench_dfusion.builders.vanilla import Vanilla
from bench_dfusion.diffusion.policy import Policy, Trajectory
from bench_dfusion.models import schedules

STEPS = 4
TOLERANCE = 1e-4  # of the largest magnitude, for float32 (the worst seen is 2e-5, at guidance 5)
# The pieces that the tokenizer makes of a prompt after the start token, and by hand the places of each item's pieces.
SD_PROMPTS = {
    "a capybara and an axolotl": ("a cap y bara and an ax o lot l", [[2, 3, 4], [7, 8, 9, 10]]),
    "a black and woolen bus": ("a black and woo len bus", [[6]]),
}
PIXART_PROMPTS = {
    "a red cat and a blue square": ("a red c a t and a blue square", [[3, 4, 5], [9]]),
    "three rings": ("three rings", [[2]]),
}
# Rows of two prompts' 4 samples each: references out of order, each for two bases. Base 5 has a reference of the
# other prompt, as controls in benchmarks have.
REFERENCES = torch.tensor([4, 0, 4, 0])
BASES = torch.tensor([6, 5, 7, 2])


class Watched(DFusion):
    """Remembers each fused step's masks [R, positions], R the references of one batch in order."""

    def __init__(self, config: DFusionConfig):
        super().__init__(config)
        self.masks: list[Tensor] = []

    def mask(self, maps: Tensor, tokens: ItemTokens, rules: Sequence[Rules]) -> Tensor:
        self.masks.append(super().mask(maps, tokens, rules))
        return self.masks[-1]


@dataclass
class Case:
    """A policy, eight samples of two prompts, and the plain version beside them."""

    policy: Policy
    drawn: Trajectory
    tokens: list[list[list[int]]]  # of each prompt
    plain: PlainDFusion

    def expected(self, config: DFusionConfig, fused_steps: range) -> list[Target]:
        layers = config.layers or self.policy.adapter.fused_layers()
        targets = []
        for r, b in zip(REFERENCES.tolist(), BASES.tolist(), strict=True):
            tokens = self.tokens[r // 4]
            by_hand = (config.thresholds or {}).get(self.drawn.prompts[r])
            rules = list(by_hand or [config.threshold] * len(tokens))
            targets.append(self.plain.target(r, b, layers=layers, fused_steps=fused_steps, tokens=tokens, rules=rules))
        return targets


def make_case(folder: Path, guidance: float, prompts: dict[str, tuple[str, list[list[int]]]]) -> Case:
    policy = policy_of(folder, steps=STEPS, guidance=guidance, batch=8)
    tokenizer = policy.adapter.tokenizer
    for prompt, (pieces, _) in prompts.items():
        assert [p.removesuffix("</w>") for p in tokenizer.tokenize(prompt)] == pieces.split()
    drawn = policy.sample([p for p in prompts for _ in range(4)], torch.arange(8) + 100)
    plain = PlainDFusion(policy, drawn, STEPS, 1.0, guidance, policy.adapter.map_side())
    return Case(policy, drawn, [places for _, places in prompts.values()], plain)


@pytest.fixture(scope="module")
def sd(sd_dir: Path) -> Case:
    return make_case(sd_dir, 5.0, SD_PROMPTS)


@pytest.fixture(scope="module")
def sd_v(sd_v_dir: Path) -> Case:
    return make_case(sd_v_dir, 5.0, SD_PROMPTS)


@pytest.fixture(scope="module")
def sd21(sd21_dir: Path) -> Case:
    return make_case(sd21_dir, 5.0, SD_PROMPTS)


@pytest.fixture(scope="module")
def sdxl(sdxl_dir: Path) -> Case:
    return make_case(sdxl_dir, 5.0, SD_PROMPTS)


@pytest.fixture(scope="module")
def pixart(pixart_dir: Path) -> Case:
    return make_case(pixart_dir, 1.0, PIXART_PROMPTS)


def close(ours: Tensor, plain: Tensor) -> None:
    assert ours.shape == plain.shape
    error = (ours.double() - plain.double()).abs().max() / plain.abs().max()
    assert error < TOLERANCE, f"relative error {error:.1e}"


def own(case: Case, rows: Tensor) -> Trajectory:
    """The drawn rows drawn again, together in one batch."""
    return case.policy.sample([case.drawn.prompts[r] for r in rows.tolist()], case.drawn.seeds[rows])


# ---------------------------------------------------------------- against the plain version


@pytest.mark.parametrize(
    ("name", "options", "fused_steps"),
    [
        ("sd", {"threshold": "max*0.5"}, range(0, 4)),
        ("sd_v", {"threshold": "mean+1", "steps": (0.25, 0.75)}, range(1, 3)),
        ("sd21", {"threshold": "otsu", "steps": (0.25, 1.0)}, range(1, 4)),
        ("sdxl", {"threshold": "otsu"}, range(0, 4)),
        (
            "sd",
            {
                "items": {"a black and woolen bus": (4,)},
                "thresholds": {"a capybara and an axolotl": (0.08, "max*0.5")},
                "steps": (0.5, 1.0),
            },
            range(2, 4),
        ),
        ("pixart", {"threshold": "otsu"}, range(0, 4)),
        ("pixart", {"threshold": 0.0}, range(0, 4)),
        ("pixart", {"threshold": "max*0.5", "layers": ("transformer_blocks.1.attn1",)}, range(0, 4)),
        ("pixart", {"threshold": 0.12, "steps": (0.5, 1.0)}, range(2, 4)),
    ],
    ids=str,
)
def test_targets_are_those_of_the_plain_version(
    name: str,
    options: dict[str, Any],
    fused_steps: range,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Float32 against float64: means and latents within TOLERANCE, log-probs to 2e-5, masks exactly."""
    case: Case = request.getfixturevalue(name)
    config = DFusionConfig(**options)
    builder = Watched(config)
    means: list[Tensor] = []
    plain_mean = case.policy.mean

    def mean(x_t: Tensor, step: Tensor, prompts: Sequence[str]) -> Tensor:
        result = plain_mean(x_t, step, prompts)
        if len(x_t) == len(BASES):  # not the two references
            means.append(result)
        return result

    monkeypatch.setattr(case.policy, "mean", mean)
    ours, masks = builder.targets(case.policy, case.drawn, REFERENCES, BASES)
    plain = case.expected(config, fused_steps)

    assert len(builder.masks) == len(fused_steps) and len(means) == STEPS
    seen = torch.stack(builder.masks)  # [steps, references, positions], references 0 and 4
    for j, (reference, target) in enumerate(zip(REFERENCES.tolist(), plain, strict=True)):
        expected = torch.stack([target.masks[i] for i in fused_steps]).float()
        assert torch.equal(seen[:, reference // 4], expected)
        side = case.policy.adapter.map_side()
        torch.testing.assert_close(masks[j], expected.mean(0).view(side, side))
    order = REFERENCES.argsort(stable=True)
    close(torch.stack(means, 1), torch.stack([plain[j].means for j in order.tolist()]))
    close(ours.latents, torch.stack([t.latents for t in plain]))
    torch.testing.assert_close(ours.log_probs.double(), torch.stack([t.log_probs for t in plain]), atol=2e-5, rtol=0)
    assert ours.prompts == [case.drawn.prompts[b] for b in BASES.tolist()]
    assert torch.equal(ours.seeds, case.drawn.seeds[BASES])

    # The comparison means something: masks are partial, and fusion moves every target by 50 tolerances or more.
    if config.threshold != 0.0:
        assert 0.02 < masks.mean() < 0.98
    bases = case.drawn.latents[BASES]
    change = (ours.latents - bases).abs().flatten(2).amax(2) / bases.abs().max()
    assert (change[:, : fused_steps[0] + 1] < TOLERANCE).all() and (change[:, fused_steps[0] + 1 :] > 5e-3).all()


@pytest.mark.parametrize(("name", "batch"), [("sd", 3), ("pixart", 3), ("pixart", 1)])
def test_an_uneven_split_of_the_work_gives_the_same_targets(
    name: str, batch: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By reference the targets are 2 + 2: batches of 3 and of 1 cut through a reference's targets."""
    case: Case = request.getfixturevalue(name)
    whole, masks = DFusion(DFusionConfig()).targets(case.policy, case.drawn, REFERENCES, BASES)
    monkeypatch.setattr(case.policy, "batch", batch)
    builder = Watched(DFusionConfig())
    split, split_masks = builder.targets(case.policy, case.drawn, REFERENCES, BASES)
    rows = {3: [2, 1], 1: [1, 1, 1, 1]}[batch]  # references of each batch
    assert [len(m) for m in builder.masks] == [n for n in rows for _ in range(STEPS)]
    assert torch.equal(split_masks, masks)
    close(split.latents, whole.latents)
    close(split.log_probs, whole.log_probs)
    assert split.prompts == whole.prompts and torch.equal(split.seeds, whole.seeds)


def test_a_reference_of_two_bases_goes_through_the_network_once_a_step(sd: Case) -> None:
    before = sd.policy.network_evaluations
    DFusion(DFusionConfig()).targets(sd.policy, sd.drawn, REFERENCES, BASES)
    assert sd.policy.network_evaluations - before == (4 + 2) * STEPS * 2  # two branches


def test_the_official_steps_are_all_but_the_two_noisiest_of_20(pixart: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = schedules.ddim_schedule(pixart.policy.adapter.scheduler, 20, 1.0)
    monkeypatch.setattr(pixart.policy, "schedule", schedule)
    drawn = own(pixart, torch.tensor([0, 3]))
    builder = Watched(DFusionConfig())
    target, _ = builder.targets(pixart.policy, drawn, torch.tensor([0]), torch.tensor([1]))
    assert len(builder.masks) == 18
    change = (target.latents[0] - drawn.latents[1]).abs().flatten(1).amax(1)
    assert (change[:3] < TOLERANCE).all() and change[3] > 1e-2


# ---------------------------------------------------------------- limits of the mask


@pytest.mark.parametrize("name", ["sd", "sd_v", "sd21", "sdxl", "pixart"])
def test_an_empty_mask_leaves_the_bases_own_trajectory_bit_for_bit(name: str, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(name)
    rows = BASES[REFERENCES.argsort(stable=True)]  # the order in which the builder batches them
    references = REFERENCES.sort(stable=True).values
    target, masks = DFusion(DFusionConfig(threshold=2.0)).targets(case.policy, case.drawn, references, rows)
    base = own(case, rows)
    assert torch.equal(target.latents, base.latents) and torch.equal(target.log_probs, base.log_probs)
    close(target.latents, case.drawn.latents[rows])
    assert not masks.any()


@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_a_full_mask_gives_fused_layers_exactly_the_references_keys_and_values(
    name: str, request: pytest.FixtureRequest
) -> None:
    case: Case = request.getfixturevalue(name)
    policy, adapter = case.policy, case.policy.adapter
    builder = Watched(DFusionConfig(threshold=0.0))
    builder.targets(policy, case.drawn, REFERENCES, BASES)
    assert all(m.eq(1).all() for m in builder.masks)

    side = adapter.latent_shape[-1]
    layers = adapter.fused_layers()
    everything = AttentionHooks(adapter, tuple(adapter.attentions("self")), side)
    taps = AttentionHooks(adapter, layers, side)
    step, prompts = torch.tensor([1]), [case.drawn.prompts[6]]
    reference, base = case.drawn.latents[[4], 1], case.drawn.latents[[6], 1]
    with torch.no_grad():
        with taps.recording():
            policy.mean(reference, step, prompts)
        with everything.recording():
            policy.mean(base, step, prompts)
        branches = 1 if policy.guidance == 1 else 2
        used: dict[tuple[str, str], Tensor] = {}
        with taps.fusing(taps.keys_values, torch.ones(branches, side**2)), seeing(everything.modules, used):
            policy.mean(base, step, prompts)
    for layer, plain in everything.keys_values.items():
        for which, value in zip("kv", plain, strict=True):
            if layer in layers:
                recorded = taps.keys_values[layer]["kv".index(which)]
                assert torch.equal(used[layer, which], recorded) and not torch.allclose(recorded, value, rtol=0.01)
            else:  # the encoder comes first and stays the base's
                assert torch.equal(used[layer, which], value)


@contextmanager
def seeing(modules: dict[str, nn.Module], used: dict[tuple[str, str], Tensor]) -> Iterator[None]:
    """What leaves each layer's key and value projections, after the hooks that stand there already."""

    def hook(layer: str, which: str) -> Callable[..., None]:
        return lambda module, args, output: used.update({(layer, which): output.clone()})

    handles = [
        getattr(module, f"to_{which}").register_forward_hook(hook(layer, which))
        for layer, module in modules.items()
        for which in "kv"
    ]
    yield
    for handle in handles:
        handle.remove()


def test_the_families_default_layers(sd: Case, sdxl: Case, pixart: Case) -> None:
    assert set(sd.policy.adapter.fused_layers()) == {
        "up_blocks.0.attentions.0.transformer_blocks.0.attn1",
        "up_blocks.0.attentions.1.transformer_blocks.0.attn1",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn1",
        "mid_block.attentions.0.transformer_blocks.0.attn1",
    }
    # SDXL has no attention in its last up block, and several blocks to a layer.
    up = {f"up_blocks.{i}.attentions.{j}.transformer_blocks.{k}.attn1" for i in (0, 1) for j in (0, 1) for k in (0, 1)}
    up = {name for name in up if not name.startswith("up_blocks.1") or ".transformer_blocks.0." in name}
    middle = {f"mid_block.attentions.0.transformer_blocks.{k}.attn1" for k in (0, 1)}
    assert set(sdxl.policy.adapter.fused_layers()) == up | middle
    assert pixart.policy.adapter.fused_layers() == tuple(f"transformer_blocks.{i}.attn1" for i in range(3))


# ---------------------------------------------------------------- leaving no trace


def wiring(network: Any) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """Which object processes each attention, and how many hooks each module has."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = {name: tuple(len(getattr(m, kind)) for kind in kinds) for name, m in network.named_modules()}
    return {name: id(p) for name, p in network.attn_processors.items()}, hooks


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("phase", ["recording", "fusing"])
@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_taps_come_off_without_a_trace(name: str, phase: str, raises: bool, request: pytest.FixtureRequest) -> None:
    policy = request.getfixturevalue(name).policy
    side = policy.adapter.latent_shape[-1]
    taps = AttentionHooks(policy.adapter, policy.adapter.fused_layers(), side)
    branches = 1 if policy.guidance == 1 else 2
    x = torch.zeros(1, *policy.adapter.latent_shape)
    before = wiring(policy.adapter.network)
    assert not any(sum(counts) for counts in before[1].values())

    def forward() -> Tensor:
        with torch.no_grad():
            return policy.mean(x, torch.tensor([0]), ["three rings"])

    plain = forward()
    with taps.recording():
        forward()
    inside = taps.recording() if phase == "recording" else taps.fusing(taps.keys_values, torch.ones(branches, side**2))
    if raises:
        with pytest.raises(ZeroDivisionError), inside:
            assert wiring(policy.adapter.network) != before
            raise ZeroDivisionError
    else:
        with inside:
            assert wiring(policy.adapter.network) != before
            forward()
    assert wiring(policy.adapter.network) == before
    assert torch.equal(forward(), plain)


@pytest.mark.parametrize("call", [0, 1, 2, 3])  # recording, fusing, and both again
def test_a_network_that_fails_inside_the_builder_is_left_as_it_was(
    call: int, pixart: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = pixart.policy.adapter
    before = wiring(adapter.network)
    calls = 0
    layer = adapter.attentions("self")["transformer_blocks.1.attn1"]
    forward = layer.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        DFusion(DFusionConfig()).targets(pixart.policy, pixart.drawn, REFERENCES, BASES)
    assert wiring(adapter.network) == before


# ---------------------------------------------------------------- what cannot work is refused


def test_an_unknown_layer_is_named_before_any_compute(sd: Case) -> None:
    before = sd.policy.network_evaluations
    layers = ("mid_block.attentions.0.transformer_blocks.0.attn1", "mid_block.attentions.7.attn1")
    with pytest.raises(ValueError, match=r"'mid_block\.attentions\.7\.attn1'.*up_blocks\.1\.attentions\.0"):
        DFusion(DFusionConfig(layers=layers)).check(sd.policy, [])
    with pytest.raises(ValueError, match="attn2"):  # cross-attention is never fused
        DFusion(DFusionConfig(layers=("transformer_blocks.0.attn2",))).check(sd.policy, [])
    assert sd.policy.network_evaluations == before


def test_prompts_without_an_item_are_refused_and_items_by_hand_serve_them(sd: Case) -> None:
    with pytest.raises(ValueError, match="no item found"):
        DFusion(DFusionConfig()).check(sd.policy, ["above"])
    DFusion(DFusionConfig(items={"above": ("above",)})).check(sd.policy, ["above"])


def test_maps_of_a_resolution_that_no_layer_has_are_an_error(sd: Case) -> None:
    before = sd.policy.network_evaluations
    with pytest.raises(ValueError, match=r"maps of side 5; there are \[8, 16\]"):
        DFusion(DFusionConfig(map_side=5)).check(sd.policy, ["a bus"])
    assert sd.policy.network_evaluations == before


def test_the_masks_maps_are_the_nearest_to_a_quarter_of_the_side(sd: Case) -> None:
    adapter = copy.copy(sd.policy.adapter)
    plain, cross = "DownBlock2D", "CrossAttnDownBlock2D"
    sd_blocks, middle = (cross, cross, cross, plain), "UNetMidBlock2DCrossAttn"
    for side, blocks, mid, sides, chosen in (
        (64, sd_blocks, middle, (64, 32, 16, 8), 16),
        (96, sd_blocks, middle, (96, 48, 24, 12), 24),
        (90, sd_blocks, middle, (90, 45, 23, 12), 23),
        (64, sd_blocks, None, (64, 32, 16), 16),
        (128, (plain, cross, cross), middle, (64, 32), 32),  # SDXL
    ):
        adapter.network = SimpleNamespace(
            config=SimpleNamespace(in_channels=4, sample_size=side, down_block_types=blocks, mid_block_type=mid)
        )
        assert adapter.map_sides() == sides
        assert adapter.map_side() == chosen


def test_a_transformer_of_larger_patches_has_maps(pixart_dir: Path, tmp_path: Path) -> None:
    pipe = PixArtSigmaPipeline.from_pretrained(pixart_dir)
    pipe.transformer = PixArtTransformer2DModel.from_config({**pipe.transformer.config, "patch_size": 2})
    pipe.save_pretrained(tmp_path)
    policy = policy_of(tmp_path, steps=2)
    drawn = policy.sample(["three rings"] * 2, torch.arange(2))
    _, masks = DFusion(DFusionConfig()).targets(policy, drawn, torch.tensor([0]), torch.tensor([1]))
    assert masks.shape == (1, 4, 4)


# ---------------------------------------------------------------- pairs


def scored(rewards: Sequence[float], prompts: Sequence[str]) -> Samples:
    n = len(prompts)
    trajectory = Trajectory(torch.zeros(n, 2, 1, 1, 1), torch.zeros(n, 1), torch.arange(n), list(prompts))
    return Samples(trajectory, torch.zeros(n, 2, 2, 3, dtype=torch.uint8), torch.tensor(rewards))


def test_pairs_are_by_rank_within_a_prompt() -> None:
    # The prompts alternate: "a" has rows 0, 2, ..., "b" rows 1, 3, ... .
    a = [0.1, 0.8, 0.3, 0.5, 0.9, 0.2, 0.4, 0.7]  # rows best first: 8 2 14 6 12 4 10 0
    b = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]  # 1 3 5 7 9 11 13 15
    rewards = [r for pair in zip(a, b, strict=True) for r in pair]
    references, bases = references_and_bases(scored(rewards, ["a", "b"] * 8))
    assert references.tolist() == [8, 8, 2, 2, 1, 1, 3, 3]
    assert bases.tolist() == [12, 4, 10, 0, 9, 11, 13, 15]


def test_ties_are_ranked_by_row() -> None:
    references, bases = references_and_bases(scored([0.5, 1.0, 1.0, 0.5], ["a"] * 4))
    assert references.tolist() == [1, 1] and bases.tolist() == [0, 3]
    references, bases = references_and_bases(scored([0.5] * 8, ["a"] * 8))
    assert references.tolist() == [0, 0, 1, 1] and bases.tolist() == [4, 5, 6, 7]


def test_numbers_of_samples_that_are_no_multiple_of_4_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4.*not 6.*'b'"):
        references_and_bases(scored([0.0] * 10, ["a"] * 4 + ["b"] * 6))


def test_the_margin_of_a_pair_is_exclusive() -> None:
    samples = scored([0.75, 0.5, 0.25, 0.5, 0.0], ["a"] * 5)
    winners, losers = torch.tensor([0, 1, 0, 2]), torch.tensor([1, 3, 4, 1])  # by 0.25, 0, 0.75 and -0.25
    pairs, dropped = winning_pairs(samples, winners, losers, 0.0)
    assert pairs.tolist() == [[0, 1], [0, 4]] and dropped == 2
    pairs, dropped = winning_pairs(samples, winners, losers, 0.25)
    assert pairs.tolist() == [[0, 4]] and dropped == 3
    pairs, dropped = winning_pairs(samples, winners, losers, 1.0)
    assert pairs.shape == (0, 2) and dropped == 4


def test_what_the_builder_returns(pixart: Case) -> None:
    policy, drawn = pixart.policy, pixart.drawn
    rewards = torch.tensor([0.9, 0.8, 0.2, 0.1, 0.3, 0.4, 0.6, 0.7])  # references 0 and 7, bases 2, 3 and 5, 4
    samples = Samples(drawn, policy.decode(drawn.final), rewards)
    asked: list[tuple[Tensor, list[str]]] = []

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        asked.append((images, list(prompts)))
        return torch.tensor([0.5, 0.1, 0.4, 0.31])

    builder = DFusion(DFusionConfig())
    built = builder.build(policy, samples, score)
    ((images, prompts),) = asked
    assert prompts == [drawn.prompts[b] for b in (2, 3, 5, 4)]
    assert built.drawn == 8 and builder.queries(8) == len(built.samples) == 12
    assert built.triples.tolist() == [[0, 2, 8], [0, 3, 9], [7, 5, 10], [7, 4, 11]]
    assert built.pairs.tolist() == [[8, 2], [11, 4]] and built.dropped == 2  # neither 0.1 nor 0.4 beats its base
    assert built.train.tolist() == [8, 9, 10, 11, 2, 3, 5, 4]
    assert built.masks.shape == (4, 8, 8)
    targets, _ = builder.targets(policy, drawn, torch.tensor([0, 0, 7, 7]), torch.tensor([2, 3, 5, 4]))
    assert torch.equal(built.samples.trajectory.latents, torch.cat([drawn.latents, targets.latents]))
    assert torch.equal(built.samples.trajectory.log_probs, torch.cat([drawn.log_probs, targets.log_probs]))
    assert torch.equal(built.samples.images[8:], images) and torch.equal(images, policy.decode(targets.final))
    assert torch.equal(built.samples.rewards, torch.tensor([*rewards.tolist(), 0.5, 0.1, 0.4, 0.31]))


def test_vanilla_pairs_the_references_themselves() -> None:
    samples = scored([0.9, 0.8, 0.2, 0.1, 0.5, 0.5, 0.5, 0.5], ["a"] * 4 + ["b"] * 4)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise AssertionError("vanilla asks for no reward")

    built = Vanilla(PairConfig()).build(SimpleNamespace(), samples, score)  # type: ignore[arg-type]
    assert built.triples.tolist() == [[0, 2, 0], [0, 3, 0], [4, 6, 4], [4, 7, 4]]
    assert built.pairs.tolist() == [[0, 2], [0, 3]] and built.dropped == 2  # ties are no pairs
    assert built.drawn == len(built.samples) == Vanilla(PairConfig()).queries(8) == 8


# ---------------------------------------------------------------- masks


def test_masks_are_resized_to_the_nearest_position() -> None:
    mask = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]])
    small = torch.tensor([[1.0, 0], [0, 1]])
    assert torch.equal(resize_mask(mask.view(1, 16), 4), small.view(1, 4))
    large = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
    assert torch.equal(resize_mask(small.view(1, 4), 16), large.view(1, 16))
    both = torch.stack([mask, 1 - mask]).view(2, 16)  # rows keep to themselves
    assert torch.equal(resize_mask(both, 4), torch.stack([small, 1 - small]).view(2, 4))
    assert torch.equal(resize_mask(both, 16), both)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (0.25, [0.25, 0.25]),
        (1, [1.0, 1.0]),
        ("0.02", [0.02, 0.02]),
        ("mean+0", [5.0, 2.0]),
        ("mean+1", [9.0, 2.0]),
        ("mean+1.5", [11.0, 2.0]),
        ("max*0.5", [4.5, 1.0]),
    ],
)
def test_threshold_rules_by_hand(rule: str | float, expected: list[float]) -> None:
    # The first item's mean is 5 and its standard deviation over the positions 4, the second one's map is flat.
    values = torch.tensor([[1.0, 1.0, 9.0, 9.0, 1.0, 9.0], [2.0] * 6])
    torch.testing.assert_close(threshold(values, rule), torch.tensor(expected))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, 0.9, 0.12, 0.88, 0.11, 0.1], 0.88),  # two clusters
        ([0.0, 0.0, 0.0, 1.0], 1.0),
        # splits after 1, 2, 3 of 0 1 5 6: 3 · 4² = 48, 4 · 5² = 100, 3 · 4² = 48
        ([5.0, 0.0, 6.0, 1.0], 5.0),
        # 0 4 5: 2 · 4.5² = 40.5 against 2 · 3² = 18
        ([0.0, 4.0, 5.0], 4.0),
    ],
)
def test_otsu_by_hand(values: list[float], expected: float) -> None:
    assert threshold(torch.tensor([values]), "otsu").item() == pytest.approx(expected)


@pytest.mark.parametrize("rule", ["otzu", "mean", "mean+", "max*", "max*half", "0,02", ""])
def test_an_unknown_threshold_is_named(rule: str) -> None:
    with pytest.raises(ValueError, match="unknown threshold.*otsu"):
        threshold(torch.rand(1, 4), rule)


def test_a_mask_is_the_union_of_its_items_and_takes_the_threshold_in() -> None:
    # [positions, tokens]: the start token first
    maps = torch.tensor(
        [
            [[0.9, 0.5, 0.1, 0.0], [0.9, 0.1, 0.25, 0.75], [0.9, 0.1, 0.5, 0.25], [0.9, 0.49, 0.5, 0.0]],
            [[0.0, 0.5, 0.0, 0.0], [0.0, 0.4, 0.0, 0.0], [0.0, 0.3, 0.6, 0.0], [0.0, 0.2, 0.6, 0.0]],
        ]
    )
    # One item of one token and one of two, whose mean is 0.05, 0.5, 0.375, 0.25; the second sample has one item.
    tokens = [[[1], [2, 3]], [[1]]]
    assert item_mask(maps, tokens, [0.5] * 2).tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert item_mask(maps, tokens, [0.3] * 2).tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    # Each item has a threshold of its own: half of .5 and half of .5; half of .5.
    assert item_mask(maps, tokens, ["max*0.5"] * 2).tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert item_mask(maps, tokens, [2.0] * 2).sum() == 0
    # By hand: .5 for the one, .375 for the other; the second sample by its own rule.
    assert item_mask(maps, tokens, [(0.5, 0.375), "max*0.5"]).tolist() == [[1, 1, 1, 0], [1, 1, 1, 0]]
    assert item_mask(maps, tokens, [(2.0, 0.375), (0.35,)]).tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]
    with pytest.raises(ValueError):
        item_mask(maps, tokens, [(0.5,), 0.5])


@pytest.mark.parametrize("options", [{"threshold": "otzu"}, {"threshold": "nan"}, {"layers": ()}])
def test_options_that_cannot_work_are_refused_before_any_compute(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DFusionConfig(**options)
