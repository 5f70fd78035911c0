"""Weights of matrix products in eight bits, activations in float32, by ONNX's own operators.

So says the graph. ONNX Runtime on a CPU joins such a product and its weights into one operator that rounds activations
to eight bits too, in blocks of 32 which each have a scale (`session.qdq_matmulnbits_accuracy_level`, 4 by default). In
float32 MiniLM would take seven times as long, and be off by 0.032 instead of 0.044 (root mean square of one prompt).

For text encoders: a few of their features are many times as large as all others, so that one scale for the activations
of a layer loses the rest: of MiniLM, dynamic int8 was off by 0.19 of a prompt's hidden states, weights alone by 0.09
(root mean squares, the worst of seven prompts). And for students that are to be nearly what they were.
"""

from collections.abc import Collection
from pathlib import Path

from piflow_edge.bundle.manifest import STUDENT
from piflow_edge.engines import Graph
from piflow_edge.export.conversions.calibration import Calibration, Conversion
from piflow_edge.export.conversions.layer_errors import report_layers
from piflow_edge.export.conversions.layer_search import convert_layers
from piflow_edge.export.conversions.lookup_tables import quantise_lookup_tables
from piflow_edge.export.conversions.weights_of_layers import halve_weights, quantisable, quantise_weights
from piflow_edge.export.onnx_graphs.large import Workpiece


def convert_network(network: str, graph: Graph, calibration: Calibration) -> Conversion:
    """The conversion to int8-weights of a bundle's network; see `Precision`. Decoders stay in float32."""
    if network in calibration.encoder_inputs:
        return convert_encoder(network, graph, calibration)
    if network != STUDENT:
        return Conversion(graph, "all")
    return convert_layers(
        "int8-weights",
        network,
        graph,
        calibration,
        lambda out: quantise_student(graph, out, calibration.room),
    )


def convert_encoder(network: str, graph: Graph, calibration: Calibration) -> Conversion:
    """The conversion of a text encoder, of which weights and lookup tables are in eight bits."""
    converted = Conversion(quantise_encoder(graph, calibration.room))
    return report_layers(converted, graph, calibration.encoder_inputs[network])


def quantise_encoder(graph: Graph, room: Path | None = None) -> Graph:
    """The graph with its matrix products and lookup tables in int8. `room`: as of `Workpiece`."""
    work = Workpiece.open(graph, room)
    quantise_weights(work, quantisable(work.model))
    quantise_lookup_tables(work)
    return work.finish()


def quantise_student(graph: Graph, excluded: Collection[str], room: Path | None = None) -> Graph:
    """The graph with all but the `excluded` matrix products in int8, other weights in fp16. `room`: as above."""
    work = Workpiece.open(graph, room)
    quantise_weights(work, set(quantisable(work.model)) - set(excluded))
    halve_weights(work)
    return work.finish()
