"""The README's example of a third-party algorithm."""

import torch

from bench_dfusion.algorithm import (
    Algorithm,
    AlgorithmConfig,
    Loss,
    all_log_probs,
    every_step,
    step_log_prob,
    window_steps,
)


class Noop(Algorithm):
    name = "noop"
    summary = "raises the log-probability of the winners' steps"
    paper = "none"
    Config = AlgorithmConfig
    needs_pairs = True

    def prepare(self, policy, samples, generator):
        steps = window_steps(policy, (0.0, 0.5))
        rows = every_step(samples.pairs[:, 0].unique(), steps, torch.ones(len(steps)))
        with policy.reference():
            rows["reference"] = all_log_probs(policy, samples, rows["row"], rows["step"])
        return rows

    def loss(self, policy, samples, rows):
        gain = step_log_prob(policy, samples, rows["row"], rows["step"]) - rows["reference"].to(policy.device)
        return Loss(-gain.mean(), {"gain": gain.detach().mean()})
