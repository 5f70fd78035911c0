"""Arrays in GPU memory, of any library: torch, `__cuda_array_interface__` (CuPy, Numba), DLPack (the rest).

Nothing is copied, and no library is imported.
"""

import ctypes
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from piflow_edge.errors import EngineError, ShapeError

from . import nvidia

# Number formats a kernel reads; as `Format` in rollout.cu.
FORMATS = {"float32": 0, "float16": 1, "bfloat16": 2}

_TYPESTRS = {
    "<f4": "float32", "<f2": "float16", "<i4": "int32", "<i8": "int64", "|i1": "int8", "|u1": "uint8", "|b1": "bool",
}  # fmt: skip
_TYPESTR_OF = {dtype: typestr for typestr, dtype in _TYPESTRS.items()}
# Of one number; all formats that an array may have.
ITEM_BYTES = {dtype: int(typestr[2:]) for typestr, dtype in _TYPESTRS.items()} | {"bfloat16": 2}
_DLPACK_TYPES = {
    (2, 32): "float32", (2, 16): "float16", (4, 16): "bfloat16",
    (0, 32): "int32", (0, 64): "int64", (0, 8): "int8", (1, 8): "uint8", (6, 8): "bool",
}  # fmt: skip
_DLPACK_GPUS = (2, 13)  # kDLCUDA, kDLCUDAManaged
_LEGACY_STREAM = 1  # how DLPack and __cuda_array_interface__ call CUDA's stream 0


@dataclass(frozen=True)
class DeviceView:
    """A contiguous array in GPU memory, of whatever library.

    `owner` keeps the memory alive. `stream`: where its values are still being written, None for nowhere. CuPy, torch
    and Numba read it where it lies: `torch.as_tensor(array, device="cuda")`.
    """

    pointer: int
    dtype: str
    shape: tuple[int, ...]
    ordinal: int
    owner: Any
    stream: int | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype not in _TYPESTR_OF:  # bfloat16; then it has no such attribute
            raise AttributeError(f"__cuda_array_interface__ has no name for {self.dtype}")
        stream = _LEGACY_STREAM if self.stream == 0 else self.stream
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": _TYPESTR_OF[self.dtype],
            "data": (self.pointer, False),
            "strides": None,
            "stream": stream,
        }


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def is_on_gpu(array: Any) -> bool:
    """Whether `array` lies in the memory of an NVIDIA GPU."""
    if isinstance(array, DeviceView):
        return True
    if _is_torch(array):
        return array.is_cuda
    if hasattr(array, "__cuda_array_interface__"):
        return True
    return hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] in _DLPACK_GPUS


def stream_of(array: Any) -> int:
    """The stream that `array`'s library is queueing work on just now; CUDA's default if it does not say."""
    if _is_torch(array):
        import torch  # a torch tensor came in: it is loaded already

        return torch.cuda.current_stream(array.device).cuda_stream
    stream = getattr(array, "__cuda_array_interface__", {}).get("stream")
    return 0 if stream in (None, _LEGACY_STREAM) else stream


def view(name: str, array: Any, stream: int, formats: Collection[str] = tuple(FORMATS)) -> DeviceView:
    """Where and what `array` is, ready to be read or written by work on `stream`.

    Raises:
        EngineError: it does not lie in GPU memory.
        ShapeError: it is not contiguous, or not of one of the `formats`.
    """
    if not is_on_gpu(array):
        raise EngineError(f"this takes arrays in GPU memory; {name} is a {type(array).__name__} elsewhere")
    if isinstance(array, DeviceView):
        if array.stream not in (None, stream):
            nvidia.wait_for(array.stream)
        found, contiguous = array, True
    elif _is_torch(array):
        dtype = str(array.dtype).removeprefix("torch.")
        found = DeviceView(array.data_ptr(), dtype, tuple(array.shape), array.device.index, array)
        contiguous = array.is_contiguous()
    elif hasattr(array, "__cuda_array_interface__"):
        found, contiguous = _from_interface(array, stream)
    else:
        found, contiguous = _from_dlpack(array, stream)
    if found.dtype not in formats:
        raise ShapeError(f"{name} must be {', '.join(formats)} on a GPU; got {found.dtype}")
    if not contiguous:
        raise ShapeError(f"{name} must be C-contiguous on a GPU; got other strides for {found.shape}")
    return found


def _from_interface(array, stream):
    interface = array.__cuda_array_interface__
    shape, typestr = tuple(interface["shape"]), interface["typestr"]
    theirs = interface.get("stream")
    if theirs is not None and theirs not in (stream, stream or _LEGACY_STREAM):
        nvidia.wait_for(theirs)  # its values are still being written there
    pointer, _ = interface["data"]
    found = DeviceView(pointer, _TYPESTRS.get(typestr) or typestr, shape, nvidia.ordinal_of(pointer), array)
    size = int(typestr[2:])
    strides = interface.get("strides")
    return found, strides is None or _is_contiguous(shape, tuple(stride / size for stride in strides))


def _from_dlpack(array, stream):
    # Its library makes `stream` wait for the values. The capsule is read, never consumed: it frees itself.
    capsule = array.__dlpack__(stream=stream or _LEGACY_STREAM)
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _DLTensor.from_address(get_pointer(capsule, b"dltensor"))
    dtype = _DLPACK_TYPES.get((tensor.code, tensor.bits), f"DLPack type {tensor.code} of {tensor.bits} bits")
    shape = tuple(tensor.shape[: tensor.ndim])
    contiguous = not tensor.strides or _is_contiguous(shape, tuple(tensor.strides[: tensor.ndim]))
    pointer = (tensor.data or 0) + tensor.byte_offset
    return DeviceView(pointer, dtype, shape, tensor.device_id, (array, capsule)), contiguous


def _is_contiguous(shape, strides) -> bool:
    """Whether `strides`, in numbers, are those of C order; an axis of one number may have any."""
    expected = (math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return all(n == 1 or have == want for n, have, want in zip(shape, strides, expected, strict=True))


def _is_torch(array) -> bool:
    return type(array).__module__.partition(".")[0] == "torch"
