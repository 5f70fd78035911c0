import numpy as np
import pytest

import piflow_edge as pf
from piflow_edge import PiFlowError


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
        assert set(result.timings) == {"noise", "network", "policy", "decode", "total"}
        assert result.images[0].size == (8, 8) and result.images[0].mode == "L"
        assert generator([1], output="latent").images is None

    def test_multistep_ends_near_euler(self, generator):
        euler, multistep = (
            generator([1, 2], seed=0, solver=solver).latents for solver in ("euler", "multistep")
        )
        assert 0 < np.linalg.norm(multistep - euler) < 1e-2 * np.linalg.norm(euler)

    def test_the_callback_sees_every_call(self, generator):
        seen = []
        generator([1, 2], callback=lambda done, nfe, x_t: seen.append((done, nfe, x_t.shape)))
        assert seen == [(1, 2, (2, 1, 8, 8)), (2, 2, (2, 1, 8, 8))]

    def test_running_with_other_calls_than_trained_is_said(self, generator, caplog):
        generator([1], nfe=1)
        assert "trained for 2 calls" in caplog.text

    def test_temperature_sharpens_all_calls_but_the_last(self, generator):
        plain, cold = generator([1], seed=0).latents, generator([1], seed=0, temperature=0.1).latents
        assert not np.array_equal(plain, cold)
        np.testing.assert_array_equal(
            generator([1], seed=0, nfe=1).latents, generator([1], seed=0, nfe=1, temperature=0.1).latents
        )

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (dict(labels=[10]), r"10 classes, 0 to 9: 0, 1, .*got label 10"),
            (dict(labels=[-1]), "got label -1"),
            (dict(labels=["zebra"]), "'zebra'"),
            (dict(labels=[True]), "got label True"),
            (dict(labels=[1.0]), "got label 1.0"),
            (dict(labels=[]), "one label or more"),
            (dict(labels=None), "wants labels"),
            (dict(labels=[1], count=3), "no count"),
            (dict(labels=[1], nfe=0), "nfe is a whole number, 1 or more; got nfe=0"),
            (dict(labels=[1], substeps=0), "total_substeps"),
            (dict(labels=[1], temperature=-1), "temperature is 0 or more"),
            (dict(labels=[1], temperature=float("nan")), "temperature is 0 or more"),
            (
                dict(labels=[1], noise=np.zeros((1, 1, 4, 4), np.float32)),
                r"\(1, 1, 8, 8\); got .*\(1, 1, 4, 4\)",
            ),
            (dict(labels=[1, 2], noise=np.zeros((1, 1, 8, 8), np.float32)), r"\(2, 1, 8, 8\)"),
            (dict(labels=[1], noise=np.full((1, 1, 8, 8), np.nan, np.float32)), "finite"),
            (dict(labels=[1], noise=np.zeros((1, 1, 8, 8), np.int64)), "floating point"),
            (dict(labels=[1], noise=np.full((1, 1, 8, 8), 1e300)), "finite in float32"),
            (dict(labels=[1], noise=[[1.0], [1.0, 2.0]]), "one array"),
            (dict(labels=3.5), "got label 3.5"),
            (dict(labels=[1], temperature="warm"), "temperature is 0 or more"),
            (dict(labels=[1], seed=1.5), "seed is a whole number"),
            (dict(labels=[1], seed=None), "seed is a whole number"),
            (dict(labels=[1], seed=[(0, 0, 0)]), "seed is a whole number"),
            (dict(labels=[1], seed=[(0.5, 0)]), "seed is a whole number"),
            (dict(labels=[1], seed=-1), "seed is a whole number"),
            (dict(labels=[1], seed=[(0, 0), (0, 1)]), r"one \(seed, index\) per image"),
            (dict(labels=[1], output="jpeg"), "output is"),
            (dict(labels=[1], solver="rk4"), "solver is one of euler, multistep"),
        ],
    )
    def test_bad_arguments_get_a_clear_error(self, generator, arguments, words):
        with pytest.raises(PiFlowError, match=words):
            generator(**arguments)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (dict(engine="warp-drive"), "engine is one of auto, ort"),
            (dict(device="tpu"), "runs on any, cpu, cuda"),
            (dict(precision="int3"), "holds fp32"),
        ],
    )
    def test_an_engine_that_is_not_there_is_an_error(self, shared_bundle, arguments, words):
        with pytest.raises(PiFlowError, match=words):
            pf.load(shared_bundle, **arguments)
