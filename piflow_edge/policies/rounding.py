"""How much a policy's formula magnifies rounding: what float32 can be held to."""

from collections.abc import Iterable, Mapping

import numpy as np

from .policy import PolicyKind

# Draws of which the worst counts.
_DRAWS = 4
# How much more than one rounding of its inputs a float32 formula may show: each of its some ten operations rounds, and
# of all pixels the worst is some times worse than in a few draws. Mixtures of many widths came to 0.7 of it.
_ROUNDINGS = 64


def bound_velocities(
    spec: PolicyKind,
    outputs: Mapping[str, np.ndarray],
    x_src: np.ndarray,
    sigma_src: float,
    levels: Iterable[float],
) -> float:
    """Return how far velocities in float32 may be from exact ones, relative to the largest.

    In float64, what they are computed from is moved by half a unit in the last place that float32 has for its largest
    number, up or down at random. How far the velocities move for that is the formula's condition. It is large near the
    end of a segment, where it divides by a small noise level, and for sharp mixtures. Outputs move by as much as what
    they say of x_0 is rounded, which is beside the state: each component's on its own, and so their weights too.

    Args:
        spec: of the policy.
        outputs: of the network, at `x_src`.
        x_src: states (B, C, H, W) at the noise level `sigma_src`.
        levels: noise levels at which velocities are looked at.
    """
    levels, random = list(levels), np.random.default_rng(0)

    def velocities(move) -> np.ndarray:
        moved = {name: move(array.astype(np.float64), state) for name, array in outputs.items()}
        x_t = move(x_src.astype(np.float64), 0.0)
        policy = spec.policy(moved, x_t, sigma_src)
        return np.stack([policy.velocity(x_t, level) for level in levels])

    # x_0 is the state less the noise level times a velocity.
    state = float(np.abs(x_src).max()) / sigma_src
    exact = velocities(lambda array, least: array)
    largest = max(float(np.abs(exact).max()), 1e-12)
    moves = [
        velocities(
            lambda array, least: (
                array + max(np.abs(array).max(), least) * random.choice([-1.0, 1.0], array.shape) * 2.0**-24
            )
        )
        - exact
        for _ in range(_DRAWS)
    ]
    return _ROUNDINGS * max(float(np.abs(move).max()) for move in moves) / largest
