"""Training at a size where it takes seconds: what it starts from, where it goes, how it is stopped and resumed."""

import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from piflow_edge import rollout
from piflow_edge.distill import training
from piflow_edge.distill.checkpoint import load_checkpoint
from piflow_edge.distill.data import ImageData
from piflow_edge.distill.dit import DiT, DiTConfig, student_from_teacher
from piflow_edge.distill.imitation import ImitationConfig
from piflow_edge.distill.randomness import IterationRandom
from piflow_edge.distill.student import distill, policy_of
from piflow_edge.distill.teacher import FlowMatchingConfig, GuidedTeacher, train_teacher
from piflow_edge.distill.training import RunConfig, TrainingConfig
from piflow_edge.errors import CheckFailedError, CheckpointError, DataError, PiFlowError

TINY = DiTConfig(sample_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=2)
SHORT = TrainingConfig(iterations=6, batch_size=8, warmup=2)


@pytest.fixture(scope="module")
def data():
    """Two classes of noisy flat images, dark and light."""
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 2
    images = (labels[:, None, None, None] - 0.5 + 0.1 * rng.standard_normal((64, 1, 4, 4))).astype(np.float32)
    return ImageData("flat", images, labels, ("dark", "light"))


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    config = replace(SHORT, iterations=300, batch_size=32, learning_rate=3e-3)
    return train_teacher(data, TINY, FlowMatchingConfig(), config, tmp_path_factory.mktemp("teacher"))


def run(teacher, data, folder, *, config=SHORT, imitation=None, resume=False, **how):
    imitation = imitation or ImitationConfig(nfe=2, total_substeps=16)
    return distill(
        teacher, data, imitation, config, folder, guidance_scale=1.5, num_components=3, run=RunConfig(**how),
        resume=resume,
    )  # fmt: skip


def test_a_teacher_learns_its_classes(teacher, data):
    noise = torch.from_numpy(IterationRandom(1, 0).normal((64, 1, 4, 4)))
    labels = torch.from_numpy(data.labels)
    images = GuidedTeacher(teacher.network(), TINY, 1.0).sample(noise, labels, 20)
    means = [images[labels == label].mean().item() for label in (0, 1)]
    assert means == pytest.approx([-0.5, 0.5], abs=0.15)


def test_a_student_starts_as_its_teacher(teacher):
    network = teacher.network()
    student = student_from_teacher(network, 4).eval()
    x_t, labels = torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 0, 1, 2])
    sigma = np.array([1.0, 0.8, 0.5, 0.3, 0.1])
    with torch.no_grad():
        u_teacher = GuidedTeacher(network, TINY, 1.0).velocity(x_t, sigma, labels)
        policy = policy_of(student, x_t, sigma, labels, eps=1e-6)
        u_student = policy.velocity(x_t, sigma)
        means = student(x_t, torch.from_numpy(sigma).float() * 1000, labels)[0]
    # The components lie 0.05 apart at random, so their mean is off by about 0.05 / sqrt(4), alike everywhere.
    offset = u_student - u_teacher
    assert offset.abs().max() < 0.15
    torch.testing.assert_close(
        offset, offset.mean(dim=(0, 2, 3), keepdim=True).expand_as(offset), atol=1e-5, rtol=0
    )
    assert means.std(dim=1).min() > 0  # told apart, or they could never part


def test_distillation_brings_one_call_close_to_the_teacher(teacher, data, tmp_path):
    config = replace(SHORT, iterations=100, batch_size=32)
    student = run(
        teacher, data, tmp_path, config=config, imitation=ImitationConfig(nfe=1, total_substeps=16)
    ).network()
    noise = torch.from_numpy(IterationRandom(2, 0).normal((64, 1, 4, 4)))
    labels = torch.from_numpy(data.labels)
    guided = GuidedTeacher(teacher.network(), TINY, 1.5)
    target, cut = guided.sample(noise, labels, 50), guided.sample(noise, labels, 1)
    with torch.no_grad():
        policy = policy_of(student, noise, np.ones(64), labels, eps=1e-4)
    error = (rollout(policy, noise, 1.0, 0.0, 16) - target).square().mean()
    assert error < 0.5 * (cut - target).square().mean()


@pytest.mark.parametrize("stop", [0, 3])
def test_a_resumed_run_ends_with_the_same_weights(teacher, data, tmp_path, monkeypatch, stop):
    whole = run(teacher, data, tmp_path / "whole")
    interrupt(monkeypatch, stop, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(teacher, data, tmp_path / "parts")
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "parts").iteration == stop + 1  # the step it came in was ended first
    resumed = run(teacher, data, tmp_path / "parts", resume=True)
    assert whole.tensors.keys() == resumed.tensors.keys()
    for name, value in whole.tensors.items():
        assert torch.equal(value, resumed.tensors[name]), name


def test_a_run_that_is_killed_goes_on_from_the_last_checkpoint(teacher, data, tmp_path, monkeypatch):
    whole = run(teacher, data, tmp_path / "whole", save_every=2)
    interrupt(monkeypatch, 5, lambda: 1 / 0)  # nothing is saved on the way out, as with kill -9
    with pytest.raises(ZeroDivisionError):
        run(teacher, data, tmp_path / "parts", save_every=2)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "parts").iteration == 4
    resumed = run(teacher, data, tmp_path / "parts", save_every=2, resume=True)
    assert all(torch.equal(value, resumed.tensors[name]) for name, value in whole.tensors.items())


def interrupt(monkeypatch, iteration, happens):
    """Let something happen in the middle of an iteration."""

    class Stopping(IterationRandom):
        def normal(self, shape):
            if self.number == iteration:
                happens()
            return super().normal(shape)

        def __init__(self, seed, number):
            super().__init__(seed, number)
            self.number = number

    monkeypatch.setattr(training, "IterationRandom", Stopping)


def test_a_finished_run_resumed_is_left_as_it_is(teacher, data, tmp_path):
    first = run(teacher, data, tmp_path)
    again = run(teacher, data, tmp_path, resume=True)
    assert all(torch.equal(value, again.tensors[name]) for name, value in first.tensors.items())


def test_a_checkpoint_is_not_overwritten_unasked(teacher, data, tmp_path):
    run(teacher, data, tmp_path)
    with pytest.raises(CheckpointError, match="--resume"):
        run(teacher, data, tmp_path)


def test_resuming_with_other_settings_is_refused(teacher, data, tmp_path):
    run(teacher, data, tmp_path)
    with pytest.raises(CheckpointError, match=r"imitation\.nfe was 2, is 4"):
        run(teacher, data, tmp_path, imitation=ImitationConfig(nfe=4, total_substeps=16), resume=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(num_heads=4), r"architecture\.num_heads was 2, is 4"),  # the shapes of the weights are the same
        (dict(patch_size=4), r"architecture\.patch_size was 2, is 4"),
    ],
)
def test_resuming_with_another_architecture_is_refused(data, tmp_path, change, words):
    train_teacher(data, TINY, FlowMatchingConfig(), SHORT, tmp_path)
    before = (tmp_path / "checkpoint.json").read_bytes()
    with pytest.raises(CheckpointError, match=words):
        train_teacher(data, replace(TINY, **change), FlowMatchingConfig(), SHORT, tmp_path, resume=True)
    assert (tmp_path / "checkpoint.json").read_bytes() == before


def test_resuming_with_another_teacher_or_other_images_is_refused(teacher, data, tmp_path):
    run(teacher, data, tmp_path)
    other = replace(teacher, tensors={k: v + 1e-3 for k, v in teacher.tensors.items()})
    with pytest.raises(CheckpointError, match="teacher_sha256"):
        run(other, data, tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="data_sha256"):
        run(teacher, replace(data, images=data.images * 0.9), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(images=np.zeros((64, 1, 8, 8), np.float32)), r"\(1, 4, 4\); those of 'flat' are \(1, 8, 8\)"),
        (dict(images=np.zeros((64, 3, 4, 4), np.float32)), r"\(1, 4, 4\); those of 'flat' are \(3, 4, 4\)"),
        (
            dict(class_names=("dark", "light", "red")),
            "classes are dark, light; those of 'flat' are dark, light, red",
        ),
        (dict(class_names=("light", "dark")), "classes are dark, light"),
    ],
)
def test_data_the_teacher_does_not_know_is_refused(teacher, data, tmp_path, change, words):
    with pytest.raises(DataError, match=words):
        run(teacher, replace(data, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    broken = ImageData("broken", np.full_like(data.images, np.nan), data.labels, data.class_names)
    with pytest.raises(CheckFailedError, match="not finite in 6 steps in a row"):
        train_teacher(broken, TINY, FlowMatchingConfig(), SHORT, tmp_path)
    assert not (tmp_path / "checkpoint.json").exists()


def test_guidance_below_one_is_refused(teacher):
    with pytest.raises(PiFlowError, match="guidance scale"):
        GuidedTeacher(teacher.network(), TINY, 0.5)


def test_labels_dropped_in_training_are_the_null_class():
    network = DiT(TINY)
    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    config = FlowMatchingConfig(label_dropout=0.5)
    from piflow_edge.distill.teacher import flow_matching_loss

    labels = torch.zeros(400, dtype=torch.int64)
    flow_matching_loss(network, torch.zeros(400, 1, 4, 4), labels, config, IterationRandom(0, 0))
    share = (seen[0] == TINY.null_label).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.1)  # four standard errors of 400 throws
    assert set(seen[0].tolist()) == {0, TINY.null_label}
