"""Lower precisions of a bundle: small, near enough, and checked; what must stay in float32 is found and named."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import piflow_edge as pf
from piflow_edge.bundle import Bundle
from piflow_edge.distill.sources import network_of
from piflow_edge.engines.ort import first_non_finite
from piflow_edge.errors import BundleError, CheckFailedError
from piflow_edge.export import to_bundle
from piflow_edge.export.precisions import delicate_nodes, to_int8
from piflow_edge.export.to_bundle import export_bundle
from piflow_edge.export.to_onnx import export_network
from piflow_edge.verification import verify

from conftest import make_student

ALL = ("fp32", "fp16", "int8", "int8-qdq")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "precisions"
    export_bundle(make_student(hidden_size=32), folder, precisions=ALL, samplers=[1, 2])
    return folder


@pytest.fixture(scope="module")
def student():
    return export_network(network_of(make_student()))


@pytest.mark.parametrize("precision", ALL)
def test_every_precision_reproduces_the_golden_samples(folder, precision):
    rows = verify(pf.load(folder, precision=precision))
    assert {row.precision for row in rows} == {precision}
    assert all(row.passed for row in rows), rows
    outputs = rows[0]
    # A graph that was not converted would agree to float32.
    assert (outputs.error > 1e-5) == (precision != "fp32")


def test_fp16_keeps_the_time_embedding_and_the_outputs_in_float32(folder):
    kept = Bundle(folder).manifest.provenance["kept_in_fp32"]["fp16"]["student"]
    model = onnx.load_from_string(Bundle(folder).graph("fp16").model)
    types = {node.name: node.op_type for node in model.graph.node}
    assert {"Cos", "Sin", "LogSoftmax"} <= {types[name] for name in kept}
    values = [*model.graph.input, *model.graph.output]
    dtypes = {value.name: value.type.tensor_type.elem_type for value in values}
    assert set(dtypes.values()) == {TensorProto.FLOAT, TensorProto.INT64}


def test_fp16_mixes_no_types_within_a_node(folder):
    model = onnx.load_from_string(Bundle(folder).graph("fp16").model)
    # Data propagation and strict mode: a node with inputs of two types is an error here.
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*inferred.value_info, *inferred.input]}
    types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    floats = {TensorProto.FLOAT, TensorProto.FLOAT16}
    for node in inferred.node:
        assert len({types[name] for name in node.input if types.get(name) in floats}) <= 1, node.name
    weights = [tensor for tensor in inferred.initializer if len(tensor.dims) > 1]
    assert sum(tensor.data_type == TensorProto.FLOAT16 for tensor in weights) > len(weights) / 2


def graph_of(*nodes, **weights):
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(np.float32(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize(
    ("scale", "reason"), [(1e5, "overflow"), (1e-9, "off by"), (1.0, None)], ids=["large", "small", "tame"]
)
def test_values_that_do_not_fit_fp16_are_found_and_named(scale, reason):
    model = graph_of(
        helper.make_node("Mul", ["x", "scale"], ["scaled"], name="up"),
        helper.make_node("Div", ["scaled", "scale"], ["y"], name="down"),
        scale=scale,
    )
    found = delicate_nodes(model, [{"x": np.array([[0.5, 1.0]], np.float32)}])
    assert ("up" in found) == (reason is not None)
    if reason:
        assert reason in found["up"] and "scaled" in found["up"]


def test_the_first_layer_to_give_nan_is_named():
    model = graph_of(
        helper.make_node("Add", ["x", "one"], ["shifted"], name="shift"),
        helper.make_node("Log", ["shifted"], ["logs"], name="log"),
        helper.make_node("Exp", ["logs"], ["y"], name="exp"),
        one=1.0,
    ).SerializeToString()
    assert first_non_finite(model, {"x": np.array([[1.0, -2.0]], np.float32)}) == "log (Log)"
    assert first_non_finite(model, {"x": np.array([[1.0, 2.0]], np.float32)}) is None


def test_layers_that_cost_too_much_are_left_in_float32(student):
    """Here the cost is made up: one layer may not be quantised."""
    name = "node_MatMul_40"
    batch = {
        "x_t": np.zeros((1, 1, 8, 8), np.float32),
        "t": np.ones(1, np.float32),
        "class_labels": np.zeros(1, np.int64),
    }

    def accepts(graph):
        return 0.5 if any(node.name == name for node in onnx.load_from_string(graph).graph.node) else 2.0

    assert list(to_int8(student, [batch], static=False, accepts=accepts).kept) == [name]
    with pytest.raises(CheckFailedError, match="no layer of the student can be quantised"):
        to_int8(student, [batch], static=False, accepts=lambda graph: 2.0)


def test_a_precision_that_is_too_far_off_is_not_exported(tmp_path, monkeypatch):
    strict = {**to_bundle.TOLERANCES, "fp16": to_bundle.FP32_TOLERANCES}
    monkeypatch.setattr(to_bundle, "TOLERANCES", strict)
    with pytest.raises(CheckFailedError, match=r"in fp16: network outputs differ by .* in means\.\d, batch"):
        export_bundle(make_student(), tmp_path / "out", precisions=("fp32", "fp16"))
    with pytest.raises(BundleError, match="got fp8"):
        export_bundle(make_student(), tmp_path / "out", precisions=("fp8",))
    assert list(tmp_path.iterdir()) == []
