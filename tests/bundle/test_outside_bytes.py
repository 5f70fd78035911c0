"""No byte from outside a bundle reaches an engine, and no operator that does more than compute."""

import shutil

import pytest

import piflow_edge as pf
from piflow_edge.bundle.archive import pack
from piflow_edge.bundle.folder import Bundle, demo_bundle
from piflow_edge.engines.ort.importing import import_onnxruntime
from piflow_edge.errors import BundleError, EngineError
from tests.commands.command_line import run
from tests.helpers.hostile_bundle import move_weight_out, seal
from tests.helpers.protobuf import fields_of, message, node

STUDENT = "student.fp32.onnx"


@pytest.fixture
def digits(tmp_path):
    return shutil.copytree(demo_bundle(), tmp_path / "digits")


@pytest.fixture(params=["secret.bin", "absolute", "../here/secret.bin", "./secret.bin"])
def leaking(request, digits, tmp_path, monkeypatch):
    """A bundle with a weight in a file of the current folder; the file holds just what belongs there."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    location = str(here / "secret.bin") if request.param == "absolute" else request.param
    data, values = move_weight_out((digits / STUDENT).read_bytes(), location)
    (here / "secret.bin").write_bytes(values)
    seal(digits, STUDENT, data)
    return digits


@pytest.mark.parametrize("engine", ["ort-cpu", "reference", "auto"])
def test_a_weight_of_the_current_folder_is_refused_by_name(leaking, engine):
    with pytest.raises(BundleError, match=rf"{STUDENT}.*secret\.bin"):
        pf.load(leaking, engine=engine)


@pytest.mark.parametrize(
    "command", ["inspect", "verify", "sample --out x.png", "build --dry-run", "pack --out x.zip"]
)
def test_every_command_refuses_it(leaking, command):
    name, *options = command.split()
    done = run(name, leaking, *options, code=2)
    assert STUDENT in done.stderr and "secret.bin" in done.stderr


def test_a_file_of_the_table_that_is_too_short_is_refused(digits):
    data, values = move_weight_out((digits / STUDENT).read_bytes(), f"{STUDENT}.data")
    seal(digits, STUDENT, data)
    seal(digits, f"{STUDENT}.data", values[:-1])
    with pytest.raises(BundleError, match=r"1024 .* 1023"):
        pf.load(digits)


def test_a_file_of_the_table_serves_or_the_release_is_said_to_be_too_old(digits):
    before = pf.load(demo_bundle())(labels=[3], seed=1).latents
    data, values = move_weight_out((digits / STUDENT).read_bytes(), f"{STUDENT}.data")
    seal(digits, STUDENT, data)
    seal(digits, f"{STUDENT}.data", values)
    Bundle(digits).check_graphs()
    settings = import_onnxruntime().SessionOptions
    if not hasattr(settings, "add_external_initializers_from_files_in_memory"):
        with pytest.raises(EngineError, match="ONNX Runtime"):
            pf.load(digits, engine="ort-cpu")
        return
    assert (pf.load(digits)(labels=[3], seed=1).latents == before).all()


def test_another_file_of_the_table_does_not(digits):
    """ONNX Runtime would look for it in the current folder: it is given the student's weights only."""
    data, _ = move_weight_out((digits / STUDENT).read_bytes(), "golden.npz")
    seal(digits, STUDENT, data)
    with pytest.raises(BundleError, match=r"golden\.npz"):
        pf.load(digits)


def test_an_operator_of_an_unknown_domain_is_refused(digits):
    odd = message((1, node("Run", [], ["odd"], domain="com.example")))
    model = [(n, v + odd if n == 7 else v) for n, v in fields_of((digits / STUDENT).read_bytes())]
    seal(digits, STUDENT, message(*model))
    with pytest.raises(BundleError, match=r"'Run'.*'com\.example'"):
        pf.load(digits)
    with pytest.raises(BundleError, match=r"'Run'.*'com\.example'"):
        pack(digits, digits.parent / "digits.zip")


@pytest.mark.parametrize("keep", ["all", "one"])
@pytest.mark.parametrize("content", [b"\x3a\xff\xff\xff\xff\x0f", b"\0", b""])
def test_a_graph_that_is_no_graph_is_refused(digits, content, keep):
    seal(digits, STUDENT, content)
    with pytest.raises(BundleError, match=f"{STUDENT}.*(not a whole ONNX model|inputs are none)"):
        pf.load(digits, options=pf.EngineOptions(keep=keep))
