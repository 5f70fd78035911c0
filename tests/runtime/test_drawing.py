"""What surrounds the sampling loop: callbacks, cancelling, inpainting, and that none of it changes the images."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import piflow_edge as pf
from piflow_edge import Cancelled, PiFlowError, SamplingSettings, Schedule
from piflow_edge.kernels.rollout import integrate
from piflow_edge.runtime.drawing.inpainting import KeptImage
from piflow_edge.runtime.drawing.latents import draw
from piflow_edge.runtime.drawing.observer import Observer
from piflow_edge.schedule import count_substeps, segment_sigmas, unwarp
from tests.helpers.gaussian import SIDE, GaussianEngine, gaussian_generator
from tests.helpers.rollout_cases import dx_network, gm_network, noise

PLAIN = SamplingSettings()


def event(is_set):
    return SimpleNamespace(is_set=is_set)


def keep(drawn):
    """An image of which a mask without soft parts keeps some."""
    return KeptImage(noise(seed=1), drawn, drawn, noise(seed=2))


def draw_plainly(network, x_t, schedule, settings, renoise, kept_image):
    """The same images by one loop that holds everything, written without the hooks."""
    segments = schedule.segments_below(settings.strength)
    repeats = settings.resamples if kept_image is not None else 0
    x_t = x_t if kept_image is None else kept_image.put_into(x_t, settings.strength)
    for i, segment in enumerate(segments):
        sigma = segment.sigma_src
        for j in range(repeats if sigma < 1 else 0):
            policy = network(x_t, sigma).temper(settings.temperature)
            substeps = count_substeps(unwarp(sigma, schedule.shift), 0.0, schedule.total_substeps)
            x_0 = kept_image.put_into(
                integrate(policy, x_t, segment_sigmas(sigma, 0.0, substeps, schedule.shift)), 0.0
            )
            x_t = (1 - sigma) * x_0 + sigma * renoise(len(segments) + i * repeats + j + 1)
        policy = network(x_t, sigma)
        if i < len(segments) - 1:
            policy = policy.temper(settings.temperature)
        ends = sigma, segment.sigma_dst, segment.substeps
        x_t = integrate(policy, x_t, segment_sigmas(*ends, schedule.shift))
        x_t = x_t if kept_image is None else kept_image.put_into(x_t, segment.sigma_dst)
        if segment.renoises:
            x_t = segment.renoise(x_t, renoise(i + 1))
    return x_t


@pytest.mark.parametrize("network", [gm_network, dx_network])
@pytest.mark.parametrize("h", [0.0, 0.7, "inf"])
@pytest.mark.parametrize("resamples", [None, 0, 2])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_what_surrounds_the_loop_is_the_plain_loop_bit_for_bit(network, h, resamples, strength):
    schedule = Schedule(nfe=3, shift=2.0, total_substeps=40, h=h)
    kept_image = None if resamples is None else keep((np.arange(4) > 1) * 1.0)
    settings = SamplingSettings(temperature=0.3, strength=strength, resamples=resamples or 0)
    how = dict(renoise=lambda draw: noise(seed=10 + draw), kept_image=kept_image)
    expected = draw_plainly(network, noise(), schedule, settings, **how)
    seen = []
    for observer in (Observer(), Observer(seen.append)):
        found = draw(network, noise(), schedule, settings, observer=observer, **how)
        np.testing.assert_array_equal(found, expected)
    assert seen[-1].call == seen[-1].nfe


@pytest.mark.parametrize("nfe", [1, 2, 4])
@pytest.mark.parametrize("h", [None, 0.5])
def test_a_generator_makes_what_the_plain_loop_makes(nfe, h):
    generator, engine = gaussian_generator(nfe=4), GaussianEngine()
    found = generator([1, 0], seed=3, nfe=nfe, h=h, temperature=0.5, output="latent")

    def network(x_t, sigma_t):
        outputs = engine.run({"x_t": x_t, "t": np.full(2, sigma_t, np.float32)})
        return generator.student.as_policy(outputs, x_t, sigma_t)

    start, *fresh = (pf.philox_normal(3, range(2), (1, SIDE, SIDE), draw=draw) for draw in range(nfe))
    settings = SamplingSettings(temperature=0.5, strength=1.0)
    schedule = Schedule(nfe=nfe, total_substeps=32, h=h or 0.0)
    expected = draw_plainly(network, start, schedule, settings, lambda draw: fresh[draw - 1], None)
    np.testing.assert_array_equal(found.latents, expected)


networks = pytest.mark.parametrize("network", [gm_network, dx_network])


@networks
@pytest.mark.parametrize("every", [1, 5, 64])
@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_a_callback_sees_the_clean_estimate_and_changes_nothing(network, every, kernel):
    schedule, seen = Schedule(nfe=2, total_substeps=40, h=0.5), []

    def renoise(draw):
        return noise(seed=draw)

    how = dict(renoise=renoise, integrate=partial(integrate, kernel=kernel))
    expected = draw(network, noise(), schedule, PLAIN, **how)
    found = draw(network, noise(), schedule, PLAIN, observer=Observer(seen.append, every), **how)
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
        draw(
            gm_network, noise(), Schedule(), SamplingSettings(solver="multistep"), observer=Observer(print, 4)
        )


@networks
@pytest.mark.parametrize("h", [0.0, 0.7, "inf"])
def test_keeping_at_every_substep_is_keeping_at_every_call(network, h):
    # Within a segment a policy takes each position on its own. With a callback the kept part is put back after each
    # of its pieces, here after every substep; without one only where the network is called next.
    schedule = Schedule(nfe=3, total_substeps=30, h=h)
    drawn = (np.arange(4) > 1).astype(float)
    kept_image = keep(drawn)
    settings = dict(kept_image=kept_image, renoise=lambda draw: noise(seed=10 + draw))
    states = []
    often = draw(network, noise(), schedule, PLAIN, observer=Observer(states.append, 1), **settings)
    seldom = draw(network, noise(), schedule, PLAIN, **settings)
    np.testing.assert_allclose(often, seldom, rtol=0, atol=1e-12)
    for x_0 in (often, seldom, *(done.x_0 for done in states)):
        np.testing.assert_array_equal(x_0[..., drawn == 0], kept_image.x_0[..., drawn == 0])
    for done in states:
        kept = (1 - done.sigma_t) * kept_image.x_0 + done.sigma_t * kept_image.noise
        np.testing.assert_allclose(done.x_t[..., drawn == 0], kept[..., drawn == 0], rtol=0, atol=1e-12)


def test_the_network_sees_what_is_kept_at_the_level_it_is_called():
    drawn = (np.arange(4) > 1).astype(float)
    kept_image = keep(drawn)
    seen = []

    def network(x_src, sigma_src):
        seen.append((x_src, sigma_src))
        return dx_network(x_src, sigma_src)

    draw(network, noise(), Schedule(nfe=4), PLAIN, kept_image=kept_image)
    for x_src, sigma_src in seen:
        kept = (1 - sigma_src) * kept_image.x_0 + sigma_src * kept_image.noise
        np.testing.assert_allclose(x_src[..., drawn == 0], kept[..., drawn == 0], rtol=0, atol=1e-12)


def test_resamples_draw_noise_of_their_own_and_are_counted():
    kept_image, draws, seen = keep(np.array([0.0, 0, 1, 1])), [], []

    def renoise(draw):
        draws.append(draw)
        return noise(seed=10 + draw)

    schedule = Schedule(nfe=3, h=0.5)
    settings = SamplingSettings(resamples=2)
    draw(
        dx_network,
        noise(),
        schedule,
        settings,
        kept_image=kept_image,
        renoise=renoise,
        observer=Observer(seen.append),
    )
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

    with pytest.raises(Cancelled, match="after 1 "):
        draw(
            network,
            noise(),
            Schedule(nfe=2, total_substeps=128),
            PLAIN,
            observer=Observer(cancel=event(cancelled)),
        )
    assert calls == [1.0] and len(asked) == 4  # before the call, and after 16, 32 and 48 of 64 substeps


def test_it_hears_while_it_fits_what_is_drawn_to_what_is_kept():
    known, asked = keep(np.array([0.0, 0, 1, 1])), []
    observer = Observer(cancel=event(lambda: asked.append(None)))
    draw(dx_network, noise(), Schedule(nfe=2, total_substeps=128), SamplingSettings(resamples=1), kept_image=known,
         renoise=lambda draw: noise(seed=10 + draw), observer=observer)  # fmt: skip
    assert len(asked) == 3 + 3 * 4  # before each call, and every 16 of three times 64 substeps


def test_a_rare_callback_does_not_make_it_deaf():
    asked, seen = [], []
    observer = Observer(seen.append, 60, event(lambda: asked.append(None)))
    draw(dx_network, noise(), Schedule(nfe=1, total_substeps=128), PLAIN, observer=observer)
    assert [done.substep for done in seen] == [60, 120, 128]
    assert len(asked) == 1 + 8 + 2  # before the call, every 16 substeps, and where it was told besides
