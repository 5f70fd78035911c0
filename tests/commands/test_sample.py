"""`sample` on the bundle that comes with the package."""

import errno
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import piflow_edge as pf
from tests.commands.command_line import run


def sample(*arguments, code=0):
    return run("sample", "digits", *arguments, code=code)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("labels", "expected"), [("all", range(10)), ("0-2,7", [0, 1, 2, 7]), ("3, 7", [3, 7])]
)
def test_labels_are_ids_ranges_and_all(labels, expected):
    answer = json.loads(sample("--labels", labels, "--out", "each", "--json").stdout)
    assert [told["label"] for told in answer["recipe"]["conditioning"]] == list(expected)
    assert len(answer["files"]) == len(expected)


def test_a_wrong_label_is_named():
    assert "got label '7-x'" in sample("--labels", "1,7-x", "--out", "x.png", code=2).stderr


def test_arrays_come_from_files():
    name = pf.load("digits").conditioner.inputs[0].name
    np.save("labels.npy", np.array([3, 7]))
    sample("--array", f"{name}=labels.npy", "--seed", 5, "--output", "latent", "--out", "found.npy")
    sample("--labels", "3,7", "--seed", 5, "--output", "latent", "--out", "expected.npy")
    np.testing.assert_array_equal(np.load("found.npy"), np.load("expected.npy"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["labels.npy"], "NAME=FILE"),
        (["=labels.npy"], "NAME=FILE"),
        (["a=labels.npy", "a=labels.npy"], "each name once"),
        (["a=missing.npy"], "missing.npy"),
        (["colour=labels.npy"], "no input 'colour'"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(given, words):
    np.save("labels.npy", np.array([3, 7]))
    options = [word for array in given for word in ("--array", array)]
    assert words in sample(*options, "--out", "x.png", code=2).stderr


@pytest.mark.parametrize(("output", "opened"), [("png", Image.open), ("float", np.load)])
def test_a_dash_is_stdout(output, opened):
    # In a process of its own, so that what is written is bytes, and nothing else is.
    command = [sys.executable, "-m", "piflow_edge.cli", "sample", "digits", "--labels", "3", "--out", "-"]
    done = subprocess.run([*command, "--output", output], capture_output=True, check=True)
    opened(io.BytesIO(done.stdout))
    sample("--labels", "3", "--output", output, "--out", "file.png" if output == "png" else "file.npy")
    with open("file.png" if output == "png" else "file.npy", "rb") as file:
        assert file.read() == done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a file that is always full")
def test_a_full_standard_output_is_named():
    command = [sys.executable, "-m", "piflow_edge.cli", "sample", "digits", "--labels", "3", "--out", "-"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "No space left on device: standard output" in done.stderr


def test_a_dash_and_json_exclude_each_other():
    assert "--json" in sample("--labels", "3", "--out", "-", "--json", code=2).stderr


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_every_kind_of_picture_is_made_again(suffix):
    sample("--labels", "3,7", "--seed", 5, "--out", f"first{suffix}")
    sample("--like", f"first{suffix}", "--out", f"again{suffix}")
    with open(f"first{suffix}", "rb") as first, open(f"again{suffix}", "rb") as again:
        assert first.read() == again.read()


def test_another_size_is_refused():
    assert "8x8 pixels" in sample("--labels", "3", "--height", 16, "--out", "x.png", code=2).stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("output", ["png", "float"])
def test_a_full_disk_is_called_so(output):
    result = pf.load("digits")(labels=[3], output={"png": "pil"}.get(output, output))
    with pytest.raises(OSError, match="No space left") as caught, open("/dev/full", "wb", 0) as file:
        result.write(file)
    assert caught.value.errno == errno.ENOSPC
