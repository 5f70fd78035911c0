"""Whole images as CUDA graphs: all that an image takes on a GPU, from noise to bytes, queued by one launch.

What is queued call by call takes the CPU about a millisecond for every network call. It is the same for every image
of one size and with the same settings, but for the noise and what steers: so it is recorded, at fixed addresses, once
these settings come a second time.
"""

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np

from piflow_edge.conditioning import take
from piflow_edge.engines import Engine
from piflow_edge.errors import EngineError
from piflow_edge.kernels import gpu_arrays, nvidia
from piflow_edge.kernels.gpu_arrays import DeviceArray, Place
from piflow_edge.runtime.request import Request

from .decoding import Decoding
from .latents import Student, draw
from .recorded_memory import MOST_GRAPHS, RecordedMemory
from .stopwatch import Stopwatch

log = logging.getLogger(__name__)

# Kinds of images whose first coming is remembered.
_MOST_KINDS = 64

Compute = Callable[[dict[str, Any]], dict[str, Any]]


class RecordedComputation:
    """A computation on a GPU as one CUDA graph, copies from and to the host included.

    Args:
        place: the GPU, and the stream that it is to be queued on.
        inputs: host arrays of the shapes and formats that it will be run with.
        locks: held while it is queued: those of the engines that `compute` calls.
        compute: arrays on the GPU -> arrays on the GPU; waits for nothing, and does the same each time.

    Raises:
        EngineError: `compute` did something that cannot be recorded.
    """

    def __init__(
        self,
        place: Place,
        inputs: Mapping[str, np.ndarray],
        locks: Sequence[AbstractContextManager],
        compute: Compute,
    ):
        self._place, self._locks, self._compute = place, locks, compute
        # Of its own: what other threads queue meanwhile must not come into the recording.
        self._recorder = nvidia.Stream(place.ordinal)
        self._pool, self._held = gpu_arrays.Pool(place.ordinal), []
        self._inputs = {name: self._pin(array.shape, array.dtype) for name, array in inputs.items()}
        self._outputs: dict[str, np.ndarray] = {}
        for name, array in inputs.items():
            self._inputs[name][...] = array
        with nvidia.holding(self._held):
            self._queue()  # a rehearsal: it compiles kernels, uploads constants and takes memory, all unrecordable
            nvidia.wait_for(self._recorder.handle)
            self._recording = nvidia.Recording(place.ordinal, self._recorder.handle, self._queue)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What it computes. The arrays are overwritten by the next run."""
        for name, array in inputs.items():
            np.copyto(self._inputs[name], array, casting="same_kind")
        with ExitStack() as held:
            for lock in self._locks:
                held.enter_context(lock)
            self._recording.launch(self._place.stream)
        nvidia.wait_for(self._place.stream)
        return self._outputs

    @property
    def memory(self) -> RecordedMemory:
        """What it holds."""
        pinned = sum(held.size for held in self._held if isinstance(held, nvidia.PinnedMemory))
        return RecordedMemory(self._pool.size, pinned)

    def free(self) -> None:
        """Give its memory back, before the engines that it runs are closed."""
        nvidia.wait_for(self._place.stream)
        self._recording.free()
        self._held.clear()

    def _queue(self) -> None:
        ordinal, stream = self._place.ordinal, self._recorder.handle
        with self._pool.lending():
            given = {}
            for name, host in self._inputs.items():
                given[name] = gpu_arrays.empty(
                    host.shape, dtype=str(host.dtype), device=Place(ordinal, stream)
                )
                nvidia.copy(ordinal, given[name].pointer, host.ctypes.data, host.nbytes, stream)
            for name, array in self._compute(given).items():
                if name not in self._outputs:
                    self._outputs[name] = self._pin(array.shape, array.dtype)
                host = self._outputs[name]
                nvidia.copy(ordinal, host.ctypes.data, array.pointer, host.nbytes, stream)

    def _pin(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        pinned = nvidia.PinnedMemory(self._place.ordinal, max(1, size))
        self._held.append(pinned)
        return np.frombuffer(memoryview(pinned.bytes), dtype, size // dtype.itemsize).reshape(shape)


class _OnGpu:
    """An engine whose other inputs are brought to the GPU once, where they are kept."""

    def __init__(self, engine: Engine):
        self._engine, self.name, self.device = engine, engine.name, engine.device
        self.min_batch, self.max_batch = engine.min_batch, engine.max_batch

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        place = next(array.device for array in inputs.values() if isinstance(array, DeviceArray))
        return self._engine.run(
            {
                name: array if isinstance(array, DeviceArray) else gpu_arrays.constant(array, place)
                for name, array in inputs.items()
            }
        )


class ImageGraphs:
    """The recorded images of a generator.

    Args:
        manifest: of the bundle.
        engine, decoder: the networks, opened on an NVIDIA GPU. `decoder` is None for latents of pixels.
        decoding: what makes images of latents.
        place: the GPU, and the stream of policies and engines.
    """

    def __init__(
        self, manifest: Any, engine: Engine, decoder: Engine | None, decoding: Decoding, place: Place
    ):
        self._formats, self._place = getattr(engine, "input_formats", {}), place
        self._student = Student(manifest, _OnGpu(engine))
        self._decoding = decoding.with_decoder(None if decoder is None else _OnGpu(decoder))
        self._graphs: OrderedDict[tuple, RecordedComputation] = OrderedDict()
        self._seen: Counter[tuple] = Counter()
        self._lock = threading.Lock()
        networks: list[Any] = [network for network in (engine, decoder) if network is not None]
        other = [one.name for one in networks if not hasattr(one, "call_lock")]
        self._is_possible = not other
        self._locks = [one.call_lock for one in networks] if self._is_possible else []
        if other:
            log.info("images are queued call by call: engine %r cannot be recorded as a CUDA graph", other[0])

    def draw(
        self, request: Request, piece: slice, output: str, num_threads: int | None, clock: Stopwatch
    ) -> dict[str, np.ndarray] | None:
        """Some of a request's images, as arrays by name: "latents", and those of `Decoding.queue_images`.

        None where they cannot be recorded, or come for the first time.
        """
        if not self._is_possible or request.drawn is not None or request.settings.solver != "euler":
            return None
        if any(segment.renoises for segment in request.schedule.segments_below(request.settings.strength)):
            return None
        steers = {
            name: self._convert(name, array) for name, array in take(request.conditioning, piece).items()
        }
        shapes = tuple((name, array.shape, str(array.dtype)) for name, array in steers.items())
        shown = {"latent": "latent", "float": "float"}.get(output, "bytes")
        key = (piece.stop - piece.start, request.shape, request.schedule, request.settings, shown, shapes)
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None and not self._has_come_before(key):
                return None
            noise = clock.run("noise", request.draw_noise, piece, 0, num_threads)
            x_src, _ = request.start_from(noise, piece)
            inputs = {"x_src": np.asarray(x_src, np.float32), **steers}
            if graph is None and (graph := self._record(key, request, shown, inputs)) is None:
                return None
            self._graphs.move_to_end(key)
            outputs = clock.run("transfer", graph.run, inputs)
            return {name: array.copy() for name, array in outputs.items()}

    def free(self) -> None:
        """Give all memory back, before the engines are closed."""
        with self._lock:
            for graph in self._graphs.values():
                graph.free()
            self._graphs.clear()

    def _convert(self, name: str, array: Any) -> np.ndarray:
        return np.asarray(array, self._formats.get(name))

    def _has_come_before(self, key: tuple) -> bool:
        if len(self._seen) > _MOST_KINDS:
            self._seen.clear()
        self._seen[key] += 1
        return self._seen[key] > 1

    def _record(
        self, key: tuple, request: Request, shown: str, inputs: Mapping[str, np.ndarray]
    ) -> RecordedComputation | None:
        def compute(given: dict[str, Any]) -> dict[str, Any]:
            steers = {name: array for name, array in given.items() if name != "x_src"}
            latents = draw(
                lambda x_t, sigma_t: self._student.policy(x_t, sigma_t, steers),
                given["x_src"],
                request.schedule,
                request.settings,
            )
            if shown == "latent":
                return {"latents": latents}
            images = self._decoding.queue_images(latents, as_float=shown == "float")
            return {"latents": latents, **images}

        while len(self._graphs) >= MOST_GRAPHS:
            self._graphs.popitem(last=False)[1].free()
        try:
            self._graphs[key] = RecordedComputation(self._place, inputs, self._locks, compute)
        except EngineError as error:
            self._is_possible = False
            log.warning("images are queued call by call, which is slower: %s", error)
        return self._graphs.get(key)
