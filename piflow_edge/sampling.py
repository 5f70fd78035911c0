"""From noise to data: the loop over student calls."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np

from .arrays import Array, SameArray
from .errors import ScheduleError
from .integrator import Integrate, integrate
from .policies import Policy
from .schedule import Schedule, Segment, segment_sigmas


@dataclass(frozen=True)
class SamplingSettings:
    """How images are sampled. None is what the bundle was exported with.

    Args:
        nfe: student calls per image. What is fixed in the student's policy stays.
        substeps: Euler steps over all of raw time.
        solver: "euler", as the student was trained, or "multistep"; see `rollout`.
        temperature: sharpens GM policies at every call but the last, 0 or more, where 1 leaves them as trained; "auto"
            is the published rule min(0.1 (nfe - 1), 1).
        h: strength of noise added between calls, 0 or more, or "inf"; see `Schedule`.
        strength: noise level to start from a given image at, above 0 and up to 1, where nothing is left of it. The
            calls above it are left out. None is 1 with a mask; without one it must be given with an image.
        resamples: with a mask, calls more for every call but the one at noise level 1, by which what is drawn comes to
            fit what is kept (RePaint, arXiv:2201.09865). None is 4, which few calls per image need.
        height, width: of an image in pixels.
    """

    nfe: int | None = None
    substeps: int | None = None
    solver: str = "euler"
    temperature: float | str | None = None
    h: float | str | None = None
    strength: float | None = None
    resamples: int | None = None
    height: int | None = None
    width: int | None = None

    def fill(self, **defaults: Any) -> "SamplingSettings":
        """Return these settings with `defaults` for those that are None."""
        missing = {}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                missing[name] = value
        return replace(self, **missing) if missing else self


SETTING_NAMES = tuple(field.name for field in fields(SamplingSettings))


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
    settings: SamplingSettings = SamplingSettings(),
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
