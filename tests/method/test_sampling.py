from functools import partial

import numpy as np
import pytest

from piflow_edge import Cancelled, DXPolicy, GMPolicy, PiFlowError, Schedule
from piflow_edge.kernels.rollout import integrate
from piflow_edge.sampling import Known, sample
from tests.helpers.golden_cases import case_id, cases
from tests.helpers.golden_policies import sampler_shift


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
        integrate=partial(integrate, kernel="reference"),
    )
    case.check("x_final", x_0, dtype)
    case.check("net_in_x_t", np.stack([x_t for x_t, _ in calls]), dtype)
    case.check("net_in_t", np.stack([t for _, t in calls]), np.float64)


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


networks = pytest.mark.parametrize("network", [gm_network, dx_network])


@networks
@pytest.mark.parametrize("every", [1, 5, 64])
@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_a_callback_sees_the_clean_estimate_and_changes_nothing(network, every, kernel):
    schedule, seen = Schedule(nfe=2, total_substeps=40, h=0.5), []

    def renoise(draw):
        return noise(seed=draw)

    carry = partial(integrate, kernel=kernel)
    expected = sample(network, noise(), schedule, renoise=renoise, integrate=carry)
    found = sample(
        network,
        noise(),
        schedule,
        renoise=renoise,
        integrate=carry,
        callback=seen.append,
        callback_every=every,
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)  # float64, so that only rounding is left
    substeps = [segment.substeps for segment in schedule.segments]
    wanted = [(i + 1, n) for i, of in enumerate(substeps) for n in [*range(every, of, every), of]]
    assert [(done.call, done.substep) for done in seen] == wanted
    for done in seen:
        u_t = done.policy.velocity(done.x_t, done.sigma_t)
        # Levels below the policies' eps of 1e-4 do not occur but for 0, where the state is the estimate.
        np.testing.assert_allclose(done.x_0, done.x_t - done.sigma_t * u_t, rtol=0, atol=1e-12)
    assert seen[-1].sigma_t == 0 and np.array_equal(seen[-1].x_0, found)


def test_multistep_takes_a_segment_in_one_piece():
    with pytest.raises(PiFlowError, match="leave callback_every out"):
        sample(gm_network, noise(), Schedule(), solver="multistep", callback_every=4)


@networks
def test_from_a_level_on_the_path_the_path_goes_on(network):
    schedule, path = Schedule(nfe=4, total_substeps=64), []
    x_0 = sample(network, noise(), schedule, callback=path.append)
    for done in path[:-1]:
        found = sample(network, done.x_t, schedule, strength=done.sigma_t)
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

    sample(network, noise(), Schedule(nfe=4), strength=strength)
    assert asked == levels


@pytest.mark.parametrize("strength", [0, -0.1, 1.1, float("nan"), "1"])
def test_a_start_outside_the_levels_is_refused(strength):
    with pytest.raises(PiFlowError, match="above 0 and up to 1"):
        sample(dx_network, noise(), Schedule(), strength=strength)


@networks
@pytest.mark.parametrize("h", [0.0, 0.7, "inf"])
def test_keeping_at_every_substep_is_keeping_at_every_call(network, h):
    # Within a segment a policy takes each position on its own. With a callback the kept part is put back after each
    # of its pieces, here after every substep; without one only where the network is called next.
    schedule = Schedule(nfe=3, total_substeps=30, h=h)
    drawn = (np.arange(4) > 1).astype(float)
    known = Known(noise(seed=1), drawn, noise(seed=2))
    settings = dict(known=known, renoise=lambda draw: noise(seed=10 + draw))
    states = []
    often = sample(network, noise(), schedule, callback=states.append, callback_every=1, **settings)
    seldom = sample(network, noise(), schedule, **settings)
    np.testing.assert_allclose(often, seldom, rtol=0, atol=1e-12)
    for x_0 in (often, seldom, *(done.x_0 for done in states)):
        np.testing.assert_array_equal(x_0[..., drawn == 0], known.x_0[..., drawn == 0])
    for done in states:
        kept = (1 - done.sigma_t) * known.x_0 + done.sigma_t * known.noise
        np.testing.assert_allclose(done.x_t[..., drawn == 0], kept[..., drawn == 0], rtol=0, atol=1e-12)


def test_the_network_sees_what_is_kept_at_the_level_it_is_called():
    drawn = (np.arange(4) > 1).astype(float)
    known = Known(noise(seed=1), drawn, noise(seed=2))
    seen = []

    def network(x_src, sigma_src):
        seen.append((x_src, sigma_src))
        return dx_network(x_src, sigma_src)

    sample(network, noise(), Schedule(nfe=4), known=known)
    for x_src, sigma_src in seen:
        kept = (1 - sigma_src) * known.x_0 + sigma_src * known.noise
        np.testing.assert_allclose(x_src[..., drawn == 0], kept[..., drawn == 0], rtol=0, atol=1e-12)


def test_resamples_draw_noise_of_their_own_and_are_counted():
    known, draws, seen = Known(noise(seed=1), np.array([0.0, 0, 1, 1]), noise(seed=2)), [], []

    def renoise(draw):
        draws.append(draw)
        return noise(seed=10 + draw)

    schedule = Schedule(nfe=3, h=0.5)
    sample(dx_network, noise(), schedule, known=known, resamples=2, renoise=renoise, callback=seen.append)
    assert len(draws) == len(set(draws)) == 2 + 2 * 2  # after two segments, and twice within two
    assert [(done.call, done.nfe) for done in seen] == [(1, 7), (4, 7), (7, 7)]


def test_asked_to_stop_it_stops_between_substeps():
    asked = []

    def cancelled():
        asked.append(None)
        return len(asked) == 4

    calls = []

    def network(x_src, sigma_src):
        calls.append(sigma_src)
        return dx_network(x_src, sigma_src)

    with pytest.raises(Cancelled, match="after 1 network calls"):
        sample(network, noise(), Schedule(nfe=2, total_substeps=128), cancelled=cancelled)
    assert calls == [1.0] and len(asked) == 4  # before the call, and after 16, 32 and 48 of 64 substeps


def test_it_hears_while_it_fits_what_is_drawn_to_what_is_kept():
    known, asked = Known(noise(seed=1), np.array([0.0, 0, 1, 1]), noise(seed=2)), []
    sample(dx_network, noise(), Schedule(nfe=2, total_substeps=128), known=known, resamples=1,
           renoise=lambda draw: noise(seed=10 + draw), cancelled=lambda: asked.append(None))  # fmt: skip
    assert len(asked) == 3 + 3 * 4  # before each call, and every 16 of three times 64 substeps


def test_a_rare_callback_does_not_make_it_deaf():
    asked, seen = [], []
    sample(dx_network, noise(), Schedule(nfe=1, total_substeps=128), callback=seen.append, callback_every=60,
           cancelled=lambda: asked.append(None))  # fmt: skip
    assert [done.substep for done in seen] == [60, 120, 128]
    assert len(asked) == 1 + 8 + 2  # before the call, every 16 substeps, and where it was told besides
