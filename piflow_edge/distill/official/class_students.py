"""`GMDiTTransformer2DModelV2` and `DXDiTTransformer2DModel`: the authors' class-conditional students as our DiT."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from piflow_edge.distill.networks.dit import DiT, DiTConfig
from piflow_edge.distill.networks.flow_network import Convention, DiTNetwork
from piflow_edge.distill.networks.sit import read_dit_weights
from piflow_edge.errors import CheckpointError

from .checkpoint_files import OfficialFiles
from .output_layers import append_logstd, build_logstd, join_mixture_rows, read_policy_spec

# Side of the states of the published networks, latents of ImageNet at 256 pixels.
_USUAL_SIZE = 32
# Layer norms before the MLP have diffusers' default floor, all others 1e-6.
_MLP_NORM_EPS = 1e-5
_HEAD = ("proj_out_means.", "proj_out_logweights.", "proj_out_logstds.")


class MixtureDiT(DiT):
    """A DiT whose last plane is a log-std, which a small network makes of time and class."""

    def __init__(self, config: DiTConfig, planes: int, logstd: nn.Module):
        super().__init__(config)
        self.head.out = nn.Linear(config.hidden_size, config.patch_size**2 * planes)
        self.out_channels, self.logstd = planes, logstd

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """See `DiT.forward`."""
        emb = self.embed(t, labels)
        return append_logstd(self.predict(x_t, emb), self.logstd(emb))


class PlainNodesNetwork(DiTNetwork):
    """A DX student whose nodes, or coefficients, are all velocities, as the authors' are."""

    def split(self, head: Any, planes, x_t, level):
        """See `FlowNetwork.split`."""
        return (planes.unflatten(1, (head.num_nodes, -1)),)


def build_class_student(files: OfficialFiles, num_timesteps: float) -> DiTNetwork:
    """Return a class-conditional student as a network of ours, with its policy head.

    Raises:
        CheckpointError: weights of another architecture.
    """
    _, channels, side, _ = files.tensor("pos_embed.proj.weight").shape
    places = side**2
    head = read_policy_spec(files, places * channels, "proj_out_2")
    is_mixture = "proj_out_means.weight" in files.weights
    plain = {name: v.float() for name, v in files.weights.items() if not name.startswith(_HEAD)}
    if is_mixture:
        rows = {
            kind: join_mixture_rows(files, kind, places, places_last=False) for kind in ("weight", "bias")
        }
        plain |= {f"proj_out_2.{kind}": value for kind, value in rows.items()}
    size = files.config.get("sample_size", _USUAL_SIZE)
    config, weights = read_dit_weights(plain, size, "piflow", files.config.get("num_attention_heads"))
    config = replace(config, mlp_norm_eps=float(files.config.get("norm_eps", _MLP_NORM_EPS)))
    planes = len(weights["head.out.bias"]) // places
    if is_mixture:
        module: DiT = MixtureDiT(config, planes, nn.Identity())
    else:
        module = DiT(config)
        module.head.out, module.out_channels = nn.Linear(config.hidden_size, places * planes), planes
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"this is no {files.class_name or 'class-conditional student'}: {error}"
        ) from error
    if is_mixture:
        module.logstd = build_logstd(files, activated=True)
    kind = DiTNetwork if is_mixture else PlainNodesNetwork
    network = kind(config, Convention(num_timesteps=num_timesteps), module)
    network.head = head
    return network.to(torch.float32).eval().requires_grad_(False)
