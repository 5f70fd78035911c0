"""Names for what a conversion adds to a graph: ONNX wants each value of a graph to have a name of its own."""

import itertools

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
