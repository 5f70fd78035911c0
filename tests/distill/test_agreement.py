"""What a run says of itself: how near a student's images are to its teacher's, curves, and whether to train on."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from piflow_edge.conditioning import ClassLabels
from piflow_edge.distill.agreement import COUNT, Agreement
from piflow_edge.distill.configs import GuidanceConfig
from piflow_edge.distill.loop.curves import describe_trend, draw_curves, read_curves
from piflow_edge.distill.networks.dit import DiTConfig
from piflow_edge.distill.networks.flow_network import DiTNetwork
from piflow_edge.distill.teacher import GuidedTeacher
from tests.distill import test_training as small
from tests.distill.test_training import data, teacher  # noqa: F401  (fixtures)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return DiTNetwork(DiTConfig(sample_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=2))


def test_a_teacher_agrees_with_itself_and_a_shifted_one_by_the_square_of_the_shift(network):
    guided = GuidedTeacher(network, GuidanceConfig(1.0))

    def draw(network, noise, given, shift=0.0):
        assert len(noise) == len(given["labels"]) <= COUNT
        return guided.sample(noise, 50, shift=2.0, **given) + shift

    conditioner = ClassLabels(("dark", "light"))
    assert Agreement(guided, draw, network, conditioner, shift=2.0).measure(network) == 0
    off = Agreement(guided, lambda *given: draw(*given, shift=0.5), network, conditioner, shift=2.0)
    assert off.measure(network) == pytest.approx(0.25, rel=1e-5)


def test_a_run_tells_how_near_it_has_come(teacher, data, tmp_path, capsys):  # noqa: F811
    config = small.replace(small.SHORT, iterations=80, batch_size=16)
    small.run(teacher, data, tmp_path, config=config, compare_every=10, log_every=20)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    errors = {line["iteration"]: line["error_to_teacher"] for line in lines if "error_to_teacher" in line}
    assert list(errors) == list(range(10, 90, 10)) and errors[80] < errors[10]
    said = capsys.readouterr().err
    assert (
        f", error to the teacher {errors[80]:.4f}" in said
        or f", error to the teacher {errors[70]:.4f}" in said
    )
    assert "error to the teacher over the last quarter: " in said
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.size[0] > 500


def test_a_resumed_run_keeps_its_curve(teacher, data, tmp_path, capsys):  # noqa: F811
    for iterations in (30, 60):
        config = small.replace(small.SHORT, iterations=iterations, learning_rate_decay="inverse-sqrt")
        small.run(teacher, data, tmp_path, config=config, resume=iterations > 30, compare_every=10)
    assert list(read_curves(tmp_path / "log.jsonl")["error_to_teacher"]) == [10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize(
    ("last", "words"),
    [(0.5, r"1 to 0.5 \(-50%\); more iterations still help"), (0.99, "hardly help"), (1.2, r"\(\+20%\)")],
)
def test_the_last_quarter_says_whether_to_go_on(last, words):
    errors = dict(zip(range(100, 900, 100), [9.0, 5.0, 3.0, 2.0, 1.5, 1.0, 0.7, last], strict=True))
    errors[600] = 1.0
    assert re.search(words, describe_trend(errors))


def test_a_few_errors_say_nothing():
    assert describe_trend({10: 1.0, 20: 0.5, 30: 0.2}) == ""
    assert describe_trend(dict.fromkeys(range(4), np.nan)) == ""


def test_curves_leave_out_what_is_not_finite(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"iteration": 1, "loss": null}\n{"iteration": 2, "loss": 0.5}\n')
    assert read_curves(tmp_path / "log.jsonl") == {"loss": {2: 0.5}}
    assert not draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
