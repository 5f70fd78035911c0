"""The float nodes of a graph with twins that read, hold and write fp16."""

import copy
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from piflow_edge.export.conversions.pieces import Piece
from piflow_edge.export.conversions.twins import Twins
from piflow_edge.export.onnx_graphs.large import load_tensor

_ROUNDED = ".rounded"


def add_half_twins(piece: Piece, files: Mapping[str, bytes]) -> Twins:
    """Give each float node a twin whose inputs, weights and outputs are rounded to fp16.

    `files`: contents of the files that the graph's weights lie in, if they do.
    """
    twins = Twins(weights=[load_tensor(tensor, files) for tensor in piece.weights])
    rounded: dict[str, str] = {}  # float value -> the same, rounded to fp16
    for tensor in list(twins.weights):
        if tensor.data_type == TensorProto.FLOAT:
            rounded[tensor.name] = f"{tensor.name}.in"
            values = _round(numpy_helper.to_array(tensor))
            twins.weights.append(numpy_helper.from_array(values, f"{tensor.name}.in"))
    for node in piece.nodes:
        for name in piece.floats.intersection(node.input) - rounded.keys():
            rounded[name] = f"{name}.in"
            twins.nodes += _round_trip(name, rounded[name])
        twins.nodes.append(node)
        outputs = [name for name in node.output if name in piece.floats]
        if outputs and node.op_type != "Constant":
            twins.nodes.append(_make_twin(node, rounded))
            for name in outputs:
                twins.nodes += _round_trip(name + _ROUNDED, f"{name}.twin")
                twins.measured[name] = (node, f"{name}.twin")
    return twins


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
