from functools import partial

import numpy as np
import pytest

from piflow_edge import DXPolicy, GMPolicy, PiFlowError, SamplingSettings, Schedule
from piflow_edge.kernels.rollout import integrate
from piflow_edge.sampling import Hooks, sample
from tests.helpers.golden_cases import case_id, cases
from tests.helpers.golden_policies import sampler_shift
from tests.helpers.rollout_cases import dx_network, gm_network, noise


@pytest.mark.parametrize("case", cases("sampling_loop"), ids=case_id)
def test_the_loop_is_the_authors(case, dtype):
    params = case.params
    schedule = Schedule(
        nfe=params["nfe"],
        shift=sampler_shift(case),
        final_step_size_scale=params["final_step_size_scale"],
        total_substeps=params["total_substeps"],
        h=params["h"],
    )
    calls = []

    def network(x_src, sigma_src):
        step = len(calls)
        calls.append((x_src, np.full(len(x_src), sigma_src * params["num_timesteps"])))
        if "net_means" in case:
            outputs = [case[f"net_{k}"][step].astype(dtype) for k in ("means", "logweights", "logstds")]
            return GMPolicy(*outputs, x_src, sigma_src, eps=params["eps"])
        return DXPolicy(
            case["net_output"][step].astype(dtype), x_src, sigma_src, eps=params["eps"],
            segment_size=params["policy_segment_size"], shift=params["policy_shift"], mode=params["policy_mode"],
        )  # fmt: skip

    x_0 = sample(
        network,
        case["noise"].astype(dtype),
        schedule,
        SamplingSettings(temperature=params["temperature"]),
        Hooks(
            integrate=partial(integrate, kernel="reference"),
            # The authors count from the first step; ours from the first re-noising.
            renoise=lambda draw: case["step_noise"][draw - 1].astype(dtype),
        ),
    )
    case.check("x_final", x_0, dtype)
    case.check("net_in_x_t", np.stack([x_t for x_t, _ in calls]), dtype)
    case.check("net_in_t", np.stack([t for _, t in calls]), np.float64)


networks = pytest.mark.parametrize("network", [gm_network, dx_network])


@networks
def test_from_a_level_on_the_path_the_path_goes_on(network):
    schedule, path = Schedule(nfe=4, total_substeps=64), []

    def keep_path(policy, x_t, sigmas, **how):
        path.append((integrate(policy, x_t, sigmas, **how), float(sigmas[-1])))
        return path[-1][0]

    x_0 = sample(network, noise(), schedule, hooks=Hooks(integrate=keep_path))
    for x_t, sigma_t in path[:-1]:
        found = sample(network, x_t, schedule, SamplingSettings(strength=sigma_t))
        np.testing.assert_allclose(found, x_0, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("strength", "levels"),
    [(1.0, [1, 0.75, 0.5, 0.25]), (0.6, [0.6, 0.5, 0.25]), (0.5, [0.5, 0.25]), (0.1, [0.1])],
)
def test_a_lower_start_leaves_the_calls_above_it_out(strength, levels):
    asked = []

    def network(x_src, sigma_src):
        asked.append(sigma_src)
        return dx_network(x_src, sigma_src)

    sample(network, noise(), Schedule(nfe=4), SamplingSettings(strength=strength))
    assert asked == levels


@pytest.mark.parametrize("strength", [0, -0.1, 1.1, float("nan"), "1"])
def test_a_start_outside_the_levels_is_refused(strength):
    with pytest.raises(PiFlowError, match=r"above 0 .*1"):
        sample(dx_network, noise(), Schedule(), SamplingSettings(strength=strength))


def test_a_schedule_that_adds_noise_says_that_it_needs_some():
    with pytest.raises(PiFlowError, match="h above 0"):
        sample(dx_network, noise(), Schedule(nfe=2, h=0.5))
