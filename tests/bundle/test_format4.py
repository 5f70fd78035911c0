"""Bundles of format 4, which earlier releases wrote, are read as ones of format 5."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.manifest import seal_manifest
from piflow_edge.conditioning import ClassLabels, TensorSpec
from piflow_edge.errors import BundleError
from piflow_edge.runtime.graphs import find_targets
from piflow_edge.runtime.verification import check, verify

# Written by release 0.1.0: latents with a decoder, two calls per image, three classes, a sampler graph.
FROZEN = Path(__file__).parents[1] / "golden" / "format4"


def test_it_is_read_as_a_bundle_of_format_5():
    manifest = Bundle(FROZEN).manifest
    assert manifest.format_version == 4 and list(manifest.networks) == ["student", "decoder", "sampler.nfe2"]
    assert manifest.conditioner == ClassLabels(("a", "b", "c"), "class_labels")
    assert manifest.networks["decoder"].files == {"fp32": ["decoder.fp32.onnx"]}
    labels, state = TensorSpec("class_labels", "int64", ("batch",)), ("batch", 4, 4, 4)
    assert manifest.networks["sampler.nfe2"].inputs == [TensorSpec("noise", "float32", state), labels]
    assert manifest.image_shape == [3, 8, 8] and manifest.samplers == [2]


def test_it_reproduces_its_golden_samples():
    pytest.importorskip("onnxruntime")
    with pf.load(FROZEN) as generator:
        rows = verify(generator)
    check(rows, "format-4")
    assert {"network outputs", "drawn images", "sampler images"} <= {row.layer for row in rows}


def test_what_can_be_built_of_it_is_what_could_be():
    targets = [*find_targets(Bundle(FROZEN)), *find_targets(Bundle(FROZEN), graph="sampler")]
    assert [target.file for target in targets] == [
        "student.fp32.onnx",
        "decoder.fp32.onnx",
        "sampler.nfe2.fp32.onnx",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body: body.update(colour="red"), "unknown key 'colour'"),
        (lambda body: body["network"].update(num_timesteps=1000.0), "time is not the noise level"),
        (lambda body: body["conditioning"].update(class_names=[]), "conditioning and network inputs"),
        (lambda body: body.update(samplers=[3]), r"lacks sampler\.nfe3\.fp32\.onnx"),
        (lambda body: body.update(samplers=[0]), "sampler graph of 0 calls"),
        (lambda body: body["decoder"].update(outputs=[]), "latents and a decoder that do not fit"),
        (lambda body: body["files"].pop("golden.npz"), r"lacks golden\.npz"),
    ],
)
def test_one_that_makes_no_sense_is_refused(tmp_path, change, words):
    folder = shutil.copytree(FROZEN, tmp_path / "bundle")
    body = json.loads((folder / "bundle.json").read_bytes())
    del body["sha256"]
    change(body)
    (folder / "bundle.json").write_bytes(seal_manifest(body))
    with pytest.raises(BundleError, match=words):
        Bundle(folder)


# Of what the shipped digits drew and were in format 4, before they were written in format 5.
IMAGES = "daaea78137d5a250dc4845c405e9418aa88e175ca4fe7e271a1acf884420305b"
MORE_IMAGES = "19e912e770389fbcf8081103f93212cdd3ef2b66c87cf1340033a2344e8f1f1f"
GRAPH = "60f11bb37b7d4b10a49ceac3f3de492d2456e01c70b13ee3b0020471c7a4c0d8"


def test_the_shipped_digits_draw_the_images_that_they_drew_in_format_4():
    pytest.importorskip("onnxruntime")
    with pf.load(pf.demo_bundle()) as generator:
        images = generator(list(range(10)), seed=0, output="numpy").images
        more = generator(list(range(10)), seed=7, nfe=2, substeps=64, output="numpy").images
    assert [hashlib.sha256(np.ascontiguousarray(a)).hexdigest() for a in (images, more)] == [
        IMAGES,
        MORE_IMAGES,
    ]


def test_the_shipped_digits_compute_what_they_computed_in_format_4():
    # Latents differ by CPU in the last bits; nodes and weights do not.
    onnx = pytest.importorskip("onnx")
    bundle = Bundle(pf.demo_bundle())
    assert bundle.manifest.format_version == 5
    graph = onnx.load_from_string(bundle.read_network("student").model).graph
    digest = hashlib.sha256()
    for node in graph.node:
        node.input[:] = ["class_labels" if name == "labels" else name for name in node.input]
        digest.update(node.SerializeToString(deterministic=True))
    for tensor in graph.initializer:
        digest.update(tensor.SerializeToString(deterministic=True))
    assert digest.hexdigest() == GRAPH
