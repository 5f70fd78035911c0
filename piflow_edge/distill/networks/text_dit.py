"""A small diffusion transformer steered by text: the encodings of a frozen text encoder in, an image's planes out.

Every block attends to the image and to the text at once: queries come from the image, keys and values from both. That
costs one matrix product a block for the text, where tokens of text that pass through the blocks themselves would cost
as much as tokens of the image, and small encoders such as MiniLM have already put the words into context. Unlike
cross-attention it needs no second softmax. The time and the pooled text modulate all blocks through one table with an
offset for each (adaLN-single of PixArt-alpha, arXiv:2310.00426); queries and keys are normalised (arXiv:2302.05442).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from piflow_edge.conditioning import Conditioner

from .dit import Head, PatchSizes, PatchTransformer, modulate, time_features
from .flow_network import Convention, FlowNetwork

# Added to the scores of tokens that are not to be seen: its exponential is 0, in fp16 too.
_HIDDEN = -1e4
# What steers it: hidden states (B, T, D), a mask (B, T), pooled vectors (B, P).
TEXT_INPUTS = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")


@dataclass(frozen=True)
class TextDiTConfig(PatchSizes):
    """Everything that fixes the architecture. Sizes in pixels of the latent, widths in features.

    Args:
        in_channels: channels of the state, C.
        sample_size: height and width of the state, or one number for both; another size is accepted at run time.
        patch_size: side of the square patch that becomes one token.
        hidden_size: width of a token; a multiple of 4 and of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        text_size: width of the encoder's hidden states, D.
        pooled_size: width of its pooled vectors.

    Raises:
        ShapeError: sizes that do not divide.
    """

    in_channels: int = 3
    sample_size: int | tuple[int, int] = 64
    patch_size: int = 8
    hidden_size: int = 192
    depth: int = 6
    num_heads: int = 3
    text_size: int = 384
    pooled_size: int = 384

    @classmethod
    def fitting(
        cls, shape: tuple[int, ...], conditioner: Conditioner, **sizes: int
    ) -> "TextDiTConfig | None":
        """Return the sizes for states (C, H, W) steered by text; None for other data."""
        widths = {spec.name: spec.shape[-1] for spec in conditioner.inputs}
        if set(widths) != set(TEXT_INPUTS):
            return None
        hidden, _, pooled = (widths[name] for name in TEXT_INPUTS)
        height, width = shape[1:]
        return cls(shape[0], (height, width), text_size=int(hidden), pooled_size=int(pooled), **sizes)


class TextDiT(PatchTransformer):
    """State, time and text -> prediction (B, out_channels, H, W)."""

    def __init__(self, config: TextDiTConfig):
        super().__init__(config)
        self.config = config
        width = config.hidden_size
        self.text_embed = nn.Sequential(nn.LayerNorm(config.text_size), nn.Linear(config.text_size, width))
        self.pooled_embed = nn.Sequential(
            nn.LayerNorm(config.pooled_size), nn.Linear(config.pooled_size, width)
        )
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(TextBlock(width, config.num_heads) for _ in range(config.depth))
        self.head = Head(width, config.patch_size**2 * config.in_channels)
        self._initialise()

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        pooled_projections: Tensor,
    ) -> Tensor:
        """Prediction at states `x_t` (B, C, H, W) and times `t` (B,).

        The text: hidden states (B, T, D), a mask (B, T) that is 0 for padding, pooled vectors (B, P).
        """
        tokens = self.embed_patches(x_t)
        time = self.time_mlp(time_features(t).to(tokens.dtype))
        emb = F.silu(time + self.pooled_embed(pooled_projections))
        table = self.modulation(emb).unflatten(-1, (6, -1))
        text = self.text_embed(encoder_hidden_states)
        seen = encoder_attention_mask.bool()
        # The image's tokens are always seen: (B, 1, 1, L + T), for all heads and queries. Finite, for fp16 and int8.
        seen = torch.cat([seen.new_ones(seen.shape[0], tokens.shape[1]), seen], dim=1)[:, None, None, :]
        mask = torch.where(seen, 0.0, _HIDDEN).to(tokens.dtype)
        for block in self.blocks:
            tokens = self.run_block(block, tokens, text, mask, table)
        return self.read_planes(tokens, emb, x_t)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # adaLN-zero: every block starts as the identity, and the prediction as 0.
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.head.out.weight)


class TextBlock(nn.Module):
    """Attention to image and text, and an MLP, each behind a modulated layer norm and a gate."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.offset = nn.Parameter(torch.zeros(6, width))
        self.qkv = nn.Linear(width, 3 * width)
        self.text_kv = nn.Linear(width, 2 * width)
        self.query_norm = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.key_norm = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.attention_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor, text: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (table + self.offset).unsqueeze(2).unbind(1)
        attended = self.attention(modulate(tokens, shift_a, scale_a), text, mask)
        tokens = torch.addcmul(tokens, gate_a, attended)
        return torch.addcmul(tokens, gate_m, self.mlp(modulate(tokens, shift_m, scale_m)))

    def attention(self, tokens: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self._heads(self.qkv(tokens), 3)
        text_key, text_value = self._heads(self.text_kv(text), 2)
        key = self.key_norm(torch.cat([key, text_key], dim=2))
        value = torch.cat([value, text_value], dim=2)
        mixed = attend(self.query_norm(query), key, value, mask)
        return self.attention_out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, features: Tensor, parts: int) -> tuple[Tensor, ...]:
        # (B, L, parts D) -> parts of (B, heads, L, D / heads)
        return features.unflatten(-1, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention of heads (B, H, L, D); `mask` is added to the scores."""
    if query.device.type == "cpu" and value.dtype == torch.bfloat16:
        # torch's fused attention takes 2.8 times as long as two products where the processor multiplies bfloat16.
        scores = (query.to(value) * query.shape[-1] ** -0.5) @ key.to(value).transpose(-1, -2)
        return (scores + mask).softmax(-1).to(value) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class TextDiTNetwork(FlowNetwork):
    """Our own DiT for text. It predicts x_0: at high noise that is a mean image, an easy thing to begin with."""

    family = "text-dit"
    inputs, optional_inputs = TEXT_INPUTS, ()

    def __init__(self, config: TextDiTConfig, convention: Convention | None = None):
        super().__init__(
            TextDiT(config),
            config.sample_shape,
            convention or Convention(predicts="x_0"),
            output_layer="head.out",
        )
        self.config = config

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "TextDiTNetwork":
        """Return a network of this architecture; the weights mean nothing yet."""
        return cls(TextDiTConfig(**description["config"]), Convention(**description["convention"]))

    def predict(self, x_t, t, conditioning):
        """See `FlowNetwork.predict`."""
        return self.module(x_t, t, **conditioning)

    def describe(self):
        """See `FlowNetwork.describe`."""
        return {"config": asdict(self.config), "convention": asdict(self.convention)}
