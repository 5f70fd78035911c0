"""How a teacher's output layer is widened into a policy head.

A network writes `num_planes` planes of the state's size instead of C. The kind of the policy says which plane is which
part of it, and gives the widened layer weights with which the student starts as its teacher.
"""

from typing import Any

import torch
from torch import Tensor, nn

from piflow_edge.errors import ShapeError
from piflow_edge.policies import PolicySpec


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
        layer = self.teacher if self.as_teacher else self.policy
        assert layer is not None, "only a student that shares its teacher's trunk is switched back"
        return layer(features)


def widen_layer(
    layer: nn.Module,
    head: PolicySpec,
    channels: int,
    planes: int,
    *,
    channel_major: bool,
    seed: int,
) -> nn.Linear | nn.Conv2d:
    """A layer like `layer` that writes the head's planes, with which the policy is the teacher's velocity.

    Args:
        layer: the teacher's output layer.
        head: the kind of the student's policy.
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
    tensors = head.widen(
        canonical(layer.weight), canonical(bias), lambda *shape: torch.randn(*shape, generator=generator)
    )
    weight, bias = ((t if channel_major else t.transpose(0, 1)).flatten(0, 1) for t in tensors)
    if isinstance(layer, nn.Conv2d):
        sizes: Any = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        wide = nn.Conv2d(layer.in_channels, len(bias), *sizes, padding_mode=layer.padding_mode)
    else:
        wide = nn.Linear(layer.in_features, len(bias))
    wide = wide.to(layer.weight)
    wide.load_state_dict({"weight": weight, "bias": bias})
    return wide
