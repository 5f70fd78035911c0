"""The mixture with a standard deviation for each component: Bayes' rule, and what it has in common with GMPolicy."""

import numpy as np
import pytest

from piflow_edge import GMPolicy, PiFlowError, rollout
from piflow_edge.policies import GMKPolicy


def gmk_inputs(seed, *, batch=2, components=3, channels=2, size=(2, 2), widths=(-2.0, -0.5, 0.3)):
    rng = np.random.default_rng(seed)
    logstds = np.resize(widths, components) + 0.2 * np.arange(batch)[:, None]
    return dict(
        means=rng.standard_normal((batch, components, channels, *size)),
        logweights=rng.standard_normal((batch, components, 1, *size)),
        logstds=logstds.reshape(batch, components, 1, *(1 for _ in size)),
        x_src=rng.standard_normal((batch, channels, *size)),
    )


def brute_posterior_mean(policy, x_t, sigma_t):
    """E[x_0 | x_t] of one pixel in one channel by summing over a fine grid of x_0, with Bayes' rule as it reads."""
    x_0 = np.linspace(-40, 40, 400_001)
    x_src, s = policy.x_src.item(), policy.sigma_src
    means, variances = policy.x_0_means.ravel(), policy.x_0_variance.ravel()
    logweights = policy.logweights.ravel()
    prior = sum(
        np.exp(logweight) / np.sqrt(v) * np.exp(-((x_0 - mean) ** 2) / (2 * v))
        for logweight, mean, v in zip(logweights, means, variances, strict=True)
    )
    log = -((x_t - (1 - sigma_t) * x_0) ** 2) / (2 * sigma_t**2) + (x_src - (1 - s) * x_0) ** 2 / (2 * s**2)
    density = prior * np.exp(log - log.max())
    return np.sum(density * x_0) / np.sum(density)


@pytest.mark.parametrize("sigma_src", [1.0, 0.7])
@pytest.mark.parametrize("sigma_t", [0.65, 0.3, 0.05])
def test_the_velocity_is_that_of_the_posterior_worked_out_by_brute_force(sigma_src, sigma_t):
    inputs = gmk_inputs(1, batch=1, channels=1, size=(1, 1))
    policy = GMKPolicy(**inputs, sigma_src=sigma_src)
    x_t = inputs["x_src"] * sigma_t + 0.4
    expected = (x_t.item() - brute_posterior_mean(policy, x_t.item(), sigma_t)) / sigma_t
    # The sum over the grid is exact to its step of 2e-4, squared.
    np.testing.assert_allclose(policy.velocity(x_t, sigma_t).item(), expected, rtol=1e-6)


def test_channels_of_a_pixel_share_their_component():
    # Two channels with the same numbers are twice the evidence for a component, not the same.
    inputs = gmk_inputs(2, batch=1, channels=1, size=(1, 1))
    double = {name: np.repeat(inputs[name], 2, axis=axis) for name, axis in [("means", 2), ("x_src", 1)]}
    policy = GMKPolicy(**(inputs | double), sigma_src=1.0)
    x_t, s, sigma = np.full((1, 2, 1, 1), 0.3), 1.0, 0.2
    # Quadrature in two dimensions over the mixture's own Gaussians.
    x_0 = np.linspace(-12, 12, 1601)
    grid = np.stack(np.meshgrid(x_0, x_0, indexing="ij"))
    density = 0
    for k in range(3):
        mean, v = policy.x_0_means[0, k, :, 0, 0], policy.x_0_variance[0, k].item()
        exponent = -np.sum((grid - mean[:, None, None]) ** 2, axis=0) / (2 * v)
        density = density + np.exp(policy.logweights[0, k].item() + exponent) / v
    likelihood = -np.sum((0.3 - (1 - sigma) * grid) ** 2, axis=0) / (2 * sigma**2)
    density = density * np.exp(likelihood)
    assert s == policy.sigma_src  # at pure noise the source says nothing more
    expected = np.sum(density * grid[0]) / np.sum(density)
    found = policy.velocity(x_t, sigma)
    np.testing.assert_allclose(found.ravel(), [(0.3 - expected) / sigma] * 2, rtol=1e-5)


def test_equal_widths_are_a_gm_policy():
    inputs = gmk_inputs(3, widths=(-1.0,))
    shared = inputs | {"logstds": inputs["logstds"][:, :1]}
    ours, theirs = GMKPolicy(**inputs, sigma_src=0.9), GMPolicy(**shared, sigma_src=0.9)
    x_t = inputs["x_src"] * 0.5
    for one, other in [(ours, theirs), (ours.temper(0.4), theirs.temper(0.4))]:
        for sigma in (0.9, 0.4, 0.01, np.array([0.3, 0.0])):
            np.testing.assert_allclose(one.velocity(x_t, sigma), other.velocity(x_t, sigma), rtol=1e-9)


def test_at_the_source_it_is_the_weighted_mean():
    inputs = gmk_inputs(4)
    weights = np.exp(inputs["logweights"]) / np.exp(inputs["logweights"]).sum(axis=1, keepdims=True)
    found = GMKPolicy(**inputs, sigma_src=0.8).velocity(inputs["x_src"], 0.8)
    np.testing.assert_allclose(found, (weights * inputs["means"]).sum(axis=1), rtol=1e-12)


def test_float32_follows_float64_down_to_data():
    inputs = gmk_inputs(5, components=4, widths=(-3.0, -1.0, 0.0, -2.0))
    single = {name: array.astype(np.float32) for name, array in inputs.items()}
    exact = rollout(GMKPolicy(**inputs, sigma_src=1.0), inputs["x_src"], 1.0, 0.0, 128)
    found = rollout(GMKPolicy(**single, sigma_src=1.0), single["x_src"], 1.0, 0.0, 128)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-4)


def test_every_library_gives_the_same(library):
    inputs = gmk_inputs(6)
    there = GMKPolicy(**{name: library.array(array) for name, array in inputs.items()}, sigma_src=0.9)
    found = there.velocity(library.array(inputs["x_src"]), 0.3)
    expected = GMKPolicy(**inputs, sigma_src=0.9).velocity(inputs["x_src"], 0.3)
    np.testing.assert_allclose(library.numpy(found), expected, rtol=1e-9)


def test_a_dropped_component_and_a_wrong_shape():
    inputs = gmk_inputs(7)
    policy = GMKPolicy(**inputs, sigma_src=1.0)
    dropped = policy.drop_parts(np.array([[0, 1, 1], [1, 0, 1.0]]), 0.5)
    assert np.isneginf(dropped.logweights[0, 0]).all() and type(dropped) is GMKPolicy
    assert np.isfinite(dropped.velocity(inputs["x_src"], 0.2)).all()
    with pytest.raises(PiFlowError, match="logstds must have the shape"):
        GMKPolicy(**(inputs | {"logstds": inputs["logstds"][:, :1]}), sigma_src=1.0)
