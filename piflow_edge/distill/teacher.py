"""The teacher's side: classifier-free guidance, Euler sampling, and flow-matching training."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from piflow_edge.errors import ScheduleError, ShapeError
from piflow_edge.noise import philox_normal
from piflow_edge.sampling import decode
from piflow_edge.schedule import warp

from .checkpoint import Checkpoint
from .data import ImageData
from .dit import DiT, DiTConfig
from .processes import unwrapped
from .training import DEFAULT_RUN, RunConfig, TrainingConfig, train


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
    """A class-conditional network with classifier-free guidance as one velocity field.

    Args:
        network: `(x_t, t, labels) -> u_t`, a trained DiT or an engine that runs one.
        config: the network's architecture.
        scale: guidance scale, 1 or more; 1 asks the network once per call, above 1 for two samples per sample.
    """

    def __init__(self, network: Callable[[Tensor, Tensor, Tensor], Tensor], config: DiTConfig, scale: float):
        if not scale >= 1:
            raise ScheduleError(f"guidance scale is 1 (none) or more; got {scale!r}")
        self.network, self.config, self.scale = network, config, float(scale)

    @torch.no_grad()
    def velocity(self, x_t: Tensor, sigma_t, labels: Tensor) -> Tensor:
        """u_t at states (B, C, H, W), noise level a float or (B,), labels (B,); no gradient."""
        sigma = torch.as_tensor(np.broadcast_to(sigma_t, x_t.shape[:1]).copy(), dtype=x_t.dtype)
        t = sigma.to(x_t.device) * self.config.num_timesteps
        if self.scale == 1:
            return self.network(x_t, t, labels)
        null = torch.full_like(labels, self.config.null_label)
        twice = self.network(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([null, labels]))
        u_uncond, u_cond = twice.chunk(2)
        return guide(u_cond, u_uncond, x_t, t, scale=self.scale, num_timesteps=self.config.num_timesteps)

    def sample(self, noise: Tensor, labels: Tensor, steps: int, *, shift: float = 1.0) -> Tensor:
        """Images by `steps` Euler steps from `noise` (B, C, H, W), even in raw time."""
        x_t = noise
        for sigma_t, sigma_next in pairwise(warp(np.linspace(1.0, 0.0, steps + 1), shift).tolist()):
            x_t = x_t + self.velocity(x_t, sigma_t, labels) * (sigma_next - sigma_t)
        return x_t


# How many samples a sheet shows, and how a teacher makes them: enough to see what it has learnt.
_PREVIEW_COUNT, _PREVIEW_STEPS, _PREVIEW_GUIDANCE = 40, 10, 1.5


def preview_inputs(config: DiTConfig) -> tuple[Tensor, Tensor]:
    """Noise and labels that sheets of samples are made from, always the same.

    Raises:
        ShapeError: the network makes no pictures.
    """
    if config.in_channels not in (1, 3):
        raise ShapeError(
            f"sheets of samples show 1 or 3 channels; the network makes {config.in_channels}: set sample_every to 0"
        )
    shape = (config.in_channels, config.sample_size, config.sample_size)
    noise = torch.from_numpy(philox_normal(0, range(_PREVIEW_COUNT), shape))
    return noise, torch.arange(_PREVIEW_COUNT) % config.num_classes


@dataclass(frozen=True)
class FlowMatchingConfig:
    """Settings of the teacher's training loss.

    Args:
        shift: shift of the uniform raw times at which the loss is taken.
        label_dropout: share of samples trained with the null class, for guidance.
    """

    shift: float = 1.0
    label_dropout: float = 0.1


def flow_matching_loss(
    network: nn.Module, x_0: Tensor, labels: Tensor, config: FlowMatchingConfig, random
) -> Tensor:
    """Mean squared error between the network's velocity and `noise - x_0`, at random noise levels.

    Source: Lipman et al., Flow Matching, arXiv:2210.02747.
    """
    batch = len(x_0)
    sigma = torch.from_numpy(warp(random.uniform((batch,)), config.shift)).to(x_0)
    dropped = torch.from_numpy(random.uniform((batch,)) < config.label_dropout).to(labels.device)
    noise = torch.from_numpy(random.normal(x_0.shape)).to(x_0)
    level = sigma.view(-1, *(1,) * (x_0.ndim - 1))
    x_t = (1 - level) * x_0 + level * noise
    architecture = unwrapped(network).config
    labels = torch.where(dropped, architecture.null_label, labels)
    u_t = network(x_t, sigma * architecture.num_timesteps, labels)
    return (u_t.float() - (noise - x_0)).square().mean()


def train_teacher(
    data: ImageData,
    architecture: DiTConfig,
    flow_matching: FlowMatchingConfig,
    training: TrainingConfig,
    folder: Path,
    *,
    run: RunConfig = DEFAULT_RUN,
    resume: bool = False,
) -> Checkpoint:
    """Train a DiT from scratch with flow matching, and leave its checkpoint in `folder`.

    Args:
        data: what to train on.
        architecture: of the network.
        flow_matching, training: settings of the loss and of the loop.
        run: how the run is carried out.
        resume: go on from the checkpoint in `folder`.

    Raises:
        CheckpointError, CheckFailedError and others: see `training.train`.
    """
    torch.manual_seed(training.seed)  # the initial weights
    network = DiT(architecture)

    def loss(network, x_0, conditioning, random):
        return flow_matching_loss(network, x_0, conditioning["labels"], flow_matching, random)

    inputs = preview_inputs(architecture) if run.sample_every else ()

    def preview(network):
        noise, labels = (tensor.to(next(network.parameters()).device) for tensor in inputs)
        guided = GuidedTeacher(network, architecture, _PREVIEW_GUIDANCE)
        return decode(guided.sample(noise, labels, _PREVIEW_STEPS, shift=flow_matching.shift).cpu().numpy())

    settings = {"flow_matching": asdict(flow_matching), "data": data.name}
    return train(
        network, loss, data, training, folder, kind="teacher", settings=settings, run=run, preview=preview,
        resume=resume,
    )  # fmt: skip
