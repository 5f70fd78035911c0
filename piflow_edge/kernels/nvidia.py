"""NVIDIA's driver and run-time compiler, and no more of them than is needed: launches, memory, streams, graphs.

`cuda-bindings` alone, not `cuda-core` on top of it: it comes with every recent torch for CUDA, and this is
all that is wanted of it. Everything is imported when first used. Errors leave as `EngineError`.
"""

import ctypes
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from piflow_edge.errors import EngineError

PIP_COMMAND = "pip install cuda-bindings nvidia-cuda-nvrtc"
PIP_COMMAND_12 = "pip install 'cuda-bindings==12.*' nvidia-cuda-nvrtc-cu12"

SOURCE = Path(__file__).with_name("rollout.cu")
HEADERS = ("gm_rollout.h", "lanes.h")

# Of contracted products the CPU's kernels know nothing: without them both round alike, to the last bit.
OPTIONS = ("-std=c++17", "--fmad=false")


@dataclass(frozen=True)
class Device:
    """What a kernel is compiled and cut to."""

    arch: str  # "sm_90"
    multiprocessors: int
    shared_bytes: int  # that one block may have, at most

    @property
    def compute_capability(self) -> str:
        """As NVIDIA's tables have it: "9.0"."""
        return f"{self.arch[3:-1]}.{self.arch[-1]}"


def _bindings(name: str):
    """A module of NVIDIA's `cuda.bindings`."""
    try:
        return import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise EngineError(
            f"a GPU of NVIDIA's needs the package cuda-bindings; get it with: {PIP_COMMAND}{also_lacks_driver()}"
        ) from error


@cache
def _nvrtc():
    nvrtc = _bindings("nvrtc")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the bindings are there, the library they bind is not
        raise EngineError(
            f"kernel 'cuda' needs NVIDIA's run-time compiler NVRTC; get it with: {PIP_COMMAND}"
            f" (with CUDA 12: {PIP_COMMAND_12})"
        ) from error
    return nvrtc


def driver_cuda_version() -> tuple[int, int] | None:
    """(major, minor) of the CUDA that the NVIDIA driver is made for; None without a driver."""
    number = ctypes.c_int()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        if driver.cuDriverGetVersion(ctypes.byref(number)) != 0 or not number.value:
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def also_lacks_driver() -> str:
    """What an error adds that tells how to get a library for GPUs: that the driver is missing too. Else nothing."""
    return "" if driver_cuda_version() else " (and an NVIDIA driver must come first: this machine has none)"


@cache
def _driver():
    driver = _bindings("driver")
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError as error:
        raise EngineError(
            "this needs an NVIDIA driver, and this machine has none; install it, or stay on the CPU: kernel 'cpu', "
            "engine 'ort-cpu'"
        ) from error
    if status:
        raise EngineError(f"this needs an NVIDIA GPU that answers; its driver says {status.name}")
    return driver


def check_available() -> None:
    """Raise the `EngineError` that says what is missing, if NVRTC, the driver or the GPU is."""
    _nvrtc()
    _driver()


def missing() -> str | None:
    """What this machine lacks for the CUDA kernels, and what to do; None if it has all."""
    try:
        check_available()
    except EngineError as error:
        return str(error)
    return None


def _done(result: tuple) -> Any:
    """Unwrap what the bindings return: a status, then what was asked for."""
    status, *values = result
    if status:
        raise EngineError(f"CUDA refused: {status.name}")
    return values[0] if values else None


def versions() -> tuple[str, str]:
    """Of NVRTC, and of the CUDA that the driver is made for."""
    return _nvrtc_version(), driver_version()


def driver_version() -> str:
    """Of the CUDA that the driver is made for: "12.6"."""
    number = _done(_driver().cuDriverGetVersion())
    return f"{number // 1000}.{number % 1000 // 10}"


def _nvrtc_version() -> str:
    return ".".join(map(str, _nvrtc().nvrtcVersion()[1:]))


@cache
def compile_source(arch: str, defines: tuple[str, ...], source: Path = SOURCE) -> bytes:
    """A .cu file as machine code for an architecture such as "sm_90"; needs neither driver nor GPU."""
    nvrtc = _nvrtc()
    headers = [SOURCE.with_name(name).read_bytes() for name in HEADERS]
    names = [name.encode() for name in HEADERS]
    program = _done(
        nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), len(headers), headers, names)
    )
    try:
        options = [f"--gpu-architecture={arch}", *OPTIONS, *(f"-D{define}" for define in defines)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status:
            log = b" " * _done(nvrtc.nvrtcGetProgramLogSize(program))
            _done(nvrtc.nvrtcGetProgramLog(program, log))
            raise EngineError(
                f"NVRTC {_nvrtc_version()} cannot compile the kernel for {arch}; a newer one may: {PIP_COMMAND}"
                f"\n{log.rstrip(bytes(1)).decode(errors='replace').strip()}"
            )
        code = b" " * _done(nvrtc.nvrtcGetCUBINSize(program))
        _done(nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@cache
def device(ordinal: int) -> Device:
    """The facts about one GPU."""
    driver = _driver()
    handle, kind = _done(driver.cuDeviceGet(ordinal)), driver.CUdevice_attribute

    def fact(name):
        return _done(driver.cuDeviceGetAttribute(getattr(kind, f"CU_DEVICE_ATTRIBUTE_{name}"), handle))

    return Device(
        arch=f"sm_{fact('COMPUTE_CAPABILITY_MAJOR')}{fact('COMPUTE_CAPABILITY_MINOR')}",
        multiprocessors=fact("MULTIPROCESSOR_COUNT"),
        shared_bytes=fact("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
    )


@cache
def _context(ordinal: int):
    driver = _driver()  # the primary one: that of torch, CuPy and ONNX Runtime
    return _done(driver.cuDevicePrimaryCtxRetain(_done(driver.cuDeviceGet(ordinal))))


@contextmanager
def current(ordinal: int):
    """Make a GPU the calling thread's, and give back the one it had."""
    driver = _driver()
    _done(driver.cuCtxPushCurrent(_context(ordinal)))
    try:
        yield driver
    finally:
        driver.cuCtxPopCurrent()


@cache
def kernel(ordinal: int, name: str, defines: tuple[str, ...], shared_bytes: int, source: Path = SOURCE):
    """A kernel of a .cu file, compiled and loaded for this GPU; kept for the life of the process."""
    image = ctypes.create_string_buffer(compile_source(device(ordinal).arch, defines, source))
    with current(ordinal) as driver:
        status, module = driver.cuModuleLoadData(ctypes.addressof(image))
        if status:
            nvrtc, cuda = versions()
            raise EngineError(
                f"the driver, of CUDA {cuda}, cannot load what NVRTC {nvrtc} made ({status.name});"
                f" take an NVRTC of the driver's version, for CUDA 12: {PIP_COMMAND_12}"
            )
        function = _done(driver.cuModuleGetFunction(module, name.encode()))
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _done(driver.cuFuncSetAttribute(function, most, shared_bytes))
    return function


def launch(
    ordinal: int, function, blocks: int, threads: int, shared_bytes: int, stream: int, problem
) -> None:
    """Queue a kernel that takes one struct by value; `stream` is a CUstream as a number."""
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(problem))  # copied before the call returns
    with current(ordinal) as driver:
        grid = (blocks, 1, 1, threads, 1, 1, shared_bytes)
        _done(driver.cuLaunchKernel(function, *grid, driver.CUstream(stream), ctypes.addressof(arguments), 0))


# `postponed`: what this thread gives back once it has recorded. Within, the driver would call the recording off, and
# Python may collect old arrays at any point. `held`: see `holding`.
_thread = threading.local()


@contextmanager
def _nothing_given_back():
    _thread.postponed = postponed = []
    try:
        yield
    finally:
        _thread.postponed = None
        for give_back in postponed:
            give_back()


# Held by who asks the driver for memory, or gives some back.
_alone = threading.RLock()


@contextmanager
def nothing_else():
    """Keep all threads from asking the driver for memory: it would spoil what another library records meanwhile."""
    with _alone, _nothing_given_back():
        yield


def is_recording() -> bool:
    """Whether the calling thread records a CUDA graph: nothing may be waited for, and all memory stays."""
    return getattr(_thread, "postponed", None) is not None


@contextmanager
def holding(held: list):
    """Collect in `held` what the work that is queued meanwhile uses, for as long as it may be done again."""
    _thread.held = held
    try:
        yield
    finally:
        _thread.held = None


def hold(*used: object) -> None:
    """Say what the work that is being queued uses; see `holding`."""
    if (held := getattr(_thread, "held", None)) is not None:
        held.extend(used)


def _give_back(owner, ordinal: int, call: Callable[..., object], handle) -> weakref.finalize:
    """Let `call(driver, handle)` give back what `owner` holds: once, when called or when `owner` is gone.

    Not at the end of the process: the driver takes everything back then, and modules and contexts that the call needs
    may be gone. A `__del__` would run all the same, and fail.
    """

    def give_back() -> None:
        if (postponed := getattr(_thread, "postponed", None)) is not None:
            postponed.append(give_back)
            return
        with _alone, current(ordinal) as driver:
            call(driver, handle)

    finalizer = weakref.finalize(owner, give_back)
    finalizer.atexit = False
    return finalizer


class Memory:
    """Bytes in a GPU's memory, at the number `pointer`; given back by `free` or with the object.

    Raises:
        EngineError: there is not as much.
    """

    def __init__(self, ordinal: int, size: int):
        self.ordinal, self.size, self.pointer = ordinal, size, 0
        with _alone, current(ordinal) as driver:
            status, pointer = driver.cuMemAlloc(size)
            if status:
                free, total = memory(ordinal)
                raise EngineError(
                    f"GPU {ordinal} has {free >> 20} of its {total >> 20} MiB free and cannot give {size / 2**20:.1f} "
                    f"more ({status.name}); use smaller batches, or end what else runs on it"
                )
        self.pointer = int(pointer)
        self._free = _give_back(self, ordinal, lambda driver, at: driver.cuMemFree(at), self.pointer)

    def free(self) -> None:
        """Give it back, once the GPU has done what was queued. May be called twice."""
        self.pointer = 0
        self._free()


class _Buffer(Memory):
    def __init__(self, ordinal: int, data: bytes):
        super().__init__(ordinal, len(data))
        with _alone, current(ordinal) as driver:
            host = ctypes.create_string_buffer(data, len(data))
            _done(driver.cuMemcpyHtoD(self.pointer, ctypes.addressof(host), len(data)))
        wait_for(
            0
        )  # the copy may still be on its way, and the caller's stream does not wait for the default one


class PinnedMemory:
    """Bytes of the machine's memory which a GPU reads and writes by itself, while the CPU goes on.

    `bytes`: a view of them. Whoever queued a copy waits for it before these are written, or read, again.
    """

    def __init__(self, ordinal: int, size: int):
        with _alone, current(ordinal) as driver:
            self.pointer = int(_done(driver.cuMemHostAlloc(size, 0)))
        self.size = size
        self.bytes = (ctypes.c_char * size).from_address(self.pointer)
        self._free = _give_back(self, ordinal, lambda driver, at: driver.cuMemFreeHost(at), self.pointer)


def upload(ordinal: int, data: bytes) -> _Buffer:
    """`data` in the GPU's memory. Kept, for schedules come again with every image, and need no copy then."""
    buffer = _uploaded(ordinal, data)
    hold(buffer)
    return buffer


_uploaded = lru_cache(maxsize=64)(_Buffer)


def ordinal_in(device: str) -> int:
    """Number of the GPU that a device such as "cuda:1" names; 0 where it names none."""
    return int(device.partition(":")[2] or 0)


def ordinal_of(pointer: int) -> int:
    """The GPU that a pointer belongs to."""
    driver = _driver()
    kind = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    status, ordinal = driver.cuPointerGetAttribute(kind, pointer)
    if status:
        raise EngineError(f"an array does not lie in GPU memory: {status.name}")
    return int(ordinal)


def wait_for(stream: int) -> None:
    """Let all that was queued on a stream finish."""
    driver = _driver()
    _done(driver.cuStreamSynchronize(driver.CUstream(stream)))


def memory(ordinal: int) -> tuple[int, int]:
    """Bytes of a GPU's memory: free, and in all."""
    with current(ordinal) as driver:
        status, free, total = driver.cuMemGetInfo()
        _done((status,))
        return int(free), int(total)


@cache
def name(ordinal: int) -> str:
    """What its maker calls a GPU: "NVIDIA GeForce RTX 4090"."""
    driver = _driver()
    handle = _done(driver.cuDeviceGet(ordinal))
    return _done(driver.cuDeviceGetName(256, handle)).partition(b"\0")[0].decode(errors="replace").strip()


@cache
def shares_memory(ordinal: int) -> bool:
    """Whether a GPU's memory is the machine's, as on Jetson."""
    driver = _driver()
    kind = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED
    return bool(_done(driver.cuDeviceGetAttribute(kind, _done(driver.cuDeviceGet(ordinal)))))


def copy(ordinal: int, to: int, source: int, size: int, stream: int) -> None:
    """Queue a copy of `size` bytes between two addresses, either of which may be the machine's own memory."""
    with current(ordinal) as driver:
        _done(driver.cuMemcpyAsync(to, source, size, driver.CUstream(stream)))


def fill(ordinal: int, to: int, byte: int, size: int, stream: int) -> None:
    """Queue that `size` bytes from an address on become `byte`."""
    with current(ordinal) as driver:
        _done(driver.cuMemsetD8Async(to, byte, size, driver.CUstream(stream)))


class Stream:
    """A queue of a GPU's work, beside the default one. `handle`: as a number."""

    def __init__(self, ordinal: int):
        self.ordinal, self.handle = ordinal, 0
        with current(ordinal) as driver:
            flag = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
            self.handle = int(_done(driver.cuStreamCreate(flag)))
        self._destroy = _give_back(
            self, ordinal, lambda driver, queue: driver.cuStreamDestroy(driver.CUstream(queue)), self.handle
        )

    def close(self) -> None:
        """Give it back; what is queued is still done. May be called twice."""
        self.handle = 0
        self._destroy()


def after(ordinal: int, stream: int, other: int) -> None:
    """Let what is queued on `stream` from now on wait for all that is queued on `other` so far."""
    with current(ordinal) as driver:
        event = _done(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        try:
            _done(driver.cuEventRecord(event, driver.CUstream(other)))
            _done(driver.cuStreamWaitEvent(driver.CUstream(stream), event, 0))
        finally:
            driver.cuEventDestroy(event)  # the driver keeps it until it is over


class Recording:
    """Work for a GPU in a CUDA graph, to be queued again and again by one cheap call.

    Args:
        ordinal: the GPU.
        stream: on which `work` queues; not the default one. Nothing is done while it is recorded.
        work: queues what is to be recorded, all of it at fixed addresses.

    Raises:
        EngineError: it did something that cannot be recorded.
    """

    def __init__(self, ordinal: int, stream: int, work: Callable[[], None]):
        self.ordinal = ordinal
        with _nothing_given_back(), current(ordinal) as driver:
            queue = driver.CUstream(stream)
            # Of this thread alone: others may allocate meanwhile.
            mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            _done(driver.cuStreamBeginCapture(queue, mode))
            try:
                work()
            finally:
                result = driver.cuStreamEndCapture(queue)  # always, or the stream is of no more use
            graph = _done(result)
            try:
                self._executable = _done(driver.cuGraphInstantiate(graph, 0))
            finally:
                driver.cuGraphDestroy(graph)
        self._destroy = _give_back(
            self, ordinal, lambda driver, executable: driver.cuGraphExecDestroy(executable), self._executable
        )

    def launch(self, stream: int) -> None:
        """Queue it on any stream."""
        with current(self.ordinal) as driver:
            _done(driver.cuGraphLaunch(self._executable, driver.CUstream(stream)))

    def free(self) -> None:
        """Give its memory back, once it has run. May be called twice."""
        self._executable = None
        self._destroy()
