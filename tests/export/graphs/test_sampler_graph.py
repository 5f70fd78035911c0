"""The whole sampler as one graph makes what the Python runtime makes."""

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from piflow_edge.distill.sources import network_of
from piflow_edge.engines import Graph, open_engine
from piflow_edge.errors import BundleError, CheckFailedError, EngineError
from piflow_edge.export import bundle_graphs
from piflow_edge.export.onnx_graphs.sampler_graph import export_sampler
from piflow_edge.export.onnx_graphs.to_onnx import OPSET, export_network
from piflow_edge.export.to_bundle import export_bundle
from piflow_edge.runtime import verification
from piflow_edge.runtime.generator import Generator
from piflow_edge.runtime.graphs import read_graph
from piflow_edge.runtime.images import decode
from piflow_edge.runtime.verification import verify
from piflow_edge.sampling import Hooks, sample
from piflow_edge.sampling_settings import SamplingSettings
from tests.conftest import make_student

# Two float32 computations of up to 128 substeps, and a network of which each feeds the next.
TOLERANCE = dict(rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle with sampler graphs: of the calls it was trained for, 2, and of others, each with its temperature."""
    folder = tmp_path_factory.mktemp("bundles") / "graphs"
    export_bundle(make_student(), folder, samplers=[3, 1, 2])
    return folder


@pytest.mark.parametrize("nfe", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_sampler_graph_makes_what_the_runtime_makes(folder, nfe, batch):
    generator = pf.load(folder)
    labels = np.arange(batch)
    noise = pf.philox_normal(7, range(batch), (1, 8, 8))
    expected = generator(labels, noise=noise, nfe=nfe, output="numpy")
    found = open_engine(read_graph(Bundle(folder), f"sampler.nfe{nfe}")).run(
        {"noise": noise, "labels": labels}
    )
    np.testing.assert_allclose(found["latents"], expected.latents, **TOLERANCE)
    np.testing.assert_array_equal(found["images"], expected.images)


@pytest.mark.parametrize(
    "schedule",
    [
        dict(h=0.5, nfe=3),
        dict(h="inf", nfe=2),
        dict(h=0.5, nfe=1),
        dict(final_step_size_scale=0.3, nfe=3, shift=3.2, total_substeps=50),
    ],
    ids=str,
)
def test_every_schedule_is_followed(folder, schedule):
    opened = Bundle(folder)
    manifest = replace(
        opened.manifest, schedule=replace(opened.manifest.schedule, temperature=0.3, **schedule)
    )
    nfe = schedule["nfe"]
    noise, *fresh = np.random.default_rng(0).standard_normal((nfe, 4, 1, 8, 8), np.float32)
    inputs = {"noise": noise, "labels": np.array([0, 3, 7, 3])}
    if manifest.schedule.h != 0 and nfe > 1:
        inputs["renoise"] = np.stack(fresh)
    found = open_engine(Graph(export_sampler(opened.read_network("student").model, manifest, nfe))).run(
        inputs
    )

    generator = Generator(opened, {"student": open_engine(read_graph(opened))})
    expected = sample(
        lambda x_t, sigma: generator.student.policy(x_t, sigma, {"labels": inputs["labels"]}),
        noise,
        manifest.schedule.schedule(),
        SamplingSettings(temperature=0.3),
        Hooks(renoise=lambda draw: fresh[draw - 1]),
    )
    np.testing.assert_allclose(found["latents"], expected, **TOLERANCE)


def test_colour_latents_and_their_scale_become_images(tmp_path):
    export_bundle(make_student(in_channels=3, sample_size=12, patch_size=3), tmp_path / "colour")
    opened = Bundle(tmp_path / "colour")
    opened.manifest = replace(opened.manifest, latent=replace(opened.manifest.latent, scale=1.7, shift=0.2))
    noise, ids = pf.philox_normal(0, range(2), (3, 12, 12)), np.array([1, 2])
    graph = open_engine(Graph(export_sampler(opened.read_network("student").model, opened.manifest, 2)))
    found = graph.run({"noise": noise, "labels": ids})
    assert found["images"].shape == (2, 12, 12, 3) and found["images"].dtype == np.uint8
    expected = decode(found["latents"], opened.manifest.latent)
    assert 0 < expected.mean() < 255
    np.testing.assert_array_equal(found["images"], expected)


# What an app would write in any other language: a session, two inputs, two outputs.
BARE = """
import os, sys
import numpy as np
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime as ort

graph, inputs, outputs = sys.argv[1:]
with np.load(inputs) as given:
    latents, images = ort.InferenceSession(graph).run(["latents", "images"], dict(given))
np.savez(outputs, latents=latents, images=images)
sys.exit(", ".join({"piflow_edge", "torch", "onnx"} & set(sys.modules)) or None)
"""


@pytest.mark.parametrize("nfe", [2, 3], ids=["trained", "other"])
def test_onnxruntime_alone_makes_the_images(folder, tmp_path, nfe):
    noise, labels = pf.philox_normal(3, range(2), (1, 8, 8)), np.array([4, 9])
    np.savez(tmp_path / "in.npz", noise=noise, labels=labels)
    graph = folder / f"sampler.nfe{nfe}.fp32.onnx"
    command = [sys.executable, "-I", "-c", BARE, graph, tmp_path / "in.npz", tmp_path / "out.npz"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = pf.load(folder)(labels, noise=noise, nfe=nfe, output="numpy")
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_allclose(found["latents"], expected.latents, **TOLERANCE)
        np.testing.assert_array_equal(found["images"], expected.images)


def test_a_graph_holds_standard_operators_and_the_network_once(folder):
    opened = Bundle(folder)
    model = onnx.load_from_string(opened.read_network("sampler.nfe3").model)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert not model.functions
    # Three rollouts of 43 substeps take four float32 each, and the nodes of one a few kilobytes.
    assert len(opened.read_network("sampler.nfe3").model) < len(opened.read_network("student").model) + 16_000


def test_verify_closes_the_engines_it_opens(folder, monkeypatch):
    opened = []

    def opening(*arguments, **settings):
        opened.append(open_engine(*arguments, **settings))
        return opened[-1]

    monkeypatch.setattr(verification, "open_engine", opening)
    with pf.load(folder) as generator:
        verify(generator)
        assert len(opened) == 3
        for engine in opened:
            with pytest.raises(EngineError, match="is closed"):
                engine.run({})
        generator([1])  # what was given is not closed


def test_verify_says_which_sampler_graph_gives_nan(folder, monkeypatch):
    class Broken:
        max_batch = None

        def run(self, inputs):
            return {name: np.full((4, 1, 8, 8), np.nan, np.float32) for name in ("latents", "images")}

        def close(self):
            pass

    monkeypatch.setattr(verification, "_sampler_engine", lambda generator, nfe: Broken())
    with pf.load(folder) as generator, pytest.raises(CheckFailedError, match="sampler graph nfe1 of bundle"):
        verify(generator)


def test_a_bundle_holds_its_sampler_graphs_and_verifies_them(folder):
    opened = Bundle(folder)
    assert opened.manifest.samplers == [1, 2, 3]
    rows = {row.layer: row for row in verify(pf.load(folder))}
    assert rows["sampler latents"].passed and rows["sampler latents"].error > 0
    assert rows["sampler images"].passed
    with pytest.raises(BundleError, match=r"sampler graph of 4 .*1, 2, 3"):
        read_graph(opened, "sampler.nfe4")


def test_a_sampler_that_differs_from_the_runtime_is_not_exported(tmp_path, monkeypatch):
    other = export_network(network_of(make_student(seed=1)))
    monkeypatch.setattr(bundle_graphs, "export_sampler", lambda student, *rest: export_sampler(other, *rest))
    with pytest.raises(CheckFailedError, match=r"sampler latents .* nfe"):
        export_bundle(make_student(), tmp_path / "out", samplers=[1, 2])
    assert list(tmp_path.iterdir()) == []


NODE = """
process.env.ORT_DISABLE_TELEMETRY = "1";
const ort = require("onnxruntime-node"), fs = require("fs");
const floats = (file) => new Float32Array(new Uint8Array(fs.readFileSync(file)).buffer);
(async () => {
  const sampler = await ort.InferenceSession.create(process.argv[1]);
  const noise = new ort.Tensor("float32", floats(process.argv[2]), [3, 1, 8, 8]);
  const labels = new ort.Tensor("int64", [0n, 1n, 2n], [3]);
  const { latents, images } = await sampler.run({ noise, labels });
  fs.writeFileSync(process.argv[3], new Uint8Array(latents.data.buffer));
  fs.writeFileSync(process.argv[4], images.data);
})();
"""


def test_javascript_makes_the_images(folder, tmp_path):
    probe = ["node", "-e", 'require("onnxruntime-node")']
    if not shutil.which("node") or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("needs node, and onnxruntime-node where NODE_PATH points to")
    noise = pf.philox_normal(7, range(3), (1, 8, 8))
    noise.tofile(tmp_path / "noise")
    files = [folder / "sampler.nfe2.fp32.onnx", *(tmp_path / name for name in ("noise", "latents", "images"))]
    subprocess.run(["node", "-e", NODE, *map(str, files)], check=True)
    expected = pf.load(folder)([0, 1, 2], noise=noise, output="numpy")
    latents = np.fromfile(files[2], np.float32).reshape(3, 1, 8, 8)
    np.testing.assert_allclose(latents, expected.latents, **TOLERANCE)
    np.testing.assert_array_equal(np.fromfile(files[3], np.uint8).reshape(3, 8, 8, 1), expected.images)
