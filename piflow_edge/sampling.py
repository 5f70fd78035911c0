"""From noise to data: the loop over student calls."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np

from .arrays import Array
from .errors import Cancelled, ScheduleError
from .integrator import Integrate, integrate
from .policies import GMPolicy, Policy
from .schedule import Schedule, Segment, count_substeps, segment_sigmas, unwarp

# Substeps between two looks at whether to go on. Cutting a rollout costs some 20 microseconds a piece.
_WATCHED_SUBSTEPS = 16


@dataclass(frozen=True)
class Known:
    """What inpainting keeps of an image.

    `x_0`: the image, (B, C, H, W) in latent units. `drawn`: of its dtype, broadcasts to it; 1 where the student draws,
    0 where `x_0` is kept. `noise`: Gaussian noise like `x_0`, of the kept part at noise levels above 0.
    """

    x_0: Array
    drawn: Array
    noise: Array

    def put_into(self, x_t: Array, sigma_t: float) -> Array:
        """`x_t` with the kept part as it is at noise level `sigma_t`; at 0, exactly `x_0`."""
        kept = self.x_0 if sigma_t == 0 else (1 - sigma_t) * self.x_0 + sigma_t * self.noise
        return self.drawn * x_t + (1 - self.drawn) * kept  # 0 and 1 multiply without rounding


@dataclass(frozen=True)
class Progress:
    """How far the sampler is, for a callback.

    `call`: student calls made for these images so far, of `nfe`; `substep`, of `substeps`: Euler steps done in the
    segment of the last one. `sigma_t`: the noise level. `first`: number of the first of these images within the whole
    call, which may be made in pieces. `state`, `policy`, `known`, `integrate`: what `x_t` and `x_0` are made of.
    """

    call: int
    nfe: int
    substep: int
    substeps: int
    sigma_t: float
    state: Array
    policy: Policy
    known: Known | None = None
    first: int = 0
    integrate: Integrate = integrate

    @cached_property
    def x_t(self) -> Array:
        """The state, (B, C, H, W), in the host's memory."""
        return _on_host(self.state)

    @cached_property
    def x_0(self) -> Array:
        """What the policy now takes the clean latents for, (B, C, H, W): worked out when asked for, no network call."""
        # The Euler step down to 0 ends in x_t - sigma_t u_t, which is the estimate; so every kernel can give it.
        levels = np.array([self.sigma_t, 0.0])
        x_0 = self.integrate(self.policy, self.state, levels) if self.sigma_t > 0 else self.state
        return _on_host(x_0 if self.known is None else self.known.put_into(x_0, 0.0))


def sample(
    network: Callable[[Array, float], Policy],
    noise: Array,
    schedule: Schedule,
    *,
    temperature: float = 1.0,
    renoise: Callable[[int], Array] | None = None,
    solver: str = "euler",
    integrate: Integrate = integrate,
    clock: Callable[[str, float], None] = lambda stage, seconds: None,
    callback: Callable[[Progress], None] | None = None,
    callback_every: int | None = None,
    cancelled: Callable[[], bool] | None = None,
    strength: float = 1.0,
    known: Known | None = None,
    resamples: int = 0,
) -> Array:
    """Carry noise to data with `schedule.nfe` network calls, or from `strength` with those that are left.

    With `known`, the kept part is set to its own value at every level where the network is called, so that the
    network sees it. In between that is not needed: within a segment a policy takes every position on its own, so what
    is kept in one has no influence on another.

    Args:
        network: `(x_src, sigma_src) -> policy`, one student call.
        noise: the state at noise level `strength`, (B, C, H, W).
        schedule: where the network is called and how the policies are integrated.
        temperature: sharpens GM policies at every call but the last; 1 leaves them.
        renoise: `(draw) -> noise` like `noise`, for schedules with h above 0; draw is 1 for the first. Those of
            `resamples` follow after one for each segment.
        solver: see `rollout`.
        integrate: what carries a state along noise levels; `kernels/rollout.py` has one that chooses a compiled kernel.
        clock: told ("network" or "policy", seconds) after each stage; what `renoise` takes is in neither.
        callback: told how far it is after each segment; what it raises ends the loop and reaches the caller.
        callback_every: substeps after which `callback` is told, besides. The state is the same but for rounding.
        cancelled: asked before every call and every 16 substeps, and where `callback` is told, whether to stop.
        strength: noise level to start at, in (0, 1].
        known: the part of an image to keep; the rest is drawn.
        resamples: with `known`, how often a segment that starts below 1 is gone through to the end, and noise added
            again up to its start, before it counts: so that what is drawn comes to fit what is kept, for as many more
            calls (RePaint, arXiv:2201.09865).

    Returns:
        The state at noise level 0, like `noise`.

    Raises:
        Cancelled: `cancelled` said so.
        ScheduleError: a setting out of range.

    Source: Chen et al., pi-Flow, arXiv:2510.14974; `PiFlowImitationBase.forward_test` in Lakonik/piFlow.
    """
    if callback_every is not None and solver != "euler":
        raise ScheduleError(f"solver {solver!r} takes a segment in one piece; leave callback_every out")
    segments = schedule.segments_below(strength)
    repeats = 0 if known is None else resamples
    nfe = len(segments) + repeats * sum(segment.sigma_src < 1 for segment in segments)
    calls = 0
    watched = _WATCHED_SUBSTEPS if cancelled is not None and solver == "euler" else None

    def watch(sigma_t: float) -> None:
        if cancelled is not None and cancelled():
            raise Cancelled(
                f"stopped at noise level {sigma_t:.3g} after {calls} network calls, as was asked for"
            )

    def call(x_t: Array, sigma_src: float, sharpen: bool) -> Policy:
        nonlocal calls
        watch(sigma_src)
        began = time.perf_counter()
        policy = network(x_t, sigma_src)
        clock("network", time.perf_counter() - began)
        calls += 1
        return policy.tempered(temperature) if sharpen and isinstance(policy, GMPolicy) else policy

    def resampled(x_t: Array, sigma_src: float, draw: int) -> Array:
        policy, fresh = call(x_t, sigma_src, sharpen=True), renoise(draw)
        began = time.perf_counter()
        x_0, levels = x_t, _levels_to_0(sigma_src, schedule)
        for start, stop in _pieces(len(levels) - 1, watched):
            x_0 = integrate(policy, x_0, levels[start : stop + 1], solver=solver)
            watch(float(levels[stop]))
        x_t = (1 - sigma_src) * known.put_into(x_0, 0.0) + sigma_src * fresh
        clock("policy", time.perf_counter() - began)
        return x_t

    x_t = noise if known is None else known.put_into(noise, strength)
    for i, segment in enumerate(segments):
        for j in range(repeats if segment.sigma_src < 1 else 0):
            x_t = resampled(x_t, segment.sigma_src, len(segments) + i * repeats + j + 1)
        policy = call(x_t, segment.sigma_src, sharpen=i < len(segments) - 1)
        levels = _levels(segment, schedule.shift)
        for start, stop in _pieces(segment.substeps, callback_every, watched):
            began = time.perf_counter()
            sigma_t = float(levels[stop])
            whole = stop - start == segment.substeps
            x_t = integrate(policy, x_t, levels if whole else levels[start : stop + 1], solver=solver)
            last = stop == segment.substeps
            if known is not None and (last or callback is not None):
                x_t = known.put_into(x_t, sigma_t)
            clock("policy", time.perf_counter() - began)
            if callback is not None and (last or (callback_every and stop % callback_every == 0)):
                done = Progress(
                    calls, nfe, stop, segment.substeps, sigma_t, x_t, policy, known, integrate=integrate
                )
                callback(done)
            watch(sigma_t)
        if segment.renoises:
            fresh, began = renoise(i + 1), time.perf_counter()
            x_t = segment.renoise(x_t, fresh)
            clock("policy", time.perf_counter() - began)
    return x_t


def _on_host(array: Array) -> Array:
    return array.to_host() if hasattr(array, "to_host") else array


def _pieces(substeps: int, *every: int | None) -> Iterator[tuple[int, int]]:
    """(first substep, where to stop) of the pieces of a segment, cut after every so many substeps."""
    stops = {stop for size in every if size is not None for stop in range(size, substeps, size)}
    return pairwise([0, *sorted(stops), substeps])


@lru_cache(maxsize=64)
def _levels(segment: Segment, shift: float) -> np.ndarray:
    return segment_sigmas(segment.sigma_src, segment.sigma_dst, segment.substeps, shift)


def _levels_to_0(sigma_src: float, schedule: Schedule) -> np.ndarray:
    substeps = count_substeps(unwarp(sigma_src, schedule.shift), 0.0, schedule.total_substeps)
    return segment_sigmas(sigma_src, 0.0, substeps, schedule.shift)
