from itertools import pairwise

import numpy as np
import pytest

from piflow_edge import PiFlowError, Schedule, unwarp, warp
from piflow_edge.errors import ScheduleError
from piflow_edge.schedule import count_substeps, substep_sigmas
from tests.helpers.golden_cases import case_id, cases
from tests.helpers.golden_policies import sampler_shift


def schedule_of(case):
    params = case.params
    return Schedule(
        nfe=params["nfe"],
        shift=sampler_shift(case),
        final_step_size_scale=params["final_step_size_scale"],
        h=params["h"],
    )


@pytest.mark.parametrize("case", cases("scheduler"), ids=case_id)
def test_levels_are_the_authors(case):
    schedule = schedule_of(case)
    num_timesteps = case.params["num_train_timesteps"]
    case.check("sigmas", schedule.sigmas, np.float64)
    case.check("timesteps", schedule.sigmas[:-1] * num_timesteps, np.float64)
    case.check("timesteps_dst", [s.sigma_dst * num_timesteps for s in schedule.segments], np.float64)
    case.check("m_vals", [s.m for s in schedule.segments], np.float64)


@pytest.mark.parametrize("case", cases("scheduler", lambda name: name.endswith("shift3.2")), ids=case_id)
def test_renoising_is_the_authors(case):
    steps = zip(schedule_of(case).segments, case["step_model_output"], case["step_noise"], strict=True)
    out = [s.renoise(x.astype(np.float64), noise.astype(np.float64)) for s, x, noise in steps]
    case.check("step_out", out, np.float64)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.2])
def test_unwarp_inverts_warp(shift):
    raw_t = np.linspace(0, 1, 101)
    np.testing.assert_allclose(unwarp(warp(raw_t, shift), shift), raw_t, atol=1e-15)


@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("scale", [0.25, 1.0, 1.5])
def test_segments_cover_all_of_time_and_share_the_substeps(nfe, scale):
    segments = Schedule(nfe=nfe, shift=2.0, final_step_size_scale=scale).segments
    assert segments[0].sigma_src == 1 and segments[-1].sigma_dst == 0
    for before, after in pairwise(segments):
        assert before.sigma_dst == after.sigma_src == before.sigma_next
    # Each segment rounds its own share, by half a substep at most.
    assert abs(sum(s.substeps for s in segments) - 128) <= nfe / 2


def test_full_renoising_starts_every_segment_from_clean_data():
    segments = Schedule(nfe=3, h="inf").segments
    assert all(s.sigma_dst == 0 and s.m == 0 for s in segments)
    assert [s.renoises for s in segments] == [True, True, False]


def test_substep_counts_round_halves_to_even():
    assert [
        count_substeps(2.5 / 16, 0, 16),
        count_substeps(3.5 / 16, 0, 16),
        count_substeps(0.5, 0.5, 128),
    ] == [
        2,
        4,
        1,
    ]


def test_a_sample_that_is_done_keeps_its_level():
    sigmas = substep_sigmas(np.array([1.0, 1.0]), np.array([0.0, 0.75]), np.array([4, 1]), 1.0)
    np.testing.assert_array_equal(sigmas[:, 0], [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_array_equal(sigmas[:, 1], [1, 0.75, 0.75, 0.75, 0.75])


@pytest.mark.parametrize(
    "settings",
    [
        dict(nfe=0),
        dict(nfe=2.0),
        dict(nfe=True),
        dict(shift=0),
        dict(shift=float("nan")),
        dict(final_step_size_scale=0),
        dict(final_step_size_scale=-1.5),
        dict(final_step_size_scale=float("inf")),
        dict(final_step_size_scale=float("nan")),
        dict(total_substeps=0),
        dict(h=-1),
        dict(h="much"),
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(PiFlowError, match=next(iter(settings))):
        Schedule(**settings)


@pytest.mark.parametrize(
    ("nfe", "scale", "rounded", "raised"),
    [
        (4, 0.5, [37, 37, 37, 18], [37, 37, 37, 19]),
        (8, 0.5, [17] * 7 + [9], [18] * 7 + [9]),
        (4, 1.0, [32] * 4, [32] * 4),  # a whole number stays, whatever warp and unwarp lost on the way
        (1, 1.0, [128], [128]),
    ],
)
def test_substeps_are_rounded_by_the_schedule_s_rule(nfe, scale, rounded, raised):
    for rule, expected in (("round", rounded), ("ceil", raised)):
        schedule = Schedule(nfe, 3.2, scale, substep_rule=rule)
        assert [segment.substeps for segment in schedule.segments] == expected
    with pytest.raises(ScheduleError, match="'round' or 'ceil'; got 'floor'"):
        Schedule(nfe, substep_rule="floor")
