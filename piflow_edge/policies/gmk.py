"""Policy "gmk": a Gaussian mixture whose components have a standard deviation each.

Not of the authors: theirs ("gm") has one for all components. `docs/policies.md` says when it helps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from piflow_edge.arrays import Array, Namespace

from .gm import GMPolicy, GMPolicySpec, write_source_velocity
from .policy import Rollout, ToVelocity, compute_softmax


class GMKPolicy(GMPolicy):
    """A Gaussian mixture for every position, with a standard deviation for each component.

    Arguments and errors as of `GMPolicy`, but `logstds` are (B, K, 1, 1, 1).

    With different variances, what the state says about x_0 changes the components' weights in two more ways than
    `GMPolicy` must know. Component k, N(mu_k, V_k) in C channels, times exp(nu . x_0 - zeta |x_0|^2 / 2) is a Gaussian
    again, of mean (mu_k + V_k nu) / D_k with D_k = 1 + V_k zeta, and its integral is

        D_k^(-C/2) exp((nu . mu_k + V_k |nu|^2 / 2 - zeta |mu_k|^2 / 2) / D_k)

    Where all V_k are alike, D^(-C/2) and V |nu|^2 / 2 D are the same for all components and cancel.
    """

    std_per_component: ClassVar[bool] = True

    def for_kernel(self) -> Rollout | None:
        """None: the compiled kernels know one variance for all components."""
        return None

    def _x_0_mean(self, nu: Array, zeta: Array | float, xp: Namespace) -> Array:
        variance = self.x_0_variance
        denominator = xp.clip(variance * zeta + 1, min=self.eps)
        # V_k / D_k less that of the widest component is (V_k - V) / (D_k D). Only differences count in a softmax, and
        # |nu|^2 / 2 zeta, which all have in common, would leave float32 nothing of them.
        widest = xp.max(variance, axis=1, keepdims=True)
        excess = (variance - widest) / xp.clip(widest * zeta + 1, min=self.eps)
        evidence = xp.sum(self.x_0_means * nu, axis=2, keepdims=True) - zeta * self._half_squares
        evidence = evidence + excess * (xp.sum(nu**2, axis=2, keepdims=True) * 0.5)
        volume = xp.log(denominator) * (0.5 * nu.shape[2])
        weights = compute_softmax(self._scaled_logweights + (evidence / denominator - volume), xp)
        return xp.sum(weights * ((self.x_0_means + variance * nu) / denominator), axis=1, keepdims=True)


@dataclass(frozen=True)
class GMKPolicySpec(GMPolicySpec):
    """A GMK policy's fixed numbers. `num_components`: K, 1 or more. `eps`: its floor; see `GMKPolicy`.

    Planes: K * C means, component by component; K log-weights; K whose means over positions are the log-stds.
    """

    kind: Literal["gmk"] = field(default="gmk", kw_only=True)

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"gmk": {}}

    def policy(self, outputs: Mapping[str, Array], x_src: Array, sigma_src) -> GMKPolicy:
        """See `PolicyKind.policy`."""
        means, logweights, logstds = (outputs[name] for name in self.outputs)
        return GMKPolicy(means, logweights, logstds, x_src, sigma_src, eps=self.eps)

    def num_planes(self, channels: int) -> int:
        """See `PolicyKind.num_planes`."""
        return self.num_components * (channels + 2)

    def output_shapes(self, sample_shape: tuple[int, ...]) -> list[list[int]]:
        """See `PolicyKind.output_shapes`."""
        means, logweights, (_, *ones) = super().output_shapes(sample_shape)
        return [means, logweights, [self.num_components, *ones]]

    def split(self, planes: Any, to_velocity: ToVelocity, x_0_to_velocity: ToVelocity) -> tuple[Any, ...]:
        """(B, M, *S) -> means (B, K, C, *S), log-weights (B, K, 1, *S), log-stds (B, K, 1, *1)."""
        K = self.num_components
        means, logweights, logstds = planes.split([planes.shape[1] - 2 * K, K, K], dim=1)
        return (
            to_velocity(means.unflatten(1, (K, -1))),
            logweights.unsqueeze(2).log_softmax(dim=1),
            logstds.mean(list(range(2, planes.ndim)), keepdim=True).unsqueeze(2),
        )

    def write_rollout(
        self, op: Any, outputs: Mapping[str, Any], x_src: Any, tables: Mapping[str, Any]
    ) -> Any:
        """Write Euler substeps in the coordinates of `GMPolicySpec.write_rollout`; see `PolicyKind.write_rollout`.

        With p = Y y + N noise and D_k = 1 + V_k Z, of which V and D are the widest component's, a substep is

            w = softmax_k(logweights_k + (-d_k . p - Z |d_k|^2 / 2 + (V_k - V) |p|^2 / 2 D) / D_k - C/2 log D_k)
            y <- y + step (y + sum_k w_k (d_k - V_k p) / D_k)
        """
        sigma_src, temperature = tables["sigma_src"], tables["temperature"]
        velocities = op.Reshape(outputs["means"], [0, 0, 0, -1])  # (B, K, C, pixels)
        logweights = op.Div(op.Reshape(outputs["logweights"], [0, 0, -1]), temperature)
        V = op.Mul(op.Exp(op.Mul(op.Reshape(outputs["logstds"], [0, 0, 1]), 2.0)), temperature)  # (B, K, 1)
        x = op.Reshape(x_src, [0, 0, -1])

        g, offsets = write_source_velocity(op, velocities, logweights)
        half_squares = op.Mul(op.ReduceSum(op.Mul(offsets, offsets), [2], keepdims=0), 0.5)
        noise = op.Add(x, op.Mul(op.Sub(1.0, sigma_src), g))
        widest = op.ReduceMax(V, [1], keepdims=1)
        narrowness = op.Mul(op.Sub(V, widest), 0.5)
        half_channels = op.Mul(op.Cast(op.Shape(x, start=1, end=2), to=1), 0.5)
        substeps = op.Slice(tables["padded_substeps"], [0], tables["count"], [0])
        Z, Y, N, step = op.Split(substeps, axis=1, num_outputs=4, _outputs=4)

        def take_substep(op, y, Z, Y, N, step):
            D = op.Add(op.Mul(V, Z), 1.0)  # (B, K, 1)
            p = op.Add(op.Mul(Y, y), op.Mul(N, noise))  # (B, C, pixels)
            p_of_k = op.Unsqueeze(p, [1])
            excess = op.Div(narrowness, op.Add(op.Mul(widest, Z), 1.0))
            squares = op.ReduceSum(op.Mul(p, p), [1], keepdims=1)  # (B, 1, pixels)
            evidence = op.Sub(op.Mul(excess, squares), op.Mul(Z, half_squares))
            evidence = op.Sub(evidence, op.ReduceSum(op.Mul(offsets, p_of_k), [2], keepdims=0))
            volume = op.Mul(half_channels, op.Log(D))
            weights = op.Softmax(op.Add(logweights, op.Sub(op.Div(evidence, D), volume)), axis=1)
            towards = op.Sub(offsets, op.Mul(op.Unsqueeze(V, [3]), p_of_k))  # (B, K, C, pixels)
            shares = op.Mul(op.Unsqueeze(op.Div(weights, D), [2]), towards)
            u = op.Add(y, op.ReduceSum(shares, [1], keepdims=0))
            return op.Add(y, op.Mul(step, u))

        y_dst = op.scan(take_substep, op.Sub(x, x), Z, Y, N, step)
        on_line = op.Add(x, op.Mul(op.Sub(tables["sigma_dst"], sigma_src), g))
        return op.Reshape(op.Add(on_line, op.Mul(sigma_src, y_dst)), op.Shape(x_src))
