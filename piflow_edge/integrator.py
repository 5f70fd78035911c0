"""One segment, no network: a policy's velocity, integrated in the Euler steps it was trained with or in fewer."""

import logging
from functools import cache
from itertools import pairwise

import numpy as np

from .arrays import Array, array_namespace
from .errors import EngineError, ScheduleError, ShapeError
from .kernels import cpu
from .policies import DXPolicy, Policy
from .schedule import segment_sigmas

KERNELS = ("auto", "reference", "cpu", "cuda")
SOLVERS = ("euler", "multistep")


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
    solver: str = "euler",
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
        solver: "euler", or "multistep", which asks the policy at a quarter of the substeps and ends some 1e-3
            from where Euler does (benchmarks/solvers.py). It is for GM policies that no compiled kernel takes:
            a kernel does all the Euler steps in less time, and so does the closed form of DX policies.

    Returns:
        The state at `sigma_dst`, in the shape, dtype and device of `x_src`, which is left as it was.

    Raises:
        ScheduleError: noise levels that do not run down within [0, 1]; `substeps` or `shift` too small.
        EngineError: the kernel asked for cannot run here, on these arrays, or with this solver.

    Source: Chen et al., pi-Flow, arXiv:2510.14974; `policy_rollout` in Lakonik/piFlow.
    """
    sigma_src, sigma_dst = np.asarray(sigma_src, np.float64), np.asarray(sigma_dst, np.float64)
    if not np.all((sigma_dst >= 0) & (sigma_dst < sigma_src) & (sigma_src <= 1)):  # NaN fails too
        raise ScheduleError(f"a segment runs down within [0, 1]; got {sigma_src=!s}, {sigma_dst=!s}")
    counts = np.asarray(substeps)
    if not (np.issubdtype(counts.dtype, np.integer) and np.all(counts >= 1)):
        raise ScheduleError(f"substeps is a whole number, 1 or more; got {substeps!r}")
    sigmas = segment_sigmas(sigma_src, sigma_dst, counts, shift)
    return integrate(policy, x_src, sigmas, kernel=kernel, num_threads=num_threads, solver=solver)


def integrate(
    policy: Policy,
    x_src: Array,
    sigmas: np.ndarray,
    *,
    kernel: str = "auto",
    num_threads: int | None = None,
    solver: str = "euler",
) -> Array:
    """Euler steps along given noise levels, float64 (S + 1,) or (S + 1, B); what `rollout` ends in."""
    if solver not in SOLVERS:
        raise ScheduleError(f"solver is one of {', '.join(SOLVERS)}; got {solver!r}")
    if kernel not in KERNELS:
        raise EngineError(f"kernel is one of {', '.join(KERNELS)}; got {kernel!r}")
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.ndim not in (1, 2) or not len(sigmas) or sigmas.shape[1:] not in ((), x_src.shape[:1]):
        raise ShapeError(
            f"noise levels are (S + 1,), or (S + 1, {x_src.shape[0]}) with one per sample; got {sigmas.shape}"
        )
    if not (sigmas.min() >= 0 and sigmas.max() <= 1):  # NaN fails too
        raise ScheduleError(f"noise levels lie in [0, 1]; got {sigmas}")
    if solver == "multistep":
        if kernel not in ("auto", "reference"):
            raise EngineError(
                f"kernel {kernel!r} takes Euler steps only; use solver 'euler', or kernel 'auto'"
            )
        if sigmas.ndim == 2 or not np.all(np.diff(sigmas) < 0):
            raise ScheduleError("solver 'multistep' wants falling noise levels, the same for all samples")
        x_dst = _multistep(policy, x_src, sigmas)
    elif kernel == "reference":
        x_dst = _euler(policy, x_src, sigmas)
    else:
        compiled = _compiled(kernel, x_src)
        if (reason := compiled.obstacle(policy, x_src)) is None:
            settings = {"num_threads": num_threads} if compiled is cpu else {}
            x_dst = compiled.rollout(policy, x_src, sigmas, **settings)
        elif kernel != "auto":
            raise EngineError(f"kernel {kernel!r} cannot run: {reason}")
        else:
            if compiled.missing():
                _log_once(reason)
            closed = isinstance(policy, DXPolicy)
            x_dst = policy.closed_form(x_src, sigmas) if closed else _euler(policy, x_src, sigmas)
    return x_dst if x_dst.dtype == x_src.dtype else array_namespace(x_src).astype(x_dst, x_src.dtype)


def _compiled(kernel: str, x_src: Array):
    """The module of the kernel that was asked for; for "auto", of the one for the memory that `x_src` lies in."""
    if kernel == "cpu" or (kernel == "auto" and isinstance(x_src, np.ndarray)):
        return cpu
    from .kernels import cuda, device_arrays  # late: without a GPU nobody needs them

    return cuda if kernel == "cuda" or device_arrays.is_on_gpu(x_src) else cpu


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


def _multistep(policy, x_t, sigmas):
    """About where Euler steps along `sigmas` lead, with a quarter of the evaluations.

    An Euler step is x <- (1 - r) x + r x_0 with r = (sigma - sigma_next) / sigma, so many of them come to a weighted
    sum once x_0 is known for each. Here x_0 is known where the policy is asked, and in between follows the line, in
    sigma, through the last two answers. Where x_0 is linear in sigma, the result is that of Euler.
    """
    x_0 = sigma_last = None
    for start, stop in pairwise(_evaluations(sigmas)):
        sigma_t, sigma_next = float(sigmas[start]), float(sigmas[stop])
        last, x_0 = x_0, x_t - sigma_t * policy.velocity(x_t, sigma_t)
        kept = sigma_next / sigma_t  # the product of all 1 - r
        x_next = kept * x_t + (1 - kept) * x_0
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


@cache
def _log_once(reason: str) -> None:
    logging.getLogger(__name__).warning("rollouts are slower than they could be: %s", reason)
