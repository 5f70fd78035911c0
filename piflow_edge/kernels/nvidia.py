"""NVIDIA's Python packages, and no more of them than a rollout needs: compile, load, upload, launch.

`cuda-bindings` alone, not `cuda-core` on top of it: it comes with every recent torch for CUDA, and this is
all that is wanted of it. Everything is imported when first used. Errors leave as `EngineError`.
"""

import ctypes
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path

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


def _bindings(name: str):
    """A module of NVIDIA's `cuda.bindings`."""
    try:
        return import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise EngineError(
            f"kernel 'cuda' needs NVIDIA's package cuda-bindings; get it with: {PIP_COMMAND}"
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


@cache
def _driver():
    driver = _bindings("driver")
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError as error:
        raise EngineError(
            "kernel 'cuda' needs an NVIDIA driver, and this machine has none; install it, or use kernel 'cpu'"
        ) from error
    if status:
        raise EngineError(f"kernel 'cuda' needs an NVIDIA GPU that answers; its driver says {status.name}")
    return driver


def check_available() -> None:
    """Raise the `EngineError` that says what is missing, if NVRTC, the driver or the GPU is."""
    _nvrtc()
    _driver()


def _done(result: tuple):
    """Unwrap what the bindings return: a status, then what was asked for."""
    status, *values = result
    if status:
        raise EngineError(f"CUDA refused: {status.name}")
    return values[0] if values else None


def versions() -> tuple[str, str]:
    """Of NVRTC, and of the CUDA that the driver is made for."""
    number = _done(_driver().cuDriverGetVersion())
    return _nvrtc_version(), f"{number // 1000}.{number % 1000 // 10}"


def _nvrtc_version() -> str:
    return ".".join(map(str, _nvrtc().nvrtcVersion()[1:]))


@cache
def compiled(arch: str, defines: tuple[str, ...]) -> bytes:
    """rollout.cu as machine code for an architecture such as "sm_90"; needs neither driver nor GPU."""
    nvrtc = _nvrtc()
    headers = [SOURCE.with_name(name).read_bytes() for name in HEADERS]
    names = [name.encode() for name in HEADERS]
    program = _done(
        nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), b"rollout.cu", len(headers), headers, names)
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
def kernel(ordinal: int, name: str, defines: tuple[str, ...], shared_bytes: int):
    """A kernel of rollout.cu, compiled and loaded for this GPU; kept for the life of the process."""
    image = ctypes.create_string_buffer(compiled(device(ordinal).arch, defines))
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


class _Buffer:
    def __init__(self, ordinal: int, data: bytes):
        self.ordinal = ordinal
        with current(ordinal) as driver:
            self.pointer = int(_done(driver.cuMemAlloc(len(data))))
            host = ctypes.create_string_buffer(data, len(data))
            _done(driver.cuMemcpyHtoD(self.pointer, ctypes.addressof(host), len(data)))
            # The copy may still be on its way, and the caller's stream does not wait for the default one.
            _done(driver.cuStreamSynchronize(driver.CUstream(0)))

    def __del__(self):
        # Waits for kernels that still read it. When the process ends the driver may be gone already.
        if hasattr(self, "pointer") and not sys.is_finalizing():
            with current(self.ordinal) as driver:
                driver.cuMemFree(self.pointer)


@lru_cache(maxsize=64)
def uploaded(ordinal: int, data: bytes) -> _Buffer:
    """`data` in the GPU's memory. Kept, for schedules come again with every image, and need no copy then."""
    return _Buffer(ordinal, data)


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
