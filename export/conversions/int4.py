"""An fp32 graph with the weights of its matrix products in blocks of 4 bits, by onnxruntime's quantiser.

Activations stay float32. That is for size: a network that does not fit in eight bits may fit in four. Layers that four
bits spoil are in eight.
"""

from collections.abc import Sequence
from types import ModuleType

import onnx

from piflow_edge.bundle.manifest import STUDENT
from piflow_edge.bundle.precisions import PRECISIONS
from piflow_edge.engines import Graph
from piflow_edge.engines.ort.importing import import_part
from piflow_edge.errors import MissingExtraError
from piflow_edge.export.conversions.calibration import Calibration, Conversion
from piflow_edge.export.conversions.int8 import quiet_tools
from piflow_edge.export.conversions.layer_errors import report_layers
from piflow_edge.export.conversions.layer_search import convert_within
from piflow_edge.export.conversions.lookup_tables import quantise_lookup_tables
from piflow_edge.export.conversions.weights_of_layers import quantisable, quantise_weights
from piflow_edge.export.onnx_graphs.compact import compact
from piflow_edge.export.onnx_graphs.large import check, graph_of, model_of

# Share of the tolerances that int4 may use on the calibration images; see `int8`.
_SHARE = 0.5


def convert_network(
    network: str, graph: Graph, calibration: Calibration, *, name: str, block: int
) -> Conversion:
    """The conversion to 4 bits of a bundle's network; see `Precision`. Decoders stay in float32.

    Args:
        network, graph, calibration: as of every conversion.
        name: of the precision.
        block: weights that share a scale and a zero point, along the sum. Smaller blocks are nearer and larger.
    """
    if network != STUDENT and network not in calibration.encoder_inputs:
        return Conversion(graph, "all")
    layers = quantisable(onnx.load_from_string(graph.model))
    tolerances = PRECISIONS[name].tolerances

    def accepts(converted: Graph) -> float:
        return calibration.share(converted, tolerances, network, graph) / _SHARE

    converted = convert_within(
        name, layers, lambda excluded: quantise_blocks(graph, excluded, block), accepts
    )
    return report_layers(converted, graph, calibration.inputs_of(network))


def quantise_blocks(graph: Graph, excluded: Sequence[str], block: int) -> Graph:
    """The graph with its matrix products in blocks of 4 bits, the `excluded` and lookup tables in int8.

    `block`: 16 or a larger power of two.
    """
    model = model_of(graph)
    known = {name for node in model.graph.node for name in node.output}
    quantise_weights(model, excluded)
    with quiet_tools():
        tools = _import_tools()
        whole = import_part("quantization.onnx_model").ONNXModel(model)
        whole.replace_gemm_with_matmul()
        # A product of a Gemm has its name with this at the end.
        left_out = [name for layer in excluded for name in (layer, f"{layer}_MatMul")]
        tool = tools.MatMulNBitsQuantizer(whole.model, block_size=block, nodes_to_exclude=left_out)
        tool.process()
    quantised = tool.model.model
    quantise_lookup_tables(quantised)
    compact(quantised, known)
    result = graph_of(quantised)
    check(result)
    return result


def _import_tools() -> ModuleType:
    try:
        return import_part("quantization.matmul_nbits_quantizer")
    except ImportError as error:  # releases before 1.22 call it otherwise
        raise MissingExtraError(
            f"int4 needs a newer onnxruntime ({error}); get it with: pip install -U onnxruntime"
        ) from error
