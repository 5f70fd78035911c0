"""What this machine has, what is missing, and the exact command that mends it."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal

from piflow_edge.bundle.folder import Bundle, demo_bundle
from piflow_edge.engines import DEFAULT_OPTIONS, EngineOptions, placement
from piflow_edge.engines.ort import importing as ort_package
from piflow_edge.engines.ort import sessions as ort
from piflow_edge.engines.ort.messages import plain_reason
from piflow_edge.errors import BundleError, EngineError, MissingExtraError, PiFlowError
from piflow_edge.policies import POLICIES, PolicySpec
from piflow_edge.runtime.drawing.acceleration import integrate, isas, missing
from piflow_edge.runtime.residence.memory_needs import advise, estimate_memory, is_short_of_memory
from piflow_edge.system.cache_folder import cache_folder
from piflow_edge.system.hardware import (
    free_memory,
    jetson_release,
    nvidia_gpus,
    power_state,
    read_text,
    versions,
)

from .findings import OK, PROBLEM, WARNING, Finding
from .nvidia_findings import PACKAGES as NVIDIA_PACKAGES
from .nvidia_findings import driver_cuda_version, jetson_findings, missing_library, nvidia_findings
from .package_findings import package_findings, prompts_finding, python_finding

_PACKAGES = (
    "piflow-edge", "numpy", "pillow", "click", "rich", "array-api-compat", *ort_package.PACKAGES, "openvino",
    *NVIDIA_PACKAGES[1:], "torch", "onnx", "diffusers", "tokenizers",
)  # fmt: skip
# Sends the network to a cloud service; nothing here uses it, and it loads without one.
_REMOTE_PROVIDERS = {"AzureExecutionProvider"}
# The kernel computes in float32 and the reference here in float64, over 16 substeps on values of about 1.
_SELF_TEST_TOLERANCE = 1e-4
_PROVIDER_LIBRARY = "libonnxruntime_providers_{}.so"
_CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")
# With these drivers "powersave" is the usual governor and follows the load; what holds it back is their preference.
_SCALE_THEMSELVES = ("intel_pstate", "amd-pstate-epp")


def diagnose(bundle: os.PathLike | str | None = None, **engine: Any) -> list[Finding]:
    """Look at Python, packages, providers, kernels, NVIDIA's software, Jetson, the cache, and run a self-test.

    Nothing is installed or set, and torch is not imported. What is wrong is a finding, not an error.

    Args:
        bundle: verified here; None is the one that comes with the package.
        engine: `engine`, `device` and `options` for `load`.

    Returns:
        A finding or several for each, in this order.
    """
    installed = versions(_PACKAGES)
    if crash_of_runtime() is not None:
        engine = {"engine": "reference"}  # the rest is still worth knowing
    findings = [
        python_finding(sys.version_info[:3]),
        *package_findings(installed),
        prompts_finding(installed),
        runtime_finding(installed),
        *telemetry_finding(installed),
        *provider_findings(installed),
        kernel_finding(),
        *nvidia_findings(installed),
        *jetson_findings(),
        *power_findings(),
        cache_finding(cache_folder()),
        rollout_finding(),
    ]
    bundle = demo_bundle() if bundle is None else bundle
    room = memory_finding(bundle, **engine)
    # What does not fit is not tried: the system would end this process, or others.
    tried = [bundle_finding(bundle, **engine)] if room is None or room.status != PROBLEM else []
    return [*findings, *([room] if room else []), *tried]


def runtime_finding(installed: dict[str, str]) -> Finding:
    """Whether ONNX Runtime is there, and once: all of its packages write into the same folder."""
    names = [name for name in ort_package.PACKAGES if name in installed]
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


def telemetry_finding(installed: dict[str, str]) -> list[Finding]:
    """Whether ONNX Runtime's telemetry is off, as piflow-edge leaves it unless the user has asked for it."""
    if not any(name in installed for name in ort_package.PACKAGES):
        return []
    variable = ort_package.TELEMETRY_VARIABLE
    if ort_package.is_telemetry_off():
        return [Finding("telemetry", OK, "off: piflow-edge turns ONNX Runtime's off before it is loaded")]
    detail = f"{variable}={os.environ[variable]} leaves it on: ONNX Runtime from 1.29 on sends usage data"
    return [Finding("telemetry", WARNING, detail, f"unset {variable}")]


def provider_findings(installed: dict[str, str]) -> list[Finding]:
    """Which of ONNX Runtime's providers really load: each is given a network to open and run."""
    packages = [name for name in ort_package.PACKAGES if name in installed]
    if not packages:
        return []
    command = f"pip install --force-reinstall {' '.join(packages)}"
    if packages[1:]:
        command = runtime_finding(installed).fix
    if (reason := crash_of_runtime()) is not None:
        detail = f"onnxruntime ends the process that imports it, with {reason}"
        return [Finding("providers", PROBLEM, detail, command)]
    try:
        onnxruntime = ort_package.import_onnxruntime()
    except MissingExtraError as error:
        return [Finding("providers", PROBLEM, f"onnxruntime cannot be imported: {error.__cause__}", command)]
    if hasattr(onnxruntime, "preload_dlls"):  # as the engine does: finds CUDA and cuDNN where pip puts them
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()
    names = [name for name in onnxruntime.get_available_providers() if name not in _REMOTE_PROVIDERS]
    with ort_package.silence(onnxruntime):  # what goes wrong is said in the findings
        return [_provider_finding(onnxruntime, name) for name in names]


@cache
def crash_of_runtime() -> str | None:
    """The signal that ends a process which imports onnxruntime, such as SIGILL; None where it lives.

    A library cut short, or made for another processor, ends the process and leaves no word.
    """
    program = "from piflow_edge.engines.ort.importing import import_onnxruntime as load; load()"
    code = subprocess.run([sys.executable, "-c", program], capture_output=True).returncode
    if code >= 0:  # on Windows always: there a crash shows as the number of an exception
        return f"error {code:#x}" if code > 0xFFFF else None
    return signal.Signals(-code).name


def _provider_finding(onnxruntime, name: str) -> Finding:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    x = np.array([1.5], np.float32)
    try:
        with placement.watch_placement(onnxruntime, options) as counted:
            # Without `enable_fallback=0` it prints what went wrong and takes the CPU's.
            session = onnxruntime.InferenceSession(
                identity_model(), options, providers=[name], enable_fallback=0
            )
            # A provider that cannot load its libraries is left out in silence, and the CPU's takes its place.
            loaded = name in session.get_providers()
            runs = loaded and counted(session)[name] > 0
        works = loaded and session.run(None, {"x": x})[0] == x
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        works, reason = False, plain_reason(error)
    else:
        reason = "it gave another result" if loaded else "its libraries were not found"
    if works:
        # So does OpenVINO before 1.24, which wants more than a node.
        left = "loads, and leaves a network of one node to the CPU"
        return Finding(name, OK, "opens and runs a network" if runs else left)
    from piflow_edge.engines.ort import cuda_sessions as ort_cuda  # late: knows GPUs

    backends = (*ort.BACKENDS, *ort_cuda.BACKENDS)
    fixes = {backend.provider: f"pip install {backend.package}" for backend in backends}
    fix = fixes.get(name, "use another provider")
    if name == "CPUExecutionProvider":
        fix = "pip install --force-reinstall onnxruntime"
    if found := _missing_library(onnxruntime, name):
        reason, fix = found
    # Without the CPU nothing runs. Of the others some machine has each; but who has a GPU and the package for it means
    # to use it.
    meant = name == "CUDAExecutionProvider" and driver_cuda_version() is not None
    status = PROBLEM if name == "CPUExecutionProvider" or meant else WARNING
    return Finding(name, status, f"does not work: {reason}", fix)


def _missing_library(onnxruntime, name: str) -> tuple[str, str] | None:
    kinds = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "tensorrt"}
    if name not in kinds or sys.platform != "linux":
        return None
    library = Path(onnxruntime.__file__).parent / "capi" / _PROVIDER_LIBRARY.format(kinds[name])
    return missing_library(library, onnxruntime.__version__) if library.exists() else None


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
    if (reason := missing()) is None:
        return Finding("cpu kernel", OK, f"compiled; this processor runs {', '.join(isas())}")
    what, _, command = reason.partition("; ")
    return Finding("cpu kernel", WARNING, f"{what}: NumPy does the work, more slowly", command)


def power_findings() -> list[Finding]:
    """Clocks and governor, as far as this machine tells; one that saves power slows every figure."""
    if jetson_release() is not None:  # its power mode says more
        return []
    state = {
        name: value for name, value in power_state().items() if value is not None and name != "nvidia_gpus"
    }
    detail = ", ".join(f"{name} {value}" for name, value in state.items())
    if state.get("cpu_governor") == "powersave":
        if read_text(_CPUFREQ / "scaling_driver") not in _SCALE_THEMSELVES:
            return [Finding("power", WARNING, detail, "sudo cpupower frequency-set -g performance")]
        preference = read_text(_CPUFREQ / "energy_performance_preference")
        if preference == "power":
            return [
                Finding(
                    "power",
                    WARNING,
                    f"{detail}, which prefers to save power",
                    "sudo cpupower set --epp balance_performance",
                )
            ]
    return [Finding("power", OK, detail or "this machine tells nothing of its clocks")]


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


def rollout_finding() -> Finding:
    """Policies and rollout on this machine, as they would run, against the formulas in float64."""
    errors = {kind: _rollout_error(spec()) for kind, spec in POLICIES.items()}
    kernel = "the compiled kernel" if missing() is None else "NumPy"
    worst = max(errors.values(), key=lambda error: np.inf if np.isnan(error) else error)
    detail = f"rollouts by {kernel} are within {worst:.1e} of the formulas in float64"
    if worst <= _SELF_TEST_TOLERANCE:  # NaN does not pass
        return Finding("rollouts", OK, detail)
    return Finding(
        "rollouts", PROBLEM, f"{detail}; {_SELF_TEST_TOLERANCE:.0e} is allowed",
        "pip install --force-reinstall --no-deps --no-cache-dir piflow-edge",
    )  # fmt: skip


def _rollout_error(spec: PolicySpec) -> float:
    """Greatest difference between a small rollout in float32, as `auto` runs it, and the reference in float64."""
    random = np.random.default_rng(0)
    x_src = random.standard_normal((2, 3, 8, 8))
    shapes = zip(spec.outputs, spec.output_shapes((3, 8, 8)), strict=True)
    outputs = {name: random.standard_normal((2, *shape)) for name, shape in shapes}
    sigmas = np.linspace(1.0, 0.25, 17)

    def end(dtype, kernel):
        state = x_src.astype(dtype)
        policy = spec.policy({name: array.astype(dtype) for name, array in outputs.items()}, state, 1.0)
        return integrate(policy, state, sigmas, kernel=kernel)

    return float(np.abs(end(np.float32, "auto") - end(np.float64, "reference")).max())


def memory_finding(
    bundle: os.PathLike | str,
    engine: str = "auto",
    device: str | None = None,
    options: EngineOptions = DEFAULT_OPTIONS,
) -> Finding | None:
    """Whether a bundle fits into what is free on a CPU; None where nobody tells. Arguments as of `load`."""
    free = free_memory()
    try:
        opened = Bundle(bundle)
        needs = estimate_memory(opened)
    except PiFlowError:  # the self-test says what is wrong with it
        return None
    if free is None:
        return None
    needed = needs.one if options.keep == "one" else needs.all
    detail = f"{opened.name!r} needs about {decimal(needed)} on a CPU, {decimal(free)} are free"
    if not is_short_of_memory(engine, device, needed, free):
        return Finding("memory", OK, detail)
    advice = advise(opened, free)
    fix = (
        f"piflow-edge sample {bundle} {advice} ..."
        if advice
        else "close other programs, or export in fewer bits"
    )
    return Finding("memory", PROBLEM, detail, fix)


def bundle_finding(bundle: os.PathLike | str, **engine: Any) -> Finding:
    """Whether a bundle reproduces its golden samples here; see `verification.verify`. `engine`: for `load`."""
    from piflow_edge.runtime.loading import load
    from piflow_edge.runtime.verification import check, verify

    command = f"piflow-edge verify {bundle}"
    if bundle == demo_bundle():
        command = "pip install --force-reinstall --no-deps --no-cache-dir piflow-edge"
    try:
        with load(bundle, **engine) as generator:
            check(verify(generator), generator.bundle.name)
    except PiFlowError as error:
        # Where it is the engine that is missing, its error says what to do.
        hint = re.search(r"(?:get it with|get the libraries with|once): (.+)", str(error))
        if isinstance(error, EngineError | MissingExtraError):
            # What stands in brackets after the command is in the message too.
            command = hint[1].partition(" (")[0] if hint else "use another --engine or --device"
        elif isinstance(error, BundleError) and bundle != demo_bundle():
            command = "copy the bundle again, or export it again"
        return Finding("self-test", PROBLEM, str(error), command)
    return Finding(
        "self-test", OK, f"{generator.bundle.name!r} reproduces its golden samples on {generator.engine.name}"
    )
