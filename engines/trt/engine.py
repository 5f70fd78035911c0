"""NVIDIA TensorRT, without anything in between: an engine from the cache, CUDA graphs, memory taken once.

Engines are built ahead, by `piflow_edge.engines.building`: a build takes minutes, and nobody expects them from `load`.
"""

import logging
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from piflow_edge.engines import Choice, Engine, EngineOptions, Graph, padding
from piflow_edge.engines.building import engine_cache
from piflow_edge.engines.trt import versions as trt_versions
from piflow_edge.errors import EngineError, EngineNotBuiltError, PiFlowError, ShapeError
from piflow_edge.kernels import gpu_arrays, nvidia
from piflow_edge.kernels.device_arrays import is_on_gpu, stream_of, view
from piflow_edge.kernels.gpu_arrays import DeviceArray
from piflow_edge.system.onnx_messages import ITEM_BYTES

log = logging.getLogger(__name__)

# Batch sizes whose contexts and CUDA graphs are kept; each takes some megabytes.
_CALLS_KEPT = 8


@dataclass(frozen=True)
class _Tensor:
    """An input or output. `shape` has -1 where a size varies, at first the batch. `least`, `most`: the profile's."""

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]
    least: tuple[int, ...]
    most: tuple[int, ...]

    def bytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * ITEM_BYTES[self.dtype]


# Of tensors, by name.
_Shapes = dict[str, tuple[int, ...]]


class _Outputs:
    """Memory for one call's outputs, at their greatest. Taken again once all arrays made of it are gone."""

    def __init__(self, ordinal: int, tensors: list[_Tensor], stream: int):
        self.stream = stream  # on which they are written and, by whoever asked for them, read
        self.memory = {t.name: nvidia.Memory(ordinal, max(1, t.bytes(t.most))) for t in tensors}
        self._lease: weakref.ref | None = None

    @property
    def is_free(self) -> bool:
        return self._lease is None or self._lease() is None

    def lease(self) -> "_Lease":
        lease = _Lease(self)
        self._lease = weakref.ref(lease)
        return lease


class _Lease:
    """Held by the arrays of one call: keeps their memory from the next call, and from being freed."""

    def __init__(self, outputs: _Outputs):
        self.outputs = outputs


class _Call:
    """Inputs of one size, one place for their outputs: a context of its own, and from the second time on a CUDA graph.

    A recorded graph holds addresses and shapes, so that each takes a context of its own; they share scratch memory, for
    the engine runs one call at a time.
    """

    def __init__(self, context, shapes: dict[str, tuple[int, ...]]):
        self.context, self.shapes = context, shapes  # of the outputs
        self.recording: nvidia.Recording | None = None
        self.count = 0
        self.can_record = True


class TensorRTEngine:
    """A network in TensorRT.

    Args:
        graph: an ONNX model, whose engine for this GPU is looked up in the cache: the last one built.
        device: "cuda" or "cuda:N".
        options: nothing of them is used.
        plan: a serialised engine to open instead. Its profile says `min_batch` and `max_batch`.

    Raises:
        MissingExtraError: tensorrt is not installed.
        EngineNotBuiltError: the cache has no engine of this graph for this GPU and these versions.
        EngineError: no GPU, a TensorRT of a release we do not know, or an engine it cannot open.
    """

    name = "tensorrt"
    choice = Choice("it was asked for")

    def __init__(self, graph: Graph, device: str, options: EngineOptions, *, plan: bytes | None = None):
        trt = trt_versions.tensorrt()
        self._api = trt_versions.api(trt.__version__)
        self.device, self._ordinal = device, nvidia.ordinal_in(device)
        if plan is None:
            plan = _find_cached(graph, trt, device)
        self._lock = threading.Lock()
        self._log = trt_versions.logger(trt)
        with nvidia.current(self._ordinal):
            self._runtime = trt.Runtime(self._log)
            self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            reason = "; ".join(self._log.errors) or "it does not say why"
            raise EngineError(
                f"TensorRT {trt.__version__} cannot open the engine: {reason}; build it again on this device"
            )
        self._trt = trt
        self._tensors = _tensors(trt, self._engine, self._sizes_of_outputs)
        self._axes = {t.name: t.shape.index(-1) for t in self._tensors if t.is_input and -1 in t.shape}
        # That of the policies, so that neither waits for the other.
        self._stream = gpu_arrays.place(self._ordinal).stream
        # One of its own to record on: what other threads queue meanwhile must not come into the recording.
        self._recorder = nvidia.Stream(self._ordinal)
        self._inputs: dict[str, nvidia.Memory] = {}
        for tensor in (t for t in self._tensors if t.is_input):
            size = tensor.bytes(tensor.most)
            self._inputs[tensor.name] = memory = nvidia.Memory(self._ordinal, max(1, size))
            nvidia.fill(self._ordinal, memory.pointer, 0, size, self._stream)
        scratch = trt_versions.memory_size(self._api, self._engine)
        self._scratch = nvidia.Memory(self._ordinal, max(1, scratch))
        self.min_batch, self.max_batch = self._limits()
        self._outputs: list[_Outputs] = []
        self._calls: OrderedDict[tuple[object, int], _Call] = OrderedDict()

    @classmethod
    def opener(cls, graph: Graph, device: str, options: EngineOptions) -> Callable[[], Engine] | str:
        """See `Engine`: it is passed over where it is not installed, or no engine was built of this network."""
        try:
            plan = _find_cached(graph, trt_versions.tensorrt(), device)
        except PiFlowError as error:
            return str(error)
        return partial(cls, graph, device, options, plan=plan)

    @property
    def call_lock(self) -> threading.Lock:
        """Held while a call is queued, and by who queues a recording of calls.

        All calls share the memory of inputs: between a call's copies there and its kernels nothing else may come.
        """
        return self._lock

    @property
    def input_formats(self) -> dict[str, str]:
        """Number format of each input. TensorRT before 10 takes class ids as int32; NumPy's int64 is made that."""
        return {tensor.name: tensor.dtype for tensor in self._tensors if tensor.is_input}

    def _limits(self) -> tuple[int, int]:
        tensor = next(t for t in self._tensors if t.is_input)
        least, _, most = self._engine.get_tensor_profile_shape(tensor.name, 0)
        axis = tensor.shape.index(-1)
        return int(least[axis]), int(most[axis])

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """One network call.

        Inputs on the GPU are read on the stream their library is queueing on, and outputs are written there and not
        waited for; their memory is used again once no array refers to it. An input that is a NumPy array is copied.

        Raises:
            ShapeError: inputs that do not fit the network.
            EngineError: a batch outside the profile, or a call that failed.
        """
        with self._lock:
            if self._engine is None:
                raise EngineError("engine 'tensorrt' is closed; open the network again")
            arrays = {t.name: self._check_input(t, inputs) for t in self._tensors if t.is_input}
            self._check_lengths(arrays)
            if (batch := self._batch(arrays)) < 1:
                raise ShapeError("a call has one sample or more; got none")
            if batch > self.max_batch:
                low, high = self.min_batch, self.max_batch
                raise EngineError(
                    f"this engine was built for batches of {low} to {high}; got {batch}: split it, or build with "
                    f"--batch {low}:{batch}:{batch}"
                )
            self._log.errors.clear()  # of calls that went well all the same
            return padding.run_padded(self._call, arrays, self._axes, self.min_batch)

    def _call(self, arrays: dict[str, Any]) -> dict[str, Any]:
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        on_gpu = [array for array in arrays.values() if is_on_gpu(array)]
        stream = stream_of(on_gpu[0]) if on_gpu else self._stream
        # Inputs and scratch may still be in use by the call before. A recording is waited for as a whole.
        crosses = stream != self._stream and not nvidia.is_recording()
        if crosses:
            nvidia.after(self._ordinal, stream, self._stream)
        for tensor in self._tensors:
            if tensor.is_input:
                self._bring(tensor, arrays[tensor.name], stream)
        outputs = self._free_outputs(stream)
        output_shapes = self._queue(shapes, outputs, stream)
        if crosses:
            nvidia.after(self._ordinal, self._stream, stream)
        return (
            self._on_gpu(outputs, output_shapes, stream) if on_gpu else self._on_host(outputs, output_shapes)
        )

    def close(self) -> None:
        """Free its memory, once calls that are under way have ended; that of outputs goes with their arrays."""
        with self._lock:
            if self._engine is None:
                return
            nvidia.wait_for(self._stream)
            for call in self._calls.values():
                if call.recording is not None:
                    call.recording.free()
            self._calls.clear()  # contexts before their engine, the engine before its runtime
            self._outputs.clear()
            self._engine = None
            self._runtime = None
            for memory in (*self._inputs.values(), self._scratch):
                memory.free()
            self._recorder.close()

    def _check_input(self, tensor: _Tensor, inputs: dict[str, Any]):
        if inputs.keys() != (names := {t.name for t in self._tensors if t.is_input}):
            raise ShapeError(
                f"the network takes {', '.join(sorted(names))}; got {', '.join(sorted(inputs)) or 'nothing'}"
            )
        array = inputs[tensor.name]
        if not is_on_gpu(array):
            array = _as_typed(tensor, np.asarray(array))
        shape = tuple(array.shape)
        fits = len(shape) == len(tensor.shape)
        if not fits or any(want not in (-1, have) for want, have in zip(tensor.shape, shape, strict=True)):
            first = tensor.shape.index(-1) if -1 in tensor.shape else None
            names = ("batch" if place == first else "any" for place in range(len(tensor.shape)))
            wanted = (
                name if size == -1 else str(size) for name, size in zip(names, tensor.shape, strict=True)
            )
            raise ShapeError(f"{tensor.name} must be ({', '.join(wanted)}); got {shape}")
        return array

    def _check_lengths(self, arrays: dict[str, Any]) -> None:
        """Raise EngineError for lengths of other axes than the batch that the engine was not built for."""
        for tensor in (t for t in self._tensors if t.is_input):
            sizes = zip(tensor.least, arrays[tensor.name].shape, tensor.most, strict=True)
            for place, (least, size, most) in enumerate(sizes):
                if place != self._axes.get(tensor.name) and not least <= size <= most:
                    raise EngineError(
                        f"this engine was built for {tensor.name} of {least} to {most} along axis {place}; got {size}: "
                        "build it again with --axis"
                    )

    def _batch(self, arrays: dict[str, Any]) -> int:
        batches = {name: arrays[name].shape[axis] for name, axis in self._axes.items()}
        if len(set(batches.values())) != 1:
            raise ShapeError(f"inputs of one call have the same batch; got {batches}")
        return int(next(iter(batches.values())))

    def _bring(self, tensor: _Tensor, array, stream: int) -> None:
        """Queue a copy of an input to where the engine reads it."""
        if is_on_gpu(array):
            found = view(tensor.name, array, stream, (tensor.dtype,))
            if found.ordinal != self._ordinal:
                raise EngineError(
                    f"{tensor.name} lies on GPU {found.ordinal}, and the engine is on GPU {self._ordinal}"
                )
            source = found.pointer
        else:
            source = array.ctypes.data  # pageable: copied aside before the call returns
        nvidia.copy(
            self._ordinal, self._inputs[tensor.name].pointer, source, tensor.bytes(array.shape), stream
        )

    def _free_outputs(self, stream: int) -> _Outputs:
        # Of the same stream, so that what was queued to read the arrays before comes before the next write.
        for outputs in self._outputs:
            if outputs.is_free and outputs.stream == stream:
                return outputs
        outputs = _Outputs(self._ordinal, [t for t in self._tensors if not t.is_input], stream)
        self._outputs.append(outputs)
        return outputs

    def _queue(self, shapes: _Shapes, outputs: _Outputs, stream: int) -> _Shapes:
        """Queue the network: kernel by kernel the first time, recorded the second time, replayed from then on.

        Returns:
            The shapes of its outputs.
        """
        key = (tuple(shapes.values()), id(outputs))
        call = self._calls.get(key)
        if call is None:
            # Where a profile cannot be shared, there is one context at a time.
            limit = 1 if self._api.profile_sharing == "never" else _CALLS_KEPT
            while len(self._calls) >= limit:
                self._forget(outputs)
            call = self._calls[key] = self._prepare(shapes, outputs)
        self._calls.move_to_end(key)
        nvidia.hold(call, outputs)
        if nvidia.is_recording():  # a part of something larger
            with nvidia.current(self._ordinal):
                self._execute(call, stream)
            return call.shapes
        call.count += 1
        # TensorRT sets a context up at its first call, in ways that cannot be recorded.
        if call.count > 1 and call.recording is None and call.can_record:
            self._record(call)
        if call.recording is not None:
            call.recording.launch(stream)
        else:
            with nvidia.current(self._ordinal):
                self._execute(call, stream)
        return call.shapes

    def _prepare(self, shapes: _Shapes, outputs: _Outputs) -> _Call:
        api = self._api
        with nvidia.current(self._ordinal):
            context = trt_versions.create_context(api, self._trt, self._engine)
            done = context is not None
            if done:
                trt_versions.set_memory(api, context, self._scratch.pointer, self._scratch.size)
            for tensor in self._tensors if done else ():
                memory = self._inputs if tensor.is_input else outputs.memory
                if tensor.is_input:
                    done &= context.set_input_shape(tensor.name, shapes[tensor.name])
                done &= context.set_tensor_address(tensor.name, memory[tensor.name].pointer)
        if not done:
            batch = next(shapes[name][axis] for name, axis in self._axes.items())
            raise EngineError(f"TensorRT cannot prepare a call of {batch}: {'; '.join(self._log.errors)}")
        names = [tensor.name for tensor in self._tensors if not tensor.is_input]
        return _Call(context, {name: tuple(map(int, context.get_tensor_shape(name))) for name in names})

    def _sizes_of_outputs(self, inputs: _Shapes, outputs: list[str]) -> _Shapes:
        """Shapes of the outputs for inputs of these shapes."""
        with nvidia.current(self._ordinal):
            context = trt_versions.create_context(self._api, self._trt, self._engine)
            if context is None or not all(context.set_input_shape(*one) for one in inputs.items()):
                raise EngineError(
                    f"TensorRT cannot prepare a call of {inputs}: {'; '.join(self._log.errors)}"
                )
            return {name: tuple(map(int, context.get_tensor_shape(name))) for name in outputs}

    def _record(self, call: _Call) -> None:
        stream = self._recorder.handle
        try:
            call.recording = nvidia.Recording(self._ordinal, stream, lambda: self._execute(call, stream))
        except EngineError as error:
            call.can_record = False
            log.warning("engine 'tensorrt' runs without a CUDA graph, a little slower: %s", error)

    def _execute(self, call: _Call, stream: int) -> None:
        if not call.context.execute_async_v3(stream):
            raise EngineError(f"the network call failed in TensorRT: {'; '.join(self._log.errors)}")

    def _forget(self, current: _Outputs) -> None:
        """Drop the call that was used longest ago, once it has run, and outputs that no call uses but `current`."""
        nvidia.wait_for(self._stream)
        _, old = self._calls.popitem(last=False)
        if old.recording is not None:
            old.recording.free()
        used = {outputs for _, outputs in self._calls} | {id(current)}
        self._outputs = [outputs for outputs in self._outputs if id(outputs) in used]

    def _on_gpu(self, outputs: _Outputs, shapes: _Shapes, stream: int) -> dict[str, DeviceArray]:
        lease = outputs.lease()
        return {
            t.name: DeviceArray(
                outputs.memory[t.name].pointer, t.dtype, shapes[t.name], self._ordinal, lease, stream
            )
            for t in self._tensors
            if not t.is_input
        }

    def _on_host(self, outputs: _Outputs, shapes: _Shapes) -> dict[str, np.ndarray]:
        arrays = {}
        for tensor in (t for t in self._tensors if not t.is_input):
            if tensor.dtype == "bfloat16":
                raise EngineError(f"{tensor.name} is bfloat16, which NumPy lacks; give inputs on the GPU")
            arrays[tensor.name] = array = np.empty(shapes[tensor.name], tensor.dtype)
            source = outputs.memory[tensor.name].pointer
            nvidia.copy(self._ordinal, array.ctypes.data, source, array.nbytes, self._stream)
        nvidia.wait_for(self._stream)
        return arrays


def _find_cached(graph: Graph, trt, device: str) -> bytes:
    needed = engine_cache.place("tensorrt", trt.__version__, device)
    if (found := engine_cache.newest(graph, needed)) is None:
        raise EngineNotBuiltError(
            f"there is no TensorRT engine of this network for {needed['gpu']}, TensorRT {needed['tensorrt']} and CUDA "
            f"{needed['cuda']} in {engine_cache.folder()}; build it, once: piflow-edge build {graph.source} "
            f"--engine tensorrt{f' --device {device}' if nvidia.ordinal_in(device) else ''}"
        )
    return found[1]


def _tensors(trt, engine, sizes_of_outputs: Callable[[_Shapes, list[str]], _Shapes]) -> list[_Tensor]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    shapes = {name: tuple(int(size) for size in engine.get_tensor_shape(name)) for name in names}
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    if not any(-1 in shapes[name] for name in inputs):
        raise EngineError(
            "an engine's inputs have a batch that may vary; this one's have not: build it again"
        )
    least, most = ({name: _profile_shape(engine, name, place) for name in inputs} for place in (0, 2))
    outputs = [name for name in names if name not in inputs]
    least |= sizes_of_outputs(least, outputs)
    most |= sizes_of_outputs(most, outputs)
    return [
        _Tensor(
            name,
            name in inputs,
            trt_versions.format_of(engine.get_tensor_dtype(name)),
            shapes[name],
            least[name],
            most[name],
        )
        for name in names
    ]


def _profile_shape(engine, name: str, place: int) -> tuple[int, ...]:
    return tuple(int(size) for size in engine.get_tensor_profile_shape(name, 0)[place])


def _as_typed(tensor: _Tensor, array: np.ndarray) -> np.ndarray:
    """The array in the engine's format. TensorRT before 10 has no int64, and takes class ids as int32."""
    if array.dtype != tensor.dtype:
        if tensor.dtype != "int32" or array.dtype != np.int64:
            raise ShapeError(f"{tensor.name} must be {tensor.dtype}; got {array.dtype}")
        if array.size and not -(2**31) <= array.min() <= array.max() < 2**31:
            raise ShapeError(f"{tensor.name} must fit into int32; got up to {np.abs(array).max()}")
    return np.ascontiguousarray(array, tensor.dtype)
