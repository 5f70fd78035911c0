"""An fp32 graph in fp16 where its values allow it.

What stays in float32 is found by measuring on calibration inputs, the states of the student's own trajectory, and is
recorded by name. Inputs and outputs of every graph stay float32.
"""

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from onnx import TensorProto

from piflow_edge.engines import Graph
from piflow_edge.engines.ort_package import import_part
from piflow_edge.errors import CheckFailedError
from piflow_edge.export.calibration import Calibration, Conversion, Inputs
from piflow_edge.export.compact import compact
from piflow_edge.export.half_measures import Measures, measure_half
from piflow_edge.export.large import check, graph_of, model_of, types

_convert_float_to_float16 = import_part("transformers.float16").convert_float_to_float16
_OnnxModel = import_part("transformers.onnx_model").OnnxModel

# Calibration cannot see every input: half of fp16's range is left as headroom.
_FP16_LARGEST = float(np.finfo(np.float16).max) / 2
# Root mean square error of one node, relative to its output. Rounding inputs, weights and output to fp16's 11 bits
# costs at most some 5e-4; more means that the node magnifies rounding (the cosine of a large angle) or underflows.
_FP16_NODE_ERROR = 1e-3
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
    model = model_of(graph)
    known = {name for node in model.graph.node for name in node.output}
    kept = delicate_nodes(model, batches)
    if exact_outputs:
        for output in model.graph.output:
            for node in _upstream(model, [output.name]):
                kept.setdefault(node, f"leads to output {output.name}")
    _unshare_weights(model, kept)
    # Of inputs and outputs too, which become round trips where the node behind is kept; those go again.
    model = _convert_float_to_float16(model, keep_io_types=True, node_block_list=list(kept))
    _OnnxModel(model).topological_sort()  # the converter appends its casts at the end
    model.graph.ClearField("value_info")  # and notes types that it then changes
    _drop_round_trips(model)
    _OnnxModel(model).topological_sort()
    compact(model, known)
    half = graph_of(model)
    check(half)
    return Conversion(half, kept)


def convert_network(network: str, graph: Graph, calibration: Calibration) -> Conversion:
    """The conversion to fp16 of a bundle's network; see `Precision`."""
    return to_fp16(graph, calibration.inputs_of(network))


def delicate_nodes(model: onnx.ModelProto, batches: Sequence[Inputs]) -> dict[str, str]:
    """Nodes that fp16 would spoil on these inputs, and why: overflow, or an error far above rounding.

    Each node is run twice on the values that flow in float32: as they are, and rounded to fp16.

    Raises:
        CheckFailedError: a node gives NaN or infinity in float32 already.
    """
    found: dict[str, str] = {}
    for node, name, measures in measure_half(model, batches):
        for one in measures if node.name not in found else ():
            if reason := _fp16_problem(name, one):
                found[node.name] = reason
                break
    for node in model.graph.node:
        # A value that must not be rounded must not be made from rounded ones either: up to the last matrix product.
        if node.name in list(found) and "overflow" not in found[node.name]:
            for above in _upstream(model, node.input):
                found.setdefault(above, f"feeds {node.name}, which magnifies rounding")
    return found


def _fp16_problem(name: str, measures: Measures) -> str | None:
    largest, scale, error = measures.largest, measures.scale, measures.error
    if not np.isfinite([largest, scale]).all():
        raise CheckFailedError(f"the fp32 graph gives NaN or infinity in {name} on its own trajectory")
    if largest > _FP16_LARGEST:
        return f"{name} reaches {largest:.3g}: fp16 may overflow"
    if scale > 0 and not error <= _FP16_NODE_ERROR * scale:
        return f"{name} is off by {error / scale:.1e} in fp16"
    return None


def _float_values(model: onnx.ModelProto) -> set[str]:
    return {name for name, kind in types(model).items() if kind == TensorProto.FLOAT}


def _upstream(model: onnx.ModelProto, names: Iterable[str]) -> list[str]:
    """Nodes that make these values, back to and with the last matrix products."""
    makers = {name: node for node in model.graph.node for name in node.output}
    floats = _float_values(model)
    found, queue = [], list(names)
    while queue:
        node = makers.get(queue.pop())
        if node is None or node.name in found or not any(name in floats for name in node.output):
            continue
        found.append(node.name)
        if node.op_type not in _PRODUCTS:
            queue += node.input
    return found


def _unshare_weights(model: onnx.ModelProto, kept: Iterable[str]) -> None:
    """Give kept nodes weights of their own: the converter would round what they share with others."""
    kept, weights = set(kept), {tensor.name: tensor for tensor in model.graph.initializer}
    used_in_half = {name for node in model.graph.node if node.name not in kept for name in node.input}
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if node.name in kept and name in weights and name in used_in_half:
                node.input[i] = own = f"{name}.of.{node.name}"
                if not any(tensor.name == own for tensor in model.graph.initializer):
                    tensor = model.graph.initializer.add()
                    tensor.CopyFrom(weights[name])
                    tensor.name = own


def _drop_round_trips(model: onnx.ModelProto) -> None:
    """Let float32 nodes read each other's values: the converter puts fp32 -> fp16 -> fp32 between them."""

    def target(node):
        return node.attribute[0].i if node.op_type == "Cast" else None

    outputs = {value.name for value in model.graph.output}
    halved = {
        node.output[0]: node.input[0] for node in model.graph.node if target(node) == TensorProto.FLOAT16
    }
    floats = _float_values(model)
    renamed = {
        node.output[0]: halved[node.input[0]]
        for node in model.graph.node
        if target(node) == TensorProto.FLOAT and halved.get(node.input[0]) in floats
    }
    kept = [node for node in model.graph.node if node.output[0] not in renamed]
    # An output keeps its name, which its maker's result takes on.
    final = {renamed[name]: name for name in outputs & renamed.keys()}
    for node in kept:
        inputs = [renamed.get(name, name) for name in node.input]
        node.input[:] = [final.get(name, name) for name in inputs]
        node.output[:] = [final.get(name, name) for name in node.output]
    nodes = [copy.deepcopy(node) for node in kept]
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    while True:  # nodes that nobody reads any more
        read = {name for node in model.graph.node for name in node.input} | outputs
        dead = [node for node in model.graph.node if not any(name in read for name in node.output)]
        if not dead:
            break
        for node in dead:
            model.graph.node.remove(node)
