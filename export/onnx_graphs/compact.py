"""What a graph can do without: types that can be inferred, equal weights stored twice, long names of a converter's.

Constant folding and the like are the exporter's: torch runs onnxscript's optimizer on every graph. Of a DiT, onnxslim
takes 5 % of its nodes away after that, which is not worth another dependency; ONNX Runtime's own pass adds some.
"""

from collections.abc import Iterable

import onnx
from onnx import numpy_helper


def compact(model: onnx.ModelProto, known: Iterable[str] = ()) -> None:
    """Make the file smaller without changing what it computes.

    Args:
        model: changed in place. Its nodes keep their names.
        known: values that keep their names too; inputs, outputs and weights of several axes do in any case.
    """
    model.graph.ClearField("value_info")
    del model.metadata_props[:]
    if any(
        attribute.HasField("g") or attribute.graphs
        for node in model.graph.node
        for attribute in node.attribute
    ):
        return  # a body reads values of the graph around it
    _merge_equal_weights(model.graph)
    _shorten_names(model.graph, set(known))


def _merge_equal_weights(graph: onnx.GraphProto) -> None:
    """Small ones only, such as the zero points of a quantised layer: large ones that are equal are one already."""
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    first: dict[tuple, str] = {}
    renamed: dict[str, str] = {}
    for tensor in graph.initializer:
        inside = tensor.data_location != onnx.TensorProto.EXTERNAL
        if tensor.name in used and inside and len(tensor.dims) < 2:
            values = numpy_helper.to_array(tensor)
            content = (tensor.data_type, values.shape, values.tobytes())
            original = first.setdefault(content, tensor.name)
            if original != tensor.name:
                renamed[tensor.name] = original
    for i in reversed(range(len(graph.initializer))):  # in place: weights may fill half of the memory
        name = graph.initializer[i].name
        if name in renamed or name not in used:
            del graph.initializer[i]
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


def _shorten_names(graph: onnx.GraphProto, known: set[str]) -> None:
    known |= {value.name for value in [*graph.input, *graph.output]} | {""}
    known |= {tensor.name for tensor in graph.initializer if len(tensor.dims) > 1}
    outputs = [name for node in graph.node for name in node.output]
    new = [name for name in [*outputs, *(t.name for t in graph.initializer)] if name not in known]
    free = (name for name in map("v{:x}".format, range(len(new) + len(known))) if name not in known)
    short = dict(zip(new, free, strict=False))
    for tensor in graph.initializer:
        tensor.name = short.get(tensor.name, tensor.name)
    for node in graph.node:
        node.input[:] = [short.get(name, name) for name in node.input]
        node.output[:] = [short.get(name, name) for name in node.output]
