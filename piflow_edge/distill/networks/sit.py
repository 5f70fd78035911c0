"""SiT and REPA checkpoints, and those of pi-Flow's own ImageNet teachers, as our DiT: the same network, other names."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from piflow_edge.distill.loop.checkpoint import state_dict
from piflow_edge.errors import CheckpointError

from .dit import DiT, DiTConfig, position_table
from .flow_network import Convention, DiTNetwork

# Name in SiT and REPA -> ours. `N` stands for the number of a block.
_SIT = {
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp": "time_mlp",
    "y_embedder.embedding_table": "class_embed",
    "blocks.N.attn.qkv": "blocks.N.qkv",
    "blocks.N.attn.proj": "blocks.N.attention_out",
    "blocks.N.mlp.fc1": "blocks.N.mlp.0",
    "blocks.N.mlp.fc2": "blocks.N.mlp.2",
    "blocks.N.adaLN_modulation.1": "blocks.N.modulation",
    "final_layer.adaLN_modulation.1": "head.modulation",
    "final_layer.linear": "head.out",
}
# In the checkpoints of Lakonik/piFlow, which name their layers as diffusers does.
_PIFLOW = {
    "pos_embed.proj": "patch_embed",
    "emb.timestep_embedder.linear_1": "time_mlp.0",
    "emb.timestep_embedder.linear_2": "time_mlp.2",
    "emb.class_embedder.embedding_table": "class_embed",
    "transformer_blocks.N.attn1.to_qkv": "blocks.N.qkv",
    "transformer_blocks.N.attn1.to_out.0": "blocks.N.attention_out",
    "transformer_blocks.N.ff.net.0.proj": "blocks.N.mlp.0",
    "transformer_blocks.N.ff.net.2": "blocks.N.mlp.2",
    "transformer_blocks.N.norm1.linear": "blocks.N.modulation",
    "proj_out_1": "head.modulation",
    "proj_out_2": "head.out",
}
# Not part of the velocity network: REPA's projections onto image features, fixed tables.
_LEFT_OUT = re.compile(r"(projectors\.|pos_embed$|pos_embed\.pos_embed$)")
# Attention heads of the published sizes S, B, L and XL, which the weights do not tell.
_NUM_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
# Saved tables are in float32, sometimes rounded to float16.
_TABLE_TOLERANCE = 1e-3


def load_sit(
    source: Path | Mapping[str, Tensor],
    *,
    sample_size: int | tuple[int, int],
    style: str = "sit",
    num_heads: int | None = None,
    convention: Convention | None = None,
) -> DiTNetwork:
    """A teacher from a SiT-like checkpoint.

    Args:
        source: a `.pt`, `.pth` or `.safetensors` file, or its state dict; of a training checkpoint the averaged
            weights are taken.
        sample_size: height and width of the latents, 32 for ImageNet at 256 pixels.
        style: "sit" (time runs from noise at 0 to data at 1), "repa" (from data at 0 to noise at 1), or "piflow" (as
            "repa"; the layers are named as in diffusers).
        num_heads: attention heads; None knows the published sizes.
        convention: where it is not that of `style`; a "piflow" network of the class-conditional DiT kind counts
            to 1000.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    if style not in ("sit", "repa", "piflow"):
        raise CheckpointError(f"style is 'sit', 'repa' or 'piflow'; got {style!r}")
    config, weights = read_dit_weights(state_dict(source), sample_size, style, num_heads)
    planes = len(weights["head.out.bias"]) // config.patch_size**2
    for name in ("head.out.weight", "head.out.bias"):  # of a learned variance, too: the velocity comes first
        places = weights[name].unflatten(0, (config.patch_size**2, planes))
        weights[name] = places[:, : config.in_channels].flatten(0, 1)
    module = DiT(config)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"this is no {style} checkpoint: {error}") from error
    convention = convention or Convention(reversed_time=style == "sit", num_timesteps=1.0)
    return DiTNetwork(config, convention, module).requires_grad_(False)


def read_dit_weights(
    weights: Mapping[str, Tensor], sample_size: int | tuple[int, int], style: str, num_heads: int | None
) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Return the sizes of a SiT-like network, and its weights by the names of our `DiT`; see `load_sit`.

    The output layer is as it was saved, however many planes it writes.
    """
    table = weights.get("pos_embed")
    weights = _rename_weights(weights, _PIFLOW if style == "piflow" else _SIT)
    try:
        embed, classes = weights["patch_embed.weight"], weights["class_embed.weight"]
        width, channels, patch, _ = embed.shape
        blocks = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
        _ = weights["head.out.weight"], weights["head.out.bias"]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"this is no {style} checkpoint: it lacks {error}") from error
    num_heads = num_heads or _NUM_HEADS.get(width)
    if num_heads is None:
        raise CheckpointError(f"a network of width {width} is none of the published sizes; give num_heads")
    sizes = {"hidden_size": width, "depth": len(blocks), "num_heads": num_heads}
    config = DiTConfig(channels, sample_size, patch, **sizes, num_classes=len(classes) - 1)
    if table is not None:
        _check_table(table, config)
    return config, weights


def _check_table(table: Tensor, config: DiTConfig) -> None:
    rows, columns = (side // config.patch_size for side in config.sample_shape[1:])
    ours = position_table(rows, columns, config.hidden_size, (rows, columns))
    if table.shape[-2:] != ours.shape or (table.squeeze(0) - ours).abs().max() > _TABLE_TOLERANCE:
        raise CheckpointError(
            f"its position table {tuple(table.shape)} is not the fixed one of a {rows} x {columns} grid; "
            "is sample_size right?"
        )


def _rename_weights(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    ours, unknown = {}, []
    for name, tensor in _join_projections(weights).items():
        if _LEFT_OUT.match(name):
            continue
        number = re.search(r"(?<=blocks\.)\d+", name)
        pattern = name.replace(f"blocks.{number.group()}.", "blocks.N.") if number else name
        match = next((key for key in names if pattern == key or pattern.startswith(key + ".")), None)
        if match is None:
            unknown.append(name)
            continue
        new = names[match] + pattern.removeprefix(match)
        new = "class_embed.weight" if new == "class_embed" else new
        ours[new.replace("blocks.N.", f"blocks.{number.group()}.") if number else new] = tensor
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} of its layers are not known here, {unknown[0]!r} for one: "
            "another architecture, or another style"
        )
    return ours


def _join_projections(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Separate projections to queries, keys and values as one."""
    result = {}
    for name, tensor in weights.items():
        if ".to_q." in name:
            parts = [weights[name.replace(".to_q.", f".to_{part}.")] for part in "qkv"]
            result[name.replace(".to_q.", ".to_qkv.")] = torch.cat(parts)
        elif ".to_k." not in name and ".to_v." not in name:
            result[name] = tensor
    return result
