"""A diffusion transformer (DiT) with adaLN-zero, class-conditional with a null class.

It follows Peebles & Xie (arXiv:2212.09748): patches, fixed sin/cos positions, one embedding of time and class that
modulates every block. SiT and REPA checkpoints are of the same architecture.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from piflow_edge.conditioning import Conditioner
from piflow_edge.distill.configs import NetworkSizes
from piflow_edge.errors import ShapeError

# Width of the sin/cos time features before their MLP, as in DiT.
TIME_FEATURES = 256
# What steers it: class ids (B,), of which the one after the last class is the null class.
CLASS_INPUT = "labels"


class PatchSizes:
    """What the sizes of a DiT must hold, and the shape that they give; of dataclasses with these fields."""

    in_channels: int
    sample_size: int | tuple[int, int]
    patch_size: int
    hidden_size: int
    num_heads: int

    def __post_init__(self):
        if self.hidden_size % 4 or self.hidden_size % self.num_heads:
            raise ShapeError(
                f"hidden_size is a multiple of 4 and of num_heads; got {self.hidden_size} and {self.num_heads}"
            )
        if not isinstance(self.sample_size, int):  # JSON has lists; equal sides are one number
            height, width = self.sample_size
            object.__setattr__(self, "sample_size", height if height == width else (height, width))
        if any(side % self.patch_size for side in self.sample_shape[1:]):
            raise ShapeError(
                f"sample_size is a multiple of patch_size; got {self.sample_size} and {self.patch_size}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.sample_shape[1] // self.patch_size, self.sample_shape[2] // self.patch_size

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a state."""
        size = self.sample_size
        return (self.in_channels, *(size if isinstance(size, tuple) else (size, size)))


@dataclass(frozen=True)
class DiTConfig(PatchSizes):
    """Everything that fixes the architecture. Sizes in pixels of the latent, widths in features.

    Args:
        in_channels: channels of the state, C.
        sample_size: height and width of the state, or one number for both; another size is accepted at run time.
        patch_size: side of the square patch that becomes one token.
        hidden_size: width of a token; a multiple of 4 and of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        num_classes: real classes; label `num_classes` is the null class.
        mlp_norm_eps: floor of the layer norm before the MLP; pi-Flow's own networks have 1e-5.

    Raises:
        ShapeError: sizes that do not divide.
    """

    in_channels: int = 1
    sample_size: int | tuple[int, int] = 8
    patch_size: int = NetworkSizes.patch_size
    hidden_size: int = NetworkSizes.hidden_size
    depth: int = NetworkSizes.depth
    num_heads: int = NetworkSizes.num_heads
    num_classes: int = 10
    mlp_norm_eps: float = 1e-6

    @classmethod
    def fitting(cls, shape: tuple[int, ...], conditioner: Conditioner, **sizes: int) -> "DiTConfig | None":
        """Return the sizes for states (C, H, W) steered by class; None for other data."""
        null = conditioner.null(1) or {}
        if set(null) != {CLASS_INPUT}:
            return None
        height, width = shape[1:]
        return cls(shape[0], (height, width), num_classes=int(null[CLASS_INPUT][0]), **sizes)


class PatchTransformer(nn.Module):
    """What both DiTs share: the state as tokens with positions, blocks that may compute again, planes from a head.

    Subclasses add `blocks` and `head`. `out_channels` says how many planes the layer `head.out` writes: C, unless a
    policy head has widened it.
    """

    positions: Tensor
    head: "Head"

    def __init__(self, config: PatchSizes):
        super().__init__()
        self.out_channels, self._sizes = config.in_channels, config
        width, patch = config.hidden_size, config.patch_size
        self.patch_embed = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        self.time_mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("positions", position_table(*config.grid, width, config.grid), persistent=False)
        self.checkpoints_gradients = False

    def enable_gradient_checkpointing(self) -> None:
        """From now on keep a block's input only, and compute the rest again in the backward pass: slower, smaller."""
        self.checkpoints_gradients = True

    def embed_patches(self, x_t: Tensor) -> Tensor:
        """Tokens (B, L, D) of states `x_t` (B, C, H, W), with their positions."""
        tokens, grid = self.patch_embed(x_t).flatten(2).transpose(1, 2), self._grid_of(x_t)
        if grid == self._sizes.grid:
            return tokens + self.positions.to(tokens)
        return tokens + position_table(*grid, self._sizes.hidden_size, self._sizes.grid).to(tokens)

    def run_block(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """A block's tokens."""
        if self.checkpoints_gradients and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def read_planes(self, tokens: Tensor, emb: Tensor, x_t: Tensor) -> Tensor:
        """Planes (B, M, H, W) of the last tokens, modulated by `emb`."""
        return unpatchify(
            self.head(tokens, emb), self._grid_of(x_t), self._sizes.patch_size, self.out_channels
        )

    def _grid_of(self, x_t: Tensor) -> tuple[int, int]:
        patch = self._sizes.patch_size
        return x_t.shape[-2] // patch, x_t.shape[-1] // patch


class DiT(PatchTransformer):
    """State, time and class -> prediction (B, out_channels, H, W)."""

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.config = config
        width = config.hidden_size
        self.class_embed = nn.Embedding(config.num_classes + 1, width)
        self.blocks = nn.ModuleList(
            Block(width, config.num_heads, config.mlp_norm_eps) for _ in range(config.depth)
        )
        self.head = Head(width, config.patch_size**2 * config.in_channels)
        self._initialise()

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Prediction at states `x_t` (B, C, H, W), times `t` (B,), class ids (B,)."""
        return self.predict(x_t, self.embed(t, labels))

    def embed(self, t: Tensor, labels: Tensor) -> Tensor:
        """The embedding of time and class that modulates every block, (B, hidden_size)."""
        features = time_features(t).to(self.class_embed.weight.dtype)
        return F.silu(self.time_mlp(features) + self.class_embed(labels))

    def predict(self, x_t: Tensor, emb: Tensor) -> Tensor:
        """Prediction at states `x_t`, modulated by `emb`."""
        tokens = self.embed_patches(x_t)
        for block in self.blocks:
            tokens = self.run_block(block, tokens, emb)
        return self.read_planes(tokens, emb, x_t)

    def _initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_embed.weight, std=0.02)
        # adaLN-zero: every block starts as the identity, and the velocity as 0.
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.head.modulation.weight)
        nn.init.zeros_(self.head.out.weight)


class Block(nn.Module):
    """Attention and MLP, each behind a modulated layer norm and a gate."""

    def __init__(self, width: int, num_heads: int, mlp_norm_eps: float = 1e-6):
        super().__init__()
        self.num_heads, self.mlp_norm_eps = num_heads, mlp_norm_eps
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor, emb: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            self.modulation(emb).unsqueeze(1).chunk(6, dim=-1)
        )
        tokens = torch.addcmul(tokens, gate_a, self.attention(modulate(tokens, shift_a, scale_a)))
        return torch.addcmul(tokens, gate_m, self.mlp(modulate(tokens, shift_m, scale_m, self.mlp_norm_eps)))

    def attention(self, tokens: Tensor) -> Tensor:
        # (B, L, 3 D) -> three of (B, heads, L, D / heads)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.attention_out(mixed.transpose(1, 2).flatten(2))


class Head(nn.Module):
    """Tokens -> the prediction's patches, (B, L, rows of `out`)."""

    def __init__(self, width: int, rows: int):
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, rows)

    def forward(self, tokens: Tensor, emb: Tensor) -> Tensor:
        return self.out(modulate(tokens, *self.modulation(emb).unsqueeze(1).chunk(2, dim=-1)))


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm without parameters of its own, then the embedding's scale and shift."""
    return torch.addcmul(shift, F.layer_norm(tokens, tokens.shape[-1:], eps=eps), 1 + scale)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int, planes: int) -> Tensor:
    """(B, rows * columns, p * p * M), features in the order (p, p, M) -> (B, M, rows p, columns p)."""
    x = tokens.unflatten(2, (patch, patch, planes)).unflatten(1, grid)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, M, rows, p, columns, p)
    return x.flatten(4, 5).flatten(2, 3)


def time_features(t: Tensor) -> Tensor:
    """[cos, sin] of the time at 128 frequencies from 1 down to 1/10000, (B, 256)."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000.0) / half))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(rows: int, columns: int, width: int, trained_on: tuple[int, int]) -> Tensor:
    """Fixed sin/cos positions, (rows * columns, width): first half from the column, second from the row.

    A grid other than the one trained on, rows and columns, is stretched onto it.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def waves(count, trained):
        angles = torch.arange(count, dtype=torch.float64)[:, None] * (trained / count) * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    column = waves(columns, trained_on[1])[None, :, :].expand(rows, columns, width // 2)
    row = waves(rows, trained_on[0])[:, None, :].expand(rows, columns, width // 2)
    return torch.cat([column, row], dim=-1).reshape(rows * columns, width).float()
