"""What this machine has, what is missing, and the exact command that mends it."""

import ctypes
import os
import platform
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from piflow_edge.engines import ort

from .cache import cache_folder
from .errors import PiFlowError
from .hardware import nvidia_gpus, power_state
from .integrator import integrate
from .kernels import cpu, nvidia
from .policies import DXPolicy, GMPolicy

OK, WARNING, PROBLEM = "ok", "warning", "problem"

# Versions that pyproject.toml promises and CI runs.
_PYTHON = ((3, 10), (3, 13))
_PACKAGES = (
    "piflow-edge", "numpy", "pillow", "click", "rich", "array-api-compat", *ort.PACKAGES, "tensorrt",
    "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "torch", "onnx", "diffusers",
)  # fmt: skip
_ORT_GPU = "onnxruntime-gpu"
# Sends the network to a cloud service; nothing here uses it, and it loads without one.
_REMOTE_PROVIDERS = {"AzureExecutionProvider"}
# The kernel computes in float32 and the reference here in float64, over 16 substeps on values of about 1.
_SELF_TEST_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `status`: ok, warning or problem. `fix`: a command or a step, None if ok."""

    subject: str
    status: str
    detail: str
    fix: str | None = None


def diagnose(bundle: os.PathLike | str | None = None, **engine: Any) -> list[Finding]:
    """Look at Python, packages, providers, kernels, NVIDIA's software, Jetson, the cache, and run a self-test.

    Nothing is installed or set, and torch is not imported.

    Args:
        bundle: also verified here; None leaves it at the kernels' self-test.
        engine: `engine`, `device` and `options` for `load`.
    """
    installed = versions(_PACKAGES)
    findings = [
        python_finding(sys.version_info),
        Finding("packages", OK, ", ".join(f"{name} {number}" for name, number in installed.items())),
        runtime_finding(installed),
        *provider_findings(installed),
        kernel_finding(),
        *nvidia_findings(installed),
        power_finding(),
        cache_finding(cache_folder()),
        self_test(),
    ]
    if bundle is not None:
        findings.append(bundle_finding(bundle, **engine))
    return findings


def versions(names: Sequence[str]) -> dict[str, str]:
    """Those of the packages that are installed, with their version, without importing them."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def python_finding(running: Sequence[int]) -> Finding:
    """Whether this Python, as (major, minor, ...), is one that piflow-edge is made for."""
    low, high = _PYTHON
    detail = f"{'.'.join(map(str, running[:3]))} on {platform.system()} {platform.machine()}"
    if tuple(running[:2]) < low:
        return Finding("python", PROBLEM, detail, f"use Python {low[0]}.{low[1]} to {high[0]}.{high[1]}")
    if tuple(running[:2]) > high:
        return Finding(
            "python",
            WARNING,
            f"{detail}; tested up to {high[0]}.{high[1]}",
            f"python{high[0]}.{high[1]} -m venv .venv",
        )
    return Finding("python", OK, detail)


def runtime_finding(installed: dict[str, str]) -> Finding:
    """Whether ONNX Runtime is there, and once: all of its packages write into the same folder."""
    names = [name for name in ort.PACKAGES if name in installed]
    here = [f"{name} {installed[name]}" for name in names]
    if len(here) > 1:
        extra = "cuda" if nvidia_gpus() else "cpu"
        return Finding(
            "onnxruntime", PROBLEM, f"{' and '.join(here)} are all installed and overwrite each other",
            f"pip uninstall -y {' '.join(names)} && pip install 'piflow-edge[{extra}]'",
        )  # fmt: skip
    if not here:
        return Finding("onnxruntime", PROBLEM, "not installed", "pip install 'piflow-edge[cpu]'")
    return Finding("onnxruntime", OK, here[0])


def provider_findings(installed: dict[str, str]) -> list[Finding]:
    """Which of ONNX Runtime's providers really load: each is given a network to open and run."""
    packages = [name for name in ort.PACKAGES if name in installed]
    if not packages:
        return []
    try:
        import onnxruntime
    except ImportError as error:
        command = f"pip install --force-reinstall {packages[-1]}"
        return [Finding("providers", PROBLEM, f"onnxruntime cannot be imported: {error}", command)]
    names = [name for name in onnxruntime.get_available_providers() if name not in _REMOTE_PROVIDERS]
    return [_provider_finding(onnxruntime, name) for name in names]


def _provider_finding(onnxruntime, name: str) -> Finding:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is said below
    x = np.array([1.5], np.float32)
    try:
        # Without `enable_fallback=0` it prints what went wrong and takes the CPU's.
        session = onnxruntime.InferenceSession(identity_model(), options, providers=[name], enable_fallback=0)
        # A provider that cannot load its libraries is left out in silence, and the CPU's takes its place.
        loaded = name in session.get_providers()
        works = loaded and session.run(None, {"x": x})[0] == x
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        loaded, works, reason = False, False, f": {error}"
    else:
        reason = "" if loaded else ": its libraries were not found"
    if works:
        return Finding(name, OK, "opens and runs a network")
    fixes = {backend.provider: f"pip install {backend.package}" for backend in ort.BACKENDS}
    fixes |= {
        "CPUExecutionProvider": "pip install --force-reinstall onnxruntime",
        "TensorrtExecutionProvider": "pip install tensorrt",
    }
    # Without the CPU nothing runs; of the others some machine has each.
    status = PROBLEM if name == "CPUExecutionProvider" else WARNING
    return Finding(name, status, f"does not work{reason}", fixes.get(name, "use another provider"))


def identity_model() -> bytes:
    """An ONNX model y = x, float32 (1,), written by hand: `onnx` is not needed at run time.

    Field numbers are those of onnx.proto; all lengths are below 128, so that each is one byte.
    """

    def field(number: int, body: bytes) -> bytes:
        assert len(body) < 128
        return bytes([number << 3 | 2, len(body)]) + body

    def count(number: int, value: int) -> bytes:
        return bytes([number << 3, value])

    tensor = count(1, 1) + field(2, field(1, count(1, 1)))  # elem_type FLOAT, shape of one dim, 1
    value = field(2, field(1, tensor))  # TypeProto.tensor_type
    node = field(1, b"x") + field(2, b"y") + field(4, b"Identity")
    graph = (
        field(1, node)
        + field(2, b"g")
        + field(11, field(1, b"x") + value)
        + field(12, field(1, b"y") + value)
    )
    return count(1, 8) + field(7, graph) + field(8, field(1, b"") + count(2, 17))  # IR 8, opset 17


def kernel_finding() -> Finding:
    """Whether the compiled CPU kernels are there, with which instruction sets, or why not."""
    if (reason := cpu.missing()) is None:
        return Finding("cpu kernel", OK, f"compiled; this processor runs {', '.join(cpu.isas())}")
    what, _, command = reason.partition("; ")
    return Finding("cpu kernel", WARNING, f"{what}: NumPy does the work, more slowly", command)


def nvidia_findings(installed: dict[str, str]) -> list[Finding]:
    """NVIDIA's driver, CUDA, cuDNN, TensorRT and the CUDA kernel's compiler, and what of them does not fit."""
    gpus, driver_cuda = nvidia_gpus(), driver_cuda_version()
    wanted = [name for name in (_ORT_GPU, "tensorrt") if name in installed]
    if driver_cuda is None:
        detail = "no driver"
        if gpus is None and not wanted:
            return [Finding("nvidia", OK, "no NVIDIA driver; networks and policies run on the CPU")]
        if wanted:
            detail += f", and {' and '.join(wanted)} cannot run without one"
        return [Finding("nvidia", PROBLEM, detail, "install NVIDIA's driver, or: pip install 'piflow-edge[cpu]' in an "
                        "environment of its own")]  # fmt: skip
    names = ", ".join(f"{gpu['name']}, driver {gpu['driver_version']}" for gpu in gpus or [])
    libraries = {"cuDNN": cudnn_version(), "TensorRT": installed.get("tensorrt")}
    rest = "".join(f", {name} {number}" for name, number in libraries.items() if number)
    findings = [Finding("nvidia", OK, f"{names or 'a driver'} for CUDA {dotted(driver_cuda)}{rest}")]
    if _ORT_GPU in installed and libraries["cuDNN"] is None:
        command = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
        findings.append(Finding("cuDNN", WARNING, "not found; ONNX Runtime's CUDA needs it", command))
    findings.append(compiler_finding(installed, driver_cuda))
    return findings


def compiler_finding(installed: dict[str, str], driver_cuda: tuple[int, int]) -> Finding:
    """Whether what compiles the CUDA kernel is there, and of a CUDA that the driver, (major, minor), can load."""
    compilers = [n for n in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12") if n in installed]
    command = nvidia.PIP_COMMAND_12 if driver_cuda[0] == 12 else nvidia.PIP_COMMAND
    if "cuda-bindings" not in installed or not compilers:
        return Finding("cuda kernel", WARNING, "cuda-bindings or NVRTC is not installed", command)
    newest = max(int(re.match(r"\d+", installed[name])[0]) for name in compilers)
    detail = f"NVRTC of CUDA {newest}, driver for CUDA {dotted(driver_cuda)}"
    if newest > driver_cuda[0]:
        return Finding("cuda kernel", PROBLEM, f"{detail}, which cannot load what that compiles", command)
    return Finding("cuda kernel", OK, detail)


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


def cudnn_version() -> str | None:
    """Of the cuDNN that pip installed, else of the one on the library path; None without either."""
    if packaged := versions(("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")):
        return next(iter(packaged.values()))
    for major in (9, 8):
        try:
            library = ctypes.CDLL(
                f"cudnn64_{major}.dll" if sys.platform == "win32" else f"libcudnn.so.{major}"
            )
        except OSError:
            continue
        library.cudnnGetVersion.restype = ctypes.c_size_t
        number = library.cudnnGetVersion()
        unit = 10000 if major >= 9 else 1000  # 90100 is 9.1.0, 8902 is 8.9.2
        return dotted((number // unit, number % unit // 100, number % 100))
    return None


def dotted(numbers: Sequence[int]) -> str:
    """(12, 4) as "12.4"."""
    return ".".join(map(str, numbers))


def power_finding() -> Finding:
    """Clocks and power modes, as far as this machine tells; a governor that saves power slows every figure."""
    state = {name: value for name, value in power_state().items() if value is not None}
    detail = ", ".join(f"{name} {value}" for name, value in state.items() if name != "nvidia_gpus")
    if state.get("cpu_governor") == "powersave" and "jetson_release" not in state:
        return Finding("power", WARNING, detail, "sudo cpupower frequency-set -g performance")
    return Finding("power", OK, detail or "this machine tells nothing of its clocks")


def cache_finding(folder: Path) -> Finding:
    """Whether files can be kept in `folder`, or in what will be its parent; nothing is left behind."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"piflow-edge")
    except OSError as error:
        reason = error.strerror or error
        return Finding(
            "cache",
            PROBLEM,
            f"{folder} cannot be written: {reason}",
            "export PIFLOW_EDGE_CACHE=a/folder/of/yours",
        )
    return Finding("cache", OK, f"{folder} can be written")


def self_test() -> Finding:
    """Policies and rollout on this machine, as they would run, against the formulas in float64."""
    errors = {kind: _rollout_error(kind) for kind in ("gm", "dx")}
    kernel = "the compiled kernel" if cpu.missing() is None else "NumPy"
    worst = max(errors.values(), key=lambda error: np.inf if np.isnan(error) else error)
    detail = f"rollouts by {kernel} are within {worst:.1e} of the formulas in float64"
    if worst <= _SELF_TEST_TOLERANCE:  # NaN does not pass
        return Finding("self-test", OK, detail)
    return Finding(
        "self-test", PROBLEM, f"{detail}; {_SELF_TEST_TOLERANCE:.0e} is allowed",
        "pip install --force-reinstall --no-deps --no-cache-dir piflow-edge",
    )  # fmt: skip


def _rollout_error(kind: str) -> float:
    """Greatest difference between a small rollout in float32, as `auto` runs it, and the reference in float64."""
    random = np.random.default_rng(0)
    x_src = random.standard_normal((2, 3, 8, 8))
    if kind == "gm":
        means = random.standard_normal((2, 4, 3, 8, 8))
        outputs = (means, random.standard_normal((2, 4, 1, 8, 8)), np.full((2, 1, 1, 1, 1), -1.0))
    else:
        outputs = (random.standard_normal((2, 5, 3, 8, 8)),)
    sigmas = np.linspace(1.0, 0.25, 17)

    def end(dtype, kernel):
        arrays = [array.astype(dtype) for array in (*outputs, x_src)]
        policy = GMPolicy(*arrays, 1.0) if kind == "gm" else DXPolicy(*arrays, 1.0, segment_size=1.0)
        return integrate(policy, arrays[-1], sigmas, kernel=kernel)

    return float(np.abs(end(np.float32, "auto") - end(np.float64, "reference")).max())


def bundle_finding(bundle: os.PathLike | str, **engine: Any) -> Finding:
    """Whether a bundle reproduces its golden samples here; see `verification.verify`. `engine`: for `load`."""
    from .generator import load
    from .verification import check, verify

    command = f"piflow-edge verify {bundle}"
    try:
        generator = load(bundle, **engine)
        check(verify(generator), generator.bundle.name)
    except PiFlowError as error:
        return Finding("bundle", PROBLEM, str(error), command)
    return Finding(
        "bundle", OK, f"{generator.bundle.name!r} reproduces its golden samples on {generator.engine.name}"
    )
