"""What pi-Flow is compared with: its teacher cut short, and three other ways to distil a teacher.

One notation for all: x_t = (1 - sigma) x_0 + sigma noise, u_t = dx/dsigma, times are noise levels. Where a paper has
another, it is converted here. Teachers are functions `velocity(x_t, sigma) -> u_t`, guided or not; a student is a
network called as `network(x_t, sigma, **conditioning)`. Hyper-parameters are the papers'; none was tuned.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from piflow_edge.distill.networks.dit import DiT, time_features
from piflow_edge.distill.networks.flow_network import DiTNetwork

# (x_t (B, C, H, W), sigma: a float or (B,)) -> u_t
Velocity = Callable[[Tensor, np.ndarray | float], Tensor]
Network = Callable[..., Tensor]
Conditioning = Mapping[str, Tensor]


def level(sigma: np.ndarray | float, like: Tensor) -> Tensor:
    """Noise levels, a float or (B,), so that they broadcast with states."""
    values = np.broadcast_to(np.asarray(sigma, np.float64), like.shape[:1]).copy()
    return torch.from_numpy(values).to(like).view(-1, *(1,) * (like.ndim - 1))


def per_sample(sigma: np.ndarray | float, like: Tensor) -> Tensor:
    """Noise levels as a network takes them, (B,)."""
    return level(sigma, like).flatten()


def add_noise(x_0: Tensor, sigma: np.ndarray, random) -> tuple[Tensor, Tensor]:
    """States at `sigma` (B,) of data `x_0`, and the noise in them."""
    noise = torch.from_numpy(random.normal(tuple(x_0.shape))).to(x_0)
    return x_0 + level(sigma, x_0) * (noise - x_0), noise


# The teacher cut short. All take the levels of their steps, falling from 1.


def euler(velocity: Velocity, x_t: Tensor, sigmas: Sequence[float]) -> Tensor:
    """One call a step."""
    for sigma_t, sigma_next in pairwise(sigmas):
        x_t = x_t + velocity(x_t, sigma_t) * (sigma_next - sigma_t)
    return x_t


def heun(velocity: Velocity, x_t: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Two calls a step, the last of them at sigma 0, where a velocity, unlike a score, is finite."""
    for sigma_t, sigma_next in pairwise(sigmas):
        x_t = heun_step(velocity, x_t, sigma_t, sigma_next)
    return x_t


def heun_step(
    velocity: Velocity, x_t: Tensor, sigma_t: np.ndarray | float, sigma_next: np.ndarray | float
) -> Tensor:
    step = level(sigma_next, x_t) - level(sigma_t, x_t)
    u_t = velocity(x_t, sigma_t)
    u_next = velocity(x_t + step * u_t, sigma_next)
    return x_t + step * (u_t + u_next) / 2


def dpm_solver_2m(velocity: Velocity, x_t: Tensor, sigmas: Sequence[float]) -> Tensor:
    """DPM-Solver++(2M): x_0 extrapolated in half the log-SNR, lambda = log(alpha / sigma); one call a step.

    Of first order, which is Euler's step, where there is no earlier call and on the last step down to 0, as usual for
    few steps (`lower_order_final`); so one or two steps are Euler's. Pure noise counts as level 0.999, as in diffusers.

    Source: Lu et al., DPM-Solver++, arXiv:2211.01095, Algorithm 2.
    """

    def log_snr(sigma):
        sigma = min(sigma, 0.999)
        return np.log((1 - sigma) / sigma)

    x_0_before = sigma_before = None
    for sigma_t, sigma_next in pairwise(sigmas):
        x_0 = extrapolated = x_t - sigma_t * velocity(x_t, sigma_t)
        if x_0_before is not None and sigma_next > 0:
            h_before = log_snr(sigma_t) - log_snr(sigma_before)
            h = log_snr(sigma_next) - log_snr(sigma_t)
            extrapolated = x_0 + h / (2 * h_before) * (x_0 - x_0_before)
        kept = sigma_next / sigma_t
        x_t = kept * x_t + (1 - kept) * extrapolated
        x_0_before, sigma_before = x_0, sigma_t
    return x_t


# Direct regression: the shortcut from where a segment starts to where the teacher leaves it.


@dataclass(frozen=True)
class Pairs:
    """States along the teacher's trajectories at the ends of all segments, (nfe + 1, M, C, H, W), and their labels."""

    sigmas: np.ndarray
    states: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, sigmas=self.sigmas, states=self.states.numpy(), labels=self.labels.numpy())

    @classmethod
    def load(cls, path: Path) -> "Pairs":
        with np.load(path) as arrays:
            return cls(
                arrays["sigmas"], torch.from_numpy(arrays["states"]), torch.from_numpy(arrays["labels"])
            )


def teacher_pairs(
    velocity: Velocity, noise: Tensor, labels: Tensor, sigmas: np.ndarray, substeps: int
) -> Pairs:
    """The teacher followed from `noise` by `substeps` Euler steps in every segment between `sigmas`.

    Source: Luhman & Luhman, Knowledge distillation in iterative generative models, arXiv:2101.02388.
    """
    states = [noise]
    for sigma_src, sigma_dst in pairwise(sigmas.tolist()):
        states.append(euler(velocity, states[-1], np.linspace(sigma_src, sigma_dst, substeps + 1).tolist()))
    return Pairs(sigmas, torch.stack(states).cpu(), labels.cpu())


def whole_numbers(random, count: int, size: int) -> np.ndarray:
    """`size` whole numbers below `count`, with repetition."""
    return (random.uniform((size,)) * count).astype(np.int64)


def regression_loss(network: Network, pairs: Pairs, batch: int, random, device) -> Tensor:
    """Squared error of the mean velocity that leads from a segment's start to the end the teacher reached."""
    picked = torch.from_numpy(whole_numbers(random, len(pairs), batch))
    segment = torch.from_numpy(whole_numbers(random, len(pairs.sigmas) - 1, batch))
    x_src, x_dst = (pairs.states[at, picked].to(device) for at in (segment, segment + 1))
    sigma_src, sigma_dst = pairs.sigmas[segment.numpy()], pairs.sigmas[segment.numpy() + 1]
    predicted = network(x_src, per_sample(sigma_src, x_src), labels=pairs.labels[picked].to(device))
    return (predicted - (x_dst - x_src) / level(sigma_dst - sigma_src, x_src)).square().mean()


# Consistency distillation: the prediction of x_0 is to be the same all along a trajectory.


@dataclass(frozen=True)
class ConsistencyConfig:
    """Of the paper's CIFAR-10 run: `steps` N of the grid, Heun's solver, uniform weights, squared L2.

    The grid is even in noise level here, where the paper's is even in its sigma^(1/7). `target_decay` is the paper's
    for the larger sets (0 for CIFAR-10).
    """

    steps: int = 18
    target_decay: float = 0.95


def consistency(network: Network, x_t: Tensor, sigma: np.ndarray | float, **conditioning: Tensor) -> Tensor:
    """f(x_t, sigma), a prediction of x_0: c_skip = 1 and c_out = -sigma, so that f(x, 0) = x whatever the network."""
    return x_t - level(sigma, x_t) * network(x_t, per_sample(sigma, x_t), **conditioning)


def consistency_loss(
    network: Network,
    target: Network,
    velocity: Velocity,
    x_0: Tensor,
    conditioning: Conditioning,
    random,
    config: ConsistencyConfig,
) -> Tensor:
    """Squared distance between f at neighbouring levels of one trajectory; the lower one is the target's.

    Source: Song et al., Consistency models, arXiv:2303.01469, Algorithm 2.
    """
    lower = whole_numbers(random, config.steps, len(x_0))
    sigma_t, sigma_next = (lower + 1) / config.steps, lower / config.steps
    x_t, _ = add_noise(x_0, sigma_t, random)
    with torch.no_grad():
        x_next = heun_step(velocity, x_t, sigma_t, sigma_next)
        wanted = consistency(target, x_next, sigma_next, **conditioning)
    return (consistency(network, x_t, sigma_t, **conditioning) - wanted).square().mean()


@torch.no_grad()
def follow(target: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the target's weights towards the network's: target = decay * target + (1 - decay) * network."""
    for mine, theirs in zip(target.parameters(), network.parameters(), strict=True):
        mine.lerp_(theirs, 1 - decay)


def consistency_sample(
    network: Network,
    noise: Tensor,
    sigmas: Sequence[float],
    fresh: Callable[[int], Tensor],
    **conditioning: Tensor,
) -> Tensor:
    """Predict x_0, noise it to the next level with fresh noise, predict again; one call a level, 0 left out.

    Source: Song et al., arXiv:2303.01469, Algorithm 1.
    """
    x_0 = consistency(network, noise, sigmas[0], **conditioning)
    for draw, sigma in enumerate(sigmas[1:-1], 1):
        x_0 = consistency(network, x_0 + sigma * (fresh(draw) - x_0), sigma, **conditioning)
    return x_0


# MeanFlow: the mean velocity between any two levels.


@dataclass(frozen=True)
class MeanFlowConfig:
    """Of the paper's CIFAR-10 run: both levels from a logit-normal (`mean`, `std`), apart in a `share` of samples;
    weight (error^2 + `floor`)^-`power`."""

    mean: float = -2.0
    std: float = 2.0
    share: float = 0.75
    power: float = 0.75
    floor: float = 1e-3


class MeanFlowDiT(DiT):
    """A DiT that also takes the `span` of levels, t - r, over which its velocity is the mean."""

    def __init__(self, config, span_scale: float):
        super().__init__(config)
        self.span_scale = span_scale
        self.span_mlp = copy.deepcopy(self.time_mlp)
        for parameter in self.span_mlp[-1].parameters():
            nn.init.zeros_(parameter)  # whatever the span, it starts as the teacher

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor, span: Tensor) -> Tensor:
        dtype = self.class_embed.weight.dtype
        times, spans = (time_features(n).to(dtype) for n in (t, span * self.span_scale))
        return self.predict(
            x_t, F.silu(self.time_mlp(times) + self.span_mlp(spans) + self.class_embed(labels))
        )


class MeanFlowNetwork(DiTNetwork):
    """The teacher's DiT with a second time; called with `span` (B,) among the conditioning."""

    family = "mean-flow-dit"

    def __init__(self, teacher: DiTNetwork):
        # In units in which the fastest time feature makes less than one turn; see `mean_flow_from`.
        convention = dataclasses.replace(teacher.convention, num_timesteps=5.0)
        module = MeanFlowDiT(teacher.config, span_scale=convention.num_timesteps)
        module.load_state_dict(teacher.module.state_dict(), strict=False)
        super().__init__(teacher.config, convention, module)
        self.to(next(teacher.parameters()))


def mean_flow_from(teacher: DiTNetwork, *, steps: int = 800, seed: int = 0) -> MeanFlowNetwork:
    """A MeanFlow student that starts as its teacher, but for slow time features.

    The teacher's time features turn by up to 1,000 radians from noise to data, so along time its velocity is rough at
    steps of 0.005. Sampling does not feel that, but MeanFlow's derivative does: on the digits teacher most of it was
    roughness. So the time MLP is fitted anew on slow features, to give the same embedding.

    Source: the dense time embedding of SANA-Sprint, arXiv:2503.09641; Lu & Song, arXiv:2410.11081, section 4.
    """
    student = MeanFlowNetwork(teacher)
    fast, slow = teacher.module.time_mlp, student.module.time_mlp
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (slow[0], slow[2]):  # weights for other features are no start
            layer.weight.copy_(nn.init.xavier_uniform_(torch.empty(layer.weight.shape), generator=generator))
            layer.bias.zero_()
    slow.requires_grad_(True)
    optimizer = torch.optim.Adam(slow.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        sigma = torch.rand(256, generator=generator).to(slow[0].weight)
        with torch.no_grad():
            wanted = fast(time_features(teacher.convention.time(sigma)))
        loss = (slow(time_features(student.convention.time(sigma))) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    return student.requires_grad_(True)


def mean_flow_times(batch: int, random, config: MeanFlowConfig) -> tuple[np.ndarray, np.ndarray]:
    """Levels r <= t of every sample, (B,) each."""
    levels = 1 / (1 + np.exp(-(config.mean + config.std * random.normal((batch, 2)).astype(np.float64))))
    r, t = levels.min(1), levels.max(1)
    return np.where(random.uniform((batch,)) < config.share, r, t), t


def velocity_change(
    network: Network, x_t: Tensor, t: Tensor, span: Tensor, u_t: Tensor, conditioning: Conditioning
) -> Tensor:
    """d/dt of the mean velocity u(x_t, r, t) along the trajectory through `x_t` with velocity `u_t`, r held."""

    def mean_velocity(x_t, t, span):
        return network(x_t, t, span=span, **conditioning)

    # The other attention kernels have no forward-mode derivative.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        ones = torch.ones_like(t)
        return torch.func.jvp(mean_velocity, (x_t, t, span), (u_t, ones, ones))[1]


def mean_flow_loss(
    network: Network,
    velocity: Velocity,
    x_0: Tensor,
    conditioning: Conditioning,
    random,
    config: MeanFlowConfig,
) -> Tensor:
    """Weighted squared error of the MeanFlow identity u = v - (t - r) du/dt, with the teacher's velocity for v.

    Source: Geng et al., Mean flows for one-step generative modeling, arXiv:2505.13447, Algorithm 1.
    """
    r, t = mean_flow_times(len(x_0), random, config)
    x_t, _ = add_noise(x_0, t, random)
    u_t = velocity(x_t, t)
    sigma, span = per_sample(t, x_t), per_sample(t - r, x_t)
    change = velocity_change(network, x_t, sigma, span, u_t, conditioning)
    error = network(x_t, sigma, span=span, **conditioning) - (u_t - level(t - r, x_t) * change)
    squares = error.square().flatten(1).sum(1)
    return ((squares.detach() + config.floor) ** -config.power * squares).mean()


def mean_flow_sample(
    network: Network, noise: Tensor, sigmas: Sequence[float], **conditioning: Tensor
) -> Tensor:
    """x_r = x_t - (t - r) u(x_t, r, t), one call a step."""
    x_t = noise
    for t, r in pairwise(sigmas):
        span = per_sample(t - r, x_t)
        x_t = x_t - (t - r) * network(x_t, per_sample(t, x_t), span=span, **conditioning)
    return x_t
