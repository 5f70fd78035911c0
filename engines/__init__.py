"""Execution backends: one network call, nothing about segments or policies.

A backend is a class made from `(graph, device)`, `graph` being the bytes of an ONNX file whose checksum matched. Its
`run(inputs)` takes and returns `{name: NumPy array}`; `name` and `device` say what runs. Modules load when asked for.
"""

from importlib import import_module
from typing import Protocol

import numpy as np

from piflow_edge.errors import EngineError

# Name on the command line and in `load(engine=...)` -> where it lives, and the devices it can use.
ENGINES = {"ort": ("piflow_edge.engines.ort:OrtEngine", ("cpu",))}

ENGINE_NAMES = ("auto", *ENGINES)


class Engine(Protocol):
    """An opened network."""

    name: str
    device: str

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...


def open_engine(graph: bytes, *, engine: str = "auto", device: str | None = None) -> Engine:
    """Open a network in the named backend; "auto" takes the first that this machine can run.

    Args:
        graph: an ONNX model.
        engine: a name from `ENGINE_NAMES`.
        device: "cpu"; None is the backend's best.

    Raises:
        EngineError: no such engine, or it cannot run here or on that device.
        MissingExtraError: the backend's package is not installed.
    """
    if engine not in ENGINE_NAMES:
        raise EngineError(f"engine is one of {', '.join(ENGINE_NAMES)}; got {engine!r}")
    # One backend so far, so "auto" has no choice to make and cannot hide a failure of a better one.
    place, devices = ENGINES["ort" if engine == "auto" else engine]
    if device is not None and device not in devices:
        raise EngineError(f"engine {engine!r} runs on {' or '.join(devices)} in this release; got {device!r}")
    module, name = place.split(":")
    return getattr(import_module(module), name)(graph, device or devices[0])
