"""What a TensorRT before 10 must not lower to half precision.

With its flag for fp16 such a builder lowers every layer, also what the export kept in float32 since it would overflow
or round too far: norms, the time embedding, the policy's numbers. Those layers, and no others, are held to float32.
"""

import re
from collections.abc import Mapping

from piflow_edge.engines import Graph, graph_types
from piflow_edge.engines.onnx_file import read_model
from piflow_edge.errors import EngineError

# They make or change a type by themselves. A builder of 8.6 refuses another output type on a CAST; 8.5 has none, and
# takes an IDENTITY in its place.
_NOT_TO_BE_PINNED = ("CONSTANT", "SHAPE", "CAST", "IDENTITY", "QUANTIZE", "DEQUANTIZE")


def pin_float32(trt, network, graph: Graph, formats: Mapping[str, str]) -> None:
    """Hold the layers of nodes that compute in float32 to it.

    Args:
        trt: the tensorrt module.
        network: TensorRT's, parsed from `graph`.
        graph: the ONNX model.
        formats: number format of each of its inputs.
    """
    nodes = (model := read_model(graph)).graph.nodes
    wide = graph_types.find_wide_nodes(model, formats)
    makers = {name: graph_types.name_of(node) for node in nodes for name in node.outputs if name}
    pinned = 0
    for layer, node in _layers_with_nodes(network, makers):
        if node not in wide or layer.type.name in _NOT_TO_BE_PINNED:
            continue
        outputs = [
            n for n in range(layer.num_outputs) if _is_wide(trt, layer.get_output(n), wide[node], makers)
        ]
        if outputs:
            layer.precision = trt.DataType.FLOAT
            pinned += 1
        for n in outputs:
            layer.set_output_type(n, trt.DataType.FLOAT)
    if wide and not pinned:
        raise EngineError(
            f"TensorRT {trt.__version__} names its layers in a way that is not known here, so that {len(wide)} layers "
            "cannot be kept in float32; build from the fp32 network, or with TensorRT 10"
        )


def _layers_with_nodes(network, makers: Mapping[str, str]):
    """Layers, each with the name of its node. `makers`: the node of each value.

    A parser makes one or several layers of a node. The last has the node's outputs; those before it may have no name
    that the graph knows, and belong to the next that has.
    """
    names, unknown = set(makers.values()), []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(n).name for n in range(layer.num_outputs)]
        node = next((makers[name] for name in outputs if name in makers), None)
        if node is None:
            unnumbered = re.sub(r"_\d+$", "", layer.name)
            node = next((name for name in (layer.name, unnumbered) if name in names), None)
        if node is None:
            unknown.append(layer)
            continue
        for each in (*unknown, layer):
            yield each, node
        unknown = []


def _is_wide(trt, tensor, wide: set[str], values: Mapping[str, str]) -> bool:
    if tensor.name in values:
        return tensor.name in wide
    # Within a node: a size or an index is none of its numbers.
    return tensor.dtype == trt.DataType.FLOAT and not tensor.is_shape_tensor
