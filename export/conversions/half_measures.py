"""What half precision does to each node of a graph: measured on calibration inputs, one piece and input at a time."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from piflow_edge.engines.ort.importing import import_onnxruntime
from piflow_edge.errors import EngineError
from piflow_edge.export.conversions.calibration import Inputs, split_samples
from piflow_edge.export.conversions.pieces import Piece, cut_into_pieces
from piflow_edge.export.onnx_graphs.large import load_tensor

_ROUNDED = ".rounded"
_FIGURES = (".most", ".least", ".squares", ".errors", ".count")


@dataclass
class Measures:
    """Of one value over the inputs of a batch: its largest magnitude, and sums of squares.

    `squares`: of the value. `errors`: of what its node's twin, which reads and writes fp16, makes otherwise.
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


def measure_half(
    model: onnx.ModelProto, batches: Sequence[Inputs], files: Mapping[str, bytes]
) -> Iterator[tuple[onnx.NodeProto, str, list[Measures]]]:
    """Run each float node twice on the values that flow in float32: as they are, and rounded to fp16.

    Args:
        model: fp32, its nodes in an order in which they can run.
        batches: calibration inputs; axis 0 of each array counts samples.
        files: contents of the files that its weights lie in, if they do.

    Returns:
        Node, value that it makes, and its `Measures` in each batch, as the graph is walked.

    Raises:
        EngineError: ONNX Runtime cannot run a piece of the graph.
    """
    samples = [(i, sample) for i, batch in enumerate(batches) for sample in split_samples([batch])]
    for piece in cut_into_pieces(model, samples[0][1]):
        session, measured = _open_with_twins(piece, model, files)
        found = {name: [Measures() for _ in batches] for name in measured}
        wanted = [*piece.outputs, *(name + figure for name in found for figure in _FIGURES)]
        for i, values in samples:
            results = iter(_run(session, wanted, {name: values[name] for name in piece.inputs}))
            for name in piece.finished:
                del values[name]
            values.update(zip(piece.outputs, results, strict=False))
            for name in found:
                found[name][i].add(*(next(results) for _ in _FIGURES))
        for name, measures in found.items():
            yield measured[name], name, measures


def _open_with_twins(piece: Piece, model: onnx.ModelProto, files: Mapping[str, bytes]):
    """A session that gives a piece's outputs and `_FIGURES`; and for each value that these are of, its node."""
    graph, measured = _graph_with_twins(piece, files)
    whole = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors reach the caller as exceptions
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # they keep what was needed once
    try:
        session = ort.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        raise EngineError(f"onnxruntime {ort.__version__} cannot open the network: {error}") from error
    return session, measured


def _run(session, wanted: list[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    try:
        return session.run(wanted, inputs)
    except Exception as error:
        raise EngineError(f"onnxruntime cannot run the network: {error}") from error


def _graph_with_twins(
    piece: Piece, files: Mapping[str, bytes]
) -> tuple[onnx.GraphProto, dict[str, onnx.NodeProto]]:
    nodes: list[onnx.NodeProto] = []
    weights = [load_tensor(tensor, files) for tensor in piece.weights]
    rounded: dict[str, str] = {}  # float value -> the same, rounded to fp16
    for tensor in list(weights):
        if tensor.data_type == TensorProto.FLOAT:
            rounded[tensor.name] = f"{tensor.name}.in"
            weights.append(
                numpy_helper.from_array(_round(numpy_helper.to_array(tensor)), f"{tensor.name}.in")
            )
    measured: dict[str, onnx.NodeProto] = {}
    for node in piece.nodes:
        for name in piece.floats.intersection(node.input) - rounded.keys():
            rounded[name] = f"{name}.in"
            nodes += _round_trip(name, rounded[name])
        nodes.append(node)
        outputs = [name for name in node.output if name in piece.floats]
        if outputs and node.op_type != "Constant":
            nodes.append(_make_twin(node, rounded))
            for name in outputs:
                nodes += _measuring_nodes(name)
                measured[name] = node
    figures = [name + figure for name in measured for figure in _FIGURES]
    graph = onnx.GraphProto(name="piece", node=nodes, initializer=weights)
    graph.input.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in piece.inputs.items())
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in [*piece.outputs, *figures])
    return graph, measured


def _make_twin(node: onnx.NodeProto, rounded: Mapping[str, str]) -> onnx.NodeProto:
    twin = copy.deepcopy(node)
    twin.name = node.name + _ROUNDED
    twin.input[:] = [rounded.get(name, name) for name in node.input]
    twin.output[:] = [name and name + _ROUNDED for name in node.output]
    return twin


def _round(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinity, as in a Cast
        return array.astype(np.float16).astype(np.float32)


def _round_trip(name: str, result: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Cast", [name], [f"{result}.half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", [f"{result}.half"], [result], to=TensorProto.FLOAT),
    ]


def _measuring_nodes(name: str) -> list[onnx.NodeProto]:
    """Nodes that make the `_FIGURES` of a value and of its twin, which is rounded too."""
    back, difference = f"{name}.twin", f"{name}.difference"
    steps = [
        ("ReduceMax", [name], "most", {"keepdims": 0}),
        ("ReduceMin", [name], "least", {"keepdims": 0}),
        ("ReduceSumSquare", [name], "squares", {"keepdims": 0}),
        ("Sub", [back, name], "difference", {}),
        ("ReduceSumSquare", [difference], "errors", {"keepdims": 0}),
        ("Size", [name], "count", {}),
    ]
    return [
        *_round_trip(name + _ROUNDED, back),
        *(
            helper.make_node(kind, inputs, [f"{name}.{output}"], **more)
            for kind, inputs, output, more in steps
        ),
    ]
