"""Nodes of a graph run twice on the same values, as they are and as a conversion has them, and what that changes.

One piece of the graph and one input at a time: memory does not grow with the depth of the network.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper

from piflow_edge.engines.ort.importing import import_onnxruntime
from piflow_edge.errors import EngineError
from piflow_edge.export.conversions.calibration import Inputs, split_samples
from piflow_edge.export.conversions.pieces import Piece, cut_into_pieces

_FIGURES = (".most", ".least", ".squares", ".errors", ".count")


@dataclass
class Measures:
    """Of one value over the inputs of a batch: its largest magnitude, and sums of squares.

    `squares`: of the value. `errors`: of what the twin of its node makes otherwise.
    """

    largest: float = 0.0
    squares: float = 0.0
    errors: float = 0.0
    count: int = 0

    @property
    def scale(self) -> float:
        """Root mean square."""
        return float(np.sqrt(self.squares / self.count))

    @property
    def error(self) -> float:
        """Root mean square of the difference."""
        return float(np.sqrt(self.errors / self.count))

    def add(self, most, least, squares, errors, count) -> None:
        """Count one more input in. NaN stays."""
        self.largest = float(np.maximum(self.largest, np.maximum(most, -least)))
        self.squares += float(squares)
        self.errors += float(errors)
        self.count += int(count)


@dataclass
class Twins:
    """A piece of a graph with twins of some nodes beside it.

    `nodes`: all of them, in an order in which they can run. `weights`: that they read. `measured`: value that a node
    makes -> that node, and what its twin makes instead.
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    measured: dict[str, tuple[onnx.NodeProto, str]] = field(default_factory=dict)


def measure_twins(
    model: onnx.ModelProto,
    batches: Sequence[Inputs],
    add_twins: Callable[[Piece], Twins],
    opsets: Sequence[onnx.OperatorSetIdProto] = (),
) -> Iterator[tuple[onnx.NodeProto, str, list[Measures]]]:
    """Run nodes and their twins on the values that flow in float32.

    Args:
        model: fp32, its nodes in an order in which they can run.
        batches: calibration inputs; axis 0 of each array counts samples.
        add_twins: called with each piece of the graph.
        opsets: of the twins; none are the model's.

    Returns:
        Node, value that it makes, and its `Measures` in each batch, as the graph is walked.

    Raises:
        EngineError: ONNX Runtime cannot run a piece of the graph.
    """
    samples = [(i, sample) for i, batch in enumerate(batches) for sample in split_samples([batch])]
    for piece in cut_into_pieces(model, samples[0][1]):
        twins = add_twins(piece)
        session = _open(_build_model(piece, twins, opsets or model.opset_import, model.ir_version))
        found = {name: [Measures() for _ in batches] for name in twins.measured}
        wanted = [*piece.outputs, *(name + figure for name in found for figure in _FIGURES)]
        for i, values in samples:
            given = {name: values[name] for name in piece.inputs}
            results = iter(_run(session, wanted, given) if wanted else ())
            for name in piece.finished:
                del values[name]
            values.update(zip(piece.outputs, results, strict=False))
            for name in found:
                found[name][i].add(*(next(results) for _ in _FIGURES))
        for name, measures in found.items():
            yield twins.measured[name][0], name, measures


def _build_model(piece: Piece, twins: Twins, opsets, ir_version: int) -> bytes:
    """A model that gives a piece's outputs, and the `_FIGURES` of what is measured. `twins` gives its weights away."""
    measuring = [node for name, (_, twin) in twins.measured.items() for node in _measuring_nodes(name, twin)]
    model = onnx.ModelProto(ir_version=ir_version, opset_import=opsets)
    graph = model.graph
    graph.name = "piece"
    graph.node.extend([*twins.nodes, *measuring])
    while twins.weights:
        graph.initializer.append(twins.weights.pop())
    graph.input.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in piece.inputs.items())
    figures = [name + figure for name in twins.measured for figure in _FIGURES]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in [*piece.outputs, *figures])
    return model.SerializeToString()


def _measuring_nodes(name: str, twin: str) -> list[onnx.NodeProto]:
    """Nodes that make the `_FIGURES` of a value and of what its node's twin makes instead."""
    steps = [
        ("ReduceMax", [name], "most", {"keepdims": 0}),
        ("ReduceMin", [name], "least", {"keepdims": 0}),
        ("ReduceSumSquare", [name], "squares", {"keepdims": 0}),
        ("Sub", [twin, name], "difference", {}),
        ("ReduceSumSquare", [f"{name}.difference"], "errors", {"keepdims": 0}),
        ("Size", [name], "count", {}),
    ]
    return [
        helper.make_node(kind, inputs, [f"{name}.{output}"], **more) for kind, inputs, output, more in steps
    ]


def _open(model: bytes):
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors reach the caller as exceptions
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # they keep what was needed once
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        raise EngineError(f"onnxruntime {ort.__version__} cannot open the network: {error}") from error


def _run(session, wanted: list[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    try:
        return session.run(wanted, inputs)
    except Exception as error:
        raise EngineError(f"onnxruntime cannot run the network: {error}") from error
