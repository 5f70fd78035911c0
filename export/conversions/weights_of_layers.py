"""Constant weights of matrix products: which there are, and how they are kept in fewer bits."""

from collections.abc import Collection, Sequence

import onnx
from onnx import TensorProto, helper, numpy_helper

from piflow_edge.export.conversions.narrow_tensors import halve, is_worth_it, round_to_int8
from piflow_edge.export.onnx_graphs.large import Workpiece
from piflow_edge.export.onnx_graphs.value_names import ValueNames


def quantisable(model: onnx.ModelProto) -> list[str]:
    """Names of the matrix products with a constant weight of two axes, in float32."""
    weights = {
        tensor.name
        for tensor in model.graph.initializer
        if len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT
    }
    return [
        node.name
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights
    ]


def quantise_weights(work: Workpiece, layers: Collection[str]) -> None:
    """Keep the constant weights of these products (`MatMul`, `Gemm`) as int8, with one scale per output feature."""
    graph = work.model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    axes = {n.input[1]: _output_axis(n) for n in graph.node if n.name in layers}
    for name, axis in axes.items():
        rounded, scale = round_to_int8(numpy_helper.to_array(work.load(tensors[name])), 1 - axis)
        work.replace(tensors[name], numpy_helper.from_array(rounded, f"{name}.int8"))
        work.add(numpy_helper.from_array(scale.squeeze(1 - axis), f"{name}.scale"))
    widen = [
        helper.make_node("DequantizeLinear", [f"{name}.int8", f"{name}.scale"], [name], axis=axis)
        for name, axis in axes.items()
    ]
    # They read nothing but weights, and so may stand before all others.
    for node in reversed(widen):
        graph.node.insert(0, node)


def halve_weights(work: Workpiece) -> None:
    """Keep float32 weights as fp16 in the file. Sums stay in float32: engines widen them on opening."""
    graph, names = work.model.graph, ValueNames(work.model.graph)
    for tensor in graph.initializer:
        if is_worth_it(tensor) and (half := halve(work.load(tensor))) is not None:
            wide, half.name = tensor.name, names.add(f"{tensor.name}.half")
            work.replace(tensor, half)
            graph.node.insert(0, helper.make_node("Cast", [half.name], [wide], to=TensorProto.FLOAT))


def make_part(
    model: onnx.ModelProto, layers: Sequence[onnx.NodeProto], weights: Sequence[onnx.TensorProto]
) -> onnx.ModelProto:
    """A model of some layers alone, which reads what they read and gives what each of them gives."""
    made = [name for layer in layers for name in layer.output]
    known = {*made, *(tensor.name for tensor in weights)}
    read = dict.fromkeys(name for layer in layers for name in layer.input if name and name not in known)
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        for names in (read, made)
    )
    part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    part.graph.name = "layers"
    part.graph.node.extend(layers)
    part.graph.input.extend(inputs)
    part.graph.output.extend(outputs)
    part.graph.initializer.extend(weights)  # the one copy: helpers of onnx make more
    return part


def _output_axis(node: onnx.NodeProto) -> int:
    """The axis of a product's weight (inputs, outputs), or transposed, that counts outputs."""
    return 0 if any(one.name == "transB" and one.i for one in node.attribute) else 1
