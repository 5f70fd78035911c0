"""What all policies have in common: what a kind must say of itself, and the checks and helpers that they share.

Noise levels are host numbers (a float, or one float64 per sample); states, means and grids stay in the library,
device and precision they came in, float32 at least.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from array_api_compat import device, is_numpy_namespace, is_torch_namespace, to_device

from piflow_edge.arrays import Array, Namespace, SameArray, array_namespace
from piflow_edge.errors import ScheduleError, ShapeError


class VelocityField(Protocol):
    """What a rollout needs: a velocity that holds from the noise level of one student call down to the next."""

    def velocity(self, x_t: Array, sigma_t: Any) -> SameArray:
        """u_t = dx/dsigma at state `x_t` and noise level `sigma_t`, a float or (B,); shape of `x_t`."""
        ...


@dataclass(frozen=True)
class MixtureRollout:
    """What the compiled kernels need for Euler steps on a Gaussian mixture; see `GMPolicy`.

    `variance`: of the components in x_0, one per sample.
    """

    means: Array
    logweights: Array
    variance: Array
    x_src: Array
    sigma_src: float | np.ndarray
    eps: float

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What a kernel reads where it lies."""
        return self.means, self.logweights, self.variance, self.x_src


@dataclass(frozen=True)
class RawMixture:
    """A `MixtureRollout` as the network gave it, for kernels that temper it and make its variance on the way.

    `logstds`: of the components as velocities, one per sample. `temperature`: as given to `temper`; 1 for none.
    """

    means: Array
    logweights: Array
    logstds: Array
    x_src: Array
    sigma_src: float | np.ndarray
    eps: float
    temperature: float

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What a kernel reads where it lies."""
        return self.means, self.logweights, self.logstds, self.x_src


@dataclass(frozen=True)
class WeightedSum:
    """What the compiled kernels need for a rollout that is one weighted sum.

    `grid`: (B, N, C, H, W). `compute_weights`: noise levels -> weights of the start, of `x_src` and of the N entries of
    `grid`, float64 (2 + N,) or (B, 2 + N).
    """

    grid: Array
    x_src: Array
    compute_weights: Callable[[np.ndarray], np.ndarray]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What a kernel reads where it lies."""
        return self.grid, self.x_src


Rollout = MixtureRollout | WeightedSum
Self = TypeVar("Self")
Value = TypeVar("Value")


class Policy(ABC):
    """A velocity field that was made from one student output. What means nothing to a kind keeps its default here."""

    x_src: SameArray
    sigma_src: float | np.ndarray
    eps: float

    @property
    def num_parts(self) -> int:
        """Parts of the policy, of which `drop_parts` can leave some out."""
        return 0

    @abstractmethod
    def velocity(self, x_t: Array, sigma_t: Any) -> SameArray:
        """u_t = dx/dsigma at state `x_t` and noise level `sigma_t`, a float or (B,); shape of `x_t`."""

    def temper(self: Self, temperature: Any) -> Self:
        """The policy with less spread, for temperatures below 1; they are numbers, 0 or more."""
        return self

    def drop_parts(self: Self, uniforms: Array, p: float) -> Self:
        """The policy without the parts whose uniform number, (B, `num_parts`), lies below `p`."""
        return self

    def detach(self: Self) -> Self:
        """The policy cut off from torch's graph, sharing its memory."""
        policy = object.__new__(type(self))
        vars(policy).update(detach_fields(self))
        return policy

    def closed_form(self, x_start: Array, sigmas: np.ndarray) -> Array | None:
        """The state after Euler steps along `sigmas`, without taking them; None for kinds that cannot."""
        return None

    def for_kernel(self) -> Rollout | None:
        """What a compiled kernel needs to integrate this policy; None if there is no kernel for it."""
        return None

    def for_fused_kernel(self) -> "RawMixture | None":
        """The same with the network's own numbers, where they are at hand; see `RawMixture`."""
        return None


# Predictions (B, G, C, *S), the network's own or x_0, as velocities of the same shape.
ToVelocity = Callable[[Any], Any]


class PolicyKind(ABC):
    """All that a kind of policy says of itself. Its fields are the numbers that stay as they were in training.

    A kind is a frozen dataclass whose first field is `kind`, its name in JSON and on the command line, and whose other
    fields have defaults. `docs/extending.md` says how to add one.

    Tensors of training are torch's, but nothing here imports torch: only methods of the tensors are called.
    """

    kind: Any
    eps: float
    # Names of the network's outputs, in order.
    outputs: ClassVar[tuple[str, ...]]
    # Floor inside the policy in training, where the settings do not say.
    training_eps: ClassVar[float]
    # What `--policy` calls it -> fields that this name fixes.
    names: ClassVar[Mapping[str, Mapping[str, Any]]]

    @abstractmethod
    def policy(self, outputs: Mapping[str, Array], x_src: Array, sigma_src) -> Policy:
        """Return the policy that the network's outputs at `x_src` (B, C, H, W) stand for."""

    def fit_to_segments(self: Self, longest: float, shift: float) -> Self:
        """Return the kind for a student whose longest segment spans so much raw time, under this shift."""
        return self

    @abstractmethod
    def num_planes(self, channels: int) -> int:
        """Planes of the state's size that the network must write for a state of `channels` channels."""

    @abstractmethod
    def output_shapes(self, sample_shape: tuple[int, ...]) -> list[list[int]]:
        """Shapes of `outputs` without the batch axis, for states (C, *S)."""

    @abstractmethod
    def split(self, planes: Any, to_velocity: ToVelocity, x_0_to_velocity: ToVelocity) -> tuple[Any, ...]:
        """Return the outputs that planes (B, M, *S) stand for.

        Args:
            planes: torch tensor, what the network writes.
            to_velocity: for planes that are predictions of the network's own kind.
            x_0_to_velocity: for planes that are x_0.
        """

    @abstractmethod
    def widen(self, weight: Any, bias: Any, draw_normal: Callable[..., Any]) -> tuple[Any, Any]:
        """Return weights of an output layer with which the policy's velocity is the teacher's.

        Args:
            weight, bias: of the teacher's output layer, torch tensors (C, P, ...) and (C, P), P the places of a patch.
            draw_normal: `(*shape) -> ` a tensor of standard normal numbers.

        Returns:
            Weight (M, P, ...) and bias (M, P).
        """

    @abstractmethod
    def rollout_tables(
        self, sigmas: Sequence[np.ndarray], temperatures: Sequence[float]
    ) -> dict[str, np.ndarray]:
        """Return what the rollout in a graph must know of time: tables with one row for each segment.

        Args:
            sigmas: the noise levels of each segment, from the policy's source down, float64 (S + 1,).
            temperatures: the policy's, of each segment; 1 leaves it.

        Returns:
            Name -> float32 or int64 (segments, ...).

        Raises:
            ScheduleError: noise levels that the graph cannot take.
        """

    @abstractmethod
    def write_rollout(
        self, op: Any, outputs: Mapping[str, Any], x_src: Any, tables: Mapping[str, Any]
    ) -> Any:
        """Write the rollout of one segment into an ONNX graph, and return its end.

        Args:
            op: writes nodes: `op.Add(a, b)`, as onnxscript's builder does, and `op.scan`; see
                `export/onnx_graphs/rollout_graph.py`.
            outputs: the network's outputs, float32.
            x_src: the state at the policy's source, float32 (B, C, *S).
            tables: this segment's row of each of `rollout_tables`.
        """


def cached_for_all_modes(compute: Callable[[Any], Value]) -> cached_property[Value]:
    """Make a property that is computed when it is first read, and then kept.

    Compiled kernels read none of these, and each takes as much memory as the means, or the log-weights.
    """

    @wraps(compute)
    def compute_outside_inference_mode(policy: Any) -> Value:
        if type(policy.x_src) is np.ndarray:
            return compute(policy)
        xp = array_namespace(policy.x_src)
        if is_torch_namespace(xp) and xp.is_inference_mode_enabled():
            with xp.inference_mode(False):  # else the next reader could not have gradients through it
                return compute(policy)
        return compute(policy)

    return cached_property(compute_outside_inference_mode)


def depends_on_mode(xp: Namespace, *arrays: Any) -> bool:
    """Return True if a value computed from `arrays` depends on the moment: on torch recording gradients, or not.

    Then a policy computes it in the mode of whoever makes the policy. For unknown libraries that is safer, too.
    """
    if is_torch_namespace(xp):
        return any(array.requires_grad for array in arrays)
    # Our own arrays on a GPU say so; NumPy's cannot.
    return not is_numpy_namespace(xp) and getattr(xp, "RECORDS_GRADIENTS", True)


def detach_fields(policy: object) -> dict[str, Any]:
    """Return the attributes of a policy, its tensors cut off from torch's graph."""
    return {name: v.detach() if hasattr(v, "detach") else v for name, v in vars(policy).items()}


def convert_to_x_0(x_src: Array, sigma_src, velocities: Array, xp: Namespace) -> Array:
    """Return the x_0 that velocities (B, K, ...) at the source point to."""
    return xp.expand_dims(x_src, axis=1) - spread_per_sample(sigma_src, velocities, xp) * velocities


def compute_softmax(logits: Array, xp: Namespace) -> Array:
    """Return the softmax over axis 1."""
    weights = xp.exp(logits - xp.max(logits, axis=1, keepdims=True))
    return weights / xp.sum(weights, axis=1, keepdims=True)


def check_eps(eps: float) -> None:
    """Raise ScheduleError unless `eps` is above 0."""
    if not eps > 0:
        raise ScheduleError(f"eps is above 0; got {eps!r}")


def check_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    """Raise ShapeError unless `array` has the shape, and is not empty."""
    if tuple(array.shape) != tuple(shape) or 0 in shape:
        raise ShapeError(f"{name} must have the shape {_text(shape)}, none of it 0; got {_text(array.shape)}")


def as_real(name: str, array: Array, xp: Namespace) -> Array:
    """Return `array` in float32 or better: half precision loses the last substeps."""
    if array.dtype == xp.float32:
        return array
    if not xp.isdtype(array.dtype, "real floating"):
        raise ShapeError(f"{name} must be floating point; got {array.dtype}")
    return array if array.dtype == xp.float64 else xp.astype(array, xp.float32)


def as_state(x_t: Array, x_src: Array, xp: Namespace) -> Array:
    """Return `x_t` in float32 or better, if it has the shape of `x_src`."""
    check_shape("x_t", x_t, x_src.shape)
    return as_real("x_t", x_t, xp)


def as_noise_levels(sigma, batch: int) -> float | np.ndarray:
    """Return one noise level as a float, or one per sample as a float64 host array (B,)."""
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


def spread_per_sample(value, like: Array, xp: Namespace) -> Any:
    """Return a host number, or one number per sample shaped to broadcast against `like`, in its dtype and place."""
    if type(value) is float or np.ndim(value) == 0:
        return float(value)  # a NumPy scalar would lift a float32 state to float64
    if not is_numpy_namespace(xp):
        value = xp.asarray(value, dtype=like.dtype, device=device(like))
    else:
        value = value.astype(like.dtype)
    return xp.reshape(value, (-1, *(1,) * (like.ndim - 1)))


def _text(shape) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
