"""NumPy alone: slow and plain, the answer the others are held to. Runs where nothing but piflow-edge is installed."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from piflow_edge.engines import Choice, Engine, EngineOptions, Graph
from piflow_edge.engines.onnx_file import Model, Node, Subgraph, read_model
from piflow_edge.engines.operators import OPERATORS
from piflow_edge.errors import EngineError

# Between these the operators of the table differ in attributes at most, and an unknown attribute is refused.
_OPSETS = range(17, 21)


class ReferenceEngine:
    """A network in NumPy.

    Args:
        graph: an ONNX model.
        device: "cpu".
        options: not used: the threads are those of NumPy's BLAS.

    Raises:
        EngineError: the file cannot be read, or has an operator that is not in `OPERATORS`.
    """

    name = "reference"
    min_batch = 1
    max_batch: int | None = None
    choice = Choice("it was asked for")

    def __init__(self, graph: Graph, device: str, options: EngineOptions):
        self.device = device
        # The arrays of a model are views of its bytes, which may be lent for opening alone.
        if graph.file is not None:
            weights = {name: bytes(content) for name, content in graph.weights.items()}
            graph = replace(graph, model=bytes(graph.model), weights=weights)
        self._model: Model | None = read_model(graph)
        if self._model.opset not in _OPSETS:
            raise EngineError(
                f"engine 'reference' knows the operators of opset {_OPSETS[0]} to {_OPSETS[-1]}; the network uses "
                f"{self._model.opset}"
            )
        _check(self._model.graph)

    @classmethod
    def opener(cls, graph: Graph, device: str, options: EngineOptions) -> Callable[[], Engine] | str:
        """See `Engine`."""
        return partial(cls, graph, device, options)

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One network call."""
        if (model := self._model) is None:
            raise EngineError("engine 'reference' is closed; open the network again")
        if inputs.keys() != set(model.graph.inputs):
            raise EngineError(f"the network takes {', '.join(model.graph.inputs)}; got {', '.join(inputs)}")
        given = {name: np.asarray(value) for name, value in inputs.items()}
        with np.errstate(all="ignore"):  # NaN and infinity are results, as in every other engine
            found = _run(model.graph, given, {})
        # Copied: an output may be a view of an input or of a weight.
        return {name: np.array(value, order="C") for name, value in found.items()}

    def close(self) -> None:
        """Free the network's memory, once calls that are under way have ended."""
        self._model = None


def _check(graph: Subgraph) -> None:
    """Refuse what cannot be computed before anything is."""
    for node in graph.nodes:
        known = "Scan" if node.operator == "Scan" else OPERATORS.get(node.operator)
        if known is None or node.domain not in ("", "ai.onnx"):
            name = f"{node.domain}.{node.operator}" if node.domain else node.operator
            raise EngineError(
                f"engine 'reference' has no operator {name}, which node {node.name!r} wants; it knows "
                f"{', '.join(sorted([*OPERATORS, 'Scan']))}. Use another engine: pip install 'piflow-edge[cpu]'"
            )
        if node.operator == "Split" and len(node.inputs) == 1:
            node.attributes.setdefault("num_outputs", len(node.outputs))  # opset 17 counts the outputs
        if known == "Scan":
            _check_scan(node)
        else:
            _check_arguments(node, known)


def _check_arguments(node: Node, function) -> None:
    try:
        inspect.signature(function).bind(*node.inputs, **node.attributes)
    except TypeError as error:
        raise EngineError(
            f"node {node.name!r} is no {node.operator} as engine 'reference' knows it: {error}"
        ) from error


def _check_scan(node: Node) -> None:
    body, count = node.attributes.get("body"), node.attributes.get("num_scan_inputs")
    if not (
        isinstance(body, Subgraph)
        and isinstance(count, int)
        and set(node.attributes) == {"body", "num_scan_inputs"}
        and 1 <= count <= len(node.inputs) == len(body.inputs)
        and len(node.inputs) - count <= len(body.outputs) == len(node.outputs)
    ):
        raise EngineError(
            f"node {node.name!r} is no Scan as engine 'reference' knows it: forward, along axis 0"
        )
    _check(body)


def _run(
    graph: Subgraph, inputs: Mapping[str, np.ndarray], outer: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The outputs of a graph. `outer`: values of the graphs around it, which its nodes may read."""
    values = {**outer, **graph.constants, **inputs}
    last_read = {name: i for i, node in enumerate(graph.nodes) for name in _reads(node)}
    keep = {*graph.outputs, *outer}
    for i, node in enumerate(graph.nodes):
        for name, value in zip(node.outputs, _compute(node, values), strict=False):
            values[name] = value
        for name in {*_reads(node), *node.outputs}:
            if name not in keep and last_read.get(name, i) <= i:
                values.pop(name, None)  # nobody reads it any more
    try:
        return {name: values[name] for name in graph.outputs}
    except KeyError as error:
        raise EngineError(f"no node of the network makes its output {error}") from error


def _reads(node: Node) -> list[str]:
    body = node.attributes.get("body")
    inner = (
        [name for n in body.nodes for name in _reads(n)] + body.outputs if isinstance(body, Subgraph) else []
    )
    return [*node.inputs, *inner]


def _compute(node: Node, values: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    where = f"node {node.name!r} ({node.operator})"
    try:
        arguments: list[Any] = [values[name] if name else None for name in node.inputs]
    except KeyError as error:
        raise EngineError(f"{where} reads {error}, which no node before it makes") from error
    if node.operator == "Scan":
        return _scan(node, arguments, values)
    try:
        found = OPERATORS[node.operator](*arguments, **node.attributes)
    except EngineError as error:
        raise EngineError(f"{where}: {error}") from error
    except (
        Exception
    ) as error:  # NumPy's, of a dozen classes: shapes that do not fit, indices out of range, no memory
        shapes = ", ".join("none" if a is None else f"{a.dtype} {a.shape}" for a in arguments)
        raise EngineError(f"{where} cannot be computed from {shapes}: {error}") from error
    found = found if isinstance(found, tuple) else (found,)
    # A row of constants or a slice is a view; operators of no axis give NumPy's scalars.
    return tuple(np.asarray(value) for value in found)


def _scan(
    node: Node, arguments: list[np.ndarray], values: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, ...]:
    """A loop over the first axis of the last `num_scan_inputs` inputs; the others are carried along."""
    body, count = node.attributes["body"], node.attributes["num_scan_inputs"]
    states, sequences = arguments[:-count], arguments[-count:]
    lengths = {len(sequence) if sequence is not None and sequence.ndim else None for sequence in sequences}
    if len(lengths) != 1 or None in lengths:
        raise EngineError(f"node {node.name!r} (Scan) needs sequences of one length; got {lengths}")
    stacks: list[list[np.ndarray]] = [[] for _ in body.outputs[len(states) :]]
    for rows in zip(*sequences, strict=True):
        inputs = dict(zip(body.inputs, [*states, *map(np.asarray, rows)], strict=True))
        found = _run(body, inputs, values)
        ends = [found[name] for name in body.outputs]
        states = ends[: len(states)]
        for row, value in zip(stacks, ends[len(states) :], strict=True):
            row.append(value)
    return (*states, *map(np.stack, stacks))
