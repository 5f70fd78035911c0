"""Adapters: a base transformer of diffusers, the authors' LoRA added to its weights, their output layers in its place.

`GMFluxTransformer2DModel`, `GMQwenImageTransformer2DModel`, `GMFlux2Transformer2DModel` and the DX classes, which the
authors' exporter names `DX...` and their loader by diffusers' own names.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from piflow_edge.distill.networks.diffusers_networks import (
    DiffusersNetwork,
    Flux2DiffusersNetwork,
    FluxDiffusersNetwork,
    QwenImageDiffusersNetwork,
)
from piflow_edge.distill.stored_weights import add_product, replace_weight
from piflow_edge.errors import CheckpointError

from .checkpoint_files import OfficialFiles
from .output_layers import append_logstd, build_linear, build_logstd, join_mixture_rows, read_policy_spec

# The authors' `patch_size`, which packs four places of a latent into a token.
_PLACES = 4
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"


class _Mixture(DiffusersNetwork):
    """Adds the log-std, which a small network makes of what modulates the base's output, as the last plane."""

    embed_time: Any  # of the base
    module: Any

    def predict(self, x_t, t, conditioning):
        """See `FlowNetwork.predict`."""
        planes = super().predict(x_t, t, conditioning)
        return append_logstd(planes, self.module.proj_out_logstds(self.embed_time(x_t, t, conditioning)))


class _PlainNodes:
    """Nodes and coefficients of a DX student are all velocities."""

    def split(self, head, planes, x_t, level):
        """See `FlowNetwork.split`."""
        return (planes.unflatten(1, (head.num_nodes, -1)),)


class GMFluxNetwork(_Mixture, FluxDiffusersNetwork):
    """`GMFluxTransformer2DModel`."""


class GMFlux2Network(_Mixture, Flux2DiffusersNetwork):
    """`GMFlux2Transformer2DModel`."""


class GMQwenImageNetwork(_Mixture, QwenImageDiffusersNetwork):
    """`GMQwenImageTransformer2DModel`."""


class DXFluxNetwork(_PlainNodes, FluxDiffusersNetwork):
    """`DXFluxTransformer2DModel`."""


class DXQwenImageNetwork(_PlainNodes, QwenImageDiffusersNetwork):
    """`DXQwenImageTransformer2DModel`."""


# The authors' class -> diffusers' class of the base, and ours. The last two rows are the names that a DX adapter must
# have for the authors' own loader.
ADAPTERS: dict[str, tuple[str, type[DiffusersNetwork]]] = {
    "GMFluxTransformer2DModel": ("FluxTransformer2DModel", GMFluxNetwork),
    "GMFlux2Transformer2DModel": ("Flux2Transformer2DModel", GMFlux2Network),
    "GMQwenImageTransformer2DModel": ("QwenImageTransformer2DModel", GMQwenImageNetwork),
    "DXFluxTransformer2DModel": ("FluxTransformer2DModel", DXFluxNetwork),
    "DXQwenImageTransformer2DModel": ("QwenImageTransformer2DModel", DXQwenImageNetwork),
    "FluxTransformer2DModel": ("FluxTransformer2DModel", DXFluxNetwork),
    "QwenImageTransformer2DModel": ("QwenImageTransformer2DModel", DXQwenImageNetwork),
}


def join_adapter(
    files: OfficialFiles,
    base: Any,
    sample_shape: tuple[int, ...],
    *,
    guidance: float | None = None,
    strength: float = 1.0,
) -> DiffusersNetwork:
    """Return the student that an adapter makes of a base transformer, which is changed in place.

    Args:
        files: of the adapter.
        base: of the class, and the sizes, that the adapter was trained on.
        sample_shape: (C, H, W) of the latents, before they are packed.
        guidance: what the base's guidance embedding is told; None is the family's own.
        strength: of the LoRA; the output layers are replaced whatever it is.

    Raises:
        CheckpointError: another base than the adapter's, or an adapter of a class that is not known.
    """
    if files.class_name not in ADAPTERS:
        raise CheckpointError(
            f"{files.class_name or 'this'} is no adapter that is known here; those are {', '.join(ADAPTERS)}"
        )
    base_class, kind = ADAPTERS[files.class_name]
    if type(base).__name__ != base_class:
        raise CheckpointError(
            f"{files.class_name} is an adapter for a {base_class}; the base is a {type(base).__name__}"
        )
    head = read_policy_spec(files, base.config.in_channels, "proj_out")
    layers = [name for name in files.weights if not name.endswith((_LORA_A, _LORA_B))]
    merge_lora(base, files.weights, strength)
    _replace_layers(base, files, layers)
    network: Any = kind(base, sample_shape)
    network.head = head
    if guidance is not None:
        network.guidance_embedding = guidance
    return network.eval().requires_grad_(False)


def merge_lora(module: nn.Module, weights: Mapping[str, Tensor], strength: float = 1.0) -> None:
    """Add `strength * B A` of every pair of low-rank matrices to the weight it adapts; alpha is the rank.

    Raises:
        CheckpointError: a pair without a partner, or for a layer that is not there or of another shape.
    """
    own = dict(module.named_parameters())
    for name, down in weights.items():
        if not name.endswith(_LORA_A):
            continue
        layer = name.removesuffix(_LORA_A)
        weight, up = own.get(f"{layer}.weight"), weights.get(layer + _LORA_B)
        if weight is None or up is None or tuple(weight.shape) != (up.shape[0], down.shape[1]):
            found = "no such layer" if weight is None else f"{tuple(weight.shape)}"
            raise CheckpointError(
                f"the adapter has a LoRA for {layer!r}, and the base has {found} there; is it of another base?"
            )
        add_product(weight, up, down, strength)


def _replace_layers(base: nn.Module, files: OfficialFiles, names: list[str]) -> None:
    if "proj_out_means.weight" in files.weights:
        rows = {
            kind: join_mixture_rows(files, kind, _PLACES, places_last=True) for kind in ("weight", "bias")
        }
        base.proj_out_logstds = build_logstd(files)
    else:
        rows = {kind: files.tensor(f"proj_out.{kind}") for kind in ("weight", "bias")}
    base.proj_out = build_linear(rows["weight"], rows["bias"])
    own = dict(base.named_parameters())
    for name in names:
        if name.startswith("proj_out"):
            continue
        if name not in own or own[name].shape != files.weights[name].shape:
            raise CheckpointError(
                f"the adapter replaces {name!r}, which the base has not, or in another shape"
            )
        replace_weight(own[name], files.weights[name])
