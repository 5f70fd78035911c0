"""What all policies have in common: the protocol that they follow, and the checks and helpers that they share.

Noise levels are host numbers (a float, or one float64 per sample); states, means and grids stay in the library,
device and precision they came in, float32 at least.
"""

from functools import cached_property, wraps
from typing import Any, Protocol

import numpy as np
from array_api_compat import device, is_numpy_namespace, is_torch_namespace, to_device

from piflow_edge.arrays import Array, Namespace, array_namespace
from piflow_edge.errors import ScheduleError, ShapeError


class VelocityField(Protocol):
    """What a rollout needs: a velocity that holds from the noise level of one student call down to the next."""

    def velocity(self, x_t: Array, sigma_t) -> Array:
        """u_t = dx/dsigma at state `x_t` and noise level `sigma_t`, a float or (B,); shape of `x_t`."""
        ...


def cached_for_all_modes(compute):
    """Make a property that is computed when it is first read, and then kept.

    Compiled kernels read none of these, and each takes as much memory as the means, or the log-weights.
    """

    @wraps(compute)
    def compute_outside_inference_mode(policy):
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


def detach_fields(policy: VelocityField) -> dict[str, Any]:
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
    if np.ndim(value) == 0:
        return float(value)  # a NumPy scalar would lift a float32 state to float64
    if not is_numpy_namespace(xp):
        value = xp.asarray(value, dtype=like.dtype, device=device(like))
    else:
        value = value.astype(like.dtype)
    return xp.reshape(value, (-1, *(1,) * (like.ndim - 1)))


def _text(shape) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
