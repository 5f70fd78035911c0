"""Qwen-Image's attention with rotations in real numbers, at any size: complex ones do not go into a graph.

diffusers cuts its table of complex numbers by the sizes at hand, which an exporter takes for constants; here the angles
are computed of positions, in the same float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# One rotation as cosines and sines, (tokens, head_dim / 2).
Rotation = tuple[Tensor, Tensor]


def use_real_rotations(transformer: Any) -> None:
    """Let a `QwenImageTransformer2DModel` compute its positions here, in place."""
    transformer.pos_embed = CentredPositions(transformer.pos_embed.theta, transformer.pos_embed.axes_dim)
    for block in transformer.transformer_blocks:
        block.attn.processor = RealAttention()


class CentredPositions(nn.Module):
    """Angles of image tokens, whose rows and columns count from the image's middle, and of the text after them."""

    def __init__(self, theta: float, axes_dim: list[int]):
        super().__init__()
        self.theta, self.axes_dim = float(theta), list(axes_dim)

    def forward(self, img_shapes, max_txt_seq_len: int, device=None, **unused) -> tuple[Rotation, Rotation]:
        """`img_shapes`: [[(1, rows, columns)]], alike for the whole batch -> rotations of image and text tokens."""
        ((_, rows, columns),) = img_shapes[0]
        row, column = count_places(rows, columns, device)
        row, column = row - (rows - rows // 2), column - (columns - columns // 2)
        half = torch.maximum(*(torch.full((), side // 2, device=device) for side in (rows, columns)))
        word = torch.arange(max_txt_seq_len, device=device) + half
        return self._rotation(torch.zeros_like(row), row, column), self._rotation(word, word, word)

    def _rotation(self, *positions: Tensor) -> Rotation:
        angles = []
        for position, width in zip(positions, self.axes_dim, strict=True):
            powers = torch.arange(0, width, 2, device=position.device).to(torch.float32).div(width)
            angles.append(torch.outer(position.float(), 1.0 / torch.pow(self.theta, powers)))
        together = torch.cat(angles, dim=1)
        return together.cos(), together.sin()


class RealAttention:
    """Joint attention of text and image tokens, as `QwenDoubleStreamAttnProcessor2_0`; diffusers calls it so."""

    # diffusers sets these on every processor.
    _attention_backend = _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        text_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image tokens (B, L, D) and text tokens (B, T, D), of which `text_mask` are seen -> both, attended."""
        head_dim = attn.inner_dim // attn.heads
        heads = lambda features: features.unflatten(-1, (-1, head_dim))  # noqa: E731
        image = [heads(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        text = [
            heads(layer(encoder_hidden_states))
            for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        ]
        of_image, of_text = image_rotary_emb
        image[:2] = (
            rotate(norm(x), of_image) for norm, x in zip((attn.norm_q, attn.norm_k), image, strict=False)
        )
        norms = (attn.norm_added_q, attn.norm_added_k)
        text[:2] = (rotate(norm(x), of_text) for norm, x in zip(norms, text, strict=False))
        query, key, value = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(text, image, strict=True))
        mask = None
        if text_mask is not None:
            seen = torch.ones_like(hidden_states[:, :, 0], dtype=torch.bool)
            mask = torch.cat([text_mask.to(torch.bool), seen], dim=1)[:, None, None, :]
        joint = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        joint = joint.transpose(1, 2).flatten(2)
        words = encoder_hidden_states.shape[1]
        return attn.to_out[0](joint[:, words:]), attn.to_add_out(joint[:, :words])


def count_places(rows: int, columns: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Row and column of every token of a grid, int64 (rows columns,) each."""
    row = torch.arange(rows, device=device)[:, None].expand(rows, columns)
    column = torch.arange(columns, device=device)[None, :].expand(rows, columns)
    return row.flatten(), column.flatten()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn pairs of neighbours in (B, L, heads, head_dim) by the angles of their tokens."""
    cosine, sine = (part[None, :, None] for part in rotation)
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return turned.flatten(3).type_as(x)
