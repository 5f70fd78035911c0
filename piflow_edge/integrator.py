"""One segment, no network: Euler steps on a policy's velocity."""

import logging
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from .errors import EngineError, ScheduleError, ShapeError
from .kernels import cpu, cuda
from .kernels.device_arrays import is_on_gpu
from .policies import DXPolicy, Policy
from .schedule import substep_sigmas, unwarp

Array = Any  # an array of any library that follows the array API standard

KERNELS = ("auto", "reference", "cpu", "cuda")


def rollout(
    policy: Policy,
    x_src: Array,
    sigma_src,
    sigma_dst,
    substeps,
    *,
    shift: float = 1.0,
    kernel: str = "auto",
    num_threads: int | None = None,
) -> Array:
    """Carry a state across one segment by Euler steps on the policy's velocity.

    The network is not called: `policy` was made from its output and answers for every noise level down to
    `sigma_dst`. Substeps are even in raw time.

    Args:
        policy: this segment's velocity field; returns `u_t` with the shape of `x_t`.
        x_src: state at the segment's start, shape (B, C, H, W), floating point, latent units.
        sigma_src: noise level of `x_src`, dimensionless, at most 1 (pure noise); a float or (B,).
        sigma_dst: noise level to stop at: 0 (data) or more, below `sigma_src`; a float or (B,).
        substeps: Euler steps in this segment, 1 or more, an int or (B,). They add nothing to NFE.
        shift: the schedule's shift, above 0; the student's bundle records it.
        kernel: "reference" computes as the formulas read. "cpu" is compiled, for GM and DX policies in
            float32, in host memory, without gradients; "cuda" the same in GPU memory, compiled on first use,
            one launch. "auto" takes the one for the memory at hand where it can; elsewhere it computes as the
            reference does, but DX policies in closed form.
        num_threads: threads of the CPU kernel, at most; else one for each core this process may use.

    Returns:
        The state at `sigma_dst`, in the shape, dtype and device of `x_src`, which is left as it was.

    Raises:
        ScheduleError: noise levels that do not run down within [0, 1]; `substeps` or `shift` too small.
        EngineError: the kernel asked for cannot run here, or on these arrays.

    Source: Chen et al., pi-Flow, arXiv:2510.14974; `policy_rollout` in Lakonik/piFlow.
    """
    sigma_src, sigma_dst = np.asarray(sigma_src, np.float64), np.asarray(sigma_dst, np.float64)
    if not np.all((sigma_dst >= 0) & (sigma_dst < sigma_src) & (sigma_src <= 1)):  # NaN fails too
        raise ScheduleError(f"a segment runs down within [0, 1]; got {sigma_src=!s}, {sigma_dst=!s}")
    counts = np.asarray(substeps)
    if not (np.issubdtype(counts.dtype, np.integer) and np.all(counts >= 1)):
        raise ScheduleError(f"substeps is a whole number, 1 or more; got {substeps!r}")
    sigmas = substep_sigmas(unwarp(sigma_src, shift), unwarp(sigma_dst, shift), counts, shift)
    sigmas[0], sigmas[-1] = sigma_src, sigma_dst  # exactly, whatever warp and unwarp rounded
    return integrate(policy, x_src, sigmas, kernel=kernel, num_threads=num_threads)


def integrate(
    policy: Policy,
    x_src: Array,
    sigmas: np.ndarray,
    *,
    kernel: str = "auto",
    num_threads: int | None = None,
) -> Array:
    """Euler steps along given noise levels, float64 (S + 1,) or (S + 1, B); what `rollout` ends in."""
    if kernel not in KERNELS:
        raise EngineError(f"kernel is one of {', '.join(KERNELS)}; got {kernel!r}")
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.ndim not in (1, 2) or not len(sigmas) or sigmas.shape[1:] not in ((), x_src.shape[:1]):
        raise ShapeError(
            f"noise levels are (S + 1,), or (S + 1, {x_src.shape[0]}) with one per sample; got {sigmas.shape}"
        )
    if not np.all((sigmas >= 0) & (sigmas <= 1)):  # NaN fails too
        raise ScheduleError(f"noise levels lie in [0, 1]; got {sigmas}")
    if kernel == "reference":
        x_dst = _euler(policy, x_src, sigmas)
    else:
        place = ("cuda" if is_on_gpu(x_src) else "cpu") if kernel == "auto" else kernel
        compiled = cuda if place == "cuda" else cpu
        if (reason := compiled.obstacle(policy, x_src)) is None:
            settings = {"num_threads": num_threads} if place == "cpu" else {}
            x_dst = compiled.rollout(policy, x_src, sigmas, **settings)
        elif kernel != "auto":
            raise EngineError(f"kernel {kernel!r} cannot run: {reason}")
        else:
            if compiled.missing():
                _log_once(reason)
            closed = isinstance(policy, DXPolicy)
            x_dst = policy.closed_form(x_src, sigmas) if closed else _euler(policy, x_src, sigmas)
    return array_namespace(x_src).astype(x_dst, x_src.dtype, copy=False)


def _euler(policy, x_t, sigmas):
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


@cache
def _log_once(reason: str) -> None:
    logging.getLogger(__name__).warning("rollouts are slower than they could be: %s", reason)
