"""Time: raw time and noise level, where the network is called, and re-noising between calls.

Everything here is host arithmetic in float64 on a handful of numbers; states never pass through.
"""

import math
import numbers
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from .arrays import Array, SameArray
from .errors import ScheduleError

# Floor under the divisions of the re-noising rule; the value of the authors' FlowMapSDEScheduler.
_RENOISE_EPS = 1e-6
# Substeps; far above what float64 loses in up to some thousands of them, far below what a segment differs by.
_WHOLE = 1e-6


def warp(raw_t, shift: float):
    """Noise level at a raw time: `sigma = s tau / (1 + (s - 1) tau)`.

    Args:
        raw_t: raw time in [0, 1], a float or an array of any shape.
        shift: s, above 0. 1 leaves time as it is; above 1 spends more substeps at high noise.

    Returns:
        `sigma_t` in [0, 1], of the type and shape of `raw_t`.

    Raises:
        ScheduleError: `shift` is not above 0.
    """
    _check_shift(shift)
    return shift * raw_t / (1 + (shift - 1) * raw_t)


def unwarp(sigma_t, shift: float):
    """Raw time at a noise level, the inverse of `warp`: `tau = sigma / (s + (1 - s) sigma)`.

    Args:
        sigma_t: noise level in [0, 1], a float or an array of any shape.
        shift: s of `warp`, above 0.

    Returns:
        Raw time in [0, 1], of the type and shape of `sigma_t`.

    Raises:
        ScheduleError: `shift` is not above 0.
    """
    _check_shift(shift)
    return sigma_t / (shift + (1 - shift) * sigma_t)


def published_temperature(nfe: int) -> float:
    """Temperature of GM policies for `nfe` calls, min(0.1 (nfe - 1), 1): "auto" of the pipelines in Lakonik/piFlow."""
    return min(0.1 * (nfe - 1), 1.0)


def is_temperature(value) -> bool:
    """Whether it is a finite number, 0 or more, or "auto"."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return 0 <= float(value) < math.inf  # NaN is not
    return isinstance(value, str) and value == "auto"


def check_temperature(value) -> None:
    """ScheduleError unless `is_temperature`."""
    if not is_temperature(value):
        raise ScheduleError(f"temperature is 0 or more, and finite, or 'auto'; got {value!r}")


def resolution_shift(
    seq_len: int,
    *,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
    base_logshift: float = 0.5,
    max_logshift: float = 1.15,
) -> float:
    """Shift for a latent of `seq_len` positions, log-linear in it and not clamped outside the range.

    The defaults are those of FLUX. `seq_len` is H * W of the latent for class-conditional models, the number
    of packed tokens for FLUX and Qwen-Image pipelines.
    """
    slope = (max_logshift - base_logshift) / (max_seq_len - base_seq_len)
    return math.exp((seq_len - base_seq_len) * slope + base_logshift)


@dataclass(frozen=True)
class ShiftBySize:
    """A shift that follows the size of the states; `mu` of a pipeline's scheduler is its logarithm.

    Args:
        base_seq_len, max_seq_len, base_logshift, max_logshift: see `resolution_shift`.
        places: positions of a state in one token, by which its H * W is divided: 4 of FLUX and Qwen-Image, else 1.
    """

    base_seq_len: int = 256
    max_seq_len: int = 4096
    base_logshift: float = 0.5
    max_logshift: float = 1.15
    places: int = 1

    def shift(self, positions: int) -> float:
        """The shift of states of so many positions, H * W."""
        return resolution_shift(
            positions // self.places,
            base_seq_len=self.base_seq_len,
            max_seq_len=self.max_seq_len,
            base_logshift=self.base_logshift,
            max_logshift=self.max_logshift,
        )


def count_substeps(raw_t_src, raw_t_dst, total_substeps: int, rule: str = "round"):
    """Euler steps between two raw times: `total_substeps` per unit of raw time, at least 1.

    Floats give an int, (B,) arrays an int64 array. `raw_t_dst` may lie below 0 (see `substep_sigmas`). `rule`: see
    `SUBSTEP_RULES`.
    """
    exact = total_substeps * (np.asarray(raw_t_src) - np.asarray(raw_t_dst))
    counts = np.maximum(SUBSTEP_RULES[rule](exact), 1).astype(np.int64)
    return counts if counts.ndim else int(counts)


def _round_up(counts):
    # A whole number stays, whatever warp and unwarp rounded. The authors' float32 sometimes makes 33 of 32 here.
    return np.ceil(counts - _WHOLE)


# How a count that is not whole becomes one. "round", halves to even: the authors' code up to piFlow 0.1.2, in training
# to this day, and ComfyUI-piFlow. "ceil", up: their pipelines since LakonLab 0.2.0.
SUBSTEP_RULES = {"round": np.rint, "ceil": _round_up}


def substep_sigmas(raw_t_src, raw_t_dst, substeps, shift: float) -> np.ndarray:
    """Noise levels of the Euler steps of one rollout, even in raw time.

    Args:
        raw_t_src, raw_t_dst: ends in raw time, floats or (B,). `raw_t_dst` may lie below 0, as the window of
            a training step does: the step length comes from the unclamped ends, the clamp at 0 acts per step.
        substeps: steps of each sample, 1 or more, an int or (B,).
        shift: the schedule's shift.

    Returns:
        float64, (S + 1,) or (S + 1, B) with S the largest count; a sample that is done keeps its level.
    """
    raw_t_src, raw_t_dst = np.asarray(raw_t_src, np.float64), np.asarray(raw_t_dst, np.float64)
    substeps = np.asarray(substeps)
    batch = np.broadcast_shapes(raw_t_src.shape, raw_t_dst.shape, substeps.shape)
    steps = np.arange(int(substeps.max()) + 1).reshape(-1, *(1 for _ in batch))
    # Counted from the start, not summed up: rounding must not carry from step to step.
    fraction = np.minimum(steps, substeps) / substeps
    return warp(np.maximum(raw_t_src + (raw_t_dst - raw_t_src) * fraction, 0.0), shift)


def segment_sigmas(sigma_src, sigma_dst, substeps, shift: float) -> np.ndarray:
    """Noise levels of the Euler steps across one segment; `substep_sigmas` with its ends as noise levels."""
    sigmas = substep_sigmas(unwarp(sigma_src, shift), unwarp(sigma_dst, shift), substeps, shift)
    sigmas[0], sigmas[-1] = sigma_src, sigma_dst  # exactly, whatever warp and unwarp rounded
    return sigmas


@dataclass(frozen=True)
class Segment:
    """What one student call covers. All noise levels are dimensionless, in [0, 1].

    `sigma_src`: level at which the network is called. `sigma_dst`: level the policy is integrated to; the next
    segment's level without re-noising, below it with. `sigma_next`: the next segment's level (0 after the
    last). `substeps`: Euler steps of the rollout. `m`: share of the noise that is kept when re-noising; 1 keeps all.
    """

    sigma_src: float
    sigma_dst: float
    sigma_next: float
    substeps: int
    m: float

    @property
    def renoises(self) -> bool:
        """Whether `renoise` adds noise at the end of this segment."""
        return self.m < 1 and self.sigma_next > 0

    @property
    def renoise_scales(self) -> tuple[float, float]:
        """Factors of the state and of fresh noise in `renoise`."""
        state_scale = 1 - self.sigma_next + self.sigma_next * self.m
        return state_scale, self.sigma_next * math.sqrt(max(1 - self.m**2, 0.0))

    def renoise(self, x_dst: Array, noise: Array) -> SameArray:
        """Carry `x_dst` (B, C, H, W) at `sigma_dst` up to `sigma_next` with fresh Gaussian noise of the same shape.

        Source: FlowMapSDEScheduler in Lakonik/piFlow.
        """
        state_scale, noise_scale = self.renoise_scales
        return state_scale * x_dst + noise_scale * noise


@dataclass(frozen=True)
class Schedule:
    """Where the student is called, and what happens in between.

    Args:
        nfe: student calls per image, 1 or more.
        shift: s of `warp`, above 0.
        final_step_size_scale: length of the last segment in raw time relative to the others, above 0.
        total_substeps: Euler steps over all of raw time, shared out to the segments by length.
        h: strength of re-noising between segments, 0 (none, deterministic) or more, or "inf" (all noise is
            drawn afresh).
        substep_rule: of `SUBSTEP_RULES`, how a segment's share of them becomes a whole number.

    Raises:
        ScheduleError: a setting outside its range.

    Source: Chen et al., pi-Flow, arXiv:2510.14974; FlowMapSDEScheduler in Lakonik/piFlow.
    """

    nfe: int = 4
    shift: float = 1.0
    final_step_size_scale: float = 1.0
    total_substeps: int = 128
    h: float | str = 0.0
    substep_rule: str = "round"

    def __post_init__(self):
        if self.substep_rule not in SUBSTEP_RULES:
            rules = " or ".join(map(repr, SUBSTEP_RULES))
            raise ScheduleError(f"substep_rule is {rules}; got {self.substep_rule!r}")
        for name in ("nfe", "total_substeps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise ScheduleError(f"{name} is a whole number, 1 or more; got {name}={value!r}")
        _check_shift(self.shift)
        scale = self.final_step_size_scale
        if not (isinstance(scale, numbers.Real) and 0 < scale < math.inf):  # NaN fails too
            raise ScheduleError(f"final_step_size_scale is a number above 0; got {scale!r}")
        try:
            h = float(self.h)  # "inf" becomes infinity
        except (TypeError, ValueError):
            h = math.nan
        if not h >= 0:
            raise ScheduleError(f"h is a number, 0 or more, or 'inf'; got h={self.h!r}")

    @cached_property
    def sigmas(self) -> np.ndarray:
        """Noise levels at which the network is called, from 1 down, then 0; float64, (nfe + 1,)."""
        base = 1 / (self.nfe - 1 + self.final_step_size_scale)
        starts = np.maximum(1 - np.arange(self.nfe) * base, 0.0)
        sigmas = np.append(warp(starts, self.shift), 0.0)
        sigmas.flags.writeable = False  # shared by all who ask
        return sigmas

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """One `Segment` per student call, in order."""
        return tuple(self._segment(*pair) for pair in zip(self.sigmas[:-1], self.sigmas[1:], strict=True))

    def segments_below(self, sigma_t: float | None) -> tuple[Segment, ...]:
        """The segments from noise level `sigma_t`, in (0, 1], down to 0: as `segments`, but the first begins there.

        None is 1.

        The levels below it stay, so that the student is called where it was trained to be.
        """
        if sigma_t is None or (type(sigma_t) is float and sigma_t == 1):
            return self.segments
        if not (isinstance(sigma_t, numbers.Real) and 0 < sigma_t <= 1):  # NaN fails too
            raise ScheduleError(f"a noise level to start at lies above 0 and up to 1; got {sigma_t!r}")
        if sigma_t >= self.sigmas[0]:
            return self.segments
        levels = [float(sigma_t), *self.sigmas[self.sigmas < sigma_t].tolist()]
        return tuple(self._segment(*pair) for pair in pairwise(levels))

    def _segment(self, sigma_src: float, sigma_next: float) -> Segment:
        sigma_src, sigma_next, h = float(sigma_src), float(sigma_next), float(self.h)
        alpha_src, alpha_next = 1 - sigma_src, 1 - sigma_next
        if h == 0:
            m, sigma_dst = 1.0, sigma_next
        else:
            ratio = sigma_next * alpha_src / max(sigma_src * alpha_next, _RENOISE_EPS)
            m = 0.0 if math.isinf(h) else ratio ** (h * h)
            sigma_dst = sigma_next * m / max(alpha_next + sigma_next * m, _RENOISE_EPS)
        raw_t_src, raw_t_dst = unwarp(sigma_src, self.shift), unwarp(sigma_dst, self.shift)
        substeps = count_substeps(raw_t_src, raw_t_dst, self.total_substeps, self.substep_rule)
        return Segment(sigma_src, sigma_dst, sigma_next, substeps, m)


def _check_shift(shift) -> None:
    if not (isinstance(shift, numbers.Real) and 0 < float(shift) < math.inf):  # NaN fails too
        raise ScheduleError(f"shift is a number above 0; got shift={shift!r}")
