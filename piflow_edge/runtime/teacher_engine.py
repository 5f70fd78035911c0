"""A teacher's network in an engine, followed by guided Euler steps without PyTorch: the students' measure."""

import math
import time
from itertools import pairwise

import numpy as np

from piflow_edge.conditioning import Conditioner, Conditioning, concatenate
from piflow_edge.engines import Engine
from piflow_edge.errors import EngineError, ScheduleError
from piflow_edge.schedule import warp


class EngineTeacher:
    """A teacher whose network is an ONNX graph: `x_t`, `t` (the noise level) and conditioning -> `u_t`.

    Args:
        engine: the opened graph.
        conditioner: what steers the network, under the names of the graph's inputs.
        sample_shape: (C, H, W) of its states; None where whoever samples brings noise that fits.
    """

    def __init__(self, engine: Engine, conditioner: Conditioner, sample_shape: tuple[int, ...] | None = None):
        self.engine, self.conditioner, self.sample_shape = engine, conditioner, sample_shape
        self.network_seconds = 0.0  # spent in the engine so far

    def check_guidance(self, scale: float) -> None:
        """Raise ScheduleError for a guidance scale below 1, or above it where there is no "no condition"."""
        if not 1 <= scale < math.inf:
            raise ScheduleError(f"guidance scale is 1 (none) or more, and finite; got {scale!r}")
        if scale > 1 and self.conditioner.null(1) is None:
            raise ScheduleError("guidance needs what stands for 'no condition'; give it, or guidance scale 1")

    def velocity(
        self, x_t: np.ndarray, sigma_t: float, conditioning: Conditioning, *, guidance_scale: float = 1.0
    ) -> np.ndarray:
        """Return u_t at states `x_t` (B, C, H, W), float32.

        `guidance_scale`: of classifier-free guidance; 1 is none, and asks the network on one sample per image. More
        asks it on two, in one call where "no condition" is as long as the condition.
        """
        self.check_guidance(guidance_scale)
        if guidance_scale == 1:
            return self._call(x_t, sigma_t, conditioning)
        null = self.conditioner.null(len(x_t)) or {}
        if all(null[name].shape == array.shape for name, array in conditioning.items()):
            both = self._call(np.concatenate([x_t, x_t]), sigma_t, concatenate([null, conditioning]))
            u_uncond, u_cond = np.split(both, 2)
        else:
            u_uncond, u_cond = (self._call(x_t, sigma_t, given) for given in (null, conditioning))
        return u_cond + (guidance_scale - 1) * (u_cond - u_uncond)

    def sample(
        self,
        noise: np.ndarray,
        conditioning: Conditioning,
        steps: int,
        *,
        guidance_scale: float = 1.0,
        shift: float = 1.0,
    ) -> np.ndarray:
        """Return states at noise level 0 by `steps` Euler steps from `noise` (B, C, H, W), even in raw time."""
        x_t = noise
        for sigma_t, sigma_next in pairwise(warp(np.linspace(1.0, 0.0, steps + 1), shift).tolist()):
            u_t = self.velocity(x_t, sigma_t, conditioning, guidance_scale=guidance_scale)
            x_t = x_t + u_t * (sigma_next - sigma_t)
        return x_t

    def _call(self, x_t: np.ndarray, sigma_t: float, conditioning: Conditioning) -> np.ndarray:
        t = np.full(len(x_t), sigma_t, np.float32)
        began = time.perf_counter()
        outputs = self.engine.run({"x_t": x_t, "t": t, **conditioning})
        self.network_seconds += time.perf_counter() - began
        if "u_t" not in outputs:
            raise EngineError(
                f"a teacher's graph gives u_t, this one {', '.join(outputs)}; make it with "
                "piflow-edge export TEACHER --teacher-graph"
            )
        return outputs["u_t"]
