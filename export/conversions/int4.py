"""An fp32 graph with the weights of its matrix products in blocks of 4 bits, by onnxruntime's quantiser.

Activations stay float32. That is for size: a network that does not fit in eight bits may fit in four. Layers that four
bits spoil are in eight.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import onnx

from piflow_edge.bundle.manifest import STUDENT
from piflow_edge.engines import Graph
from piflow_edge.engines.ort.importing import import_part
from piflow_edge.errors import MissingExtraError
from piflow_edge.export.conversions.calibration import Calibration, Conversion
from piflow_edge.export.conversions.int8 import quiet_tools
from piflow_edge.export.conversions.layer_search import convert_layers
from piflow_edge.export.conversions.lookup_tables import quantise_lookup_tables
from piflow_edge.export.conversions.weights_of_layers import make_part, quantisable, quantise_weights
from piflow_edge.export.onnx_graphs.large import Workpiece, is_on_demand
from piflow_edge.system.progress import progress


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

    def convert(excluded: Sequence[str]) -> Graph:
        return quantise_blocks(graph, excluded, block, calibration.room)

    return convert_layers(name, network, graph, calibration, convert)


def quantise_blocks(graph: Graph, excluded: Sequence[str], block: int, room: Path | None = None) -> Graph:
    """The graph with its matrix products in blocks of 4 bits, the `excluded` and lookup tables in int8.

    `block`: 16 or a larger power of two. `room`: as of `Workpiece`.
    """
    work = Workpiece.open(graph, room)
    layers = set(quantisable(work.model)) - set(excluded)
    quantise_weights(work, excluded)
    with quiet_tools(), progress("weights to 4 bits", len(layers), is_long=is_on_demand(graph)) as step:
        nodes = list(_quantise_layers(work, layers, block, step))
    del work.model.graph.node[:]
    work.model.graph.node.extend(nodes)
    quantise_lookup_tables(work)
    return work.finish()


def _quantise_layers(
    work: Workpiece, layers: Collection[str], block: int, step: Callable[[str], None]
) -> Iterator[onnx.NodeProto]:
    """The model's nodes, with those that make up each of the `layers` in its place. The tool is given one at a time.

    `step`: is called after each layer, with its name.
    """
    tools, model_class = _import_tools(), import_part("quantization.onnx_model").ONNXModel
    graph = work.model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        if node.name not in layers:
            yield node
            continue
        given = [work.load(tensors[name]) for name in node.input if name in tensors]
        part = model_class(make_part(work.model, [node], given))
        del given
        part.replace_gemm_with_matmul()
        tool = tools.MatMulNBitsQuantizer(part.model, block_size=block)
        tool.process()
        made = tool.model.model
        for tensor in made.graph.initializer:
            if tensor.name not in tensors:  # of weights that several layers share, once
                work.add(tensor)
                tensors[tensor.name] = graph.initializer[-1]
        known = {opset.domain for opset in work.model.opset_import}
        work.model.opset_import.extend(o for o in made.opset_import if o.domain not in known)
        for one in made.graph.node:
            kept = onnx.NodeProto()
            kept.CopyFrom(one)  # a part of a message holds all of it in memory, weights included
            yield kept
        step(node.name)


def _import_tools() -> ModuleType:
    try:
        return import_part("quantization.matmul_nbits_quantizer")
    except ImportError as error:  # releases before 1.22 call it otherwise
        raise MissingExtraError(
            f"int4 needs a newer onnxruntime ({error}); get it with: pip install -U onnxruntime"
        ) from error
