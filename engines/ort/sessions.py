"""ONNX Runtime: one class for each of its providers, none of which may give way to another in silence."""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from piflow_edge.engines import Choice, Engine, EngineOptions, Graph, placement
from piflow_edge.engines.ort import importing as ort_package
from piflow_edge.engines.ort.messages import plain_reason
from piflow_edge.errors import EngineError, MissingExtraError, PiFlowError

log = logging.getLogger(__name__)

_CPU_PROVIDER = "CPUExecutionProvider"


def give_weights(settings, graph: Graph) -> None:
    """Tell ONNX Runtime of the weights that lie beside the model; they must live until the session is made.

    Raises:
        EngineError: this release cannot take them from memory; read from the disk they could be other ones by then.
    """
    if not graph.weights or graph.file is not None:
        return
    give = getattr(settings, "add_external_initializers_from_files_in_memory", None)
    if give is None:
        release = ort_package.import_onnxruntime().__version__
        raise EngineError(
            f"ONNX Runtime {release} does not take the weights that lie beside a large graph, a newer one does: "
            "pip install -U onnxruntime (on Python 3.11 or newer), or take the engine 'reference'"
        )
    names, contents = list(graph.weights), list(graph.weights.values())
    give(names, contents, [len(content) for content in contents])


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
    min_batch = 1
    max_batch: int | None = None
    choice = Choice("it was asked for")
    # Which provider has how many nodes; None for the CPU's own, which has all.
    node_counts: placement.Placement | None = None
    # What must be at hand besides the package, for the error where the provider does not load.
    needs = "it"
    # The one `sys.platform` it exists for; None is any.
    system: str | None = None
    # Whether two calls may be under way at a time.
    concurrent = True
    # Of every call of the session; None are ONNX Runtime's own.
    _run_options: Any = None

    def __init__(self, graph: Graph, device: str, options: EngineOptions):
        ort = self.installed_runtime()
        self.device, self._options = device, options
        self._lock = contextlib.nullcontext() if self.concurrent else threading.Lock()
        self._session = self._open_session(ort, graph)
        self._outputs = [output.name for output in self._session.get_outputs()]

    @classmethod
    def installed_runtime(cls):
        """The onnxruntime module, which has the provider.

        Raises:
            MissingExtraError: it is not installed, or without the provider.
            EngineError: the provider is of another system.
        """
        ort = cls._import_runtime()
        if (reason := cls._missing(ort)) is not None:
            raise MissingExtraError(f"{reason}; {cls._advise_install()}")
        return ort

    @classmethod
    def opener(cls, graph: Graph, device: str, options: EngineOptions) -> Callable[[], Engine] | str:
        """See `Engine`. Who names the engine learns how to get it too: to look what is installed here takes long."""
        try:
            reason = cls._missing(cls._import_runtime())
        except PiFlowError as error:
            return str(error)
        return reason or partial(cls, graph, device, options)

    @classmethod
    def _import_runtime(cls):
        """The onnxruntime module, with or without the provider; raises as `installed_runtime`."""
        if cls.system not in (None, sys.platform):
            raise EngineError(
                f"engine {cls.name!r} needs {cls.needs}, and this is {sys.platform}: use engine 'auto'"
            )
        return ort_package.import_onnxruntime(cls.package, cls.name, cls._also())

    @classmethod
    def _missing(cls, ort) -> str | None:
        if cls.provider in ort.get_available_providers():
            return None
        return (
            f"engine {cls.name!r} needs ONNX Runtime's {cls.provider}, and the onnxruntime {ort.__version__} installed "
            "here lacks it"
        )

    @classmethod
    def _advise_install(cls) -> str:
        here = ort_package.find_installed_packages()
        remove = f"pip uninstall -y {' '.join(here)} && " if here else ""
        several = f"{' and '.join(here)} are both installed and overwrite each other; " if here[1:] else ""
        return f"{several}get it with: {remove}pip install {cls.package}{cls._also()}"

    @classmethod
    def _also(cls) -> str:
        """What else is missing here, for errors that say how to get the package."""
        return ""

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

    def _open_session(self, ort, graph: Graph):
        settings = self._settings(ort)
        give_weights(settings, graph)
        if self.provider == _CPU_PROVIDER:
            session = self._make_session(ort, graph, settings)
        else:
            with placement.watch_placement(ort, settings, self.min_batch, self._run_options) as counted:
                session = self._make_session(ort, graph, settings)
                self._check(ort, session, counted)
        # The session keeps the file's bytes to open itself again with other providers, which is not done here.
        if getattr(session, "_model_bytes", None) is not None:
            session._model_bytes = None
        return session

    def _make_session(self, ort, graph: Graph, settings):
        providers = [(self.provider, self._provider_options(graph))]
        # Of bytes it would hold three copies for a while.
        model = graph.model if graph.file is None else str(graph.file)
        try:
            # Some providers start threads of their own here, which keep to the cores of the one that starts them.
            with self._options.on_cores():
                # Without `enable_fallback=0` it would print an error and go on with the CPU.
                return ort.InferenceSession(model, settings, providers=providers, enable_fallback=0)
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            message = f"onnxruntime {ort.__version__} cannot open the network"
            if self.provider != _CPU_PROVIDER:
                message += f" with {self.provider}. It {self._wants()}. It says"
            raise EngineError(f"{message}: {plain_reason(error)}") from error

    def _wants(self) -> str:
        return f"needs {self.needs}; get the libraries with: pip install {self.package}{self._also()}"

    def _check(self, ort, session, counted) -> None:
        """Refuse a provider that was left out or took no node: the whole network would run on the CPU."""
        if self.provider not in session.get_providers():
            raise EngineError(
                f"engine {self.name!r} cannot run here: onnxruntime {ort.__version__} left {self.provider} out, "
                f"because its libraries or its device did not load. It says {ort_package.latest_errors()}. "
                f"It {self._wants()}"
            )
        try:
            counts = counted(session)
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise EngineError(
                f"engine {self.name!r} cannot run this network: the first call failed in onnxruntime "
                f"{ort.__version__}: {plain_reason(error)}"
            ) from error
        ours, total = counts[self.provider], sum(counts.values())
        if total and not ours:
            raise EngineError(
                f"engine {self.name!r} cannot run this network: {self.provider} took none of its {total} nodes, all "
                "would run on the CPU; use engine 'ort-cpu'"
            )
        log.info("engine %r runs %d of %d nodes, the CPU %d", self.name, ours, total, counts[_CPU_PROVIDER])
        if (rest := counts.describe_rest(self.provider)) is not None:
            log.warning(
                "engine %r leaves %s to the CPU, and copies their inputs and results: it may be no faster than "
                "'ort-cpu'; compare them with `piflow-edge bench`, or try another precision of the bundle",
                self.name,
                rest,
            )
        self.node_counts = counts

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """One network call."""
        if (session := self._session) is None:
            raise EngineError(f"engine {self.name!r} is closed; open the network again")
        try:
            with self._lock, self._options.on_cores():
                values = session.run(self._outputs, inputs, self._run_options)
                return dict(zip(self._outputs, values, strict=True))
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise EngineError(f"the network call failed in onnxruntime: {plain_reason(error)}") from error

    def close(self) -> None:
        """Free the network's memory, once calls that are under way have ended."""
        self._session = None


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


BACKENDS = (OrtCPU, OrtOpenVINO, OrtCoreML, OrtDirectML)
