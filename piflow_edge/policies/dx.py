"""Policy "dx": x_0 as a grid over the segment or a polynomial in raw time, so that a rollout is one weighted sum."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
from array_api_compat import device

from piflow_edge.arrays import Array, SameArray, array_namespace
from piflow_edge.errors import ScheduleError, ShapeError
from piflow_edge.option import check_options, option
from piflow_edge.schedule import unwarp

from .policy import (
    Policy,
    PolicyKind,
    Rollout,
    ToVelocity,
    WeightedSum,
    as_noise_levels,
    as_real,
    as_state,
    cached_for_all_modes,
    check_shape,
    convert_to_x_0,
    depends_on_mode,
    spread_per_sample,
)


@dataclass(frozen=True)
class _DXNodes:
    """What a DX policy knows of time, where its N grid entries stand; hashable, to keep weights by."""

    sigma_src: float | tuple[float, ...]
    num_nodes: int
    segment_size: float
    shift: float
    mode: str
    eps: float

    def basis(self, sigma_t) -> np.ndarray:
        raw_t_src = np.asarray(unwarp(np.asarray(self.sigma_src), self.shift))[..., None]
        raw_t = np.asarray(unwarp(np.asarray(sigma_t, np.float64), self.shift))[..., None]
        nodes = np.arange(self.num_nodes)
        if self.mode == "polynomial":
            return (raw_t_src - raw_t) ** nodes
        raw_t_dst = np.maximum(raw_t_src - self.segment_size, 0.0)
        length = np.maximum(raw_t_src - raw_t_dst, self.eps)
        position = np.clip((raw_t - raw_t_dst) / length, 0.0, 1.0) * (len(nodes) - 1)
        return np.maximum(1 - np.abs(position - nodes), 0.0)  # hat functions: linear interpolation


@lru_cache(maxsize=64)
def _rollout_weights(nodes: _DXNodes, shape: tuple[int, ...], levels: bytes) -> np.ndarray:
    sigmas, sigma_src = np.frombuffer(levels).reshape(shape), np.asarray(nodes.sigma_src)
    if sigma_src.ndim and sigmas.ndim == 1:
        sigmas = np.broadcast_to(sigmas[:, None], (len(sigmas), len(sigma_src)))
    towards_x_0 = (sigmas[:-1] - sigmas[1:]) / np.maximum(sigmas[:-1], nodes.eps)
    # What is left of a state after the steps from this one on; after the last, all of it.
    left = np.ones_like(sigmas)
    left[:-1] = np.cumprod((1 - towards_x_0)[::-1], axis=0)[::-1]
    x_0_weights = np.sum((towards_x_0 * left[1:])[..., None] * nodes.basis(sigmas[:-1]), axis=0)
    x_src_weight = np.sum(x_0_weights, axis=-1)  # x_0 = x_src - sigma_src * grid
    grid_weights = -sigma_src[..., None] * x_0_weights
    return np.concatenate([np.stack([left[0], x_src_weight], axis=-1), grid_weights], axis=-1)


class DXPolicy(Policy):
    """A grid of x_0 predictions over the segment, or a polynomial in raw time through it.

    Args:
        grid: velocities at the source, (B, N, C, H, W); a frame axis before H, W is allowed. For "grid", node 0
            belongs to the segment's end (low noise) and node N-1 to its source; for "polynomial", entry i is the
            coefficient of the i-th power of raw time since the source.
        x_src: state at which the student was called, (B, C, H, W), latent units.
        sigma_src: its noise level, in (0, 1], a float or (B,).
        segment_size: length the grid spans in raw time; fixed when the student is trained.
        shift: shift of the raw time the grid is even in; fixed when the student is trained.
        mode: "grid" (linear interpolation, held constant outside the segment) or "polynomial".
        eps: floor under noise levels and the segment's length, above 0.

    Raises:
        ShapeError: arrays that do not fit each other, or are not floating point.
        ScheduleError: a noise level outside [0, 1], an unknown mode, or a segment that is not longer than 0.

    Source: Chen et al., pi-Flow, arXiv:2510.14974; `DXPolicy` in Lakonik/piFlow.
    """

    def __init__(
        self,
        grid: Array,
        x_src: Array,
        sigma_src,
        *,
        segment_size: float,
        shift: float = 1.0,
        mode: str = "grid",
        eps: float = 1e-4,
    ):
        xp = array_namespace(grid, x_src)
        batch, *state = x_src.shape
        check_shape("grid", grid, (batch, grid.shape[1] if grid.ndim > 1 else 0, *state))
        if mode not in ("grid", "polynomial"):
            raise ScheduleError(f"mode is 'grid' or 'polynomial'; got {mode!r}")
        if not segment_size > 0:
            raise ScheduleError(f"segment_size is above 0, in raw time; got {segment_size!r}")
        grid, x_src = as_real("grid", grid, xp), as_real("x_src", x_src, xp)
        sigma = as_noise_levels(sigma_src, batch)
        self.grid, self.x_src, self.sigma_src, self.eps = grid, x_src, sigma, eps
        self.segment_size, self.shift, self.mode = float(segment_size), float(shift), mode
        sigmas = tuple(sigma) if isinstance(sigma, np.ndarray) else sigma
        self._nodes = _DXNodes(sigmas, grid.shape[1], self.segment_size, self.shift, mode, eps)
        if depends_on_mode(xp, grid, x_src):
            _ = self.x_0_grid

    @cached_for_all_modes
    def x_0_grid(self) -> Array:
        """The grid in x_0 space; shape of `grid`."""
        return convert_to_x_0(self.x_src, self.sigma_src, self.grid, array_namespace(self.grid))

    def basis(self, sigma_t) -> np.ndarray:
        """Weights of the N grid entries in x_0 at a noise level, float64: (N,) for a float, else (B, N)."""
        return self._nodes.basis(sigma_t)

    def velocity(self, x_t: Array, sigma_t: Any) -> SameArray:
        """u_t = (x_t - x_0(sigma_t)) / sigma_t; arguments, result and errors as of `GMPolicy.velocity`."""
        xp = array_namespace(x_t, self.x_src)
        x_t = as_state(x_t, self.x_src, xp)
        sigma = as_noise_levels(sigma_t, x_t.shape[0])
        weights = self.basis(sigma)
        weights = xp.asarray(weights, dtype=self.x_0_grid.dtype, device=device(self.x_0_grid))
        weights = xp.reshape(weights, (-1, weights.shape[-1], *(1,) * (self.x_0_grid.ndim - 2)))
        x_0 = xp.sum(weights * self.x_0_grid, axis=1)
        return (x_t - x_0) / spread_per_sample(np.maximum(sigma, self.eps), x_t, xp)

    def rollout_weights(self, sigmas: np.ndarray) -> np.ndarray:
        """What a rollout comes to: weights of `x_start`, `x_src` and the N entries of `grid` in its end.

        An Euler step is x <- (1 - r) x + r x_0(sigma) with r = (sigma - sigma_next) / sigma, linear in the
        state and the grid, so any number of steps is one weighted sum. Its weights are kept for the next
        rollout along the same levels.

        Args:
            sigmas: noise levels of the rollout, float64, (S + 1,) or (S + 1, B).

        Returns:
            float64, (2 + N,), or (B, 2 + N) where noise levels differ by sample.
        """
        return _rollout_weights(self._nodes, sigmas.shape, sigmas.tobytes()).copy()

    def closed_form(self, x_start: Array, sigmas: np.ndarray) -> Array:
        """The state after Euler steps along `sigmas` from `x_start`: one weighted sum."""
        xp = array_namespace(x_start, self.x_src)
        x_start = as_state(x_start, self.x_src, xp)
        start, src, *nodes = np.moveaxis(self.rollout_weights(sigmas), -1, 0)
        x_dst = (
            spread_per_sample(start, x_start, xp) * x_start + spread_per_sample(src, x_start, xp) * self.x_src
        )
        for node, weight in enumerate(nodes):
            x_dst = x_dst + spread_per_sample(weight, x_start, xp) * self.grid[:, node, ...]
        return x_dst

    def for_kernel(self) -> Rollout | None:
        """What a compiled kernel needs to integrate this policy."""
        return WeightedSum(self.grid, self.x_src, self.rollout_weights)


@dataclass(frozen=True)
class DXPolicySpec(PolicyKind):
    """A DX policy's fixed numbers. `num_nodes`: N, 1 or more. The others as in `DXPolicy`, fixed since training.

    Planes: N * C, node by node; node 0 is the one at the segment's end. A polynomial's coefficients from the first
    order on are written in units of x_0, not as velocities, so that they can start at zero.
    """

    kind: Literal["dx"] = field(default="dx", kw_only=True)
    num_nodes: int = option(10, "N of a DX policy.", minimum=1)
    segment_size: float = 1.0
    shift: float = 1.0
    mode: Literal["grid", "polynomial"] = "grid"
    eps: float = 1e-4

    outputs: ClassVar[tuple[str, ...]] = ("grid",)
    training_eps: ClassVar[float] = 1e-4  # the authors' default
    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"dx": {}, "dx-polynomial": {"mode": "polynomial"}}

    def __post_init__(self):
        check_options(self, ShapeError)
        if self.mode not in ("grid", "polynomial"):
            raise ShapeError(f"mode of a DX policy is 'grid' or 'polynomial'; got {self.mode!r}")

    def policy(self, outputs: Mapping[str, Array], x_src: Array, sigma_src) -> DXPolicy:
        """See `PolicyKind.policy`."""
        settings = {
            "segment_size": self.segment_size,
            "shift": self.shift,
            "mode": self.mode,
            "eps": self.eps,
        }
        return DXPolicy(outputs["grid"], x_src, sigma_src, **settings)

    def fit_to_segments(self, longest: float, shift: float) -> "DXPolicySpec":
        """Lay the nodes over the longest segment; see `PolicyKind.fit_to_segments`."""
        return replace(self, segment_size=longest, shift=shift)

    def num_planes(self, channels: int) -> int:
        """See `PolicyKind.num_planes`."""
        return self.num_nodes * channels

    def output_shapes(self, sample_shape: tuple[int, ...]) -> list[list[int]]:
        """See `PolicyKind.output_shapes`."""
        return [[self.num_nodes, *sample_shape]]

    def split(self, planes: Any, to_velocity: ToVelocity, x_0_to_velocity: ToVelocity) -> tuple[Any, ...]:
        """(B, M, *S) -> grid (B, N, C, *S)."""
        nodes = planes.unflatten(1, (self.num_nodes, -1))
        if self.mode == "grid":
            return (to_velocity(nodes),)
        parts = [to_velocity(nodes[:, :1]), x_0_to_velocity(nodes[:, 1:])]
        return (array_namespace(planes).concat(parts, axis=1),)

    def widen(self, weight: Any, bias: Any, draw_normal: Callable[..., Any]) -> tuple[Any, Any]:
        """Every node: the teacher's output; of a polynomial only the constant. See `PolicyKind.widen`."""
        xp = array_namespace(weight)
        alike = self.num_nodes if self.mode == "grid" else 1
        zeros = (self.num_nodes - alike) * len(weight)
        weight = weight.repeat(alike, *(1,) * (weight.ndim - 1))
        return (
            xp.concat([weight, weight.new_zeros(zeros, *weight.shape[1:])]),
            xp.concat([bias.repeat(alike, 1), bias.new_zeros(zeros, bias.shape[1])]),
        )

    def rollout_tables(
        self, sigmas: Sequence[np.ndarray], temperatures: Sequence[float]
    ) -> dict[str, np.ndarray]:
        """See `PolicyKind.rollout_tables`: the weights of the source and of each node, float32 (segments, 1 + N)."""
        rows = []
        for levels in sigmas:
            nodes = self._lay_nodes(float(levels[0]))
            start, src, *weights = _rollout_weights(nodes, levels.shape, levels.tobytes())
            rows.append([start + src, *weights])  # the rollout starts at the source
        return {"weights": np.array(rows, np.float32)}

    def write_rollout(
        self, op: Any, outputs: Mapping[str, Any], x_src: Any, tables: Mapping[str, Any]
    ) -> Any:
        """Write one weighted sum; see `PolicyKind.write_rollout`."""
        src, nodes = op.Split(tables["weights"], [1, self.num_nodes], axis=0, _outputs=2)
        grid = op.Reshape(outputs["grid"], [0, 0, -1])  # (B, N, values)
        weighted = op.Mul(op.Reshape(nodes, [-1, 1]), grid)
        total = op.Reshape(op.ReduceSum(weighted, [1], keepdims=0), op.Shape(x_src))
        return op.Add(op.Mul(src, x_src), total)

    def _lay_nodes(self, sigma_src: float) -> _DXNodes:
        return _DXNodes(sigma_src, self.num_nodes, self.segment_size, self.shift, self.mode, self.eps)
