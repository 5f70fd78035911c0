"""A class-conditional student of the authors as a bundle: what their files and names say is what it records."""

import shutil

import numpy as np
import pytest

pytest.importorskip("torch")


import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from tests.commands.command_line import run
from tests.helpers.golden_cases import GOLDEN, cases

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Of the recorded GM-DiT, under the name of a published student for two calls."""
    place = tmp_path_factory.mktemp("official")
    source = shutil.copytree(GOLDEN / "checkpoints" / "gmdit", place / "gmrepa_k32_imagenet_piid_2step")
    run("export", source, "--out", place / "bundle")
    return place / "bundle"


def test_the_network_in_the_bundle_gives_the_recorded_outputs(bundle):
    (case,) = cases("checkpoint_forward", lambda name: name == "gmdit/in0")
    with pf.load(bundle) as generator:
        # The name says a network that counts time to 1, as REPA's do; the recorded one counts to 1000.
        sigma = case["timestep"].astype(np.float32)
        inputs = {"x_t": case["hidden_states"], "t": sigma, "labels": case["class_labels"]}
        found = generator.engine.run(inputs)
    for name in ("means", "logweights", "logstds"):
        case.check(name, found[name], np.float32)


def test_the_bundle_says_what_the_authors_say(bundle):
    manifest = Bundle(bundle).manifest
    schedule = manifest.schedule
    assert (schedule.nfe, schedule.good_nfes, schedule.substep_rule, schedule.shift) == (2, [2], "ceil", 1.0)
    assert manifest.policy.eps == 1e-6 and manifest.latent.scale == 0.18215
    assert manifest.provenance["hub_id"] == "Lakonik/pi-Flow-ImageNet:gmrepa_k32_imagenet_piid_2step"


def test_other_numbers_of_calls_than_it_is_good_for_are_warned_of(bundle, caplog):
    with pf.load(bundle) as generator:
        generator(labels=[3], nfe=4, output="latent")
    assert "was trained for 2 calls per image and runs with 4" in caplog.text
