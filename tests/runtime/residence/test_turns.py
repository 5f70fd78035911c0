"""Networks that take turns: one at a time is open, the images are the same, and no altered file is opened."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle, demo_bundle
from piflow_edge.engines.ort.importing import import_onnxruntime
from piflow_edge.errors import BundleError, EngineError
from piflow_edge.runtime.residence.opening import open_networks
from piflow_edge.runtime.residence.turns import Turns
from tests.commands.command_line import run

ONE = pf.EngineOptions(keep="one")


class Opened:
    """Networks that are open, and those that were."""

    def __init__(self):
        self.now, self.ever, self.most = set(), [], 0

    def open(self, name):
        self.now.add(name)
        self.ever.append(name)
        self.most = max(self.most, len(self.now))
        return SimpleNamespace(
            name="pretended", device="cpu", min_batch=1, max_batch=None, choice=None,
            run=lambda inputs: {"by": name, **inputs}, close=lambda: self.now.discard(name),
        )  # fmt: skip


def test_one_network_is_open_at_a_time_and_only_a_change_opens_one():
    opened = Opened()
    turns = Turns(opened.open)
    student, decoder = turns.take("student"), turns.take("decoder")
    assert [student.run({})["by"], student.run({})["by"], decoder.run({"x": 1})["by"]] == [
        "student", "student", "decoder",
    ]  # fmt: skip
    assert opened.ever == ["student", "decoder", "student", "decoder"] and opened.most == 1
    student.close()
    assert not opened.now
    with pytest.raises(EngineError, match="closed"):
        decoder.run({})


@pytest.mark.torch
def test_the_images_are_those_of_networks_that_are_all_kept(latent_bundle):
    # More images than go into one call, so that student and decoder would have turns for each.
    wanted = {"labels": "all", "count": 7, "seed": 3, "output": "numpy"}
    with pf.load(latent_bundle) as every, pf.load(latent_bundle, options=ONE) as one:
        opened, found = [], one.engine._turns._open
        one.engine._turns._open = lambda name: opened.append(name) or found(name)
        np.testing.assert_array_equal(one(**wanted).images, every(**wanted).images)
    assert opened == ["student", "decoder"]


@pytest.mark.parametrize("keep", ["all", "one"])
def test_the_reference_needs_no_file_after_it_is_opened(tmp_path, keep):
    folder = shutil.copytree(demo_bundle(), tmp_path / "digits")
    with (
        pf.load(folder, "reference", options=pf.EngineOptions(keep=keep)) as generator,
        pf.load("digits") as other,
    ):
        shutil.rmtree(folder)
        found, wanted = (one("3", seed=4, output="numpy").images.astype(int) for one in (generator, other))
    assert np.abs(found - wanted).max() <= 1


@pytest.mark.parametrize("keep", ["all", "one"])
def test_a_graph_is_opened_in_its_place_and_not_as_bytes(monkeypatch, keep):
    onnxruntime = import_onnxruntime()

    given, session = [], onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda model, *more, **how: given.append(model) or session(model, *more, **how),
    )
    with pf.load("digits", "ort-cpu", options=pf.EngineOptions(keep=keep)) as generator:
        assert generator("3", output="numpy").images.shape == (1, 8, 8, 1)
    assert given == [str(demo_bundle() / "student.fp32.onnx")]


def test_a_file_that_was_altered_since_it_was_checked_is_not_opened(tmp_path):
    folder = shutil.copytree(demo_bundle(), tmp_path / "digits")
    bundle, file = Bundle(folder), folder / "student.fp32.onnx"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"student\.fp32\.onnx"):
        open_networks(bundle, "reference", None, None, ONE)


def test_a_file_that_is_altered_while_it_is_read_is_noticed(tmp_path):
    folder = shutil.copytree(demo_bundle(), tmp_path / "digits")
    bundle, file = Bundle(folder), folder / "student.fp32.onnx"
    with pytest.raises(BundleError, match="while it was read"), bundle.view_network("student"):
        file.write_bytes(file.read_bytes()[:-1] + b"\0")


def test_sample_keeps_one_network_and_says_which_it_opens(tmp_path):
    from piflow_edge.commands import images

    shown = []
    with images._listening(shown.append):
        run("sample", "digits", "--labels", "3", "--keep", "one", "--out", tmp_path / "one.png")
    assert shown[0] == "opening the student"
    run("sample", "digits", "--labels", "3", "--out", tmp_path / "all.png")
    one, every = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("one", "all"))
    np.testing.assert_array_equal(one, every)


def test_what_to_keep_is_all_or_one():
    with pytest.raises(EngineError, match="'none'"):
        pf.EngineOptions(keep="none")
