"""A student of latents: its bundle makes the images that the autoencoder makes in PyTorch, without PyTorch."""

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.sections import FileSpec
from piflow_edge.conditioning import ClassLabels
from piflow_edge.distill.data.autoencoder import encode, load_autoencoder
from piflow_edge.distill.data.datasets import ImageData, Latent
from piflow_edge.distill.imitation import ImitationConfig
from piflow_edge.distill.loop.training import TrainingConfig
from piflow_edge.distill.networks.dit import DiTConfig
from piflow_edge.distill.sources import teacher_from_checkpoint
from piflow_edge.distill.student import distill
from piflow_edge.distill.teacher import FlowMatchingConfig, GuidanceConfig, train_teacher
from piflow_edge.engines import Graph, open_engine
from piflow_edge.errors import BundleError, CheckFailedError, DataError, NotFiniteError
from piflow_edge.export import bundle_graphs
from piflow_edge.export.onnx_graphs.decoder_graph import export_decoder
from piflow_edge.export.onnx_graphs.to_onnx import OPSET
from piflow_edge.export.to_bundle import export_bundle
from piflow_edge.policies import GMPolicySpec
from piflow_edge.runtime.graphs import read_graph
from piflow_edge.runtime.verification import verify
from piflow_edge.system.files import sha256
from tests.bundle.test_bundle import edit
from tests.conftest import make_autoencoder, make_student

SHORT = TrainingConfig(iterations=4, batch_size=4, warmup=1)


@pytest.fixture(scope="module")
def kl(autoencoder_folder):
    return load_autoencoder(autoencoder_folder)


@pytest.fixture(scope="module")
def other_decoder(tmp_path_factory):
    """The graph of a decoder of other weights."""
    folder = tmp_path_factory.mktemp("autoencoders") / "other"
    return export_decoder(
        load_autoencoder(make_autoencoder("AutoencoderKL", folder, seed=1)), [4, 8, 8]
    ).model


def images_in_torch(autoencoder, latents):
    """The images of latents as the network sees them, as diffusers' pipelines decode them."""
    config = autoencoder.module.config
    unscaled = torch.from_numpy(latents) / config["scaling_factor"] + (config.get("shift_factor") or 0.0)
    decoded = autoencoder.decode(unscaled)
    return ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def assert_alike(found, expected):
    assert found.shape == expected.shape and found.dtype == expected.dtype == np.uint8
    assert np.ptp(expected.astype(int)) > 30  # a picture of something
    # Float32 in another order: what lies between two levels may be rounded the other way.
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_from_images_to_a_bundle_that_makes_images(tmp_path):
    """Encode, train, distil, export, and sample in a process that has never heard of torch."""
    autoencoder = load_autoencoder(make_autoencoder("AutoencoderTiny", tmp_path / "autoencoder"))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16), np.uint8)
    data = encode(
        ImageData("set", pixels, ClassLabels(("a", "b")), {"labels": np.arange(8) % 2}), autoencoder
    )
    assert data.shape == (4, 8, 8)
    size = DiTConfig(in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=2)
    teacher = train_teacher(data, size, FlowMatchingConfig(), SHORT, tmp_path / "teacher")
    imitation = ImitationConfig(nfe=2, total_substeps=16)
    student = distill(
        teacher_from_checkpoint(teacher),
        data,
        imitation,
        SHORT,
        tmp_path / "student",
        guidance=GuidanceConfig(1.5),
        head=GMPolicySpec(2),
    )
    assert student.settings["latent"] == vars(autoencoder.latent)
    rows = export_bundle(student, tmp_path / "bundle", autoencoder=autoencoder)
    layers = ["network outputs", "policy velocities", "trajectories", "latents", "images", "drawn images"]
    assert [row.layer for row in rows] == layers
    code = (
        "import sys, numpy, piflow_edge as pf; r = pf.load(sys.argv[1])(['a', 1, 0], seed=3, output='numpy');"
        "numpy.savez(sys.argv[2], images=r.images, latents=r.latents);"
        "sys.exit(', '.join({'torch', 'diffusers', 'onnx'} & set(sys.modules)) or None)"
    )
    command = [sys.executable, "-c", code, tmp_path / "bundle", tmp_path / "out.npz"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as made:
        assert_alike(made["images"], images_in_torch(autoencoder, made["latents"]))


def test_a_bundle_with_a_decoder(latent_bundle, kl):
    names = {file.name for file in latent_bundle.iterdir()}
    assert {"decoder.fp32.onnx", "preview.png", "sampler.nfe2.fp32.onnx"} < names
    manifest = Bundle(latent_bundle).manifest
    latent = manifest.latent
    assert (latent.kind, latent.shape, latent.scale, latent.shift) == ("latents", [4, 8, 8], 0.3611, 0.1159)
    assert manifest.decoder.kind == "AutoencoderKL"
    assert manifest.decoder.outputs[0].shape == ("batch", 3, 16, 16)
    assert manifest.provenance["autoencoder"] == kl.sha256


def test_a_generator_decodes(latent_bundle, kl, monkeypatch):
    generator = pf.load(latent_bundle)
    result = generator([1, 2, 3], seed=0, output="numpy")
    assert_alike(result.images, images_in_torch(kl, result.latents))
    assert [image.size for image in generator([1, 2]).images] == [(16, 16)] * 2
    assert generator([1], output="latent").images is None
    monkeypatch.setattr("piflow_edge.runtime.drawing.decoding._DECODED_PIXELS", 2 * 16 * 16)  # two at a time
    np.testing.assert_array_equal(generator.decode(result.latents), result.images)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_sampler_graph_makes_the_decoded_images(latent_bundle, kl, batch):
    noise, labels = pf.philox_normal(7, range(batch), (4, 8, 8)), np.arange(batch)
    found = open_engine(read_graph(Bundle(latent_bundle), "sampler.nfe2")).run(
        {"noise": noise, "labels": labels}
    )
    expected = pf.load(latent_bundle)(labels, noise=noise, output="numpy")
    # Two float32 computations of 128 substeps, and a network of which each feeds the next.
    np.testing.assert_allclose(found["latents"], expected.latents, rtol=0, atol=2e-5)
    assert_alike(found["images"], images_in_torch(kl, found["latents"]))


def test_the_graphs_are_float32_and_standard(latent_bundle):
    opened = Bundle(latent_bundle)
    for graph in (opened.read_network("decoder").model, opened.read_network("sampler.nfe2").model):
        model = onnx.load_from_string(graph)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
        assert not model.functions and b".py" not in graph
    decoder = onnx.load_from_string(opened.read_network("decoder").model)
    model = onnx.shape_inference.infer_shapes(decoder, strict_mode=True)
    types = {value.type.tensor_type.elem_type for value in model.graph.value_info}
    assert types <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}  # whole numbers are shapes
    assert not any(node.op_type == "Cast" for node in model.graph.node)


def test_verify_has_a_layer_from_latents_to_images(latent_bundle, tmp_path, other_decoder):
    rows = {row.layer: row for row in verify(pf.load(latent_bundle))}
    assert rows.keys() >= {"images", "sampler latents", "sampler images"}
    assert all(row.passed for row in rows.values())
    # Another decoder under the same golden samples: that layer fails, and it alone.
    altered = shutil.copytree(latent_bundle, tmp_path / "altered")
    (altered / "decoder.fp32.onnx").write_bytes(other_decoder)
    spec = vars(FileSpec(sha256(other_decoder), len(other_decoder)))
    edit(altered, lambda body: body["files"].update({"decoder.fp32.onnx": spec}))
    rows = {row.layer: row for row in verify(pf.load(altered))}
    failed = [name for name, row in rows.items() if not row.passed]
    assert failed == ["images", "drawn images", "sampler images"]


def test_a_decoder_that_gives_nan_is_told_and_the_layer(latent_bundle, tmp_path):
    model = onnx.load(latent_bundle / "decoder.fp32.onnx")
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32("inf"), weight.name))
    data = model.SerializeToString()
    altered = shutil.copytree(latent_bundle, tmp_path / "altered")
    (altered / "decoder.fp32.onnx").write_bytes(data)
    spec = vars(FileSpec(sha256(data), len(data)))
    edit(altered, lambda body: body["files"].update({"decoder.fp32.onnx": spec}))
    with pf.load(altered) as generator:
        with pytest.raises(NotFiniteError, match=r"decoder .*'latent' .*fp32 .*ort-cpu .*NaN"):
            generator([1])
        with pytest.raises(CheckFailedError, match=r"NaN .*decoder; .*: \S+ \(Conv with "):
            verify(generator)


def test_the_decoder_of_an_fp16_bundle_is_fp16_too(tmp_path, kl):
    student = make_student(latent=vars(kl.latent), in_channels=4)
    rows = export_bundle(student, tmp_path / "half", autoencoder=kl, precisions=("fp32", "fp16"))
    errors = {(row.precision, row.layer): row.error for row in rows}
    assert errors["fp16", "images"] <= 4 and errors["fp16", "drawn images"] > errors["fp32", "drawn images"]
    opened = Bundle(tmp_path / "half")
    exact, half = (
        onnx.load_from_string(opened.read_network("decoder", name).model).graph for name in ("fp32", "fp16")
    )
    sizes = [sum(len(tensor.raw_data) for tensor in graph.initializer) for graph in (exact, half)]
    assert sizes[1] < 0.55 * sizes[0]
    kept = opened.manifest.provenance["kept_in_fp32"]["fp16"]["decoder"]
    assert kept.keys() <= {node.name for node in half.node}
    generator = pf.load(tmp_path / "half", precision="fp16")
    assert_alike_within(generator([1, 2], seed=3, output="numpy"), kl, levels=4)


def assert_alike_within(result, autoencoder, levels):
    expected = images_in_torch(autoencoder, result.latents).astype(int)
    assert np.ptp(expected) > 30 and np.abs(expected - result.images).max() <= levels


def test_a_decoder_that_differs_from_pytorch_is_not_exported(tmp_path, kl, other_decoder, monkeypatch):
    monkeypatch.setattr(
        bundle_graphs, "export_decoder", lambda autoencoder, shape, axes=None: Graph(other_decoder)
    )
    student = make_student(latent=vars(kl.latent), in_channels=4)
    with pytest.raises(CheckFailedError, match="images differ by"):
        export_bundle(student, tmp_path / "out" / "bundle", autoencoder=kl)
    assert list((tmp_path / "out").iterdir()) == []  # the bundle's parent


@pytest.mark.parametrize(
    ("latent", "channels", "words"),
    [
        (None, 4, r"pixels.*--autoencoder"),
        (dict(autoencoder="ab12"), 4, "another autoencoder: autoencoder was ab12"),
        (dict(scale=0.5), 4, r"another autoencoder: scale .*0\.5, .*0\.3611"),
        (dict(shift=0.0), 4, r"another autoencoder: shift was 0\.0"),
        (dict(), 3, r"another autoencoder: channels .*3, .*4"),
    ],
)
def test_another_autoencoder_is_refused(tmp_path, kl, latent, channels, words):
    settings = None if latent is None else vars(kl.latent) | latent
    student = make_student(latent=settings, in_channels=channels)
    with pytest.raises(DataError, match=words):
        export_bundle(student, tmp_path / "bundle", autoencoder=kl)
    assert list(tmp_path.iterdir()) == []


def test_without_an_autoencoder_a_bundle_makes_latents(tmp_path, caplog):
    student = make_student(latent=vars(Latent(2.0, 0.5)), in_channels=4)
    with caplog.at_level(logging.WARNING):
        rows = export_bundle(student, tmp_path / "bundle", samplers=[2])
    assert "will make latents, not images" in caplog.text
    assert [row.layer for row in rows][2:] == ["trajectories", "latents", "drawn latents", "sampler latents"]
    assert not (tmp_path / "bundle" / "preview.png").exists()
    generator = pf.load(tmp_path / "bundle")
    latents = generator([1, 2], output="latent").latents
    found = open_engine(read_graph(generator.bundle, "sampler.nfe2")).run(
        {"noise": pf.philox_normal(0, range(2), (4, 8, 8)), "labels": np.array([1, 2])}
    )
    assert found.keys() == {"latents"}
    np.testing.assert_allclose(found["latents"], latents, rtol=0, atol=2e-5)
    with pytest.raises(BundleError, match=r"no decoder; .*output='latent'"):
        generator([1])


def decoder_of(body):
    return body["networks"]["decoder"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body: body["networks"].pop("decoder"), r"decoder\.fp32\.onnx, .*nothing"),
        (lambda body: body["files"].pop("decoder.fp32.onnx"), r"lacks decoder\.fp32\.onnx"),
        (lambda body: decoder_of(body).update(colour="red"), r"decoder.*'colour'"),
        (lambda body: decoder_of(body)["outputs"][0].update(shape=["batch", 5, 16, 16]), "do not fit"),
        (lambda body: body["latent"].update(shape=[4, 8, 9]), "do not fit"),
        (lambda body: body["latent"].update(kind="pixels"), "do not fit"),
        (lambda body: body["networks"].update(decoder="tiny"), r"decoder.*kind, inputs, outputs"),
    ],
)
def test_a_manifest_whose_decoder_makes_no_sense_is_refused(latent_bundle, tmp_path, change, words):
    altered = shutil.copytree(latent_bundle, tmp_path / "altered")
    edit(altered, change)
    with pytest.raises(BundleError, match=words):
        pf.load(altered)


def test_inspect_shows_the_decoder(latent_bundle):
    command = [sys.executable, "-m", "piflow_edge.cli", "inspect", str(latent_bundle)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for fact in ("AutoencoderKL", "3 x 16 x 16", "4 x 8 x 8, scale 0.3611, shift 0.1159"):
        assert fact in shown
    answer = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True).stdout)
    assert answer["networks"]["decoder"]["kind"] == "AutoencoderKL"


def test_a_student_of_other_latents_than_its_teacher_is_refused(tmp_path):
    latents = np.zeros((4, 4, 8, 8), np.float32)
    data = ImageData(
        "set", latents, ClassLabels(("a",)), {"labels": np.zeros(4, int)}, latent=Latent(0.5, 0.0)
    )
    size = DiTConfig(in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=1)
    teacher = train_teacher(data, size, FlowMatchingConfig(), SHORT, tmp_path / "teacher")
    with pytest.raises(DataError, match=r"scale .*0\.5.* 0\.25"):
        distill(
            teacher_from_checkpoint(teacher), replace(data, latent=Latent(0.25, 0.0)), ImitationConfig(nfe=1), SHORT,
            tmp_path / "student", guidance=GuidanceConfig(), head=GMPolicySpec(2),
        )  # fmt: skip
    assert not (tmp_path / "student").exists()
