import numpy as np
import pytest

from piflow_edge import DXPolicy, GMPolicy, Schedule
from piflow_edge.sampling import sample

from golden_cases import case_id, cases
from golden_policies import sampler_shift


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
        temperature=params["temperature"],
        # The authors count from the first step; ours from the first re-noising.
        renoise=lambda draw: case["step_noise"][draw - 1].astype(dtype),
        kernel="reference",
    )
    case.check("x_final", x_0, dtype)
    case.check("net_in_x_t", np.stack([x_t for x_t, _ in calls]), dtype)
    case.check("net_in_t", np.stack([t for _, t in calls]), np.float64)
