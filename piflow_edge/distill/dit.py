"""A diffusion transformer (DiT) with adaLN-zero, class-conditional with a null class, and its two heads.

The trunk follows Peebles & Xie (arXiv:2212.09748): patches, fixed sin/cos positions, one embedding of time and class
that modulates every block. A velocity head makes it a flow teacher; a Gaussian-mixture head a pi-Flow student.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from piflow_edge.errors import ShapeError

# Width of the sin/cos time features before their MLP, as in DiT.
_TIME_FEATURES = 256


@dataclass(frozen=True)
class DiTConfig:
    """Everything that fixes the architecture. Sizes in pixels of the latent, widths in features.

    Args:
        in_channels: channels of the state, C.
        sample_size: height and width of the state; another size is accepted at run time.
        patch_size: side of the square patch that becomes one token.
        hidden_size: width of a token; a multiple of 4 and of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        num_classes: real classes; label `num_classes` is the null class.
        num_timesteps: the network's time input is `sigma_t * num_timesteps`.
        num_components: K of the Gaussian-mixture head; 0 for a teacher's velocity head.
    """

    in_channels: int = 1
    sample_size: int = 8
    patch_size: int = 2
    hidden_size: int = 64
    depth: int = 4
    num_heads: int = 4
    num_classes: int = 10
    num_timesteps: float = 1000.0
    num_components: int = 0

    def __post_init__(self):
        if self.hidden_size % 4 or self.hidden_size % self.num_heads:
            raise ShapeError(
                f"hidden_size is a multiple of 4 and of num_heads; got {self.hidden_size} and {self.num_heads}"
            )
        if self.sample_size % self.patch_size:
            raise ShapeError(
                f"sample_size is a multiple of patch_size; got {self.sample_size} and {self.patch_size}"
            )

    @property
    def null_label(self) -> int:
        """Label that stands for 'no class'."""
        return self.num_classes


class DiT(nn.Module):
    """Trunk and head. Returns a velocity (B, C, H, W), or a GM policy's `(means, logweights, logstds)`."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.patch_embed = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        self.time_mlp = nn.Sequential(nn.Linear(_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.class_embed = nn.Embedding(config.num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, config.num_heads) for _ in range(config.depth))
        head = GMHead if config.num_components else VelocityHead
        self.head = head(config)
        side = config.sample_size // patch
        self.register_buffer("positions", position_table(side, side, width, side), persistent=False)
        self.checkpoints_gradients = False
        self._initialise()

    def enable_gradient_checkpointing(self) -> None:
        """From now on keep a block's input only, and compute the rest again in the backward pass: slower, smaller."""
        self.checkpoints_gradients = True

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor):
        """Network output at state `x_t` (B, C, H, W), time `t` (B,) = sigma * num_timesteps, labels (B,)."""
        patch = self.config.patch_size
        rows, columns = x_t.shape[-2] // patch, x_t.shape[-1] // patch
        tokens = self.patch_embed(x_t).flatten(2).transpose(1, 2)
        tokens = tokens + self._positions(rows, columns, tokens)
        emb = F.silu(self.time_mlp(time_features(t)) + self.class_embed(class_labels))
        for block in self.blocks:
            if self.checkpoints_gradients and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, emb, use_reentrant=False)
            else:
                tokens = block(tokens, emb)
        return self.head(tokens, emb, (rows, columns))

    def _positions(self, rows: int, columns: int, like: Tensor) -> Tensor:
        scale = self.config.sample_size // self.config.patch_size
        if rows == columns == scale:
            return self.positions.to(like)
        return position_table(rows, columns, self.config.hidden_size, scale).to(like)

    def _initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_embed.weight, std=0.02)
        # adaLN-zero: every block starts as the identity, and the velocity as 0.
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.head.modulation.weight)
        if isinstance(self.head, VelocityHead):
            nn.init.zeros_(self.head.out.weight)


class Block(nn.Module):
    """Attention and MLP, each behind a modulated layer norm and a gate."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
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
        return torch.addcmul(tokens, gate_m, self.mlp(modulate(tokens, shift_m, scale_m)))

    def attention(self, tokens: Tensor) -> Tensor:
        # (B, L, 3 D) -> three of (B, heads, L, D / heads)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.attention_out(mixed.transpose(1, 2).flatten(2))


class VelocityHead(nn.Module):
    """Tokens -> velocity (B, C, H, W)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.modulation = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.patch_size**2 * config.in_channels)

    def forward(self, tokens: Tensor, emb: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = modulate(tokens, *self.modulation(emb).unsqueeze(1).chunk(2, dim=-1))
        return unpatchify(self.out(tokens), grid, self.config.patch_size, 1)[:, 0]


class GMHead(nn.Module):
    """Tokens -> means (B, K, C, H, W), log-weights (B, K, 1, H, W); embedding -> log-std (B, 1, 1, 1, 1)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        width, per_patch = config.hidden_size, config.patch_size**2
        self.modulation = nn.Linear(width, 2 * width)
        self.means = nn.Linear(width, per_patch * config.num_components * config.in_channels)
        self.logweights = nn.Linear(width, per_patch * config.num_components)
        self.logstds = nn.Linear(width, 1)

    def forward(self, tokens: Tensor, emb: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        tokens = modulate(tokens, *self.modulation(emb).unsqueeze(1).chunk(2, dim=-1))
        patch, components = self.config.patch_size, self.config.num_components
        means = unpatchify(self.means(tokens), grid, patch, components)
        logweights = unpatchify(self.logweights(tokens), grid, patch, components).log_softmax(dim=1)
        return means, logweights, self.logstds(emb)[:, :, None, None, None]


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters of its own, then the embedding's scale and shift."""
    return torch.addcmul(shift, F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6), 1 + scale)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int, components: int) -> Tensor:
    """(B, rows * columns, p * p * K * C), features in the order (p, p, K, C) -> (B, K, C, rows p, columns p)."""
    x = tokens.unflatten(2, (patch, patch, components, -1)).unflatten(1, grid)
    x = x.permute(0, 5, 6, 1, 3, 2, 4)  # (B, K, C, rows, p, columns, p)
    return x.flatten(5, 6).flatten(3, 4)


def time_features(t: Tensor) -> Tensor:
    """[cos, sin] of the time at 128 frequencies from 1 down to 1/10000, (B, 256)."""
    half = _TIME_FEATURES // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000.0) / half))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(rows: int, columns: int, width: int, scale: float) -> Tensor:
    """Fixed sin/cos positions, (rows * columns, width): first half from the column, second from the row.

    A grid other than the one trained on (`scale` tokens a side) is stretched onto it.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def waves(count):
        angles = torch.arange(count, dtype=torch.float64)[:, None] * (scale / count) * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    column = waves(columns)[None, :, :].expand(rows, columns, width // 2)
    row = waves(rows)[:, None, :].expand(rows, columns, width // 2)
    return torch.cat([column, row], dim=-1).reshape(rows * columns, width).float()


# Spread of the components around the teacher's velocity, and their standard deviation, when a student starts; the
# authors' values (arXiv:2510.14974, released configurations).
_MEAN_SPREAD, _INITIAL_STD = 0.05, 0.05


def student_from_teacher(teacher: DiT, num_components: int, *, seed: int = 0) -> DiT:
    """A GM student that starts as its teacher: trunk copied, output layer widened to K components.

    Every component gets the teacher's output plus a small constant of its own (alike at all positions, so that the
    patch grid does not show), equal weights and a narrow spread: the policy's velocity is the teacher's.

    Args:
        teacher: a DiT with a velocity head.
        num_components: K, 1 or more.
        seed: of the components' offsets.
    """
    config = replace(teacher.config, num_components=num_components)
    student = DiT(config)
    student.load_state_dict(teacher.state_dict(), strict=False)  # all but the output layers
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        per_patch, channels = config.patch_size**2, config.in_channels
        weight, bias = teacher.head.out.weight, teacher.head.out.bias
        offsets = _MEAN_SPREAD * torch.randn(num_components, channels, generator=generator)
        weight = weight.view(per_patch, 1, channels, -1).expand(-1, num_components, -1, -1)
        student.head.means.weight.copy_(weight.reshape(-1, config.hidden_size))
        bias = bias.view(per_patch, 1, channels) + offsets
        student.head.means.bias.copy_(bias.reshape(-1))
        for layer in (student.head.logweights, student.head.logstds):
            layer.weight.zero_()
            layer.bias.zero_()
        student.head.logstds.bias.fill_(math.log(_INITIAL_STD))
    return student
