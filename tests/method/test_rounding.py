"""How far velocities in float32 may be from exact ones follows from the policy's formula, not from a constant."""

import numpy as np
import pytest

from piflow_edge.errors import CheckFailedError
from piflow_edge.policies import GMPolicySpec
from piflow_edge.policies.rounding import bound_velocities
from piflow_edge.runtime.verification import Row, check

SIGMA, LEVELS = 0.25, [0.25, 0.125, 0.025]  # the last of four calls, down to a tenth of its way


def mixture(seed, logstd, spread=1.0):
    random = np.random.default_rng(seed)
    outputs = {
        "means": spread * random.standard_normal((4, 8, 3, 8, 8), np.float32),
        "logweights": random.standard_normal((4, 8, 1, 8, 8), np.float32),
        "logstds": np.full((4, 1, 1, 1, 1), logstd, np.float32),
    }
    return {name: array.astype(np.float32) for name, array in outputs.items()}, random.standard_normal(
        (4, 3, 8, 8), np.float32
    )


def velocities(outputs, x_src, dtype, eps=1e-4):
    policy = GMPolicySpec(8, eps=eps).policy(
        {name: array.astype(dtype) for name, array in outputs.items()}, x_src.astype(dtype), SIGMA
    )
    return np.stack([policy.velocity(x_src.astype(dtype), level) for level in LEVELS])


def error(ours, exact):
    return np.abs(ours - exact).max() / np.abs(exact).max()


@pytest.mark.parametrize("logstd", [0, -2, -4, -5])
@pytest.mark.parametrize("seed", range(4))
def test_an_honest_formula_in_float32_passes(seed, logstd):
    outputs, x_src = mixture(seed, logstd)
    bound = bound_velocities(GMPolicySpec(8), outputs, x_src, SIGMA, LEVELS)
    exact = velocities(outputs, x_src, np.float64)
    assert error(velocities(outputs, x_src, np.float32), exact) <= bound


@pytest.mark.parametrize("seed", range(4))
def test_components_that_are_alike_pass_too(seed):
    """As after a few steps of training: weights hang on small differences of what is large."""
    outputs, x_src = mixture(seed, -3, spread=0.01)
    outputs["logweights"] *= 0.02
    bound = bound_velocities(GMPolicySpec(8), outputs, x_src, SIGMA, LEVELS)
    exact = velocities(outputs, x_src, np.float64)
    assert error(velocities(outputs, x_src, np.float32), exact) <= bound
    outputs["means"] *= 1.5
    assert error(velocities(outputs, x_src, np.float64), exact) > bound


def test_a_constant_would_refuse_some():
    cases = [mixture(seed, logstd) for seed in range(4) for logstd in (-2, -4, -5)]
    errors = [error(velocities(*case, np.float32), velocities(*case, np.float64)) for case in cases]
    assert max(errors) > 1e-4


def test_another_formula_does_not_pass():
    outputs, x_src = mixture(1, -5)
    bound = bound_velocities(GMPolicySpec(8), outputs, x_src, SIGMA, LEVELS)
    exact = velocities(outputs, x_src, np.float64)
    outputs["logweights"] *= 1.1
    assert error(velocities(outputs, x_src, np.float64), exact) > 10 * bound


def test_a_refusal_says_whether_it_shows_and_what_to_do():
    rows = [
        Row("network outputs", 0.03, 0.02, "means.0, batch 3", "fp16"),
        Row("drawn images", 0.4, 2.5, "latents, batch 3", "fp16"),
    ]
    with pytest.raises(
        CheckFailedError, match=r"0\.02 is allowed; it does not show .* 0\.4 grey levels.*another engine"
    ):
        check(rows, "tiny")
