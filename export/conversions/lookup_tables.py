"""Lookup tables of a graph, such as the vectors of a vocabulary, in fewer bits: quantisers look at products only."""

import math
from collections.abc import Container

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from piflow_edge.export.onnx_graphs.value_names import ValueNames

# Values of a table from which on it is worth a cast.
_LEAST = 4096
_FP16_LARGEST = float(np.finfo(np.float16).max)


def halve_lookup_tables(model: onnx.ModelProto, only: Container[str] | None = None) -> list[str]:
    """Keep float32 tables that are only looked up in as fp16, and widen what is found.

    Args:
        model: is changed.
        only: names of the nodes (`Gather`) that may look up in half precision; None is all.

    Returns:
        Names of those that do now.
    """
    graph = model.graph
    half_tables = {tensor.name for tensor in _find_tables(graph, only) if _halve(tensor)}
    lookups = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in half_tables]
    names = ValueNames(graph)
    for node in lookups:
        _widen_output(graph, node, names)
    return [node.name for node in lookups]


def quantise_lookup_tables(model: onnx.ModelProto) -> None:
    """Keep float32 tables that are only looked up in as int8, with one scale per row, and scale what is found."""
    graph = model.graph
    tables = {tensor.name: tensor for tensor in _find_tables(graph, None)}
    names = ValueNames(graph)
    for lookup in [node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]:
        if tables[lookup.input[0]].data_type == TensorProto.FLOAT:
            _add_scales(graph, tables[lookup.input[0]])
        _scale_output(graph, lookup, names)


def _find_tables(graph: onnx.GraphProto, only: Container[str] | None) -> list[TensorProto]:
    """Float32 tables worth it that nothing but a `Gather`, of those named, looks up rows in."""
    readers = [(name, node, place) for node in graph.node for place, name in enumerate(node.input)]

    def is_lookup(node: onnx.NodeProto, place: int) -> bool:
        of_rows = all(one.name != "axis" or one.i == 0 for one in node.attribute)
        return node.op_type == "Gather" and place == 0 and of_rows and (only is None or node.name in only)

    looked_up = {name for name, node, place in readers if is_lookup(node, place)}
    looked_up -= {name for name, node, place in readers if not is_lookup(node, place)}
    return [
        tensor
        for tensor in graph.initializer
        if tensor.name in looked_up
        and tensor.data_type == TensorProto.FLOAT
        and len(tensor.dims) == 2
        and math.prod(tensor.dims) >= _LEAST
    ]


def _add_scales(graph: onnx.GraphProto, table: TensorProto) -> None:
    """Make a table int8, and add what its rows are multiplied by, (rows, 1), as another."""
    values = numpy_helper.to_array(table)
    scales = np.abs(values).max(1, keepdims=True) / 127
    scales = np.where(scales > 0, scales, 1).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(scales, _scales_of(table.name)))
    table.CopyFrom(numpy_helper.from_array(np.rint(values / scales).astype(np.int8), table.name))


def _scales_of(table: str) -> str:
    return f"{table}.scales"


def _scale_output(graph: onnx.GraphProto, lookup: onnx.NodeProto, names: ValueNames) -> None:
    """Let a lookup give int8, and multiply what it finds by the scales of the same rows."""
    table, rows = lookup.input
    found = lookup.output[0]
    place = next(i for i, node in enumerate(graph.node) if node.output[:1] == [found])
    lookup.output[0], wide, scale = (names.add(f"{found}.{end}") for end in ("int8", "wide", "scale"))
    added = [
        helper.make_node("Cast", [lookup.output[0]], [wide], to=TensorProto.FLOAT),
        helper.make_node("Gather", [_scales_of(table), rows], [scale]),
        helper.make_node("Mul", [wide, scale], [found]),
    ]
    for node in reversed(added):
        graph.node.insert(place + 1, node)


def _widen_output(graph: onnx.GraphProto, lookup: onnx.NodeProto, names: ValueNames) -> None:
    """Let a lookup give fp16, and cast what it finds for those who read it in float32."""
    found = lookup.output[0]
    narrow = next((node for node in graph.node if node.input[:1] == [found] and _is_cast_to_half(node)), None)
    if narrow is None:
        lookup.output[0] = names.add(f"{found}.half")
    else:  # some read it in fp16 already
        lookup.output[0] = narrow.output[0]
        graph.node.remove(narrow)
    place = next(i for i, node in enumerate(graph.node) if node.output[:1] == lookup.output[:1])
    graph.node.insert(place + 1, helper.make_node("Cast", [lookup.output[0]], [found], to=TensorProto.FLOAT))


def _is_cast_to_half(node: onnx.NodeProto) -> bool:
    return node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT16


def _halve(tensor: TensorProto) -> bool:
    """Make a tensor fp16; return False where its values do not fit."""
    values = numpy_helper.to_array(tensor)
    if not np.abs(values).max() <= _FP16_LARGEST:
        return False
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))
    return True
