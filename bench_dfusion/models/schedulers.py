"""A checkpoint's scheduler, read as its class means it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from bench_dfusion.errors import UsageError

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler


def ddim_like(scheduler: Any) -> DDIMScheduler:
    """DDIM with the betas, prediction type and timesteps that a checkpoint's scheduler has, whatever its class.

    Settings are those the class itself obeys, its defaults included: some configurations carry keys of other classes,
    and defaults differ between classes. Raises UsageError for a scheduler that is not one over discrete betas.
    """
    from diffusers import DDIMScheduler
    from diffusers.schedulers import KarrasDiffusionSchedulers

    name, config = type(scheduler).__name__, scheduler.config
    discrete = {s.name for s in KarrasDiffusionSchedulers} | {"DDIMScheduler"}
    if name not in discrete or "sigma_data" in config:
        raise UsageError(
            f"the checkpoint's scheduler is a {name}: only those over discrete betas (DDIM's kin) are read"
        )
    for option, value in (("timestep_type", "continuous"), ("use_flow_sigmas", True)):
        if config.get(option) == value:
            raise UsageError(
                f"the checkpoint's {name} has {option}={value}: only discrete timesteps over betas are read"
            )
    own = inspect.signature(type(scheduler).__init__).parameters
    wanted = inspect.signature(DDIMScheduler.__init__).parameters
    values = {key: config[key] for key in wanted if key in own and key in config}
    values.setdefault("clip_sample", False)  # DDIM's own default is to clip
    try:
        return DDIMScheduler(**values)
    except NotImplementedError:
        raise UsageError(
            f"the checkpoint's {name} has beta_schedule={config.beta_schedule}, which DDIM has not"
        ) from None
    except (TypeError, ValueError, RuntimeError) as error:  # a setting that is null, or of another kind
        raise UsageError(f"the checkpoint's {name} has settings that make no schedule: {error}") from None


def flow_matching(scheduler: Any) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a flow-matching checkpoint as it is. Raises UsageError for one whose sigmas are not from 1 to 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    name = type(scheduler).__name__
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise UsageError(
            f"the checkpoint's scheduler is a {name}: of flow matching only FlowMatchEulerDiscreteScheduler is read"
        )
    if scheduler.config.invert_sigmas:
        raise UsageError(f"the checkpoint's {name} has invert_sigmas=True, which runs from pictures to noise")
    return scheduler
