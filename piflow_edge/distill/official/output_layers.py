"""The authors' output layers as ours: one layer for means and log-weights, and what gives the log-std beside it."""

from typing import Any

import torch
from torch import Tensor, nn

from piflow_edge.errors import CheckpointError
from piflow_edge.policies import DXPolicySpec, GMPolicySpec, PolicySpec

from .checkpoint_files import OfficialFiles

# GM's floor is the authors' class default, which their pipelines keep; see `read_policy_spec`.
_GM_EPS, _DX_EPS = 1e-6, 1e-4
_LOGSTD = "proj_out_logstds."


class ConstantLogStd(nn.Module):
    """A log-std that was fixed before training (`constant_logstd`)."""

    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def forward(self, emb: Tensor) -> Tensor:
        """Embedding (B, D) -> (B, 1)."""
        return torch.full_like(emb[:, :1], self.value)


def read_policy_spec(files: OfficialFiles, channels: int, rows: str) -> PolicySpec:
    """Return the kind of policy that a student's files say, with the authors' own numbers.

    Args:
        channels: values that one component, or one node, has in a row of the output layer: C times a patch's places.
        rows: name of the output layer of a DX student.
    """
    if "proj_out_means.weight" in files.weights:
        num_components = len(files.tensor("proj_out_means.weight")) // channels
        return GMPolicySpec(num_components, eps=_GM_EPS)
    settings = dict(files.policy)
    if settings.get("type") != "DX":
        raise CheckpointError(
            "a DX student's segment and shift are fixed since its training, and these files do not say them; give a "
            'configuration with "policy_config": {"type": "DX", "segment_size": ..., "shift": ...}'
        )
    num_nodes = len(files.tensor(f"{rows}.weight")) // channels
    return DXPolicySpec(
        num_nodes,
        segment_size=float(settings.get("segment_size", 1.0)),
        shift=float(settings.get("shift", 1.0)),
        mode=settings.get("mode", "grid"),
        eps=_DX_EPS,
    )


def build_logstd(files: OfficialFiles, *, activated: bool = False) -> nn.Module:
    """Return what makes the log-std, (B, 1), of the embedding that modulates the network's output.

    `activated`: whether that embedding has been through the first SiLU already.
    """
    constant = files.config.get("constant_logstd")
    if constant is not None:
        return ConstantLogStd(float(constant))
    places = sorted(
        int(name.removeprefix(_LOGSTD).split(".")[0])
        for name in files.weights
        if name.startswith(_LOGSTD) and name.endswith(".weight")
    )
    if not places:
        raise CheckpointError("this GM student has neither layers for its log-std nor a constant_logstd")
    layers: list[nn.Module] = []
    for place in places:
        weight, bias = (files.tensor(f"{_LOGSTD}{place}.{kind}") for kind in ("weight", "bias"))
        layers += [nn.SiLU(), build_linear(weight, bias)]
    return nn.Sequential(*layers[1 if activated else 0 :])


def build_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer with these weights."""
    layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


def join_mixture_rows(files: OfficialFiles, kind: str, places: int, *, places_last: bool) -> Tensor:
    """Means and log-weights as rows of one layer.

    Args:
        kind: "weight" or "bias".
        places: of a patch.
        places_last: rows run over what they mean first and a patch's places last, as of tokens that the caller packs;
            else the other way round, as in a DiT.
    """
    means, logweights = (files.tensor(f"proj_out_{part}.{kind}") for part in ("means", "logweights"))
    axis = 0 if places_last else 1
    split = (-1, places) if places_last else (places, -1)
    return torch.cat([rows.unflatten(0, split) for rows in (means, logweights)], dim=axis).flatten(0, 1)


def append_logstd(planes: Tensor, logstd: Tensor) -> Tensor:
    """Planes (B, M, H, W) and one more, which is the log-std (B, 1) everywhere."""
    plane = logstd.to(planes).view(-1, 1, 1, 1).expand(-1, -1, *planes.shape[2:])
    return torch.cat([planes, plane], dim=1)
