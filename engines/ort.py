"""ONNX Runtime: one class for each of its providers, none of which may give way to another in silence."""

import contextlib
import io
import logging
import os
import sys
import threading
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import numpy as np

from piflow_edge.engines import Choice, EngineOptions, Graph
from piflow_edge.errors import EngineError, MissingExtraError
from piflow_edge.kernels.device_arrays import DeviceArray, is_on_gpu, view

log = logging.getLogger(__name__)

_CPU_PROVIDER = "CPUExecutionProvider"
# Distributions of ONNX Runtime. Each fills the same folder, so that of two the last one installed wins, half and half.
PACKAGES = (
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-trt-rtx",
)  # fmt: skip


def runtime(package: str = "'piflow-edge[cpu]'", engine: str = "ort-cpu"):
    """The onnxruntime module.

    Args:
        package: what pip is told to install, for the error.
        engine: that needs it, for the error.

    Raises:
        MissingExtraError: it is not installed, or cannot be imported.
    """
    try:
        import onnxruntime
    except ImportError as error:
        here = "" if isinstance(error, ModuleNotFoundError) else f", and what is here does not load ({error})"
        raise MissingExtraError(
            f"engine {engine!r} needs onnxruntime{here}; get it with: pip install {package}"
        ) from error
    return onnxruntime


def installed() -> list[str]:
    """Which of ONNX Runtime's `PACKAGES` are installed."""
    found = []
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            distribution(name)
            found.append(name)
    return found


# Of arrays that lie on a GPU; and as ONNX Runtime calls them.
_BINDABLE = ("float32", "float16", "int64")
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
}


class OrtEngine:
    """A network in ONNX Runtime; subclasses name the provider.

    Args:
        graph: an ONNX model.
        device: of the provider's.
        options: threads and memory.

    Raises:
        MissingExtraError: onnxruntime, or the package of it that has the provider, is not installed.
        EngineError: the provider cannot run here, or cannot run the graph.
    """

    name: str
    provider: str
    package: str  # as pip is told it
    max_batch: int | None = None
    choice = Choice("it was asked for")
    # What must be at hand besides the package, for the error where the provider does not load.
    needs = "it"
    # The one `sys.platform` it exists for; None is any.
    system: str | None = None
    # Whether two calls may be under way at a time.
    concurrent = True

    def __init__(self, graph: Graph, device: str, options: EngineOptions):
        ort = self.installed_runtime()
        self.device, self._options = device, options
        self._lock = contextlib.nullcontext() if self.concurrent else threading.Lock()
        self._session = self._opened(ort, graph)
        self._outputs = [output.name for output in self._session.get_outputs()]

    @classmethod
    def installed_runtime(cls):
        """The onnxruntime module, which has the provider.

        Raises:
            MissingExtraError: it is not installed, or without the provider.
            EngineError: the provider is of another system.
        """
        if (reason := cls._elsewhere()) is not None:
            raise EngineError(reason)
        ort = runtime(cls.package, cls.name)
        if (reason := cls._missing(ort)) is not None:
            raise MissingExtraError(reason)
        return ort

    @classmethod
    def obstacle(cls, graph: Graph, device: str, options: EngineOptions) -> str | None:
        """See `Engine`."""
        try:
            return cls._elsewhere() or cls._missing(runtime(cls.package, cls.name))
        except MissingExtraError as error:
            return str(error)

    @classmethod
    def _elsewhere(cls) -> str | None:
        if cls.system in (None, sys.platform):
            return None
        return f"engine {cls.name!r} needs {cls.needs}, and this is {sys.platform}: use engine 'auto'"

    @classmethod
    def _missing(cls, ort) -> str | None:
        if cls.provider in ort.get_available_providers():
            return None
        here = installed()
        remove = f"pip uninstall -y {' '.join(here)} && " if here else ""
        several = f"{' and '.join(here)} are both installed and overwrite each other; " if here[1:] else ""
        return (
            f"engine {cls.name!r} needs ONNX Runtime's {cls.provider}, and the onnxruntime {ort.__version__} installed "
            f"here lacks it; {several}get it with: {remove}pip install {cls.package}"
        )

    def _provider_options(self, graph: Graph) -> dict[str, str]:
        return {}

    def _settings(self, ort):
        settings, options = ort.SessionOptions(), self._options
        settings.log_severity_level = 4  # errors reach the caller as exceptions; the rest is chatter
        settings.intra_op_num_threads = threads = options.threads
        settings.inter_op_num_threads = 1
        settings.enable_cpu_mem_arena = options.memory_arena
        settings.enable_mem_pattern = options.memory_pattern and options.memory_arena
        spinning = "1" if options.spinning else "0"
        settings.add_session_config_entry("session.intra_op.allow_spinning", spinning)
        settings.add_session_config_entry("session.inter_op.allow_spinning", spinning)
        if options.cpu_affinity and threads > 1:
            # All its threads but the calling one, which `run` sees to; ONNX Runtime counts cores from 1.
            cores = ",".join(str(core + 1) for core in options.cpu_affinity)
            settings.add_session_config_entry(
                "session.intra_op_thread_affinities", ";".join([cores] * (threads - 1))
            )
        return settings

    def _opened(self, ort, graph: Graph):
        settings = self._settings(ort)
        _give_weights(settings, graph)
        is_cpu = self.provider == _CPU_PROVIDER
        if not is_cpu:
            settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        providers = [(self.provider, self._provider_options(graph))]
        try:
            # Without `enable_fallback=0` it would print an error and go on with the CPU.
            session = ort.InferenceSession(graph.model, settings, providers=providers, enable_fallback=0)
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            what = "the network" if is_cpu else f"the network with {self.provider} (which needs {self.needs})"
            raise EngineError(f"onnxruntime {ort.__version__} cannot open {what}: {error}") from error
        if self.provider not in session.get_providers():
            raise EngineError(
                f"engine {self.name!r} cannot run here: onnxruntime {ort.__version__} left {self.provider} out, "
                f"because its libraries or its device did not load, as it says on stderr; it needs {self.needs}; get "
                f"the libraries with: pip install {self.package}"
            )
        if not is_cpu:
            self._check_assignment(session)
        # The session keeps the file's bytes to open itself again with other providers, which is not done here.
        if getattr(session, "_model_bytes", None) is not None:
            session._model_bytes = None
        return session

    def _check_assignment(self, session) -> None:
        """Refuse a provider that took no node: the whole network would run on the CPU."""
        if not hasattr(session, "get_provider_graph_assignment_info"):  # onnxruntime before 1.24
            return
        counts: dict[str, int] = {}
        for part in session.get_provider_graph_assignment_info():
            counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
        ours, total = counts.get(self.provider, 0), sum(counts.values())
        if total and not ours:
            raise EngineError(
                f"engine {self.name!r} cannot run this network: {self.provider} took none of its {total} nodes, all "
                "would run on the CPU; use engine 'ort-cpu'"
            )
        log.info("engine %r took %d of %d nodes; the rest runs on the CPU", self.name, ours, total)

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """One network call."""
        if (session := self._session) is None:
            raise EngineError(f"engine {self.name!r} is closed; open the network again")
        try:
            with self._lock, _on_cores(self._options.cpu_affinity):
                return dict(zip(self._outputs, session.run(self._outputs, inputs), strict=True))
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise EngineError(f"the network call failed in onnxruntime: {error}") from error

    def close(self) -> None:
        """Free the network's memory, once calls that are under way have ended."""
        self._session = None


@contextlib.contextmanager
def _on_cores(cores: tuple[int, ...] | None):
    """Keep the calling thread, which computes too, on some cores for a while."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)  # 0: of this thread
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class OrtCPU(OrtEngine):
    """ONNX Runtime's own kernels for the CPU."""

    name = "ort-cpu"
    provider = _CPU_PROVIDER
    package = "'piflow-edge[cpu]'"


class OrtOpenVINO(OrtEngine):
    """Intel's OpenVINO: CPU, GPU or NPU."""

    name = "openvino"
    provider = "OpenVINOExecutionProvider"
    package = "onnxruntime-openvino"
    needs = "a processor, GPU or NPU of Intel's, and for the last two its driver"

    def _provider_options(self, graph: Graph) -> dict[str, str]:
        kind, _, number = self.device.partition(":")
        device = kind.upper() + (f".{number}" if number else "")
        # "ACCURACY" keeps the graph's own types; left alone, OpenVINO rounds to bfloat16 where that is faster.
        options = {"device_type": device, "precision": "ACCURACY"}
        return options | ({"num_of_threads": str(self._options.threads)} if kind == "cpu" else {})


class OrtCoreML(OrtEngine):
    """Apple's Core ML."""

    name = "coreml"
    provider = "CoreMLExecutionProvider"
    package = "'piflow-edge[cpu]'"
    needs = "macOS 12 or newer"
    system = "darwin"

    def _provider_options(self, graph: Graph) -> dict[str, str]:
        units = {"any": "ALL", "npu": "CPUAndNeuralEngine", "gpu": "CPUAndGPU", "cpu": "CPUOnly"}
        return {"ModelFormat": "MLProgram", "MLComputeUnits": units[self.device]}


class OrtDirectML(OrtEngine):
    """Any GPU with a driver for DirectX 12, on Windows."""

    name = "directml"
    provider = "DmlExecutionProvider"
    package = "onnxruntime-directml"
    needs = "Windows 10 1903 or newer and a driver for DirectX 12"
    system = "win32"
    concurrent = False  # ONNX Runtime's documentation forbids it

    def _provider_options(self, graph: Graph) -> dict[str, str]:
        return {"device_id": self.device.partition(":")[2] or "0"}

    def _settings(self, ort):
        settings = super()._settings(ort)
        settings.enable_mem_pattern = False  # DirectML refuses it
        return settings


class OrtCUDA(OrtEngine):
    """NVIDIA GPUs by cuDNN and cuBLAS.

    Arrays in the GPU's memory are bound where they lie, and results stay there: the network runs on the stream of the
    rollout kernels, and nothing is waited for.
    """

    name = "ort-cuda"
    provider = "CUDAExecutionProvider"
    package = "'onnxruntime-gpu[cuda,cudnn]'"
    needs = "an NVIDIA driver, CUDA and cuDNN 9, of the versions that `piflow-edge doctor` tells"
    memory = "cuda"  # as ONNX Runtime calls it

    @property
    def ordinal(self) -> int:
        """Number of the GPU."""
        return int(self.device.partition(":")[2] or 0)

    def _provider_options(self, graph: Graph) -> dict[str, str]:
        return self._gpu_options() | {
            # Of the graph's own precision: TF32 has 11 bits, and who wants fewer than float32's 24 takes fp16.
            "use_tf32": "0",
            # Exhaustive search, the default, tries each convolution for seconds at every new size.
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",
        }

    def _gpu_options(self) -> dict[str, str]:
        options = {"device_id": str(self.ordinal)}
        if self._place is not None:
            options |= {"has_user_compute_stream": "1", "user_compute_stream": str(self._place.stream)}
        return options

    def _opened(self, ort, graph: Graph):
        if hasattr(ort, "preload_dlls"):  # onnxruntime 1.21: finds CUDA and cuDNN as pip installs them
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what it did not find
                ort.preload_dlls()
        from piflow_edge.kernels import gpu_arrays  # late: for GPUs only

        self._place = gpu_arrays.place_of(self.device)
        self._run_options = ort.RunOptions()
        # Else ONNX Runtime waits for the stream at the end of every call.
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return super()._opened(ort, graph)

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """One network call. With any input in the GPU's memory, the outputs stay there."""
        if not any(is_on_gpu(array) for array in inputs.values()):
            return super().run(inputs)
        if (session := self._session) is None:
            raise EngineError(f"engine {self.name!r} is closed; open the network again")
        from piflow_edge.kernels import gpu_arrays  # there is a GPU, or no input could lie on one

        place = self._place or gpu_arrays.place(self.ordinal)
        binding = session.io_binding()
        # Bound, not copied: what is made for this call must last until it is queued.
        arrays = {name: self._bound(name, array, place) for name, array in inputs.items()}
        try:
            for name, array in arrays.items():
                dtype = np.dtype(array.dtype)
                binding.bind_input(name, self.memory, self.ordinal, dtype, array.shape, array.pointer)
            for name in self._outputs:
                binding.bind_output(name, self.memory, self.ordinal)
            session.run_with_iobinding(binding, self._run_options)
            values = binding.get_outputs()
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise EngineError(f"the network call failed in onnxruntime: {error}") from error
        return {name: _device_array(value, place) for name, value in zip(self._outputs, values, strict=True)}

    def _bound(self, name: str, array, place):
        from piflow_edge.kernels import gpu_arrays

        if not is_on_gpu(array):  # noise levels and labels, the same for every image
            return gpu_arrays.constant(np.asarray(array), place)
        return view(name, array, place.stream, _BINDABLE)


class OrtTensorRT(OrtCUDA):
    """NVIDIA GPUs by TensorRT within ONNX Runtime: an engine from the cache, else one that is built for minutes now."""

    name = "ort-tensorrt"
    provider = "TensorrtExecutionProvider"
    package = "'onnxruntime-gpu[cuda,cudnn]' tensorrt"
    needs = "an NVIDIA driver, CUDA, cuDNN 9 and TensorRT 10, of the versions that `piflow-edge doctor` tells"

    @classmethod
    def obstacle(cls, graph: Graph, device: str, options: EngineOptions) -> str | None:
        """See `Engine`."""
        reason = super().obstacle(graph, device, options)
        if reason is None and cls._cached(graph, device) is None:
            reason = (
                f"it would first build an engine, for minutes; build it ahead: {cls._build_command(graph)}"
            )
        return reason

    @classmethod
    def _cached(cls, graph: Graph, device: str):
        """The engine that `piflow-edge build` made of this graph for this GPU, or None."""
        from piflow_edge.engines import engine_cache, ort_compile
        from piflow_edge.kernels import nvidia

        ordinal = int(device.partition(":")[2] or 0)
        try:
            return engine_cache.newest(
                backend=cls.name,
                onnx=engine_cache.graph_hash(graph),
                tensorrt=ort_compile.release(cls.name),
                cuda=nvidia.driver_version(),
                gpu=nvidia.name(ordinal),
                compute_capability=nvidia.device(ordinal).compute_capability,
            )
        except EngineError:  # no GPU: the provider itself says what it lacks
            return None

    @classmethod
    def _build_command(cls, graph: Graph) -> str:
        return f"piflow-edge build {graph.source} --engine {cls.name}"

    def _opened(self, ort, graph: Graph):
        if b"EPContext" not in graph.model:  # else it is built already
            if (found := self._cached(graph, self.device)) is not None:
                entry, data = found
                self.max_batch = int(entry.key.profile.rpartition(":")[2])
                return super()._opened(ort, Graph(data))
            log.warning(
                "engine %r builds now, for minutes; once and for all: %s",
                self.name,
                self._build_command(graph),
            )
        return super()._opened(ort, graph)

    def _provider_options(self, graph: Graph) -> dict[str, str]:
        return self._gpu_options()


class OrtTensorRTRTX(OrtTensorRT):
    """GeForce and other RTX GPUs by TensorRT for RTX."""

    name = "tensorrt-rtx"
    provider = "NvTensorRTRTXExecutionProvider"
    package = "onnxruntime-trt-rtx"
    needs = "an RTX GPU of Ampere or newer, its driver, and TensorRT for RTX"


def _device_array(value, place) -> DeviceArray:
    """An output of ONNX Runtime's, which owns its memory."""
    dtype = _DTYPES[value.data_type()]
    return DeviceArray(value.data_ptr(), dtype, tuple(value.shape()), place.ordinal, value, place.stream)


BACKENDS = (OrtCPU, OrtOpenVINO, OrtCoreML, OrtDirectML, OrtCUDA, OrtTensorRT, OrtTensorRTRTX)


def _give_weights(settings, graph: Graph) -> None:
    """Tell ONNX Runtime of the weights that lie beside the model; they must live until the session is made."""
    if graph.weights:
        names, contents = list(graph.weights), list(graph.weights.values())
        sizes = [len(content) for content in contents]
        settings.add_external_initializers_from_files_in_memory(names, contents, sizes)


def layer_values(graph: Graph, inputs: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """Values inside a graph, computed node by node: nothing is fused or left out.

    Args:
        graph: an ONNX model.
        inputs: of the graph.
        names: values to read out, made by nodes at its top level.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        EngineError: ONNX Runtime cannot open or run the graph.
    """
    onnx, ort = _onnx(), runtime()
    model = onnx.load_from_string(graph.model)
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    _give_weights(options, graph)
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(names, inputs), strict=True))
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        raise EngineError(f"onnxruntime {ort.__version__} cannot run the network: {error}") from error


def first_non_finite(graph: Graph, inputs: dict[str, np.ndarray]) -> str | None:
    """The first node whose result holds NaN or infinity, with its operator and weights; None if there is none.

    Raises:
        MissingExtraError, EngineError: see `layer_values`.
    """
    nodes = _onnx().load_from_string(graph.model).graph.node
    values = layer_values(graph, inputs, [name for node in nodes for name in node.output if name])
    made = set(values)
    for node in nodes:
        results = (values[name] for name in node.output if name)
        if any(value.dtype.kind == "f" and not np.isfinite(value).all() for value in results):
            weights = [name for name in node.input if name not in made and "." in name]
            return f"{node.name} ({node.op_type}{' with ' + ', '.join(weights) if weights else ''})"
    return None


def _onnx():
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError(
            "looking into a graph needs onnx; get it with: pip install 'piflow-edge[train]'"
        ) from error
    return onnx
