"""Policy "gm": a Gaussian mixture at every position, carried to other states and noise levels by Bayes' rule."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from piflow_edge.arrays import Array, array_namespace
from piflow_edge.errors import ScheduleError

from .policy import (
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
        check_shape("means", means, (batch, num_components, *state))
        check_shape("logweights", logweights, (batch, num_components, 1, *state[1:]))
        check_shape("logstds", logstds, (batch, 1, 1, *ones))
        means, logweights, logstds, x_src = (
            as_real(name, a, xp)
            for name, a in dict(means=means, logweights=logweights, logstds=logstds, x_src=x_src).items()
        )
        sigma = as_noise_levels(sigma_src, batch)
        check_eps(eps)
        self.means, self.x_src, self.sigma_src, self.eps = means, x_src, sigma, eps
        self.x_0_variance = xp.exp(2 * logstds) * spread_per_sample(sigma, logstds, xp) ** 2
        self.logweights = logweights
        self._keep_now(xp)

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
        nu = xp.expand_dims(nu, axis=1)
        zeta = spread_per_sample(zeta, self.x_0_means, xp)
        denominator = xp.clip(self.x_0_variance * zeta + 1, min=self.eps)
        evidence = xp.sum(self.x_0_means * nu, axis=2, keepdims=True) - zeta * self._half_squares
        weights = compute_softmax(self._scaled_logweights + evidence / denominator, xp)
        mean = xp.sum(weights * self.x_0_means, axis=1, keepdims=True)
        x_0 = xp.squeeze((self.x_0_variance * nu + mean) / denominator, axis=1)
        return (x_t - x_0) / spread_per_sample(floor_t, x_t, xp)

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
        return self._with(**detach_fields(self))

    def _with(self, **changes) -> "GMPolicy":
        policy = object.__new__(GMPolicy)
        policy.__dict__.update(vars(self))
        policy.__dict__.pop("_scaled_logweights", None)
        policy.__dict__.update(changes)
        policy._keep_now(array_namespace(policy.x_src))
        return policy

    def _keep_now(self, xp) -> None:
        if depends_on_mode(xp, self.means, self.logweights, self.x_src):
            _ = self._half_squares, self._scaled_logweights


@dataclass(frozen=True)
class GMPolicySpec:
    """A GM policy's fixed numbers. `num_components`: K. `eps`: its floor; see `GMPolicy`."""

    kind: Literal["gm"]
    num_components: int
    eps: float

    outputs: ClassVar[tuple[str, ...]] = ("means", "logweights", "logstds")

    def policy(self, outputs: Mapping[str, Array], x_src: Array, sigma_src) -> GMPolicy:
        """The policy that the network's outputs at `x_src` (B, C, H, W) stand for."""
        return GMPolicy(*(outputs[name] for name in self.outputs), x_src, sigma_src, eps=self.eps)
