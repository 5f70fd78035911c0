"""Random policies, as the tests of the kernels take them, and how far a kernel may be from the exact answer."""

import numpy as np

from piflow_edge import DXPolicy, GMPolicy
from piflow_edge.kernels.rollout import integrate

ROUNDING = 2.0**-24  # what rounding a number to float32 costs at most, relative to it


def gm_case(seed, *, B=2, K=5, C=3, size=(5, 7), sigma_src=1.0, logstd=-2.0, spread=1.0, sharpness=1.0):
    """Inputs of a GMPolicy in float32; `spread` scales the means, `sharpness` the log-weights."""
    rng = np.random.default_rng(seed)
    return dict(
        means=(spread * rng.standard_normal((B, K, C, *size))).astype(np.float32),
        logweights=(sharpness * rng.standard_normal((B, K, 1, *size))).astype(np.float32),
        logstds=np.full((B, 1, 1, *(1 for _ in size)), logstd, np.float32),
        x_src=rng.standard_normal((B, C, *size)).astype(np.float32),
        sigma_src=sigma_src,
    )


def dx_case(seed, *, B=2, N=4, C=3, size=(5, 7), sigma_src=1.0, **options):
    rng = np.random.default_rng(seed)
    return dict(
        grid=rng.standard_normal((B, N, C, *size)).astype(np.float32),
        x_src=rng.standard_normal((B, C, *size)).astype(np.float32),
        sigma_src=sigma_src,
        segment_size=0.5,
        **options,
    )


def wide(inputs):
    """The same numbers in float64, exactly."""
    return {
        k: v.astype(np.float64) if getattr(v, "dtype", None) == np.float32 else v for k, v in inputs.items()
    }


def levels(sigma_src, sigma_dst=0.0, substeps=16):
    return np.linspace(sigma_src, sigma_dst, substeps + 1)


def takes_gram_form(K, C):
    """Which form of the rollout the CPU kernel has for a mixture; as gram_is_faster in gm_gram.h."""
    return -(-K // 4) * 4 <= C and C >= 8


def exact_and_allowed(inputs, x_start, sigmas, *, temperature=1.0, eps=1e-4):
    """The end of a rollout computed in float64, and the error allowed to float32 at each position.

    Allowed is what a relative change of 4 roundings in every input makes of the exact answer there (sharp
    mixtures amplify it), plus 32 roundings of the largest state met: the accumulated rounding of up to 16
    steps, each of which rounds the state about twice.
    """

    def exact(inputs, x_start):
        policy = GMPolicy(**wide(inputs), eps=eps).temper(temperature)
        return integrate(policy, x_start.astype(np.float64), sigmas, kernel="reference")

    def nudge(rng, a):
        return a * (1 + 4 * ROUNDING * rng.choice([-1.0, 1.0], a.shape)) if isinstance(a, np.ndarray) else a

    expected = exact(inputs, x_start)
    sensitivity = np.zeros_like(expected)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        moved = {k: v if k == "sigma_src" else nudge(rng, v) for k, v in inputs.items()}
        sensitivity = np.maximum(sensitivity, np.abs(exact(moved, nudge(rng, x_start)) - expected))
    # Channels of a position share its mixture weights; four draws may miss the worst direction, by some 8.
    sensitivity = 8 * sensitivity.max(axis=1, keepdims=True)
    largest = max(np.abs(a).max() for a in (expected, x_start, inputs["x_src"], inputs["means"]))
    return expected, sensitivity + 32 * ROUNDING * largest


def gm_network(x_src, sigma_src):
    """A network without weights: a mixture around the state."""
    batch, channels, *size = x_src.shape
    chance = np.random.default_rng(7)
    means = x_src[:, None] + chance.standard_normal((batch, 3, channels, *size)).astype(x_src.dtype)
    logweights = chance.standard_normal((batch, 3, 1, *size)).astype(x_src.dtype)
    return GMPolicy(means, logweights, np.full((batch, 1, 1, 1, 1), -1.0, x_src.dtype), x_src, sigma_src)


def dx_network(x_src, sigma_src):
    grid = x_src[:, None] * np.linspace(0.5, 1, 4, dtype=x_src.dtype).reshape(-1, 1, 1, 1)
    return DXPolicy(grid, x_src, sigma_src, segment_size=0.5)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape or (2, 3, 4, 4))
