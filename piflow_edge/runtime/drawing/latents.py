"""From noise to latents: the sampling loop, with all that surrounds it in a generator's call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from piflow_edge.arrays import Array, SameArray
from piflow_edge.bundle.manifest import Manifest
from piflow_edge.conditioning import Conditioning, take
from piflow_edge.engines import OpenNetwork
from piflow_edge.errors import ScheduleError
from piflow_edge.integrator import Integrate
from piflow_edge.kernels import gpu_arrays
from piflow_edge.kernels.rollout import integrate
from piflow_edge.policies import Policy
from piflow_edge.runtime.request import Request
from piflow_edge.sampling import Hooks, sample
from piflow_edge.sampling_settings import SamplingSettings
from piflow_edge.schedule import Schedule

from .inpainting import KeptImage, count_calls, resample_before_calls
from .observer import NOBODY, Observer, Watch
from .stopwatch import Stopwatch


class Student:
    """The student network, opened. States and outputs lie where the engine works."""

    def __init__(self, manifest: Manifest, engine: OpenNetwork):
        self._manifest, self._engine = manifest, engine

    def inputs(self, x_t: Array, sigma_t: float, conditioning: Conditioning) -> dict[str, SameArray]:
        """Return what the network is fed at states `x_t` (B, C, H, W)."""
        return self._manifest.network_inputs(x_t, sigma_t, conditioning)

    def outputs(self, x_t: Array, sigma_t: float, conditioning: Conditioning) -> dict[str, SameArray]:
        """Call the network: its raw outputs at states `x_t`."""
        return self._engine.run(self.inputs(x_t, sigma_t, conditioning))

    def as_policy(self, outputs: Mapping[str, SameArray], x_src: Array, sigma_src: float) -> Policy:
        """Return the policy that outputs at `x_src` stand for."""
        return self._manifest.policy.policy(outputs, x_src, sigma_src)

    def policy(self, x_t: Array, sigma_t: float, conditioning: Conditioning) -> Policy:
        """Call the network, and return its policy."""
        return self.as_policy(self.outputs(x_t, sigma_t, conditioning), x_t, sigma_t)


@dataclass(frozen=True)
class Workplace:
    """Where images are drawn. `place`: GPU memory, None for the host's. `num_threads`: of the CPU; None is all."""

    place: Any = None
    num_threads: int | None = None


def draw_latents(
    student: Student, request: Request, piece: slice, where: Workplace, observer: Observer, clock: Stopwatch
) -> Array:
    """Return the latents (B, C, H, W) of some of a request's images, where the engine works."""

    def place(array: np.ndarray) -> Array:
        if where.place is None:
            return array
        return clock.run("transfer", gpu_arrays.asarray, array, device=where.place)

    def renoise(draw: int) -> Array:
        return place(clock.run("noise", request.draw_noise, piece, draw, where.num_threads))

    noise = clock.run("noise", request.draw_noise, piece, 0, where.num_threads)
    x_src, known = request.start_from(noise, piece)
    return draw(
        partial(student.policy, conditioning=take(request.conditioning, piece)),
        place(x_src),
        request.schedule,
        request.settings,
        renoise=renoise,
        kept_image=KeptImage(*map(place, known)) if known else None,
        observer=observer,
        first=piece.start,
        clock=clock,
        integrate=partial(integrate, num_threads=where.num_threads),
    )


def draw(
    network: Callable[[Array, float], Policy],
    x_src: Array,
    schedule: Schedule,
    settings: SamplingSettings,
    *,
    renoise: Callable[[int], Array] | None = None,
    kept_image: KeptImage | None = None,
    observer: Observer = NOBODY,
    first: int = 0,
    clock: Stopwatch | None = None,
    integrate: Integrate = integrate,
) -> Array:
    """Sample with what surrounds the loop: a part that is kept, somebody who looks on, and a clock.

    Args:
        network, schedule, settings: as of `sample`, but `settings` has no None for what the loop needs.
        x_src: the state at noise level `settings.strength`.
        renoise: as in `Hooks`; also draws the noise of `settings.resamples`.
        kept_image: the part of an image to keep; the rest is drawn.
        observer: who looks on. Where rollouts are cut for that, latents differ by rounding.
        first: number of the first image, for reports.
        clock: adds up the stages "network" and "policy".
        integrate: as in `Hooks`.
    """
    if observer.every is not None and settings.solver != "euler":
        raise ScheduleError(
            f"solver {settings.solver!r} takes a segment in one piece; leave callback_every out"
        )
    settings, preview = settings.fill(strength=1.0, temperature=1.0, resamples=0), integrate
    if clock is not None:
        network, integrate = clock.wrap("network", network), clock.wrap("policy", integrate)
    integrate_kept = integrate if kept_image is None else kept_image.wrap_integrate(integrate)
    if observer.is_watching:
        nfe = (
            len(schedule.segments_below(settings.strength))
            if kept_image is None
            else count_calls(schedule, settings)
        )
        watch = Watch(observer, nfe, preview, kept_image, first)
        network = watch.wrap_network(network)
        integrate, integrate_kept = (
            watch.wrap_integrate(integrate, report=False),
            watch.wrap_integrate(integrate_kept, report=True),
        )
    hooks: dict[str, Any] = {} if renoise is None else {"renoise": renoise}
    if kept_image is not None:
        x_src = kept_image.put_into(x_src, settings.strength or 1.0)
        draw_fresh = renoise or Hooks.renoise
        hooks["enter"] = resample_before_calls(kept_image, network, integrate, draw_fresh, schedule, settings)
    return sample(network, x_src, schedule, settings, Hooks(integrate=integrate_kept, **hooks))
