"""Student output -> velocity: the two policies of pi-Flow, written once for every array library.

Noise levels are host numbers (a float, or one float64 per sample); states, means and grids stay in the library,
device and precision they came in, float32 at least. The formulas are those of the paper's section on policies.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from typing import Any, Protocol

import numpy as np
from array_api_compat import device, is_numpy_namespace, is_torch_namespace, to_device

from .arrays import array_namespace
from .errors import ScheduleError, ShapeError
from .schedule import unwarp

Array = Any  # an array of any library that follows the array API standard


class Policy(Protocol):
    """A velocity field that holds from the noise level of one student call down to the next."""

    def velocity(self, x_t: Array, sigma_t) -> Array:
        """u_t = dx/dsigma at state `x_t` and noise level `sigma_t`, a float or (B,); shape of `x_t`."""
        ...


def _kept(compute):
    """A property that is worked out for whoever asks first, and kept.

    Compiled kernels ask for none of these, and each takes as much memory as the means, or the log-weights.
    """

    @wraps(compute)
    def for_all_modes(policy):
        xp = array_namespace(policy.x_src)
        if is_torch_namespace(xp) and xp.is_inference_mode_enabled():
            with xp.inference_mode(False):  # else the next who asks could not have gradients through it
                return compute(policy)
        return compute(policy)

    return cached_property(for_all_modes)


class GMPolicy:
    """A Gaussian mixture for every position: the posterior mean of x_0 given the state, in closed form.

    The student says, at `(x_src, sigma_src)`, how x_0 is distributed; Bayes' rule carries that to any other state
    and noise level. At the source itself the velocity is the weighted mean of `means`.

    Args:
        means: component means as velocities, (B, K, C, H, W); a frame axis before H, W is allowed.
        logweights: log-weights of the components at each position, (B, K, 1, H, W); need not be normalised.
        logstds: log of the components' standard deviation in velocity units, (B, 1, 1, 1, 1).
        x_src: state at which the student was called, (B, C, H, W), latent units.
        sigma_src: its noise level, in (0, 1], a float or (B,).
        eps: floor under noise levels and denominators, above 0.

    Raises:
        ShapeError: arrays that do not fit each other, or are not floating point.
        ScheduleError: a noise level outside [0, 1].

    Source: Chen et al., pi-Flow, arXiv:2510.14974; `GMFlowPolicy` in Lakonik/piFlow.
    """

    def __init__(
        self, means: Array, logweights: Array, logstds: Array, x_src: Array, sigma_src, *, eps: float = 1e-4
    ):
        xp = array_namespace(means, logweights, logstds, x_src)
        batch, *state = x_src.shape
        num_components = means.shape[1] if means.ndim > 1 else 0
        ones = (1,) * (len(state) - 1)
        _check_shape("means", means, (batch, num_components, *state))
        _check_shape("logweights", logweights, (batch, num_components, 1, *state[1:]))
        _check_shape("logstds", logstds, (batch, 1, 1, *ones))
        means, logweights, logstds, x_src = (
            _as_real(name, a, xp)
            for name, a in dict(means=means, logweights=logweights, logstds=logstds, x_src=x_src).items()
        )
        sigma = _noise_levels(sigma_src, batch)
        _check_eps(eps)
        self.means, self.x_src, self.sigma_src, self.eps = means, x_src, sigma, eps
        self.x_0_variance = xp.exp(2 * logstds) * _per_sample(sigma, logstds, xp) ** 2
        self.logweights = logweights
        self._keep_now(xp)

    @_kept
    def x_0_means(self) -> Array:
        """Means in x_0 space, where the mixture does not depend on the noise level; shape of `means`."""
        xp = array_namespace(self.means)
        return _x_0(self.x_src, self.sigma_src, self.means, xp)

    @_kept
    def _half_squares(self) -> Array:
        xp = array_namespace(self.means)
        return xp.sum(self.x_0_means**2, axis=2, keepdims=True) * 0.5

    @_kept
    def _scaled_logweights(self) -> Array:
        xp = array_namespace(self.logweights)
        return self.logweights - xp.max(self.logweights, axis=1, keepdims=True)

    def velocity(self, x_t: Array, sigma_t) -> Array:
        """u_t = (x_t - E[x_0 | x_t]) / sigma_t.

        Args:
            x_t: state (B, C, H, W), as `x_src`; its dtype and device are those of the result.
            sigma_t: its noise level, from `sigma_src` down to 0, a float or one per sample (B,).

        Returns:
            dx/dsigma, of the shape of `x_t`.

        Raises:
            ShapeError: a state or noise levels of another shape.
            ScheduleError: noise levels outside [0, 1].
        """
        xp = array_namespace(x_t, self.x_src)
        x_t = _state(x_t, self.x_src, xp)
        floor_src = np.maximum(self.sigma_src, self.eps)
        floor_t = np.maximum(_noise_levels(sigma_t, x_t.shape[0]), self.eps)
        # Precision and mean of what x_t says about x_0 beyond what x_src said. Both are exactly 0 at the source,
        # where the formula is therefore the plain weighted mean: no special case needed.
        zeta = ((1 - floor_t) / floor_t) ** 2 - ((1 - floor_src) / floor_src) ** 2
        nu = (
            _per_sample((1 - floor_t) / floor_t**2, x_t, xp) * x_t
            - _per_sample((1 - floor_src) / floor_src**2, x_t, xp) * self.x_src
        )
        nu = xp.expand_dims(nu, axis=1)
        zeta = _per_sample(zeta, self.x_0_means, xp)
        denominator = xp.clip(self.x_0_variance * zeta + 1, min=self.eps)
        evidence = xp.sum(self.x_0_means * nu, axis=2, keepdims=True) - zeta * self._half_squares
        weights = _softmax(self._scaled_logweights + evidence / denominator, xp)
        mean = xp.sum(weights * self.x_0_means, axis=1, keepdims=True)
        x_0 = xp.squeeze((self.x_0_variance * nu + mean) / denominator, axis=1)
        return (x_t - x_0) / _per_sample(floor_t, x_t, xp)

    def tempered(self, temperature: float) -> "GMPolicy":
        """The policy with a sharper mixture: weights to the power 1/T, variance times T. No change for T >= 1.

        Raises:
            ScheduleError: `temperature` is negative or not a number.
        """
        if not temperature >= 0:
            raise ScheduleError(f"temperature is 0 or more; got {temperature!r}")
        if temperature >= 1:
            return self
        temperature = max(float(temperature), self.eps)
        return self._with(
            logweights=self._scaled_logweights / temperature, x_0_variance=self.x_0_variance * temperature
        )

    def dropped(self, uniforms: Array, p: float) -> "GMPolicy":
        """The policy without the components whose uniform number, (B, K), lies below `p`.

        A sample that would lose all its components keeps them. Used in training only; no change for `p` outside (0, 1).
        """
        if not 0 < p < 1:
            return self
        xp = array_namespace(uniforms, self.x_src)
        gone = uniforms < p
        gone = gone & ~xp.all(gone, axis=1, keepdims=True)
        gone = xp.reshape(gone, (*gone.shape, *(1,) * (self.logweights.ndim - 2)))
        return self._with(logweights=xp.where(gone, -xp.inf, self.logweights))

    def detached(self) -> "GMPolicy":
        """The policy cut off from torch's graph, sharing its memory."""
        return self._with(**_detached(self))

    def _with(self, **changes) -> "GMPolicy":
        policy = object.__new__(GMPolicy)
        policy.__dict__.update(vars(self))
        policy.__dict__.pop("_scaled_logweights", None)
        policy.__dict__.update(changes)
        policy._keep_now(array_namespace(policy.x_src))
        return policy

    def _keep_now(self, xp) -> None:
        if _mode_matters(xp, self.means, self.logweights, self.x_src):
            _ = self._half_squares, self._scaled_logweights


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


class DXPolicy:
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
        _check_shape("grid", grid, (batch, grid.shape[1] if grid.ndim > 1 else 0, *state))
        if mode not in ("grid", "polynomial"):
            raise ScheduleError(f"mode is 'grid' or 'polynomial'; got {mode!r}")
        if not segment_size > 0:
            raise ScheduleError(f"segment_size is above 0, in raw time; got {segment_size!r}")
        grid, x_src = _as_real("grid", grid, xp), _as_real("x_src", x_src, xp)
        sigma = _noise_levels(sigma_src, batch)
        self.grid, self.x_src, self.sigma_src, self.eps = grid, x_src, sigma, eps
        self.segment_size, self.shift, self.mode = float(segment_size), float(shift), mode
        sigmas = tuple(sigma) if np.ndim(sigma) else sigma
        self._nodes = _DXNodes(sigmas, grid.shape[1], self.segment_size, self.shift, mode, eps)
        if _mode_matters(xp, grid, x_src):
            _ = self.x_0_grid

    @_kept
    def x_0_grid(self) -> Array:
        """The grid in x_0 space; shape of `grid`."""
        return _x_0(self.x_src, self.sigma_src, self.grid, array_namespace(self.grid))

    def basis(self, sigma_t) -> np.ndarray:
        """Weights of the N grid entries in x_0 at a noise level, float64: (N,) for a float, else (B, N)."""
        return self._nodes.basis(sigma_t)

    def velocity(self, x_t: Array, sigma_t) -> Array:
        """u_t = (x_t - x_0(sigma_t)) / sigma_t; arguments, result and errors as of `GMPolicy.velocity`."""
        xp = array_namespace(x_t, self.x_src)
        x_t = _state(x_t, self.x_src, xp)
        sigma = _noise_levels(sigma_t, x_t.shape[0])
        weights = self.basis(sigma)
        weights = xp.asarray(weights, dtype=self.x_0_grid.dtype, device=device(self.x_0_grid))
        weights = xp.reshape(weights, (-1, weights.shape[-1], *(1,) * (self.x_0_grid.ndim - 2)))
        x_0 = xp.sum(weights * self.x_0_grid, axis=1)
        return (x_t - x_0) / _per_sample(np.maximum(sigma, self.eps), x_t, xp)

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
        x_start = _state(x_start, self.x_src, xp)
        start, src, *nodes = np.moveaxis(self.rollout_weights(sigmas), -1, 0)
        x_dst = _per_sample(start, x_start, xp) * x_start + _per_sample(src, x_start, xp) * self.x_src
        for node, weight in enumerate(nodes):
            x_dst = x_dst + _per_sample(weight, x_start, xp) * self.grid[:, node, ...]
        return x_dst

    def detached(self) -> "DXPolicy":
        """The policy cut off from torch's graph, sharing its memory."""
        policy = object.__new__(DXPolicy)
        policy.__dict__.update(_detached(self))
        return policy


def _x_0(x_src, sigma_src, velocities, xp):
    """What velocities at the source, (B, K, ...), say about x_0."""
    return xp.expand_dims(x_src, axis=1) - _per_sample(sigma_src, velocities, xp) * velocities


def _mode_matters(xp, *arrays) -> bool:
    """Whether what is worked out from `arrays` depends on when: on torch recording gradients, or not.

    Then a policy does so in the mode of whoever makes it. Of libraries unknown here that is safer, too.
    """
    if is_torch_namespace(xp):
        return any(array.requires_grad for array in arrays)
    # Nothing records gradients on our own arrays on a GPU.
    return not (is_numpy_namespace(xp) or xp.__name__ == "piflow_edge.kernels.gpu_arrays")


def _detached(policy) -> dict:
    return {name: v.detach() if hasattr(v, "detach") else v for name, v in vars(policy).items()}


def _check_eps(eps) -> None:
    if not eps > 0:
        raise ScheduleError(f"eps is above 0; got {eps!r}")


def _softmax(logits, xp):
    weights = xp.exp(logits - xp.max(logits, axis=1, keepdims=True))
    return weights / xp.sum(weights, axis=1, keepdims=True)


def _as_real(name, array, xp):
    """`array` in float32 or better: half precision loses the last substeps."""
    if array.dtype == xp.float32:
        return array
    if not xp.isdtype(array.dtype, "real floating"):
        raise ShapeError(f"{name} must be floating point; got {array.dtype}")
    return array if array.dtype == xp.float64 else xp.astype(array, xp.float32)


def _state(x_t, x_src, xp):
    _check_shape("x_t", x_t, x_src.shape)
    return _as_real("x_t", x_t, xp)


def _check_shape(name, array, shape) -> None:
    if tuple(array.shape) != tuple(shape) or 0 in shape:
        raise ShapeError(f"{name} must have the shape {_text(shape)}, none of it 0; got {_text(array.shape)}")


def _text(shape) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _noise_levels(sigma, batch):
    """One noise level as a float, or one per sample as a float64 host array (B,)."""
    if not isinstance(sigma, (int, float)):
        sigma = np.asarray(sigma if isinstance(sigma, np.ndarray) else to_device(sigma, "cpu"), np.float64)
        if sigma.ndim and sigma.shape != (batch,):
            raise ShapeError(
                f"a noise level is one number or one per sample, ({batch},); got {_text(sigma.shape)}"
            )
    inside = 0 <= sigma <= 1 if isinstance(sigma, (int, float)) else bool(np.all((sigma >= 0) & (sigma <= 1)))
    if not inside:
        raise ScheduleError(f"noise levels lie in [0, 1]; got {sigma}")
    return sigma if isinstance(sigma, np.ndarray) and sigma.ndim else float(sigma)


def _per_sample(value, like, xp):
    """A host number, or one number per sample shaped to broadcast against `like`, in its dtype and place."""
    if np.ndim(value) == 0:
        return float(value)  # a NumPy scalar would lift a float32 state to float64
    if not is_numpy_namespace(xp):
        value = xp.asarray(value, dtype=like.dtype, device=device(like))
    else:
        value = value.astype(like.dtype)
    return xp.reshape(value, (-1, *(1,) * (like.ndim - 1)))
