"""Networks whose weights do not fit into one file; here all of them, for the limit is lowered."""

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.sections import FileSpec
from piflow_edge.distill.sources import network_of
from piflow_edge.engines import Graph
from piflow_edge.errors import BundleError, CheckpointError
from piflow_edge.export.onnx_graphs import large
from piflow_edge.export.onnx_graphs.to_onnx import export_network
from piflow_edge.export.to_bundle import export_bundle
from piflow_edge.runtime.verification import verify
from piflow_edge.system.files import sha256
from tests.bundle.test_bundle import edit
from tests.commands.command_line import run
from tests.conftest import make_student

PRECISIONS = ("fp32", "fp16", "int8", "int8-qdq")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "large"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large, "LARGEST_MODEL", 0)
        export_bundle(make_student(), folder, precisions=PRECISIONS)
    return folder


def test_weights_lie_beside_the_model_and_are_hashed(folder):
    files = Bundle(folder).manifest.files
    for precision in PRECISIONS:
        name = f"student.{precision}.onnx"
        assert files[f"{name}.data"].size == (folder / f"{name}.data").stat().st_size
        model = onnx.load(folder / name, load_external_data=False)
        outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert outside and all(len(t.raw_data) < 1024 for t in model.graph.initializer)
        onnx.checker.check_model(folder / name, full_check=True)  # finds the second file by itself
    assert files["student.fp16.onnx.data"].size < 0.6 * files["student.fp32.onnx.data"].size


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_computes_what_one_file_does(folder, precision):
    assert all(row.passed for row in verify(pf.load(folder, precision=precision)))
    if precision == "fp32":
        two = onnx.load(folder / "student.fp32.onnx").graph
        one = onnx.load_from_string(export_network(network_of(make_student()))).graph
        assert two.node == one.node and len(two.initializer) == len(one.initializer)
        for ours, theirs in zip(two.initializer, one.initializer, strict=True):
            np.testing.assert_array_equal(numpy_helper.to_array(ours), numpy_helper.to_array(theirs))


def test_a_changed_weight_is_noticed_before_it_is_used(folder, bundle, tmp_path):
    altered = shutil.copytree(folder, tmp_path / "altered")
    file = altered / "student.fp32.onnx.data"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"student\.fp32\.onnx\.data .*checksum"):
        pf.load(altered)
    file.write_bytes(data + b"x")
    with pytest.raises(BundleError, match=r"student\.fp32\.onnx\.data .*checksum"):
        pf.load(altered)
    # A file of weights that belongs to no graph.
    (bundle / "student.fp16.onnx.data").write_bytes(b"x")
    spec = vars(FileSpec(sha256(b"x"), 1))
    edit(bundle, lambda body: body["files"].update({"student.fp16.onnx.data": spec}))
    with pytest.raises(BundleError, match=r"student\.fp16\.onnx\.data, .*nothing"):
        pf.load(bundle)


def test_what_is_written_into_its_files_later_is_not_drawn(folder, tmp_path):
    altered = shutil.copytree(folder, tmp_path / "bundle")
    with pf.load(altered) as generator:
        before = generator([3], output="latent").latents
        for file in altered.glob("*.data"):
            file.write_bytes(bytes(file.stat().st_size))
        np.testing.assert_array_equal(generator([3], output="latent").latents, before)


def test_it_is_packed_and_unpacked(folder, tmp_path):
    run("pack", folder, "--out", tmp_path / "large.zip")
    run("unpack", tmp_path / "large.zip", "--out", tmp_path / "again")
    assert json.loads(run("verify", tmp_path / "again", "--json").stdout)["passed"]


def test_a_sampler_graph_of_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(large, "LARGEST_MODEL", 0)
    with pytest.raises(BundleError, match=r"sampler graph .*one file"):
        export_bundle(make_student(), tmp_path / "out", samplers=[1])
    assert list(tmp_path.iterdir()) == []


def test_a_graph_survives_the_way_to_files_and_back(monkeypatch):
    one = Graph(export_network(network_of(make_student())))
    model = large.model_of(one)
    monkeypatch.setattr(large, "LARGEST_MODEL", 0)
    two = large.graph_of(large.model_of(one))
    assert len(two.model) < 0.6 * len(one.model) and large.model_of(two) == model
    kinds = large.types(model)
    assert kinds["means"] == onnx.TensorProto.FLOAT and np.isin(list(kinds.values()), [1, 7, 9]).all()


@pytest.mark.parametrize(("precision", "least", "most"), [("fp32", 0, 0), ("fp16", 0.7, 1), ("int8", 0.5, 1)])
def test_the_share_of_weights_that_a_precision_holds(folder, precision, least, most):
    model = (folder / f"student.{precision}.onnx").read_bytes()
    assert least <= large.measure_lowered_share(Graph(model)) <= most


def test_a_graph_that_must_be_one_file_says_so(monkeypatch):
    monkeypatch.setattr(large, "LARGEST_MODEL", 0)
    with pytest.raises(CheckpointError, match="2 GiB"):
        export_network(network_of(make_student()))
