"""How much memory the values of a graph take while it runs, told from their shapes."""

from collections.abc import Mapping, Sequence

import onnx

from piflow_edge.export.onnx_graphs.large import infer_values
from piflow_edge.export.onnx_graphs.value_names import read_names


def count_live_bytes(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> int:
    """Most bytes of values that must be there at a time: what a node reads and makes, and what later ones will read.

    Weights are not counted. A value whose shape is not known counts as the largest one that is.

    Args:
        model: its nodes in an order in which they run; its weights may be inside or in files.
        shapes: of the inputs.
    """
    _, sizes = infer_values(model, shapes)
    weights = {tensor.name for tensor in model.graph.initializer}
    values = {name for node in model.graph.node for name in node.output if name} | shapes.keys() - weights
    unknown = max((size for name, size in sizes.items() if name in values), default=0)
    last_read = {name: i for i, node in enumerate(model.graph.node) for name in read_names(node)}
    last_read |= {output.name: len(model.graph.node) for output in model.graph.output}
    alive = {name: sizes.get(name, unknown) for name in shapes.keys() - weights}
    most = sum(alive.values())
    for i, node in enumerate(model.graph.node):
        alive |= {name: sizes.get(name, unknown) for name in node.output if name}
        most = max(most, sum(alive.values()))
        alive = {name: size for name, size in alive.items() if last_read.get(name, -1) > i}
    return most
