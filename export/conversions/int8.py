"""An fp32 graph with the weights of its matrix products in int8, by onnxruntime's quantisation tools."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from piflow_edge.bundle.manifest import STUDENT
from piflow_edge.engines import Graph
from piflow_edge.engines.ort.importing import import_part
from piflow_edge.export.conversions.calibration import Calibration, Conversion, Inputs, split_samples
from piflow_edge.export.conversions.layer_search import convert_layers
from piflow_edge.export.conversions.weights_of_layers import halve_weights, make_part, quantisable
from piflow_edge.export.conversions.weights_only import convert_encoder
from piflow_edge.export.onnx_graphs.large import Workpiece, count_bytes, load_tensor, save

quantization = import_part("quantization")
# Bytes of weights that the dynamic tool is given together.
_AT_A_TIME = 2**26
_SETTINGS = dict(
    per_channel=True,
    # 7 bits: on CPUs without VNNI two 8-bit products overflow the 16 bits in which they are added.
    reduce_range=True,
    weight_type=quantization.QuantType.QInt8,
    op_types_to_quantize=["MatMul", "Gemm"],
)


class _Samples(quantization.CalibrationDataReader):
    """One sample at a time: the tool holds what it measures of all that it is given together."""

    def __init__(self, batches: Sequence[Inputs]):
        self._left = iter(split_samples(batches))

    def get_next(self) -> Inputs | None:
        return next(self._left, None)


def convert_network(
    network: str, graph: Graph, calibration: Calibration, *, static: bool = False
) -> Conversion:
    """The conversion to int8 of a bundle's network; see `Precision`. Decoders stay in float32.

    Weights of matrix products in int8, one scale per output feature, for the CPU. Of encoders, weights alone are
    quantised.

    Args:
        network, graph, calibration: as of every conversion.
        static: activations are scaled by what calibration saw, as quantise-dequantise pairs; else as they come.
    """
    if network in calibration.encoder_inputs:
        return convert_encoder(network, graph, calibration)
    if network != STUDENT:
        return Conversion(graph, "all")
    return convert_layers(
        "int8",
        network,
        graph,
        calibration,
        lambda excluded: quantise(graph, calibration.batches, static=static, excluded=excluded),
    )


def quantise(graph: Graph, batches: Sequence[Inputs], *, static: bool, excluded: Sequence[str] = ()) -> Graph:
    """The graph with all but the `excluded` matrix products in int8; see `convert_network`."""
    model = _quantise_statically(graph, batches, excluded) if static else _quantise_layers(graph, excluded)
    _unname_pairs(model)
    work = Workpiece(model, _values(onnx.load_from_string(graph.model)))
    halve_weights(work)
    return work.finish()


def _quantise_statically(graph: Graph, batches: Sequence[Inputs], excluded: Sequence[str]) -> onnx.ModelProto:
    with TemporaryDirectory() as folder, quiet_tools():
        source, out = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        save(graph, source)
        quantization.quantize_static(
            source,
            out,
            _Samples(batches),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QInt8,
            extra_options={
                # Symmetric, as TensorRT wants it. Attention's own products have no weights to shrink.
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "MatMulConstBOnly": True,
                # In int32 a bias has a scale per feature beside it: twice its size in float32.
                "QuantizeBias": False,
            },
            # The tool makes a MatMul of a Gemm first, and asks for that one's name.
            nodes_to_exclude=[name for layer in excluded for name in (layer, f"{layer}_MatMul")],
            use_external_data_format=bool(graph.weights),
            **_SETTINGS,
        )
        return onnx.load(out)  # with the weights of a file beside it


def _quantise_layers(graph: Graph, excluded: Sequence[str]) -> onnx.ModelProto:
    """A few layers at a time: the tool holds four copies of all weights that it is given."""
    model = onnx.load_from_string(graph.model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    names = set(quantisable(model)) - set(excluded)
    layers = [node for node in model.graph.node if node.name in names]
    nodes = [node for node in model.graph.node if node.name not in names]
    made: dict[str, onnx.TensorProto] = {}
    for group in _group_layers(layers, weights):
        used = {name for node in group for name in node.input if name in weights}
        part = make_part(model, group, [load_tensor(weights[name], graph.weights) for name in sorted(used)])
        with TemporaryDirectory() as folder, quiet_tools():
            source, out = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
            onnx.save(part, source)
            quantization.quantize_dynamic(source, out, extra_options={"MatMulConstBOnly": True}, **_SETTINGS)
            part = onnx.load(out)
        # Of a value that layers of several groups read, the scale is found once.
        there = {name for node in nodes for name in node.output}
        nodes += [node for node in part.graph.node if not there.issuperset(node.output)]
        made |= {tensor.name: tensor for tensor in part.graph.initializer}
    asked = {name for node in nodes for name in node.input}
    kept = [load_tensor(t, graph.weights) for t in weights.values() if t.name in asked - made.keys()]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend([*kept, *made.values()])
    quantization.onnx_model.ONNXModel(model).topological_sort()
    return model


def _group_layers(
    layers: Sequence[onnx.NodeProto], weights: Mapping[str, onnx.TensorProto]
) -> list[list[onnx.NodeProto]]:
    """As many layers in each group as `_AT_A_TIME` allows, and one at least."""
    groups: list[list[onnx.NodeProto]] = []
    room = 0
    for layer in layers:
        size = count_bytes(weights[layer.input[1]])
        if not groups or size > room:
            groups.append([])
            room = _AT_A_TIME
        groups[-1].append(layer)
        room -= size
    return groups


def _unname_pairs(model: onnx.ModelProto) -> None:
    """Take the names off quantising nodes: there are many, and none is ever the one to blame."""
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.name = ""


def _values(model: onnx.ModelProto) -> set[str]:
    outputs = {name for node in model.graph.node for name in node.output}
    return outputs | {tensor.name for tensor in model.graph.initializer}


@contextlib.contextmanager
def quiet_tools() -> Iterator[None]:
    """Let ONNX Runtime's tools log nothing below an error: they do on the root logger, which one sets up on import."""
    root = logging.getLogger()
    disabled, level, handlers = root.manager.disable, root.level, list(root.handlers)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers
