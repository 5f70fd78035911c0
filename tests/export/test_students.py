"""Students that were not distilled here: a state dict with its configuration, a function that returns one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from piflow_edge.conditioning import ClassLabels, Unconditional
from piflow_edge.distill.networks.flow_network import attach_policy_head
from piflow_edge.distill.sources import StudentModel, load_student, network_of, student_from_checkpoint
from piflow_edge.errors import CheckpointError
from piflow_edge.policies import GMPolicySpec
from tests.conftest import make_student
from tests.export.test_unconditional import teacher

CONFIG = {
    "network": {"family": "dit", "config": dict(hidden_size=16, depth=1, num_heads=2)},
    "head": {"kind": "gm", "num_components": 3},
    "nfe": 2,
    "conditioning": {"kind": "class", "names": list("0123456789"), "input": "labels"},
}
PLAIN = {
    "network": {"entry": "tests.export.test_unconditional:teacher"},
    "head": CONFIG["head"],
    "nfe": 1,
    "total_substeps": 16,
}


def plain():
    """An entry point."""
    return StudentModel(attach_policy_head(teacher(), GMPolicySpec(3)), nfe=(1, 2), total_substeps=16)


def not_a_student():
    return teacher()


@pytest.fixture
def files(tmp_path):
    """Weights of a student as `distill` would have left them, and what they are of."""
    weights = {name.removeprefix("ema."): v for name, v in make_student().tensors.items()}
    save_file(weights, tmp_path / "weights.safetensors")
    torch.save({"ema": weights, "step": 3}, tmp_path / "weights.pt")
    (tmp_path / "student.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_state_dict_is_the_student_it_was_of(files, kind):
    found = load_student(files / f"weights.{kind}", config=files / "student.json")
    expected = student_from_checkpoint(make_student())
    assert found.nfes == expected.nfes == (2,)
    assert found.conditioner == expected.conditioner == ClassLabels(tuple("0123456789"))
    x_t, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 0.3]), torch.tensor([3, 7])
    for ours, theirs in zip(
        found.network(x_t, sigma, labels=labels),
        network_of(make_student())(x_t, sigma, labels=labels),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert found.provenance["source"] == f"weights.{kind}"


def test_a_state_dict_of_any_module(tmp_path):
    network = attach_policy_head(teacher(), GMPolicySpec(3), seed=5)
    torch.save(network.module.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "student.json").write_text(json.dumps(PLAIN))
    found = load_student(tmp_path / "weights.pth", config=tmp_path / "student.json")
    assert (found.nfes, found.total_substeps, found.conditioner) == ((1,), 16, Unconditional())
    x_t, sigma = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 0.3])
    for ours, theirs in zip(found.network(x_t, sigma), network(x_t, sigma), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_command_line_exports_what_a_function_returns(tmp_path):
    command = [
        sys.executable,
        "-m",
        "piflow_edge.cli",
        "export",
        "tests.export.test_students:plain",
        "--out",
        tmp_path / "plain",
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr
    generator = pf.load(tmp_path / "plain")
    assert (generator.trained_nfes[-1], Bundle(tmp_path / "plain").manifest.schedule.total_substeps) == (
        2,
        16,
    )
    expected = plain().network(torch.from_numpy(x := pf.philox_normal(0, range(2), (1, 8, 8))), torch.ones(2))
    np.testing.assert_allclose(
        generator.student.outputs(x, 1.0, {})["means"], expected[0].detach(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c.pop("nfe"), "holds network, head and nfe"),
        (lambda c: c.update(colour="red"), "may hold .*; .* has colour"),
        (lambda c: c["network"]["config"].update(depth=2), "(?s)are not those of .*blocks.1"),
        (lambda c: c["network"]["config"].update(wings=2), "architecture cannot be read: .*wings"),
        (lambda c: c["head"].update(kind="vae"), "cannot be used: KeyError"),
        (lambda c: c["conditioning"].update(names=["a", "b"]), "knows 10 of 'labels'.*2 classes"),
        (lambda c: c.update(nfe=0), "schedule is unusable"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(files, change, problem):
    config = json.loads(json.dumps(CONFIG))
    change(config)
    (files / "student.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=problem):
        load_student(files / "weights.safetensors", config=files / "student.json")


@pytest.mark.parametrize(
    ("source", "config", "problem"),
    [
        ("weights.safetensors", None, "configuration"),
        ("weights.safetensors", "weights.pt", "configuration .* cannot be read"),
        ("nowhere.pt", "student.json", "checkpoint"),
        ("student.json", None, r"checkpoint\.json, a state dict"),
    ],
)
def test_files_that_are_no_student_are_refused(files, source, config, problem):
    with pytest.raises(CheckpointError, match=problem):
        load_student(files / source, config=config and files / config)


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [torch.zeros(3)], {"epoch": 3, "w": torch.zeros(3)}, {0: torch.zeros(3)}]
)
def test_a_file_of_something_else_than_weights_is_refused(files, content):
    torch.save(content, files / "other.pt")
    with pytest.raises(CheckpointError, match=r"state dict .*tensors"):
        load_student(files / "other.pt", config=files / "student.json")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (
            "tests.export.test_students:not_a_student",
            r"StudentModel; .*ModuleNetwork",
        ),
        ("tests.export.test_students:nobody", r"function; .*'nobody' is not there in "),
        ("no_such_module:f", "no_such_module"),
    ],
)
def test_functions_that_return_no_student_are_refused(entry, problem):
    with pytest.raises(CheckpointError, match=problem):
        load_student(entry)
    with pytest.raises(CheckpointError, match=r"configuration .*state dict"):
        load_student(entry, config="student.json")


def test_a_teacher_is_no_student():
    with pytest.raises(CheckpointError, match="policy head"):
        StudentModel(teacher())
