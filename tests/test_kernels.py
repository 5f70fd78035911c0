"""The compiled kernels and the closed form, held to the reference in float64."""

import numpy as np
import pytest
from golden_cases import case_id, cases
from golden_policies import make_policy, sampler_shift
from hypothesis import given, settings
from hypothesis import strategies as st

from piflow_edge import DXPolicy, GMPolicy, PiFlowError, rollout
from piflow_edge.integrator import integrate
from piflow_edge.kernels import cpu
from piflow_edge.schedule import count_substeps, substep_sigmas

ULP = 2.0**-24  # half the spacing of float32 at 1: what one rounding costs, relative

compiled = pytest.mark.skipif(cpu.library() is None, reason="the kernels were not compiled")


@compiled
@pytest.mark.parametrize("isa", [None, *cpu.isas()[1:]])
@pytest.mark.parametrize("case", cases("rollout"), ids=case_id)
def test_rollout_is_the_authors(case, library, isa):
    params = case.params
    policy = make_policy(case, library, np.float32)
    if "temperature" in params:
        policy = policy.tempered(params["temperature"])
    raw_t = [case[name].astype(np.float64) for name in ("raw_t_start", "raw_t_end")]
    sigmas = substep_sigmas(*raw_t, count_substeps(*raw_t, params["total_substeps"]), sampler_shift(case))
    x_end = cpu.rollout(policy, library.array(case["x_t_start"]), sigmas, isa=isa)
    case.check("x_t_end", library.numpy(x_end), np.float32)
