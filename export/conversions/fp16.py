"""An fp32 graph in fp16 where its values allow it.

What stays in float32 is found by measuring on calibration inputs, the states of the student's own trajectory, and is
recorded by name. Inputs and outputs of every graph stay float32.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from types import MappingProxyType

import numpy as np
import onnx
from onnx import TensorProto

from piflow_edge.engines import Graph
from piflow_edge.errors import CheckFailedError
from piflow_edge.export.conversions.calibration import Calibration, Conversion, Inputs
from piflow_edge.export.conversions.half_twins import add_half_twins
from piflow_edge.export.conversions.lookup_tables import halve_lookup_tables
from piflow_edge.export.conversions.twins import Measures, measure_twins
from piflow_edge.export.half_graph import FLOAT32_OPERATORS, convert_to_half
from piflow_edge.export.onnx_graphs.large import Workpiece, types

# Calibration cannot see every input: half of fp16's range is left as headroom.
_FP16_LARGEST = float(np.finfo(np.float16).max) / 2
# Root mean square error of one node, relative to its output. Rounding inputs, weights and output to fp16's 11 bits
# costs at most some 5e-4; more means that the node magnifies rounding (the cosine of a large angle) or underflows.
_FP16_NODE_ERROR = 1e-3
_LEADS = "leads to output"
# Ends of a walk against the data flow: sums of many products, in which single roundings average out.
_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")


def to_fp16(graph: Graph, batches: Sequence[Inputs], *, exact_outputs: bool = True) -> Conversion:
    """Weights and activations in fp16, with casts around the nodes that calibration says must stay in float32.

    No operator gets inputs of mixed types, so that the graph suits strongly typed compilers such as TensorRT's.

    Args:
        graph: an fp32 ONNX model.
        batches: calibration inputs.
        exact_outputs: compute each output in float32 from the last matrix product on, as policies need it.

    Raises:
        CheckFailedError: the graph gives NaN or infinity on the calibration inputs.
    """
    model = onnx.load_from_string(graph.model)
    floats = _find_floats(model)
    float32_nodes = delicate_nodes(model, batches, graph.weights)
    if exact_outputs:
        for output in model.graph.output:
            for node in _upstream(model, [output.name], floats):
                float32_nodes.setdefault(node, f"{_LEADS} {output.name}")
    for node in model.graph.node:
        if node.op_type in FLOAT32_OPERATORS and floats.intersection([*node.input, *node.output]):
            float32_nodes.setdefault(node.name, f"{node.op_type} is not in fp16 everywhere")
    known = {name for node in model.graph.node for name in node.output}
    half = convert_to_half(model, graph.weights, float32_nodes, floats)
    # Tables that only lead to an output: rounding a row costs no more than fp16 does elsewhere.
    tame = {name for name, reason in float32_nodes.items() if reason.startswith(_LEADS)}
    for node in halve_lookup_tables(half, tame):
        del float32_nodes[node]
    return Conversion(Workpiece(half, known).finish(), float32_nodes)


def convert_network(network: str, graph: Graph, calibration: Calibration) -> Conversion:
    """The conversion to fp16 of a bundle's network; see `Precision`."""
    return to_fp16(graph, calibration.inputs_of(network))


def delicate_nodes(
    model: onnx.ModelProto, batches: Sequence[Inputs], files: Mapping[str, bytes] = MappingProxyType({})
) -> dict[str, str]:
    """Nodes that fp16 would spoil on these inputs, and why: overflow, or an error far above rounding.

    Each node is run twice on the values that flow in float32: as they are, and rounded to fp16.

    Args:
        model: an fp32 ONNX model.
        batches: calibration inputs.
        files: contents of the files that its weights lie in, if they do.

    Raises:
        CheckFailedError: a node gives NaN or infinity in float32 already.
    """
    found: dict[str, str] = {}
    for node, name, measures in measure_twins(model, batches, lambda piece: add_half_twins(piece, files)):
        for one in measures if node.name not in found else ():
            if reason := _fp16_problem(name, one):
                found[node.name] = reason
                break
    floats = _find_floats(model)
    for node in model.graph.node:
        # A value that must not be rounded must not be made from rounded ones either: up to the last matrix product.
        if node.name in list(found) and "overflow" not in found[node.name]:
            for above in _upstream(model, node.input, floats):
                found.setdefault(above, f"feeds {node.name}, which magnifies rounding")
    return found


def _fp16_problem(name: str, measures: Measures) -> str | None:
    largest, scale, error = measures.largest, measures.scale, measures.error
    if np.isnan([largest, scale]).any():
        raise CheckFailedError(f"the fp32 graph gives NaN in {name} on its own trajectory")
    if np.isinf(largest):  # some masks are; that the outputs are finite is checked before
        return f"{name} reaches infinity: fp16 may overflow"
    if largest > _FP16_LARGEST:
        return f"{name} reaches {largest:.3g}: fp16 may overflow"
    if scale > 0 and not error <= _FP16_NODE_ERROR * scale:
        return f"{name} is off by {error / scale:.1e} in fp16"
    return None


def _find_floats(model: onnx.ModelProto) -> set[str]:
    return {name for name, kind in types(model).items() if kind == TensorProto.FLOAT}


def _upstream(model: onnx.ModelProto, names: Iterable[str], floats: Set[str]) -> list[str]:
    """Nodes that make these values, back to and with the last matrix products."""
    makers = {name: node for node in model.graph.node for name in node.output}
    found, queue = [], list(names)
    while queue:
        node = makers.get(queue.pop())
        if node is None or node.name in found or not any(name in floats for name in node.output):
            continue
        found.append(node.name)
        if node.op_type not in _PRODUCTS:
            queue += node.input
    return found
