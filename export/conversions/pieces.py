"""A graph cut into pieces that follow each other, to be run one after the other on many inputs.

Memory holds the weights and values of one piece, and of every input what later pieces read. It does not grow with the
depth of the network, as it would if one session gave every layer's values.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from piflow_edge.export.onnx_graphs.large import count_bytes, infer_values
from piflow_edge.export.onnx_graphs.value_names import read_names

# Bytes of weights and values that a piece may have. A node larger than that is a piece of its own.
PIECE_BYTES = 128 << 20
# Times a value's size that a piece needs for it, at most: itself, rounded, its twin, their difference, and for each a
# temporary of the runtime's.
_COPIES = 8


@dataclass(frozen=True)
class Piece:
    """Nodes in a row.

    `inputs`: values that it reads from the graph's inputs or earlier pieces, with their types. `outputs`: values that
    later pieces read. `finished`: inputs that no later piece reads. `floats`: values in float32 that it reads or makes.
    """

    nodes: list[onnx.NodeProto]
    inputs: dict[str, int]
    outputs: list[str]
    finished: list[str]
    floats: set[str]
    weights: list[onnx.TensorProto]


def cut_into_pieces(
    model: onnx.ModelProto, example: Mapping[str, np.ndarray], limit: int | None = None
) -> Iterator[Piece]:
    """Cut a model where what crosses has a known type. Its weights may be inside or in files.

    Args:
        model: nodes in the order in which they can run.
        example: inputs of the shapes it will be run with.
        limit: bytes; None is `PIECE_BYTES`.
    """
    limit = PIECE_BYTES if limit is None else limit
    types, sizes = infer_values(model, {name: array.shape for name, array in example.items()})
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = list(model.graph.node)
    given = {value.name for value in model.graph.input} - weights.keys()
    known = given.union(*(node.output for node in nodes)) - {""}  # bodies have names of their own
    last_read = {name: i for i, node in enumerate(nodes) for name in read_names(node) if name in known}
    unknown = max(sizes.values(), default=0)
    start, cost, alive = 0, 0, set(given)
    for i, node in enumerate(nodes):
        cost += sum(count_bytes(weights[name]) for name in node.input if name in weights)
        cost += _COPIES * sum(sizes.get(name, unknown) for name in node.output if name)
        alive = {name for name in alive.union(node.output) if last_read.get(name, -1) > i}
        if i + 1 < len(nodes) and (cost < limit or not alive <= types.keys()):
            continue
        yield _make_piece(nodes[start : i + 1], alive, known, weights, types)
        start, cost = i + 1, 0


def _make_piece(
    nodes: list[onnx.NodeProto],
    alive: set[str],
    known: set[str],
    weights: Mapping[str, onnx.TensorProto],
    types: Mapping[str, int],
) -> Piece:
    outputs = {name for node in nodes for name in node.output}
    read = dict.fromkeys(name for node in nodes for name in read_names(node))
    inputs = {name: types[name] for name in read if name in known and name not in outputs}
    return Piece(
        nodes,
        inputs,
        sorted(outputs & alive),
        [name for name in inputs if name not in alive],
        {name for name in (*read, *outputs) if types.get(name) == onnx.TensorProto.FLOAT},
        [weights[name] for name in read if name in weights],
    )
