"""A graph of opset 18 as one of 17, the newest that the parsers of TensorRT 8.5 and 8.6 promise (JetPack 5 and 6.0).

onnx's own converter has no way down for `Split`. Few operators of ours changed in 18, and those hardly.
"""

from collections.abc import Iterator, Mapping, Set

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from piflow_edge.errors import CheckFailedError

OPSETS = (17, 18)

# What 18 added and 17 lacks, where it says what 17 does anyway.
_NEW_DEFAULTS = {"Resize": {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"}}
_MOST_INPUTS = {"Pad": 3, "Resize": 4}


def lower_opset(data: bytes) -> bytes:
    """The model in opset 17.

    Args:
        data: a model of opset 18.

    Raises:
        CheckFailedError: it needs something of 18, which is named.
    """
    model = onnx.load_from_string(data)
    _lower(model.graph, {})
    used = set(_read(model.graph))
    for i in reversed(range(len(model.graph.initializer))):  # axes that are attributes now
        if model.graph.initializer[i].name not in used:
            del model.graph.initializer[i]
    model.ir_version = min(model.ir_version, 8)  # which came with opset 17
    for entry in model.opset_import:
        if entry.domain == "":
            entry.version = 17
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise CheckFailedError(f"the graph is not valid in opset 17: {error}") from error
    return model.SerializeToString()


def _read(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that nodes read, at any depth, and outputs."""
    yield from (value.name for value in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _read(attribute.g)


def _lower(graph: onnx.GraphProto, outer: Mapping[str, TensorProto]) -> None:
    constants = {**outer, **{tensor.name: tensor for tensor in graph.initializer}}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name in ("value", "value_ints"):
            attribute = node.attribute[0]
            ints = numpy_helper.from_array(np.array(attribute.ints, np.int64))
            constants[node.output[0]] = attribute.t if attribute.name == "value" else ints
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _lower(attribute.g, constants)
        if node.domain == "" and onnx.defs.get_schema(node.op_type, 18).since_version == 18:
            _lower_node(node, constants)


def _lower_node(node: onnx.NodeProto, constants: Mapping[str, TensorProto]) -> None:
    if node.op_type == "Split":
        # Without sizes both split evenly; 17 counts the outputs.
        _drop(node, {"num_outputs": len(node.output)})
    elif node.op_type.startswith("Reduce"):
        if len(node.input) > 1 and node.input[1]:
            if node.input[1] not in constants:
                raise CheckFailedError(
                    f"{node.name} ({node.op_type}) reduces axes that opset 17 wants constant"
                )
            axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
            node.attribute.append(helper.make_attribute("axes", axes))
        del node.input[1:]
        _drop(node, {"noop_with_empty_axes": 0})
    elif node.op_type in _MOST_INPUTS and len(node.input) <= _MOST_INPUTS[node.op_type]:
        _drop(node, _NEW_DEFAULTS.get(node.op_type, {}))
    else:
        raise CheckFailedError(f"{node.name} ({node.op_type}) is an operator of opset 18; export with that")


def _drop(node: onnx.NodeProto, defaults: Mapping[str, object]) -> None:
    """Take attributes away that 17 does not know, as long as they ask for what it does."""
    known = _attributes(node.op_type)
    for attribute in list(node.attribute):
        if attribute.name in known:
            continue
        if helper.get_attribute_value(attribute) != defaults.get(attribute.name):
            raise CheckFailedError(f"{node.name} ({node.op_type}) uses {attribute.name} of opset 18")
        node.attribute.remove(attribute)


def _attributes(kind: str) -> Set[str]:
    return onnx.defs.get_schema(kind, 17).attributes.keys()
