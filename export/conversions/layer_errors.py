"""How far each quantised layer of a network is off, by itself: fed what the float32 network feeds it.

Errors that are large and yet finite, which no check for NaN sees, stand out here by the layer's name.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx

from piflow_edge.engines import Graph
from piflow_edge.export.conversions.calibration import Conversion, Inputs, split_samples
from piflow_edge.export.conversions.pieces import Piece
from piflow_edge.export.conversions.twins import Twins, measure_twins
from piflow_edge.export.conversions.weights_of_layers import quantisable
from piflow_edge.export.onnx_graphs.large import is_on_demand, load_tensor
from piflow_edge.system.progress import progress

# Inputs that a layer is measured on: some of every call, or some prompts; of a network that runs for minutes the first
# and the last.
_MOST_BATCHES = 8
_TWIN = ".converted"


def report_layers(conversion: Conversion, exact: Graph, batches: Sequence[Inputs]) -> Conversion:
    """The conversion with `layer_errors` of what it does not leave in float32; see `measure_layers`."""
    found = measure_layers(exact, conversion.graph, batches)
    errors = {name: error for name, error in found.items() if name not in conversion.float32_nodes}
    return replace(conversion, layer_errors=errors)


def measure_layers(exact: Graph, converted: Graph, batches: Sequence[Inputs]) -> dict[str, float]:
    """Root mean square error of each matrix product that was converted, relative to that of its output.

    Args:
        exact: the network in float32.
        converted: the same with some layers in fewer bits; values keep their names.
        batches: inputs of the network; of each batch, the first sample is taken.

    Returns:
        Name of the layer -> error; infinity where it gives NaN.
    """
    model = onnx.load_from_string(exact.model)
    other = _Converted(onnx.load_from_string(converted.model), converted.weights, _values(model))
    layers = set(quantisable(model))

    def add_twins(piece: Piece) -> Twins:
        twins = Twins(weights=[load_tensor(tensor, exact.weights) for tensor in piece.weights])
        for node in piece.nodes:
            twins.nodes.append(node)
            if node.name in layers:
                other.add_twin(node, twins)
        return twins

    chosen = [batches[0], batches[-1]] if is_on_demand(exact) else batches[:_MOST_BATCHES]
    samples = [next(split_samples([batch])) for batch in chosen]
    found = {}
    with progress("measuring layers", len(layers), is_long=is_on_demand(exact)) as step:
        for node, _, measures in measure_twins(model, samples, add_twins, other.model.opset_import):
            found[node.name] = _relative(measures)
            step(node.name)
    return {name: found[name] for name in quantisable(model) if name in found}


class _Converted:
    """The converted network, of which single layers are taken."""

    def __init__(self, model: onnx.ModelProto, files: Mapping[str, bytes], known: Collection[str]):
        self.model = model
        self._files, self._known = files, known
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._makers = {name: i for i, node in enumerate(model.graph.node) for name in node.output}

    def add_twin(self, layer: onnx.NodeProto, twins: Twins) -> None:
        """Add what makes a layer's output here, under other names; nothing where that is the layer as it was."""
        (made,) = layer.output
        nodes = [self.model.graph.node[i] for i in sorted(set(self._walk(made)))]
        weights = [self._weights[n] for node in nodes for n in node.input if n in self._weights]
        if all(tensor.data_type == onnx.TensorProto.FLOAT for tensor in weights):
            return
        own = {name for node in nodes for name in node.output} | {tensor.name for tensor in weights}
        mark = f"{_TWIN}.{layer.name}"
        for node in nodes:
            twin = onnx.NodeProto()
            twin.CopyFrom(node)
            twin.name = ""  # some conversions leave nodes without one, and ONNX Runtime wants them to differ
            twin.input[:] = [f"{name}{mark}" if name in own else name for name in node.input]
            twin.output[:] = [name and f"{name}{mark}" for name in node.output]
            twins.nodes.append(twin)
        for tensor in {tensor.name: tensor for tensor in weights}.values():
            copied = onnx.TensorProto()
            copied.CopyFrom(load_tensor(tensor, self._files))
            copied.name = f"{tensor.name}{mark}"
            twins.weights.append(copied)
        twins.measured[made] = (layer, f"{made}{mark}")

    def _walk(self, made: str) -> Iterator[int]:
        """Indices of the nodes that make a value, back to values of the exact network."""
        queue = [made]
        while queue:
            name = queue.pop()
            if name not in self._makers or (name in self._known and name != made):
                continue
            yield (place := self._makers[name])
            queue += self.model.graph.node[place].input


def _values(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.output} | {v.name for v in model.graph.input}


def _relative(measures) -> float:
    squares, errors = (sum(getattr(one, name) for one in measures) for name in ("squares", "errors"))
    share = float(np.sqrt(errors / squares)) if squares > 0 else 0.0 if errors == 0 else np.inf
    return share if np.isfinite(share) else np.inf
