"""Evaluation of what arrays steer, and of what nothing steers: without labels anywhere."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from piflow_edge.conditioning import Arrays, ClassLabels, TensorSpec, Unconditional
from piflow_edge.errors import DataError
from piflow_edge.evaluation.comparison import evaluate
from piflow_edge.evaluation.judgement import find_warnings
from piflow_edge.evaluation.metrics import frechet_interval
from piflow_edge.evaluation.plan import ALL_IMAGES, name_inputs, plan_images
from piflow_edge.evaluation.report import write_report

PROMPTS = Arrays((TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", 4)),))


@dataclass(frozen=True)
class Blobs:
    """Grey 4x4 pictures, each as bright as its array says."""

    conditioner: object
    arrays: dict
    name: str = "blobs"
    latent: None = None
    shape: tuple = (1, 4, 4)

    def __len__(self):
        return 120

    def conditioning(self, indices):
        return {name: array[indices] for name, array in self.arrays.items()}

    def batch(self, indices):
        brightness = np.linspace(-1, 1, 120, dtype=np.float32)[indices]
        noise = np.random.default_rng(0).uniform(-0.1, 0.1, (len(indices), 1, 4, 4)).astype(np.float32)
        return brightness[:, None, None, None] + noise, self.conditioning(indices)


class Painter:
    """A teacher that paints what its arrays say, or noise where nothing steers it."""

    sample_shape = (1, 4, 4)

    def __init__(self, conditioner):
        self.conditioner, self.given = conditioner, []

    def sample(self, noise, conditioning, steps, *, guidance_scale):
        self.given.append(conditioning)
        means = [array.mean((1, 2)) for array in conditioning.values()]
        return 0.1 * noise + sum(mean[:, None, None, None] for mean in means)


class Pixels:
    description, source = "the pixels", {}

    def __call__(self, images):
        return images.reshape(len(images), -1)


def prompts():
    levels = np.linspace(-1, 1, 120, dtype=np.float32)
    return Blobs(PROMPTS, {"encoder_hidden_states": np.ones((120, 3, 4), np.float32) * levels[:, None, None]})


def test_arrays_steer_teacher_and_pictures(tmp_path):
    teacher = Painter(PROMPTS)
    found = evaluate([], prompts(), Pixels(), teacher=teacher, count=100, teacher_steps=2, cut_steps=(1,))
    assert found.conditions["images_per_class"] == {ALL_IMAGES: 100}
    assert {given["encoder_hidden_states"].shape[1:] for given in teacher.given} == {(3, 4)}
    # Every picture is beside the real one whose array steered it.
    real, made = found.pictures.rows["real images"], found.pictures.rows["teacher, 2 steps"]
    np.testing.assert_allclose(real.mean((1, 2, 3)), made.mean((1, 2, 3)), atol=0.2)
    assert len(set(found.pictures.titles)) == len(found.pictures.titles)
    page = write_report(tmp_path, found, title="blobs", notes=[]).read_text(encoding="utf-8")
    assert "class by class" not in page


def test_nothing_steers_teacher_and_data():
    teacher = Painter(Unconditional())
    found = evaluate(
        [], Blobs(Unconditional(), {}), Pixels(), teacher=teacher, count=100, teacher_steps=1, cut_steps=()
    )
    assert found.conditions["images_per_class"] == {ALL_IMAGES: 100}
    assert teacher.given[0] == {} and found.scores[0].class_diversity.keys() == {ALL_IMAGES}


def test_a_teacher_without_conditioning_is_scored_on_data_that_have_some():
    plan = plan_images(prompts(), 100, steered=False)
    assert plan.conditioning() == {} and plan.titles([0, 1]) == ["", ""]


def test_arrays_that_the_data_lack_are_refused_with_their_name():
    with pytest.raises(DataError, match="encoder_hidden_states float32"):
        evaluate([], Blobs(Unconditional(), {}), Pixels(), teacher=Painter(PROMPTS), count=100)


def test_an_input_of_another_name_takes_the_array_of_its_kind():
    ids = np.arange(3)
    found = name_inputs({"labels": ids, "text": np.zeros((3, 2, 4))}, ClassLabels(("a",), "class_labels"))
    assert list(found) == ["class_labels"] and found["class_labels"] is ids


def test_classes_are_groups_in_the_order_of_their_ids():
    ids = np.arange(120)[::-1] % 3
    data = Blobs(ClassLabels(("one", "two", "two")), {"labels": ids})
    plan = plan_images(data, 100, steered=True)
    assert plan.group_names == ["one", "1 two", "2 two"]
    np.testing.assert_array_equal(plan.conditioning()["labels"], plan.groups)
    np.testing.assert_array_equal(plan.real_groups, ids)
    # Images of one group come from different real ones.
    first = plan.chosen[plan.groups == 0]
    assert len(set(first)) == len(first)


def test_few_images_and_figures_that_disagree_are_named(tmp_path):
    found = evaluate(
        [], prompts(), Pixels(), teacher=Painter(PROMPTS), count=100, teacher_steps=1, cut_steps=()
    )
    (warning,) = found.warnings
    assert "100 images" in warning and "16 features" in warning
    low, high = found.scores[0].fid_interval
    assert low <= found.scores[0].fid <= high
    page = write_report(tmp_path, found, title="blobs", notes=[]).read_text(encoding="utf-8")
    assert page.index("Warning: 100 images") < page.index("<h2>Pictures") < page.index("<h2>Figures")
    teacher, *_ = found.scores
    grainy, close = (
        replace(teacher, name=name, fid=fid, mse=mse)
        for name, fid, mse in (("a", 1.0, 0.04), ("b", 2.0, 0.008))
    )
    (warning,) = find_warnings([teacher, grainy, close], ["a", "b"], 1000, 16)
    assert "'a'" in warning and "'b'" in warning and "0.008" in warning
    assert find_warnings([teacher, grainy, close], ["b"], 1000, 16) == []


def test_the_interval_of_a_frechet_distance_holds_the_true_one():
    random, held = np.random.default_rng(0), 0
    real = random.standard_normal((20_000, 4))
    for _ in range(20):
        low, high = frechet_interval(random.standard_normal((400, 4)) + 0.5, real)
        held += low <= 4 * 0.25 <= high
    assert held >= 16  # 19 expected of 95 %
    assert frechet_interval(np.zeros((3, 300)), np.ones((3, 300))) is None
