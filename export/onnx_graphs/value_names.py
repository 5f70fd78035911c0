"""Names of a graph's values: which a node reads, and new ones, for ONNX wants each to have a name of its own."""

import itertools
from collections.abc import Iterator

import onnx


class ValueNames:
    """Names of a graph's values, to which new ones are added."""

    def __init__(self, graph: onnx.GraphProto):
        self._taken = {name for node in graph.node for name in [*node.input, *node.output]}
        self._taken |= {one.name for one in [*graph.input, *graph.output, *graph.initializer]}

    def add(self, wanted: str) -> str:
        """Return `wanted`, or the first free of `wanted_1`, `wanted_2`, ... where a value has that name already."""
        numbered = (f"{wanted}_{i}" for i in itertools.count(1))
        name = next(name for name in itertools.chain([wanted], numbered) if name not in self._taken)
        self._taken.add(name)
        return name


def read_names(node: onnx.NodeProto) -> Iterator[str]:
    """Values that a node reads, its bodies included."""
    yield from node.input
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            for inner in body.node:
                yield from read_names(inner)
