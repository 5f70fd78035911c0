"""The CUDA kernels: rollout.cu, compiled for the GPU that is there when first used.

`gm_rollout` and `dx_rollout` take device arrays of any library, in float32 or half precision, and queue
one launch on the caller's stream; `rollout` is what `integrate` calls. Nothing waits for the GPU, but for the
first rollout along a schedule, whose noise levels are copied to it: make one before capturing a CUDA graph.
"""

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from piflow_edge.arrays import Array
from piflow_edge.errors import EngineError, ScheduleError, ShapeError

from . import nvidia
from .device_arrays import FORMATS, is_on_gpu, stream_of, view
from .nvidia import missing

# As in rollout.cu and gm_rollout.h.
REGISTERS, SHARED, LOCAL = range(3)
_STEP_BYTES = 128 * 32  # kStepsAtOnce of GmStep
_GROUP = 4

_MOST_THREADS = 128
# Numbers of a pixel that fit the 255 registers a thread may have; with more, ptxas spills in earnest.
_MOST_IN_REGISTERS = 240
# Pixels of one image up to which four threads share each: that is still no more than a warp for every multiprocessor of
# a large GPU. By this and the mixture alone, whatever the batch is: four parts of a sum round otherwise than one.
_FEW_PIXELS = 32 * 32


class _Input(ctypes.Structure):
    _fields_ = (("numbers", ctypes.c_void_p), ("format", ctypes.c_int64))


class _GM(ctypes.Structure):
    _fields_ = (
        *((name, _Input) for name in ("means", "logweights", "x_src", "x_start", "variance")),
        *((name, ctypes.c_void_p) for name in ("x_dst", "levels")),
        *((name, ctypes.c_double) for name in ("eps", "temperature")),
        *((name, ctypes.c_int64) for name in ("batch", "pixels", "substeps", "is_logstd")),
    )


class _DX(ctypes.Structure):
    _fields_ = (
        *((name, _Input) for name in ("grid", "x_src", "x_start")),
        *((name, ctypes.c_void_p) for name in ("x_dst", "weights")),
        *((name, ctypes.c_int64) for name in ("batch", "num_nodes", "size")),
    )


@dataclass(frozen=True)
class Plan:
    """How a Gaussian-mixture rollout is compiled and launched."""

    storage: int  # where a pixel's numbers lie: REGISTERS, SHARED or LOCAL
    threads: int  # in a block
    shared_bytes: int  # for a block
    lanes: int = 1  # threads that share a pixel: 1, or with REGISTERS also 4

    def defines(self, num_components: int, num_channels: int) -> tuple[str, ...]:
        """Macros for rollout.cu."""
        return (
            f"PIFLOW_K={num_components}",
            f"PIFLOW_C={num_channels}",
            f"PIFLOW_STORAGE={self.storage}",
            f"PIFLOW_THREADS={self.threads}",
            f"PIFLOW_LANES={self.lanes}",
        )


def gm_plan(num_components: int, num_channels: int, pixels: int, shared_bytes: int) -> Plan:
    """How to roll out a mixture of K components of C channels at each of an image's pixels.

    `shared_bytes`: of shared memory that the GPU's blocks may have.
    """
    padded = math.ceil(num_components / _GROUP) * _GROUP
    over_components, over_channels = padded * (num_channels + 3), 4 * num_channels
    fits_when_shared = over_components // _GROUP + over_channels <= _MOST_IN_REGISTERS
    if pixels <= _FEW_PIXELS and num_components > _GROUP and fits_when_shared:
        return Plan(REGISTERS, _MOST_THREADS, _STEP_BYTES, lanes=_GROUP)
    if over_components + over_channels <= _MOST_IN_REGISTERS:
        return Plan(REGISTERS, _MOST_THREADS, _STEP_BYTES)
    for threads in (128, 64, 32):
        needed = _STEP_BYTES + threads * over_components * 4
        if needed <= shared_bytes:
            return Plan(SHARED, threads, needed)
    return Plan(LOCAL, _MOST_THREADS, _STEP_BYTES)


def gm_rollout(
    means: Array,
    logweights: Array,
    variance: Array,
    x_src: Array,
    x_start: Array,
    x_dst: Array,
    sigmas: np.ndarray,
    sigma_src,
    *,
    eps: float = 1e-4,
    temperature: float = 1.0,
    is_logstd: bool = False,
    stream: int | None = None,
) -> None:
    """Carry `x_start` along a Gaussian-mixture policy, into `x_dst`, in one launch.

    Args:
        means: component means as velocities, as the student gives them, (B, K, C, H, W); a frame axis before
            H, W is allowed. This and the next four may each be float32, float16 or bfloat16.
        logweights: (B, K, 1, H, W), need not be normalised; -inf drops a component.
        variance: of each component in x_0: exp(2 logstds) sigma_src^2, times the temperature; B numbers.
        x_src: state at which the student was called, (B, C, H, W).
        x_start: state to start from; usually `x_src` itself.
        x_dst: where the result goes, float32, (B, C, H, W).
        sigmas: noise levels in [0, 1], host float64, (S + 1,) or (S + 1, B); equal neighbours: no step.
        sigma_src: noise level of `x_src`, a float or (B,).
        eps: floor under noise levels and denominators, above 0.
        temperature: below 1 sharpens the mixture as `GMPolicy.temper` does; the kernel does it on the way.
        is_logstd: `variance` holds the network's log-stds instead; the kernel makes variances of them.
        stream: a CUstream as a number; else that on which the library of `x_dst` is working.

    Raises:
        ShapeError: arrays that do not fit each other, are not contiguous, or of another type.
        ScheduleError: noise levels outside [0, 1], or `eps` not above 0.
        EngineError: arrays that lie elsewhere; no driver, no compiler.
    """
    stream = stream_of(x_dst) if stream is None else stream
    given = dict(means=means, logweights=logweights, variance=variance, x_src=x_src, x_start=x_start)
    arrays, state, ordinal = _views(given, x_dst, stream)
    batch, num_channels, *size = state
    num_components = arrays["means"].shape[1] if len(arrays["means"].shape) > 1 else 0
    _check_shape("means", arrays["means"].shape, (batch, num_components, *state[1:]))
    _check_shape("logweights", arrays["logweights"].shape, (batch, num_components, 1, *size))
    if math.prod(arrays["variance"].shape) != batch:
        raise ShapeError(f"variance is one number per sample, {batch}; got {arrays['variance'].shape}")
    levels = _levels(sigma_src, sigmas, batch)
    if not eps > 0:
        raise ScheduleError(f"eps is above 0; got {eps}")

    device, pixels = nvidia.device(ordinal), math.prod(size)
    plan = gm_plan(num_components, num_channels, pixels, device.shared_bytes)
    defines = plan.defines(num_components, num_channels)
    function = nvidia.kernel(ordinal, "piflow_gm", defines, plan.shared_bytes)
    # A small image is spread over all multiprocessors; shared memory is cut for one number of threads only.
    threads, size = plan.threads, pixels * plan.lanes
    while plan.storage != SHARED and threads > 32 and _blocks(batch, size, threads) < device.multiprocessors:
        threads //= 2
    buffer = nvidia.upload(ordinal, levels.tobytes())
    problem = _GM(
        *(_input(arrays[name]) for name in ("means", "logweights", "x_src", "x_start", "variance")),
        *(arrays["x_dst"].pointer, buffer.pointer, eps, temperature),
        *(batch, pixels, len(levels) - 2, is_logstd),
    )
    nvidia.launch(
        ordinal, function, _blocks(batch, size, threads), threads, plan.shared_bytes, stream, problem
    )


def dx_rollout(
    grid: Array, x_src: Array, x_start: Array, x_dst: Array, weights: np.ndarray, *, stream: int | None = None
) -> None:
    """Carry `x_start` along a DX policy, into `x_dst`: one weighted sum, whatever the number of substeps.

    Args:
        grid: as the student gives it, (B, N, C, H, W); like `gm_rollout`'s arrays.
        x_src, x_start, x_dst, stream: see `gm_rollout`.
        weights: `DXPolicy.rollout_weights(sigmas)`, host float64, (2 + N,) or (B, 2 + N).

    Raises:
        ShapeError, EngineError: see `gm_rollout`.
    """
    stream = stream_of(x_dst) if stream is None else stream
    arrays, state, ordinal = _views(dict(grid=grid, x_src=x_src, x_start=x_start), x_dst, stream)
    num_nodes = arrays["grid"].shape[1] if len(arrays["grid"].shape) > 1 else 0
    _check_shape("grid", arrays["grid"].shape, (state[0], num_nodes, *state[1:]))
    weights = np.asarray(weights, np.float64)
    if weights.shape not in ((2 + num_nodes,), (state[0], 2 + num_nodes)):
        raise ShapeError(f"weights are (2 + N,) or (B, 2 + N), with N = {num_nodes}; got {weights.shape}")
    weights = np.broadcast_to(weights, (state[0], 2 + num_nodes)).copy()
    if arrays["x_src"].pointer == arrays["x_start"].pointer:  # the kernel then reads the state once
        weights[:, 0] += weights[:, 1]
    buffer = nvidia.upload(ordinal, weights.astype(np.float32).tobytes())
    function = nvidia.kernel(ordinal, "piflow_dx", (), 0)
    problem = _DX(
        *(_input(arrays[name]) for name in ("grid", "x_src", "x_start")),
        *(arrays["x_dst"].pointer, buffer.pointer, state[0], num_nodes, math.prod(state[1:])),
    )
    blocks = _blocks(state[0], math.prod(state[1:]), _MOST_THREADS)
    nvidia.launch(ordinal, function, blocks, _MOST_THREADS, 0, stream, problem)


def obstacle(policy, problem, x_start: Array) -> str | None:
    """Why the CUDA kernels cannot carry `x_start` along `policy`, as a sentence; None if they can.

    `problem`: what `find_problem` finds in the policy.
    """
    # Late: the functions above also serve programs that have neither policies nor array-api-compat.
    from array_api_compat import is_torch_array

    from .cpu import dtype_name, needs_gradient

    if problem is None:
        return f"the CUDA kernels know GMPolicy and DXPolicy; got {type(policy).__name__}"
    arrays = problem.arrays
    for array in (*arrays, x_start):
        if not is_on_gpu(array):
            return f"the CUDA kernels take arrays in GPU memory; got a {type(array).__name__} elsewhere"
    if all(map(is_torch_array, (*arrays, x_start))) and needs_gradient(*arrays, x_start):
        return "the CUDA kernels give no gradients; detach policy and state, or use 'reference'"
    for array in arrays:
        if dtype_name(array) != "float32":
            return f"the CUDA kernels compute in float32; the policy is in {dtype_name(array)}"
    if dtype_name(x_start) not in FORMATS:
        return f"the CUDA kernels compute in float32; the state is in {dtype_name(x_start)}"
    return missing()


def carry(problem, x_start: Array, sigmas: np.ndarray) -> Array:
    """Carry `x_start` along `sigmas`, as the reference does, where there is no `obstacle`.

    `problem`: what `find_problem` found in a policy.

    Returns:
        The state at the last level, float32, a new array of the library of `x_start`.
    """
    from array_api_compat import array_namespace, device  # late: see `obstacle`

    from piflow_edge.integrator import check_sigmas
    from piflow_edge.policies import MixtureRollout, RawMixture, WeightedSum

    xp = array_namespace(x_start)

    def ready(array):
        array = array.detach() if hasattr(array, "detach") else array
        return xp.reshape(xp.reshape(array, (-1,)), array.shape)  # copied only if it is not contiguous

    x_dst = xp.empty(x_start.shape, dtype=xp.float32, device=device(x_start))
    # Of a mixture: means, log-weights and variance or log-std; of a weighted sum: the grid. Then `x_src`, in both.
    arrays: tuple[Any, ...] = (*map(ready, problem.arrays), ready(x_start), x_dst)
    routines = {
        RawMixture: lambda: gm_rollout(
            *arrays,
            sigmas=sigmas,
            sigma_src=problem.sigma_src,
            eps=problem.eps,
            temperature=problem.temperature,
            is_logstd=True,
        ),
        MixtureRollout: lambda: gm_rollout(
            *arrays, sigmas=sigmas, sigma_src=problem.sigma_src, eps=problem.eps
        ),
        WeightedSum: lambda: dx_rollout(
            *arrays, weights=problem.compute_weights(check_sigmas(sigmas, x_start))
        ),
    }
    routines[type(problem)]()
    return x_dst


def find_problem(policy):
    """Return what a kernel needs to integrate a policy; None for velocity fields that no kernel knows.

    Of a mixture that is what the network gave, where the policy has kept it.
    """
    from . import cpu  # late: see `obstacle`

    raw = getattr(policy, "for_fused_kernel", None)
    return (raw and raw()) or cpu.find_problem(policy)


def _views(given: dict[str, Array], x_dst: Array, stream: int):
    arrays = {name: view(name, array, stream) for name, array in (given | {"x_dst": x_dst}).items()}
    state, ordinal = arrays["x_dst"].shape, arrays["x_dst"].ordinal
    if len(state) < 3 or 0 in state:
        raise ShapeError(f"a state is (B, C, H, W), none of it 0; got {state}")
    if arrays["x_dst"].dtype != "float32":
        raise ShapeError(f"x_dst must be float32; got {arrays['x_dst'].dtype}")
    for name, array in arrays.items():
        if name in ("x_src", "x_start"):
            _check_shape(name, array.shape, state)
        if array.ordinal != ordinal:
            raise EngineError(f"all arrays lie on one GPU; x_dst is on {ordinal}, {name} on {array.ordinal}")
    return arrays, state, ordinal


def _levels(sigma_src, sigmas, batch: int) -> np.ndarray:
    """Noise level of the source, then those to step through: float64, (1 + S + 1, B)."""
    sigma_src, sigmas = np.asarray(sigma_src, np.float64), np.asarray(sigmas, np.float64)
    fits = sigma_src.shape in ((), (batch,)) and sigmas.ndim in (1, 2) and sigmas.shape[1:] in ((), (batch,))
    if not fits or not len(sigmas):
        raise ShapeError(
            f"sigma_src is a number or ({batch},), sigmas (S + 1,) or (S + 1, {batch});"
            f" got {sigma_src.shape} and {sigmas.shape}"
        )
    levels = np.empty((1 + len(sigmas), batch))
    levels[0], levels[1:] = sigma_src, sigmas.reshape(len(sigmas), -1)
    if not np.all((levels >= 0) & (levels <= 1)):  # NaN fails too
        raise ScheduleError(f"noise levels lie in [0, 1]; got {sigma_src=!s}, {sigmas=!s}")
    return levels


def _input(array) -> _Input:
    return _Input(array.pointer, FORMATS[array.dtype])


def _blocks(batch: int, size: int, threads: int) -> int:
    return batch * math.ceil(size / threads)


def _check_shape(name: str, shape: tuple, expected: tuple) -> None:
    if shape != tuple(expected) or 0 in shape:
        raise ShapeError(f"{name} must have the shape {tuple(expected)}, none of it 0; got {shape}")
