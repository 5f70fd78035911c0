"""Policy "gm": a Gaussian mixture at every position, carried to other states and noise levels by Bayes' rule."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from piflow_edge.arrays import Array, Namespace, SameArray, array_namespace
from piflow_edge.errors import ScheduleError, ShapeError
from piflow_edge.option import check_options, option

from .policy import (
    MixtureRollout,
    Policy,
    PolicyKind,
    RawMixture,
    Rollout,
    ToVelocity,
    as_noise_levels,
    as_real,
    as_state,
    cached_for_all_modes,
    check_eps,
    check_shape,
    compute_softmax,
    convert_to_x_0,
    depends_on_mode,
    detach_fields,
    spread_per_sample,
)

# Spread of the components around the teacher's velocity, and their standard deviation, when a student starts; the
# authors' values (arXiv:2510.14974, released configurations).
MEAN_SPREAD, INITIAL_STD = 0.05, 0.05


class GMPolicy(Policy):
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

    # Whether `logstds` are (B, K, 1, 1, 1): one for each component.
    std_per_component: ClassVar[bool] = False

    def __init__(
        self, means: Array, logweights: Array, logstds: Array, x_src: Array, sigma_src, *, eps: float = 1e-4
    ):
        xp = array_namespace(means, logweights, logstds, x_src)
        batch, *state = x_src.shape
        num_components = means.shape[1] if means.ndim > 1 else 0
        ones = (1,) * (len(state) - 1)
        check_shape("means", means, (batch, num_components, *state))
        check_shape("logweights", logweights, (batch, num_components, 1, *state[1:]))
        check_shape("logstds", logstds, (batch, num_components if self.std_per_component else 1, 1, *ones))
        means, x_src = as_real("means", means, xp), as_real("x_src", x_src, xp)
        logweights, logstds = as_real("logweights", logweights, xp), as_real("logstds", logstds, xp)
        sigma = as_noise_levels(sigma_src, batch)
        check_eps(eps)
        self.means, self.x_src, self.sigma_src, self.eps = means, x_src, sigma, eps
        # As the network gave them, and the temperature: kernels of a GPU make of them what the rest of a policy reads.
        self._raw: Any = (logweights, logstds, 1.0)
        self._keep_now(xp)

    @cached_for_all_modes
    def logweights(self) -> Array:
        """Log-weights (B, K, 1, H, W) at the policy's temperature, not normalised."""
        logweights, _, temperature = self._raw
        if temperature == 1:
            return logweights
        xp = array_namespace(logweights)
        return (logweights - xp.max(logweights, axis=1, keepdims=True)) / temperature

    @cached_for_all_modes
    def x_0_variance(self) -> Array:
        """Variance of the components in x_0 at the policy's temperature."""
        _, logstds, temperature = self._raw
        xp = array_namespace(logstds)
        variance = xp.exp(2 * logstds) * spread_per_sample(self.sigma_src, logstds, xp) ** 2
        return variance if temperature == 1 else variance * temperature

    @cached_for_all_modes
    def x_0_means(self) -> Array:
        """Means in x_0 space, where the mixture does not depend on the noise level; shape of `means`."""
        xp = array_namespace(self.means)
        return convert_to_x_0(self.x_src, self.sigma_src, self.means, xp)

    @cached_for_all_modes
    def _half_squares(self) -> Array:
        xp = array_namespace(self.means)
        return xp.sum(self.x_0_means**2, axis=2, keepdims=True) * 0.5

    @cached_for_all_modes
    def _scaled_logweights(self) -> Array:
        xp = array_namespace(self.logweights)
        return self.logweights - xp.max(self.logweights, axis=1, keepdims=True)

    def velocity(self, x_t: Array, sigma_t: Any) -> SameArray:
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
        x_t = as_state(x_t, self.x_src, xp)
        floor_src = np.maximum(self.sigma_src, self.eps)
        floor_t = np.maximum(as_noise_levels(sigma_t, x_t.shape[0]), self.eps)
        # Precision and mean of what x_t says about x_0 beyond what x_src said. Both are exactly 0 at the source,
        # where the formula is therefore the plain weighted mean: no special case needed.
        zeta = ((1 - floor_t) / floor_t) ** 2 - ((1 - floor_src) / floor_src) ** 2
        nu = (
            spread_per_sample((1 - floor_t) / floor_t**2, x_t, xp) * x_t
            - spread_per_sample((1 - floor_src) / floor_src**2, x_t, xp) * self.x_src
        )
        x_0 = self._x_0_mean(xp.expand_dims(nu, axis=1), spread_per_sample(zeta, self.x_0_means, xp), xp)
        return (x_t - xp.squeeze(x_0, axis=1)) / spread_per_sample(floor_t, x_t, xp)

    def _x_0_mean(self, nu: Array, zeta: Array | float, xp: Namespace) -> Array:
        """E[x_0 | x_t], (B, 1, C, H, W), by Bayes' rule: the mixture times exp(nu . x_0 - zeta |x_0|^2 / 2)."""
        denominator = xp.clip(self.x_0_variance * zeta + 1, min=self.eps)
        evidence = xp.sum(self.x_0_means * nu, axis=2, keepdims=True) - zeta * self._half_squares
        weights = compute_softmax(self._scaled_logweights + evidence / denominator, xp)
        mean = xp.sum(weights * self.x_0_means, axis=1, keepdims=True)
        return (self.x_0_variance * nu + mean) / denominator

    def temper(self, temperature: Any) -> "GMPolicy":
        """The policy with a sharper mixture: weights to the power 1/T, variance times T. No change for T >= 1.

        Raises:
            ScheduleError: `temperature` is negative or not a number.
        """
        if not temperature >= 0:
            raise ScheduleError(f"temperature is 0 or more; got {temperature!r}")
        if temperature >= 1:
            return self
        temperature = max(float(temperature), self.eps)
        if self._raw is not None and self._raw[2] == 1:
            return self._with(raw=(*self._raw[:2], temperature))
        return self._with(
            logweights=self._scaled_logweights / temperature, x_0_variance=self.x_0_variance * temperature
        )

    def drop_parts(self, uniforms: Any, p: float) -> "GMPolicy":
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

    def detach(self) -> "GMPolicy":
        """The policy cut off from torch's graph, sharing its memory."""
        _ = self.logweights, self.x_0_variance
        return self._with(**{name: value for name, value in detach_fields(self).items() if name != "_raw"})

    @property
    def num_parts(self) -> int:
        """Components, of which `drop_parts` can leave some out."""
        return self.means.shape[1]

    def for_kernel(self) -> Rollout | None:
        """What a compiled kernel needs to integrate this policy."""
        return MixtureRollout(
            self.means, self.logweights, self.x_0_variance, self.x_src, self.sigma_src, self.eps
        )

    def for_fused_kernel(self) -> RawMixture | None:
        """See `Policy`."""
        if self._raw is None or self.std_per_component:
            return None
        logweights, logstds, temperature = self._raw
        return RawMixture(self.means, logweights, logstds, self.x_src, self.sigma_src, self.eps, temperature)

    def _with(self, raw=None, **changes):
        """A copy with other log-weights or variance; `raw`: what these are to be made of."""
        if raw is None:
            changes = {"logweights": self.logweights, "x_0_variance": self.x_0_variance} | changes
        policy = object.__new__(type(self))
        vars(policy).update(vars(self))
        for name in ("_scaled_logweights", "logweights", "x_0_variance"):
            vars(policy).pop(name, None)
        vars(policy).update(changes, _raw=raw)
        policy._keep_now(array_namespace(policy.x_src))
        return policy

    def _keep_now(self, xp) -> None:
        weights = self._raw[:2] if self._raw else (self.logweights, self.x_0_variance)
        if depends_on_mode(xp, self.means, *weights, self.x_src):
            _ = self._half_squares, self._scaled_logweights, self.x_0_variance


@dataclass(frozen=True)
class GMPolicySpec(PolicyKind):
    """A GM policy's fixed numbers. `num_components`: K, 1 or more. `eps`: its floor; see `GMPolicy`.

    Planes: K * C means, component by component; K log-weights; one whose mean over positions is the log-std.
    """

    kind: Literal["gm"] = field(default="gm", kw_only=True)
    num_components: int = option(8, "K of a Gaussian mixture.", minimum=1)
    eps: float = 1e-4

    outputs: ClassVar[tuple[str, ...]] = ("means", "logweights", "logstds")
    training_eps: ClassVar[float] = 1e-6  # the authors' default
    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"gm": {}}

    def __post_init__(self):
        check_options(self, ShapeError)

    def policy(self, outputs: Mapping[str, Array], x_src: Array, sigma_src) -> GMPolicy:
        """See `PolicyKind.policy`."""
        means, logweights, logstds = (outputs[name] for name in self.outputs)
        return GMPolicy(means, logweights, logstds, x_src, sigma_src, eps=self.eps)

    def num_planes(self, channels: int) -> int:
        """See `PolicyKind.num_planes`."""
        return self.num_components * (channels + 1) + 1

    def output_shapes(self, sample_shape: tuple[int, ...]) -> list[list[int]]:
        """See `PolicyKind.output_shapes`."""
        channels, *size = sample_shape
        K = self.num_components
        return [[K, channels, *size], [K, 1, *size], [1, 1, *(1 for _ in size)]]

    def split(self, planes: Any, to_velocity: ToVelocity, x_0_to_velocity: ToVelocity) -> tuple[Any, ...]:
        """(B, M, *S) -> means (B, K, C, *S), log-weights (B, K, 1, *S), log-std (B, 1, 1, *1)."""
        K = self.num_components
        means, logweights, logstds = planes.split([planes.shape[1] - K - 1, K, 1], dim=1)
        space = list(range(2, planes.ndim))
        return (
            to_velocity(means.unflatten(1, (K, -1))),
            logweights.unsqueeze(2).log_softmax(dim=1),
            logstds.mean(space, keepdim=True).unsqueeze(2),
        )

    def widen(self, weight: Any, bias: Any, draw_normal: Callable[..., Any]) -> tuple[Any, Any]:
        """Every component: the teacher's output, plus a small constant of its own. See `PolicyKind.widen`.

        The constant is alike at all places of a patch, so that the patch grid does not show. Weights are equal and
        the spread narrow: the policy's velocity is the teacher's.
        """
        channels, places = bias.shape
        K, xp = self.num_components, array_namespace(weight)
        offsets = MEAN_SPREAD * draw_normal(K, channels, 1)
        means_bias = (bias + offsets.to(bias)).reshape(K * channels, places)
        others = self.num_planes(channels) - K * channels
        rest = weight.new_zeros(others, *weight.shape[1:])
        rest_bias = bias.new_zeros(others, places)
        rest_bias[K:] = math.log(INITIAL_STD)
        weight = xp.concat([weight.repeat(K, *(1,) * (weight.ndim - 1)), rest])
        return weight, xp.concat([means_bias, rest_bias])

    def rollout_tables(
        self, sigmas: Sequence[np.ndarray], temperatures: Sequence[float]
    ) -> dict[str, np.ndarray]:
        """See `PolicyKind.rollout_tables`; the substeps of shorter segments are padded."""
        substeps = [compute_substep_table(levels, self.eps) for levels in sigmas]
        padded = np.zeros((len(sigmas), max(map(len, substeps)), 4, 1, 1), np.float32)
        for row, table in zip(padded, substeps, strict=True):
            row[: len(table)] = table
        clipped = [min(max(temperature, self.eps), 1.0) for temperature in temperatures]  # as in `temper`
        return {
            "sigma_src": np.array([levels[0] for levels in sigmas], np.float32),
            "sigma_dst": np.array([levels[-1] for levels in sigmas], np.float32),
            "temperature": np.array(clipped, np.float32),
            "padded_substeps": padded,
            "count": np.array([[len(table)] for table in substeps], np.int64),
        }

    def write_rollout(
        self, op: Any, outputs: Mapping[str, Any], x_src: Any, tables: Mapping[str, Any]
    ) -> Any:
        """Write Euler substeps in the coordinates of `kernels/gm_rollout.h`; see `PolicyKind.write_rollout`.

        Float32 suffices in them at every noise level. With g the policy's velocity at the source and s its noise level,
        the state is kept as its distance from the straight line along g, in units of s,

            x_t = x_src + (sigma_t - s) g + s y,

        and components as offsets d_k from g. `noise` is where the line meets sigma 1. With V = exp(2 logstds), with Z,
        Y and N as in `compute_substep_table`, and with D = 1 + V Z, a substep is

            f = -(Y y + N noise) / D        w = softmax_k(logweights_k + d_k . f - Z/D |d_k|^2 / 2)
            y <- y + step (y + V f + sum_k w_k d_k / D)

        Offsets are kept in two layouts: ONNX Runtime sums over the last axis but one ten times as fast as over the
        first. Sums are not products with a row of ones, which would be faster still, because a GPU may round those to
        TF32.
        """
        sigma_src, temperature = tables["sigma_src"], tables["temperature"]
        velocities = op.Reshape(outputs["means"], [0, 0, 0, -1])  # (B, K, C, pixels)
        logweights = op.Div(op.Reshape(outputs["logweights"], [0, 0, -1]), temperature)
        V = op.Mul(op.Exp(op.Mul(op.Reshape(outputs["logstds"], [0, 1, 1]), 2.0)), temperature)
        x = op.Reshape(x_src, [0, 0, -1])

        g, offsets = write_source_velocity(op, velocities, logweights)
        offsets_of_c = op.Transpose(offsets, perm=[0, 2, 1, 3])
        half_squares = op.Mul(op.ReduceSum(op.Mul(offsets, offsets), [2], keepdims=0), 0.5)
        noise = op.Add(x, op.Mul(op.Sub(1.0, sigma_src), g))
        substeps = op.Slice(tables["padded_substeps"], [0], tables["count"], [0])
        Z, Y, N, step = op.Split(substeps, axis=1, num_outputs=4, _outputs=4)
        D = op.Add(op.Mul(V, Z), 1.0)
        rows = (op.Neg(op.Div(Y, D)), op.Neg(op.Div(N, D)), op.Div(Z, D), step, op.Div(step, D))

        def take_substep(op, y, of_y, of_noise, of_squares, step, of_mean):
            f = op.Add(op.Mul(of_y, y), op.Mul(of_noise, noise))
            evidence = op.ReduceSum(op.Mul(offsets, op.Unsqueeze(f, [1])), [2], keepdims=0)
            logits = op.Add(op.Sub(logweights, op.Mul(of_squares, half_squares)), evidence)
            weights = op.Unsqueeze(op.Softmax(logits, axis=1), [1])
            mean = op.ReduceSum(op.Mul(weights, offsets_of_c), [2], keepdims=0)
            moved = op.Add(y, op.Mul(step, op.Add(y, op.Mul(V, f))))
            return op.Add(moved, op.Mul(of_mean, mean))

        y_dst = op.scan(take_substep, op.Sub(x, x), *rows)
        on_line = op.Add(x, op.Mul(op.Sub(tables["sigma_dst"], sigma_src), g))
        return op.Reshape(op.Add(on_line, op.Mul(sigma_src, y_dst)), op.Shape(x_src))


def write_source_velocity(op: Any, velocities: Any, logweights: Any) -> tuple[Any, Any]:
    """Write a mixture's velocity at the source, (B, C, pixels), and its components' offsets from it."""
    weights = op.Unsqueeze(op.Softmax(logweights, axis=1), [2])
    velocity = op.ReduceSum(op.Mul(weights, velocities), [1], keepdims=0)
    return velocity, op.Sub(velocities, op.Unsqueeze(velocity, [1]))


def compute_substep_table(sigmas: np.ndarray, eps: float) -> np.ndarray:
    """Return what a graph must know of each substep: Z, Y, N and its length relative to sigma.

    Args:
        sigmas: noise levels of the rollout, from the policy's source down, float64 (S + 1,).
        eps: floor of the policy.

    Returns:
        float32, (S, 4, 1, 1).

    Raises:
        ScheduleError: a substep begins below `eps`, where the policy's formula is another one.
    """
    s, sigma, sigma_next = sigmas[0], sigmas[:-1], sigmas[1:]
    if not np.all(sigma >= eps):
        raise ScheduleError(
            f"a rollout in the graph takes noise levels down to the policy's eps, {eps}; got one of {sigma.min():.3g}; "
            "use fewer substeps or a larger shift"
        )
    N = (s - sigma) / sigma
    Z = s * N * (1 / s + 1 / sigma - 2)
    Y = s**2 * (1 - sigma) / sigma**2
    step = (sigma_next - sigma) / sigma
    return np.stack([Z, Y, N, step], axis=1)[..., None, None].astype(np.float32)
