"""How a generator is called, and what it and its results show of themselves."""

import copy
import io
import pickle
from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import piflow_edge as pf
from piflow_edge import PiFlowError, SamplingSettings
from piflow_edge.conditioning import Arrays, TensorSpec
from piflow_edge.errors import UsageError
from piflow_edge.runtime.generator import Generator
from piflow_edge.runtime.settings import CALL_ARGUMENTS, complete_settings
from tests.helpers.gaussian import SIDE, GaussianEngine, gaussian_generator

ENCODINGS = Arrays(
    (
        TensorSpec("hidden", "float32", ("batch", "tokens", 4)),
        TensorSpec("mask", "bool", ("batch", "tokens")),
    )
)


class EncodedEngine(GaussianEngine):
    """Moves its images by the mean of what steers them."""

    def run(self, inputs):
        self.steered = {name: inputs[name] for name in ("hidden", "mask")}
        outputs = super().run(inputs)
        shift = np.mean(inputs["hidden"] * inputs["mask"][..., None], axis=(1, 2)).astype(np.float32)
        return outputs | {"means": outputs["means"] + shift.reshape(-1, 1, 1, 1, 1)}


@pytest.fixture
def encoded():
    """A generator whose bundle takes arrays."""
    generator = gaussian_generator(EncodedEngine(max_batch=3), class_names=())
    generator.conditioner = ENCODINGS
    return generator


def encodings(count, tokens=3):
    hidden = np.random.default_rng(1).standard_normal((count, tokens, 4), np.float32)
    return {"hidden": hidden, "mask": np.ones((count, tokens), bool)}


def test_settings_may_be_given_whole_one_by_one_or_both():
    generator = gaussian_generator()
    expected = generator([1], seed=3, nfe=2, substeps=9, temperature=0.5, output="latent")
    settings = SamplingSettings(nfe=3, substeps=9, temperature=0.5)
    for given in (
        dict(settings=replace(settings, nfe=2)),
        dict(settings=settings, nfe=2),
        dict(settings=expected.recipe.settings),
    ):
        found = generator([1], seed=3, output="latent", **given)
        np.testing.assert_array_equal(found.latents, expected.latents)
        assert found.recipe == expected.recipe
    with pytest.raises(PiFlowError, match=r"SamplingSettings, .*\{'nfe': 2\}"):
        generator([1], settings={"nfe": 2})


def test_nothing_is_left_open_in_a_recipe():
    settings = gaussian_generator(nfe=3)([1]).recipe.settings
    assert settings == SamplingSettings(3, 32, "euler", 1.0, 0.0, 1.0, 0, SIDE, SIDE)


def test_settings_are_completed_once():
    manifest = gaussian_generator().bundle.manifest
    asked = SamplingSettings(nfe=2)
    first, again = (complete_settings(asked, manifest, has_image=False, has_mask=False) for _ in range(2))
    assert again is first  # looked up: it takes longer than the noise of a small image
    complete_settings(SamplingSettings(nfe=1), manifest, has_image=False, has_mask=False)
    with pytest.raises(PiFlowError, match="True"):  # equal to 1, and no number of calls
        complete_settings(SamplingSettings(nfe=True), manifest, has_image=False, has_mask=False)


def test_what_was_completed_completes_to_itself():
    manifest = gaussian_generator(h="inf").bundle.manifest
    completed, schedule = complete_settings(
        SamplingSettings(nfe=2), manifest, has_image=False, has_mask=False
    )
    assert complete_settings(completed, manifest, has_image=False, has_mask=False) == (completed, schedule)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("num_inference_steps", "give nfe"),
        ("guidance_scale", "no guidance to set"),
        ("generator", "give seed"),
        ("temprature", "did you mean temperature"),
        ("label", "did you mean labels"),
        ("prompts", "did you mean prompt"),
        ("colour", "settings are nfe, substeps"),
    ],
)
def test_an_argument_of_another_library_is_answered_with_ours(name, ours):
    with pytest.raises(UsageError, match=rf"no argument '{name}'; .*{ours}") as caught:
        gaussian_generator()([1], **{name: 4})
    assert isinstance(caught.value, TypeError)


def test_every_argument_of_a_call_is_known_by_name():
    named = [p.name for p in signature(Generator.__call__).parameters.values() if p.kind != p.VAR_KEYWORD]
    assert ("self", *CALL_ARGUMENTS) == tuple(named)


def test_a_result_is_saved_under_a_path_and_not_into_an_open_file_or_standard_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"write\(sys.stdout.buffer\)"):
        gaussian_generator()([1]).save(Path("-"))
    with pytest.raises(UsageError, match=r"under a path.*write\(file\)"):
        gaussian_generator()([1]).save(io.BytesIO())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [dict(height=8), dict(width=5), dict(settings=SamplingSettings(height=1))])
def test_another_size_than_the_bundle_makes_is_refused(given):
    generator = gaussian_generator()
    with pytest.raises(PiFlowError, match=rf"one size, {SIDE}x{SIDE} pixels; .*got (height|width)="):
        generator([1], **given)
    assert len(generator([1], height=SIDE, width=SIDE)) == 1


def test_arrays_steer_image_by_image(encoded):
    arrays = encodings(5)
    whole = encoded(arrays=arrays, seed=2, output="latent")  # in two pieces
    assert len(whole) == 5 and not np.allclose(whole.latents[0], encoded(arrays=encodings(1), seed=3).latents)
    for i in range(5):
        one = {name: array[i : i + 1] for name, array in arrays.items()}
        alone = encoded(one, seed=[whole.seeds[i]], output="latent")  # the first argument is what steers
        np.testing.assert_allclose(alone.latents[0], whole.latents[i], rtol=0, atol=1e-6)
    again = encoded.make_again(whole.recipe, arrays=arrays, output="latent")
    np.testing.assert_array_equal(again.latents, whole.latents)
    assert len(encoded(arrays=encodings(2), count=2)) == 4


def test_arrays_that_do_not_fit_are_refused_before_anything_runs(encoded):
    whole = encoded(arrays=encodings(2), output="latent")
    encoded.engine.calls.clear()
    for call in (
        lambda: encoded(),
        lambda: encoded(labels=[1]),
        lambda: encoded(prompt="an apple"),
        lambda: encoded(arrays={"hidden": encodings(2)["hidden"]}),
        lambda: encoded.make_again(whole.recipe),
        lambda: encoded.make_again(whole.recipe, arrays=encodings(2, tokens=4)),
    ):
        with pytest.raises(PiFlowError):
            call()
    assert not encoded.engine.calls


def test_a_generator_is_described_in_a_line():
    text = repr(gaussian_generator())
    assert (
        "'gaussian'" in text and "exact on cpu" in text and "4 network calls" in text and "2 classes" in text
    )


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_generator_says_what_to_do_instead_of_copying_it(copied):
    with pytest.raises(UsageError, match=r"load .*again .* threads .*"):
        copied(gaussian_generator())


@pytest.mark.parametrize("output", ["pil", "numpy", "float", "latent"])
def test_a_result_is_short_and_goes_image_by_image(output):
    result = gaussian_generator()([0, 1, 0, 1], seed=5, output=output)
    assert len(result) == 4 == len(list(result))
    text = repr(result)
    assert len(text) < 150 and "4 " in text and "5-0, 5-1, 5-2, ..." in text and "exact on cpu" in text
    first = (result.latents if output == "latent" else result.images)[0]
    np.testing.assert_array_equal(np.asarray(next(iter(result))), np.asarray(first))


def test_a_result_shows_itself_in_a_notebook():
    for output in ("pil", "numpy", "float"):
        result = gaussian_generator()([0] * 12, output=output)
        picture = Image.open(io.BytesIO(result._repr_png_()))
        assert picture.width > picture.height >= 2 * 64
    assert gaussian_generator()([0], output="latent")._repr_png_() is None


def test_a_result_is_saved_as_one_picture_one_for_each_or_an_array(tmp_path):
    generator = gaussian_generator()
    result = generator([0, 1], seed=5)
    assert result.save(tmp_path / "both.png") == [tmp_path / "both.png"]
    assert pf.read_recipe(tmp_path / "both.png") == result.recipe
    assert [path.name for path in result.save(tmp_path / "each")] == ["5-0.png", "5-1.png"]
    assert pf.read_recipe(tmp_path / "each" / "5-1.png") == result.recipe.of(1)
    latents = generator([0, 1], seed=5, output="latent")
    latents.save(str(tmp_path / "latents.npy"))
    np.testing.assert_array_equal(np.load(tmp_path / "latents.npy"), latents.latents)
    file = io.BytesIO()
    result.write(file)
    assert file.getvalue() == (tmp_path / "both.png").read_bytes()
    with pytest.raises(PiFlowError, match=r"\.png"):
        result.save(tmp_path / "both.npy")


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".JPEG"])
def test_every_kind_of_picture_holds_its_recipe(tmp_path, suffix):
    result = gaussian_generator()([0, 1], seed=5)
    (file,) = result.save(tmp_path / f"both{suffix}")
    assert pf.read_recipe(file) == result.recipe
    with Image.open(file) as picture, Image.open(io.BytesIO(result._repr_png_())) as expected:
        shown, wanted = (np.asarray(image.convert("RGB"), np.float32) for image in (picture, expected))
    lossless = suffix in (".png", ".webp")
    np.testing.assert_allclose(shown, wanted, rtol=0, atol=0 if lossless else 40)  # JPEG rings at sharp edges
    picture = Image.fromarray(shown.astype(np.uint8))
    picture.save(tmp_path / f"plain{suffix}")
    with pytest.raises(PiFlowError, match="holds no recipe"):
        pf.read_recipe(tmp_path / f"plain{suffix}")


@pytest.mark.parametrize(("suffix", "count"), [(".jpg", 1000), (".webp", 300)])
def test_what_one_file_of_a_kind_cannot_hold_is_said(tmp_path, suffix, count):
    with pytest.raises(PiFlowError, match=rf"so many images, .* {suffix}; .* folder"):
        gaussian_generator(nfe=1)([0] * count).save(tmp_path / f"many{suffix}")
    assert not list(tmp_path.iterdir())


def test_the_shipped_bundle_is_loaded_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pf.load("digits", engine="reference") as generator:
        assert generator.bundle.folder == pf.demo_bundle()
    (tmp_path / "digits").mkdir()
    with pytest.raises(PiFlowError, match=r"there is one here too, which is \.[/\\]digits"):
        pf.load("digits")
    with pytest.raises(PiFlowError, match="got 3"):
        pf.load(3)
