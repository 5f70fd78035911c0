"""Execution backends: one network call, nothing about segments or policies.

A backend is a class made from `(graph, device, options)`. Its `run(inputs)` takes and returns `{name: array}`; `name`
and `device` say what runs. Modules load when asked for.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from piflow_edge.errors import EngineError, PiFlowError
from piflow_edge.option import check_options, option
from piflow_edge.system.hardware import available_cores

if TYPE_CHECKING:
    from piflow_edge.system.files import Content
    from piflow_edge.system.onnx_outline import Outline

log = logging.getLogger(__name__)

# Name on the command line and in `load(engine=...)` -> where it lives, and the devices it can use, its best first.
# "auto" takes the first that can run: the order is that of speed. Two stand behind "ort-cpu", so that they run where
# they are named or their device is asked for. OpenVINO took as long on the CPU it was measured on, and twice the
# memory; Core ML computes in half precision whatever the graph says.
ENGINES = {
    "tensorrt": ("piflow_edge.engines.trt.engine:TensorRTEngine", ("cuda",)),
    "ort-tensorrt": ("piflow_edge.engines.ort.cuda_sessions:OrtTensorRT", ("cuda",)),
    "tensorrt-rtx": ("piflow_edge.engines.ort.cuda_sessions:OrtTensorRTRTX", ("cuda",)),
    "ort-cuda": ("piflow_edge.engines.ort.cuda_sessions:OrtCUDA", ("cuda",)),
    "directml": ("piflow_edge.engines.ort.sessions:OrtDirectML", ("gpu",)),
    "ort-cpu": ("piflow_edge.engines.ort.sessions:OrtCPU", ("cpu",)),
    "openvino": ("piflow_edge.engines.ort.sessions:OrtOpenVINO", ("cpu", "gpu", "npu")),
    "coreml": ("piflow_edge.engines.ort.sessions:OrtCoreML", ("any", "npu", "gpu", "cpu")),
    "reference": ("piflow_edge.engines.reference:ReferenceEngine", ("cpu",)),
}

ENGINE_NAMES = ("auto", *ENGINES)

# More than any machine has use for: to start a hundred thousand takes longer than anybody waits.
_MOST_THREADS = 1024


@dataclass(frozen=True)
class Graph:
    """An ONNX model whose checksums matched.

    `model`: the bytes of the .onnx file. `weights`: content of the files it keeps weights in, by the name the model
    gives them; empty unless it is too large for one file. `source`: what `piflow-edge build` is told to build it.
    `outline`: of the model, where it has been read already. `file`: the .onnx file, where an engine may read it and the
    files beside it there itself; `model` and `weights` are views of the files then, and take no memory.
    """

    model: "Content"
    weights: Mapping[str, bytes] = field(default_factory=dict)
    source: str = field(default="BUNDLE", compare=False)
    outline: "Outline | None" = field(default=None, compare=False, repr=False)
    file: Path | None = field(default=None, compare=False)

    @property
    def size(self) -> int:
        """Bytes of the model and its weights."""
        return len(self.model) + sum(map(len, self.weights.values()))

    @cached_property
    def sha256(self) -> str:
        """Of the model with all its weights."""
        from piflow_edge.system.files import sha256  # late: most engines never ask

        if not self.weights:
            return sha256(self.model)
        parts = (f"{name} {sha256(data)}" for name, data in sorted(self.weights.items()))
        return sha256("\n".join([sha256(self.model), *parts]).encode())

    def check(self) -> None:
        """Refuse a model that reaches for more than its own bytes and `weights`.

        Raises:
            EngineError: as in `read_outline` and `check_outline`.
        """
        from piflow_edge.system.onnx_outline import (  # late: `pf.load` need not cost that
            check_outline,
            read_outline,
        )

        outline = self.outline or read_outline(self.model)
        object.__setattr__(self, "outline", outline)
        check_outline(outline, {name: len(content) for name, content in self.weights.items()})


def read_graph_file(path: Path) -> Graph:
    """The graph in an ONNX file, with the files beside it that it keeps weights in.

    Raises:
        EngineError: it cannot be read, is not a whole ONNX model, or reaches for anything but files beside it.
    """
    from piflow_edge.system.onnx_outline import read_outline

    try:
        model = path.read_bytes()
        beside = [path.parent / place.location for place in read_outline(model).places]
        weights = {
            file.name: file.read_bytes()
            for file in set(beside)
            if file.parent == path.parent and file.is_file() and not file.is_symlink()
        }
    except OSError as error:
        raise EngineError(f"{error.filename} cannot be read: {error.strerror}") from error
    graph = Graph(model, weights)
    graph.check()
    return graph


_ANYWHERE = nullcontext()


@dataclass(frozen=True)
class EngineOptions:
    """How a backend uses the machine. What it has no use for, it leaves alone.

    Args:
        num_threads: of the CPU, 1 to 1024; None is one for each core of `cpu_affinity`, or without it for each core
            that this process may use: its affinity mask and its container's quota count.
        cpu_affinity: cores to compute on, by their number; None leaves that to the system. Linux only. The thread that
            calls keeps to them until its call ends, callbacks included.
        spinning: let threads wait for work at full load. Saves some microseconds a call; costs a core's power, and
            slows whatever else runs.
        memory_arena: keep freed memory for the next call: up to a twentieth faster with large decoders, and memory
            stays at the peak of the largest batch.
        memory_pattern: plan a call's memory ahead, once for each batch size; wants `memory_arena`.
        keep: "all" networks of a bundle in memory, or "one": each is opened, run and freed in turn, for models that do
            not fit together. That reads their files again for every image.

    Raises:
        EngineError: a setting out of range, or a core that this process may not use.
    """

    num_threads: int | None = option(
        None, "Of the CPU; else one for each core this process may use.", minimum=1, maximum=_MOST_THREADS
    )
    cpu_affinity: tuple[int, ...] | None = option(None, "Compute on these cores only, numbered from 0.")
    spinning: bool = False
    memory_arena: bool = False
    memory_pattern: bool = True
    keep: str = option(
        "all",
        "Networks in memory: all, or one, opened, run and freed in turn, where all do not fit.",
        choices=("all", "one"),
    )

    def __post_init__(self):
        if self.num_threads is not None and type(self.num_threads) is not int:
            raise EngineError(f"num_threads is a whole number; got {self.num_threads!r}")
        check_options(self, EngineError)
        if self.cpu_affinity is not None:
            object.__setattr__(self, "cpu_affinity", _check_cores(self.cpu_affinity))

    @property
    def threads(self) -> int:
        """Threads to compute with, the calling one included."""
        return self.num_threads or len(self.cpu_affinity or ()) or available_cores()

    def on_cores(self) -> AbstractContextManager[None]:
        """Keep the calling thread, and threads that it starts, on `cpu_affinity` for a while."""
        return _ANYWHERE if self.cpu_affinity is None else _hold_cores(self.cpu_affinity)


@contextmanager
def _hold_cores(cores: tuple[int, ...]) -> Iterator[None]:
    before = os.sched_getaffinity(0)  # 0: of this thread
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


DEFAULT_OPTIONS = EngineOptions()


def _check_cores(cores) -> tuple[int, ...]:
    if not hasattr(os, "sched_getaffinity"):
        raise EngineError("cpu_affinity works on Linux only; leave it out, or use num_threads")
    allowed = os.sched_getaffinity(0)
    try:
        cores = tuple(sorted(set(cores)))
    except TypeError as error:  # one number, or numbers among text
        raise EngineError(f"cpu_affinity is a tuple of cores by their number; got {cores!r}") from error
    if not cores or not set(cores) <= allowed:
        raise EngineError(
            f"cpu_affinity is one or more of the cores this process may use, {sorted(allowed)}; got {list(cores)}"
        )
    return cores


@dataclass(frozen=True)
class Choice:
    """Why an engine runs. `passed_over`: faster ones that "auto" did not take, with the reason."""

    reason: str
    passed_over: Mapping[str, str] = field(default_factory=dict)


class OpenNetwork(Protocol):
    """A network that can be run, from several threads at a time.

    `min_batch`, `max_batch`: fewest and most samples that it computes in one call, the latter None for any number. A
    call of fewer has its last sample repeated inside, takes as long, and returns what was asked for. Outputs of `run`
    lie where its inputs do: NumPy arrays in, NumPy arrays out; arrays in the memory of the engine's GPU in, such arrays
    out, not waited for.
    """

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def min_batch(self) -> int: ...

    @property
    def max_batch(self) -> int | None: ...

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Outputs of the network by name, of inputs by name: arrays (B, ...) as the graph declares them.

        Raises:
            EngineError: it failed, or the engine was closed.
        """
        ...


class Engine(OpenNetwork, Protocol):
    """A network in a backend. `close` frees its memory; it may be called twice. `choice` is set by `open_engine`.

    One whose calls can be a part of a recorded CUDA graph also has `call_lock`, held while such a graph is queued.
    """

    choice: Choice

    def close(self) -> None: ...


class Backend(Engine, Protocol):
    """What `ENGINES` names: the class of an engine."""

    @classmethod
    def opener(cls, graph: Graph, device: str, options: EngineOptions) -> Callable[[], Engine] | str:
        """For "auto": what opens the graph at once, or why that cannot be, as far as can be told before it is tried."""
        ...


def check_engine_options(options: object) -> None:
    """Raise EngineError unless it is an `EngineOptions`."""
    if not isinstance(options, EngineOptions):
        raise EngineError(
            f"options is an EngineOptions, such as EngineOptions(num_threads=1); got {options!r}"
        )


def open_engine(
    graph: Graph,
    *,
    engine: str = "auto",
    device: str | None = None,
    options: EngineOptions = DEFAULT_OPTIONS,
) -> Engine:
    """Open a network in the named backend; "auto" takes the fastest that can run here, in the order of `ENGINES`.

    "auto" leaves out engines that would first build for minutes: name those. An engine that is installed and does not
    work is passed over with a warning. "reference" is NumPy, which "auto" takes, with a warning that says what to
    install, where there is no ONNX Runtime.

    Args:
        graph: an ONNX model.
        engine: a name from `ENGINE_NAMES`.
        device: what it runs on, such as "cpu", "cuda" or "cuda:1"; None is the backend's best.
        options: threads and memory.

    Returns:
        The engine; its `choice` says why it was taken.

    Raises:
        EngineError: no such engine, or it cannot run here or on that device; or the graph is not whole, or reaches for
            what did not come with it.
        MissingExtraError: the backend's package is not installed.
    """
    if engine not in ENGINE_NAMES:
        raise EngineError(f"engine is one of {', '.join(ENGINE_NAMES)}; got {engine!r}")
    if device is not None and not isinstance(device, str):
        raise EngineError(f"device is a name, such as 'cpu' or 'cuda:1', or None; got device {device!r}")
    check_engine_options(options)
    graph.check()
    if engine == "auto":
        return _fastest(graph, device, options)
    opened = _backend(engine)(graph, _device(engine, device), options)
    opened.choice = Choice("it was asked for")
    return opened


def _fastest(graph: Graph, device: str | None, options: EngineOptions) -> Engine:
    passed_over: dict[str, str] = {}
    for name in _find_suited(device):
        opener = _opener(name, graph, _device(name, device), options)
        if isinstance(opener, str):
            passed_over[name] = opener.removeprefix(f"engine {name!r} ")
        else:
            try:
                opened = opener()
            except PiFlowError as error:
                if name == "ort-cpu":  # needs no device or driver that could be amiss: it is the graph
                    raise
                passed_over[name] = str(error).removeprefix(f"engine {name!r} ")
                log.warning("engine %r, which is installed, was passed over: %s", name, passed_over[name])
            else:
                opened.choice = Choice("it is the fastest that can run here", passed_over)
                log.info("engine %r on %s runs: %s", name, opened.device, opened.choice.reason)
                for other, why in passed_over.items():
                    log.info("engine %r was passed over: %s", other, why)
                if name == "reference":
                    log.warning(
                        "NumPy runs the network, many times slower than it could be: engine 'ort-cpu' %s",
                        passed_over["ort-cpu"],
                    )
                return opened
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in passed_over.items())
    raise EngineError(f"no engine can run here{f' on {device}' if device else ''}:{reasons}")


def _find_suited(device: str | None) -> list[str]:
    kind, colon, number = (device or "").partition(":")
    if colon and not _is_numbered(kind, number):
        raise EngineError(f"a device with a number is such as 'cuda:1'; got {device!r}")
    names = [name for name, (_, devices) in ENGINES.items() if not kind or kind in devices]
    if not names:
        kinds = sorted({kind for _, devices in ENGINES.values() for kind in devices})
        raise EngineError(f"an engine runs on {', '.join(kinds)}; got device {device!r}")
    return names


def _is_numbered(kind: str, number: str) -> bool:
    """Whether there may be several of a kind of device, of which this is one."""
    return kind in ("cuda", "gpu") and number.isascii() and number.isdecimal()


def _device(engine: str, device: str | None) -> str:
    devices = ENGINES[engine][1]
    kind, colon, number = (device or devices[0]).partition(":")
    if kind not in devices or (colon and not _is_numbered(kind, number)):
        raise EngineError(f"engine {engine!r} runs on {' or '.join(devices)}; got device {device!r}")
    return device or devices[0]


def _opener(name: str, graph: Graph, device: str, options: EngineOptions) -> Callable[[], Engine] | str:
    try:
        backend = _backend(name)
    except EngineError as error:  # this program was packed without it
        return str(error)
    return backend.opener(graph, device, options)


def _backend(name: str) -> type:
    module, _, class_name = ENGINES[name][0].partition(":")
    try:
        return getattr(import_module(module), class_name)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("piflow_edge."):
            raise
        raise EngineError(
            f"engine {name!r} is not part of this program, which was packed without {error.name}"
        ) from error
