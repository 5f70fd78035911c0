"""Network calls that ONNX Runtime's CUDA provider records as CUDA graphs, and replays.

The provider's rules (documentation of its option `enable_cuda_graph`, and cuda_graph.cc of release 1.23): all nodes of
the network are its own, but for those that work out shapes, and none is If, Loop or Scan; a graph holds the sizes and
the addresses of one call; run option `gpu_graph_id` names it, and -1 records nothing. The first call of a number runs
twice, once of it recorded. While that lasts, no thread of the process may ask the driver for memory.
"""

import logging
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from piflow_edge.engines.ort.messages import plain_reason
from piflow_edge.kernels import gpu_arrays, nvidia
from piflow_edge.kernels.device_arrays import DeviceView
from piflow_edge.kernels.gpu_arrays import DeviceArray, Place

log = logging.getLogger(__name__)

PROVIDER_OPTION = {"enable_cuda_graph": "1"}
# Sizes that are recorded; the library gives no graph back before its session.
_MOST_SIZES = 8

Sizes = tuple[tuple[str, tuple[int, ...]], ...]
Formats = dict[str, tuple[str, tuple[int, ...]]]


def build_run_options(ort: ModuleType, graph_id: int) -> Any:
    """Return run options that name a recorded graph; -1 for none. Nothing else is set: see `OrtCUDA.run`."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options


@cache
def warn_once(engine: str, reason: str) -> None:
    """Log that calls are not recorded, once per process and reason."""
    log.warning("engine %r runs without CUDA graphs, which is slower: %s", engine, reason)


class _Recorded:
    """A call at fixed addresses: `inputs` are copied there, and the results from `outputs`."""

    def __init__(
        self, binding: Any, options: Any, inputs: dict[str, DeviceArray], outputs: dict[str, DeviceArray]
    ):
        self.binding, self.options, self.inputs, self.outputs = binding, options, inputs, outputs


class RecordedCalls:
    """The recorded calls of one session, whose caller lets one thread in at a time.

    Args:
        ort: the onnxruntime module.
        engine: its name, for a warning.
        memory: what the session calls the GPU's memory.
        place: the GPU, and the stream that the session works on.
    """

    def __init__(self, ort: ModuleType, engine: str, memory: str, place: Place):
        self._ort, self._engine, self._memory, self._place = ort, engine, memory, place
        self._seen: dict[Sizes, Formats] = {}
        self._recorded: dict[Sizes, _Recorded] = {}
        self._is_possible = True

    def remember(self, inputs: Mapping[str, DeviceView], outputs: Mapping[str, DeviceArray]) -> None:
        """Note the sizes of a call that was not recorded: the next one of its kind may be."""
        if len(self._seen) < _MOST_SIZES:
            self._seen[_sizes_of(inputs)] = {name: (a.dtype, a.shape) for name, a in outputs.items()}

    def run(self, session: Any, inputs: Mapping[str, DeviceView]) -> dict[str, DeviceArray] | None:
        """Return the outputs, in memory of their own; None where a call of this kind is not, or cannot be, recorded.

        Its kind is that of the inputs' sizes; a kind is recorded when it comes the second time.
        """
        key = _sizes_of(inputs)
        if not self._is_possible or key not in self._seen:
            return None
        is_new = key not in self._recorded
        if is_new:
            self._recorded[key] = self._bind(session, inputs, self._seen[key])
        call = self._recorded[key]
        for name, array in inputs.items():
            self._copy(call.inputs[name], array)
        try:
            if is_new:
                with nvidia.nothing_else():
                    session.run_with_iobinding(call.binding, call.options)
            else:
                session.run_with_iobinding(call.binding, call.options)
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            self._is_possible = False
            warn_once(self._engine, plain_reason(error))
            return None
        made = {
            name: gpu_arrays.empty(a.shape, dtype=a.dtype, device=self._place)
            for name, a in call.outputs.items()
        }
        for name, array in made.items():
            self._copy(array, call.outputs[name])
        return made

    def _bind(self, session: Any, inputs: Mapping[str, DeviceView], outputs: Formats) -> _Recorded:
        def fix(dtype: str, shape: tuple[int, ...]) -> DeviceArray:
            return gpu_arrays.empty(shape, dtype=dtype, device=self._place)

        binding, ordinal = session.io_binding(), self._place.ordinal
        given = {name: fix(array.dtype, array.shape) for name, array in inputs.items()}
        made = {name: fix(*format_) for name, format_ in outputs.items()}
        for arrays, bind in ((given, binding.bind_input), (made, binding.bind_output)):
            for name, array in arrays.items():
                bind(name, self._memory, ordinal, np.dtype(array.dtype), array.shape, array.pointer)
        # 0 is what a call without the option has.
        options = build_run_options(self._ort, len(self._recorded) + 1)
        return _Recorded(binding, options, given, made)

    def _copy(self, to: DeviceView, source: DeviceView) -> None:
        size = source.size * np.dtype(source.dtype).itemsize
        nvidia.copy(self._place.ordinal, to.pointer, source.pointer, size, self._place.stream)


def _sizes_of(arrays: Mapping[str, DeviceView]) -> Sizes:
    return tuple((name, array.shape) for name, array in arrays.items())
