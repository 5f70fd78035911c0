"""The compiled CPU kernels, through their C interface; piflow_kernels.h says what each field means.

NumPy arrays and torch CPU tensors are read where they lie, as long as they are contiguous float32. Nothing
here imports torch, unless a torch tensor came in.
"""

import ctypes
import logging
import math
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import is_torch_array

from piflow_edge.arrays import Array
from piflow_edge.errors import EngineError, ShapeError
from piflow_edge.integrator import check_sigmas
from piflow_edge.policies import MixtureRollout, Policy, Rollout, VelocityField, WeightedSum
from piflow_edge.system.hardware import available_cores

log = logging.getLogger(__name__)

ABI_VERSION = 2
_SINGLE = np.dtype(np.float32)
_HALF_OR_SINGLE = ("float32", "float16", "bfloat16")
_LIBRARY_NAMES = {"win32": "piflow_kernels.dll", "darwin": "libpiflow_kernels.dylib"}


class _Options(ctypes.Structure):
    _fields_ = (("num_threads", ctypes.c_int32), ("isa", ctypes.c_char_p))


class _GM(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "num_components", "num_channels", "pixels", "substeps")
        ),
        *((name, ctypes.c_void_p) for name in ("means", "logweights", "x_src", "x_start", "x_dst")),
        *((name, ctypes.c_void_p) for name in ("sigma_src", "variance", "sigmas")),
        ("eps", ctypes.c_double),
    )


class _DX(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "num_nodes", "size")),
        *((name, ctypes.c_void_p) for name in ("grid", "x_src", "x_start", "x_dst", "weights")),
    )


class _Noise(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("indices", ctypes.c_void_p),
        ("draw", ctypes.c_uint32),
        ("normals", ctypes.c_void_p),
    )


@cache
def library() -> Any:
    """The compiled library, a `ctypes.CDLL`, or None where this installation has none that fits."""
    path = Path(__file__).with_name(_LIBRARY_NAMES.get(sys.platform, "libpiflow_kernels.so"))
    try:
        library = ctypes.CDLL(os.fspath(path))
    except OSError:  # not there, or built for another processor or C library
        return None
    library.piflow_isas.restype = ctypes.c_char_p
    return library if library.piflow_abi_version() == ABI_VERSION else None


def isas() -> list[str]:
    """Instruction sets the library can use on this processor, best first; none without the library."""
    return library().piflow_isas().decode().split() if library() else []


def missing() -> str | None:
    """What this installation lacks for the compiled kernels, and what to do; None if it has all."""
    if library() is not None:
        return None
    return (
        "the compiled kernels are not in this installation; with a C++ compiler at hand, "
        "pip install --force-reinstall --no-deps --no-cache-dir piflow-edge builds them"
    )


@cache
def warn_once(reason: str) -> None:
    """Log that kernels are missing, once per process and reason."""
    log.warning("noise and rollouts are slower than they could be: %s", reason)


def find_problem(policy: VelocityField) -> Rollout | None:
    """Return what a kernel needs to integrate a policy; None for velocity fields that no kernel knows."""
    describe = getattr(policy, "for_kernel", None)
    return None if describe is None else describe()


def obstacle(policy: VelocityField, problem: Rollout | None, x_start: Any) -> str | None:
    """Why the compiled kernels cannot carry `x_start` along `policy`, as a sentence; None if they can.

    `problem`: what `find_problem` finds in the policy.
    """
    if (reason := missing()) is not None:
        return reason
    if problem is None:
        return f"the compiled kernels know GMPolicy and DXPolicy; got {type(policy).__name__}"
    arrays: Any = problem.arrays
    if _are_plain(arrays, x_start):
        return None  # the usual case, in a tenth of the time
    if all(map(is_torch_array, (*arrays, x_start))):
        if any(array.device.type != "cpu" for array in (*arrays, x_start)):
            return "the compiled kernels run on the CPU; a tensor lies on another device"
        if needs_gradient(*arrays, x_start):
            return "the compiled kernels give no gradients; detach policy and state, or use 'reference'"
    elif not all(isinstance(array, np.ndarray) for array in (*arrays, x_start)):
        return "the compiled kernels take NumPy arrays or torch tensors, all of one kind"
    for array in arrays:
        if dtype_name(array) != "float32":
            return f"the compiled kernels compute in float32; the policy is in {dtype_name(array)}"
    if dtype_name(x_start) not in _HALF_OR_SINGLE:
        return f"the compiled kernels compute in float32; the state is in {dtype_name(x_start)}"
    return None


def _are_plain(arrays: tuple[Array, ...], x_start: Array) -> bool:
    kinds = {(type(array), array.dtype) for array in (*arrays, x_start)}
    return kinds == {(np.ndarray, _SINGLE)}


def rollout(
    policy: Policy,
    x_start: Array,
    sigmas: np.ndarray,
    *,
    num_threads: int | None = None,
    isa: str | None = None,
) -> Array:
    """Carry `x_start` along `sigmas`, as the reference does, where there is no `obstacle`.

    Args:
        policy: in float32, as every policy is that was not made from float64.
        x_start: state to start from, of the policy's shape and library; half precision is widened.
        sigmas: noise levels in [0, 1], float64, (S + 1,) or (S + 1, B).
        num_threads: at most so many; else one for each core this process may use. Small problems use fewer.
        isa: one of `isas()`, for tests and measurements; else the best.

    Returns:
        The state at the last level, float32, a new array of the library of `x_start`.
    """
    problem = find_problem(policy)
    assert problem is not None, "there is an obstacle"
    return carry(problem, x_start, sigmas, num_threads=num_threads, isa=isa)


def carry(
    problem: Rollout,
    x_start: Array,
    sigmas: np.ndarray,
    *,
    num_threads: int | None = None,
    isa: str | None = None,
) -> Array:
    """`rollout` with what `find_problem` found in the policy."""
    if x_start.shape != problem.x_src.shape:
        raise ShapeError(
            f"the state must have the policy's shape {tuple(problem.x_src.shape)}; got {tuple(x_start.shape)}"
        )
    options = _Options(num_threads or available_cores(), isa and isa.encode())
    x_dst = _ROUTINES[type(problem)](problem, _host(x_start), sigmas, options)
    if isinstance(x_start, np.ndarray):
        return x_dst
    import torch  # a torch tensor came in: it is loaded already

    return torch.from_numpy(x_dst)


def normal(
    seed: int,
    indices: np.ndarray,
    size: int,
    draw: int,
    *,
    num_threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray:
    """Starting noise, float32 (len(indices), size), of images with the given `indices`, uint64; see `noise`.

    `num_threads`, `isa`: as in `rollout`.
    """
    indices = np.ascontiguousarray(indices, np.uint64)
    normals = np.empty((len(indices), size), np.float32)
    if normals.size:
        of_indices, of_normals = _addresses(indices, normals)
        problem = _Noise(len(indices), size, seed, of_indices, draw, of_normals)
        options = _Options(num_threads or available_cores(), isa and isa.encode())
        _check(library().piflow_normal(ctypes.byref(problem), ctypes.byref(options)))
    return normals


def _gm_rollout(mixture: MixtureRollout, x_start, sigmas, options):
    batch, num_channels, *size = x_start.shape
    means, logweights, x_src = _host(mixture.means), _host(mixture.logweights), _host(mixture.x_src)
    # Of the source, the variance, then the noise levels: a row each, one column per sample also where all share them.
    rows = np.empty((2 + len(sigmas), batch))
    rows[0], rows[1] = mixture.sigma_src, _host(mixture.variance).reshape(batch)
    rows[2:] = sigmas.reshape(len(sigmas), -1)
    x_dst = np.empty(x_start.shape, np.float32)
    sizes = (batch, means.shape[1], num_channels, math.prod(size), len(sigmas) - 1)
    *arrays, row = _addresses(means, logweights, x_src, x_start, x_dst, rows)
    problem = _GM(*sizes, *arrays, row, row + 8 * batch, row + 16 * batch, mixture.eps)
    status = library().piflow_gm_rollout(ctypes.byref(problem), ctypes.byref(options))
    if status:
        check_sigmas(
            sigmas, x_start
        )  # here, not before: the kernel looks at every level in a tenth of the time
    _check(status)
    return x_dst


def _dx_rollout(weighted: WeightedSum, x_start, sigmas, options):
    grid, x_src = _host(weighted.grid), _host(weighted.x_src)
    batch, num_nodes = grid.shape[:2]
    weights = np.empty((batch, 2 + num_nodes))  # once for every sample, also where all share theirs
    weights[...] = weighted.compute_weights(check_sigmas(sigmas, x_start))
    x_dst = np.empty(x_start.shape, np.float32)
    arrays = (grid, x_src, x_start, x_dst, weights)
    problem = _DX(batch, num_nodes, x_start[0].size, *_addresses(*arrays))
    _check(library().piflow_dx_rollout(ctypes.byref(problem), ctypes.byref(options)))
    return x_dst


# What `Policy.for_kernel` returns -> the routine that integrates it.
_ROUTINES = {MixtureRollout: _gm_rollout, WeightedSum: _dx_rollout}


def _addresses(*arrays: Any) -> list[int]:
    """Where arrays lie, which are contiguous and not empty."""
    # Through the buffer in half the time of `array.ctypes`; one that may not be written to has no such buffer.
    return [
        ctypes.addressof(ctypes.c_char.from_buffer(array)) if array.flags.writeable else array.ctypes.data
        for array in arrays
    ]


def _check(status: int) -> None:
    if status:
        reasons = {
            1: "a size, a noise level, eps or num_threads is out of range",
            2: "out of memory",
            3: f"this processor runs {', '.join(isas())}",
        }
        raise EngineError(f"the compiled kernels refused: {reasons[status]}")


def _host(array: Any) -> np.ndarray:
    """`array` as contiguous, aligned float32 in host memory: itself, if it is that already."""
    if not isinstance(array, np.ndarray):
        array = array.detach().float().numpy()
    if array.dtype == np.float32 and array.flags.c_contiguous and array.flags.aligned:
        return array  # 10 times as fast as asking np.require
    return np.require(array, np.float32, ["C", "A"])


def dtype_name(array: Array) -> str:
    """ "float32" and so on, of any library."""
    return _name_of(array.dtype)


@cache
def _name_of(dtype) -> str:  # kept, for NumPy takes 4 microseconds
    return str(dtype).removeprefix("torch.")


def needs_gradient(*tensors) -> bool:
    """Whether torch would record what is done with these tensors."""
    import torch  # torch tensors came in: it is loaded already

    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
