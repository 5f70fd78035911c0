import errno
import json

import pytest
import torch

from piflow_edge.distill.loop.checkpoint import (
    Checkpoint,
    inference_only,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from piflow_edge.distill.networks.dit import DiTConfig
from piflow_edge.distill.networks.flow_network import DiTNetwork
from piflow_edge.distill.sources import network_of
from piflow_edge.errors import CheckpointError
from piflow_edge.system import files
from tests.conftest import make_student


def same(a: Checkpoint, b: Checkpoint):
    assert (a.kind, a.iteration, a.network, a.settings) == (
        b.kind,
        b.iteration,
        b.network,
        b.settings,
    )
    assert a.tensors.keys() == b.tensors.keys()
    return all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


def test_what_is_saved_is_loaded(tmp_path):
    student = make_student()
    save_checkpoint(tmp_path, student)
    assert same(load_checkpoint(tmp_path, kind="student"), student)


def test_a_new_checkpoint_takes_the_place_of_the_old_one(tmp_path):
    save_checkpoint(tmp_path, make_student(seed=0))
    save_checkpoint(tmp_path, make_student(seed=1))
    assert same(load_checkpoint(tmp_path), make_student(seed=1))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
    ids=["full disk", "Ctrl-C"],
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_save_cut_short_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch, failure, step, after):
    save_checkpoint(tmp_path, make_student(seed=0))
    calls, original = [], getattr(files.os, step)

    def give_up(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise failure
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, step, give_up)
        with pytest.raises(type(failure)):
            save_checkpoint(tmp_path, make_student(seed=1))
    assert same(load_checkpoint(tmp_path), make_student(seed=0))
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    save_checkpoint(tmp_path, make_student(seed=1))  # and the next save clears what was left over
    assert same(load_checkpoint(tmp_path), make_student(seed=1))
    assert len(list(tmp_path.iterdir())) == 2


def test_weights_of_another_architecture_are_refused():
    network = DiTNetwork(DiTConfig(hidden_size=16, depth=2, num_heads=2))
    with pytest.raises(CheckpointError, match=r"another architecture: 'module\.blocks\.1"):
        load_weights(network, make_student().group("ema"))


def test_the_other_kind_is_refused(tmp_path):
    save_checkpoint(tmp_path, make_student())
    with pytest.raises(CheckpointError, match=r"student; .*teacher"):
        load_checkpoint(tmp_path, kind="teacher")


def damage_json(folder, change):
    path = folder / "checkpoint.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "checkpoint.json").unlink(), "there is none"),
        (lambda folder: (folder / "checkpoint.json").write_text("{"), "cannot be read"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "incomplete"),
        (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"\0" * 64), "checksum"),
        (
            lambda folder: damage_json(folder, lambda d: d.update(format_version=7)),
            "not a checkpoint of version 3",
        ),
        (lambda folder: damage_json(folder, lambda d: d.update(colour="red")), "unknown keys: colour"),
        (lambda folder: damage_json(folder, lambda d: d.update(file="../x")), "outside its folder"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage, words):
    save_checkpoint(tmp_path, make_student())
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(tmp_path)


def test_an_architecture_that_is_not_known_is_refused():
    student = make_student()
    student.network["config"]["wings"] = 2
    with pytest.raises(CheckpointError, match=r"cannot be read.*wings"):
        network_of(student)


def test_the_small_form_keeps_nothing_but_the_averaged_weights(tmp_path):
    student = make_student()
    student.tensors["raw.x"] = torch.zeros(3)
    small = inference_only(student)
    assert set(small.tensors) == {name for name in student.tensors if name.startswith("ema.")}
    assert all(value.dtype == torch.float16 for value in small.tensors.values())
    network_of(small)
