"""The teacher's side: classifier-free guidance, Euler sampling, and flow-matching training."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from piflow_edge.errors import ScheduleError
from piflow_edge.schedule import warp

from .dit import DiT


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
    """A DiT with classifier-free guidance as one velocity field.

    Args:
        network: a class-conditional DiT with a velocity head.
        scale: guidance scale, 1 or more; 1 asks the network once per call, above 1 for two samples per sample.
    """

    def __init__(self, network: DiT, scale: float = 1.0):
        if not scale >= 1:
            raise ScheduleError(f"guidance scale is 1 (none) or more; got {scale!r}")
        self.network, self.scale = network.eval().requires_grad_(False), float(scale)

    @torch.no_grad()
    def velocity(self, x_t: Tensor, sigma_t, labels: Tensor) -> Tensor:
        """u_t at states (B, C, H, W), noise level a float or (B,), labels (B,); no gradient."""
        config = self.network.config
        sigma = torch.as_tensor(np.broadcast_to(sigma_t, x_t.shape[:1]).copy(), dtype=x_t.dtype)
        t = sigma.to(x_t.device) * config.num_timesteps
        if self.scale == 1:
            return self.network(x_t, t, labels)
        null = torch.full_like(labels, config.null_label)
        twice = self.network(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([null, labels]))
        u_uncond, u_cond = twice.chunk(2)
        return guide(u_cond, u_uncond, x_t, t, scale=self.scale, num_timesteps=config.num_timesteps)

    def sample(self, noise: Tensor, labels: Tensor, steps: int, *, shift: float = 1.0) -> Tensor:
        """Images by `steps` Euler steps from `noise` (B, C, H, W), even in raw time."""
        return euler_sample(
            lambda x_t, sigma_t: self.velocity(x_t, sigma_t, labels), noise, steps, shift=shift
        )


def euler_sample(velocity: Callable, noise, steps: int, *, shift: float = 1.0):
    """Carry noise to data by Euler steps on `velocity(x_t, sigma_t)`, even in raw time. Any array library."""
    sigmas = warp(np.linspace(1.0, 0.0, steps + 1), shift).tolist()
    x_t = noise
    for sigma_t, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        x_t = x_t + velocity(x_t, sigma_t) * (sigma_next - sigma_t)
    return x_t


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
    network: DiT, x_0: Tensor, labels: Tensor, config: FlowMatchingConfig, random
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
    labels = torch.where(dropped, network.config.null_label, labels)
    u_t = network(x_t, sigma * network.config.num_timesteps, labels)
    return (u_t - (noise - x_0)).square().mean()
