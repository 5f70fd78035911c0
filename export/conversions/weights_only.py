"""Weights of matrix products in eight bits, activations in float32, by ONNX's own operators.

So says the graph. ONNX Runtime on a CPU joins such a product and its weights into one operator that rounds activations
to eight bits too, in blocks of 32 which each have a scale (`session.qdq_matmulnbits_accuracy_level`, 4 by default). In
float32 MiniLM would take seven times as long, and be off by 0.032 instead of 0.044 (root mean square of one prompt).

For text encoders: a few of their features are many times as large as all others, so that one scale for the activations
of a layer loses the rest: of MiniLM, dynamic int8 was off by 0.19 of a prompt's hidden states, weights alone by 0.09
(root mean squares, the worst of seven prompts). And for students that are to be nearly what they were.
"""

from collections.abc import Sequence

import onnx

from piflow_edge.bundle.manifest import STUDENT
from piflow_edge.bundle.precisions import PRECISIONS
from piflow_edge.engines import Graph
from piflow_edge.export.conversions.calibration import Calibration, Conversion
from piflow_edge.export.conversions.layer_errors import report_layers
from piflow_edge.export.conversions.layer_search import convert_within
from piflow_edge.export.conversions.lookup_tables import quantise_lookup_tables
from piflow_edge.export.conversions.weights_of_layers import halve_weights, quantisable, quantise_weights
from piflow_edge.export.onnx_graphs.compact import compact
from piflow_edge.export.onnx_graphs.large import check, graph_of, model_of

# Share of the tolerances that may be used on the calibration images; see `int8`.
_SHARE = 0.5


def convert_network(network: str, graph: Graph, calibration: Calibration) -> Conversion:
    """The conversion to int8-weights of a bundle's network; see `Precision`. Decoders stay in float32."""
    if network in calibration.encoder_inputs:
        return report_layers(convert_encoder(graph), graph, calibration.encoder_inputs[network])
    if network != STUDENT:
        return Conversion(graph, "all")
    layers = quantisable(onnx.load_from_string(graph.model))
    tolerances = PRECISIONS["int8-weights"].tolerances

    def convert(excluded: Sequence[str]) -> Graph:
        return _quantise(graph, excluded)

    def accepts(converted: Graph) -> float:
        return calibration.share(converted, tolerances) / _SHARE

    return report_layers(convert_within("int8-weights", layers, convert, accepts), graph, calibration.batches)


def convert_encoder(graph: Graph) -> Conversion:
    """A text encoder with its weights and lookup tables in eight bits."""
    model = model_of(graph)
    known = {name for node in model.graph.node for name in node.output}
    quantise_weights(model, quantisable(model))
    quantise_lookup_tables(model)
    compact(model, known)
    result = graph_of(model)
    check(result)
    return Conversion(result)


def _quantise(graph: Graph, excluded: Sequence[str]) -> Graph:
    model = model_of(graph)
    known = {name for node in model.graph.node for name in node.output}
    quantise_weights(model, set(quantisable(model)) - set(excluded))
    halve_weights(model)
    compact(model, known)
    result = graph_of(model)
    check(result)
    return result
