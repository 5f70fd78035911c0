"""Training at a size where it takes seconds: what it starts from, where it goes, how it is stopped and resumed."""

import json
import signal
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from piflow_edge import rollout
from piflow_edge.conditioning import ClassLabels
from piflow_edge.distill.data.datasets import ImageData
from piflow_edge.distill.imitation import ImitationConfig
from piflow_edge.distill.loop import training
from piflow_edge.distill.loop.checkpoint import load_checkpoint
from piflow_edge.distill.loop.curves import read_curves
from piflow_edge.distill.loop.randomness import IterationRandom
from piflow_edge.distill.loop.training import RunConfig, TrainingConfig, train
from piflow_edge.distill.networks.dit import DiTConfig
from piflow_edge.distill.networks.flow_network import DiTNetwork, attach_policy_head
from piflow_edge.distill.sources import network_of, teacher_from_checkpoint
from piflow_edge.distill.student import distill, policy_of
from piflow_edge.distill.teacher import (
    FlowMatchingConfig,
    GuidanceConfig,
    GuidedTeacher,
    flow_matching_loss,
    train_teacher,
)
from piflow_edge.errors import (
    CheckFailedError,
    CheckpointError,
    DataError,
    EngineError,
    MissingExtraError,
    PiFlowError,
    ShapeError,
)
from piflow_edge.policies import DXPolicySpec, GMPolicySpec

TINY = DiTConfig(sample_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=2)
NULL = {"labels": torch.tensor(2)}
SHORT = TrainingConfig(iterations=6, batch_size=8, warmup=2)


@pytest.fixture(scope="module")
def data():
    """Two classes of noisy flat images, dark and light."""
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 2
    images = (labels[:, None, None, None] - 0.5 + 0.1 * rng.standard_normal((64, 1, 4, 4))).astype(np.float32)
    return ImageData("flat", images, ClassLabels(("dark", "light")), {"labels": labels})


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    config = replace(SHORT, iterations=300, batch_size=32, learning_rate=3e-3)
    return train_teacher(data, TINY, FlowMatchingConfig(), config, tmp_path_factory.mktemp("teacher"))


def run(teacher, data, folder, *, config=SHORT, imitation=None, head=GMPolicySpec(3), resume=False, **how):  # noqa: B008
    imitation = imitation or ImitationConfig(nfe=2, total_substeps=16)
    return distill(
        teacher_from_checkpoint(teacher),
        data,
        imitation,
        config,
        folder,
        guidance=GuidanceConfig(1.5),
        head=head,
        run=RunConfig(**how),
        resume=resume,
    )


def test_a_teacher_learns_its_classes(teacher, data):
    noise = torch.from_numpy(IterationRandom(1, 0).normal((64, 1, 4, 4)))
    labels = torch.from_numpy(data.arrays["labels"])
    images = GuidedTeacher(network_of(teacher)).sample(noise, 20, labels=labels)
    means = [images[labels == label].mean().item() for label in (0, 1)]
    assert means == pytest.approx([-0.5, 0.5], abs=0.15)


def test_a_student_starts_as_its_teacher(teacher):
    network = network_of(teacher)
    student = attach_policy_head(network, GMPolicySpec(4))
    x_t, labels = torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 0, 1, 2])
    sigma = np.array([1.0, 0.8, 0.5, 0.3, 0.1])
    with torch.no_grad():
        u_teacher = GuidedTeacher(network).velocity(x_t, sigma, labels=labels)
        policy = policy_of(student, student.head, x_t, sigma, {"labels": labels})
        u_student = policy.velocity(x_t, sigma)
        means = student(x_t, torch.from_numpy(sigma).float(), labels=labels)[0]
    # The components lie 0.05 apart at random, so their mean is off by about 0.05 / sqrt(4), alike everywhere.
    offset = u_student - u_teacher
    assert offset.abs().max() < 0.15
    torch.testing.assert_close(
        offset, offset.mean(dim=(0, 2, 3), keepdim=True).expand_as(offset), atol=1e-5, rtol=0
    )
    assert means.std(dim=1).min() > 0  # told apart, or they could never part


@pytest.mark.parametrize(
    ("head", "options"),
    [
        (GMPolicySpec(3), {}),
        (GMPolicySpec(3), {"data_free": True}),
        (GMPolicySpec(3), {"decay_iterations": 50, "gm_dropout": 0.2, "window_substeps": 4}),
        (DXPolicySpec(4), {}),
        (DXPolicySpec(3, mode="polynomial"), {}),
        (GMPolicySpec(3), {"nfe": (1, 2)}),
    ],
    ids=["gm", "data-free", "mixing, dropout, windows", "dx", "polynomial", "several nfe"],
)
def test_distillation_brings_one_call_close_to_the_teacher(teacher, data, tmp_path, head, options):
    config = replace(SHORT, iterations=150, batch_size=32, learning_rate=3e-3)
    imitation = ImitationConfig(**{"nfe": 1, "total_substeps": 16, **options})
    student = network_of(run(teacher, data, tmp_path, config=config, imitation=imitation, head=head))
    noise = torch.from_numpy(IterationRandom(2, 0).normal((64, 1, 4, 4)))
    labels = torch.from_numpy(data.arrays["labels"])
    guided = GuidedTeacher(network_of(teacher), GuidanceConfig(1.5))
    target, cut = (guided.sample(noise, steps, labels=labels) for steps in (50, 1))
    with torch.no_grad():
        policy = policy_of(student, student.head, noise, np.ones(64), {"labels": labels}, eps=1e-4)
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


def test_the_floor_of_the_loss_is_that_of_the_teachers_training_unless_named(data, tmp_path):
    floored = train_teacher(data, TINY, FlowMatchingConfig(sigma_floor=0.2), SHORT, tmp_path / "teacher")
    found = [
        run(floored, data, tmp_path / name, imitation=ImitationConfig(sigma_floor=floor))
        for name, floor in (("inherited", None), ("named", 0.0))
    ]
    assert [one.settings["imitation"]["sigma_floor"] for one in found] == [0.2, 0.0]


def test_a_student_of_before_there_was_a_floor_is_resumed(teacher, data, tmp_path):
    run(teacher, data, tmp_path)
    file = tmp_path / "checkpoint.json"
    described = json.loads(file.read_text())
    assert described["settings"]["imitation"].pop("sigma_floor") == 0
    file.write_text(json.dumps(described))
    assert run(teacher, data, tmp_path, config=replace(SHORT, iterations=8), resume=True).iteration == 8


def test_a_checkpoint_is_not_overwritten_unasked(teacher, data, tmp_path):
    run(teacher, data, tmp_path)
    with pytest.raises(CheckpointError, match="--resume"):
        run(teacher, data, tmp_path)


def test_resuming_with_other_settings_is_refused(teacher, data, tmp_path):
    run(teacher, data, tmp_path)
    with pytest.raises(CheckpointError, match=r"imitation\.nfe .*2.* 4"):
        run(teacher, data, tmp_path, imitation=ImitationConfig(nfe=4, total_substeps=16), resume=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            dict(num_heads=4),
            r"network\.config\.num_heads .*2, .*4",
        ),  # the shapes of the weights are the same
        (dict(patch_size=4), r"network\.config\.patch_size .*2, .*4"),
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
    with pytest.raises(CheckpointError, match=r"teacher\.sha256"):
        run(other, data, tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"pixels of the 64 images are others\)"):
        run(teacher, replace(data, images=data.images * 0.9), tmp_path, resume=True)


def test_what_changed_in_the_data_is_named_and_another_name_is_no_change(data, tmp_path):
    def go_on(data, iterations=8):
        longer = replace(SHORT, iterations=iterations)
        return train_teacher(data, TINY, FlowMatchingConfig(), longer, tmp_path, resume=True)

    labels = data.arrays["labels"]
    fewer = replace(data, name="few", images=data.images[:60], arrays={"labels": labels[:60]})
    swapped = replace(data, arrays={"labels": 1 - labels})
    go_on(data)
    with pytest.raises(CheckpointError, match=r"\(data were 'flat', are 'few': 64 images then, 60 now\)"):
        go_on(fewer)
    with pytest.raises(
        CheckpointError, match=r"'flat': labels, captions or encodings of the 64 images are others\)"
    ):
        go_on(swapped)
    assert go_on(replace(data, name="moved"), iterations=10).iteration == 10


def test_a_checkpoint_that_recorded_one_checksum_of_the_data_is_resumed(data, tmp_path):
    """As earlier releases did."""
    train_teacher(data, TINY, FlowMatchingConfig(), SHORT, tmp_path)
    file = tmp_path / "checkpoint.json"
    description = json.loads(file.read_text())
    for name in ("data_count", "data_images_sha256"):
        del description["settings"][name]
    file.write_text(json.dumps(description))
    other = replace(data, images=data.images * 0.9)
    with pytest.raises(CheckpointError, match="images, or what steers them, are others"):
        train_teacher(other, TINY, FlowMatchingConfig(), SHORT, tmp_path, resume=True)
    assert train_teacher(data, TINY, FlowMatchingConfig(), SHORT, tmp_path, resume=True).iteration == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(images=np.zeros((64, 1, 8, 8), np.float32)), r"\(1, 4, 4\); .*'flat' .*\(1, 8, 8\)"),
        (dict(images=np.zeros((64, 3, 4, 4), np.float32)), r"\(1, 4, 4\); .*'flat' .*\(3, 4, 4\)"),
        (
            dict(conditioner=ClassLabels(("dark", "light", "red"))),
            "dark, light.*'flat'.*dark, light, red",
        ),
        (dict(conditioner=ClassLabels(("light", "dark"))), "dark, light.*light, dark"),
    ],
)
def test_data_the_teacher_does_not_know_is_refused(teacher, data, tmp_path, change, words):
    with pytest.raises(DataError, match=words):
        run(teacher, replace(data, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    broken = ImageData("broken", np.full_like(data.images, np.nan), data.conditioner, data.arrays)
    with pytest.raises(CheckFailedError, match="6 steps in a row"):
        train_teacher(broken, TINY, FlowMatchingConfig(), SHORT, tmp_path)
    assert not (tmp_path / "checkpoint.json").exists()


def test_a_run_that_is_never_finite_after_its_first_step_fails(data, tmp_path):
    def loss(network, x_0, conditioning, random):
        value = flow_matching_loss(network, x_0, conditioning, NULL, FlowMatchingConfig(), random)
        finite.append(bool(value.isfinite()))
        return value

    finite: list[bool] = []
    config = replace(SHORT, learning_rate=1e30, warmup=0)
    with pytest.raises(CheckFailedError, match="5 steps in a row, up to iteration 6; none was saved"):
        train(DiTNetwork(TINY), loss, data, config, tmp_path, kind="teacher", settings={})
    assert finite == [True] + [False] * 5


def test_a_skipped_step_leaves_everything_as_it_was(data, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        training, "save_checkpoint", lambda folder, checkpoint: saved.append(copy_checkpoint(checkpoint))
    )
    steps = 0

    def loss(network, x_0, conditioning, random):
        nonlocal steps
        steps += 1
        value = flow_matching_loss(network, x_0, conditioning, NULL, FlowMatchingConfig(), random)
        return value * torch.nan if steps in (3, 4) else value

    train(
        DiTNetwork(TINY),
        loss,
        data,
        SHORT,
        tmp_path,
        kind="teacher",
        settings={},
        run=RunConfig(save_every=1),
    )
    counts = [checkpoint.tensors.pop("run.skipped").tolist() for checkpoint in saved]
    assert counts == [[0, 0], [0, 0], [1, 1], [2, 2], [2, 0], [2, 0]]
    changed = [
        [not torch.equal(value, after.tensors[name]) for name, value in before.tensors.items()]
        for before, after in pairwise(saved)
    ]
    assert [any(names) for names in changed] == [True, False, False, True, True]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["skipped"] == 2 and log[-1]["iteration"] == 6


def copy_checkpoint(checkpoint):
    return replace(checkpoint, tensors={name: value.clone() for name, value in checkpoint.tensors.items()})


def test_what_needs_no_gradient_is_neither_trained_nor_saved(data, tmp_path):
    network = DiTNetwork(TINY).requires_grad_(False)
    network.module.head.requires_grad_(True)
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def loss(network, x_0, conditioning, random):
        return flow_matching_loss(network, x_0, conditioning, NULL, FlowMatchingConfig(), random)

    checkpoint = train(network, loss, data, SHORT, tmp_path, kind="teacher", settings={})
    trained = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert trained == {
        f"module.head.{layer}.{kind}" for layer in ("modulation", "out") for kind in ("weight", "bias")
    }
    assert checkpoint.group("raw").keys() == checkpoint.group("ema").keys() == trained


def test_sheets_of_samples_show_the_averaged_weights(data, tmp_path, monkeypatch):
    config = replace(SHORT, ema_decay=0.0)  # no average: what is shown are the weights themselves
    seen = []

    def preview(network):
        assert not network.training and not torch.is_grad_enabled()
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return np.zeros((12, 4, 4, 1), np.uint8)

    def loss(network, x_0, conditioning, random):
        return flow_matching_loss(network, x_0, conditioning, NULL, FlowMatchingConfig(), random)

    def run(folder, **changes):
        how = RunConfig(sample_every=6)
        return train(
            DiTNetwork(TINY), loss, data, replace(config, **changes), tmp_path / folder, kind="teacher", settings={},
            run=how, preview=preview,
        )  # fmt: skip

    for decay, group in ((0.0, "raw"), (0.9, "ema")):
        checkpoint = run(group, ema_decay=decay)
        assert all(torch.equal(value, seen[-1][name]) for name, value in checkpoint.group(group).items())
        with Image.open(tmp_path / group / "samples" / "0000006.png") as sheet:
            assert sheet.width > sheet.height  # rows of ten


def test_a_teacher_and_a_student_make_samples_of_themselves(teacher, data, tmp_path):
    how = RunConfig(sample_every=3)
    train_teacher(data, TINY, FlowMatchingConfig(), SHORT, tmp_path / "teacher", run=how)
    run(teacher, data, tmp_path / "student", sample_every=3)
    for name in ("teacher", "student"):
        assert len(list((tmp_path / name / "samples").iterdir())) == 2


def test_samples_of_what_is_no_picture_are_refused_at_once(tmp_path):
    latents = ImageData(
        "latents", np.zeros((8, 4, 4, 4), np.float32), ClassLabels(("a", "b")), {"labels": np.arange(8) % 2}
    )
    with pytest.raises(ShapeError, match=r"1 or 3 channels.* 4"):
        how = RunConfig(sample_every=1)
        train_teacher(latents, replace(TINY, in_channels=4), FlowMatchingConfig(), SHORT, tmp_path, run=how)


def test_tensorboard_gets_what_the_log_gets(teacher, data, tmp_path):
    pytest.importorskip("tensorboardX")
    run(teacher, data, tmp_path, tensorboard=True, log_every=1, sample_every=3)
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    for name in (b"loss", b"gradient_norm", b"learning_rate", b"skipped", b"images_per_s", b"samples"):
        assert name in content


def test_tensorboard_that_is_not_installed_is_named(teacher, data, tmp_path, monkeypatch):
    for name in ("tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"piflow-edge\[tensorboard\]"):
        run(teacher, data, tmp_path / "out", tensorboard=True)
    assert not (tmp_path / "out").exists()


def test_gradient_checkpointing_is_asked_of_networks_that_have_it():
    asked = SimpleNamespace(gradient_checkpointing_enable=lambda: seen.append("transformers"))
    seen = []
    training._checkpoint_gradients(asked)
    assert seen == ["transformers"]
    with pytest.raises(EngineError, match=r"Linear .*checkpointing"):
        training._checkpoint_gradients(torch.nn.Linear(2, 2))


def test_guidance_below_one_is_refused():
    with pytest.raises(PiFlowError, match="guidance scale"):
        GuidanceConfig(0.5)


def test_labels_dropped_in_training_are_the_null_class():
    network, seen = DiTNetwork(TINY), []
    network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["labels"]), with_kwargs=True
    )
    config = FlowMatchingConfig(condition_dropout=0.5)
    labels, x_0 = torch.zeros(400, dtype=torch.int64), torch.zeros(400, 1, 4, 4)
    flow_matching_loss(network, x_0, {"labels": labels}, network.null, config, IterationRandom(0, 0))
    share = (seen[0] == TINY.num_classes).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.1)  # four standard errors of 400 throws
    assert set(seen[0].tolist()) == {0, TINY.num_classes}


def test_a_finished_run_can_be_made_longer(teacher, data, tmp_path):
    run(teacher, data, tmp_path, config=replace(SHORT, learning_rate_decay="inverse-sqrt"))
    longer = replace(SHORT, iterations=9, batch_size=4, learning_rate_decay="inverse-sqrt")
    assert run(teacher, data, tmp_path, config=longer, resume=True).iteration == 9
    with pytest.raises(CheckpointError, match="iterations are 6, and 9 are done"):
        run(teacher, data, tmp_path, config=replace(longer, iterations=6), resume=True)


def test_the_learning_rate_falls_with_the_root_of_the_steps():
    config = TrainingConfig(learning_rate=1.0, warmup=100, learning_rate_decay="inverse-sqrt")
    rates = [training.learning_rate(config, iteration) for iteration in (0, 49, 99, 399, 9999)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 0.5, 0.1])


def test_a_run_may_compile_its_networks(teacher, data, tmp_path, monkeypatch):
    compile_module, compiled = torch.nn.Module.compile, []

    def compile_without_a_compiler(module):
        compiled.append(module)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_a_compiler)
    eager = run(teacher, data, tmp_path / "eager", log_every=1)
    found = run(teacher, data, tmp_path / "compiled", compile=True, sample_every=3, log_every=1)
    assert len(compiled) == 2  # the student and the teacher
    assert found.tensors.keys() == eager.tensors.keys()
    losses = (read_curves(tmp_path / name / "log.jsonl")["loss"] for name in ("compiled", "eager"))
    # Not the weights: Adam makes steps of full length of gradients that are nothing but rounding.
    assert next(losses) == pytest.approx(next(losses), rel=1e-4)
