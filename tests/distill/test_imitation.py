"""The imitation loss against the authors' recorded training steps: same random numbers, same loss and gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from piflow_edge import DXPolicy, GMPolicy
from piflow_edge.distill.imitation import (
    ImitationConfig,
    average_velocity,
    correct_at_once,
    correct_in_turn,
    datafree_imitation_loss,
    imitation_loss,
    source_segments,
)
from piflow_edge.distill.teacher import guide
from tests.helpers.golden_cases import case_id, cases
from tests.helpers.golden_policies import sampler_shift

OUTPUTS = ("means", "logweights", "logstds", "denoising_output")


class RecordedRandom:
    """Random numbers in the order the authors drew them."""

    def __init__(self, case, names):
        self.case, self.names = case, iter(names)

    def uniform(self, shape):
        return self._next(shape).astype(np.float64)

    def normal(self, shape):
        return self._next(shape)

    def _next(self, shape):
        name = next(self.names)
        value = self.case[name]
        assert value.shape == tuple(shape), name
        return value


class ToyTeacher:
    """Velocity of a mixture of Gaussians over channels, alike at every position (section 8 of the reference)."""

    def __init__(self, case, dtype):
        self.params = case.params
        self.mu, self.logpi = (torch.from_numpy(case[f"teacher_{k}"].astype(dtype)) for k in ("mu", "logpi"))
        self.labels = case["teacher_class_labels"] if "teacher_class_labels" in case else None  # noqa: SIM401 (a Case is no dict)
        self.seen = []

    def __call__(self, x_t, sigma_t):
        self.seen.append(x_t)
        scale = self.params.get("teacher_guidance_scale", 1.0)
        if self.labels is None:
            return self.velocity(x_t, sigma_t, np.zeros(len(x_t), int))
        null, labels = np.split(self.labels, 2)
        u_uncond, u_cond = (self.velocity(x_t, sigma_t, chosen) for chosen in (null, labels))
        num_timesteps = self.params["num_timesteps"]
        t = torch.from_numpy(sigma_t).to(x_t) * num_timesteps
        interval = self.params.get("teacher_guidance_interval")
        orthogonal = self.params.get("teacher_orthogonal_guidance", 0.0)
        return guide(
            u_cond, u_uncond, x_t, t, scale=scale, num_timesteps=num_timesteps, interval=interval,
            orthogonal=orthogonal,
        )  # fmt: skip

    def velocity(self, x_t, sigma_t, labels):
        ones = (1,) * (x_t.ndim - 2)
        sigma = torch.from_numpy(sigma_t).to(x_t).view(-1, 1, 1, *ones)
        alpha, s2 = 1 - sigma, self.params["teacher_s"] ** 2
        mu = self.mu[labels].view(len(x_t), -1, x_t.shape[1], *ones)
        logpi = self.logpi[labels].view(len(x_t), -1, 1, *ones)
        v = alpha**2 * s2 + sigma**2
        d = x_t[:, None] - alpha * mu
        rho = (logpi - d.square().sum(2, keepdim=True) / (2 * v)).softmax(1)
        return (rho * (sigma * d / v - mu - alpha * s2 * d / v)).sum(1)


def config_of(case):
    params = case.params
    names = (
        "nfe", "final_step_size_scale", "total_substeps", "num_intermediate_states", "window_substeps",
        "gm_dropout", "loss_scale", "policy_eps",
    )  # fmt: skip
    chosen = {name: params[name] for name in names if name in params}
    return ImitationConfig(shift=sampler_shift(case), **chosen)


def toy_student(case, dtype, prefix=""):
    """The recorded network outputs as leaves, and what makes the policy from them."""
    leaves = {
        name: torch.from_numpy(case[f"{prefix}student_{name}"].astype(dtype)).requires_grad_()
        for name in OUTPUTS
        if f"{prefix}student_{name}" in case
    }
    params = case.params

    def policy(x_src, sigma_src):
        if "means" in leaves:
            return GMPolicy(*leaves.values(), x_src, sigma_src, eps=params["policy_eps"])
        return DXPolicy(
            leaves["denoising_output"], x_src, sigma_src, segment_size=params.get("policy_segment_size", 1.0),
            shift=params["policy_shift"], mode=params["policy_mode"], eps=params["policy_eps"],
        )  # fmt: skip

    return leaves, policy


def check_segment(case, part, leaves, dtype, prefix=""):
    case.check(f"{prefix}all_pred_u", part.predictions.detach().numpy(), dtype)
    case.check(f"{prefix}all_tgt_u", part.targets.numpy(), dtype)
    for name, leaf in leaves.items():
        # A gradient that is exactly 0 (logstds at the source) leaves None or zeros.
        grad = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
        case.check(f"{prefix}grad_{name}", grad, dtype)


@pytest.mark.parametrize("case", cases("piid_train"), ids=case_id)
def test_loss_and_gradients_are_the_authors(case, dtype):
    x_0 = torch.from_numpy(case["x_0"].astype(dtype))
    leaves, student = toy_student(case, dtype)
    teacher = ToyTeacher(case, dtype)
    random = RecordedRandom(case, case.params["random_draw_order"])
    part = imitation_loss(
        student, teacher, x_0, config_of(case), random, teacher_ratio=case.params["teacher_ratio"]
    )
    part.loss.backward()
    case.check("loss", part.loss.item(), dtype)
    case.check("teacher_in_x_t", torch.stack(teacher.seen).numpy(), dtype)
    check_segment(case, part, leaves, dtype)


@pytest.mark.parametrize("case", cases("piid_datafree"), ids=case_id)
def test_datafree_loss_and_gradients_are_the_authors(case, dtype):
    steps = [toy_student(case, dtype, f"step{i}_") for i in range(case.params["nfe"])]
    students = iter(student for _, student in steps)
    noise = torch.from_numpy(case["noise"].astype(dtype))
    random = RecordedRandom(case, case.params["random_draw_order"][1:])  # the noise comes first
    loss, parts = datafree_imitation_loss(
        lambda x_src, sigma_src: next(students)(x_src, sigma_src), ToyTeacher(case, dtype), noise,
        config_of(case), random, teacher_ratio=case.params["teacher_ratio"],
    )  # fmt: skip
    loss.backward()
    case.check("loss", loss.item(), dtype)
    for i, (part, (leaves, _)) in enumerate(zip(parts, steps, strict=True)):
        check_segment(case, part, leaves, dtype, f"step{i}_")


@pytest.mark.parametrize("case", cases("average_u"), ids=case_id)
def test_mean_velocity_over_a_window_is_the_authors(case, dtype):
    from tests.conftest import Library
    from tests.helpers.golden_policies import make_policy

    policy = make_policy(case, Library("torch"), dtype)
    raw_t, raw_t_end = (case[f"raw_t_{name}"].astype(np.float64) for name in ("start", "end"))
    config = ImitationConfig(shift=sampler_shift(case), total_substeps=case.params["total_substeps"])
    x_t = torch.from_numpy(case["x_t_start"].astype(dtype))
    case.check("pred_u", average_velocity(policy, x_t, raw_t, raw_t_end, config), dtype)


@pytest.mark.parametrize("case", cases("guidance"), ids=case_id)
def test_guided_velocity_is_the_authors(case, dtype):
    params = case.params
    u_cond, u_uncond, x_t, t = (
        torch.from_numpy(case[name].astype(dtype)) for name in ("u_cond", "u_uncond", "x_t", "t")
    )
    u = guide(
        u_cond, u_uncond, x_t, t, scale=max(params["guidance_scale"], 1.0),
        num_timesteps=params["num_timesteps"], interval=params["guidance_interval"],
        orthogonal=params["orthogonal_guidance"],
    )  # fmt: skip
    case.check("u_guided", u.numpy(), dtype)


def test_only_the_policy_velocity_carries_a_gradient():
    # The path is the policy's own, yet nothing may flow back through it: the gradient is that of the velocities
    # at the visited states, taken for constants.
    case = cases("piid_train", lambda name: name == "gm_nfe2_n1")[0]
    leaves, student = toy_student(case, np.float64)
    policies, visited = [], []

    def remember(x_src, sigma_src):
        policies.append(student(x_src, sigma_src))
        return policies[-1]

    def teacher(x_t, sigma_t):
        assert not x_t.requires_grad
        visited.append((x_t, sigma_t))
        return torch.zeros_like(x_t)

    x_0 = torch.from_numpy(case["x_0"].astype(np.float64))
    random = RecordedRandom(case, case.params["random_draw_order"])
    config = config_of(case)
    imitation_loss(remember, teacher, x_0, config, random).loss.backward()
    found = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    assert len(visited) == 1 and any(grad.abs().max() > 0 for grad in found.values())

    for leaf in leaves.values():
        leaf.grad = None
    (x_a, sigma_a), policy = visited[0], student(policies[0].x_src, policies[0].sigma_src)
    (config.loss_scale * 0.5 * policy.velocity(x_a.clone(), sigma_a).square().mean()).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(found[name], leaf.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("correct", [correct_in_turn, correct_at_once])
def test_below_the_floor_errors_count_as_those_of_x_0(correct):
    case = cases("piid_train", lambda name: name == "gm_nfe1")[0]
    _, student = toy_student(case, np.float64)
    toy, levels = ToyTeacher(case, np.float64), []

    def teacher(x_t, sigma_t):
        levels.append(sigma_t)
        # Of another batch than the toy teacher takes where all points come at once.
        parts = zip(x_t.split(len(x_0)), np.split(sigma_t, len(x_t) // len(x_0)), strict=True)
        return torch.cat([toy(*part) for part in parts])

    x_0 = torch.from_numpy(case["x_0"].astype(np.float64))
    config = replace(config_of(case), sigma_floor=0.6)
    random = RecordedRandom(case, case.params["random_draw_order"])
    part = imitation_loss(student, teacher, x_0, config, random, correct=correct)
    sigma = np.concatenate(levels)[:, None, None, None]
    assert sigma.min() < 0.6 < sigma.max()
    errors = (part.predictions - part.targets).detach().numpy()
    errors = np.where(sigma < 0.6, errors * sigma / 0.6, errors)
    np.testing.assert_allclose(part.loss.item(), config.loss_scale * 0.5 * (errors**2).mean(), rtol=1e-12)


def test_a_last_segment_may_be_the_longest():
    config = ImitationConfig(nfe=4, final_step_size_scale=1.5)
    raw_t_src, length = source_segments(config, np.linspace(0, 1, 1000, endpoint=False), 4)
    base = 1 / 4.5
    starts, counts = np.unique(np.round(raw_t_src, 12), return_counts=True)
    np.testing.assert_allclose(starts, [1.5 * base, 2.5 * base, 3.5 * base, 1.0])
    np.testing.assert_allclose(counts / 1000, [1.5 * base, base, base, base], atol=2e-3)
    np.testing.assert_allclose(length[raw_t_src < 1.6 * base], 1.5 * base)
    assert config.longest_segment(4) == 1.5 * base
