"""The teacher's side: classifier-free guidance, Euler sampling, and flow-matching training."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from piflow_edge.distill.data.datasets import ImageData
from piflow_edge.distill.loop.checkpoint import Checkpoint
from piflow_edge.distill.loop.training import DEFAULT_RUN, RunConfig, TrainingConfig, train
from piflow_edge.distill.networks.dit import DiTConfig
from piflow_edge.distill.networks.flow_network import DiTNetwork, FlowNetwork, Teacher
from piflow_edge.errors import ScheduleError, ShapeError
from piflow_edge.noise import philox_normal
from piflow_edge.runtime.images import decode
from piflow_edge.schedule import warp


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


@dataclass(frozen=True)
class GuidanceConfig:
    """How a teacher is guided.

    Args:
        scale: of classifier-free guidance; 1 is none and asks the network once per call, more asks it twice, within
            `interval`.
        interval: noise levels, both ends included, outside which the scale is 1; None is everywhere.
        orthogonal: share of the push along the predicted x_0 that is taken out.

    Raises:
        ScheduleError: a setting out of range.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    orthogonal: float = 0.0

    def __post_init__(self):
        if not self.scale >= 1:
            raise ScheduleError(f"guidance scale is 1 (none) or more; got {self.scale!r}")
        if self.interval is not None:
            low, high = self.interval
            if not 0 <= low <= high <= 1:
                raise ScheduleError(f"a guidance interval runs up within [0, 1]; got {self.interval}")
            object.__setattr__(self, "interval", (low, high))  # from JSON it comes as a list


class GuidedTeacher:
    """A teacher with classifier-free guidance as one velocity field.

    Args:
        teacher: the network.
        guidance: see `GuidanceConfig`.
        null: what stands for "no condition", one entry without the batch axis per name; for a text model the
            embeddings of the null prompt. None is what the network says. Names that are not in it stay as they are.

    Raises:
        ScheduleError: guidance is wanted and nothing says what "no condition" is.
    """

    def __init__(
        self,
        teacher: Teacher,
        guidance: GuidanceConfig = GuidanceConfig(),
        *,
        null: Mapping[str, Tensor] | None = None,
    ):
        null = getattr(teacher, "null", {}) if null is None else null
        if guidance.scale > 1 and not null:
            raise ScheduleError(
                "guidance needs to know what stands for 'no condition'; give the null condition, or scale 1"
            )
        self.teacher, self.guidance, self.null = teacher, guidance, dict(null)

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
        asked = {}
        for name, given in conditioning.items():
            null = self.null[name].to(given).expand_as(given) if name in self.null else given
            asked[name] = torch.cat([null[pushed], given])
        both = self.teacher.velocity(
            torch.cat([x_t[pushed], x_t]), torch.cat([sigma[pushed], sigma]), **asked
        )
        u_cond = both[len(pushed) :]
        u_uncond = u_cond.index_copy(0, pushed, both[: len(pushed)])
        # In units in which the network's time is the noise level.
        return guide(u_cond, u_uncond, x_t, sigma, num_timesteps=1.0, **vars(self.guidance))

    def sample(self, noise: Tensor, steps: int, *, shift: float = 1.0, **conditioning: Tensor) -> Tensor:
        """Images by `steps` Euler steps from `noise` (B, C, *S), even in raw time."""
        x_t = noise
        for sigma_t, sigma_next in pairwise(warp(np.linspace(1.0, 0.0, steps + 1), shift).tolist()):
            x_t = x_t + self.velocity(x_t, sigma_t, **conditioning) * (sigma_next - sigma_t)
        return x_t


# How many samples a sheet shows, and how a teacher makes them: enough to see what it has learnt.
_PREVIEW_COUNT, _PREVIEW_STEPS, _PREVIEW_GUIDANCE = 40, 10, 1.5


def preview_inputs(network: FlowNetwork) -> tuple[Tensor, Tensor]:
    """Noise and labels that sheets of samples are made from, always the same.

    Raises:
        ShapeError: the network makes no pictures, or not from labels.
    """
    if network.sample_shape[0] not in (1, 3) or network.num_classes is None:
        raise ShapeError(
            "sheets of samples show 1 or 3 channels, made from labels; the network makes "
            f"{network.sample_shape[0]}{'' if network.num_classes else ' and takes none'}: set sample_every to 0"
        )
    noise = torch.from_numpy(philox_normal(0, range(_PREVIEW_COUNT), network.sample_shape))
    return noise, torch.arange(_PREVIEW_COUNT) % network.num_classes


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
    network: nn.Module, x_0: Tensor, labels: Tensor, null_label: int, config: FlowMatchingConfig, random
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
    labels = torch.where(dropped, null_label, labels)
    u_t = network(x_t, sigma, labels=labels)
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
    network = DiTNetwork(architecture)

    def loss(network, x_0, conditioning, random):
        labels, null = conditioning["labels"], architecture.null_label
        return flow_matching_loss(network, x_0, labels, null, flow_matching, random)

    inputs = preview_inputs(network) if run.sample_every else ()

    def preview(network):
        noise, labels = (tensor.to(next(network.parameters()).device) for tensor in inputs)
        guided = GuidedTeacher(network, GuidanceConfig(_PREVIEW_GUIDANCE))
        images = guided.sample(noise, _PREVIEW_STEPS, shift=flow_matching.shift, labels=labels)
        return decode(images.cpu().numpy())

    settings = {"flow_matching": asdict(flow_matching), "data": data.name}
    return train(
        network, loss, data, training, folder, kind="teacher", settings=settings, run=run, preview=preview,
        resume=resume,
    )  # fmt: skip
