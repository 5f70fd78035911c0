"""The error that is reported of a layer is its own, whatever the others do, and has the layer's name."""

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.manifest import Manifest
from piflow_edge.commands.description import describe_manifest
from piflow_edge.distill.sources import network_of
from piflow_edge.engines import Graph, open_engine
from piflow_edge.engines.ort.importing import import_onnxruntime
from piflow_edge.export.conversions import pieces
from piflow_edge.export.conversions.calibration import Conversion
from piflow_edge.export.conversions.int4 import quantise_blocks
from piflow_edge.export.conversions.int8 import quantise
from piflow_edge.export.conversions.layer_errors import measure_layers, report_layers
from piflow_edge.export.conversions.weights_of_layers import quantisable
from piflow_edge.export.conversions.weights_only import quantise_encoder
from piflow_edge.export.onnx_graphs.large import model_of
from piflow_edge.export.onnx_graphs.to_onnx import export_network
from piflow_edge.export.to_bundle import export_bundle
from tests.commands.command_line import run
from tests.conftest import make_student

pytestmark = pytest.mark.torch

random = np.random.default_rng(0)
BATCH = {
    "x_t": random.standard_normal((3, 1, 8, 8), np.float32),
    "t": np.full(3, 0.5, np.float32),
    "labels": np.arange(3),
}
FIRST = {name: array[:1] for name, array in BATCH.items()}
CONVERSIONS = {
    "int8": lambda graph: quantise(graph, [BATCH], static=False),
    "int8-qdq": lambda graph: quantise(graph, [BATCH], static=True),
    "int8-weights": lambda graph: quantise_encoder(graph),
    "int4": lambda graph: quantise_blocks(graph, [], 32),
}
LAYER = "blocks.1.mlp.2/MatMul"


@pytest.fixture(scope="module")
def student():
    return Graph(export_network(network_of(make_student(hidden_size=32, depth=2))))


def values_of(graph, names):
    """What a graph makes of `FIRST` in the middle."""
    model = model_of(graph)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = import_onnxruntime().InferenceSession(model.SerializeToString())
    return dict(zip(names, session.run(None, FIRST), strict=True))


def layer_of(graph, name=LAYER):
    return next(node for node in model_of(graph).graph.node if node.name == name)


def weight_of(graph, node):
    return numpy_helper.to_array(
        next(t for t in model_of(graph).graph.initializer if t.name == node.input[1])
    )


def test_nodes_are_named_by_the_modules_they_come_from(student):
    layers = quantisable(model_of(student))
    names = [node.name for node in model_of(student).graph.node]
    assert {"time_mlp.0/Gemm", "blocks.0.qkv/MatMul", LAYER, "head.out/MatMul"} <= set(layers)
    assert len(set(names)) == len(names)
    assert weight_of(student, layer_of(student)).shape == (128, 32)


def test_of_weights_in_eight_bits_it_is_what_numpy_says(student):
    layer = layer_of(student)
    found = measure_layers(student, CONVERSIONS["int8-weights"](student), [BATCH])
    assert list(found) == quantisable(model_of(student))
    inputs = values_of(student, [layer.input[0]])[layer.input[0]].astype(np.float64)
    weight = weight_of(student, layer)
    scale = np.abs(weight).max(0) / 127
    expected, made = inputs @ weight, inputs @ (np.rint(weight / scale) * scale)
    error = np.linalg.norm(made - expected) / np.linalg.norm(expected)
    assert found[LAYER] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("precision", CONVERSIONS)
def test_layers_are_measured_alone(student, precision, monkeypatch):
    """Whatever is spoilt before it, a layer is fed what float32 feeds it; and however the graph is cut."""
    converted = CONVERSIONS[precision](student)
    whole = measure_layers(student, converted, [BATCH])
    assert len(whole) == len(quantisable(model_of(student)))
    # A fresh student's modulation is zero, and so has no error.
    assert all(1e-3 < error < 0.15 for name, error in whole.items() if "modulation" not in name), whole
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)
    assert measure_layers(student, converted, [BATCH]) == pytest.approx(whole, rel=1e-6)
    first = "blocks.0.mlp.0/MatMul"
    spoilt_student = spoil(student, first)
    spoilt = measure_layers(spoilt_student, CONVERSIONS[precision](spoilt_student), [BATCH])
    assert max(spoilt, key=spoilt.__getitem__) == first
    # What the spoilt network feeds later layers is a little else, since one feature of the first is masked.
    later = {name: error for name, error in spoilt.items() if name.startswith(("blocks.1.", "head."))}
    assert len(later) == 7 and later == pytest.approx({name: whole[name] for name in later}, rel=0.1)


def spoil(graph, name):
    """One row of each block is ten thousand times as large, and fed nothing: the rest shares few steps."""
    model = model_of(graph)
    layer = next(node for node in model.graph.node if node.name == name)
    tensor = next(t for t in model.graph.initializer if t.name == layer.input[1])
    weight = numpy_helper.to_array(tensor).copy()
    weight[0] *= 1e4
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    # What it is fed: the first feature is 0.
    fed, masked = layer.input[0], "masked"
    mask = np.ones(len(weight), np.float32)
    mask[0] = 0
    model.graph.initializer.append(numpy_helper.from_array(mask, "mask"))
    place = next(i for i, node in enumerate(model.graph.node) if node.name == name)
    model.graph.node.insert(place, onnx.helper.make_node("Mul", [fed, "mask"], [masked], "mask/Mul"))
    layer.input[0] = masked
    return Graph(model.SerializeToString())


def test_what_stays_in_float32_is_not_reported(student):
    graph = quantise(student, [BATCH], static=False, excluded=[LAYER])
    assert measure_layers(student, graph, [BATCH])[LAYER] < 1e-3  # its weight is kept as fp16
    reported = report_layers(Conversion(graph, {LAYER: "it is spoilt"}), student, [BATCH]).layer_errors
    assert set(reported) == set(quantisable(model_of(student))) - {LAYER}
    assert measure_layers(student, student, [BATCH]) == {}


def test_weights_of_three_axes_are_left_as_they_are():
    """One matrix per head, which no quantiser here has a layout for."""
    weights = np.random.default_rng(0).standard_normal((4, 8, 8), np.float32)
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4, 3, 8]) for name in "xy"
    ]
    product = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "heads/MatMul")
    body = onnx.helper.make_graph(
        [product], "g", values[:1], values[1:], [numpy_helper.from_array(weights, "w")]
    )
    graph = Graph(
        onnx.helper.make_model(
            body, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8
        ).SerializeToString()
    )
    assert quantisable(model_of(graph)) == []
    given = {"x": np.ones((2, 4, 3, 8), np.float32)}
    for convert in (lambda graph: quantise_encoder(graph), CONVERSIONS["int4"]):
        (made,) = open_engine(convert(graph), engine="ort-cpu").run(given).values()
        np.testing.assert_allclose(made, given["x"] @ weights, rtol=1e-5)


def test_a_bundle_and_inspect_say_it(tmp_path):
    precisions = ("fp32", "int8-weights", "int4-128")
    export_bundle(make_student(hidden_size=32, depth=2), tmp_path / "bundle", precisions=precisions)
    bundle = Bundle(tmp_path / "bundle")
    errors = bundle.manifest.provenance["layer_errors"]
    assert errors["fp32"] == {} and set(errors["int8-weights"]["student"]) >= {LAYER, "head.out/MatMul"}
    (worst,) = {max(errors["int4-128"]["student"], key=errors["int4-128"]["student"].__getitem__)}
    shown = describe_manifest(bundle.manifest)["error of single layers"].splitlines()
    assert [line.split(":")[0] for line in shown] == ["int8-weights, student", "int4-128, student"]
    assert worst in shown[1]
    assert "error of single layers" in run("inspect", tmp_path / "bundle").stdout
    answer = json.loads(run("inspect", tmp_path / "bundle", "--json").stdout)
    assert answer["provenance"]["layer_errors"] == errors


def test_an_error_that_is_not_finite_can_be_shown(tmp_path):
    export_bundle(make_student(), tmp_path / "bundle", precisions=("fp32", "int8-weights"))
    manifest: Manifest = Bundle(tmp_path / "bundle").manifest
    manifest.provenance["layer_errors"]["int8-weights"]["student"]["a"] = "not finite"
    assert "inf at most (a)" in describe_manifest(manifest)["error of single layers"]
