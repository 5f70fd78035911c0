"""Which values of a graph are float32: what an export kept wide in an fp16 graph stands there as casts.

This is the graph's own word. A parser has none: TensorRT before 10 says float32 of every value until it builds.
"""

from collections.abc import Mapping

import numpy as np

from piflow_edge.engines.onnx_file import DTYPES, Model, Node

# Operators whose results are of one type, whatever they are given.
_ALWAYS = {
    **dict.fromkeys(("Shape", "Size", "NonZero", "ArgMax", "ArgMin"), "int64"),
    **dict.fromkeys(("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"), "bool"),
    **dict.fromkeys(("And", "Or", "Not", "Xor", "IsNaN", "IsInf"), "bool"),
}
# Operators whose result is of the type of an input that is not the first.
_BY_INPUT = {"Where": 1, "DequantizeLinear": 1, "CastLike": 1, "OneHot": 2, "QuantizeLinear": 2}
# Operators with subgraphs, of which no type is told.
_UNTOLD = ("If", "Loop", "Scan")
# Operators whose results after the first are of another type.
_FIRST_ALONE = ("TopK", "Dropout", "MaxPool", "Unique")
# They change or make a type, rather than compute in one.
_NO_ARITHMETIC = ("Cast", "CastLike", "Constant", "ConstantOfShape", "Shape", "Size", "QuantizeLinear")


def find_types(model: Model, inputs: Mapping[str, str]) -> dict[str, str]:
    """Number format of each value of the main graph, as NumPy names it, as far as it can be told.

    Args:
        model: the network.
        inputs: number format of each input.
    """
    types = {name: str(tensor.dtype) for name, tensor in model.graph.constants.items()} | dict(inputs)
    for node in model.graph.nodes:
        found = _type_of(node, types)
        outputs = node.outputs[:1] if node.operator in _FIRST_ALONE else node.outputs
        types |= {name: found for name in outputs if name and found}
    return types


def find_wide_nodes(model: Model, inputs: Mapping[str, str]) -> dict[str, set[str]]:
    """Nodes that compute in float32 -> those of their outputs that are float32. `inputs`: as in `find_types`."""
    types, wide = find_types(model, inputs), {}
    for node in model.graph.nodes:
        outputs = {name for name in node.outputs if types.get(name) == "float32"}
        if outputs and node.operator not in _NO_ARITHMETIC:
            wide[name_of(node)] = outputs
    return wide


def name_of(node: Node) -> str:
    """The node's name, or its first output's where it has none."""
    return node.name or next(name for name in node.outputs if name)


def _type_of(node: Node, types: Mapping[str, str]) -> str | None:
    attributes = node.attributes
    if node.operator in _ALWAYS:
        return _ALWAYS[node.operator]
    if node.operator in _UNTOLD:
        return None
    if node.operator in ("Cast", "RandomNormal", "RandomUniform", "EyeLike"):
        code = attributes.get("to", attributes.get("dtype", 1))
        return str(np.dtype(DTYPES[code])) if code in DTYPES else None
    if node.operator == "Constant":
        value = next(iter(attributes.values()), None)
        return str(value.dtype) if isinstance(value, np.ndarray) else _type_of_plain(value)
    if node.operator == "ConstantOfShape":
        return str(attributes["value"].dtype) if "value" in attributes else "float32"
    place = _BY_INPUT.get(node.operator)
    if place is not None:
        return types.get(node.inputs[place]) if len(node.inputs) > place else None
    return next((types[name] for name in node.inputs if name in types), None)


def _type_of_plain(value) -> str | None:
    first = value[0] if isinstance(value, list) and value else value
    return {float: "float32", int: "int64"}.get(type(first))
