"""Lookup tables of a graph, such as the vectors of a vocabulary, in fewer bits: quantisers look at products only."""

from collections.abc import Callable, Container

import onnx
from onnx import TensorProto, helper, numpy_helper

from piflow_edge.export.conversions.narrow_tensors import halve, is_worth_it, round_to_int8
from piflow_edge.export.onnx_graphs.large import Workpiece
from piflow_edge.export.onnx_graphs.value_names import ValueNames


def halve_lookup_tables(model: onnx.ModelProto, only: Container[str] | None = None) -> list[str]:
    """Keep float32 tables that are only looked up in as fp16, and widen what is found.

    Args:
        model: is changed.
        only: names of the nodes (`Gather`) that may look up in half precision; None is all.

    Returns:
        Names of those that do now.
    """
    graph = model.graph
    tables = _find_tables(graph, lambda lookup: only is None or lookup.name in only)
    halved = set()
    for table in tables:
        if (half := halve(table)) is not None:
            table.CopyFrom(half)
            halved.add(table.name)
    lookups = _find_lookups(graph, halved)
    names = ValueNames(graph)
    for lookup in lookups:
        _widen_output(graph, lookup, names)
    return [lookup.name for lookup in lookups]


def quantise_lookup_tables(work: Workpiece) -> None:
    """Keep float32 tables whose rows alone are looked up as int8, with one scale per row, and scale what is found."""
    graph = work.model.graph
    tables = _find_tables(graph, _finds_rows)
    for table in tables:
        rounded, scales = round_to_int8(numpy_helper.to_array(work.load(table)), 1)
        work.replace(table, numpy_helper.from_array(rounded, table.name))
        work.add(numpy_helper.from_array(scales, _scales_of(table.name)))
    names = ValueNames(graph)
    for lookup in _find_lookups(graph, {table.name for table in tables}):
        _scale_output(graph, lookup, names)


def _find_tables(graph: onnx.GraphProto, may_look_up: Callable[[onnx.NodeProto], bool]) -> list[TensorProto]:
    """Float32 matrices that nothing reads but a `Gather` that may."""
    readers = [(name, node, place) for node in graph.node for place, name in enumerate(node.input)]

    def is_lookup(node: onnx.NodeProto, place: int) -> bool:
        return node.op_type == "Gather" and place == 0 and may_look_up(node)

    looked_up = {name for name, node, place in readers if is_lookup(node, place)}
    looked_up -= {name for name, node, place in readers if not is_lookup(node, place)}
    return [
        tensor
        for tensor in graph.initializer
        if tensor.name in looked_up and len(tensor.dims) == 2 and is_worth_it(tensor)
    ]


def _find_lookups(graph: onnx.GraphProto, tables: Container[str]) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]


def _finds_rows(lookup: onnx.NodeProto) -> bool:
    return all(one.name != "axis" or one.i == 0 for one in lookup.attribute)


def _scales_of(table: str) -> str:
    return f"{table}.scales"


def _scale_output(graph: onnx.GraphProto, lookup: onnx.NodeProto, names: ValueNames) -> None:
    """Let a lookup give int8, and multiply what it finds by the scales of the same rows."""
    (table, rows), found = lookup.input, lookup.output[0]
    lookup.output[0], wide, scale = (names.add(f"{found}.{end}") for end in ("int8", "wide", "scale"))
    _insert_after(
        graph,
        lookup,
        helper.make_node("Cast", [lookup.output[0]], [wide], to=TensorProto.FLOAT),
        helper.make_node("Gather", [_scales_of(table), rows], [scale]),
        helper.make_node("Mul", [wide, scale], [found]),
    )


def _insert_after(graph: onnx.GraphProto, node: onnx.NodeProto, *added: onnx.NodeProto) -> None:
    place = next(i for i, each in enumerate(graph.node) if each.output[:1] == node.output[:1])
    for each in reversed(added):
        graph.node.insert(place + 1, each)


def _widen_output(graph: onnx.GraphProto, lookup: onnx.NodeProto, names: ValueNames) -> None:
    """Let a lookup give fp16, and cast what it finds for those who read it in float32."""
    found = lookup.output[0]
    narrow = next((node for node in graph.node if node.input[:1] == [found] and _is_cast_to_half(node)), None)
    if narrow is None:
        lookup.output[0] = names.add(f"{found}.half")
    else:  # some read it in fp16 already
        lookup.output[0] = narrow.output[0]
        graph.node.remove(narrow)
    _insert_after(graph, lookup, helper.make_node("Cast", [lookup.output[0]], [found], to=TensorProto.FLOAT))


def _is_cast_to_half(node: onnx.NodeProto) -> bool:
    return node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT16
