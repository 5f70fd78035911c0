"""Arithmetic on `DeviceArray`s, without torch or CuPy: as much of the array API standard as policies and pixels need.

This module is the namespace that `DeviceArray.__array_namespace__` names, so that the formulas of policies.py run on it
as they stand. Float32 alone is computed with. Every result lies in new memory and is queued on the stream of the
operands; what waits for the GPU is copies from and to the host, and `all_finite`.
"""

import builtins
import ctypes
import logging
import math
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from piflow_edge.errors import EngineError, ShapeError

from . import nvidia
from .device_arrays import ITEM_BYTES, DeviceView, stream_of, view

_log = logging.getLogger(__name__)

SOURCE = nvidia.SOURCE.with_name("arrays.cu")

float32, float64, uint8, int64 = "float32", "float64", "uint8", "int64"

# A policy may therefore work out what it needs late; see `policies/policy.py`.
RECORDS_GRADIENTS = False

_THREADS = 128
_AXES = 6
# As in arrays.cu.
_COPY, _ADD, _SUBTRACT, _MULTIPLY, _DIVIDE, _MAXIMUM, _MINIMUM, _EXP, _ROUND, _LOG = range(10)
_SUM, _MAX = range(2)


class _Operand(ctypes.Structure):
    _fields_ = (
        ("numbers", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * _AXES),
        ("value", ctypes.c_double),
    )


class _Elementwise(ctypes.Structure):
    _fields_ = (
        ("result", ctypes.c_void_p),
        ("a", _Operand),
        ("b", _Operand),
        ("sizes", ctypes.c_int64 * _AXES),
        *((name, ctypes.c_int64) for name in ("count", "operation", "to_bytes")),
    )


class _Reduce(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("result", "numbers")),
        *((name, ctypes.c_int64) for name in ("outer", "length", "inner", "operation")),
    )


class Place(NamedTuple):
    """Where an array lies, and the stream that its values are made on."""

    ordinal: int
    stream: int


class DeviceArray(DeviceView):
    """An array of ours: what `view` gives of other libraries' arrays, and arithmetic."""

    @property
    def device(self) -> Place:
        """Where new arrays like this one are made."""
        found = place(self.ordinal)
        return found if self.stream is None else found._replace(stream=self.stream)

    def __array_namespace__(self, api_version: str | None = None):
        return sys.modules[__name__]

    def to_host(self) -> np.ndarray:
        """The values as NumPy's: waits for them."""
        return to_host(self)

    def reshape(self, shape: tuple[int, ...]) -> "DeviceArray":
        """The same memory in a shape of as many numbers."""
        return replace(self, shape=shape)

    def __getitem__(self, rows: slice) -> "DeviceArray":
        """Rows in a row of the first axis, in the same memory."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ShapeError("rows of an array on a GPU are taken one after the other")
        row = math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]
        return replace(
            self, pointer=self.pointer + start * row, shape=(builtins.max(0, stop - start), *self.shape[1:])
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __add__(self, other):
        return combine("+", self, other)

    def __radd__(self, other):
        return combine("+", other, self)

    def __sub__(self, other):
        return combine("-", self, other)

    def __rsub__(self, other):
        return combine("-", other, self)

    def __mul__(self, other):
        return combine("*", self, other)

    def __rmul__(self, other):
        return combine("*", other, self)

    def __truediv__(self, other):
        return combine("/", self, other)

    def __pow__(self, power: int):
        return combine("*", self, self) if power == 2 else NotImplemented


# Most bytes of memory that nobody uses to keep for the next array: asking the driver for it waits for the GPU.
_MOST_KEPT = 256 << 20
_spare: dict[Place, list[nvidia.Memory]] = {}
_lock = threading.Lock()
# Of arrays that are gone. Python may collect one at any point of a thread, also where that holds the lock: such memory
# waits here for the next who asks.
_returned: SimpleQueue[tuple[Place, nvidia.Memory]] = SimpleQueue()


class _Lent:
    """Memory of a stream's arrays. Comes from an array that is gone, where one was as large: work on one stream is done
    in order, so that whoever writes it next comes after all who read it.
    """

    def __init__(self, device: Place, size: int):
        memory = _take_spare(device, size)
        if memory is None:
            try:
                memory = nvidia.Memory(device.ordinal, size)
            except EngineError:
                release(device.ordinal)  # arrays of other sizes, which nobody uses, may be what is missing
                memory = nvidia.Memory(device.ordinal, size)
        self.pointer = memory.pointer
        # Not `__del__`, which runs at the end of the process too, when this module's names are gone.
        weakref.finalize(self, _return, device, memory).atexit = False


def _return(device: Place, memory: nvidia.Memory) -> None:
    """Keep the memory of an array that is gone for the next one."""
    _returned.put((device, memory))
    if _lock.acquire(blocking=False):
        try:
            surplus = _take_back()
        finally:
            _lock.release()
        del surplus  # freed outside the lock


class Pool:
    """Memory for arrays of a computation that is done again and again, each time at the same addresses."""

    def __init__(self, ordinal: int):
        self._ordinal, self._memories, self._next = ordinal, [], 0

    @property
    def size(self) -> int:
        """Bytes of all its memory."""
        return builtins.sum(memory.size for memory in self._memories)

    @contextmanager
    def lending(self) -> Iterator[None]:
        """Take the memory of all arrays that this thread makes from here, from the first on."""
        self._next, _thread.pool = 0, self
        try:
            yield
        finally:
            _thread.pool = None

    def lend(self, size: int) -> nvidia.Memory:
        """The next piece of memory; a new one where it is lent for the first time."""
        if self._next == len(self._memories):
            self._memories.append(nvidia.Memory(self._ordinal, size))
        memory = self._memories[self._next]
        if memory.size != size:
            raise EngineError(f"a computation made other arrays than before: {size} bytes, not {memory.size}")
        self._next += 1
        return memory


_thread = threading.local()  # `pool`: where this thread's arrays lie, if one lends


def _take_spare(device: Place, size: int) -> nvidia.Memory | None:
    """Memory of that size that is kept, which is then the caller's."""
    with _lock:
        surplus = _take_back()
        spare = _spare.get(device, [])
        found = next((i for i, memory in enumerate(spare) if memory.size == size), None)
        memory = None if found is None else spare.pop(found)
    del surplus  # freed outside the lock
    return memory


def _take_back() -> list[nvidia.Memory]:
    """Keep what was returned, with the lock held. What comes back is too much to keep."""
    surplus = []
    while not _returned.empty():
        device, memory = _returned.get()
        spare = _spare.setdefault(device, [])
        spare.append(memory)
        while builtins.sum(memory.size for memory in spare) > _MOST_KEPT:
            surplus.append(spare.pop(0))
    return surplus


def release(ordinal: int) -> None:
    """Give memory that is kept for later arrays back to the GPU."""
    with _lock:
        surplus = _take_back()
        surplus += [_spare.pop(device) for device in list(_spare) if device.ordinal == ordinal]
    del surplus


@cache
def _stream(ordinal: int) -> nvidia.Stream:
    return nvidia.Stream(ordinal)


def place(ordinal: int) -> Place:
    """The GPU, and the one stream on which the engines and kernels of this process work there."""
    return Place(ordinal, _stream(ordinal).handle)


@cache
def place_of(device: str) -> Place | None:
    """Where arrays for an engine on `device` lie best; None for the host's memory.

    On an NVIDIA GPU without our kernels that is the host's too: what this costs is said in a warning.
    """
    if device.partition(":")[0] != "cuda":
        return None
    if (reason := nvidia.missing()) is not None:
        _log.warning("arrays cross the bus with every network call, and policies run on the CPU: %s", reason)
        return None
    return place(nvidia.ordinal_in(device))


def empty(shape, *, dtype: str = float32, device: Place) -> DeviceArray:
    """An array of any values."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    size = builtins.max(1, math.prod(shape) * ITEM_BYTES[dtype])
    pool = getattr(_thread, "pool", None)
    memory = _Lent(device, size) if pool is None else pool.lend(size)
    return DeviceArray(memory.pointer, dtype, shape, device.ordinal, memory, device.stream)


def asarray(values, *, dtype: str | None = None, device: Place) -> DeviceArray:
    """A copy of host values in the GPU's memory."""
    host = np.ascontiguousarray(values, dtype).reshape(np.shape(values))
    array = empty(host.shape, dtype=str(host.dtype), device=device)
    nvidia.copy(device.ordinal, array.pointer, host.ctypes.data, host.nbytes, device.stream)
    nvidia.wait_for(device.stream)  # until then `host` is read
    return array


def constant(values: np.ndarray, device: Place) -> DeviceArray:
    """Like `asarray`, for values that come again with every image: kept in the GPU's memory for the next time."""
    buffer = nvidia.upload(device.ordinal, values.tobytes())
    return DeviceArray(buffer.pointer, str(values.dtype), values.shape, device.ordinal, buffer, device.stream)


def with_last_repeated(name: str, array: Any, axis: int, count: int) -> DeviceArray:
    """A copy of an array in a GPU's memory, of any library, with its last row along `axis` there `count` times more."""
    x = view(name, array, stream := stream_of(array), ITEM_BYTES)
    rows = x.shape[axis] + count
    result = empty(
        (*x.shape[:axis], rows, *x.shape[axis + 1 :]), dtype=x.dtype, device=Place(x.ordinal, stream)
    )
    row = math.prod(x.shape[axis + 1 :]) * ITEM_BYTES[x.dtype]
    for outer in range(math.prod(x.shape[:axis])):
        to, source = result.pointer + outer * rows * row, x.pointer + outer * x.shape[axis] * row
        nvidia.copy(x.ordinal, to, source, x.shape[axis] * row, stream)
        for place in range(x.shape[axis], rows):
            nvidia.copy(x.ordinal, to + place * row, source + (x.shape[axis] - 1) * row, row, stream)
    return result


def to_host(array: Any) -> np.ndarray:
    """The values of an array as NumPy's: waits for them. A NumPy array is returned as it is."""
    if isinstance(array, np.ndarray):
        return array
    host = np.empty(array.shape, array.dtype)
    nvidia.copy(array.ordinal, host.ctypes.data, array.pointer, host.nbytes, array.stream)
    nvidia.wait_for(array.stream)
    return host


def all_finite(x: Any) -> bool:
    """Whether an array (B, ..., H, W), also one of NumPy's, holds neither NaN nor infinity. Waits for it on a GPU."""
    if isinstance(x, np.ndarray):
        return bool(np.isfinite(x).all())
    return bool(np.isfinite(to_host(sum_up_finiteness(x))).all())


def sum_up_finiteness(x: DeviceArray) -> DeviceArray:
    """Zeros (B, ...) for an array (B, ..., H, W), but NaN where there was NaN or infinity. Waits for nothing."""
    nothing = x - x  # 0, or NaN in these places; summed up where it lies, so that little crosses the bus
    return sum(sum(nothing, axis=-2), axis=-1)


# --- the array API


def isdtype(dtype: str, kind: str) -> bool:
    """Whether `dtype` is of the kind, of which "real floating" is the one known."""
    return kind == "real floating" and dtype.startswith(("float", "bfloat"))


def reshape(x: DeviceArray, shape) -> DeviceArray:
    """The same memory in another shape; one length may be -1."""
    lengths = list(shape)
    if -1 in lengths:
        lengths[lengths.index(-1)] = x.size // builtins.max(1, -math.prod(lengths))
    if math.prod(lengths) != x.size:
        raise ShapeError(f"{x.shape} cannot become {tuple(shape)}")
    return x.reshape(tuple(lengths))


def expand_dims(x: DeviceArray, *, axis: int) -> DeviceArray:
    """A new axis of length 1."""
    axis %= x.ndim + 1
    return x.reshape((*x.shape[:axis], 1, *x.shape[axis:]))


def squeeze(x: DeviceArray, axis: int) -> DeviceArray:
    """Without an axis of length 1."""
    axis %= x.ndim
    if x.shape[axis] != 1:
        raise ShapeError(f"axis {axis} of {x.shape} is not of length 1")
    return x.reshape((*x.shape[:axis], *x.shape[axis + 1 :]))


def permute_dims(x: DeviceArray, axes) -> DeviceArray:
    """The axes in another order."""
    strides = _strides(x.shape)
    shape = tuple(x.shape[axis] for axis in axes)
    return _launch(_COPY, shape, x, strides=[strides[axis] for axis in axes])


def astype(x: DeviceArray, dtype: str) -> DeviceArray:
    """Numbers as float32, or cut off to uint8, whose range they must be in."""
    if dtype not in (float32, uint8):
        raise EngineError(f"arrays on a GPU become float32 or uint8; got {dtype}")
    return x if dtype == x.dtype else _launch(_COPY, x.shape, x, dtype=dtype)


def exp(x: DeviceArray) -> DeviceArray:
    """e to the power of x."""
    return _launch(_EXP, x.shape, x)


def log(x: DeviceArray) -> DeviceArray:
    """Natural logarithm of x."""
    return _launch(_LOG, x.shape, x)


def round(x: DeviceArray) -> DeviceArray:
    """To the nearest whole number, halves to the even one."""
    return _launch(_ROUND, x.shape, x)


def clip(x: DeviceArray, min: float | None = None, max: float | None = None) -> DeviceArray:
    """x within the bounds."""
    x = x if min is None else _launch(_MAXIMUM, x.shape, x, min)
    return x if max is None else _launch(_MINIMUM, x.shape, x, max)


def sum(x: DeviceArray, *, axis: int, keepdims: bool = False) -> DeviceArray:
    """Along one axis."""
    return _reduce(_SUM, x, axis, keepdims)


def max(x: DeviceArray, *, axis: int, keepdims: bool = False) -> DeviceArray:
    """Along one axis."""
    return _reduce(_MAX, x, axis, keepdims)


def combine(operation: str, a: DeviceArray | float, b: DeviceArray | float) -> DeviceArray:
    """a + b, a - b, a * b or a / b, by its sign, with shapes broadcast; what `DeviceArray`'s operators are."""
    if not all(isinstance(x, (DeviceArray, int, float)) for x in (a, b)):
        return NotImplemented
    shapes = [getattr(x, "shape", ()) for x in (a, b)]
    try:
        shape = np.broadcast_shapes(*shapes)
    except ValueError as error:
        raise ShapeError(f"arrays of {shapes[0]} and {shapes[1]} do not go together") from error
    code = {"+": _ADD, "-": _SUBTRACT, "*": _MULTIPLY, "/": _DIVIDE}[operation]
    return _launch(code, shape, a, b)


def _launch(
    operation: int, shape, a: Any, b: Any = 0.0, *, dtype: str = float32, strides=None
) -> DeviceArray:
    like = a if isinstance(a, DeviceArray) else b
    result = empty(shape, dtype=dtype, device=like.device)
    if result.size == 0:
        return result
    if len(shape) > _AXES:
        raise ShapeError(f"arrays on a GPU have up to {_AXES} axes; got {shape}")
    operands = [_operand(x, shape, like.device.stream, strides if x is a else None) for x in (a, b)]
    sizes = (ctypes.c_int64 * _AXES)(*(1,) * (_AXES - len(shape)), *shape)
    problem = _Elementwise(result.pointer, *operands, sizes, result.size, operation, dtype == uint8)
    _run("piflow_elementwise", like, result.size, problem)
    return result


def _operand(x: Any, shape, stream: int, strides) -> _Operand:
    if not isinstance(x, DeviceArray):
        return _Operand(None, (ctypes.c_int64 * _AXES)(), float(x))
    x = view("an operand", x, stream, (float32,))
    if strides is None:
        strides = [0 if n == 1 else stride for n, stride in zip(x.shape, _strides(x.shape), strict=True)]
    padded = (ctypes.c_int64 * _AXES)(*(0,) * (_AXES - len(strides)), *strides)
    return _Operand(x.pointer, padded, 0.0)


def _reduce(operation: int, x: DeviceArray, axis: int, keepdims: bool) -> DeviceArray:
    axis %= x.ndim
    outer, length, inner = math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :])
    if length == 0:
        raise ShapeError(f"axis {axis} of {x.shape} holds nothing")
    spare = (1,) if keepdims else ()
    result = empty((*x.shape[:axis], *spare, *x.shape[axis + 1 :]), device=x.device)
    numbers = view("an operand", x, x.device.stream, (float32,))
    if result.size:
        _run(
            "piflow_reduce",
            x,
            result.size,
            _Reduce(result.pointer, numbers.pointer, outer, length, inner, operation),
        )
    return result


def _run(name: str, like: DeviceArray, count: int, problem) -> None:
    function = nvidia.kernel(like.ordinal, name, (), 0, SOURCE)
    nvidia.launch(like.ordinal, function, -(-count // _THREADS), _THREADS, 0, like.device.stream, problem)


def _strides(shape) -> list[int]:
    """Of C order, in numbers."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
