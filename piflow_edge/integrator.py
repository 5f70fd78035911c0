"""One segment, no network: a policy's velocity, integrated in the Euler steps it was trained with or in fewer.

All here is written once for every array library. `kernels/rollout.py` has `rollout`, of two noise levels and a count of
substeps, and an `integrate` that chooses a compiled kernel where one can run.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from .arrays import Array, SameArray, array_namespace
from .errors import ScheduleError, ShapeError
from .policies import VelocityField
from .sampling_settings import SOLVERS
from .schedule import segment_sigmas

# What carries a state along noise levels: `integrate` below, or another with its arguments.
Integrate = Callable[..., Any]


def integrate(policy: VelocityField, x_src: Array, sigmas: np.ndarray, *, solver: str = "euler") -> SameArray:
    """Carry a state along given noise levels, with the policy's closed form instead of many steps where it has one.

    Args:
        policy: this segment's velocity field; returns `u_t` with the shape of `x_t`.
        x_src: state at the segment's start, shape (B, C, H, W), floating point, latent units.
        sigmas: noise levels, float64 (S + 1,) or (S + 1, B).
        solver: "euler", or "multistep", which asks the policy at a quarter of the levels and ends some 1e-3 from
            where Euler does (benchmarks/solvers.py). It is for policies without a closed form.

    Returns:
        The state at the last level, in the shape, dtype and device of `x_src`, which is left as it was.

    Raises:
        ScheduleError: noise levels outside [0, 1], or an unknown solver.
        ShapeError: noise levels of another shape.
    """
    sigmas = check_sigmas(sigmas, x_src)
    if solver not in SOLVERS:
        raise ScheduleError(f"solver is one of {', '.join(SOLVERS)}; got {solver!r}")
    if solver == "multistep":
        if sigmas.ndim == 2 or not np.all(np.diff(sigmas) < 0):
            raise ScheduleError("solver 'multistep' wants falling noise levels, the same for all samples")
        x_dst = _take_multisteps(policy, x_src, sigmas)
    else:
        closed_form = getattr(policy, "closed_form", None)  # a velocity field of a caller's own has none
        x_dst = None if closed_form is None else closed_form(x_src, sigmas)
        x_dst = take_euler_steps(policy, x_src, sigmas) if x_dst is None else x_dst
    return restore_dtype(x_dst, x_src)


def rollout_sigmas(sigma_src, sigma_dst, substeps, shift: float) -> np.ndarray:
    """Return the noise levels of a rollout, even in raw time, float64 (S + 1,) or (S + 1, B)."""
    sigma_src, sigma_dst = np.asarray(sigma_src, np.float64), np.asarray(sigma_dst, np.float64)
    if not np.all((sigma_dst >= 0) & (sigma_dst < sigma_src) & (sigma_src <= 1)):  # NaN fails too
        raise ScheduleError(f"a segment runs down within [0, 1]; got {sigma_src=!s}, {sigma_dst=!s}")
    counts = np.asarray(substeps)
    if not (np.issubdtype(counts.dtype, np.integer) and np.all(counts >= 1)):
        raise ScheduleError(f"substeps is a whole number, 1 or more; got {substeps!r}")
    return segment_sigmas(sigma_src, sigma_dst, counts, shift)


def check_sigmas(sigmas, x_src: Array) -> np.ndarray:
    """Return noise levels as float64, if they lie in [0, 1] and fit the batch of `x_src`."""
    sigmas = convert_sigmas(sigmas, x_src)
    if not (sigmas.min() >= 0 and sigmas.max() <= 1):  # NaN fails too
        raise ScheduleError(f"noise levels lie in [0, 1]; got {sigmas}")
    return sigmas


def convert_sigmas(sigmas, x_src: Array) -> np.ndarray:
    """Return noise levels as float64, if they fit the batch of `x_src`."""
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.ndim not in (1, 2) or not len(sigmas) or sigmas.shape[1:] not in ((), x_src.shape[:1]):
        raise ShapeError(
            f"noise levels are (S + 1,), or (S + 1, {x_src.shape[0]}) with one per sample; got {sigmas.shape}"
        )
    return sigmas


def restore_dtype(x_dst: Array, x_src: Array) -> SameArray:
    """Return `x_dst` in the dtype of `x_src`."""
    return x_dst if x_dst.dtype == x_src.dtype else array_namespace(x_src).astype(x_dst, x_src.dtype)


def take_euler_steps(policy: VelocityField, x_t: Array, sigmas: np.ndarray) -> SameArray:
    """Return the state after Euler steps along checked levels, as the formulas read."""
    xp = array_namespace(x_t)
    for sigma_t, sigma_next in pairwise(sigmas):
        u_t = policy.velocity(x_t, sigma_t)
        step = sigma_next - sigma_t
        if sigmas.ndim == 1:
            x_t = x_t + u_t * float(step)
        else:
            step = xp.asarray(step, dtype=u_t.dtype, device=getattr(u_t, "device", None))
            x_t = x_t + u_t * xp.reshape(step, (-1, *(1,) * (x_t.ndim - 1)))
    return x_t


def _take_multisteps(policy: VelocityField, x_t: Array, sigmas: np.ndarray) -> SameArray:
    """Return about the state where Euler steps along `sigmas` lead, with a quarter of the evaluations.

    An Euler step is x <- (1 - r) x + r x_0 with r = (sigma - sigma_next) / sigma, so many of them come to a weighted
    sum once x_0 is known for each. Here x_0 is known where the policy is asked, and in between follows the line, in
    sigma, through the last two answers. Where x_0 is linear in sigma, the result is that of Euler.
    """
    x_0, sigma_last = None, 1.0
    for start, stop in pairwise(_evaluations(sigmas)):
        sigma_t, sigma_next = float(sigmas[start]), float(sigmas[stop])
        last, x_0 = x_0, x_t - sigma_t * policy.velocity(x_t, sigma_t)
        remaining = sigma_next / sigma_t  # the product of all 1 - r
        x_next = remaining * x_t + (1 - remaining) * x_0
        if last is not None:
            slope = (x_0 - last) / (sigma_t - sigma_last)
            x_next = x_next + _slope_weight(sigmas[start : stop + 1].tolist()) * slope
        x_t, sigma_last = x_next, sigma_t
    return x_t


def _slope_weight(sigmas):
    """What Euler steps along `sigmas` from x = 0 make of x_0 = sigma - sigmas[0]."""
    x = 0.0
    for sigma, sigma_next in pairwise(sigmas):
        x = (sigma_next * x + (sigma - sigma_next) * (sigma - sigmas[0])) / sigma
    return x


def _evaluations(sigmas):
    """The levels, by their index, at which to ask the policy, and the last.

    The first substep is taken alone, to have two values of x_0; after it evaluations are even in sqrt(sigma), for x_0
    moves most at low noise. Of the powers tried, the root came closest to Euler on every student.
    """
    substeps = len(sigmas) - 1
    count = -(-substeps // 4)
    roots = np.linspace(np.sqrt(sigmas[1]), np.sqrt(sigmas[-1]), count)
    indices = np.rint(np.interp(-(roots**2), -sigmas, np.arange(substeps + 1))).astype(int)
    # No two the same: each at least one after the one before, and early enough to leave room for the rest.
    order = np.arange(count)
    indices = np.maximum.accumulate(indices - order) + order
    indices = np.minimum(indices, substeps - order[::-1])
    indices[-1] = substeps
    return [0, *indices.tolist()]
