"""ONNX Runtime on NVIDIA's GPUs: arrays stay in the GPU's memory, and engines of TensorRT come from the cache."""

import atexit
import contextlib
import io
import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from piflow_edge.engines import Engine, EngineOptions, Graph, padding, placement
from piflow_edge.engines.building import engine_cache
from piflow_edge.engines.ort.messages import plain_reason
from piflow_edge.engines.ort.recorded_calls import (
    PROVIDER_OPTION,
    RecordedCalls,
    build_run_options,
    warn_once,
)
from piflow_edge.engines.ort.sessions import OrtEngine
from piflow_edge.errors import EngineError
from piflow_edge.kernels import nvidia
from piflow_edge.kernels.device_arrays import is_on_gpu, view
from piflow_edge.kernels.gpu_arrays import DeviceArray
from piflow_edge.system.hardware import jetson_release

log = logging.getLogger(__name__)

# Engines that may hold recorded calls: given back once CUDA is gone, these would end the process with an error.
_open: weakref.WeakSet["OrtCUDA"] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for engine in list(_open):
        engine.close()


# Number formats of arrays that lie on a GPU.
_BINDABLE = ("float32", "float16", "int64")


class OrtCUDA(OrtEngine):
    """NVIDIA GPUs by cuDNN and cuBLAS.

    Arrays in the GPU's memory are bound where they lie, and results stay there: the network runs on the stream of the
    rollout kernels. ONNX Runtime waits for that stream at the end of a call.
    """

    name = "ort-cuda"
    provider = "CUDAExecutionProvider"
    package = "'onnxruntime-gpu[cuda,cudnn]'"
    needs = "an NVIDIA driver, CUDA and cuDNN 9, of the versions that `piflow-edge doctor` tells"
    memory = "cuda"  # as ONNX Runtime calls it
    # All calls queue on one stream, and no document says that two may do so in one session at a time.
    concurrent = False
    # Whether calls are recorded as CUDA graphs where the network allows it.
    records = True
    _recorded: RecordedCalls | None = None

    @classmethod
    def opener(cls, graph: Graph, device: str, options: EngineOptions) -> Callable[[], Engine] | str:
        """See `Engine`. That this package is installed where there is no GPU is nothing to warn of."""
        opener = super().opener(graph, device, options)
        if isinstance(opener, str) or nvidia.driver_cuda_version():
            return opener
        return f"engine {cls.name!r} needs an NVIDIA driver, and this machine has none"

    @classmethod
    def _also(cls) -> str:
        if jetson_release():
            return " (on Jetson NVIDIA's own build for JetPack, which PyPI has not; or use engine 'tensorrt')"
        return nvidia.also_lacks_driver()

    @property
    def ordinal(self) -> int:
        """Number of the GPU."""
        return nvidia.ordinal_in(self.device)

    def _provider_options(self, graph: Graph) -> dict[str, str]:
        return self._gpu_options() | {
            # Of the graph's own precision: TF32 has 11 bits, and who wants fewer than float32's 24 takes fp16.
            "use_tf32": "0",
            # Exhaustive search, the default, tries each convolution for seconds at every new size.
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",
            **(PROVIDER_OPTION if self._recorded is not None else {}),
        }

    def _gpu_options(self) -> dict[str, str]:
        options = {"device_id": str(self.ordinal)}
        if self._place is not None:
            options |= {"has_user_compute_stream": "1", "user_compute_stream": str(self._place.stream)}
        return options

    def _open_session(self, ort, graph: Graph):
        if hasattr(ort, "preload_dlls"):  # onnxruntime 1.21: finds CUDA and cuDNN as pip installs them
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what it did not find
                ort.preload_dlls()
        from piflow_edge.kernels import gpu_arrays

        self._place = gpu_arrays.place_of(self.device)
        if not self.records or self._place is None:
            return super()._open_session(ort, graph)
        self._recorded = RecordedCalls(ort, self.name, self.memory, self._place)
        self._run_options = build_run_options(ort, -1)  # of calls that are not recorded
        _open.add(self)
        try:
            return super()._open_session(ort, graph)
        except EngineError as error:  # a node that is not the provider's, If, Loop or Scan; or anything else
            self._recorded = self._run_options = None
            session = super()._open_session(ort, graph)
            warn_once(self.name, str(error))
            return session

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
        arrays = {name: self._bind(name, array, place) for name, array in inputs.items()}
        try:
            for name, array in arrays.items():
                dtype = np.dtype(array.dtype)
                binding.bind_input(name, self.memory, self.ordinal, dtype, array.shape, array.pointer)
            for name in self._outputs:
                binding.bind_output(name, self.memory, self.ordinal)
            with self._lock:
                if self._recorded is not None and (made := self._recorded.run(session, arrays)) is not None:
                    return made
                # Of run options no "disable_synchronize_execution_providers": with it processes on a GPU ended with
                # signal 6 (CUDA failure 800 in cudaFreeHost, onnxruntime-gpu 1.31), and were no faster.
                session.run_with_iobinding(binding, self._run_options)
                values = zip(self._outputs, binding.get_outputs(), strict=True)
                made = {name: _device_array(value, place) for name, value in values}
                if self._recorded is not None:
                    self._recorded.remember(arrays, made)
                return made
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise EngineError(f"the network call failed in onnxruntime: {plain_reason(error)}") from error

    def close(self) -> None:
        """Free the network's memory, once calls that are under way have ended."""
        with self._lock:
            self._session = self._recorded = None

    def _bind(self, name: str, array, place):
        from piflow_edge.kernels import gpu_arrays

        if not is_on_gpu(array):  # noise levels and labels, the same for every image
            return gpu_arrays.constant(np.asarray(array), place)
        return view(name, array, place.stream, _BINDABLE)


class OrtTensorRT(OrtCUDA):
    """NVIDIA GPUs by TensorRT within ONNX Runtime: an engine from the cache, else one that is built for minutes now.

    Args:
        graph, device, options: as for every engine.
        plan: a compiled model to open instead.
        profile: sizes that it was built for, the batch's "MIN:OPT:MAX" first.
    """

    name = "ort-tensorrt"
    provider = "TensorrtExecutionProvider"
    package = "'onnxruntime-gpu[cuda,cudnn]' tensorrt"
    needs = "an NVIDIA driver, CUDA, cuDNN 9 and TensorRT 10, of the versions that `piflow-edge doctor` tells"
    records = False
    # Packages that bring the library the provider calls; the first that is installed goes into an engine's key.
    libraries = ("tensorrt-cu13-libs", "tensorrt-cu12-libs", "tensorrt-libs", "tensorrt")

    def __init__(
        self,
        graph: Graph,
        device: str,
        options: EngineOptions,
        *,
        plan: bytes | None = None,
        profile: str = "",
    ):
        self._plan, self._profile = plan, profile
        super().__init__(graph, device, options)
        session: Any = self._session
        # A length that may vary, which is the batch's alone, has a name instead of a number.
        shapes = {value.name: [isinstance(n, int) for n in value.shape] for value in session.get_inputs()}
        self._axes = {name: fixed.index(False) for name, fixed in shapes.items() if not all(fixed)}

    @classmethod
    def opener(cls, graph: Graph, device: str, options: EngineOptions) -> Callable[[], Engine] | str:
        """See `Engine`."""
        opener = super().opener(graph, device, options)
        if isinstance(opener, str):
            return opener
        if (found := cls._find_cached(graph, device)) is None:
            return f"it would first build an engine, for minutes; build it ahead: {cls._build_command(graph)}"
        return partial(opener, **found)

    @classmethod
    def describe_release(cls) -> str:
        """Return the versions that a compiled model of this engine depends on, in one line.

        Raises:
            MissingExtraError: ONNX Runtime, or the one with this provider, is not installed.
        """
        from importlib.metadata import PackageNotFoundError, version  # slow to import

        module = cls.installed_runtime()
        for name in cls.libraries:
            try:
                return f"{name} {version(name)} in onnxruntime {module.__version__}"
            except PackageNotFoundError:
                continue
        return f"of the system, in onnxruntime {module.__version__}"

    @classmethod
    def _find_cached(cls, graph: Graph, device: str) -> dict[str, Any] | None:
        """`plan` and `profile` of what `piflow-edge build` made of this graph for this GPU, or None."""
        release = cls.describe_release()
        try:
            found = engine_cache.newest(graph, engine_cache.place(cls.name, release, device))
        except EngineError:  # no GPU: the provider itself says what it lacks
            return None
        return found and {"plan": found[1], "profile": found[0].key.profile}

    @classmethod
    def _build_command(cls, graph: Graph) -> str:
        return f"piflow-edge build {graph.source} --engine {cls.name}"

    def _open_session(self, ort, graph: Graph):
        if self._plan is None and (found := self._find_cached(graph, self.device)) is not None:
            self._plan, self._profile = found["plan"], found["profile"]
        if self._profile:
            least, _, most = self._profile.split()[0].split(":")
            self.min_batch, self.max_batch = int(least), int(most)
        if self._plan is None:
            log.warning(
                "engine %r builds now, for minutes; once and for all: %s",
                self.name,
                self._build_command(graph),
            )
            return super()._open_session(ort, graph)
        plan, self._plan = self._plan, None  # not held beside the session
        return super()._open_session(ort, Graph(plan))

    def _provider_options(self, graph: Graph) -> dict[str, str]:
        return self._gpu_options()

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """One network call."""
        return padding.run_padded(super().run, inputs, self._axes, self.min_batch)


class OrtTensorRTRTX(OrtTensorRT):
    """GeForce and other RTX GPUs by TensorRT for RTX."""

    name = "tensorrt-rtx"
    provider = "NvTensorRTRTXExecutionProvider"
    package = "onnxruntime-trt-rtx"
    needs = "an RTX GPU of Ampere or newer, its driver, and TensorRT for RTX"
    libraries = ("tensorrt-rtx", "onnxruntime-trt-rtx")


def _device_array(value, place) -> DeviceArray:
    """An output of ONNX Runtime's, which owns its memory."""
    dtype = placement.dtype_of(value)
    return DeviceArray(value.data_ptr(), dtype, tuple(value.shape()), place.ordinal, value, place.stream)


BACKENDS = (OrtCUDA, OrtTensorRT, OrtTensorRTRTX)
