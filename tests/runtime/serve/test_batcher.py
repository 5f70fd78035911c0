import numpy as np
import pytest

pytest.importorskip("starlette", reason="a server needs the 'serve' extra")
pytest.importorskip("prometheus_client", reason="a server needs the 'serve' extra")
pytest.importorskip("httpx2", reason="starlette's test client needs it")

from piflow_edge import PiFlowError, SamplingSettings
from piflow_edge.errors import ShapeError
from piflow_edge.runtime.serve.batcher import Batcher
from piflow_edge.runtime.serve.counters import Counters
from piflow_edge.runtime.serve.jobs import BusyError, Job, StoppedError
from tests.helpers.gaussian import GaussianEngine, gaussian_generator


@pytest.fixture
def batcher(generator, gated):
    batcher = Batcher(generator, Counters(), max_batch=4, max_waiting=6)
    yield batcher
    gated.gate.set()
    batcher.close()


def submit(batcher, generator, count=1, seed=0, on_progress=None, **settings):
    request = generator.prepare(labels=[1] * count, seed=seed, settings=SamplingSettings(**settings))
    batcher.submit(job := Job(request, on_progress))
    return job


def test_what_waits_is_drawn_together_and_is_what_it_is_alone(batcher, generator, gated):
    first = submit(batcher, generator, seed=0)
    assert gated.begun.acquire(timeout=10)  # it is being drawn, alone
    others = [submit(batcher, generator, count, seed=count) for count in (1, 3)]
    gated.gate.set()
    results = [job.future.result(10) for job in (first, *others)]
    assert gated.sizes == [1] * 4 + [4] * 4
    for result, (count, seed) in zip(results, [(1, 0), (1, 1), (3, 3)], strict=True):
        alone = gaussian_generator()([1] * count, seed=seed, output="numpy")
        np.testing.assert_array_equal(result.images, alone.images)
        assert result.recipe.seeds == alone.recipe.seeds
        assert result.recipe.conditioning == alone.recipe.conditioning


def test_digits_come_out_alike_to_the_bit_in_every_batch(digits):
    requests = [digits.prepare(labels=[i % 10], seed=100 + i) for i in range(16)]
    together = digits.make_together(requests, output="latent")
    for i, result in enumerate(together):
        alone = digits(labels=[i % 10], seed=100 + i, output="latent")
        np.testing.assert_array_equal(result.latents, alone.latents)


def test_a_batch_holds_one_kind_of_request_and_no_more_than_it_may(batcher, generator, gated):
    submit(batcher, generator)
    assert gated.begun.acquire(timeout=10)
    jobs = [submit(batcher, generator, count, nfe=nfe) for count, nfe in [(3, 2), (1, 3), (2, 2)]]
    gated.gate.set()
    for job in jobs:
        job.future.result(10)
    # The two with 2 calls do not fit into one batch of 4.
    assert gated.sizes == [1] * 4 + [3] * 2 + [1] * 3 + [2] * 2


def test_requests_that_no_batch_holds_are_refused():
    generator = gaussian_generator()
    requests = [generator.prepare(labels=[0], settings=SamplingSettings(nfe=nfe)) for nfe in (1, 2)]
    with pytest.raises(ShapeError, match="same settings"):
        generator.make_together(requests)


def test_a_full_queue_refuses_and_says_when_to_come_again(batcher, generator, gated):
    submit(batcher, generator)
    assert gated.begun.acquire(timeout=10)
    submit(batcher, generator, 4)
    with pytest.raises(BusyError, match="4 images wait") as caught:
        submit(batcher, generator, 3)
    assert caught.value.retry_after >= 1
    submit(batcher, generator, 2)
    assert batcher.count_waiting() == 6
    with pytest.raises(BusyError):
        batcher.check_room()


def test_who_leaves_while_waiting_costs_no_network_call(batcher, generator, gated):
    submit(batcher, generator)
    assert gated.begun.acquire(timeout=10)
    gone = submit(batcher, generator, 2)
    batcher.abandon(gone)
    assert batcher.count_waiting() == 0 and gone.future.cancelled()
    gated.gate.set()
    submit(batcher, generator, 3).future.result(10)
    assert gated.sizes == [1] * 4 + [3] * 4


def test_a_batch_without_callers_stops_after_its_network_call(batcher, generator, gated):
    gone = submit(batcher, generator)
    assert gated.begun.acquire(timeout=10)
    batcher.abandon(gone)
    gated.gate.set()
    submit(batcher, generator, 2).future.result(10)
    assert gated.sizes == [1] + [2] * 4


def test_an_engine_that_fails_takes_only_its_own_batch_with_it(batcher, generator, gated):
    gated.failing = True
    failed = submit(batcher, generator)
    gated.gate.set()
    with pytest.raises(PiFlowError, match="out of order"):
        failed.future.result(10)
    gated.failing = False
    assert len(submit(batcher, generator, 2).future.result(10)) == 2
    assert batcher.is_working


def test_closing_fails_what_waits_and_finishes_what_is_drawn(batcher, generator, gated):
    drawn = submit(batcher, generator)
    assert gated.begun.acquire(timeout=10)
    waiting = submit(batcher, generator)
    drawn.future.add_done_callback(lambda future: None)
    gated.gate.set()
    batcher.close()
    assert len(drawn.future.result(0)) == 1
    with pytest.raises(StoppedError):
        waiting.future.result(0)
    with pytest.raises(StoppedError):
        submit(batcher, generator)
    assert not batcher.is_working


@pytest.mark.parametrize("max_batch", [None, 2], ids=["one piece", "pieces of 2"])
def test_progress_is_of_the_jobs_own_images(max_batch):
    engine = GaussianEngine(max_batch=max_batch)
    generator, counters = gaussian_generator(engine), Counters()
    seen = {0: [], 1: []}

    def look(number):
        return lambda p: seen[number].append((p.progress.call, p.first, p.preview))

    batch = [Job(generator.prepare(labels=[1] * n, seed=n), look(i)) for i, n in enumerate((1, 3))]
    batcher = Batcher(generator, counters, max_batch=4, max_waiting=8)
    batcher._draw(batch)
    batcher.close()
    for number, job in enumerate(batch):
        # The policy's last estimate is the image itself.
        images = np.zeros_like(job.future.result(0).images)
        calls = [call for call, _, _ in seen[number]]
        for call, first, preview in seen[number]:
            if call == 4:
                images[first : first + len(preview)] = preview
        np.testing.assert_array_equal(images, job.future.result(0).images)
        assert sorted(set(calls)) == [1, 2, 3, 4]


@pytest.mark.parametrize("on_progress, is_watched", [(None, False), (lambda progress: None, True)])
def test_recorded_images_are_watched_only_for_those_who_look(monkeypatch, on_progress, is_watched):
    """A callback would cut a CUDA graph of a whole image into its calls."""
    generator, watched = gaussian_generator(), []
    make = generator.make_together
    monkeypatch.setattr(type(generator), "is_recorded", True)
    monkeypatch.setattr(
        generator,
        "make_together",
        lambda *given, callback, **more: watched.append(callback) or make(*given, **more),
    )
    batcher = Batcher(generator, Counters(), max_batch=4, max_waiting=8)
    submit(batcher, generator, on_progress=on_progress).future.result(10)
    batcher.close()
    assert [callback is not None for callback in watched] == [is_watched]
