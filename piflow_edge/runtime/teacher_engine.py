"""A teacher's network in an engine, followed by guided Euler steps without PyTorch: the students' measure."""

import math
import time
from itertools import pairwise

import numpy as np

from piflow_edge.engines import Engine
from piflow_edge.errors import EngineError, ScheduleError
from piflow_edge.schedule import warp


class EngineTeacher:
    """A guided teacher whose network is an ONNX graph: `x_t`, `t` (the noise level), `class_labels` -> `u_t`.

    Args:
        engine: the opened graph.
        guidance_scale: of classifier-free guidance; 1 is none, and asks the network on one sample per image and step.
            More asks it on two, in one call.
        null_label: the label that stands for no class; None where the network has none.

    Raises:
        ScheduleError: a scale below 1, or guidance without a `null_label`.
    """

    def __init__(self, engine: Engine, guidance_scale: float, null_label: int | None):
        if not 1 <= guidance_scale < math.inf:
            raise ScheduleError(f"guidance scale is 1 (none) or more, and finite; got {guidance_scale!r}")
        if guidance_scale > 1 and null_label is None:
            raise ScheduleError(
                "guidance needs the label that stands for 'no class'; give it, or guidance scale 1"
            )
        self.engine, self.guidance_scale, self.null_label = engine, guidance_scale, null_label
        self.network_seconds = 0.0  # spent in the engine so far

    def velocity(self, x_t: np.ndarray, sigma_t: float, labels: np.ndarray) -> np.ndarray:
        """u_t at states `x_t` (B, C, H, W), float32, for class ids `labels` (B,)."""
        labels = np.asarray(labels, np.int64)
        if self.guidance_scale == 1:
            return self._call(x_t, sigma_t, labels)
        both = np.concatenate([np.full_like(labels, self.null_label), labels])
        u_uncond, u_cond = np.split(self._call(np.concatenate([x_t, x_t]), sigma_t, both), 2)
        return u_cond + (self.guidance_scale - 1) * (u_cond - u_uncond)

    def sample(self, noise: np.ndarray, labels: np.ndarray, steps: int, *, shift: float = 1.0) -> np.ndarray:
        """States at noise level 0 by `steps` Euler steps from `noise` (B, C, H, W), even in raw time."""
        x_t = noise
        for sigma_t, sigma_next in pairwise(warp(np.linspace(1.0, 0.0, steps + 1), shift).tolist()):
            x_t = x_t + self.velocity(x_t, sigma_t, labels) * (sigma_next - sigma_t)
        return x_t

    def _call(self, x_t: np.ndarray, sigma_t: float, labels: np.ndarray) -> np.ndarray:
        t = np.full(len(x_t), sigma_t, np.float32)
        began = time.perf_counter()
        outputs = self.engine.run({"x_t": x_t, "t": t, "class_labels": labels})
        self.network_seconds += time.perf_counter() - began
        if "u_t" not in outputs:
            raise EngineError(
                f"a teacher's graph gives u_t, this one {', '.join(outputs)}; make it with "
                "piflow-edge export TEACHER --teacher-graph"
            )
        return outputs["u_t"]
