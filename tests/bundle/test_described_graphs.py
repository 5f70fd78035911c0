"""A graph is opened only if it takes and gives what the manifest says."""

import json
import shutil

import pytest

import piflow_edge as pf
from piflow_edge.bundle.folder import demo_bundle
from piflow_edge.bundle.manifest import seal_manifest
from piflow_edge.errors import BundleError
from tests.helpers.hostile_bundle import seal
from tests.helpers.protobuf import fields_of, message

STUDENT = "student.fp32.onnx"
INPUT, OUTPUT = 11, 12


@pytest.fixture
def digits(tmp_path):
    return shutil.copytree(demo_bundle(), tmp_path / "digits")


@pytest.mark.parametrize("engine", ["ort-cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors[0].update(shape=["batch", 9, 1, 8, 8]), r"means .*8, 1, 8, 8.*9, 1, 8, 8"),
        (lambda tensors: tensors[1].update(shape=["batch", 8, 1, 8]), "logweights"),
        (lambda tensors: tensors[2].update(dtype="float16"), r"logstds .*float32 .*float16"),
        (lambda tensors: tensors[2].update(shape=["batch", 1, 1, 1, "batch"]), "logstds"),
    ],
)
def test_a_manifest_of_other_outputs_is_refused(digits, change, words, engine):
    body = json.loads((digits / "bundle.json").read_bytes())
    del body["sha256"]
    change(body["networks"]["student"]["outputs"])
    (digits / "bundle.json").write_bytes(seal_manifest(body))
    with pytest.raises(BundleError, match=words):
        pf.load(digits, engine=engine)


def without(number, name):
    """The student's graph without one of its inputs or outputs."""

    def keep_fields(graph):
        return [f for f in fields_of(graph) if f[0] != number or dict(fields_of(f[1]))[1] != name.encode()]

    return lambda graph: message(*keep_fields(graph))


def twice(graph):
    return graph + message(next(field for field in fields_of(graph) if field[0] == OUTPUT))


def with_another_output(graph):
    return graph + message((OUTPUT, message((1, "more"))))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(OUTPUT, "logstds"), "outputs are means, logweights; .*logstds"),
        (without(INPUT, "labels"), "inputs are x_t, t; .*labels"),
        (twice, "outputs are"),
        (with_another_output, "outputs are .*more"),
    ],
)
def test_a_graph_of_other_names_is_refused(digits, change, words):
    fields = fields_of((digits / STUDENT).read_bytes())
    seal(digits, STUDENT, message(*((n, change(v) if n == 7 else v) for n, v in fields)))
    with pytest.raises(BundleError, match=words):
        pf.load(digits)
