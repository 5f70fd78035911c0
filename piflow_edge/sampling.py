"""From noise to data: the loop over student calls."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .arrays import Array, SameArray
from .errors import ScheduleError
from .integrator import Integrate, integrate
from .policies import Policy
from .sampling_settings import SamplingSettings
from .schedule import Schedule, Segment, segment_sigmas

AS_TRAINED = SamplingSettings()


def _keep(x_t: Array, index: int) -> Array:
    return x_t


def _refuse_noise(draw: int) -> Array:
    raise ScheduleError("a schedule with h above 0 adds noise between calls; give a hook that draws it")


@dataclass(frozen=True)
class Hooks:
    """What the loop calls, so that inpainting, progress, clocks and cancelling can be wrapped around its steps.

    `enter`: `(x_t, index) -> x_t`, before the network call of a segment. `integrate`: `(policy, x_t, sigmas, solver=)
    -> x_t`, along noise levels (S + 1,). `renoise`: `(draw) -> noise` like `x_t`, where the schedule adds some; `draw`
    is 1 for the first.
    """

    enter: Callable[[Array, int], Array] = _keep
    integrate: Integrate = integrate
    renoise: Callable[[int], Array] = _refuse_noise


def sample(
    network: Callable[[Array, float], Policy],
    noise: Array,
    schedule: Schedule,
    settings: SamplingSettings = AS_TRAINED,
    hooks: Hooks = Hooks(),
) -> SameArray:
    """Carry noise to data: a network call at the start of every segment, whose policy is integrated to its end.

    Args:
        network: `(x_src, sigma_src) -> policy`, one student call.
        noise: the state at noise level `settings.strength`, (B, C, H, W).
        schedule: where the network is called, and the substeps.
        settings: `solver`, `temperature` and `strength` are used here; None is 1.
        hooks: what surrounds the loop.

    Returns:
        The state at noise level 0, like `noise`.

    Raises:
        ScheduleError: a setting out of range.

    Source: Chen et al., pi-Flow, arXiv:2510.14974; `PiFlowImitationBase.forward_test` in Lakonik/piFlow.
    """
    settings = settings.fill(temperature=1.0)
    segments = schedule.segments_below(settings.strength)
    x_t = noise
    for i, segment in enumerate(segments):
        x_t = hooks.enter(x_t, i)
        policy = network(x_t, segment.sigma_src)
        if i < len(segments) - 1:
            policy = policy.temper(settings.temperature)
        x_t = hooks.integrate(policy, x_t, substep_levels(segment, schedule.shift), solver=settings.solver)
        if segment.renoises:
            x_t = segment.renoise(x_t, hooks.renoise(i + 1))
    return x_t


@lru_cache(maxsize=64)
def substep_levels(segment: Segment, shift: float) -> np.ndarray:
    """Return the noise levels of a segment's substeps, float64 (S + 1,)."""
    return segment_sigmas(segment.sigma_src, segment.sigma_dst, segment.substeps, shift)
