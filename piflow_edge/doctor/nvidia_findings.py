"""NVIDIA's software as `doctor` looks at it: driver, CUDA, cuDNN, TensorRT, JetPack, and what of it does not fit."""

import ctypes
import platform
import re
import sys
from pathlib import Path

from piflow_edge.engines.ort.importing import import_part
from piflow_edge.engines.trt import versions as trt_versions
from piflow_edge.errors import EngineError
from piflow_edge.runtime.drawing.acceleration import PIP_COMMAND, PIP_COMMAND_12, driver_cuda_version
from piflow_edge.system.hardware import ask_program, jetson_release, nvidia_gpus, read_text, versions

from .findings import OK, PROBLEM, WARNING, Finding, format_version, major

ORT_GPU = "onnxruntime-gpu"
PACKAGES = (
    ORT_GPU, "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "cuda-bindings", "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
)  # fmt: skip
_MODEL = Path("/proc/device-tree/model")
_POWER_MODES = Path("/etc/nvpmodel.conf")
# Of Jetson Linux (L4T): developer.nvidia.com/embedded/jetson-linux-archive names the JetPack of each release, and
# developer.nvidia.com/embedded/jetpack that of 39.
_JETPACKS = {32: 4, 34: 5, 35: 5, 36: 6, 38: 7, 39: 7}
# The first driver for a CUDA (CUDA's release notes, Linux), and the first onnxruntime-gpu on PyPI for CUDA 13 (what its
# extras require; 1.26 requires CUDA 12's). The first for aarch64 is for CUDA 13 too.
_DRIVERS = {12: "525", 13: "580"}
_FIRST_FOR_CUDA_13 = "1.27"


def nvidia_findings(installed: dict[str, str]) -> list[Finding]:
    """Each of NVIDIA's parts that is here or missing, against the driver and against what was built for it.

    Args:
        installed: versions of what of `PACKAGES` is installed.
    """
    gpus, driver_cuda = nvidia_gpus(), driver_cuda_version()
    wanted = [name for name in (ORT_GPU, "tensorrt") if name in installed]
    if driver_cuda is None:
        if gpus is None and not wanted:
            return [Finding("nvidia", OK, "no NVIDIA driver; networks and policies run on the CPU")]
        detail, fix = "no driver", "install NVIDIA's driver"
        if gpus is not None:  # as in a container that was given the one and not the other
            detail = f"nvidia-smi finds {gpus[0]['name']}, and the driver's library libcuda does not load"
            fix = "install NVIDIA's driver again; in a container: docker run --gpus all"
        if wanted:
            detail += f"; {' and '.join(wanted)} cannot use a GPU without it"
            fix += (
                f"; or stay on the CPU: pip uninstall -y {' '.join(wanted)} && pip install 'piflow-edge[cpu]'"
            )
        return [Finding("nvidia", PROBLEM, detail, fix)]
    names = ", ".join(f"{gpu['name']}, driver {gpu['driver_version']}" for gpu in gpus or [])
    findings = [Finding("nvidia", OK, f"{names or 'a driver'} for CUDA {format_version(driver_cuda)}")]
    if ORT_GPU in installed:
        built_for = onnxruntime_cuda()
        findings.append(cuda_finding(installed[ORT_GPU], built_for, driver_cuda))
        if _release_for(driver_cuda, built_for) is None:  # else another release comes with its own cuDNN
            findings.append(cudnn_finding(cudnn_version(), built_for))
    findings.append(tensorrt_finding(installed, driver_cuda))
    findings.append(compiler_finding(installed, driver_cuda))
    return findings


def cuda_finding(release: str, built_for: str | None, driver_cuda: tuple[int, int]) -> Finding:
    """Whether the driver can run the CUDA that onnxruntime-gpu was built for."""
    here, runtime = f"onnxruntime-gpu {release}", cuda_runtime_version()
    if built_for is None:
        return Finding("cuda", OK, f"{here} does not say for which CUDA it was built")
    detail = f"{here} is built for CUDA {built_for}, the driver for CUDA {format_version(driver_cuda)}"
    if fix := _release_for(driver_cuda, built_for):
        return Finding("cuda", PROBLEM, detail, fix)
    if runtime is None or major(runtime) != major(built_for):
        found = f"CUDA {runtime}" if runtime else "no CUDA runtime"
        return Finding("cuda", PROBLEM, f"{detail}; {found} was found", _with_libraries(release))
    return Finding("cuda", OK, f"{detail}; CUDA runtime {runtime}")


def _release_for(driver_cuda: tuple[int, int], built_for: str | None) -> str | None:
    """How to come by an onnxruntime-gpu for this driver; None where the one that is here is for it."""
    if built_for is None or major(built_for) <= driver_cuda[0]:
        return None
    # What is no command stands behind a #, so that the line can be pasted as it is.
    if platform.machine() == "aarch64":
        return f"pip uninstall -y {ORT_GPU} && pip install 'piflow-edge[cpu]'  # for aarch64 there is none for CUDA 12"
    needed = _DRIVERS.get(major(built_for))
    return (
        f"pip install 'onnxruntime-gpu[cuda,cudnn]<{_FIRST_FOR_CUDA_13}'  # or an NVIDIA driver for CUDA "
        f"{major(built_for)}{f' ({needed} or newer)' if needed else ''}"
    )


def cudnn_finding(release: str | None, built_for: str | None) -> Finding:
    """Whether there is a cuDNN of the major version that every onnxruntime-gpu since 1.19 loads."""
    package = f"nvidia-cudnn-cu{major(built_for) if built_for else 12}"
    command = f"pip install '{package}==9.*'"
    if release is None:
        return Finding("cudnn", PROBLEM, "not found; ONNX Runtime's CUDA needs cuDNN 9", command)
    if major(release) != 9:
        return Finding("cudnn", PROBLEM, f"{release}, and ONNX Runtime's CUDA needs cuDNN 9", command)
    return Finding("cudnn", OK, release)


def tensorrt_finding(installed: dict[str, str], driver_cuda: tuple[int, int]) -> Finding:
    """Whether TensorRT loads, is a release we know, and is made for the driver's CUDA."""
    release, library = installed.get("tensorrt"), tensorrt_library()
    if release is None:
        if library is not None:  # JetPack's, or a Debian package's
            detail = (
                f"TensorRT {library} is on this machine, and this environment does not see its Python part"
            )
            return Finding("tensorrt", WARNING, detail, "python3 -m venv --system-site-packages .venv")
        command = "pip install 'piflow-edge[tensorrt]'"
        if jetson_release() is not None:
            command = "sudo apt-get install nvidia-jetpack"
        return Finding("tensorrt", OK, f"not installed; get it with: {command}")
    for made_for in (12, 13):
        if f"tensorrt-cu{made_for}" in installed and made_for > driver_cuda[0]:
            names = (
                f"tensorrt tensorrt-cu{made_for} tensorrt-cu{made_for}-bindings tensorrt-cu{made_for}-libs"
            )
            return Finding("tensorrt", PROBLEM, f"{release} for CUDA {made_for}, and the driver is for CUDA "
                           f"{format_version(driver_cuda)}", f"pip uninstall -y {names} && pip install tensorrt-cu"
                           f"{driver_cuda[0]}")  # fmt: skip
    try:
        trt_versions.api(trt_versions.tensorrt().__version__)
    except EngineError as error:
        return Finding("tensorrt", PROBLEM, str(error), "pip install 'tensorrt>=10,<12'")
    except ImportError as error:
        command = f"pip install --force-reinstall tensorrt=={release}"
        if jetson_release() is not None:  # there it is JetPack's
            command = "sudo apt-get install --reinstall tensorrt python3-libnvinfer"
        return Finding("tensorrt", PROBLEM, f"{release} does not load: {error.__cause__ or error}", command)
    return Finding("tensorrt", OK, release)


def compiler_finding(installed: dict[str, str], driver_cuda: tuple[int, int]) -> Finding:
    """Whether what compiles the CUDA kernel is there, and of a CUDA that the driver, (major, minor), can load."""
    compilers = [n for n in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12") if n in installed]
    command = PIP_COMMAND_12 if driver_cuda[0] == 12 else PIP_COMMAND
    if "cuda-bindings" not in installed or not compilers:
        return Finding("cuda kernel", WARNING, "cuda-bindings or NVRTC is not installed", command)
    newest = max(major(installed[name]) for name in compilers)
    detail = f"NVRTC of CUDA {newest}, driver for CUDA {format_version(driver_cuda)}"
    if newest > driver_cuda[0]:
        return Finding("cuda kernel", PROBLEM, f"{detail}, which cannot load what that compiles", command)
    return Finding("cuda kernel", OK, detail)


def missing_library(provider: Path, release: str) -> tuple[str, str] | None:
    """What the loader says a provider of onnxruntime-gpu lacks, and the command that brings it; None if nothing.

    Libraries are of no use without a driver, or with one that is too old for them.
    """
    try:
        shared = provider.with_name(provider.name.replace(provider.stem.rpartition("_")[2], "shared"))
        ctypes.CDLL(str(shared), mode=ctypes.RTLD_GLOBAL)  # in which the other finds what it calls
        ctypes.CDLL(str(provider))
    except OSError as error:
        reason = str(error)
    else:
        return None
    if (driver_cuda := driver_cuda_version()) is None:
        return reason, "install NVIDIA's driver"
    if fix := _release_for(driver_cuda, onnxruntime_cuda()):
        return reason, fix
    if library := re.search(r"lib(nvinfer|nvonnxparser)\w*\.so\.(\d+)", reason):
        return reason, f"pip install 'tensorrt=={library[2]}.*'"
    return reason, _with_libraries(release)


def _with_libraries(release: str) -> str:
    return f"pip install 'onnxruntime-gpu[cuda,cudnn]=={release}'"


def jetson_findings() -> list[Finding]:
    """A Jetson's JetPack, and whether its power mode holds it back; nothing elsewhere."""
    if (text := jetson_release()) is None:
        return []
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    jetpack = release and _JETPACKS.get(int(release[1]))
    model = (read_text(_MODEL) or "a Jetson").rstrip("\0")
    linux = f"Jetson Linux {release[1]}.{release[2]}" if release else text
    detail = f"{model}, JetPack {jetpack or 'unknown'} ({linux})"
    if jetpack is not None and jetpack < 6:
        fix = "flash JetPack 6 or newer, or stay on the CPU with a Python of 3.10 or newer"
        detail += ": its Python and CUDA are too old for the GPU"
        return [Finding("jetson", WARNING, detail, fix), _power_mode()]
    return [Finding("jetson", OK, detail), _power_mode()]


def _power_mode() -> Finding:
    answer = ask_program("nvpmodel", "-q") or ""
    mode = re.search(r"NV Power Mode: (\S+)", answer)
    if mode is None:
        return Finding("power mode", WARNING, "nvpmodel does not tell it", "sudo nvpmodel -q")
    if mode[1].startswith("MAXN"):
        return Finding("power mode", OK, mode[1])
    # "< POWER_MODEL ID=0 NAME=MAXN >"; of MAXN and MAXN_SUPER the latter is the larger.
    modes = re.findall(r"^\s*<\s*POWER_MODEL ID=(\d+) NAME=(MAXN\w*)", read_text(_POWER_MODES) or "", re.M)
    largest = max(modes, key=lambda found: len(found[1]), default=("ID", ""))[0]
    where = "" if modes else f"  # ID: that of the largest mode in {_POWER_MODES}"
    return Finding("power mode", WARNING, f"{mode[1]} limits the clocks",
                   f"sudo nvpmodel -m {largest} && sudo jetson_clocks{where}")  # fmt: skip


def onnxruntime_cuda() -> str | None:
    """The CUDA that the onnxruntime-gpu installed here was built for, such as "13.0"; None if it does not say."""
    try:
        build_and_package_info = import_part("capi.build_and_package_info")
    except ImportError:
        return None
    return getattr(build_and_package_info, "cuda_version", None) or None


def cuda_runtime_version() -> str | None:
    """Of the CUDA runtime that pip installed, else of the one on the library path; None without either."""
    if packaged := versions(("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12")):
        return next(iter(packaged.values()))
    for _, library in _libraries("cudart64_{}.dll", "libcudart.so.{}", (13, 12, 11)):
        number = ctypes.c_int()
        library.cudaRuntimeGetVersion(ctypes.byref(number))
        return format_version((number.value // 1000, number.value % 1000 // 10))
    return None


def cudnn_version() -> str | None:
    """Of the cuDNN that pip installed, else of the one on the library path; None without either."""
    if packaged := versions(("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")):
        return next(iter(packaged.values()))
    for generation, library in _libraries("cudnn64_{}.dll", "libcudnn.so.{}", (9, 8)):
        library.cudnnGetVersion.restype = ctypes.c_size_t
        return parts(library.cudnnGetVersion(), 10000 if generation >= 9 else 1000)
    return None


def tensorrt_library() -> str | None:
    """Of the TensorRT on the library path; None without one."""
    for generation, library in _libraries("nvinfer_{}.dll", "libnvinfer.so.{}", (11, 10, 8)):
        library.getInferLibVersion.restype = ctypes.c_int32
        return parts(library.getInferLibVersion(), 10000 if generation >= 10 else 1000)
    return None


def parts(number: int, unit: int) -> str:
    """ "9.1.0" of 90100, whose major version counts in units of 10,000; "8.9.2" of 8902, in units of 1,000."""
    return format_version((number // unit, number % unit // 100, number % 100))


def _libraries(windows: str, linux: str, generations):
    """(number in its name, library) of those on the library path."""
    for number in generations:
        try:
            yield number, ctypes.CDLL((windows if sys.platform == "win32" else linux).format(number))
        except OSError:
            continue
