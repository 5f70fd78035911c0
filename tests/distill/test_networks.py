"""Any network as a teacher, and a student that starts as it: conventions, policy heads, adapters on the weights."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from piflow_edge import rollout
from piflow_edge.distill.networks.dit import DiTConfig
from piflow_edge.distill.networks.flow_network import (
    Convention,
    DiTNetwork,
    ModuleNetwork,
    attach_policy_head,
)
from piflow_edge.distill.networks.lora import LoRAConfig, fold_lora
from piflow_edge.distill.student import check_start, policy_of
from piflow_edge.errors import CheckFailedError, ScheduleError, ShapeError
from piflow_edge.policies import DXPolicySpec, GMKPolicySpec, GMPolicySpec, policy_spec_from_json

SIGMA = torch.tensor([0.9, 0.5, 0.2])
HEADS = [GMPolicySpec(4), DXPolicySpec(5), DXPolicySpec(3, mode="polynomial"), GMKPolicySpec(4)]
head_id = lambda head: f"{head.kind}-{getattr(head, 'mode', 'mixture')}"  # noqa: E731


class Straight(nn.Module):
    """A network that knows x_0 and the noise, and says one of the three in its own time; a pixel at a time."""

    def __init__(self, x_0, noise, convention):
        super().__init__()
        self.x_0, self.noise, self.convention = x_0, noise, convention
        self.out = nn.Conv2d(2, 2, 1)
        nn.init.dirac_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_t, time):
        sigma = time / self.convention.num_timesteps
        sigma = (1 - sigma if self.convention.reversed_time else sigma).view(-1, 1, 1, 1)
        torch.testing.assert_close(x_t, (1 - sigma) * self.x_0 + sigma * self.noise)
        velocity = (self.noise - self.x_0) * (-1 if self.convention.reversed_time else 1)
        return self.out(
            {"velocity": velocity, "x_0": self.x_0, "noise": self.noise}[self.convention.predicts]
        )


@pytest.mark.parametrize("num_timesteps", [1.0, 1000.0])
@pytest.mark.parametrize("reversed_time", [False, True])
@pytest.mark.parametrize("predicts", ["velocity", "x_0", "noise"])
def test_every_convention_gives_the_same_velocity(predicts, reversed_time, num_timesteps):
    x_0, noise = torch.randn(2, 3, 2, 4, 4)
    convention = Convention(predicts, reversed_time, num_timesteps)
    network = ModuleNetwork(Straight(x_0, noise, convention), (2, 4, 4), convention)
    level = SIGMA.view(-1, 1, 1, 1)
    found = network.velocity((1 - level) * x_0 + level * noise, SIGMA)
    # Divided by noise levels down to 0.1: a rounding of x_t counts for ten.
    torch.testing.assert_close(found, noise - x_0, atol=1e-5, rtol=0)


def test_an_unknown_convention_is_refused():
    with pytest.raises(ScheduleError, match=r"'velocity', 'x_0' or 'noise'; .*'score'"):
        Convention("score")
    with pytest.raises(ScheduleError, match=r"num_timesteps .*0"):
        Convention(num_timesteps=0)


class Patches(nn.Module):
    """A transformer's skeleton: tokens of 2 x 2 patches, channels first or last, and a class embedding."""

    def __init__(self, channel_major=False, bias=True):
        super().__init__()
        self.out_channels, self.channel_major = 3, channel_major
        self.embed = nn.Conv2d(3, 16, 2, stride=2)
        self.classes = nn.Embedding(5, 16)
        self.hidden = nn.Linear(16, 16)
        self.final = nn.Linear(16, 12, bias=bias)
        self.unused = nn.Linear(1, 1)  # so that the last layer is not the right one

    def forward(self, x_t, t, y):
        tokens = self.embed(x_t) + self.classes(y)[:, :, None, None] + t.view(-1, 1, 1, 1)
        rows = self.final(torch.tanh(self.hidden(tokens.permute(0, 2, 3, 1))))
        if self.channel_major:
            return F.pixel_shuffle(rows.permute(0, 3, 1, 2), 2)
        rows = rows.unflatten(3, (2, 2, self.out_channels)).permute(0, 5, 1, 3, 2, 4)
        return rows.flatten(4).flatten(2, 3)


def patches(*, channel_major=False, output_layer="final", told=None, convention=None, bias=True):
    torch.manual_seed(0)
    return ModuleNetwork(
        Patches(channel_major, bias), (3, 4, 6), convention or Convention(num_timesteps=1.0), output_layer=output_layer,
        channel_major=channel_major if told is None else told, names={"labels": "y"}, null={"labels": torch.tensor(4)},
    )  # fmt: skip


def dit():
    torch.manual_seed(0)
    network = DiTNetwork(DiTConfig(2, (4, 6), hidden_size=16, depth=1, num_heads=2))
    nn.init.normal_(network.module.head.out.weight)
    return network


class Unet(nn.Module):
    """Convolutions only, with the mean of a class added."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(2, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 2, 3, padding=1, padding_mode="circular")

    def forward(self, x_t, t, labels):
        return self.out(torch.tanh(self.body(x_t) + labels.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1)))


NETWORKS = {
    "dit": dit,
    "channels last": patches,
    "channels first": lambda: patches(channel_major=True),
    "no bias": lambda: patches(bias=False),
    "x_0": lambda: patches(convention=Convention("x_0", True, 10.0)),
    "convolutions": lambda: ModuleNetwork(Unet(), (2, 4, 6), Convention("noise")),
}


def example(network, batch=3):
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, *network.sample_shape, generator=generator)
    return x_t, {"labels": torch.arange(batch)}


@pytest.mark.parametrize("head", HEADS, ids=head_id)
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_student_starts_as_its_teacher(make, head, monkeypatch):
    teacher = make()
    # Without the components' offsets it is the teacher; with them, near it.
    monkeypatch.setattr("piflow_edge.policies.gm.MEAN_SPREAD", 0.0)
    student = attach_policy_head(teacher, head)
    x_t, conditioning = example(teacher)
    sigma = SIGMA.double().numpy()
    policy = policy_of(student, head, x_t, sigma, conditioning)
    expected = teacher.velocity(x_t, SIGMA, **conditioning)
    torch.testing.assert_close(policy.velocity(x_t, sigma), expected, atol=2e-5, rtol=1e-5)
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("head", HEADS, ids=head_id)
def test_the_rollout_of_a_new_student_is_one_step_of_its_teacher(head, monkeypatch):
    # A policy that starts with one x_0 for the whole segment walks straight towards it.
    monkeypatch.setattr("piflow_edge.policies.gm.MEAN_SPREAD", 0.0)
    monkeypatch.setattr("piflow_edge.policies.gm.INITIAL_STD", 1e-6)
    teacher = dit()
    student = attach_policy_head(teacher, head)
    x_t, conditioning = example(teacher)
    with torch.no_grad():
        policy = policy_of(student, head, x_t, np.full(3, 0.8), conditioning)
    expected = x_t - 0.6 * teacher.velocity(x_t, torch.full((3,), 0.8), **conditioning)
    torch.testing.assert_close(rollout(policy, x_t, 0.8, 0.2, 32), expected, atol=1e-4, rtol=0)


def test_the_teacher_is_left_as_it_was():
    teacher = dit().requires_grad_(False)
    before = teacher.fingerprint()
    attach_policy_head(teacher, GMPolicySpec(3))
    assert teacher.fingerprint() == before and teacher.head is None
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_wrong_output_layer_or_order_is_named():
    with pytest.raises(ShapeError, match=r"1 rows.* 3 planes"):
        attach_policy_head(patches(output_layer=None), GMPolicySpec(2))
    # Rows in the wrong order have the right number: only the numbers tell.
    teacher = patches(told=True)
    student = attach_policy_head(teacher, GMPolicySpec(2))
    _, conditioning = example(teacher, batch=2)
    numpy = {name: value.numpy() for name, value in conditioning.items()}
    with pytest.raises(CheckFailedError, match=r"teacher.*channel_major=True"):
        check_start(student, teacher, numpy)


def test_a_module_that_does_not_read_its_number_of_planes_is_told_to():
    class FixedPatches(Patches):
        def forward(self, x_t, t, y):
            return super().forward(x_t, t, y)[:, :3]

    network = ModuleNetwork(FixedPatches(), (3, 4, 6), output_layer="final", names={"labels": "y"})
    x_t, conditioning = example(network)
    with pytest.raises(ShapeError, match=r"9 planes .*\(3, 4, 6\).*out_channels"):
        attach_policy_head(network, GMPolicySpec(2))(x_t, SIGMA, **conditioning)


def test_a_head_is_attached_to_a_teacher_once():
    with pytest.raises(ShapeError, match="has one already"):
        attach_policy_head(attach_policy_head(dit(), GMPolicySpec(2)), GMPolicySpec(2))


@pytest.mark.parametrize("head", HEADS, ids=head_id)
def test_a_head_comes_back_from_json(head):
    assert policy_spec_from_json(asdict(head)) == head


def same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # a few roundings of another matrix kernel


@pytest.mark.parametrize("make", [dit, patches], ids=["dit", "patches"])
def test_a_lora_student_and_its_teacher_are_one_set_of_weights(make):
    pytest.importorskip("peft", reason="LoRA needs the 'diffusers' extra")
    teacher, alone = make(), make()
    x_t, conditioning = example(teacher)
    expected = alone.velocity(x_t, SIGMA, **conditioning)
    student = attach_policy_head(teacher, GMPolicySpec(3), lora=LoRAConfig(rank=2))
    assert student.module is teacher.module
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name or ".policy." in name for name in trained)

    # Train on anything: the student changes, its teacher does not.
    sigma = SIGMA.double().numpy()
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.1)
    start = policy_of(student, student.head, x_t, sigma, conditioning).velocity(x_t, sigma).detach()
    for _ in range(3):
        velocity = policy_of(student, student.head, x_t, sigma, conditioning).velocity(x_t, sigma)
        same(student.velocity(x_t, SIGMA, **conditioning), expected)  # between forward and backward
        optimizer.zero_grad()
        velocity.square().mean().backward()
        optimizer.step()
    after = policy_of(student, student.head, x_t, sigma, conditioning).velocity(x_t, sigma).detach()
    assert (after - start).abs().max() > 0.01
    same(student.velocity(x_t, SIGMA, **conditioning), expected)

    fold_lora(student.module)
    folded = policy_of(student, student.head, x_t, sigma, conditioning).velocity(x_t, sigma).detach()
    torch.testing.assert_close(folded, after, atol=1e-4, rtol=1e-4)
    assert not any("lora_" in name or "base_layer" in name for name, _ in student.named_parameters())


def test_lora_targets_that_are_not_there_are_named():
    pytest.importorskip("peft", reason="LoRA needs the 'diffusers' extra")
    with pytest.raises(ShapeError, match=r"to_q; .*such as"):
        attach_policy_head(dit(), GMPolicySpec(2), lora=LoRAConfig(targets=("to_q",)))


def test_a_student_of_its_own_weights_has_no_teacher_inside():
    student = attach_policy_head(dit(), GMPolicySpec(2))
    x_t, conditioning = example(student)
    with pytest.raises(ShapeError, match="a trunk of its own"):
        student.velocity(x_t, SIGMA, **conditioning)


def test_the_module_stays_in_evaluation_mode():
    network = dit().train()
    assert network.training and not network.module.training


def test_half_precision_weights_give_policies_in_float32():
    network = attach_policy_head(dit(), GMPolicySpec(2)).to(torch.bfloat16)
    x_t, conditioning = example(network)
    assert {part.dtype for part in network(x_t, SIGMA, **conditioning)} == {torch.float32}


def test_nodes_of_a_dx_head_span_the_longest_segment():
    assert replace(DXPolicySpec(4), segment_size=0.5).segment_size == 0.5
    with pytest.raises(ShapeError, match=r"num_nodes .*1"):
        DXPolicySpec(0)
