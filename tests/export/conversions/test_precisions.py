"""Lower precisions of a bundle: small, near enough, and checked; what must stay in float32 is found and named."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.precisions import PRECISIONS
from piflow_edge.bundle.sections import FileSpec
from piflow_edge.distill.sources import network_of
from piflow_edge.engines import Graph, open_engine
from piflow_edge.engines.graph_types import find_wide_nodes
from piflow_edge.engines.layers import first_non_finite, layer_values
from piflow_edge.engines.onnx_file import read_model
from piflow_edge.errors import BundleError, CheckFailedError
from piflow_edge.export.conversions import int8
from piflow_edge.export.conversions.calibration import Calibration
from piflow_edge.export.conversions.fp16 import delicate_nodes
from piflow_edge.export.conversions.int8 import quantise
from piflow_edge.export.conversions.layer_search import convert_within
from piflow_edge.export.conversions.weights_of_layers import quantisable
from piflow_edge.export.onnx_graphs.compact import compact
from piflow_edge.export.onnx_graphs.to_onnx import export_network, network_graph
from piflow_edge.export.to_bundle import export_bundle
from piflow_edge.runtime.graphs import read_graph
from piflow_edge.runtime.verification import verify
from piflow_edge.system.files import sha256
from tests.bundle.test_bundle import edit
from tests.commands.command_line import run
from tests.conftest import make_student

ALL = ("fp32", "fp16", "int8", "int8-qdq", "int8-weights", "int4")


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
    float32_nodes = Bundle(folder).manifest.provenance["kept_in_fp32"]["fp16"]["student"]
    model = onnx.load_from_string(Bundle(folder).read_network("student", "fp16").model)
    types = {node.name: node.op_type for node in model.graph.node}
    assert {"Cos", "Sin", "LogSoftmax"} <= {types[name] for name in float32_nodes}
    values = [*model.graph.input, *model.graph.output]
    dtypes = {value.name: value.type.tensor_type.elem_type for value in values}
    assert set(dtypes.values()) == {TensorProto.FLOAT, TensorProto.INT64}


def test_the_graph_in_fp16_says_what_was_kept_in_float32(folder):
    """TensorRT before 10 pins by it; the list in the manifest is for people."""
    float32_nodes = Bundle(folder).manifest.provenance["kept_in_fp32"]["fp16"]["student"]
    model = read_model(read_graph(Bundle(folder), "student", "fp16"))
    inputs = {name: "float32" if name in ("x_t", "t") else "int64" for name in model.graph.inputs}
    assert set(find_wide_nodes(model, inputs)) == set(float32_nodes)


@pytest.mark.parametrize("precision", ALL[:-1])  # of int4's operator onnx knows no types
@pytest.mark.parametrize("sampler", [False, True], ids=["student", "sampler"])
def test_no_node_mixes_types(folder, precision, sampler):
    """As strongly typed compilers want it: whoever changes a type says so by a Cast or a (De)QuantizeLinear."""
    bundle = Bundle(folder)
    model = onnx.load_from_string(
        (
            read_graph(bundle, "sampler.nfe2", precision)
            if sampler
            else read_graph(bundle, "student", precision)
        ).model
    )
    # Data propagation and strict mode: a node with inputs of two types is an error here.
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    types = {
        v.name: v.type.tensor_type.elem_type
        for v in [*inferred.value_info, *inferred.input, *inferred.output]
    }
    types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    floats = {TensorProto.FLOAT, TensorProto.FLOAT16}
    for node in inferred.node:
        assert len({types[name] for name in node.input if types.get(name) in floats}) <= 1, node.name
        assert all(types[name] for name in node.output if name), node.name
    if not sampler:
        expected = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}.get(precision, TensorProto.INT8)
        weights = [tensor for tensor in inferred.initializer if len(tensor.dims) > 1]
        assert sum(tensor.data_type == expected for tensor in weights) > len(weights) / 2


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
    assert first_non_finite(Graph(model), {"x": np.array([[1.0, -2.0]], np.float32)}) == "log (Log)"
    assert first_non_finite(Graph(model), {"x": np.array([[1.0, 2.0]], np.float32)}) is None


BATCH = {
    "x_t": np.ones((1, 1, 8, 8), np.float32),
    "t": np.ones(1, np.float32),
    "labels": np.zeros(1, np.int64),
}


def float_weights(graph):
    """Values of the matrices that a graph holds in float32, or in fp16 and widens before they are used."""
    model = onnx.load_from_string(graph).graph
    widened = {node.input[0] for node in model.node if node.op_type == "Cast" and node.attribute[0].i == 1}
    return [
        numpy_helper.to_array(t)
        for t in model.initializer
        if len(t.dims) == 2
        and (t.data_type == TensorProto.FLOAT or (t.data_type == TensorProto.FLOAT16 and t.name in widened))
    ]


def holds(graph, matrix):
    return any(
        np.array_equal(found, m.astype(found.dtype))
        for found in float_weights(graph)
        for m in (matrix, matrix.T)
    )


def convert_to_int8(student, accepts, *, static):
    layers = quantisable(onnx.load_from_string(student))
    return convert_within(
        "int8",
        layers,
        lambda excluded: quantise(Graph(student), [BATCH], static=static, excluded=excluded),
        accepts,
    )


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "qdq"])
@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
def test_a_layer_that_is_left_out_stays_in_float32(student, kind, static):
    model = onnx.load_from_string(student)
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    layers = {node.name: node for node in model.graph.node if node.name in quantisable(model)}
    name = next(name for name, node in layers.items() if node.op_type == kind)
    matrix = weights[layers[name].input[1]]
    assert holds(student, matrix) and not holds(
        quantise(Graph(student), [BATCH], static=static).model, matrix
    )

    def accepts(graph):  # a made-up cost: this one layer may not be quantised
        return 0.5 if holds(graph.model, matrix) else 2.0

    assert list(convert_to_int8(student, accepts, static=static).float32_nodes) == [name]


def test_layers_quantised_one_at_a_time_are_those_quantised_together(student, monkeypatch):
    together = quantise(Graph(student), [], static=False)
    monkeypatch.setattr(int8, "_AT_A_TIME", 1)
    alone = quantise(Graph(student), [], static=False)
    kinds = [
        Counter(node.op_type for node in onnx.load_from_string(g.model).graph.node) for g in (together, alone)
    ]
    assert kinds[0] == kinds[1] and kinds[0]["MatMulInteger"] > kinds[0]["DynamicQuantizeLinear"] > 1
    answers = [open_engine(graph, engine="ort-cpu").run(BATCH) for graph in (together, alone)]
    for name, found in answers[0].items():
        np.testing.assert_array_equal(found, answers[1][name])


def test_a_student_that_cannot_be_quantised_is_refused(student):
    with pytest.raises(CheckFailedError, match=r"no layer .*quantised"):
        convert_to_int8(student, lambda graph: 2.0, static=False)


def test_the_layer_that_int8_spoils_is_found_by_what_verify_checks(tmp_path):
    """One hidden feature is large and not used, so that the others share what few steps of int8 are left."""
    made, random = make_student(), torch.Generator().manual_seed(0)
    block = "ema.module.blocks.0."
    gates = made.tensors[f"{block}modulation.weight"]
    gates.copy_(torch.randn(gates.shape, generator=random))  # adaLN-zero would leave the block out
    made.tensors[f"{block}mlp.0.bias"][0] = 1e4
    made.tensors[f"{block}mlp.2.weight"][:, 0] = 0
    rows = export_bundle(made, tmp_path / "spoilt", precisions=("fp32", "int8"))
    assert all(row.passed for row in rows)
    float32_nodes = Bundle(tmp_path / "spoilt").manifest.provenance["kept_in_fp32"]["int8"]["student"]
    graph = read_graph(Bundle(tmp_path / "spoilt"), "student", "int8")
    assert holds(graph.model, made.tensors[f"{block}mlp.2.weight"].numpy())
    assert len(float32_nodes) == 1 and "of what is allowed" in next(iter(float32_nodes.values()))
    exact = network_graph(network_of(made))
    manifest = Bundle(tmp_path / "spoilt").manifest
    calibration = Calibration(exact, manifest, [2])
    spoilt = quantise(exact, calibration.batches, static=False)
    tolerances = manifest.tolerances["int8"]
    assert calibration.share(graph, tolerances) <= 0.5 < calibration.share(spoilt, tolerances)


@pytest.fixture
def with_nan(folder, tmp_path):
    """The bundle with a weight that is not a number in its fp16 graph, and checksums to match."""
    altered = shutil.copytree(folder, tmp_path / "altered")
    model = onnx.load(altered / "student.fp16.onnx")
    name = "network.module.class_embed.weight"
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float16("nan"), name))
    data = model.SerializeToString()
    (altered / "student.fp16.onnx").write_bytes(data)
    edit(
        altered,
        lambda body: body["files"].update({"student.fp16.onnx": vars(FileSpec(sha256(data), len(data)))}),
    )
    return altered


def test_verify_names_the_layer_that_gives_nan(with_nan):
    assert all(row.passed for row in verify(pf.load(with_nan)))
    with pytest.raises(CheckFailedError, match=r"fp16 .*NaN .*: \S+ \(Gather with .*class_embed"):
        verify(pf.load(with_nan, precision="fp16"))
    assert "class_embed" in run("verify", with_nan, "--precision", "fp16", code=1).stderr


def test_the_command_line_runs_the_precision_it_is_told(folder, tmp_path):
    rows = json.loads(run("verify", folder, "--precision", "int8", "--json").stdout)["layers"]
    assert {row["precision"] for row in rows} == {"int8"} and all(row["passed"] for row in rows)
    assert "holds fp32, fp16" in run("verify", folder, "--precision", "fp8", code=2).stderr
    run("sample", folder, "--labels", "3", "--precision", "int8", "--out", tmp_path / "int8")
    with Image.open(next((tmp_path / "int8").iterdir())) as image:
        drawn = np.array(image)
    made = {
        name: pf.load(folder, precision=name)([3], output="numpy").images[0, ..., 0]
        for name in ("int8", "fp32")
    }
    np.testing.assert_array_equal(drawn, made["int8"])
    assert (drawn != made["fp32"]).any()


def test_inspect_says_what_stays_in_float32(folder):
    shown = run("inspect", folder).stdout
    assert re.search(r"kept in fp32 +│ fp16, student: \d+ nodes", shown), shown
    kept = json.loads(run("inspect", folder, "--json").stdout)["provenance"]["kept_in_fp32"]
    assert "Cos" in kept["fp16"]["student"] and not kept["int8"]["student"]


def test_compact_changes_names_and_size_alone(student):
    model = onnx.load_from_string(student)
    for i, node in enumerate(model.graph.node):  # weights of their own for everything, and long names
        for j, name in enumerate(node.input):
            tensor = next((t for t in model.graph.initializer if t.name == name), None)
            if tensor is not None:
                own = model.graph.initializer.add()
                own.CopyFrom(tensor)
                own.name = node.input[j] = f"a.rather.long.name.of.{name}.{i}.{j}"
    before, size = [n.op_type for n in model.graph.node], model.ByteSize()
    names = [node.name for node in model.graph.node]
    expected = layer_values(Graph(model.SerializeToString()), BATCH, ["means", "logweights", "logstds"])
    compact(model)
    assert model.ByteSize() < size - 10_000 and not model.graph.value_info
    assert [n.op_type for n in model.graph.node] == before and [n.name for n in model.graph.node] == names
    small = [t for t in model.graph.initializer if len(t.dims) < 2]
    contents = {(t.data_type, tuple(t.dims), numpy_helper.to_array(t).tobytes()) for t in small}
    assert len(contents) == len(small)
    found = layer_values(Graph(model.SerializeToString()), BATCH, list(expected))
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_precision_that_is_too_far_off_is_not_exported(tmp_path, monkeypatch):
    strict = replace(PRECISIONS["fp16"], tolerances=PRECISIONS["fp32"].tolerances)
    monkeypatch.setitem(PRECISIONS, "fp16", strict)
    with pytest.raises(CheckFailedError, match=r"fp16: network outputs .* means\.\d, batch"):
        export_bundle(make_student(), tmp_path / "out", precisions=("fp32", "fp16"))
    with pytest.raises(BundleError, match="got fp8"):
        export_bundle(make_student(), tmp_path / "out", precisions=("fp8",))
    assert list(tmp_path.iterdir()) == []
