"""An fp32 graph as one of fp16, but for the nodes that stay: types, casts where they meet, and weights."""

import copy
from collections.abc import Container, Mapping, Set

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from piflow_edge.errors import CheckFailedError
from piflow_edge.export.onnx_graphs.large import load_tensor
from piflow_edge.export.onnx_graphs.value_names import ValueNames

# Operators that some runtime of ours has in float32 only.
FLOAT32_OPERATORS = (
    "CumSum", "Max", "Min", "NonMaxSuppression", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike", "Range", "RoiAlign", "TopK", "Upsample",
)  # fmt: skip
# Inputs that the standard wants in float32 whatever the others are in, by their place.
_FLOAT32_INPUTS = {"Resize": (2,)}


def convert_to_half(
    model: onnx.ModelProto, files: Mapping[str, bytes], float32_nodes: Container[str], floats: Set[str]
) -> onnx.ModelProto:
    """Put all nodes but the `float32_nodes` ones into fp16. Inputs and outputs of the graph stay float32.

    Args:
        model: fp32; it is left as it is.
        files: contents of the files that its weights lie in, if they do.
        kept: names of nodes.
        floats: values and weights in float32.

    Returns:
        A model with all weights inside. Each is converted as it is read: two copies of one weight exist at a time.

    Raises:
        CheckFailedError: a node has a body, of which nothing is known here.
    """
    return _Conversion(model, files, float32_nodes, floats).convert()


class _Conversion:
    def __init__(self, model, files: Mapping[str, bytes], float32_nodes: Container[str], floats: Set[str]):
        self._model, self._files, self._float32_nodes, self._floats = model, files, float32_nodes, floats
        self._weights = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
        self._outputs = {value.name for value in model.graph.output}
        self._names = ValueNames(model.graph)
        self._nodes: list[onnx.NodeProto] = []
        self._half: set[str] = set()  # values that are fp16 now
        self._casts: dict[tuple[str, int], str] = {}  # value, type -> the same value in that type
        self._read: dict[str, set[int]] = {
            name: set() for name in self._weights
        }  # weight -> types it is read in
        read_by_half = {
            name for node in model.graph.node if node.name not in float32_nodes for name in node.input
        }
        # Read in both types, a weight needs two names.
        self._float_names = {
            name: self._names.add(f"{name}.float") if name in read_by_half else name for name in self._weights
        }

    def convert(self) -> onnx.ModelProto:
        for node in self._model.graph.node:
            if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
                raise CheckFailedError(
                    f"{node.name} ({node.op_type}) has a body, and fp16 is for graphs without; export without fp16"
                )
            new = copy.deepcopy(node)
            if node.name in self._float32_nodes:
                new.input[:] = [self._read_as(name, TensorProto.FLOAT) for name in node.input]
                self._nodes.append(new)
            else:
                self._add_half(new)
        graph = onnx.GraphProto(name=self._model.graph.name, node=self._nodes)
        graph.input.extend(value for value in self._model.graph.input if value.name not in self._weights)
        graph.output.extend(self._model.graph.output)
        for tensor in self._model.graph.initializer:
            self._add_weight(graph, tensor)
        return helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version
        )

    def _add_half(self, node: onnx.NodeProto) -> None:
        exact = _FLOAT32_INPUTS.get(node.op_type, ())
        node.input[:] = [
            self._read_as(name, TensorProto.FLOAT if i in exact else TensorProto.FLOAT16)
            for i, name in enumerate(node.input)
        ]
        _set_types(node)
        self._nodes.append(node)
        for i, name in enumerate(node.output):
            if name not in self._floats:
                continue
            if name in self._outputs:  # the name is the float32 value's
                node.output[i] = self._casts[name, TensorProto.FLOAT16] = self._names.add(f"{name}.half")
                self._nodes.append(helper.make_node("Cast", [node.output[i]], [name], to=TensorProto.FLOAT))
            else:
                self._half.add(name)

    def _read_as(self, name: str, kind: int) -> str:
        """Name of a value in float32 or fp16; if need be, of a new cast's result."""
        if name in self._weights:
            self._read[name].add(kind)
            return name if kind == TensorProto.FLOAT16 else self._float_names[name]
        is_half = name in self._half
        if name not in self._floats or is_half == (kind == TensorProto.FLOAT16):
            return name
        if (name, kind) not in self._casts:
            ending = "half" if kind == TensorProto.FLOAT16 else "float"
            self._casts[name, kind] = self._names.add(f"{name}.{ending}")
            self._nodes.append(helper.make_node("Cast", [name], [self._casts[name, kind]], to=kind))
        return self._casts[name, kind]

    def _add_weight(self, graph: onnx.GraphProto, tensor: TensorProto) -> None:
        if tensor.name not in self._weights:
            graph.initializer.append(load_tensor(tensor, self._files))
            return
        kinds = self._read[tensor.name]
        content = load_tensor(tensor, self._files)
        if TensorProto.FLOAT16 in kinds:
            graph.initializer.append(_as_half(content))
        if TensorProto.FLOAT in kinds:
            graph.initializer.append(content)
            graph.initializer[-1].name = self._float_names[tensor.name]


def _set_types(node: onnx.NodeProto) -> None:
    """Let a node that names a type or holds values make fp16 where it made float32."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        elif attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(_as_half(attribute.t))
    if node.op_type == "ConstantOfShape" and not node.attribute:  # which is 0 in float32
        node.attribute.append(
            helper.make_attribute("value", numpy_helper.from_array(np.zeros(1, np.float16)))
        )


def _as_half(tensor: TensorProto) -> TensorProto:
    with np.errstate(over="ignore"):
        return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
