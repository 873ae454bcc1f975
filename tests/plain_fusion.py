"""D-Fusion's targets by the book (Hu et al. 2025, §4): one sample and one guidance branch at a time, in float64.

Written against the paper's mathematics and not against the library: attention is computed in the open, the noise of
a base is read off its stored latents, and the schedule comes from the scheduler's numbers alone.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from bench_dfusion.diffusion.policy import Policy, Trajectory

KeysValues = dict[str, tuple[Tensor, Tensor]]  # by layer, each [positions, width]


class PlainAttention:
    """The processor of one layer: keeps keys, values and each head's probabilities; `replace` is (mask, K_r, V_r)."""

    def __init__(self) -> None:
        self.replace: tuple[Tensor, Tensor, Tensor] | None = None
        self.keys = self.values = torch.empty(0)
        self.probabilities: list[Tensor] = []

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        assert len(hidden_states) == 1
        assert attn.norm_q is attn.norm_k is attn.group_norm is attn.spatial_norm is None
        assert not attn.norm_cross and not attn.residual_connection and attn.rescale_output_factor == 1
        x = hidden_states[0]
        context = x if encoder_hidden_states is None else encoder_hidden_states[0]
        q, self.keys, self.values = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        if self.replace is not None:
            mask, keys, values = self.replace
            rows = mask.nonzero()[:, 0]
            self.keys, self.values = self.keys.clone(), self.values.clone()
            self.keys[rows], self.values[rows] = keys[rows], values[rows]
        self.probabilities, out = [], []
        width = q.shape[1] // attn.heads
        for head in range(attn.heads):
            own = slice(head * width, (head + 1) * width)
            scores = q[:, own] @ self.keys[:, own].T / math.sqrt(width)
            if attention_mask is not None:
                scores = scores + attention_mask.reshape(1, -1)
            weights = (scores - scores.amax(1, keepdim=True)).exp()
            weights = weights / weights.sum(1, keepdim=True)
            self.probabilities.append(weights)
            out.append(weights @ self.values[:, own])
        return attn.to_out[0](torch.cat(out, 1))[None]


@dataclass
class Reference:
    """A reference's forward at one step: keys and values for each branch, the conditional branch's map."""

    keys_values: list[KeysValues]
    map: Tensor  # [positions, tokens]


@dataclass
class Target:
    """Latents [T + 1, C, H, W], means [T, C, H, W], log-probs [T], and the mask [positions] of each fused step."""

    latents: Tensor
    means: Tensor
    log_probs: Tensor
    masks: dict[int, Tensor]


class PlainDFusion:
    """Makes targets for rows of `drawn`; forwards that several targets need are remembered."""

    def __init__(self, policy: Policy, drawn: Trajectory, steps: int, eta: float, guidance: float, map_side: int):
        self.drawn, self.guidance, self.map_side = drawn, guidance, map_side
        self.pipe = policy.adapter.pipe
        self.network: Any = deepcopy(policy.adapter.network).double()
        parts = self.pipe.components
        self.encoders: list[Any] = [
            deepcopy(parts[n]).double() for n in ("text_encoder", "text_encoder_2") if n in parts
        ]
        self.schedule = schedule(dict(self.pipe.scheduler.config), steps, eta)
        self.attention: dict[str, PlainAttention] = {}
        for name, module in self.network.named_modules():
            if isinstance(module, Attention):
                self.attention[name] = PlainAttention()
                module.set_processor(self.attention[name])
        self._texts: dict[str, dict[str, Any]] = {}
        self._plain: dict[tuple[int, int], Tensor] = {}
        self._references: dict[tuple[int, int], Reference] = {}

    # one forward

    def text(self, prompt: str) -> dict[str, Any]:
        """What the network is told of a prompt; PixArt is told which tokens are padding, SDXL the picture's size."""
        if prompt not in self._texts:
            self._texts[prompt] = self._text(prompt)
        return self._texts[prompt]

    def _text(self, prompt: str) -> dict[str, Any]:
        first = self.tokens(self.pipe.tokenizer, prompt)
        if "unet" not in self.pipe.components:
            states = self.encoders[0](first.input_ids, attention_mask=first.attention_mask)[0]
            conditions = {"resolution": None, "aspect_ratio": None}
            mask = first.attention_mask
            return {"encoder_hidden_states": states, "encoder_attention_mask": mask, "added_cond_kwargs": conditions}
        if len(self.encoders) == 1:
            return {"encoder_hidden_states": self.encoders[0](first.input_ids)[0]}
        second = self.tokens(self.pipe.tokenizer_2, prompt)
        one = self.encoders[0](first.input_ids, output_hidden_states=True)
        two = self.encoders[1](second.input_ids, output_hidden_states=True)
        states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
        pooled = two.text_embeds
        if prompt == "" and self.pipe.config.force_zeros_for_empty_prompt:
            states, pooled = states * 0, pooled * 0
        side = self.network.config.sample_size * self.pipe.vae_scale_factor
        sizes = torch.tensor([[side, side, 0, 0, side, side]])
        return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}

    @staticmethod
    def tokens(tokenizer: Any, prompt: str) -> Any:
        length = tokenizer.model_max_length
        return tokenizer([prompt], padding="max_length", max_length=length, return_tensors="pt")

    def output(self, x: Tensor, t: int, prompt: str) -> Tensor:
        return self.network(x[None], timestep=torch.tensor([t]), **self.text(prompt)).sample[0]

    @torch.no_grad()
    def mean(
        self,
        x: Tensor,
        step: int,
        prompt: str,
        fuse: tuple[Tensor, list[KeysValues]] | None = None,
        keep: list[KeysValues] | None = None,
    ) -> Tensor:
        """DDIM's mean from x [C, H, W]; branches run unconditional first."""
        t, bar_t, bar_s, sigma = self.schedule[step]
        outputs = []
        for branch, text in enumerate(["", prompt] if self.guidance != 1 else [prompt]):
            if fuse is not None:
                mask, keys_values = fuse
                for name, (keys, values) in keys_values[branch].items():
                    self.attention[name].replace = (nearest(mask, len(keys)), keys, values)
            outputs.append(self.output(x, t, text))
            if keep is not None:
                own = {n: a for n, a in self.attention.items() if n.endswith("attn1")}
                keep.append({name: (a.keys, a.values) for name, a in own.items()})
            for attention in self.attention.values():
                attention.replace = None
        out = outputs[0] if len(outputs) == 1 else outputs[0] + self.guidance * (outputs[1] - outputs[0])
        if self.pipe.scheduler.config.prediction_type == "epsilon":
            epsilon = out
        else:
            epsilon = math.sqrt(bar_t) * out + math.sqrt(1 - bar_t) * x
        clean = (x - math.sqrt(1 - bar_t) * epsilon) / math.sqrt(bar_t)
        return math.sqrt(bar_s) * clean + math.sqrt(1 - bar_s - sigma**2) * epsilon

    # a row of `drawn` at one step

    def plain(self, row: int, step: int) -> Tensor:
        if (row, step) not in self._plain:
            x = self.drawn.latents[row, step].double()
            self._plain[row, step] = self.mean(x, step, self.drawn.prompts[row])
        return self._plain[row, step]

    def reference(self, row: int, step: int) -> Reference:
        if (row, step) not in self._references:
            keep: list[KeysValues] = []
            self.mean(self.drawn.latents[row, step].double(), step, self.drawn.prompts[row], keep=keep)
            cross = [a for n, a in self.attention.items() if n.endswith("attn2")]  # as the last branch left them
            heads = [p for a in cross for p in a.probabilities if len(p) == self.map_side**2]
            assert heads
            self._references[row, step] = Reference(keep, sum(heads[1:], heads[0]) / len(heads))
        return self._references[row, step]

    def target(
        self,
        reference: int,
        base: int,
        *,
        layers: tuple[str, ...],
        fused_steps: range,
        tokens: list[list[int]],
        rules: list[str | float],
    ) -> Target:
        """`tokens` are the places of each item's tokens in the reference's prompt, the start token counted; `rules` the
        items' thresholds."""
        latents, means, log_probs = [self.drawn.latents[base, 0].double()], [], []
        masks: dict[int, Tensor] = {}
        for step, (_, _, _, sigma) in enumerate(self.schedule):
            fuse = None
            if step in fused_steps:
                r = self.reference(reference, step)
                masks[step] = union(r.map, tokens, rules)
                fuse = (masks[step], [{name: kv[name] for name in layers} for kv in r.keys_values])
            mean = self.mean(latents[-1], step, self.drawn.prompts[base], fuse)
            noise = self.drawn.latents[base, step + 1].double() - self.plain(base, step)  # the base's own sigma z
            density = -(noise**2) / (2 * sigma**2) - math.log(sigma) - math.log(2 * math.pi) / 2
            means.append(mean)
            log_probs.append(density.mean())
            latents.append(mean + noise)
        return Target(torch.stack(latents), torch.stack(means), torch.stack(log_probs), masks)


def schedule(config: dict[str, Any], steps: int, eta: float) -> list[tuple[int, float, float, float]]:
    """For each step (t, cumulative alpha at t, that at the next timestep, sigma), the noisiest first."""
    n = config["num_train_timesteps"]
    assert config["beta_schedule"] == "scaled_linear"
    roots = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, n, dtype=torch.float64)
    bar = (1 - roots**2).cumprod(0).tolist()
    if config["timestep_spacing"] == "leading":
        ts = [n // steps * (steps - 1 - i) + config["steps_offset"] for i in range(steps)]
    else:
        assert config["timestep_spacing"] == "trailing"
        ts = [round(n - i * n / steps) - 1 for i in range(steps)]
    rows = []
    for t, s in zip(ts, [*ts[1:], 0], strict=True):
        sigma = eta * math.sqrt((1 - bar[s]) / (1 - bar[t])) * math.sqrt(1 - bar[t] / bar[s])
        rows.append((t, bar[t], bar[s], sigma))
    return rows


def nearest(mask: Tensor, positions: int) -> Tensor:
    """A square mask [p] at another resolution: each position takes the one that holds its upper left corner."""
    side, other = math.isqrt(len(mask)), math.isqrt(positions)
    places = [(r * side // other) * side + c * side // other for r in range(other) for c in range(other)]
    return mask[places]


def union(maps: Tensor, tokens: list[list[int]], rules: list[str | float]) -> Tensor:
    """The mask [positions] of a map [positions, tokens]: an item's map is the mean of its tokens' columns."""
    mask = torch.zeros(len(maps), dtype=torch.bool)
    for places, rule in zip(tokens, rules, strict=True):
        values = sum((maps[:, p] for p in places[1:]), maps[:, places[0]]) / len(places)
        mask |= values >= cut(values.tolist(), rule)
    return mask


def cut(values: list[float], rule: str | float) -> float:
    mean = sum(values) / len(values)
    if isinstance(rule, float):
        return rule
    if rule == "mean+1":
        return mean + math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    if rule == "max*0.5":
        return max(values) / 2
    assert rule == "otsu"
    best, threshold = -1.0, 0.0
    for candidate in sorted(set(values))[1:]:
        high, low = [v for v in values if v >= candidate], [v for v in values if v < candidate]
        between = len(high) * len(low) * (sum(high) / len(high) - sum(low) / len(low)) ** 2
        if between > best:
            best, threshold = between, candidate
    return threshold
