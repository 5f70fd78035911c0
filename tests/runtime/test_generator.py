import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import piflow_edge as pf
from piflow_edge import Cancelled, DXPolicy, PiFlowError, Schedule
from piflow_edge.bench.benchmark import distilled_guidance
from piflow_edge.bundle.sections import NetworkSpec
from piflow_edge.conditioning import TensorSpec
from piflow_edge.engines import Graph
from piflow_edge.errors import EngineError, NotFiniteError, ShapeError
from piflow_edge.kernels.normal import philox_normal
from piflow_edge.kernels.rollout import integrate
from piflow_edge.runtime import arguments
from piflow_edge.runtime.drawing.batching import cut_batches
from piflow_edge.runtime.generator import Generator
from piflow_edge.sampling import Hooks, sample
from tests.helpers.gaussian import COVARIANCE, PIXELS, SIDE, GaussianEngine, dx_spec, gaussian_generator


@pytest.fixture(scope="module")
def generator(shared_bundle):
    return pf.load(shared_bundle)


@pytest.mark.torch
class TestGenerator:
    def test_images_do_not_depend_on_the_batch(self, generator):
        labels = [i % 10 for i in range(70)]  # more than one piece
        whole = generator(labels, seed=5, output="numpy")
        for start, stop in [(0, 1), (1, 4), (4, 37), (37, 70)]:
            part = generator(labels[start:stop], seed=whole.seeds[start:stop], output="numpy")
            np.testing.assert_array_equal(part.images, whole.images[start:stop])
            np.testing.assert_allclose(part.latents, whole.latents[start:stop], rtol=0, atol=1e-6)

    def test_a_seed_makes_the_same_image_again(self, generator):
        first, second = generator([3, 7], seed=11, output="numpy"), generator([3, 7], seed=11, output="numpy")
        np.testing.assert_array_equal(first.latents, second.latents)
        assert not np.array_equal(first.latents, generator([3, 7], seed=12, output="latent").latents)

    def test_given_noise_is_what_the_seed_would_draw(self, generator):
        noise = pf.philox_normal(4, range(2), (1, 8, 8))
        drawn, given = generator([1, 2], seed=4), generator([1, 2], noise=noise)
        np.testing.assert_array_equal(drawn.latents, given.latents)
        assert given.seeds is None

    def test_labels_may_be_ids_names_or_one_of_either(self, generator):
        expected = generator([3], seed=0).latents
        for labels in (3, "3", ["3"], np.array([3]), np.array(3)):
            np.testing.assert_array_equal(generator(labels, seed=0).latents, expected)

    def test_the_result_says_what_ran(self, generator):
        result = generator([1], seed=0)
        assert (result.engine, result.device) == ("ort-cpu", "cpu")
        assert set(result.timings) == {"noise", "network", "policy", "decode", "transfer", "total"}
        assert result.timings["transfer"] == 0  # there is no bus
        assert result.images[0].size == (8, 8) and result.images[0].mode == "L"
        assert generator([1], output="latent").images is None

    def test_multistep_ends_near_euler(self, generator):
        euler, multistep = (
            generator([1, 2], seed=0, solver=solver).latents for solver in ("euler", "multistep")
        )
        assert 0 < np.linalg.norm(multistep - euler) < 1e-2 * np.linalg.norm(euler)

    def test_running_with_other_calls_than_trained_is_said(self, generator, caplog):
        generator([1], nfe=1)
        assert "trained for 2 calls" in caplog.text

    def test_temperature_sharpens_all_calls_but_the_last(self, generator):
        plain, cold = (generator([1], seed=0, temperature=t).latents for t in (1, 0.1))
        assert not np.array_equal(plain, cold)
        np.testing.assert_array_equal(
            generator([1], seed=0, nfe=1).latents, generator([1], seed=0, nfe=1, temperature=0.1).latents
        )

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (dict(labels=[10]), "got label 10; .* 10 classes, 0 to 9: 0, 1, "),
            (dict(labels=[-1]), "got label -1"),
            (dict(labels=["zebra"]), "'zebra'"),
            (dict(labels=[True]), "got label True"),
            (dict(labels=[1.0]), "got label 1.0"),
            (dict(labels=[]), "one label or more"),
            (dict(labels=None), "labels"),
            (dict(labels=[1], count=0), "count"),
            (dict(labels=[1], nfe=0), r"nfe .*nfe=0"),
            (dict(labels=[1], substeps=0), "total_substeps"),
            (dict(labels=[1], temperature=-1), "temperature"),
            (dict(labels=[1], temperature=float("nan")), "temperature"),
            (dict(labels=[1], temperature=float("inf")), r"temperature .*finite"),
            (
                dict(labels=[1], noise=np.zeros((1, 1, 4, 4), np.float32)),
                r"\(1, 1, 8, 8\); .*.*\(1, 1, 4, 4\)",
            ),
            (dict(labels=[1, 2], noise=np.zeros((1, 1, 8, 8), np.float32)), r"\(2, 1, 8, 8\)"),
            (dict(labels=[1], noise=np.full((1, 1, 8, 8), np.nan, np.float32)), "finite"),
            (dict(labels=[1], noise=np.zeros((1, 1, 8, 8), np.int64)), "floating point"),
            (dict(labels=[1], noise=np.full((1, 1, 8, 8), 1e300)), "finite in float32"),
            (dict(labels=[1], noise=[[1.0], [1.0, 2.0]]), "one array"),
            (dict(labels=3.5), "got label 3.5"),
            (dict(labels=[1], temperature="warm"), "temperature"),
            (dict(labels=[1], seed=1.5), "seed"),
            (dict(labels=[1], seed=None), "seed"),
            (dict(labels=[1], seed=True), "seed"),
            (dict(labels=[1], seed=[(0, 0, 0)]), "seed"),
            (dict(labels=[1], seed=[(0.5, 0)]), "seed"),
            (dict(labels=[1], seed=-1), "seed"),
            (dict(labels=[1], seed=2**64, noise=np.zeros((1, 1, 8, 8))), "seed"),
            (dict(labels=[1], seed=[(0, 0), (0, 1)]), r"one \(seed, index\) per image"),
            (dict(labels=[1], output="jpeg"), "output is"),
            (dict(labels=[1], nfe=[2]), "nfe"),
            (dict(labels=[1], h=-1), r"\bh\b"),
            (dict(labels=[1], strength=0.5), "give the image too"),
            (dict(labels=[1], mask=np.ones((8, 8), bool)), "give the image too"),
            (dict(labels=[1], image=np.zeros((8, 8), np.uint8)), "give the strength"),
            (dict(labels=[1], image=np.zeros((8, 8), np.uint8), strength=0), "strength is above 0"),
            (dict(labels=[1], image=np.zeros((9, 8), np.uint8), strength=0.5), "8x8 pixels"),
            (dict(labels=[1], image=np.zeros((2, 8, 8, 1), np.uint8), strength=0.5), "one image for all"),
            (dict(labels=[1], image=np.zeros((8, 8), np.uint8), mask=np.ones((9, 9), bool)), "a mask is"),
            (
                dict(labels=[1], image=np.zeros((8, 8), np.uint8), mask=np.ones((8, 8), bool), nfe=1),
                "sees nothing",
            ),
            (dict(labels=[1], resamples=2), "give a mask"),
            (dict(labels=[1], resamples=-1), "resamples"),
            (dict(labels=[1], callback_every=0), "callback_every"),
            (dict(labels=[1], callback_every=4), "give the callback too"),
            (dict(labels=[1], callback=3), r"callback .*Progress; .*3"),
            (dict(labels=[1], cancel=3), "cancel is a threading.Event"),
            (dict(labels=[1], cancel=0), "cancel is a threading.Event"),
            (dict(labels=[1], cancel=threading.Event), "cancel is a threading.Event"),
            (dict(labels=[1], solver="rk4"), r"solver .*euler, multistep"),
        ],
    )
    def test_bad_arguments_get_a_clear_error(self, generator, arguments, words):
        with pytest.raises(PiFlowError, match=words):
            generator(**arguments)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (dict(engine="warp-drive"), "auto, tensorrt"),
            (dict(device="tpu"), "runs on any, cpu, cuda"),
            (dict(precision="int3"), "holds fp32"),
            (dict(options={"num_threads": 1}), r"options is an EngineOptions, .* got \{'num_threads': 1\}"),
            (dict(device=3), "got device 3"),
            (dict(engine=["ort-cpu"]), r"got \['ort-cpu'\]"),
        ],
    )
    def test_an_engine_that_is_not_there_is_an_error(self, shared_bundle, arguments, words):
        with pytest.raises(PiFlowError, match=words):
            pf.load(shared_bundle, **arguments)

    def test_four_threads_make_what_one_makes(self, generator):
        jobs = [dict(labels=[i % 10] * 3, seed=i, nfe=1 + i % 3, output="numpy") for i in range(24)]
        alone = [generator(**job).images for job in jobs]
        with ThreadPoolExecutor(4) as threads:
            together = list(threads.map(lambda job: generator(**job).images, jobs))
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_latent_bundle_starts_from_latents_and_says_so_of_images(latent_bundle):
    with pf.load(latent_bundle) as generator:
        first = generator([1], seed=3)
        start = generator([1], seed=3, noise=pf.philox_normal(3, [0], first.latents.shape[1:]),
                          image=first.latents, strength=1.0)  # fmt: skip
        np.testing.assert_array_equal(start.latents, first.latents)
        with pytest.raises(PiFlowError, match="holds no encoder"):
            generator([1], image=first.images[0], strength=0.5)
        width, height = first.images[0].size
        mask = np.zeros((height, width), bool)
        mask[:, width // 2 :] = True  # in pixels, of which each latent has several
        kept = ~mask[:: height // first.latents.shape[2], :: width // first.latents.shape[3]]
        inpaint = generator([2], seed=4, image=first.latents, mask=mask, output="latent").latents
        np.testing.assert_array_equal(inpaint[0][:, kept], first.latents[0][:, kept])
        assert not np.array_equal(inpaint, first.latents)


def test_more_images_than_the_engine_takes_are_split():
    engine = GaussianEngine(max_batch=3)
    split, whole = gaussian_generator(engine), gaussian_generator()
    mask = np.arange(PIXELS).reshape(SIDE, SIDE) > 7
    image = whole([0] * 8, seed=9, output="latent").latents
    for settings in ({}, {"h": "inf"}, {"image": image, "strength": 0.5}, {"image": image, "mask": mask}):
        engine.calls.clear()
        first = []
        settings = {"labels": [0] * 8, "seed": 1, "output": "latent", **settings}
        found = split(**settings, callback=lambda done, first=first: first.append(done.first)).latents
        np.testing.assert_allclose(found, whole(**settings).latents, rtol=0, atol=1e-6)
        assert sorted(set(first)) == [0, 3, 6] and len(engine.calls) % 3 == 0


@pytest.mark.parametrize(
    ("count", "sizes"), [(8, [8]), (9, [5, 4]), (10, [5, 5]), (17, [6, 6, 5]), (12, [6, 6]), (3, [3])]
)
def test_calls_of_an_engine_for_several_images_are_large_enough_where_that_can_be(count, sizes):
    engine = GaussianEngine(min_batch=4, max_batch=8)  # of 3 it would make 4 itself
    found = gaussian_generator(engine, nfe=1)([0] * count, output="latent").latents
    assert engine.sizes == sizes
    whole = gaussian_generator(nfe=1)([0] * count, output="latent").latents
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-6)


def test_a_decoder_for_several_images_is_given_as_many_at_a_time():
    engine = GaussianEngine(min_batch=4, max_batch=8)
    found = list(cut_batches(9, 1, engine))  # of large pictures, which are decoded one by one
    assert found == [slice(0, 3), slice(3, 6), slice(6, 9)]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_a_call_keeps_to_its_cores_and_gives_them_back():
    core, before, seen = min(os.sched_getaffinity(0)), os.sched_getaffinity(0), []

    def stop(done):
        seen.append(os.sched_getaffinity(0))
        raise Cancelled("enough")

    generator = gaussian_generator()
    generator.options = pf.EngineOptions(cpu_affinity=(core,))
    with pytest.raises(Cancelled):
        generator([1], callback=stop)
    # Threads of the policies are started by this one, and a new thread keeps to the cores of its maker.
    assert seen == [{core}] and os.sched_getaffinity(0) == before


@pytest.mark.parametrize(("nfe", "expected"), [(1, 0.0), (4, 0.3), (11, 1.0), (12, 1.0)])
def test_auto_is_the_authors_temperature(nfe, expected):
    assert gaussian_generator()(
        [1], nfe=nfe, temperature="auto"
    ).recipe.settings.temperature == pytest.approx(expected)


def test_a_bundle_may_hold_the_authors_rule():
    generator = gaussian_generator()
    manifest = generator.bundle.manifest
    generator.bundle.manifest = replace(manifest, schedule=replace(manifest.schedule, temperature="auto"))
    for nfe in (1, 4):
        by_rule = generator([1], nfe=nfe)
        assert by_rule.recipe.settings.temperature == pytest.approx(0.1 * (nfe - 1))
        np.testing.assert_array_equal(
            by_rule.latents, generator([1], nfe=nfe, temperature=0.1 * (nfe - 1)).latents
        )
    assert generator([1], nfe=4, temperature=1).recipe.settings.temperature == 1


def test_nan_is_an_error_and_no_black_image():
    engine = GaussianEngine()
    exact = engine.run
    engine.run = lambda inputs: {name: value * np.nan for name, value in exact(inputs).items()}
    with pytest.raises(NotFiniteError, match=r"student .*NaN .*another prec"):
        gaussian_generator(engine)([1])


@pytest.mark.parametrize("odd", [np.nan, np.inf])
@pytest.mark.parametrize("output", ["pil", "numpy", "float"])
def test_nan_of_the_decoder_is_an_error_too(output, odd):
    bundle, last = gaussian_generator().bundle, 0.5
    tensors = [[TensorSpec(name, "float32", ["batch", 1, SIDE, SIDE])] for name in ("latents", "images")]
    networks = {**bundle.manifest.networks, "decoder": NetworkSpec("mirror", *tensors, {}, 20, {})}
    bundle.manifest = replace(bundle.manifest, networks=networks)

    def run(inputs):
        images = inputs["latents"].copy()
        images[-1, 0, -1, -1] = last
        return {"images": images}

    mirror = SimpleNamespace(name="mirror", min_batch=1, max_batch=None, run=run)
    generator = Generator(bundle, {"student": GaussianEngine(), "decoder": mirror})
    assert len(generator([1, 0], output=output).images) == 2
    last = odd
    with pytest.raises(NotFiniteError, match=r"decoder .*'gaussian' .*fp32 .*mirror .*NaN"):
        generator([1, 0], output=output)
    assert np.isfinite(generator([1, 0], output="latent").latents).all()


@pytest.mark.parametrize(("asked", "given"), [("auto", "auto"), ("fast", "fast")])
def test_auto_chooses_for_the_decoder_too_on_the_same_device(monkeypatch, asked, given):
    opened, closed = [], []

    def open_engine(graph, *, engine, device, options):
        name = graph.model.decode()
        opened.append((name, engine, device))
        if name == "decoder":
            raise EngineError("no decoder here")
        return SimpleNamespace(name="fast", device="gpu", close=lambda: closed.append(name))

    latents = gaussian_generator().bundle.manifest
    bundle = SimpleNamespace(
        name="b",
        manifest=replace(latents, networks={**latents.networks, "decoder": "one"}),
    )
    monkeypatch.setattr(
        "piflow_edge.runtime.residence.opening._graph_to_keep",
        lambda bundle, name, precision: nullcontext(Graph(name.encode())),
    )
    monkeypatch.setattr("piflow_edge.bundle.folder.Bundle", lambda folder, trusted_keys: bundle)
    monkeypatch.setattr("piflow_edge.runtime.residence.opening.open_engine", open_engine)
    with pytest.raises(EngineError, match="no decoder here"):
        pf.load("b", engine=asked)
    assert opened == [("student", asked, None), ("decoder", given, "gpu")] and closed == ["student"]


def test_without_classes_a_count_says_how_many():
    generator = gaussian_generator(class_names=())
    result = generator(count=3, seed=2, output="latent")
    assert result.latents.shape == (3, 1, SIDE, SIDE) and result.recipe.conditioning == [{}] * 3
    np.testing.assert_array_equal(
        generator.make_again(result.recipe, output="latent").latents, result.latents
    )
    with pytest.raises(
        PiFlowError,
        match=r"labels .*count",
    ):
        generator(labels=[1])
    with pytest.raises(PiFlowError, match="count"):
        generator(count=1.5)


def test_with_classes_a_count_is_of_each_label():
    result = gaussian_generator()([1, 0], count=2, output="latent")
    assert [told["label"] for told in result.recipe.conditioning] == [1, 1, 0, 0]


def test_every_image_may_have_a_seed_of_its_own():
    generator = gaussian_generator()
    several = generator([0] * 3, seed=[5, 9, 5], output="latent")
    assert several.seeds == [(5, 0), (9, 0), (5, 0)]
    np.testing.assert_array_equal(several.latents[0], several.latents[2])
    np.testing.assert_allclose(
        several.latents[1:2], generator([0], seed=9, output="latent").latents, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("nfe", [1, 2, 4, 8])
def test_other_calls_than_trained_leave_a_dx_policy_its_numbers(nfe):
    spec, engine = dx_spec(num_nodes=3, segment_size=0.25), GaussianEngine(num_nodes=3)
    generator = gaussian_generator(engine, policy=spec)
    found = generator([0, 1], seed=3, nfe=nfe, output="latent")
    asked = []

    def network(x_src, sigma_src):
        grid = engine.run({"x_t": x_src, "t": np.full(2, sigma_src, np.float32)})["grid"]
        asked.append(DXPolicy(grid, x_src, sigma_src, segment_size=0.25, shift=1.0, mode="grid", eps=1e-4))
        return asked[-1]

    noise = pf.philox_normal(3, range(2), (1, SIDE, SIDE))
    expected = sample(network, noise, Schedule(nfe=nfe, total_substeps=32), hooks=Hooks(integrate=integrate))
    np.testing.assert_array_equal(found.latents, expected)
    assert len(asked) == nfe
    # Stretched to the segment instead, the nodes would stand elsewhere and give another image, unless it is as long.
    stretched = gaussian_generator(engine, policy=dx_spec(num_nodes=3, segment_size=1 / nfe))
    same = np.array_equal(stretched([0, 1], seed=3, nfe=nfe, output="latent").latents, found.latents)
    assert same == (nfe == 4)


def test_noise_between_calls_comes_from_the_seed_also_when_the_first_is_given():
    generator = gaussian_generator()
    drawn = generator([0, 1], seed=6, h=0.8, output="latent")
    given = generator(
        [0, 1], seed=6, h=0.8, noise=pf.philox_normal(6, range(2), (1, SIDE, SIDE)), output="latent"
    )
    np.testing.assert_array_equal(given.latents, drawn.latents)
    assert not np.array_equal(drawn.latents, generator([0, 1], seed=6, output="latent").latents)
    recorded = gaussian_generator(h=0.8)  # as the bundle's own
    np.testing.assert_array_equal(recorded([0, 1], seed=6, output="latent").latents, drawn.latents)


def test_strength_1_leaves_nothing_of_the_image():
    generator = gaussian_generator()
    image = np.full((1, SIDE, SIDE), 0.7, np.float32)
    plain = generator([0, 1], seed=2, output="latent").latents
    np.testing.assert_array_equal(
        generator([0, 1], seed=2, image=image, strength=1, output="latent").latents, plain
    )


def test_the_lower_the_strength_the_closer_to_the_image():
    engine = GaussianEngine()
    generator = gaussian_generator(engine, nfe=8)
    images = generator([0] * 50, seed=1, output="latent").latents
    distances = []
    for strength in (0.125, 0.25, 0.5, 0.75):
        engine.calls.clear()
        found = generator([0] * 50, seed=2, image=images, strength=strength, output="latent").latents
        distances.append(np.sqrt(np.mean((found - images) ** 2)))
        assert len(engine.calls) == 8 * strength
    assert distances == sorted(distances) and distances[0] < 0.3 * COVARIANCE[0, 0] ** 0.5 < distances[-1]


def test_a_setting_the_student_was_not_trained_for_is_said_once(caplog):
    generator = gaussian_generator()
    for nfe in (2, 2, 3, 2, 4):
        generator([0], nfe=nfe)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"bundle 'gaussian' was trained for 4 calls per image and runs with {nfe}" for nfe in (2, 3)
    ]
    gaussian_generator()([0], nfe=2)
    assert len(caplog.records) == 3  # another generator says it again


def test_a_start_the_student_was_not_trained_for_is_said(caplog):
    generator, image = gaussian_generator(), np.zeros((1, SIDE, SIDE), np.float32)
    generator([0], image=image, strength=0.5)
    assert "noise levels" not in caplog.text
    generator([0], image=image, strength=0.6)
    assert "at noise levels 1, 0.75, 0.5, 0.25 and starts at 0.6" in caplog.text


class TestInpainting:
    """Against the exact conditional of Gaussian data: half a ring of pixels given, the other half drawn."""

    drawn = np.arange(PIXELS) >= PIXELS // 2
    count = 1000

    @pytest.fixture
    def images(self):
        white = np.random.default_rng(0).standard_normal((self.count, PIXELS))
        return (white @ np.linalg.cholesky(COVARIANCE).T).astype(np.float32)

    def inpaint(self, images, **settings):
        mask = self.drawn.reshape(SIDE, SIDE)
        image = images.reshape(-1, 1, SIDE, SIDE)
        made = gaussian_generator()(
            [0] * self.count, seed=1, image=image, mask=mask, output="latent", **settings
        )
        return made.latents.reshape(-1, PIXELS)

    def seam(self, images):
        """Mean square step from the last kept pixel to the first drawn one."""
        last = PIXELS // 2 - 1
        return np.mean((images[:, last + 1] - images[:, last]) ** 2)

    def test_what_is_kept_is_exact(self, images):
        for settings in ({}, {"h": "inf"}, {"strength": 0.5}, {"nfe": 2, "substeps": 7, "resamples": 1}):
            found = self.inpaint(images, **settings)
            np.testing.assert_array_equal(found[:, ~self.drawn], images[:, ~self.drawn])
            assert not np.isclose(found[:, self.drawn], images[:, self.drawn]).all(axis=1).any()

    def test_a_soft_mask_mixes_what_is_drawn_and_what_is_given(self, images):
        image = images[:8].reshape(-1, 1, SIDE, SIDE)
        hard = self.drawn.reshape(SIDE, SIDE)
        half, whole = (
            gaussian_generator()([0] * 8, seed=1, image=image, mask=mask, output="latent").latents
            for mask in (hard * 0.5, hard)
        )
        # What is drawn is the same, so half of it and half of the image are shown; rounded once in float32.
        np.testing.assert_allclose(half, np.where(hard, 0.5 * whole + 0.5 * image, image), rtol=0, atol=1e-6)

    def test_resamples_bring_what_is_drawn_to_the_conditional(self, images):
        known = COVARIANCE[np.ix_(~self.drawn, ~self.drawn)]
        exact = COVARIANCE[np.ix_(self.drawn, ~self.drawn)] @ np.linalg.inv(known)
        kept = images[:, ~self.drawn]
        errors, seams = [], []
        for resamples in (0, 4, 16):
            found = self.inpaint(images, resamples=resamples)
            regressed = np.linalg.lstsq(kept, found[:, self.drawn], rcond=None)[0].T
            errors.append(np.linalg.norm(regressed - exact) / np.linalg.norm(exact))
            seams.append(self.seam(found) / self.seam(images))
        # Without, four calls hardly see what is kept: the seam is 2.5 times as rough as the data is there.
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.7 * errors[0]
        assert seams == sorted(seams, reverse=True) and seams[0] > 2 and seams[-1] < 1.6


class TestStopping:
    def test_what_a_callback_raises_reaches_the_caller(self):
        def callback(done):
            raise Cancelled("seen enough")

        with pytest.raises(Cancelled, match="seen enough"):
            gaussian_generator()([0], callback=callback)

    def test_another_thread_may_stop_a_call(self):
        cancel, reached = threading.Event(), threading.Event()
        engine = GaussianEngine()
        generator = gaussian_generator(engine, nfe=4)

        def callback(done):
            reached.set()
            cancel.wait(60)

        with ThreadPoolExecutor(1) as threads:
            job = threads.submit(generator, [0], callback=callback, cancel=cancel)
            assert reached.wait(60)
            cancel.set()
            with pytest.raises(Cancelled, match="after 1 "):
                job.result(60)
        assert engine.calls == [1.0]
        assert len(generator([0]).images) == 1  # it can be used again

    def test_watching_changes_nothing(self):
        generator = gaussian_generator()
        plain = generator([0], output="latent").latents
        watched = generator([0], output="latent", cancel=threading.Event()).latents
        np.testing.assert_allclose(watched, plain, rtol=0, atol=1e-6)

    def test_closed_it_refuses_and_frees(self):
        engine = GaussianEngine()
        with gaussian_generator(engine) as generator:
            generator([0])
        assert engine.closed
        with pytest.raises(PiFlowError, match=r"closed; load .*again"):
            generator([0])
        generator.close()

    def test_closed_from_a_callback_it_ends_what_runs_first(self):
        engine = GaussianEngine()
        generator, seen = gaussian_generator(engine), []

        def callback(done):
            generator.close()
            seen.append(engine.closed)

        generator([0], callback=callback)
        assert seen == [False] * 4 and engine.closed

    def test_an_engine_that_fails_to_close_keeps_no_decoder_open(self):
        class Stuck(GaussianEngine):
            def close(self):
                raise EngineError("the GPU is gone")

        generator = gaussian_generator(Stuck())
        generator.decoder = GaussianEngine()
        with pytest.raises(EngineError, match="the GPU is gone"):
            generator.close()
        assert generator.decoder.closed

    def test_a_preview_can_be_had_to_the_end_of_the_call(self):
        generator, seen = gaussian_generator(), []

        def callback(done):
            generator.close()
            seen.append(generator.decode(done.x_0))

        result = generator([0], callback=callback, output="numpy")
        assert len(seen) == 4
        np.testing.assert_array_equal(seen[-1], result.images)
        with pytest.raises(PiFlowError, match="is closed"):
            generator.decode(result.latents)


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        (np.zeros((SIDE, SIDE), np.float32), r"\(B, 1, 4, 4\); .*float32 \(4, 4\)"),
        (np.zeros((1, 3, SIDE, SIDE), np.float32), r"got float32 \(1, 3, 4, 4\)"),
        (np.zeros((0, 1, SIDE, SIDE), np.float32), r"got float32 \(0, 1, 4, 4\)"),
        (np.zeros((1, 1, SIDE, SIDE), np.uint8), "got uint8"),
        (np.full((1, 1, SIDE, SIDE), np.nan), "got NaN or infinity"),
        (3.0, "got float64"),
        ([[1.0], [1.0, 2.0]], "one array"),
    ],
)
def test_what_is_no_latents_is_not_decoded(latents, words):
    with pytest.raises(ShapeError, match=words):
        gaussian_generator().decode(latents)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        {"imitation": 3, "guidance": [1.5]},
        {"imitation": {"nfe": 2}, "guidance": {"scale": "1.5"}},
        {"imitation": {"nfe": ["2", -1, True, [1]]}, "guidance": {"scale": None}},
    ],
)
def test_a_bundle_may_hold_any_provenance(settings):
    generator = gaussian_generator(settings=settings)
    assert generator.trained_nfes == (4,) and distilled_guidance(generator.bundle) == 1


def test_noise_is_drawn_by_the_threads_asked_for(monkeypatch):
    drawn, threads = philox_normal, []

    def watched(*arguments, num_threads, **how):
        threads.append(num_threads)
        return drawn(*arguments, num_threads=num_threads, **how)

    monkeypatch.setattr(arguments, "philox_normal", watched)
    generator = gaussian_generator(nfe=2, h=0.5)
    generator.options = pf.EngineOptions(num_threads=3)
    generator([0, 1], seed=0)
    generator([0, 1], seed=[0, 1])
    assert threads == [3] * (2 + 4)  # to start and between the calls, of both images at once or one by one


def test_outputs_are_one_image_in_different_forms():
    generator = gaussian_generator()
    results = {form: generator([0, 1], output=form) for form in ("pil", "numpy", "float", "latent")}
    latents, floats = results["latent"].latents, results["float"].images
    assert floats.dtype == np.float32 and floats.min() >= 0 and floats.max() <= 1
    expected = np.clip((latents.transpose(0, 2, 3, 1) + 1) / 2, 0, 1)
    np.testing.assert_allclose(floats, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(results["numpy"].images, np.rint(255 * floats).astype(np.uint8))
    for image, array in zip(results["pil"].images, results["numpy"].images, strict=True):
        np.testing.assert_array_equal(np.asarray(image), array[..., 0])
    assert results["latent"].images is None
