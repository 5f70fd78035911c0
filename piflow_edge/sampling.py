"""From noise to data: the loop over student calls."""

import time
from collections.abc import Callable

import numpy as np

from .integrator import rollout
from .policies import GMPolicy, Policy
from .schedule import Schedule


def sample(
    network: Callable[[np.ndarray, float], Policy],
    noise: np.ndarray,
    schedule: Schedule,
    *,
    temperature: float = 1.0,
    renoise: Callable[[int], np.ndarray] | None = None,
    kernel: str = "auto",
    solver: str = "euler",
    num_threads: int | None = None,
    clock: Callable[[str, float], None] = lambda stage, seconds: None,
    callback: Callable[[int, int, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Carry noise to data with `schedule.nfe` network calls.

    Args:
        network: `(x_src, sigma_src) -> policy`, one student call.
        noise: the state at noise level 1, (B, C, H, W).
        schedule: where the network is called and how the policies are integrated.
        temperature: sharpens GM policies at every call but the last; 1 leaves them.
        renoise: `(draw) -> noise` like `noise`, for schedules with h above 0; draw is 1 for the first.
        kernel, solver, num_threads: see `rollout`.
        clock: told ("network" or "policy", seconds) after each stage.
        callback: told (calls done, nfe, state) after each segment.

    Returns:
        The state at noise level 0, like `noise`.

    Source: Chen et al., pi-Flow, arXiv:2510.14974; `PiFlowImitationBase.forward_test` in Lakonik/piFlow.
    """
    x_t = noise
    for i, segment in enumerate(schedule.segments):
        began = time.perf_counter()
        policy = network(x_t, segment.sigma_src)
        called = time.perf_counter()
        if isinstance(policy, GMPolicy) and i < schedule.nfe - 1:
            policy = policy.tempered(temperature)
        x_t = rollout(
            policy,
            x_t,
            segment.sigma_src,
            segment.sigma_dst,
            segment.substeps,
            shift=schedule.shift,
            kernel=kernel,
            solver=solver,
            num_threads=num_threads,
        )
        if segment.renoises:
            x_t = segment.renoise(x_t, renoise(i + 1))
        clock("network", called - began)
        clock("policy", time.perf_counter() - called)
        if callback is not None:
            callback(i + 1, schedule.nfe, x_t)
    return x_t
