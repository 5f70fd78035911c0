"""A bundle is used whole and unaltered, or not at all."""

import json
import os
import random

import numpy as np
import pytest

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.manifest import manifest_bytes
from piflow_edge.errors import BundleError, CheckFailedError
from piflow_edge.runtime.verification import Row, check, verify

pytestmark = pytest.mark.torch


def assert_refused(folder, words):
    with pytest.raises(BundleError, match=words):
        pf.load(folder)


@pytest.mark.parametrize("folder", [3, None, b"bundle", ["bundle"]])
def test_a_bundle_is_given_by_its_path(folder):
    assert_refused(folder, "a folder")


def test_every_file_is_there_and_nothing_else(shared_bundle):
    expected = {"bundle.json", "student.fp32.onnx", "golden.npz", "preview.png", "LICENSE"}
    assert {file.name for file in shared_bundle.iterdir()} == expected


def test_a_bundle_reproduces_its_golden_samples(shared_bundle):
    rows = verify(pf.load(shared_bundle))
    assert [row.layer for row in rows] == [
        "network outputs",
        "policy velocities",
        "trajectories",
        "latents",
        "images",
        "drawn images",
    ]
    assert all(row.passed for row in rows)


@pytest.mark.parametrize("name", ["bundle.json", "student.fp32.onnx", "golden.npz", "preview.png", "LICENSE"])
class TestEveryFile:
    def test_missing(self, bundle, name):
        (bundle / name).unlink()
        assert_refused(bundle, f"{name} is missing")

    def test_truncated(self, bundle, name):
        data = (bundle / name).read_bytes()
        (bundle / name).write_bytes(data[: len(data) // 2])
        assert_refused(bundle, "checksum|not JSON")

    def test_longer(self, bundle, name):
        with (bundle / name).open("ab") as file:
            file.write(b" ")
        assert_refused(bundle, "checksum|not JSON")

    def test_one_byte_altered(self, bundle, name):
        data = (bundle / name).read_bytes()
        chance = random.Random(name)
        for _ in range(20):
            place, change = chance.randrange(len(data)), chance.randrange(1, 256)
            altered = bytearray(data)
            altered[place] ^= change
            (bundle / name).write_bytes(altered)
            with pytest.raises(BundleError):
                pf.load(bundle)

    def test_replaced_by_a_link(self, bundle, name, tmp_path):
        os.rename(bundle / name, tmp_path / "elsewhere")
        (bundle / name).symlink_to(tmp_path / "elsewhere")
        assert_refused(bundle, f"{name} is a link")


def test_an_extra_file_is_refused(bundle):
    (bundle / "plugin.py").write_text("print('hello')")
    assert_refused(bundle, "plugin.py does not belong")


def test_no_bundle_at_all(tmp_path):
    assert_refused(tmp_path, "bundle.json is missing")
    assert_refused(tmp_path / "nowhere", "there is nothing at .*nowhere$")
    assert_refused("digit", r"there is nothing at digit \(did you mean 'digits'\?\)")
    (tmp_path / "leaves").mkdir()
    assert_refused(tmp_path / "leafs", "did you mean '.*leaves'")
    assert_refused(tmp_path / "digits", "there is nothing at .*digits$")
    (tmp_path / "maps.txt").write_bytes(b"")
    assert_refused(tmp_path / "maps", "there is nothing at .*maps$")
    (tmp_path / "sent.zip").write_bytes(b"PK")
    assert_refused(
        tmp_path / "sent.zip", "there is a file at .*; unpack it first: piflow-edge unpack .*sent.zip"
    )


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"format_version": NaN}', '{"format_version": "\\ud800"}', "[]"]
)
def test_a_manifest_that_is_not_ours_is_refused(bundle, text):
    (bundle / "bundle.json").write_text(text)
    assert_refused(bundle, "not JSON|format version")


def edit(bundle, change):
    """Alter the manifest as somebody would who also mends its checksum."""
    from piflow_edge.bundle.manifest import seal_manifest

    body = json.loads((bundle / "bundle.json").read_bytes())
    del body["sha256"]
    change(body)
    (bundle / "bundle.json").write_bytes(seal_manifest(body))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body: body.update(colour="red"), "unknown key 'colour'"),
        (lambda body: body["policy"].update(colour="red"), r"policy .*'colour'"),
        (lambda body: body.pop("latent"), "must hold format_version, name, .*latent"),
        (lambda body: body.update(format_version=99), "format version 99, this release reads 5 and 4"),
        (lambda body: body["schedule"].update(nfe="two"), r"nfe .*'two'"),
        (lambda body: body["schedule"].update(nfe=0), "unusable schedule: nfe"),
        (lambda body: body["policy"].update(kind="dx"), "unknown key 'num_components'"),
        (lambda body: body["policy"].update(eps=0.0), "latent scale"),
        (lambda body: body["schedule"].update(temperature=-1.0), "latent scale"),
        (lambda body: body["schedule"].update(temperature="warm"), "latent scale"),
        (lambda body: body["latent"].update(scale=0.0), "latent scale"),
        (
            lambda body: body["networks"]["student"]["files"].update(fp32=["student.fp16.onnx"]),
            r"lacks student\.fp16\.onnx",
        ),
        (
            lambda body: body.update(precisions=["fp16"], tolerances={"fp16": body["tolerances"]["fp32"]}),
            "must name files of student for each of its precisions",
        ),
        (lambda body: body.update(tolerances={}), "tolerances"),
        (lambda body: body["networks"].pop("student"), "has no student"),
        (
            lambda body: body["networks"].update({"sampler.nfe0": body["networks"]["student"]}),
            r"network of an unknown kind: 'sampler\.nfe0'",
        ),
        (
            lambda body: body["precisions"].append(True),
            r"precisions\[1\] .*True",
        ),
        (lambda body: body["axes"].pop("batch"), "has an axis 'batch' in x_t of student, and no range of it"),
        (lambda body: body["axes"]["batch"].update(min=0), "an axis 'batch' without a length"),
        (lambda body: body["latent"].update(packing=2), "latents and a decoder that do not fit"),
        (lambda body: body["latent"].update(mean=[0.0, 0.0]), "2 means and 0 deviations of 1 channels"),
        (
            lambda body: body["networks"]["student"]["feeds"].update(means=["decoder/latents"]),
            "feeds means of student to 'decoder/latents'",
        ),
        (lambda body: body["conditioning"].update(kind="telepathy"), "unusable conditioning"),
        (
            lambda body: body["conditioning"].update(input="ids"),
            "conditioning and network inputs that do not fit",
        ),
        (
            lambda body: body["files"].update({"sampler.nfe3.fp32.onnx": body["files"]["LICENSE"]}),
            r"has the file sampler\.nfe3\.fp32\.onnx, but nothing that it belongs to",
        ),
        (lambda body: body["files"].update({"../x": body["files"]["LICENSE"]}), "outside its folder: '../x'"),
        (lambda body: body["files"].pop("golden.npz"), r"lacks golden\.npz"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(bundle, change, words):
    edit(bundle, change)
    assert_refused(bundle, words)


def test_the_manifest_survives_a_round_trip(shared_bundle):
    assert manifest_bytes(Bundle(shared_bundle).manifest) == (shared_bundle / "bundle.json").read_bytes()


def test_a_check_that_failed_names_the_worst_case():
    rows = [Row("network outputs", 1e-6, 1e-4, "means.0"), Row("latents", float("nan"), 1e-3, "latents")]
    with pytest.raises(CheckFailedError, match=r"'tiny' .* latents .* nan .* 0\.001"):
        check(rows, "tiny")


def test_another_network_under_the_same_golden_samples_fails_verification(bundle, tmp_path):
    from piflow_edge.bundle.sections import FileSpec
    from piflow_edge.distill.loop.checkpoint import Checkpoint
    from piflow_edge.distill.sources import network_of
    from piflow_edge.export.onnx_graphs.to_onnx import export_network
    from piflow_edge.system.files import sha256
    from tests.conftest import make_student

    other: Checkpoint = make_student(seed=1)
    data = export_network(network_of(other))
    (bundle / "student.fp32.onnx").write_bytes(data)
    spec = FileSpec(sha256(data), len(data))
    edit(bundle, lambda body: body["files"].update({"student.fp32.onnx": vars(spec)}))
    rows = {row.layer: row for row in verify(pf.load(bundle))}
    assert not rows["network outputs"].passed and not rows["latents"].passed
    assert rows["policy velocities"].passed  # the policies were fed the golden outputs
    assert np.isfinite(rows["latents"].error)
