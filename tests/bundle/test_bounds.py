"""A manifest of numbers, names and files beyond all measure is one clear error, at once."""

import json
import shutil
import time

import pytest

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle, demo_bundle
from piflow_edge.bundle.manifest import seal_manifest
from piflow_edge.errors import BundleError


@pytest.fixture
def digits(tmp_path):
    return shutil.copytree(demo_bundle(), tmp_path / "digits")


def edit(folder, change):
    body = json.loads((folder / "bundle.json").read_bytes())
    del body["sha256"]
    change(body)
    (folder / "bundle.json").write_bytes(seal_manifest(body))


def sets(section, **values):
    return lambda body: body[section].update(values)


def student(body):
    return body["networks"]["student"]


def reshape(*shape):
    """Another latent, and a student that takes it."""

    def change(body):
        body["latent"].update(shape=list(shape))
        student(body)["inputs"][0].update(shape=["batch", *shape])

    return change


def latents(**values):
    return sets("latent", kind="latents", **values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *((reshape(1, 8, size), rf"\(?1, 8, {size}|axis of {size}") for size in (-1, 0, 10**9, 10**18)),
        (sets("latent", shape=[1] * 9), "latent"),
        (reshape(1, 1 << 15, 1 << 15), r"latent .*4294967296 bytes"),
        (latents(packing=10**18), "packing of 10000"),
        (sets("latent", scale=1e300), r"scale 1e\+300"),
        (latents(mean=[1e300], deviation=[1.0]), "mean"),
        (sets("schedule", shift=1e18), r"shift 1e\+18"),
        (sets("schedule", nfe=10**18), "nfe 10000"),
        (sets("schedule", total_substeps=10**9), "total_substeps 10000"),
        (sets("schedule", h=1e300), r"h 1e\+300"),
        (sets("schedule", temperature=1e300), r"temperature 1e\+300"),
        (sets("policy", num_components=10**18), "num_components 10000"),
        (sets("policy", eps=1e18), r"eps 1e\+18"),
        (lambda body: body["tolerances"]["fp32"].update(psnr=-(10**400)), "psnr -1000"),
        (lambda body: body["axes"]["batch"].update(min=10**9), "'batch'"),
        (lambda body: student(body).update(opset=10**9), "opset 1000000000"),
        (lambda body: student(body)["outputs"][0].update(shape=["batch", 1 << 20, 1 << 20]), r"means.* bytes"),
        (lambda body: student(body)["outputs"][0].update(dtype="complex64"), r"means.*complex64"),
        (lambda body: body["files"]["LICENSE"].update(size=1 << 60), "LICENSE"),
        (lambda body: body["axes"].update({f"axis{i}": body["axes"]["batch"] for i in range(1000)}), "1001 axes"),
    ],
)  # fmt: skip
def test_a_number_out_of_bounds_is_named(digits, change, words):
    edit(digits, change)
    with pytest.raises(BundleError, match=words) as caught:
        pf.load(digits)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\x1b[2J", "\u202eexe.gpj", "x" * 300])
@pytest.mark.parametrize(
    "rename",
    [
        lambda body, name: body.update(name=name),
        lambda body, name: body["axes"].update({name: body["axes"]["batch"]}),
        lambda body, name: student(body)["outputs"][0].update(name=name),
        lambda body, name: student(body).update(kind=name),
        lambda body, name: body["files"].update({name: body["files"]["LICENSE"]}),
    ],
)
def test_a_name_that_cannot_be_shown_is_refused(digits, rename, name):
    edit(digits, lambda body: rename(body, name))
    with pytest.raises(BundleError, match="name") as caught:
        Bundle(digits)
    assert name not in str(caught.value)


def test_names_that_stand_twice_are_refused(digits):
    edit(digits, lambda body: student(body)["outputs"][1].update(name="means"))
    with pytest.raises(BundleError, match="one name"):
        Bundle(digits)


def test_files_that_some_systems_take_for_one_are_refused(digits):
    edit(digits, lambda body: body["files"].update(license=body["files"]["LICENSE"]))
    with pytest.raises(BundleError, match="capitals"):
        Bundle(digits)


def nest(depth, opening, closing):
    return f'{{"a": {opening * depth}{closing * depth}}}'.encode()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (nest(33, "[", "]"), "32 deep"),
        (nest(900, "[", "]"), "32 deep"),
        (nest(100_000, "[", "]"), "not JSON"),
        (b'{"a":' * 200_000, "larger than 1048576 bytes|not JSON"),
        (b"[" * (100 << 20), "larger than 1048576 bytes"),
        (b'{"a": ' + b"9" * 1_000_000 + b"}", "not JSON|format version"),
        (b'{"a": 1e999}', "not JSON"),
    ],
)  # fmt: skip
def test_json_beyond_all_measure_is_refused_soon(digits, data, words):
    (digits / "bundle.json").write_bytes(data)
    start = time.process_time()
    with pytest.raises(BundleError, match=words) as caught:
        Bundle(digits)
    assert len(str(caught.value)) < 1000
    assert time.process_time() - start < 20


def test_a_folder_of_many_files_is_not_listed_to_its_end(digits):
    for number in range(3000):
        (digits / f"more{number}").touch()
    with pytest.raises(BundleError, match="does not belong to it"):
        Bundle(digits)
