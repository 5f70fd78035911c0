"""The teacher's side: classifier-free guidance, Euler sampling, and flow-matching training."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from piflow_edge.conditioning import Conditioner, ConditionRequest
from piflow_edge.distill.data.datasets import ImageData
from piflow_edge.distill.loop.checkpoint import Checkpoint
from piflow_edge.distill.loop.training import Preview, train
from piflow_edge.distill.networks.families import Architecture, new_network
from piflow_edge.distill.networks.flow_network import FlowNetwork, Teacher
from piflow_edge.errors import ShapeError
from piflow_edge.noise import philox_normal
from piflow_edge.schedule import warp
from piflow_edge.system.pixels import quantise_images

from .configs import (
    DEFAULT_RUN,
    UNGUIDED,
    USUAL_GUIDANCE,
    FlowMatchingConfig,
    GuidanceConfig,
    RunConfig,
    TrainingConfig,
)


def guide(
    u_cond: Tensor,
    u_uncond: Tensor,
    x_t: Tensor,
    t: Tensor,
    *,
    scale: float,
    num_timesteps: float,
    interval: tuple[float, float] | None = None,
    orthogonal: float = 0.0,
) -> Tensor:
    """Classifier-free guidance: push the velocity away from the unconditional one.

    Args:
        u_cond, u_uncond: velocities with the class and with the null class, (B, C, H, W).
        x_t: the state they belong to, same shape.
        t: time in the network's units, (B,).
        scale: 1 is no guidance.
        num_timesteps: `t` at pure noise.
        interval: times, both ends included, outside which the scale is 1; None is everywhere.
        orthogonal: share of the push along the predicted x_0 that is taken out, which keeps contrast from growing.

    Source: section 9 of the recorded reference; `GaussianFlow.forward_u` in Lakonik/piFlow.
    """
    excess = torch.full_like(t, scale - 1)
    if interval is not None:
        excess = torch.where((t >= interval[0]) & (t <= interval[1]), excess, 0.0)
    per_sample = (-1, *(1,) * (u_cond.ndim - 1))
    bias = excess.view(per_sample) * (u_cond - u_uncond)
    if orthogonal:
        axes = tuple(range(1, u_cond.ndim))
        x_0 = x_t - (t / num_timesteps).view(per_sample) * u_cond
        overlap = (bias * x_0).mean(axes, keepdim=True) / (x_0**2).mean(axes, keepdim=True).clamp(min=1e-6)
        bias = bias - orthogonal * overlap * x_0
    return u_cond + bias


class GuidedTeacher:
    """A teacher with classifier-free guidance as one velocity field.

    Args:
        teacher: the network.
        guidance: see `GuidanceConfig`.
        null: what stands for "no condition", one entry without the batch axis per name; for a text model the
            embeddings of the null prompt, which may have another length than those that are given: then the network
            is asked twice, since not every network can be told to look away from padding. None is what the network
            says. Names that are not in it stay as they are.

    Raises:
        ScheduleError: guidance is wanted and nothing says what "no condition" is.
    """

    def __init__(
        self,
        teacher: Teacher,
        guidance: GuidanceConfig = UNGUIDED,
        *,
        null: Mapping[str, Tensor] | None = None,
    ):
        null = dict(getattr(teacher, "null", {}) if null is None else null)
        self.teacher, self.guidance, self.null = teacher, guidance.resolve(bool(null)), null

    @torch.no_grad()
    def velocity(self, x_t: Tensor, sigma_t, **conditioning: Tensor) -> Tensor:
        """u_t at states (B, C, *S), noise level a float or (B,); no gradient."""
        levels = np.broadcast_to(sigma_t, x_t.shape[:1])
        sigma = torch.as_tensor(levels.copy()).to(x_t)
        if self.guidance.scale == 1:
            return self.teacher.velocity(x_t, sigma, **conditioning)
        # Outside the interval the unconditional velocity is not needed. The host knows: no waiting for a GPU.
        low, high = self.guidance.interval or (0.0, 1.0)
        pushed = torch.from_numpy(np.flatnonzero((levels >= low) & (levels <= high))).to(x_t.device)
        null = {name: self._null_of(name, given)[pushed] for name, given in conditioning.items()}
        u_cond, unguided = self._both(x_t, sigma, conditioning, pushed, null)
        u_uncond = u_cond.index_copy(0, pushed, unguided)
        # In units in which the network's time is the noise level.
        return guide(u_cond, u_uncond, x_t, sigma, num_timesteps=1.0, **vars(self.guidance))

    def _null_of(self, name: str, given: Tensor) -> Tensor:
        """What stands for "no condition" in an input, once for every sample."""
        if name not in self.null:
            return given
        null = self.null[name].to(given)
        return null.expand(len(given), *null.shape)

    def _both(self, x_t, sigma, conditioning, pushed, null) -> tuple[Tensor, Tensor]:
        """Velocities of all samples as they are conditioned, and of the `pushed` ones with "no condition"."""
        if any(null[name].shape[1:] != given.shape[1:] for name, given in conditioning.items()):
            u_cond = self.teacher.velocity(x_t, sigma, **conditioning)
            if not len(pushed):
                return u_cond, u_cond[pushed]
            return u_cond, self.teacher.velocity(x_t[pushed], sigma[pushed], **null)
        doubled = {name: torch.cat([null[name], given]) for name, given in conditioning.items()}
        both = self.teacher.velocity(
            torch.cat([x_t[pushed], x_t]), torch.cat([sigma[pushed], sigma]), **doubled
        )
        return both[len(pushed) :], both[: len(pushed)]

    def sample(self, noise: Tensor, steps: int, *, shift: float = 1.0, **conditioning: Tensor) -> Tensor:
        """Images by `steps` Euler steps from `noise` (B, C, *S), even in raw time."""
        x_t = noise
        for sigma_t, sigma_next in pairwise(warp(np.linspace(1.0, 0.0, steps + 1), shift).tolist()):
            x_t = x_t + self.velocity(x_t, sigma_t, **conditioning) * (sigma_next - sigma_t)
        return x_t


# How many samples a sheet shows, and how a teacher makes them: enough to see what it has learnt.
_PREVIEW_COUNT, _PREVIEW_STEPS = 40, 10


def preview_inputs(network: FlowNetwork, conditioner: Conditioner) -> tuple[Tensor, dict[str, Tensor]]:
    """Return noise and conditioning that sheets of samples are made from, always the same.

    Raises:
        ShapeError: the network makes no pictures.
    """
    if network.sample_shape[0] not in (1, 3):
        raise ShapeError(
            f"sheets of samples show 1 or 3 channels; the network makes {network.sample_shape[0]}: set sample_every "
            "to 0"
        )
    noise = torch.from_numpy(philox_normal(0, range(_PREVIEW_COUNT), network.sample_shape))
    return noise, as_tensors(conditioner.example(_PREVIEW_COUNT))


def preview_titles(conditioner: Conditioner) -> list[str]:
    """Return what stands under the pictures of a sheet: the prompt, or a few words for what else steers it."""
    if prompts := conditioner.example_prompts(_PREVIEW_COUNT):
        return prompts
    given = conditioner.example(_PREVIEW_COUNT)
    request = ConditionRequest(arrays=given) if given else ConditionRequest(count=_PREVIEW_COUNT)
    return [conditioner.title(entry) for entry in conditioner.describe(request, given)]


def null_condition(network: Teacher, conditioner: Conditioner) -> dict[str, Tensor]:
    """Return what stands for "no condition", one entry without the batch axis per name; empty where nothing does.

    What the data say goes before what the network says: the null prompt is part of the data's encodings.
    """
    null = conditioner.null(1)
    if null is None:
        return dict(getattr(network, "null", {}))
    return {name: row[0] for name, row in as_tensors(null).items()}


def as_tensors(
    conditioning: Mapping[str, np.ndarray], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return a conditioning of NumPy as one of torch."""
    return {name: torch.from_numpy(np.ascontiguousarray(v)).to(device) for name, v in conditioning.items()}


def _logistic_of_normal(uniforms: np.ndarray) -> np.ndarray:
    """Raw times whose logits are standard normal, of uniform numbers in [0, 1)."""
    # The normal's quantiles in float64: erfinv is exact enough, and a uniform 0 would be minus infinity.
    inside = torch.from_numpy(np.clip(uniforms, 1e-12, 1 - 1e-12))
    return torch.sigmoid(math.sqrt(2) * torch.erfinv(2 * inside - 1)).numpy()


# How raw times are made of uniform numbers.
_LEVELS = {"uniform": lambda uniforms: uniforms, "logit-normal": _logistic_of_normal}


def flow_matching_loss(
    network: nn.Module,
    x_0: Tensor,
    conditioning: Mapping[str, Tensor],
    null: Mapping[str, Tensor],
    config: FlowMatchingConfig,
    random,
) -> Tensor:
    """Mean squared error between the network's velocity and `noise - x_0`, at random noise levels.

    Args:
        network: `(x_t (B, C, *S), sigma_t (B,), **conditioning) -> u_t`.
        x_0: data, (B, C, *S).
        conditioning: of each sample, arrays (B, ...).
        null: what stands for "no condition", one entry without the batch axis per name; empty trains without dropout.
        config: settings.
        random: source of all random numbers; see `loop.randomness`.

    Source: Lipman et al., Flow Matching, arXiv:2210.02747.
    """
    batch = len(x_0)
    raw_t = _LEVELS[config.noise_levels](random.uniform((batch,)))
    sigma = torch.from_numpy(warp(raw_t, config.shift)).to(x_0)
    dropped = torch.from_numpy(random.uniform((batch,)) < config.condition_dropout).to(x_0.device)
    noise = torch.from_numpy(random.normal(x_0.shape)).to(x_0)
    level = sigma.view(-1, *(1,) * (x_0.ndim - 1))
    x_t = (1 - level) * x_0 + level * noise
    u_t = network(x_t, sigma, **drop_conditions(conditioning, null, dropped))
    error = (u_t.float() - (noise - x_0)).square()
    if config.sigma_floor:
        error = error * (level / level.clamp(min=config.sigma_floor)).square()
    return error.mean()


def drop_conditions(
    conditioning: Mapping[str, Tensor], null: Mapping[str, Tensor], dropped: Tensor
) -> dict[str, Tensor]:
    """Return the conditioning with "no condition" in place of the samples that `drop_parts` (B,) names.

    Raises:
        ShapeError: "no condition" has another length than what is given, so that one batch cannot hold both.
    """
    left = {}
    for name, given in conditioning.items():
        own = null.get(name)
        if own is not None and own.shape != given.shape[1:]:
            raise ShapeError(
                f"to train with condition dropout, 'no condition' has the shape of what is given; of {name!r} it is "
                f"{tuple(own.shape)} and {tuple(given.shape[1:])}: fill it up, with a mask, or set the dropout to 0"
            )
        chosen = dropped.view(-1, *(1,) * (given.ndim - 1))
        left[name] = given if own is None else torch.where(chosen, own.to(given), given)
    return left


def train_teacher(
    data: ImageData,
    architecture: Architecture,
    flow_matching: FlowMatchingConfig,
    training: TrainingConfig,
    folder: Path,
    *,
    run: RunConfig = DEFAULT_RUN,
    resume: bool = False,
) -> Checkpoint:
    """Train a network from scratch with flow matching, and leave its checkpoint in `folder`.

    Args:
        data: what to train on.
        architecture: of the network, which starts from random weights.
        flow_matching, training: settings of the loss and of the loop.
        run: how the run is carried out.
        resume: go on from the checkpoint in `folder`.

    Raises:
        CheckpointError, CheckFailedError and others: see `training.train`.
    """
    torch.manual_seed(training.seed)  # the initial weights
    network = new_network(architecture)
    null = null_condition(network, data.conditioner)

    def loss(network, x_0, conditioning, random):
        own = {name: tensor.to(x_0.device) for name, tensor in null.items()}
        return flow_matching_loss(network, x_0, conditioning, own, flow_matching, random)

    settings = {"flow_matching": asdict(flow_matching), "data": data.name}
    return train(
        network, loss, data, training, folder, kind="teacher", settings=settings, run=run,
        preview=_preview_of(network, data.conditioner, null, flow_matching.shift) if run.sample_every else None,
        titles=preview_titles(data.conditioner) if run.sample_every else (),
        resume=resume,
    )  # fmt: skip


def _preview_of(
    network: FlowNetwork, conditioner: Conditioner, null: Mapping[str, Tensor], shift: float
) -> Preview:
    """Return what makes the sheets of samples of a teacher, guided where it can be."""
    noise, conditioning = preview_inputs(network, conditioner)

    def preview(network: Any) -> np.ndarray:
        device = next(network.parameters()).device
        guided = GuidedTeacher(network, GuidanceConfig(USUAL_GUIDANCE if null else 1.0), null=null)
        given = {name: tensor.to(device) for name, tensor in conditioning.items()}
        images = guided.sample(noise.to(device), _PREVIEW_STEPS, shift=shift, **given)
        return quantise_images(images.cpu().numpy())

    return preview
