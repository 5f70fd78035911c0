"""Execution backends: one network call, nothing about segments or policies.

A backend is a class made from `(graph, device, options)`. Its `run(inputs)` takes and returns `{name: array}`; `name`
and `device` say what runs. Modules load when asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from piflow_edge.errors import EngineError

# Name on the command line and in `load(engine=...)` -> where it lives, and the devices it can use.
ENGINES = {"ort-cpu": ("piflow_edge.engines.ort:OrtEngine", ("cpu",))}

ENGINE_NAMES = ("auto", *ENGINES)


@dataclass(frozen=True)
class Graph:
    """An ONNX model whose checksums matched.

    `model`: the bytes of the .onnx file. `weights`: content of the files it keeps weights in, by the name the model
    gives them; empty unless it is too large for one file.
    """

    model: bytes
    weights: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineOptions:
    """How a backend uses the machine. `num_threads`: of the CPU; None is one for each core this process may use."""

    num_threads: int | None = None


class Engine(Protocol):
    """An opened network.

    `max_batch`: most samples in one call, None for any number. Outputs of `run` lie where its inputs do: NumPy arrays
    in, NumPy arrays out; arrays in the memory of the engine's GPU in, such arrays out. `close` frees its memory; it
    may be called twice.
    """

    name: str
    device: str
    max_batch: int | None

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]: ...

    def close(self) -> None: ...


def open_engine(
    graph: Graph,
    *,
    engine: str = "auto",
    device: str | None = None,
    options: EngineOptions = EngineOptions(),
) -> Engine:
    """Open a network in the named backend; "auto" takes the first that this machine can run.

    Args:
        graph: an ONNX model.
        engine: a name from `ENGINE_NAMES`.
        device: "cpu"; None is the backend's best.
        options: threads and memory.

    Raises:
        EngineError: no such engine, or it cannot run here or on that device.
        MissingExtraError: the backend's package is not installed.
    """
    if engine not in ENGINE_NAMES:
        raise EngineError(f"engine is one of {', '.join(ENGINE_NAMES)}; got {engine!r}")
    # One backend so far, so "auto" has no choice to make and cannot hide a failure of a better one.
    place, devices = ENGINES["ort-cpu" if engine == "auto" else engine]
    if device is not None and device not in devices:
        raise EngineError(f"engine {engine!r} runs on {' or '.join(devices)} in this release; got {device!r}")
    module, name = place.split(":")
    return getattr(import_module(module), name)(graph, device or devices[0], options)
