"""pi-ID, the imitation loss: the teacher corrects the student along the student's own path.

The student's policy is followed, without gradient, to a few points of its segment; at each the teacher says what the
velocity should have been, and the policy's velocity there is pulled towards it. One L2 loss, nothing else.

Times are host float64, one per sample: they decide how many substeps each sample takes, and must not make a GPU wait.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from piflow_edge.integrator import Integrate, integrate
from piflow_edge.policies import Policy
from piflow_edge.schedule import count_substeps, resolution_shift, substep_sigmas, warp

from .configs import ImitationConfig

# Floor under raw times and window lengths in training; the authors' value (`train_eps` of the recorded cases).
TRAIN_EPS = 1e-4

# (x_t (B, C, *S), sigma_t (B,)) -> u_t, without gradient.
AskTeacher = Callable[[Tensor, np.ndarray], Tensor]


class Random(Protocol):
    """Where a loss draws its numbers from, in a fixed order, so that a run can be repeated or resumed."""

    def uniform(self, shape) -> np.ndarray:
        """float64 in [0, 1)."""
        ...

    def normal(self, shape) -> np.ndarray:
        """float32 standard normal."""
        ...

    def shared_choice(self, count: int) -> int:
        """A whole number below `count`, the same for all samples of the iteration, on whatever process they are."""
        ...


@dataclass(frozen=True)
class SegmentLoss:
    """One segment's part of the loss, and where the path ended.

    `loss`: scalar with gradient. `x_t`: last teacher state, no gradient. `raw_t`: its raw time, (B,).
    `predictions`, `targets`: policy's and teacher's velocities, (n B, C, H, W), state by state.
    """

    loss: Tensor
    x_t: Tensor
    raw_t: np.ndarray
    predictions: Tensor
    targets: Tensor


def shift_by_resolution(
    config: ImitationConfig,
    shape: Sequence[int],
    base_seq_len: int,
    max_seq_len: int,
    base_logshift: float,
    max_logshift: float,
) -> ImitationConfig:
    """Return the settings with the shift that states (C, H, W) need, instead of their own; see `resolution_shift`."""
    shift = resolution_shift(
        math.prod(shape[1:]),  # positions of the state
        base_seq_len=base_seq_len,
        max_seq_len=max_seq_len,
        base_logshift=base_logshift,
        max_logshift=max_logshift,
    )
    return replace(config, shift=shift)


def source_segments(
    config: ImitationConfig, uniforms: np.ndarray, nfe: int | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Raw time at which each sample's segment starts, and the segment's length, both (B,).

    Samples fall into segments in proportion to the segments' lengths. `nfe` may differ from sample to sample.
    """
    scale = max(config.final_step_size_scale, TRAIN_EPS)
    base = 1 / (nfe - 1 + scale)
    raw_t = np.maximum(1 - uniforms, TRAIN_EPS)
    number = np.clip(np.ceil(raw_t / base + (1 - scale)), 1, nfe)  # 1 is the segment that ends at data
    raw_t_src = np.clip((number - (1 - scale)) * base, TRAIN_EPS, 1.0)
    return raw_t_src, np.where(number == 1, scale * base, base)


@dataclass(frozen=True)
class Path:
    """How the path of one segment goes on from where it starts: in turn with the policy and with the teacher.

    `x_src`, `raw_t_src`: state and raw times (B,) at the start. `student_steps`, `teacher_steps`: raw time of each
    stretch, (n, B). `window`: raw time over which velocities are averaged, (B,).
    """

    x_src: Tensor
    raw_t_src: np.ndarray
    student_steps: np.ndarray
    teacher_steps: np.ndarray
    window: np.ndarray


def draw_path(
    x_src: Tensor,
    raw_t_src: np.ndarray,
    length: np.ndarray,
    config: ImitationConfig,
    random: Random,
    teacher_ratio: float,
) -> Path:
    """Draw the points of segments that start at `raw_t_src` and are `length` long in raw time, both (B,)."""
    n, batch = config.num_intermediate_states, len(x_src)
    window = config.window_substeps * length / count_substeps(length, 0.0, config.total_substeps)
    window = np.minimum(window, length)
    free = length - window
    # The student's share of the way in n random stretches, the teacher's share in n others.
    student_ends = np.sort(random.uniform((batch, n)), axis=1) * ((1 - teacher_ratio) * free)[:, None]
    student_steps = np.diff(student_ends, axis=1, prepend=0.0)
    cuts = np.sort(random.uniform((batch, n - 1)), axis=1)
    teacher_steps = np.diff(cuts, axis=1, prepend=0.0, append=1.0) * (teacher_ratio * free)[:, None]
    return Path(x_src.detach(), raw_t_src, student_steps.T, teacher_steps.T, window)


def correct_in_turn(
    policy: Policy,
    path_policy: Policy,
    teacher: AskTeacher,
    path: Path,
    config: ImitationConfig,
    integrate: Integrate,
) -> SegmentLoss:
    """Ask the teacher at each point, and go on from there with the teacher's velocity for its share of the way.

    Args:
        policy: carries the gradient; only its velocity at the points is used.
        followed: the same policy without gradient, perhaps with components dropped; makes the path.
        path: see `draw_path`.
        teacher, config, integrate: as in `imitation_loss`.
    """
    x_t, raw_t = path.x_src, path.raw_t_src
    predictions, targets, levels = [], [], []
    for student_step, teacher_step in zip(path.student_steps, path.teacher_steps, strict=True):
        raw_t_a = np.maximum(raw_t - student_step, 0.0)
        x_a, sigma_a = _follow(path_policy, x_t, raw_t, raw_t_a, config, integrate)
        raw_t = np.maximum(raw_t_a - teacher_step, 0.0)
        u_t = teacher(x_a, sigma_a)
        x_t = x_a + u_t * _per_sample(warp(raw_t, config.shift) - sigma_a, x_a)
        predictions.append(average_velocity(policy, x_a, raw_t_a, raw_t - path.window, config, integrate))
        targets.append(u_t)
        levels.append(sigma_a)
    sigma_t = np.concatenate(levels)
    return _compare(torch.cat(predictions), torch.cat(targets), sigma_t, x_t, raw_t, config)


def correct_at_once(
    policy: Policy,
    path_policy: Policy,
    teacher: AskTeacher,
    path: Path,
    config: ImitationConfig,
    integrate: Integrate,
) -> SegmentLoss:
    """Follow the policy to all points, then ask the teacher about them in one call, which is quicker than n small ones.

    The teacher has no share of the way here: a later point would wait for its velocity at an earlier one. It is called
    with `(x_t, sigma_t)` of n B samples, point after point. Arguments as `correct_in_turn`.
    """
    x_t, raw_t = path.x_src, path.raw_t_src
    predictions, states, levels = [], [], []
    for student_step in path.student_steps:
        raw_t_a = np.maximum(raw_t - student_step, 0.0)
        x_t, sigma_t = _follow(path_policy, x_t, raw_t, raw_t_a, config, integrate)
        raw_t = raw_t_a
        predictions.append(average_velocity(policy, x_t, raw_t, raw_t - path.window, config, integrate))
        states.append(x_t)
        levels.append(sigma_t)
    sigma_t = np.concatenate(levels)
    targets = teacher(torch.cat(states), sigma_t)
    return _compare(torch.cat(predictions), targets, sigma_t, x_t, raw_t, config)


# How a segment is corrected: `correct_in_turn` or `correct_at_once`.
Correct = Callable[
    [Policy, Policy, AskTeacher, Path, ImitationConfig, Integrate],
    SegmentLoss,
]


def _compare(
    predictions: Tensor,
    targets: Tensor,
    sigma_t: np.ndarray,
    x_t: Tensor,
    raw_t: np.ndarray,
    config: ImitationConfig,
) -> SegmentLoss:
    """The loss of velocities (n B, C, H, W) at noise levels `sigma_t` (n B,); the path ended at `x_t`, `raw_t`."""
    error = predictions - targets
    if config.sigma_floor:
        error = error * _per_sample(sigma_t / np.maximum(sigma_t, config.sigma_floor), error)
    loss = config.loss_scale * 0.5 * error.square().mean()
    return SegmentLoss(loss, x_t, raw_t, predictions, targets)


def imitation_loss(
    student: Callable[[Tensor, np.ndarray], Policy],
    teacher: AskTeacher,
    x_0: Tensor,
    config: ImitationConfig,
    random: Random,
    *,
    teacher_ratio: float = 0.0,
    correct: Correct = correct_in_turn,
    integrate: Integrate = integrate,
) -> SegmentLoss:
    """The loss of one batch of real data, noised to the start of a segment drawn for each sample.

    Args:
        student: `(x_src, sigma_src (B,)) -> policy`, one network call, with gradient.
        teacher: `(x_t, sigma_t (B,)) -> u_t`, without gradient.
        x_0: data, (B, C, H, W), latent units.
        config: settings.
        random: source of all random numbers.
        teacher_ratio: share of each segment that is walked with the teacher's velocity instead of the policy's.
        correct: `correct_at_once` is quicker than the default, but takes a `teacher_ratio` of 0.
        integrate: carries states along policies; see `student.distill`.

    Source: Chen et al., pi-Flow, arXiv:2510.14974; `PiFlowImitation.forward_train` in Lakonik/piFlow.
    """
    raw_t_src, length = source_segments(
        config, random.uniform((len(x_0),)), _nfe_of_samples(config, len(x_0), random)
    )
    noise = torch.from_numpy(random.normal(tuple(x_0.shape))).to(x_0)
    sigma_src = warp(raw_t_src, config.shift)
    level = _per_sample(sigma_src, x_0)
    x_src = x_0 * (1 - level) + noise * level
    policy = student(x_src, sigma_src)
    path_policy = _leave_gradient(policy, config, random)
    path = draw_path(x_src, raw_t_src, length, config, random, teacher_ratio)
    return correct(policy, path_policy, teacher, path, config, integrate)


def datafree_imitation_loss(
    student: Callable[[Tensor, np.ndarray], Policy],
    teacher: AskTeacher,
    noise: Tensor,
    config: ImitationConfig,
    random: Random,
    *,
    teacher_ratio: float = 0.0,
    correct: Correct = correct_in_turn,
    integrate: Integrate = integrate,
) -> tuple[Tensor, list[SegmentLoss]]:
    """The loss along the student's whole path from pure noise: no data needed. Arguments as `imitation_loss`.

    Returns:
        The sum over segments, weighted by their length, and each segment's part.

    Source: Chen et al., pi-Flow, arXiv:2510.14974; `PiFlowImitationDataFree` in Lakonik/piFlow.
    """
    nfe = config.nfes[0] if len(config.nfes) == 1 else config.nfes[random.shared_choice(len(config.nfes))]
    base = config.segment_length(nfe)
    x_src, raw_t_src = noise, np.ones(len(noise))
    total, parts = noise.new_zeros(()), []
    for step in range(nfe):
        size = base if step < nfe - 1 else config.final_step_size_scale * base
        length = np.full(len(noise), size)
        policy = student(x_src, warp(raw_t_src, config.shift))
        path_policy = _leave_gradient(policy, config, random)
        path = draw_path(x_src, raw_t_src, length, config, random, teacher_ratio)
        part = correct(policy, path_policy, teacher, path, config, integrate)
        total, parts = total + size * part.loss, [*parts, part]
        raw_t_dst = np.maximum(raw_t_src - size, 0.0)
        x_src, _ = _follow(path_policy, part.x_t, part.raw_t, raw_t_dst, config, integrate)
        raw_t_src = raw_t_dst
    return total, parts


def average_velocity(
    policy: Policy,
    x_t: Tensor,
    raw_t: np.ndarray,
    raw_t_end: np.ndarray,
    config: ImitationConfig,
    integrate: Integrate = integrate,
) -> Tensor:
    """Mean velocity of the policy between two raw times, (B,) each; at the point where that is one substep.

    Source: section 5 of the recorded reference; `policy_average_u` in Lakonik/piFlow.
    """
    sigma_t = warp(raw_t, config.shift)
    # The floor of 1 in count_substeps makes no difference to "fewer than 2".
    counts = np.asarray(count_substeps(raw_t, raw_t_end, config.total_substeps))
    at_point = policy.velocity(x_t, sigma_t)
    if np.all(counts < 2):
        return at_point
    x_end, sigma_end = _follow(policy, x_t, raw_t, raw_t_end, config, integrate)
    mean = (x_t - x_end) / _per_sample(np.maximum(sigma_t - sigma_end, TRAIN_EPS), x_t)
    return torch.where(_per_sample(counts < 2, x_t).bool(), at_point, mean)


def _leave_gradient(policy: Policy, config: ImitationConfig, random: Random) -> Policy:
    """The policy as it is followed: no gradient, and one draw of component dropout for the whole segment."""
    path_policy = policy.detach()
    if path_policy.num_parts and 0 < config.gm_dropout < 1:
        shape = (len(path_policy.x_src), path_policy.num_parts)
        uniforms = torch.from_numpy(random.uniform(shape)).to(path_policy.x_src.device)
        path_policy = path_policy.drop_parts(uniforms, config.gm_dropout)
    return path_policy


def _nfe_of_samples(config: ImitationConfig, batch: int, random: Random) -> int | np.ndarray:
    if len(config.nfes) == 1:
        return config.nfes[0]
    return np.array(config.nfes)[(random.uniform((batch,)) * len(config.nfes)).astype(int)]


def _follow(policy, x_t, raw_t, raw_t_end, config, integrate):
    counts = count_substeps(raw_t, raw_t_end, config.total_substeps)
    sigmas = substep_sigmas(raw_t, raw_t_end, counts, config.shift)
    return integrate(policy, x_t, sigmas), sigmas[-1]


def _per_sample(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like).view(-1, *(1,) * (like.ndim - 1))
