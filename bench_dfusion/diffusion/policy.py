"""The policy: a diffusers model seen as a stepwise Gaussian policy, with LoRA on top of a frozen base.

`sample` draws trajectories, `log_prob` scores stored steps with gradients, `decode` makes pictures.
The frozen reference is the same network with the LoRA switched off (`policy.reference()`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench_dfusion.diffusion import arithmetic, lora, samplers
from bench_dfusion.models import schedules
from bench_dfusion.models.base import NETWORK_FIX, Adapter, Conditioning, finite, guided
from bench_dfusion.models.schedules import Levels, Schedule
from bench_dfusion.util import files, parallel

if TYPE_CHECKING:  # peft takes seconds to import, and only what trains or samples needs it: tables and checks do not
    from peft import LoraConfig


@dataclass
class Trajectory:
    """The denoising runs of B samples with T steps, on the CPU.

    latents   float32 [B, T + 1, C, H, W], from the start noise x_T to x_0
    log_probs float32 [B, T], under the prediction that drew them (behaviour), averaged over C·H·W
    seeds     int64 [B]
    prompts   B strings
    """

    latents: Tensor
    log_probs: Tensor
    seeds: Tensor
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: Tensor) -> Trajectory:
        return Trajectory(
            self.latents[rows], self.log_probs[rows], self.seeds[rows], [self.prompts[i] for i in rows.tolist()]
        )

    @property
    def final(self) -> Tensor:
        """x_0 [B, C, H, W]."""
        return self.latents[:, -1]

    @staticmethod
    def cat(parts: Sequence[Trajectory]) -> Trajectory:
        return Trajectory(
            torch.cat([p.latents for p in parts]),
            torch.cat([p.log_probs for p in parts]),
            torch.cat([p.seeds for p in parts]),
            [prompt for p in parts for prompt in p.prompts],
        )


def _own_parameters(network: nn.Module, targets: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The network's parameters by name; with `targets` those of the modules whose names end so. Raises ValueError."""
    parts = {name for name, _ in network.named_modules() if targets is None or name.endswith(tuple(targets))}
    inside = {f"{part}.{name}" for part in parts for name, _ in network.get_submodule(part).named_parameters()}
    found = {n: p for n, p in network.named_parameters() if targets is None or n in inside}
    if not found:
        raise ValueError(f"lora.targets {', '.join(targets or ())}: no module of {type(network).__name__} ends so")
    return found


def remove_lora(network: nn.Module) -> None:
    """Undo what a Policy has done to its network: the modules are those it had before."""
    for name, layer in _lora_layers(network):
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(network, "peft_config"):
        del network.peft_config


def _lora_layers(network: nn.Module) -> list[tuple[str, Any]]:
    """The layers of a network that a LoRA has wrapped, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)]


@torch.no_grad()
def in_batches(policy: Policy, function: Callable[..., Tensor], *columns: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """`function` of many rows of columns [R], a policy's batch at a time, without gradients: [R, *shape] on the CPU."""
    parts = list(zip(*(c.split(policy.batch) for c in columns), strict=True)) if len(columns[0]) else []
    return torch.cat([torch.zeros(0, *shape), *parallel.each(lambda part: function(*part).cpu(), parts)])


def branches(adapter: Adapter, guidance: float) -> int:
    """The calls of the network that a guided prediction takes."""
    return 1 if guidance == 1 or adapter.distilled else 2


class Policy:
    """A pipeline's network as a policy.

    Its `levels` are those that the network was trained at, the cleanest first, `training_levels` of them, and then those
    that the sampler's steps start from, the noisiest first: in flow matching they need not be among the others.

    adapter    how the pipeline's family answers (see `models/base.py`)
    steps, kind, eta, guidance   the sampler's, see `track.SamplerSection`: T, where the noise comes from, how much (None: the
               kind's own), the guidance scale (1: one branch)
    rank, alpha, init   the LoRA's, see `track.LoraSection`; targets are the family's attention projections unless given;
               `config` goes before all four. Of rank 0 there is none: the network's own weights are trained
    batch      samples in one call of the network; a fixed shape where bit-equality is promised
    autocast   dtype of the network's arithmetic, None for its own; log-probs are float32 in any case
    """

    def __init__(
        self,
        adapter: Adapter,
        *,
        steps: int,
        eta: float | None = None,
        kind: str = "native",
        guidance: float = 1.0,
        rank: int = 4,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        init: str = "peft",
        config: LoraConfig | None = None,
        batch: int = 64,
        autocast: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ):
        from peft import LoraConfig, inject_adapter_in_model

        self.adapter, self.kind, self.guidance, self.batch, self.autocast = adapter, kind, guidance, batch, autocast
        self.device = torch.device(device)
        schedule, training = adapter.schedule(steps, eta, kind), adapter.levels()
        self.schedule: Schedule = schedule.to(self.device)
        self.levels: Levels = schedules.joined(training, schedule).to(self.device)
        self.training_levels = len(training)
        self.branches = branches(adapter, guidance)
        self.network_evaluations = 0  # forwards of one sample through one branch
        self._encoded: dict[str, Conditioning] = {}  # by prompt, at the side of `_encoded_at`
        self._encoded_at = adapter.latent_shape[-1]
        self.lora_config: LoraConfig | None = None
        if config is not None or rank:
            self.lora_config = config or LoraConfig(
                r=rank,
                lora_alpha=alpha or rank,
                target_modules=list(targets or adapter.lora_targets),
                lora_dropout=0.0,
                init_lora_weights="gaussian" if init == "gaussian" else True,
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                inject_adapter_in_model(self.lora_config, adapter.network)
            own = {name: p for name, p in adapter.network.named_parameters() if "lora_" in name}
        else:
            own = _own_parameters(adapter.network, targets)
            adapter.trained_whole = True
        self.parameters: dict[str, nn.Parameter] = own
        for p in self.parameters.values():
            p.data = p.data.float()
            p.requires_grad_(True)
        adapter.place(self.parameters.values(), self.device)
        self._base = None if self.lora_config else self.weights()

    @contextmanager
    def sampling(
        self, steps: int, eta: float | None, kind: str, guidance: float, resolution: int | None = None
    ) -> Iterator[None]:
        """Inside, the policy samples with another sampler (arguments as of the class), and pictures of another side where
        `resolution` is given (pixels). Raises ValueError where there is none."""
        own = self.schedule
        with self.adapter.at_resolution(resolution), self.guided_by(guidance):
            self.schedule = self.adapter.schedule(steps, eta, kind).to(self.device)
            try:
                yield
            finally:
                self.schedule = own

    @contextmanager
    def guided_by(self, guidance: float) -> Iterator[None]:
        """Inside, predictions have another guidance scale."""
        own = self.guidance, self.branches
        self.guidance, self.branches = guidance, branches(self.adapter, guidance)
        try:
            yield
        finally:
            self.guidance, self.branches = own

    @contextmanager
    def noisy_at(self, steps: Tensor | None) -> Iterator[None]:
        """Inside, of the sampler's steps only those at indices `steps` [W] have noise, the others are the ODE's; None: all
        that have."""
        own = self.schedule
        if steps is not None:
            ode = self.adapter.schedule(len(own), 0.0, self.kind).to(self.device)
            self.schedule = schedules.noisy_at(own, ode, steps)
        try:
            yield
        finally:
            self.schedule = own

    # conditioning

    def condition(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of prompts, each encoded once and alone; with guidance the unconditional half first."""
        kind, known, side = self.device.type, self.adapter.encoded, self.adapter.latent_shape[-1]
        if side != self._encoded_at:  # some families tell the text's encoding the size of the picture
            self._encoded, self._encoded_at = {}, side
        casting = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        under = side, self.device, torch.get_autocast_dtype(kind) if casting else None
        new = [p for p in dict.fromkeys([*prompts, *[""] * (self.branches - 1)]) if p not in self._encoded]
        self._encoded |= {p: known[p, *under] for p in new if (p, *under) in known}
        new = [p for p in new if p not in self._encoded]
        if new:
            with self.adapter.encoding(self.device):
                for prompt in new:  # each alone: in a batch its last bits would depend on the other prompts, so a resumed run would differ
                    encoded = self.adapter.encode([prompt])
                    for name, value in encoded.items():
                        if value.is_floating_point():
                            encoder = getattr(self.adapter.pipe, "text_encoder", None) or self.adapter.network
                            what = f"the text encoder's {name} of {prompt!r} are"
                            finite(value, encoder, what, value.dtype, NETWORK_FIX)
                    known[prompt, *under] = self._encoded[prompt] = {
                        k: v[0].to(self.device) for k, v in encoded.items()
                    }
        wanted = [""] * len(prompts) * (self.branches - 1) + list(prompts)
        conditioning = {k: torch.stack([self._encoded[p][k] for p in wanted]) for k in self._encoded[wanted[0]]}
        if self.adapter.distilled:
            conditioning["guidance"] = torch.full((len(prompts),), self.guidance, device=self.device)
        return conditioning

    # the Gaussian step

    def predict(self, x_t: Tensor, timestep: Tensor, prompts: Sequence[str]) -> Tensor:
        """The guided output in float32 for x_t [B, ...] at training timesteps [B]."""
        if not parallel.spare():
            self.network_evaluations += len(x_t) * self.branches
        casting = torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
        with casting, arithmetic.products(self.device, self.autocast):
            return guided(
                self.adapter, x_t, timestep, self.condition(prompts), self.guidance if self.branches == 2 else 1
            )

    def finite(self, values: Tensor, what: str = "the network's predictions are") -> Tensor:
        """`values` that the network computed. Raises NotFinite, which names it, its dtype and what to set."""
        return finite(values, self.adapter.network, what, self.autocast or self.adapter.dtype, NETWORK_FIX)

    def mean(self, x_t: Tensor, step: Tensor, prompts: Sequence[str]) -> Tensor:
        """mu_theta [B, ...] of the next latent; `step` [B] indexes the schedule, 0 the noisiest."""
        output = self.predict(x_t, self.schedule.timesteps[step], prompts)
        return samplers.step_mean(self.schedule, step, x_t, output)

    def log_prob(self, x_t: Tensor, x_s: Tensor, step: Tensor, prompts: Sequence[str]) -> Tensor:
        """log p(x_s | x_t) [B], averaged over the latent (method: DDPO §4.2); 0 at deterministic steps."""
        mean = self.mean(x_t, step, prompts)
        return samplers.gaussian_log_prob(x_s, mean, self.schedule.std[step])

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], seeds: Tensor, advance: Callable[[int], None] = lambda n: None
    ) -> Trajectory:
        """Draw one trajectory for each (prompt, seed); `advance` is told the number of samples done."""

        def draw(start: int) -> Trajectory:
            rows = slice(start, start + self.batch)
            drawn = self._sample(list(prompts[rows]), seeds[rows])
            advance(len(drawn) * parallel.size())
            return drawn

        return Trajectory.cat(parallel.each(draw, range(0, len(prompts), self.batch)))

    def _sample(self, prompts: list[str], seeds: Tensor) -> Trajectory:
        noise = samplers.sample_noise(seeds, len(self.schedule), self.adapter.latent_shape).to(self.device)
        latents, log_probs = self.denoise(noise[:, 0], noise[:, 1:], prompts)
        return Trajectory(latents.cpu(), log_probs.cpu(), seeds.clone(), prompts)

    def denoise(
        self,
        x_t: Tensor,
        noise: Tensor,
        prompts: Sequence[str],
        mean: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The last S steps from x_t [B, ...] on, with each step's z in `noise` [B, S, ...].

        `mean` is asked for mu at (step number, x_t, step [B]) instead of the plain policy. Returns the latents
        [B, S + 1, ...], x_t first, and each step's log-prob [B, S] under the mean that drew it. Raises NotFinite.
        """
        latents, log_probs = [x_t], []
        for k in range(noise.shape[1]):
            i = len(self.schedule) - noise.shape[1] + k
            step = torch.full((len(prompts),), i, device=self.device)
            mu = self.mean(latents[-1], step, prompts) if mean is None else mean(i, latents[-1], step)
            x_s = mu + self.schedule.std[i] * noise[:, k]
            log_probs.append(samplers.gaussian_log_prob(x_s, mu, self.schedule.std[step]))
            latents.append(x_s)
        return self.finite(torch.stack(latents, 1)), torch.stack(log_probs, 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of x_0 [B, C, H, W]: uint8 [B, H, W, 3] on the CPU."""

        def decode(part: Tensor) -> Tensor:
            images = self.adapter.decode(part.to(self.device))
            return (images * 255).round().byte().permute(0, 2, 3, 1).cpu()

        return torch.cat(parallel.each(decode, latents.split(self.batch)))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """x_0 float32 [B, C, H, W] on the CPU of pictures uint8 [B, H, W, 3]."""

        def encode(part: Tensor) -> Tensor:
            return self.adapter.encode_images(part.to(self.device).permute(0, 3, 1, 2).float() / 255).cpu()

        return torch.cat(parallel.each(encode, images.split(self.batch)))

    # the reference and the weights

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the network is the frozen base: the LoRA is off, or the weights are those before training, and no
        gradient is recorded."""
        if self._base is not None:
            with self.holding(self._base):
                yield
            return
        layers = [layer for _, layer in _lora_layers(self.adapter.network)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            with torch.no_grad():
                yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)  # disabling cleared requires_grad, enabling restores it
            for p in self.parameters.values():
                p.requires_grad_(True)

    def weights(self) -> dict[str, Tensor]:
        """A copy of what is trained, by name as in `parameters`."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the policy has other weights (of `weights()`), and no gradient is recorded."""
        own = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, p in self.parameters.items():
                p.data = weights[name].to(p.data)
            with torch.no_grad():
                yield
        finally:
            for name, p in self.parameters.items():
                p.data = own[name]

    def state(self) -> dict[str, Tensor]:
        """What is trained, on the CPU: the LoRA's weights in peft's naming, or the network's own."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.adapter.network) if self.lora_config else self.parameters
        return {k: v.detach().cpu().clone() for k, v in state.items()}

    @property
    def file(self) -> str:
        """The name of the file that `save` writes what is trained to."""
        return lora.FILE if self.lora_config else lora.WHOLE

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned. Raises ValueError where names or shapes are others than what is trained here."""
        from peft import set_peft_model_state_dict

        own, kind = self.state(), "LoRA" if self.lora_config else "own weights"
        for name in sorted(own.keys() ^ state.keys()):
            raise ValueError(
                f"these weights are not the network's {kind}: {name} is {'missing' if name in own else 'more'}"
            )
        for name, value in own.items():
            if value.shape != state[name].shape:
                shapes = f"{list(state[name].shape)}, not {list(value.shape)}"
                raise ValueError(f"these weights are not the network's {kind}: {name} has the shape {shapes}")
        if self.lora_config:
            set_peft_model_state_dict(self.adapter.network, dict(state))
            return
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state[name])

    def load(self, file: Path) -> None:
        """Take over a file that `save` wrote. Raises ValueError where it is of another shape, UsageError where it is none."""
        if self.lora_config:
            self.load_state(lora.read(file, self.adapter).state)
            return
        whole = lora.read_whole(file)
        self.load_state({name: whole[name] for name in self.parameters if name in whole})

    def save(self, folder: Path) -> None:
        """Write a LoRA as `pytorch_lora_weights.safetensors` (diffusers) and as a peft directory `peft/`, and a network's own
        weights as `diffusion_pytorch_model.safetensors` with its `config.json`, which its class's `from_pretrained` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.lora_config is None:
            network: Any = self.adapter.network
            config = {
                key: value for key, value in json.loads(network.to_json_string()).items() if key != "_name_or_path"
            }
            files.write_json(folder / "config.json", config)
            files.save_tensors(folder / self.file, network.state_dict(), header={"format": "pt"})
            return
        self.adapter.save_lora(folder, self.state(), lora.scale(self.lora_config))
        files.order_words(folder / self.file)
        peft_folder = folder / "peft"
        self.lora_config.save_pretrained(str(peft_folder))
        files.save_tensors(
            peft_folder / "adapter_model.safetensors", {f"base_model.model.{k}": v for k, v in self.state().items()}
        )
