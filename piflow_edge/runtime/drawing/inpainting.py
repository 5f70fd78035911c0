"""Inpainting: a part of an image is kept, the rest is drawn to fit it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from piflow_edge.arrays import Array
from piflow_edge.integrator import Integrate
from piflow_edge.policies import Policy
from piflow_edge.sampling_settings import SamplingSettings
from piflow_edge.schedule import Schedule, count_substeps, segment_sigmas, unwarp


@dataclass(frozen=True)
class KeptImage:
    """What inpainting keeps of an image.

    `x_0`: the image, (B, C, H, W) in latent units. `drawn`: of its dtype, broadcasts to it; 1 where the student draws,
    0 where `x_0` is kept. `share`: like it, how much of what is drawn the result shows, from 0 to 1; the rest is `x_0`.
    `noise`: Gaussian noise like `x_0`, of the kept part at noise levels above 0.
    """

    x_0: Array
    drawn: Array
    share: Array
    noise: Array

    def put_into(self, x_t: Array, sigma_t: float) -> Array:
        """`x_t` with the kept part as it is at noise level `sigma_t`; at 0, exactly `x_0`.

        All of a soft part counts as drawn: two noises mixed are weaker than one, which the student takes for image.
        """
        kept = self.x_0 if sigma_t == 0 else (1 - sigma_t) * self.x_0 + sigma_t * self.noise
        return self.drawn * x_t + (1 - self.drawn) * kept  # 0 and 1 multiply without rounding

    def finish(self, x_0: Array) -> Array:
        """The result: what is drawn and what is kept, mixed where the mask is soft."""
        return self.share * x_0 + (1 - self.share) * self.x_0

    def wrap_integrate(self, integrate: Integrate) -> Integrate:
        """Return the integration; the kept part is put back at its end, where the network sees it next.

        In between that is not needed: within a segment a policy takes every position on its own, so what is kept in
        one has no influence on another.
        """

        def integrate_and_keep(policy: Policy, x_t: Array, sigmas: np.ndarray, **how: Any) -> Array:
            x_t, sigma_t = integrate(policy, x_t, sigmas, **how), float(sigmas[-1])
            return self.finish(x_t) if sigma_t == 0 else self.put_into(x_t, sigma_t)

        return integrate_and_keep


def count_calls(schedule: Schedule, settings: SamplingSettings) -> int:
    """Return the network calls of a loop, those of `resamples` included."""
    segments = schedule.segments_below(settings.strength)
    return len(segments) + (settings.resamples or 0) * sum(segment.sigma_src < 1 for segment in segments)


def resample_before_calls(
    kept_image: KeptImage,
    network: Callable[[Array, float], Policy],
    integrate: Integrate,
    renoise: Callable[[int], Array],
    schedule: Schedule,
    settings: SamplingSettings,
) -> Callable[[Array, int], Array]:
    """Return a hook `enter` of the sampling loop: a segment that starts below noise level 1 is gone through to the
    end, and noise added again up to its start, `settings.resamples` times before it counts.

    The draws of that noise follow after one for each segment. Source: RePaint, arXiv:2201.09865.
    """
    segments, repeats = schedule.segments_below(settings.strength), settings.resamples or 0

    def enter(x_t: Array, index: int) -> Array:
        sigma_src = segments[index].sigma_src
        if sigma_src == 1:
            return x_t
        for repeat in range(repeats):
            policy = network(x_t, sigma_src).temper(settings.temperature)
            fresh = renoise(len(segments) + index * repeats + repeat + 1)
            x_0 = integrate(policy, x_t, _levels_to_0(sigma_src, schedule), solver=settings.solver)
            x_t = (1 - sigma_src) * kept_image.put_into(x_0, 0.0) + sigma_src * fresh
        return x_t

    return enter


def _levels_to_0(sigma_src: float, schedule: Schedule) -> np.ndarray:
    raw_t = unwarp(sigma_src, schedule.shift)
    substeps = count_substeps(raw_t, 0.0, schedule.total_substeps, schedule.substep_rule)
    return segment_sigmas(sigma_src, 0.0, substeps, schedule.shift)
