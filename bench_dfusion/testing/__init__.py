"""What a plugin owes, as checks that its author runs: `check_algorithm`, `check_reward`, `check_builder`, `check_adapter`.

Each takes a class, makes it as a run would, and raises ContractError, an AssertionError that names every check that
fails, what was found and what the contract says. They need no test framework, no network and seconds on a CPU:

    def test_my_algorithm_keeps_its_contract():
        check_algorithm(MyAlgorithm, {"clip": 0.5})

What they are made of serves tests of one's own: `fake_policy`, a policy of a few parameters, `draw` and `with_targets`, its
samples, `loss_and_gradient`, `slope` and `bandit`.
"""

from bench_dfusion.testing.adapters import check_adapter
from bench_dfusion.testing.algorithms import check_algorithm
from bench_dfusion.testing.builders import check_builder
from bench_dfusion.testing.contracts import ContractError
from bench_dfusion.testing.fakes import RED, FakeAdapter, Red, ddim, draw, fake_policy, shake, with_targets
from bench_dfusion.testing.rewards import check_reward
from bench_dfusion.testing.rounds import PROMPTS, bandit, generator, gradient, loss_and_gradient, round_of, slope

__all__ = [
    "PROMPTS",
    "RED",
    "ContractError",
    "FakeAdapter",
    "Red",
    "bandit",
    "check_adapter",
    "check_algorithm",
    "check_builder",
    "check_reward",
    "ddim",
    "draw",
    "fake_policy",
    "generator",
    "gradient",
    "loss_and_gradient",
    "round_of",
    "shake",
    "slope",
    "with_targets",
]
