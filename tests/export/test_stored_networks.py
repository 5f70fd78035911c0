"""Networks that memory may not hold: their weights go one by one from their files into the bundle's."""

import hashlib
import os
import shutil

import numpy as np
import onnx
import pytest

pytest.importorskip("diffusers", reason="needs the 'diffusers' extra")
pytest.importorskip("transformers")

import diffusers

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from piflow_edge.distill import stored_weights
from piflow_edge.engines import Graph
from piflow_edge.errors import CheckFailedError
from piflow_edge.export import to_bundle
from piflow_edge.export.conversions import calibration, int4, layer_search
from piflow_edge.export.conversions.calibration import Conversion
from piflow_edge.export.conversions.weights_of_layers import quantisable
from piflow_edge.export.kept_work import keep_work
from piflow_edge.export.onnx_graphs import large
from piflow_edge.export.onnx_graphs.to_onnx import network_graph
from piflow_edge.export.onnx_graphs.weight_files import WEIGHTS, WeightFile, WeightsOnDemand
from piflow_edge.export.pipelines.pipeline_parts import read_pipeline
from piflow_edge.export.to_bundle import export_bundle
from tests.export.pipelines.test_flux import LORA
from tests.export.pipelines.tiny_pipelines import save_flux_pipeline, save_gm_adapter

pytestmark = pytest.mark.torch
PRECISIONS = ("fp32", "fp16", "int8", "int8-weights", "int4")
# The exporter looks into weights of fewer values.
LEAST = 2000


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a pipeline and an adapter, and a bundle of both made in the usual way, and one from the files."""
    place = tmp_path_factory.mktemp("flux")
    pipeline = save_flux_pipeline(place / "pipeline")
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(pipeline / "transformer")
    save_gm_adapter(place / "gmflux_k8_piid_4step", transformer, "GMFluxTransformer2DModel", LORA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "CALIBRATION_IMAGES", 2)
        export(place, "usual")
        patch.setattr(stored_weights, "LARGE", LEAST)
        patch.setattr(large, "LARGEST_MODEL", 60_000)
        export(place, "stored")
    return place


def read(place):
    return read_pipeline(str(place / "pipeline"), str(place / "gmflux_k8_piid_4step"), size=(16, 24))


def export(place, name, precisions=PRECISIONS):
    parts = read(place)
    given = {"autoencoder": parts.autoencoder, "encoders": parts.encoders, "precisions": precisions}
    return export_bundle(parts.student, place / name, **given)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bundle_made_of_files_draws_what_the_usual_one_does(place, precision):
    files = {
        name: Bundle(place / name).manifest.network_files("student", precision)
        for name in ("usual", "stored")
    }
    assert len(files["usual"]) == 1 and len(files["stored"]) == (1 if precision == "int4" else 2)
    with (
        pf.load(place / "usual", precision=precision) as one,
        pf.load(place / "stored", precision=precision) as two,
    ):
        images = [generator("a cat", seed=0, output="numpy").images.astype(int) for generator in (one, two)]
    assert np.abs(images[0] - images[1]).max() <= 1


def test_nothing_is_left_beside_the_bundle(place, monkeypatch):
    known = {"pipeline", "gmflux_k8_piid_4step", "usual", "stored"}
    assert {file.name for file in place.iterdir()} == known
    monkeypatch.setattr(stored_weights, "LARGE", LEAST)
    monkeypatch.setattr(large, "LARGEST_MODEL", 60_000)
    monkeypatch.setattr(
        layer_search, "measure_layers", lambda graph, *_: dict.fromkeys(_layers(graph), np.inf)
    )
    with pytest.raises(CheckFailedError, match=r"no layer .* quantised .*export without int4"):
        export(place, "other", ["int4"])
    assert {file.name for file in place.iterdir()} == known


def test_an_export_that_was_killed_goes_on_where_it_was(place, monkeypatch):
    monkeypatch.setattr(stored_weights, "LARGE", LEAST)
    monkeypatch.setattr(large, "LARGEST_MODEL", 25_000)
    draw, quantise, drawn, quantised = to_bundle.golden_samples, int4.quantise_blocks, [], []

    def stop_at_the_second(*given):
        if quantised:
            raise KeyboardInterrupt
        quantised.append(1)
        return quantise(*given)

    monkeypatch.setattr(int4, "quantise_blocks", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        export(place, "again", ["int4"])
    (kept,) = place.glob(".again.*.partial")
    done = {"golden samples.npz", "student.int4.json", "student.int4.onnx", "student.int4.weights"}
    assert {file.name for file in kept.iterdir()} == done
    (kept / "12345678.weights").write_bytes(b"half of a file")
    quantised.clear()
    monkeypatch.setattr(to_bundle, "golden_samples", lambda *given: drawn.append(1) or draw(*given))
    monkeypatch.setattr(int4, "quantise_blocks", lambda *given: quantised.append(1) or quantise(*given))
    export(place, "again", ["int4"])
    assert drawn == [] and len(quantised) == 2  # with both text encoders
    assert not list(place.glob(".again*"))
    files = {file.name for file in (place / "again").glob("student*")}
    assert files == {"student.int4.onnx", "student.int4.onnx.data"}
    again, stored = (Bundle(place / name) for name in ("again", "stored"))
    assert np.array_equal(*(np.load(b.folder / "golden.npz")["latents"] for b in (again, stored)))
    with pf.load(again.folder) as one, pf.load(stored.folder, precision="int4") as two:
        images = [generator("a cat", seed=0, output="numpy").images.astype(int) for generator in (one, two)]
    assert np.abs(images[0] - images[1]).max() <= 1
    shutil.rmtree(again.folder)


@pytest.mark.parametrize("altered", ["", "student.int4.onnx", "student.int4.weights", "student.int4.json"])
def test_work_is_taken_up_again_only_as_it_was_left(tmp_path, altered):
    file, made = WeightFile(tmp_path), []
    file.append(bytes(100))
    first = Conversion(Graph(b"model", {WEIGHTS: file}), {"layer": "why"}, {"other": 0.1})
    with pytest.raises(KeyboardInterrupt), keep_work(tmp_path / "bundle", "key") as work:
        assert work.conversion("student.int4", lambda: first) is first
        raise KeyboardInterrupt
    (folder,) = tmp_path.glob(".bundle.*.partial")
    if altered:
        data = bytearray((folder / altered).read_bytes())
        data[-2] ^= 1
        (folder / altered).write_bytes(data)
    with keep_work(tmp_path / "bundle", "key") as work:
        again = work.conversion("student.int4", lambda: made.append(1) or Conversion(Graph(b"new")))
    assert (again.graph.model, len(made)) == ((b"new", 1) if altered else (b"model", 0))
    if not altered:
        assert (again.float32_nodes, again.layer_errors) == (first.float32_nodes, first.layer_errors)
    assert not list(tmp_path.glob(".bundle.*"))


def test_what_is_kept_of_another_export_to_the_same_place_is_removed(tmp_path):
    for key in ("one", "two"):
        with pytest.raises(KeyboardInterrupt), keep_work(tmp_path / "bundle", key) as work:
            assert work.arrays("golden samples", lambda key=key: {"key": np.array(key)})["key"] == key
            raise KeyboardInterrupt
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="not fit"), keep_work(tmp_path / "bundle", "two") as work:
        assert work.arrays("golden samples", dict)["key"] == "two"
        raise ValueError("not fit")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("one", "other"), [("flux", "flux.v2"), ("x" * 45 + "a", "x" * 45 + "b")])
def test_what_is_kept_of_a_bundle_whose_name_begins_alike_stays(tmp_path, one, other):
    for name in (other, one):
        with pytest.raises(KeyboardInterrupt), keep_work(tmp_path / name, "key"):
            raise KeyboardInterrupt
    with keep_work(tmp_path / one, "another key"):
        pass
    (left,) = tmp_path.iterdir()
    with keep_work(tmp_path / other, "key") as work:
        assert work.folder == left


def _layers(graph):
    return quantisable(onnx.load_from_string(graph.model))


def test_the_graph_is_the_one_that_memory_would_hold(place, monkeypatch):
    student = read(place).student
    usual = network_graph(student.network, student.conditioner.inputs)
    monkeypatch.setattr(stored_weights, "LARGE", LEAST)
    monkeypatch.setattr(large, "LARGEST_MODEL", 60_000)
    student = read(place).student
    stored = network_graph(student.network, student.conditioner.inputs)
    assert large.is_on_demand(stored) and not large.is_on_demand(usual)
    assert len(stored.model) < 0.3 * len(usual.model) and stored.size >= usual.size
    one, two = large.model_of(usual).graph, large.model_of(stored).graph
    assert one.node == two.node
    weights = [{t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer} for graph in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        np.testing.assert_array_equal(weight, weights[1][name])
    # Of a model that turns out small, nothing is left in a file.
    monkeypatch.setattr(large, "LARGEST_MODEL", 2**31)
    assert not network_graph(student.network, student.conditioner.inputs).weights


def test_layers_that_are_off_or_stand_alone_are_left_out(monkeypatch):
    """Of eight blocks alike one is spoilt; what is before and after them stands alone."""
    names = [f"blocks.{i}.mlp/MatMul" for i in range(8)] + ["embed/MatMul", "out/Gemm"]
    sizes = [64] * 8 + [4, 4]
    graph = onnx.GraphProto(name="g")
    for name, size in zip(names, sizes, strict=True):
        weight = onnx.numpy_helper.from_array(np.ones((size, size), np.float32), f"{name}.weight")
        graph.initializer.append(weight)
        graph.node.append(
            onnx.helper.make_node(name.rpartition("/")[2], ["x", weight.name], [f"{name}.y"], name)
        )
    exact = Graph(onnx.ModelProto(graph=graph).SerializeToString())
    tried = []

    def convert(excluded):
        tried.append(list(excluded))
        return Graph(b"converted")

    monkeypatch.setattr(
        layer_search, "measure_layers", lambda *_: {n: 0.4 if "3" in n else 0.1 for n in names[:8]}
    )
    found = layer_search._convert_by_layer("int4", exact, names, convert, [], 0.15)
    assert tried == [names[8:], [*names[8:], names[3]]]
    assert found.float32_nodes == {
        names[8]: "it stands alone", names[9]: "it stands alone", names[3]: "off by 0.4 by itself",
    }  # fmt: skip
    assert found.layer_errors == {name: 0.1 for name in names[:8] if name != names[3]}


def test_a_file_of_weights_is_aligned_and_says_its_checksum(tmp_path):
    file, other = WeightFile(tmp_path), WeightFile(tmp_path)
    places = [file.append(bytes([i]) * size) for i, size in enumerate((3, 64, 100))]
    assert places == [0, 64, 128] and file.read(64, 64) == b"\x01" * 64
    for i, size in enumerate((3, 64, 100)):
        other.append(bytes([i]) * size)
    assert file == other and len(file) == 228
    other.append(b"more")
    assert file != other
    other.drop()
    file.move(tmp_path / "weights")
    data = (tmp_path / "weights").read_bytes()
    assert os.listdir(tmp_path) == ["weights"] and hashlib.sha256(data).hexdigest() == file.sha256()
    assert len(data) == 228 and data[3:64] == bytes(61)


def test_a_weight_on_demand_is_made_each_time_it_is_read():
    weights, made = WeightsOnDemand(), []
    start = weights.append(8, lambda: made.append(1) or np.arange(2, dtype=np.float32))
    assert start == 0 and weights.append(4, lambda: b"abcd") == 8 and len(weights) == 12
    assert made == []
    assert (
        bytes(weights.read(0, 8)) == np.arange(2, dtype=np.float32).tobytes()
        and weights.read(8, 4) == b"abcd"
    )
    weights.read(0, 8)
    assert made == [1, 1]
