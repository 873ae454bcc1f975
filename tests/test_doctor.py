"""The doctor's estimates against what loading, training steps and autograd really take, on tiny pipelines of real classes."""

from __future__ import annotations

import json
import shutil
import struct
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_dfusion.reward_models.clip import Clip, ClipConfig
from bench_dfusion.reward_models.jpeg import JpegCompressibility
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from tiny import policy_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench_dfusion import doctor
from bench_dfusion.builders.contract import ConsistentSamples, Samples
from bench_dfusion.diffusion.policy import Policy, Trajectory
from bench_dfusion.doctor import changes as changing
from bench_dfusion.doctor import device, estimates
from bench_dfusion.doctor.memory import Memory
from bench_dfusion.doctor.trace import Work, tracing
from bench_dfusion.errors import UsageError
from bench_dfusion.models.loading import load_adapter
from bench_dfusion.rewards.contract import Reward, RewardConfig
from bench_dfusion.runs import evaluation, trainer
from bench_dfusion.runs.config import Cell
from bench_dfusion.tracks.schema import MemorySection, ModelSection

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PROMPTS = ["a red circle", "two blue rings", "a green cross", "a cat and a dog"]
SMALL = [
    "track.batch=4",
    "track.sampler.steps=4",
    "track.evaluation.sampler=null",
    "track.budget.prompts_per_round=2",
    "track.budget.samples_per_prompt=4",
    'track.evaluation.judges=["jpeg-compressibility"]',
    f"track.prompts.train={json.dumps(PROMPTS)}",
    'track.prompts.heldout=["a capybara", "an axolotl"]',
]
CHECKPOINTED = "track.memory.gradient_checkpointing=true"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast this machine is matters to no test."""
    monkeypatch.setattr(device, "SECONDS", 0.01)


def cell_of(folder: Path, *settings: str, **options: Any) -> Cell:
    cell, _ = doctor.resolve(
        model=str(folder), settings=[*SMALL, *settings], reward="jpeg-compressibility", **{"algo": "dpo", **options}
    )
    return cell


# ---------------------------------------------------------------- what is counted exactly


@pytest.mark.parametrize(("name", "dtype"), [("sdxl", "bfloat16"), ("pixart", "float16")])
def test_weights_lora_and_optimiser_are_those_of_a_loaded_policy(
    name: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{name}_dir")
    cell = cell_of(folder, f"track.model.dtype={dtype}", "track.lora.rank=3")
    doctored = Memory(cell, GPU, fresh=True)
    found, parameters = doctored._layout(cell.track), doctored.parameters(cell.track)
    adapter, _ = load_adapter(cell.track.model)
    for n, module in adapter.pipe.components.items():
        if isinstance(module, nn.Module):
            size = sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
            assert found["sample"][n] == size, n
            assert parameters[n] == sum(p.numel() for p in module.parameters())
    policy = trainer.make_policy(cell.track, adapter, 0, CPU)
    lora = list(policy.parameters.values())
    optimiser = torch.optim.AdamW(lora)
    for p in lora:
        p.grad = torch.zeros_like(p)
    optimiser.step()
    state = [t for s in optimiser.state.values() for n, t in s.items() if n != "step"]
    assert found["train"]["AdamW"] == sum(t.nbytes for t in state)
    assert found["train"]["LoRA"] == found["train"]["gradients"] == sum(p.nbytes for p in lora)
    assert parameters["LoRA"] == sum(p.numel() for p in lora)
    policy.condition([*PROMPTS, "a capybara", "an axolotl"])
    assert len(policy._encoded) == 7  # and the empty one
    cached = sum(t.nbytes for encoded in policy._encoded.values() for t in encoded.values())
    assert found["train"]["cached embeddings"] == cached


def real_samples(policy: Policy) -> ConsistentSamples:
    """Eight samples of noise, four pairs."""
    generator, steps = torch.Generator().manual_seed(0), len(policy.schedule)
    latents = torch.randn(8, steps + 1, *policy.adapter.latent_shape, generator=generator)
    trajectory = Trajectory(latents, torch.zeros(8, steps), torch.arange(8), [PROMPTS[i % 4] for i in range(8)])
    samples = Samples(trajectory, torch.zeros(8, 1, 1, 3, dtype=torch.uint8), torch.arange(8).float())
    pairs = torch.stack([torch.arange(4, 8), torch.arange(4)], 1)
    return ConsistentSamples(samples, 8, pairs, torch.arange(8), torch.cat([pairs[:, :1], pairs.flip(1)], 1))


def kept_by_a_step(cell: Cell, rows: int) -> int:
    """Bytes that autograd keeps at the end of the loss of `rows` rows of a DPO step of a loaded policy, each storage once,
    without weights."""
    adapter, _ = load_adapter(cell.track.model, memory=cell.track.memory)
    policy = trainer.make_policy(cell.track, adapter, 0, CPU)
    samples, algorithm = real_samples(policy), cell.algorithm(cell.algorithm_config)
    prepared = algorithm.prepare(policy, samples, torch.Generator().manual_seed(0))
    known = {t.untyped_storage().data_ptr() for t in [*adapter.network.parameters(), *adapter.network.buffers()]}
    kept: list[weakref.ref[Any]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = algorithm.loss(policy, samples, {k: v[:rows] for k, v in prepared.items()})
    alive = {s.data_ptr(): s.nbytes() for s in (ref() for ref in kept) if s is not None}
    assert loss.value.requires_grad
    return sum(size for place, size in alive.items() if place not in known)


@pytest.mark.parametrize(("name", "settings"), [("sd", [CHECKPOINTED]), ("pixart", ["track.batch=2"])])
def test_what_autograd_keeps_is_what_it_really_keeps(
    name: str, settings: list[str], request: pytest.FixtureRequest
) -> None:
    cell = cell_of(request.getfixturevalue(f"{name}_dir"), *settings)
    estimated = Memory(cell, CPU, fresh=False)._trace("train", cell.track)
    assert estimated.kept == pytest.approx(kept_by_a_step(cell, cell.track.batch), rel=1e-3)


def test_operations_are_those_of_the_real_network(sd_dir: Path) -> None:
    """Floating-point operations as torch counts them on real tensors, with attention in the open (torch counts none of a
    CPU's fused kernel); a fused kernel makes the same two products in the forward."""
    real, _ = load_adapter(ModelSection(id=str(sd_dir)))
    real.network.set_attn_processor(AttnProcessor())
    shadow, _ = load_adapter(ModelSection(id=str(sd_dir)), "meta")

    def forward(adapter: Any, where: str) -> Tensor:
        x = torch.zeros(3, 4, 16, 16, device=where, requires_grad=True)
        return adapter.predict(x, torch.zeros(3, device=where), {"states": torch.zeros(3, 77, 16, device=where)})

    with FlopCounterMode(display=False) as whole:
        with FlopCounterMode(display=False) as half:
            output = forward(real, "cpu")
        output.sum().backward()
    with tracing() as fused:
        forward(shadow, "meta")
    assert fused.flops == half.get_total_flops()
    shadow.network.set_attn_processor(AttnProcessor())
    with tracing() as both:
        forward(shadow, "meta").sum().backward()
    assert both.flops == whole.get_total_flops() and fused.peak < both.peak


def test_a_trace_by_hand() -> None:
    """x [1000, 10] of 40,000 bytes, w [10, 10] of 400: the product is alive beside x, then what the backward makes."""
    w = torch.empty(10, 10, device="meta", requires_grad=True)
    with tracing() as trace, torch.autograd.graph.saved_tensors_hooks(trace.keep, lambda t: t):
        x = torch.empty(1000, 10, device="meta")
        y = x @ w.t()  # keeps x; a view of the weight is no storage of its own
        assert (trace.live, trace.kept) == (80_000, 40_000)
        z = y.relu()  # keeps its result
        del y
        assert (trace.live, trace.peak, trace.kept) == (80_000, 120_000, 80_000)
        assert trace.cost.flops == 2 * 1000 * 10 * 10
        z.sum().backward()
        assert w.grad is not None and trace.cost.flops == 2 * 2 * 1000 * 10 * 10
        host = z.detach().cpu()
        assert host.device.type == "cpu" and not host.any() and z.sum().item() == 0
        del x, z
        assert trace.live == 400  # the gradient
    assert Work(10, 20, 3).in_batches(rows=40, batch=4, traced=4) == Work(100, 200, 30)


def test_the_times_are_the_operations_over_what_was_measured() -> None:
    rates = device.Rates(flops=1e9, bandwidth=1e8, overhead=1e-3, overlaps=False)
    assert rates.seconds(Work(2e9, 1e8, 500)) == pytest.approx(2 + 1 + 0.5)
    assert rates.model_copy(update={"overlaps": True}).seconds(Work(2e9, 1e8, 500)) == pytest.approx(3)


def test_a_round_is_scaled_from_what_was_traced(pixart_dir: Path) -> None:
    """Twice the prompts of a round are twice the time, by the same operations; twice the steps twice the sampling's."""
    whole = {}
    for key, settings in {
        "one": [],
        "prompts": ["track.budget.prompts_per_round=4"],
        "steps": ["track.sampler.steps=8"],
    }.items():
        cell = cell_of(pixart_dir, *settings)
        found = Memory(cell, CPU, fresh=False)
        whole[key] = {n: found._trace(n, cell.track).cost.flops for n in ("sample", "decode", "build", "train")}
    for name, value in whole["one"].items():
        assert whole["prompts"][name] == pytest.approx(2 * value)
        assert whole["steps"][name] == pytest.approx(value * (1 if name == "decode" else 2), rel=0.02)
    # 8 drawn samples, 4 steps, 2 branches: as many evaluations, each of the network's own cost.
    adapter, _ = load_adapter(cell.track.model)
    policy = trainer.make_policy(cell.track, adapter, 0, CPU)
    policy.condition(PROMPTS)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy.mean(torch.zeros(4, *adapter.latent_shape), torch.zeros(4, dtype=torch.long), PROMPTS)
    assert whole["one"]["sample"] == pytest.approx(2 * 4 * counter.get_total_flops())


# ---------------------------------------------------------------- the verdict


def test_checkpointing_and_slicing_lower_what_they_should(pixart_dir: Path) -> None:
    track = cell_of(pixart_dir).track
    saving = changing.changed(track, {"memory.gradient_checkpointing": True, "memory.vae_slicing": True})
    found = Memory(cell_of(pixart_dir), GPU, fresh=True)
    (train, decode), (less_train, less_decode) = (
        [found._trace(name, settings) for name in ("train", "decode")] for settings in (track, saving)
    )
    assert less_train.kept < train.kept / 2 and less_train.peak < train.peak
    assert less_train.cost.flops > 1.2 * train.cost.flops  # a second forward
    assert less_decode.peak < decode.peak / 2


def test_what_is_advised_fits_and_nothing_less_does(pixart_dir: Path) -> None:
    plain = Memory(cell_of(pixart_dir), GPU, fresh=True).phases(cell_of(pixart_dir).track)
    most = max(plain, key=lambda p: p.peak)
    limit = (most.peak - 0.95 * most.parts["activations"]) / 1e9
    tight = doctor.estimate(cell_of(pixart_dir), GPU, memory_gb=limit)
    assert not tight.fits and tight.smallest and len(tight.smallest) > 1

    words = [f"track.{name}={json.dumps(value)}" for name, value in tight.smallest.items()]
    given = cell_of(pixart_dir, *words)  # as a user would
    found = Memory(given, GPU, fresh=True)

    def peak(changes: dict[str, Any]) -> int:
        return max(p.peak for p in found.phases(changing.changed(cell_of(pixart_dir).track, changes)))

    assert peak(tight.smallest) == tight.smallest_peak <= limit * 1e9
    assert max(p.peak for p in found.phases(given.track)) == tight.smallest_peak
    for name in tight.smallest:
        assert peak({k: v for k, v in tight.smallest.items() if k != name}) > limit * 1e9
    for change in tight.changes:
        assert change.saves == tight.peak.peak - change.peak >= 0
    sliced = next(c for c in tight.changes if "memory.vae_slicing" in c.settings)
    assert peak(sliced.settings) == sliced.peak


def test_where_parts_lie_while_they_are_offloaded(pixart_dir: Path) -> None:
    cell = cell_of(pixart_dir)
    gpu, cpu = (Memory(cell, where, fresh=True) for where in (GPU, CPU))

    def lies(found: Any, name: str, option: str) -> set[str]:
        layout = found._layout(changing.changed(cell.track, {f"memory.{option}": True}))
        return {phase for phase, parts in layout.items() if name in parts}

    assert lies(gpu, "text_encoder", "offload_text") == {"encode"}
    assert lies(gpu, "text_encoder", "drop_text") == lies(cpu, "text_encoder", "drop_text") == {"load", "encode"}
    assert lies(gpu, "vae", "offload_vae") == {"decode", "evaluate"}
    assert lies(cpu, "vae", "offload_vae") == set(estimates.ORDER)  # to the CPU and back is nothing there

    layout = gpu._layout(changing.changed(cell.track, {"memory.offload_network": True}))
    network = PixArtTransformer2DModel.from_pretrained(pixart_dir / "transformer")
    block = sum(p.nbytes for p in network.transformer_blocks[0].parameters())
    patches = sum(p.nbytes for p in network.pos_embed.parameters())
    whole = sum(p.nbytes for p in network.parameters())
    others = whole - patches - block * len(network.transformer_blocks)
    assert {parts["transformer"] for parts in layout.values()} == {others + 2 * block}


@pytest.mark.parametrize(
    ("algo", "builder"), [("draft", "vanilla"), ("dgpo", "dfusion"), ("crd", "branch"), ("opd", "vanilla")]
)
def test_any_algorithm_and_builder_can_be_estimated(algo: str, builder: str, pixart_dir: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"reward": "clip" if algo == "draft" else "jpeg-compressibility"}
    if algo == "opd":
        policy_of(pixart_dir, rank=4).save(tmp_path)
        options["teachers"] = [str(tmp_path)] * 2
    settings = [*SMALL, "track.rewards.clip.model=micro", "track.lora.rank=4"]
    cell, _ = doctor.resolve(model=str(pixart_dir), algo=algo, builder=builder, settings=settings, **options)
    found = Memory(cell, CPU, fresh=False)
    train, decode = found._trace("train", cell.track), found._trace("decode", cell.track)
    assert 0 < train.kept <= train.peak and train.cost.flops > 0 and found.rounds > 0
    if algo == "draft":  # gradients flow through the decoder
        assert train.kept > decode.peak


def test_scorers_count_what_they_weigh_and_say_where_it_is_unknown(pixart_dir: Path) -> None:
    size = Clip.weights_bytes(ClipConfig(model="micro"))
    loaded = Clip(ClipConfig(model="micro"))
    assert size == sum(t.nbytes for t in [*loaded.model.parameters(), *loaded.model.buffers()])
    settings = [*SMALL, 'track.evaluation.judges=["clip"]', "track.rewards.clip.model=micro"]
    cell, _ = doctor.resolve(model=str(pixart_dir), settings=settings, reward="hpsv3")
    found = Memory(cell, GPU, fresh=True)
    assert found.notes == ["not counted, since their size is not known before they are loaded: reward hpsv3"]
    assert found._layout(cell.track)["train"]["judge clip"] == size
    away = found._layout(changing.changed(cell.track, {"memory.offload_rewards": True}))
    assert "judge clip" not in away["train"] and away["score"]["the scorer"] == size


# ---------------------------------------------------------------- the command


def hollow(source: Path, folder: Path) -> Path:
    """A pipeline directory whose weights are none: all NaN after the headers."""
    shutil.copytree(source, folder)
    for file in folder.rglob("*.safetensors"):
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        file.write_bytes(data[: 8 + length] + b"\xff" * (len(data) - 8 - length))
    return folder


def test_the_command_reads_no_weights(pixart_dir: Path, said: Any, tmp_path: Path) -> None:
    folder = hollow(pixart_dir, tmp_path / "hollow")
    with pytest.raises(UsageError, match="are not finite"):
        load_adapter(ModelSection(id=str(folder)))
    words = ("doctor", "--model", folder, "--reward", "jpeg-compressibility", *(f"--set={s}" for s in SMALL))
    status, out, _ = said(*words, "--device", "cuda", "--memory-gb", "0.6", cwd=tmp_path)
    assert status == 1 and "does not fit" in out and "--set track.batch=1" in out and "together do not fit" in out


def test_it_fits_and_says_so_in_words_and_in_json(pixart_dir: Path, said: Any, tmp_path: Path) -> None:
    words = ("doctor", "--model", pixart_dir, "--reward", "jpeg-compressibility", *(f"--set={s}" for s in SMALL))
    status, out, _ = said(*words, "--device", "cuda", "--memory-gb", 4, cwd=tmp_path)
    assert status == 0 and "fits: " in out and "4.00 GB" in out and "not estimated" in out
    status, out, _ = said(*words, "--device", "cpu", "--json", cwd=tmp_path)
    found = json.loads(out)
    assert status == 0 and found["fits"] and found["peak_phase"] in estimates.ORDER
    assert [p["name"] for p in found["phases"]] == list(estimates.ORDER)
    assert found["peak"] == max(sum(p["parts"].values()) for p in found["phases"])
    assert found["round_seconds"] > 0 and found["rates"]["flops"] > 1e8


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--memory-gb", "0"), "--memory-gb must be more than 0"),
        (("--device", "abacus"), "unknown device 'abacus'"),
        (("--device", "cuda:7"), "give --memory-gb"),
        (("--model", "no/such-dir"), "no model 'no/such-dir'"),
        (("--builder", "offline", "--set=builder.pairs=x"), ""),
        (("--set", "track.batch=0"), "track.batch"),
        (("--algo", "dop"), "did you mean dpo"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    words: tuple[str, ...], expected: str, refused: Any, tmp_path: Path
) -> None:
    assert expected in refused("doctor", *words, cwd=tmp_path)


@pytest.mark.parametrize("fault", ["missing", "damaged", "foreign", "weights"])
def test_a_checkpoint_that_cannot_be_read_is_refused(fault: str, sd_dir: Path, refused: Any, tmp_path: Path) -> None:
    folder = hollow(sd_dir, tmp_path / "sd")
    config, index = folder / "unet" / "config.json", folder / "model_index.json"
    if fault == "missing":
        config.unlink()
    elif fault == "damaged":
        config.write_text('{"_class_name": "UNet2DConditionModel", "down_block_types": ["NoSuchBlock"]}')
    elif fault == "foreign":
        index.write_text(index.read_text().replace("StableDiffusionPipeline", "KandinskyPipeline"))
    else:
        next((folder / "unet").glob("*.safetensors")).write_bytes(b"no header")
    words = ("--model", folder, "--reward", "jpeg-compressibility", *(f"--set={s}" for s in SMALL))
    line = refused("doctor", *words, cwd=tmp_path)
    wanted = {"missing": "no unet/config.json", "damaged": "cannot be loaded as a UNet", "foreign": "supported are"}
    assert wanted.get(fault, "is no safetensors file") in line


def test_a_config_that_is_not_of_its_weights_is_told(sd_dir: Path, tmp_path: Path) -> None:
    folder = hollow(sd_dir, tmp_path / "sd")
    (file,) = (folder / "unet").glob("*.safetensors")
    save_file(load_file(file) | {"more.weight": torch.zeros(100, 100)}, file)
    notes = Memory(cell_of(folder), GPU, fresh=True).notes
    assert any(note.startswith("unet: its files hold") for note in notes)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "layers_per_block": 2}))
    with pytest.raises(UsageError, match="4 tensors of its unet are not of the shape that unet"):
        Memory(cell_of(folder), GPU, fresh=True)
    assert not Memory(cell_of(sd_dir), GPU, fresh=True).notes


def test_a_model_of_the_hub_is_estimated_without_its_weights(
    pixart_dir: Path, hub: Any, hub_home: Path, said: Any
) -> None:
    files = {str(p.relative_to(pixart_dir)): p.read_bytes() for p in pixart_dir.rglob("*") if p.is_file()}
    hub.create("org/tiny", files)
    words = ("doctor", "--device", "cpu", "--json", *(f"--set={s}" for s in SMALL), "--reward", "jpeg-compressibility")
    done = said(*words, "--model", "org/tiny")
    assert done.status == 0, done.err
    there, here = json.loads(done.out), doctor.estimate(cell_of(pixart_dir), CPU)
    assert there["parameters"] == here.parameters and there["on_disk"] == here.on_disk and there["notes"] == here.notes
    assert list(hub_home.rglob("config.json")) and not list(hub_home.rglob("*.safetensors"))


# ---------------------------------------------------------------- parts that leave the device


def test_the_autoencoder_is_on_the_device_only_while_it_works(sdxl_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = load_adapter(ModelSection(id=str(sdxl_dir)))
    adapter, _ = load_adapter(ModelSection(id=str(sdxl_dir)), memory=MemorySection(offload_vae=True))
    moves: list[str] = []
    vae = adapter.pipe.vae
    monkeypatch.setattr(vae, "to", lambda where, **_: moves.append(str(where)) or vae)
    vae.decoder.register_forward_pre_hook(lambda *_: moves.append("decodes"))
    vae.encoder.register_forward_pre_hook(lambda *_: moves.append("encodes"))
    latents = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = adapter.decode(latents)
        assert torch.equal(images, plain.decode(latents))
    assert torch.equal(adapter.encode_images(images), plain.encode_images(images))
    assert moves == ["cpu", "decodes", "cpu", "cpu", "encodes", "cpu"]
    moves.clear()
    adapter.decode(latents.requires_grad_()).sum().backward()
    assert moves == ["cpu", "decodes"]  # it stays for the backward pass
    moves.clear()
    adapter.to("meta")
    assert moves == ["cpu"] and next(adapter.network.parameters()).is_meta


class Scale(Reward):
    """The pictures' mean times a weight; `places` remembers where that was asked to go."""

    name, summary, paper, unit = "scale", "none", "none", "1"

    def __init__(self, config: RewardConfig, where: torch.device | str = "cpu"):
        super().__init__(config, where)
        self.places: list[str] = []
        self.network = nn.Linear(1, 1)
        self.network.to = lambda where: self.places.append(str(where))  # type: ignore[method-assign,assignment]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.places.append("scores")
        return images.float().flatten(1).mean(1)

    def fingerprint(self) -> str:
        return "scale"


def test_rewards_are_on_the_device_only_while_they_score(sd_dir: Path, tmp_path: Path) -> None:
    class Elsewhere(Scale):
        def __init__(self, config: RewardConfig, where: torch.device | str = "cpu"):
            super().__init__(config, torch.device("cpu", 0))  # to tell it from the place where it rests

    cell = cell_of(sd_dir, "track.memory.offload_rewards=true")
    run = trainer.Run(replace(cell, reward=Elsewhere, reward_config=RewardConfig()), tmp_path, "cpu")
    reward: Any = run.reward
    assert reward.places == ["cpu"]
    run._score(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), PROMPTS[:2])
    assert reward.places == ["cpu", "cpu:0", "scores", "cpu"]
    judge = Elsewhere(RewardConfig())
    judge.offload()
    trajectory = Trajectory(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2), ["a capybara", "an axolotl"])
    drawn = evaluation.Drawn(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), trajectory)
    evaluation.judged(judge, "scale", drawn, 1)
    assert judge.places == ["cpu", "cpu:0", "scores", "cpu"]
    kept = JpegCompressibility(RewardConfig())
    with kept.scoring():
        assert not kept.offloaded


def test_text_encoders_leave_once_every_prompt_is_encoded(sd_dir: Path, tmp_path: Path) -> None:
    def run(name: str, *settings: str) -> trainer.Run:
        return trainer.Run(cell_of(sd_dir, *settings), tmp_path / name, "cpu")

    plain, dropped = run("plain"), run("dropped", "track.memory.drop_text=true")
    assert dropped.policy.adapter.pipe.text_encoder is None and plain.policy.adapter.pipe.text_encoder is not None
    seeds = torch.tensor([1, 2])
    two = [PROMPTS[0], "a capybara"]
    first, second = (r.policy.sample(two, seeds) for r in (plain, dropped))
    assert torch.equal(first.latents, second.latents)
    with pytest.raises(ValueError, match="leave memory.drop_text off"):
        dropped.policy.condition(["a new prompt"])


def test_offline_pairs_bring_their_own_prompts(sd_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = cell_of(sd_dir, "track.memory.drop_text=true")
    monkeypatch.setattr(cell.builder, "draws", False)
    with pytest.raises(UsageError, match="leave track.memory.drop_text off"):
        trainer.Run(cell, tmp_path, "cpu")


def test_a_round_with_an_sde_window_trains_on_as_many_steps(pixart_dir: Path) -> None:
    settings = ["algo.sde_window.steps=1", "algo.window=[0, 0.5]"]
    flops = [
        Memory(cell_of(pixart_dir, *own, builder="vanilla"), CPU, fresh=False)
        for own in ([], settings, ["algo.window=[0, 0.25]"])
    ]
    whole, windowed, quarter = (found._trace("train", found.cell.track).cost.flops for found in flops)
    assert windowed == quarter and windowed < whole / 3
