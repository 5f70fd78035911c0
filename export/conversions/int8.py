"""An fp32 graph with the weights of its matrix products in int8, by onnxruntime's quantisation tools."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from piflow_edge.bundle.manifest import STUDENT
from piflow_edge.bundle.precisions import PRECISIONS
from piflow_edge.engines import Graph
from piflow_edge.engines.ort.importing import import_part
from piflow_edge.export.conversions.calibration import Calibration, Conversion, Inputs, split_samples
from piflow_edge.export.conversions.layer_errors import report_layers
from piflow_edge.export.conversions.layer_search import convert_within
from piflow_edge.export.conversions.weights_of_layers import halve_weights, quantisable
from piflow_edge.export.conversions.weights_only import convert_encoder
from piflow_edge.export.onnx_graphs.compact import compact
from piflow_edge.export.onnx_graphs.large import check, count_bytes, graph_of, load_tensor, save

quantization = import_part("quantization")
# Share of the tolerances that int8 may use on the calibration images. The largest error of the golden images, which
# are others, was up to 1.6 times as large on the digits.
_SHARE = 0.5
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


def to_int8(
    graph: Graph, batches: Sequence[Inputs], *, static: bool, accepts: Callable[[Graph], float]
) -> Conversion:
    """Weights of matrix products in int8, one scale per output feature, for the CPU.

    Activations are scaled as they come (`static=False`), or by what calibration saw, as quantise-dequantise pairs.
    Should the result be too far off, the layers that cost most are left in float32, as few as will do.

    Args:
        graph: an fp32 ONNX model.
        batches: calibration inputs.
        static: QDQ with calibrated activations; else dynamic.
        accepts: how far a graph is off, in units of what is allowed: 1 or less will do.

    Raises:
        CheckFailedError: even one quantised layer is too much.
    """
    layers = quantisable(onnx.load_from_string(graph.model))

    def convert(excluded: Sequence[str]) -> Graph:
        return quantise(graph, batches, static=static, excluded=excluded)

    return convert_within("int8", layers, convert, accepts)


def convert_network(
    network: str, graph: Graph, calibration: Calibration, *, static: bool = False
) -> Conversion:
    """The conversion to int8 of a bundle's network; see `Precision`. Decoders stay in float32.

    `static`: activations are scaled by calibration, else as they come. Of encoders, weights alone are quantised.
    """
    if network in calibration.encoder_inputs:
        return report_layers(convert_encoder(graph), graph, calibration.encoder_inputs[network])
    if network != STUDENT:
        return Conversion(graph, "all")

    def accepts(converted: Graph) -> float:
        return calibration.share(converted, PRECISIONS["int8"].tolerances) / _SHARE

    converted = to_int8(graph, calibration.batches, static=static, accepts=accepts)
    return report_layers(converted, graph, calibration.batches)


def quantise(graph: Graph, batches: Sequence[Inputs], *, static: bool, excluded: Sequence[str] = ()) -> Graph:
    """The graph with all but the `excluded` matrix products in int8; see `to_int8`."""
    model = _quantise_statically(graph, batches, excluded) if static else _quantise_layers(graph, excluded)
    _unname_pairs(model)
    halve_weights(model)
    compact(model, _values(onnx.load_from_string(graph.model)))
    result = graph_of(model)
    check(result)
    return result


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
        part = _make_part(model, group, [load_tensor(weights[name], graph.weights) for name in sorted(used)])
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


def _make_part(
    model: onnx.ModelProto, layers: Sequence[onnx.NodeProto], weights: Sequence[onnx.TensorProto]
) -> onnx.ModelProto:
    """A model of some layers alone, which reads what they read and gives what each of them gives."""
    made = [name for layer in layers for name in layer.output]
    known = {*made, *(tensor.name for tensor in weights)}
    read = dict.fromkeys(name for layer in layers for name in layer.input if name and name not in known)
    inputs, outputs = (
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names]
        for names in (read, made)
    )
    body = onnx.helper.make_graph(layers, "layers", inputs, outputs, weights)
    return onnx.helper.make_model(body, opset_imports=model.opset_import, ir_version=model.ir_version)


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
