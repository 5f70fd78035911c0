"""Bundles in opset 17, for parsers that promise no more."""

import onnx
import pytest
from onnx import helper

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from piflow_edge.distill.data.autoencoder import load_autoencoder
from piflow_edge.errors import BundleError, CheckFailedError
from piflow_edge.export.onnx_graphs.opset import lower_opset
from piflow_edge.export.to_bundle import export_bundle
from piflow_edge.runtime.verification import verify
from tests.conftest import make_student


def model_of(*nodes, opset=18):
    shapes = {"x": [2, 4], "y": ["rows", "columns"]}
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, s) for name, s in shapes.items()]
    axes = helper.make_tensor("axes", onnx.TensorProto.INT64, [1], [1])
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], [axes])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]).SerializeToString()


def test_a_whole_bundle_in_opset_17(autoencoder_folder, tmp_path):
    autoencoder = load_autoencoder(autoencoder_folder)
    student = make_student(latent=vars(autoencoder.latent), in_channels=autoencoder.latent_channels)
    settings = dict(precisions=("fp32", "fp16", "int8", "int8-qdq"), samplers=[2], autoencoder=autoencoder)
    rows = export_bundle(student, tmp_path / "bundle", opset=17, **settings)
    assert all(row.passed for row in rows)
    opened = Bundle(tmp_path / "bundle")
    assert (opened.manifest.student.opset, opened.manifest.decoder.opset) == (17, 17)
    for file in opened.manifest.files:
        if file.endswith(".onnx"):
            model = onnx.load(tmp_path / "bundle" / file)
            assert [entry.version for entry in model.opset_import if entry.domain == ""] == [17], file
            onnx.checker.check_model(model, full_check=True)
    assert all(row.passed for row in verify(pf.load(tmp_path / "bundle", precision="fp16")))


def test_reductions_get_their_axes_as_an_attribute():
    model = onnx.load_from_string(
        lower_opset(model_of(helper.make_node("ReduceMax", ["x", "axes"], ["y"], keepdims=1)))
    )
    (node,) = model.graph.node
    assert list(node.input) == ["x"] and not model.graph.initializer
    assert {a.name: helper.get_attribute_value(a) for a in node.attribute} == {"keepdims": 1, "axes": [1]}


@pytest.mark.parametrize(
    ("node", "problem"),
    [
        (helper.make_node("Mish", ["x"], ["y"], name="mish"), r"mish \(Mish\) .*opset 18"),
        (helper.make_node("Split", ["x"], ["y", "z"], name="s", num_outputs=3), r"s \(Split\) uses num_outputs"),
        (helper.make_node("ReduceMax", ["x", "t"], ["y"], name="r"), r"r \(ReduceMax\) reduces axes that"),
    ],
)  # fmt: skip
def test_what_opset_17_lacks_is_named(node, problem):
    with pytest.raises(CheckFailedError, match=problem):
        lower_opset(model_of(node))


def test_other_opsets_are_refused(tmp_path):
    with pytest.raises(BundleError, match=r"17 or 18; .*16"):
        export_bundle(make_student(), tmp_path / "out", opset=16)
    assert list(tmp_path.iterdir()) == []
