"""Policy heads: what a student's output planes mean, and how a teacher's output layer is widened into them.

A network writes `num_planes` planes of the state's size instead of C. A head says which plane is which part of the
policy, builds the policy, and gives the widened layer weights with which the student starts as its teacher.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from piflow_edge.errors import ShapeError
from piflow_edge.policies import DXPolicy, GMPolicy

# Spread of the components around the teacher's velocity, and their standard deviation, when a student starts; the
# authors' values (arXiv:2510.14974, released configurations).
_MEAN_SPREAD, _INITIAL_STD = 0.05, 0.05

# Predictions (B, G, C, *S), the network's own or x_0, as velocities of the same shape.
ToVelocity = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GMHead:
    """A Gaussian mixture per position.

    Planes: K * C means, component by component; K log-weights; one whose mean over positions is the log-std.

    Args:
        num_components: K, 1 or more.

    Raises:
        ShapeError: fewer.
    """

    num_components: int = 8
    kind: ClassVar[str] = "gm"
    outputs: ClassVar[tuple[str, ...]] = ("means", "logweights", "logstds")

    def __post_init__(self):
        _check_count("num_components", self.num_components)

    def num_planes(self, channels: int) -> int:
        """Planes the network must write for a state of `channels` channels."""
        return self.num_components * (channels + 1) + 1

    def output_shapes(self, sample_shape: tuple[int, ...]) -> list[list[int]]:
        """Shapes of `outputs` without the batch axis, for states (C, *S)."""
        channels, *size = sample_shape
        K = self.num_components
        return [[K, channels, *size], [K, 1, *size], [1, 1, *(1 for _ in size)]]

    def split(
        self, planes: Tensor, to_velocity: ToVelocity, x_0_to_velocity: ToVelocity
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, M, *S) -> means (B, K, C, *S), log-weights (B, K, 1, *S), log-std (B, 1, 1, *1)."""
        K = self.num_components
        means, logweights, logstds = planes.split([planes.shape[1] - K - 1, K, 1], dim=1)
        space = list(range(2, planes.ndim))
        return (
            to_velocity(means.unflatten(1, (K, -1))),
            logweights.unsqueeze(2).log_softmax(dim=1),
            logstds.mean(space, keepdim=True).unsqueeze(2),
        )

    def policy(
        self, outputs: tuple[Tensor, ...], x_src: Tensor, sigma_src: np.ndarray, eps: float
    ) -> GMPolicy:
        """The policy of one student call at `x_src` (B, C, *S), `sigma_src` (B,)."""
        return GMPolicy(*outputs, x_src, sigma_src, eps=eps)

    def initial(self, weight: Tensor, bias: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Every component: the teacher's output, plus a small constant of its own.

        The constant is alike at all places of a patch, so that the patch grid does not show. Weights are equal and
        the spread narrow: the policy's velocity is the teacher's.

        Args:
            weight, bias: of the teacher's output layer, (C, P, ...) and (C, P), P the places of a patch.

        Returns:
            Weight (M, P, ...) and bias (M, P).
        """
        channels, places = bias.shape
        K = self.num_components
        offsets = _MEAN_SPREAD * torch.randn(K, channels, 1, generator=generator)
        means_bias = (bias + offsets.to(bias)).reshape(K * channels, places)
        rest = weight.new_zeros(K + 1, *weight.shape[1:])
        rest_bias = bias.new_zeros(K + 1, places)
        rest_bias[-1] = math.log(_INITIAL_STD)
        weight = torch.cat([weight.repeat(K, *(1,) * (weight.ndim - 1)), rest])
        return weight, torch.cat([means_bias, rest_bias])


@dataclass(frozen=True)
class DXHead:
    """A row of x_0 predictions along the segment, or a polynomial's coefficients.

    Planes: N * C, node by node; node 0 is the one at the segment's end. A polynomial's coefficients from the first
    order on are written in units of x_0, not as velocities, so that they can start at zero.

    Args:
        num_nodes: N, 1 or more.
        segment_size: raw time the nodes span; fixed once trained.
        shift: shift of the raw time they are even in; fixed once trained.
        mode: "grid" or "polynomial".

    Raises:
        ShapeError: no nodes, or another mode.
    """

    num_nodes: int = 10
    segment_size: float = 1.0
    shift: float = 1.0
    mode: str = "grid"
    kind: ClassVar[str] = "dx"
    outputs: ClassVar[tuple[str, ...]] = ("grid",)

    def __post_init__(self):
        _check_count("num_nodes", self.num_nodes)
        if self.mode not in ("grid", "polynomial"):
            raise ShapeError(f"mode of a DX policy is 'grid' or 'polynomial'; got {self.mode!r}")

    def num_planes(self, channels: int) -> int:
        """Planes the network must write for a state of `channels` channels."""
        return self.num_nodes * channels

    def output_shapes(self, sample_shape: tuple[int, ...]) -> list[list[int]]:
        """Shapes of `outputs` without the batch axis, for states (C, *S)."""
        return [[self.num_nodes, *sample_shape]]

    def split(self, planes: Tensor, to_velocity: ToVelocity, x_0_to_velocity: ToVelocity) -> tuple[Tensor]:
        """(B, M, *S) -> grid (B, N, C, *S)."""
        nodes = planes.unflatten(1, (self.num_nodes, -1))
        if self.mode == "grid":
            return (to_velocity(nodes),)
        return (torch.cat([to_velocity(nodes[:, :1]), x_0_to_velocity(nodes[:, 1:])], dim=1),)

    def policy(
        self, outputs: tuple[Tensor, ...], x_src: Tensor, sigma_src: np.ndarray, eps: float
    ) -> DXPolicy:
        """The policy of one student call at `x_src` (B, C, *S), `sigma_src` (B,)."""
        return DXPolicy(
            *outputs,
            x_src,
            sigma_src,
            segment_size=self.segment_size,
            shift=self.shift,
            mode=self.mode,
            eps=eps,
        )

    def initial(self, weight: Tensor, bias: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Every node: the teacher's output. Of a polynomial only the constant, the rest 0. See `GMHead.initial`."""
        alike = self.num_nodes if self.mode == "grid" else 1
        zeros = (self.num_nodes - alike) * len(weight)
        weight = weight.repeat(alike, *(1,) * (weight.ndim - 1))
        return (
            torch.cat([weight, weight.new_zeros(zeros, *weight.shape[1:])]),
            torch.cat([bias.repeat(alike, 1), bias.new_zeros(zeros, bias.shape[1])]),
        )


Head = GMHead | DXHead

_HEADS = {"gm": GMHead, "dx": DXHead}


def head_from_json(description: dict) -> Head:
    """The head that `head_to_json` described."""
    description = dict(description)
    return _HEADS[description.pop("kind")](**description)


def head_to_json(head: Head) -> dict:
    """`kind` and the head's settings."""
    return {"kind": head.kind, **asdict(head)}


class PolicyProjection(nn.Module):
    """A student's output layer in the place of its teacher's, which it may keep beside it to be switched back to.

    Args:
        policy: the widened layer.
        teacher: the layer it took the place of, where teacher and student share a trunk; else None.
    """

    def __init__(self, policy: nn.Module, teacher: nn.Module | None = None):
        super().__init__()
        self.policy, self.teacher = policy, teacher
        self.as_teacher = False

    def forward(self, features: Tensor) -> Tensor:
        """Features of the trunk -> output, of the policy or of the teacher."""
        return self.teacher(features) if self.as_teacher else self.policy(features)


def widened(
    layer: nn.Linear | nn.Conv2d,
    head: Head,
    channels: int,
    planes: int,
    *,
    channel_major: bool,
    seed: int,
) -> nn.Linear | nn.Conv2d:
    """A layer like `layer` that writes the head's planes, with which the policy is the teacher's velocity.

    Args:
        layer: the teacher's output layer.
        head: of the student.
        channels: C of the state.
        planes: that `layer` writes: C, or more where only the first C are used (a learned variance, say).
        channel_major: whether its rows run over the channels first and a patch's places last, or the other way round.
        seed: of the components' offsets.

    Raises:
        ShapeError: the layer's rows are not patches of `planes` planes, or it is of a kind that cannot be widened.
    """
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        rows = layer.out_channels
    elif isinstance(layer, nn.Linear):
        rows = layer.out_features
    else:
        raise ShapeError(
            f"the output layer must be a Linear or an ungrouped Conv2d; it is a {type(layer).__name__}"
        )
    if rows % planes or planes < channels:
        raise ShapeError(
            f"the output layer writes {rows} rows, which are no patches of {planes} planes; "
            "name the layer that writes the prediction as output_layer"
        )
    order = (planes, rows // planes) if channel_major else (rows // planes, planes)

    def canonical(tensor):  # (rows, ...) -> (C, places, ...)
        parts = tensor.detach().unflatten(0, order)
        return (parts if channel_major else parts.transpose(0, 1))[:channels]

    bias = layer.bias if layer.bias is not None else layer.weight.new_zeros(rows)
    generator = torch.Generator().manual_seed(seed)
    tensors = head.initial(canonical(layer.weight), canonical(bias), generator)
    weight, bias = ((t if channel_major else t.transpose(0, 1)).flatten(0, 1) for t in tensors)
    if isinstance(layer, nn.Conv2d):
        wide = nn.Conv2d(
            layer.in_channels,
            len(bias),
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            padding_mode=layer.padding_mode,
        )
    else:
        wide = nn.Linear(layer.in_features, len(bias))
    wide = wide.to(layer.weight)
    with torch.no_grad():
        wide.weight.copy_(weight)
        wide.bias.copy_(bias)
    return wide


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ShapeError(f"{name} is 1 or more; got {value}")
