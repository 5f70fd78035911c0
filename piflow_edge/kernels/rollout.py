"""Which kernel carries a state along a policy: a compiled one for the memory at hand, or the method's own formulas."""

from typing import Any

import numpy as np

from piflow_edge import integrator
from piflow_edge.arrays import Array, SameArray
from piflow_edge.errors import EngineError
from piflow_edge.integrator import (
    check_sigmas,
    convert_sigmas,
    restore_dtype,
    rollout_sigmas,
    take_euler_steps,
)
from piflow_edge.policies import VelocityField

from . import cpu

KERNELS = ("auto", "reference", "cpu", "cuda")


def rollout(
    policy: VelocityField,
    x_src: Array,
    sigma_src,
    sigma_dst,
    substeps,
    *,
    shift: float = 1.0,
    kernel: str = "auto",
    num_threads: int | None = None,
    solver: str = "euler",
) -> SameArray:
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
            reference does, but in closed form the policies that have one.
        num_threads: threads of the CPU kernel, at most; else one for each core this process may use.
        solver: "euler", or "multistep", which asks the policy at a quarter of the substeps and ends some 1e-3
            from where Euler does (benchmarks/solvers.py). It is for policies that no compiled kernel takes and that
            have no closed form: a kernel does all the Euler steps in less time.

    Returns:
        The state at `sigma_dst`, in the shape, dtype and device of `x_src`, which is left as it was.

    Raises:
        ScheduleError: noise levels that do not run down within [0, 1]; `substeps` or `shift` too small.
        EngineError: the kernel asked for cannot run here, on these arrays, or with this solver.

    Source: Chen et al., pi-Flow, arXiv:2510.14974; `policy_rollout` in Lakonik/piFlow.
    """
    sigmas = rollout_sigmas(sigma_src, sigma_dst, substeps, shift)
    return integrate(policy, x_src, sigmas, kernel=kernel, num_threads=num_threads, solver=solver)


def integrate(
    policy: VelocityField,
    x_src: Array,
    sigmas: np.ndarray,
    *,
    kernel: str = "auto",
    num_threads: int | None = None,
    solver: str = "euler",
) -> SameArray:
    """Carry a state along given noise levels, float64 (S + 1,) or (S + 1, B); `rollout` ends here."""
    if kernel not in KERNELS:
        raise EngineError(f"kernel is one of {', '.join(KERNELS)}; got {kernel!r}")
    if solver != "euler":
        if kernel not in ("auto", "reference"):
            raise EngineError(
                f"kernel {kernel!r} takes Euler steps only; use solver 'euler', or kernel 'auto'"
            )
        return integrator.integrate(policy, x_src, sigmas, solver=solver)
    if kernel == "reference":
        return restore_dtype(take_euler_steps(policy, x_src, check_sigmas(sigmas, x_src)), x_src)
    compiled = _find_compiled(kernel, x_src)
    problem = compiled.find_problem(policy)
    reason = compiled.obstacle(policy, problem, x_src)
    if reason is None:
        settings: dict[str, Any] = {"num_threads": num_threads} if compiled is cpu else {}
        sigmas = convert_sigmas(sigmas, x_src)  # the kernels see to it that they lie in [0, 1]
        return restore_dtype(compiled.carry(problem, x_src, sigmas, **settings), x_src)
    if kernel != "auto":
        raise EngineError(f"kernel {kernel!r} cannot run: {reason}")
    if compiled.missing():
        cpu.warn_once(reason)
    return integrator.integrate(policy, x_src, sigmas)


def _find_compiled(kernel: str, x_src: Array) -> Any:
    """Return the module of the named kernel; for "auto", of the one for the memory that `x_src` lies in."""
    if kernel == "cpu" or (kernel == "auto" and isinstance(x_src, np.ndarray)):
        return cpu
    from . import cuda, device_arrays  # late: without a GPU nobody needs them

    return cuda if kernel == "cuda" or device_arrays.is_on_gpu(x_src) else cpu
