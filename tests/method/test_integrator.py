from types import SimpleNamespace

import numpy as np
import pytest

from piflow_edge import DXPolicy, GMPolicy, PiFlowError, rollout
from piflow_edge.kernels.rollout import integrate
from piflow_edge.schedule import count_substeps, substep_sigmas
from tests.helpers.golden_cases import case_id, cases
from tests.helpers.golden_policies import make_policy, sampler_shift


@pytest.mark.parametrize("case", cases("rollout"), ids=case_id)
def test_rollout_is_the_authors(case, library, dtype):
    params = case.params
    policy = make_policy(case, library, dtype)
    if "temperature" in params:
        policy = policy.temper(params["temperature"])
    raw_t = [case[name].astype(np.float64) for name in ("raw_t_start", "raw_t_end")]
    counts = count_substeps(*raw_t, params["total_substeps"])
    np.testing.assert_array_equal(counts, case["num_substeps"])

    sigmas = substep_sigmas(*raw_t, counts, sampler_shift(case))
    x_end = integrate(policy, library.array(case["x_t_start"].astype(dtype)), sigmas, kernel="reference")
    case.check("x_t_end", library.numpy(x_end), dtype)
    case.check("sigma_t_end", sigmas[-1], np.float64)
    if "traj_sigma" in case:
        case.check("traj_sigma", sigmas, np.float64)


def straight_policy(x_0):
    """A policy that always points at one x_0, so that its ODE has a closed form."""
    return SimpleNamespace(velocity=lambda x_t, sigma_t: (x_t - x_0) / sigma_t)


@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize("substeps", [1, 4, 128])
def test_rollout_is_exact_on_a_straight_path(substeps, shift):
    x_0, noise = np.random.default_rng(0).standard_normal((2, 1, 4, 8, 8), dtype=np.float32)
    x_dst = rollout(straight_policy(x_0), noise, 1.0, 0.25, substeps, shift=shift)
    # Each of up to 128 substeps rounds once more, in float32, on values of about 1.
    np.testing.assert_allclose(x_dst, x_0 + 0.25 * (noise - x_0), rtol=0, atol=128 * 2**-24)


def test_rollout_converges_at_first_order():
    # u = x at every level: x(sigma) = x_src exp(sigma - 1), and Euler's error halves with the step.
    policy = SimpleNamespace(velocity=lambda x_t, sigma_t: x_t)
    x_src = np.ones((1, 1, 1, 1))
    errors = [abs(rollout(policy, x_src, 1.0, 0.0, n).item() - np.exp(-1)) for n in (64, 128, 256)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.02)


def test_samples_of_a_batch_do_not_see_each_other():
    rng = np.random.default_rng(1)
    grid, x_src = rng.standard_normal((3, 4, 2, 5, 5)), rng.standard_normal((3, 2, 5, 5))
    sigma_src, sigma_dst, substeps = np.array([1.0, 0.8, 0.5]), np.array([0.0, 0.3, 0.4]), np.array([7, 3, 1])
    policy = DXPolicy(grid, x_src, sigma_src, segment_size=0.5)
    together = rollout(policy, x_src, sigma_src, sigma_dst, substeps)
    for i in range(3):
        one = DXPolicy(grid[i : i + 1], x_src[i : i + 1], float(sigma_src[i]), segment_size=0.5)
        alone = rollout(one, x_src[i : i + 1], float(sigma_src[i]), float(sigma_dst[i]), int(substeps[i]))
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-12, atol=1e-14)


def test_the_source_is_left_as_it_was_and_the_dtype_kept():
    x_src = np.ones((1, 1, 2, 2), np.float32)
    before = x_src.copy()
    x_dst = rollout(straight_policy(np.float32(0)), x_src, 1.0, 0.5, 3)
    assert x_dst.dtype == np.float32
    np.testing.assert_array_equal(x_src, before)


def linear_policy(a, b):
    """A policy whose x_0 is a line in sigma, whatever the state; `calls` lists where it was asked."""
    calls = []

    def velocity(x_t, sigma_t):
        calls.append(sigma_t)
        return (x_t - (a + b * sigma_t)) / sigma_t

    return SimpleNamespace(velocity=velocity, calls=calls)


@pytest.mark.parametrize("sigma_dst", [0.0, 0.3])
@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize("substeps", [5, 7, 32, 128])
def test_multistep_is_euler_where_x_0_is_linear_in_sigma(substeps, shift, sigma_dst):
    a, b, x_src = np.random.default_rng(2).standard_normal((3, 1, 2, 4, 4))
    policy = linear_policy(a, b)
    expected = rollout(policy, x_src, 0.9, sigma_dst, substeps, shift=shift)
    asked = len(policy.calls)
    found = rollout(policy, x_src, 0.9, sigma_dst, substeps, shift=shift, solver="multistep")
    assert (asked, len(policy.calls) - asked) == (substeps, -(-substeps // 4))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_multistep_comes_closer_to_all_the_euler_steps_than_a_quarter_of_them(library, dtype):
    rng = np.random.default_rng(3)
    means, x_src = rng.standard_normal((2, 6, 3, 8, 8)), rng.standard_normal((2, 3, 8, 8))
    logweights, logstds = rng.standard_normal((2, 6, 1, 8, 8)), np.full((2, 1, 1, 1, 1), -1.0)
    arrays = (library.array(a.astype(dtype)) for a in (means, logweights, logstds, x_src))
    *outputs, x_src = arrays
    policy = GMPolicy(*outputs, x_src, 1.0)
    end, few, quarter = (
        library.numpy(rollout(policy, x_src, 1.0, 0.0, n, solver=solver, kernel="reference"))
        for n, solver in [(128, "euler"), (128, "multistep"), (32, "euler")]
    )
    assert few.dtype == dtype
    assert np.linalg.norm(few - end) < 0.1 * np.linalg.norm(quarter - end)


@pytest.mark.parametrize("substeps", [1, 2, 3, 4])
def test_multistep_in_up_to_four_substeps_asks_once(substeps):
    policy = linear_policy(0.5, 0.0)
    x_dst = rollout(policy, np.ones((1, 1, 1, 1)), 1.0, 0.0, substeps, solver="multistep")
    assert len(policy.calls) == 1
    assert x_dst.item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(solver="rk4"), r"solver .*'rk4'"),
        (dict(solver="multistep", kernel="cpu"), "Euler steps only"),
        (dict(solver="multistep", sigma_dst=np.array([0.0, 0.5])), "all samples"),
    ],
)
def test_a_solver_that_cannot_run_is_refused(arguments, words):
    ends = dict(sigma_src=1.0, sigma_dst=0.0, substeps=8) | arguments
    with pytest.raises(PiFlowError, match=words):
        rollout(straight_policy(0.0), np.zeros((2, 1, 2, 2)), **ends)


@pytest.mark.parametrize(
    ("sigma_src", "sigma_dst", "substeps", "shift"),
    [
        (0.2, 0.5, 4, 1.0),
        (0.5, 0.5, 4, 1.0),
        (1.2, 0.5, 4, 1.0),
        (0.5, -0.1, 4, 1.0),
        (float("nan"), 0.0, 4, 1.0),
        (1.0, 0.0, 0, 1.0),
        (1.0, 0.0, 2.5, 1.0),
        (1.0, 0.0, 4, 0.0),
    ],
)
def test_a_segment_that_makes_no_sense_is_refused(sigma_src, sigma_dst, substeps, shift):
    with pytest.raises(PiFlowError):
        rollout(straight_policy(0.0), np.zeros((1, 1, 2, 2)), sigma_src, sigma_dst, substeps, shift=shift)
