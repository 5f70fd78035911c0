import json
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import piflow_edge as pf
from piflow_edge import PiFlowError, read_recipe
from piflow_edge.runtime.pictures import png_bytes
from piflow_edge.runtime.recipe import CHUNK, parse_recipe
from tests.helpers.gaussian import SIDE, gaussian_generator

MASK = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 2 == 0
PICTURE = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE) * 9


def png(path, **chunks):
    text = PngInfo()
    for key, value in chunks.items():
        text.add_text(key.replace("_", "-"), value)
    Image.new("L", (4, 4)).save(path, pnginfo=text)
    return path


@pytest.mark.parametrize(
    ("settings", "arrays"),
    [
        (dict(seed=7), {}),
        (dict(seed=[(3, 4), (2**64 - 1, 2**63)], nfe=2, substeps=9, temperature=0.3), {}),
        (dict(seed=np.array([[3, 4], [5, 6]])), {}),
        (dict(seed=1, h="inf"), {}),
        (dict(seed=1, h=0.25), {}),
        (dict(solver="multistep"), {}),
        (dict(strength=0.5), dict(image=PICTURE)),
        (dict(resamples=2), dict(image=PICTURE, mask=MASK)),
        (dict(h=1.0), dict(noise=np.ones((2, 1, SIDE, SIDE)))),
    ],
)
def test_a_picture_says_how_to_make_it_again(tmp_path, settings, arrays):
    generator = gaussian_generator()
    made = generator([1, 0], **settings, **arrays)
    (tmp_path / "both.png").write_bytes(png_bytes(made.images[0], made.recipe))
    again = generator.make_again(read_recipe(tmp_path / "both.png"), **arrays)
    np.testing.assert_array_equal(again.latents, made.latents)
    assert again.recipe == made.recipe
    # and each image on its own
    second = {name: array[1:] if name == "noise" else array for name, array in arrays.items()}
    (tmp_path / "second.png").write_bytes(png_bytes(made.images[1], made.recipe.of(1)))
    again = generator.make_again(read_recipe(tmp_path / "second.png"), **second)
    np.testing.assert_allclose(again.latents, made.latents[1:], rtol=0, atol=1e-6)


def test_another_bundle_precision_or_array_is_refused():
    generator = gaussian_generator()
    recipe = generator([1], image=PICTURE, mask=MASK, output="latent").recipe
    given = dict(image=PICTURE, mask=MASK)
    generator.make_again(recipe, **given)
    for other, arrays, words in [
        ("picture.png", given, r"what read_recipe\(file\) or a Result has; got 'picture.png'"),
        (replace(recipe, bundle_sha256="0" * 64), given, "load the one that made the image"),
        (replace(recipe, precision="int8"), given, "load it with precision='int8'"),
        (recipe, given | dict(image=PICTURE + 1), "the image is another .* begins with"),
        (recipe, given | dict(mask=~MASK), "the mask is another"),
        (recipe, {}, "the image is another"),
        (recipe, given | dict(noise=np.ones((1, 1, SIDE, SIDE))), "the noise is another .*leave it out"),
    ]:
        with pytest.raises(PiFlowError, match=words):
            generator.make_again(other, **arrays)
    with pytest.raises(PiFlowError, match="load the one"):
        gaussian_generator(nfe=2).make_again(recipe, **given)


def test_another_engine_device_or_release_is_said(caplog):
    generator = gaussian_generator()
    recipe = generator([1]).recipe
    generator.make_again(recipe)
    assert not caplog.records
    for change, words in [
        (dict(engine="ort-cuda"), "ran on ort-cuda (cpu), this is exact (cpu): rounding may differ"),
        (dict(device="cuda:1"), "ran on exact (cuda:1), this is exact (cpu): rounding may differ"),
        (dict(release="0.0.9"), f"is of piflow-edge 0.0.9, this is {pf.__version__}: the image may differ"),
    ]:
        caplog.clear()
        generator.make_again(replace(recipe, **change))
        (record,) = caplog.records
        assert words in record.getMessage()


def test_files_without_a_usable_recipe_are_refused(tmp_path):
    whole = json.loads(gaussian_generator()([1, 0]).recipe.as_json())
    settings = whole["settings"]
    odd = {
        "no recipe": {},
        "is not JSON": {"piflow_edge": "{"},
        "version None": {"piflow_edge": "[]"},
        "version 3": {"piflow_edge": json.dumps(whole | {"version": 3})},
        "version 2": {"piflow_edge": json.dumps(whole | {"surprise": 1})},
        "unusable seeds": {"piflow_edge": json.dumps(whole | {"seeds": [[0, -1], [0, 0]]})},
        "unusable nfe": {"piflow_edge": json.dumps(whole | {"settings": settings | {"nfe": True}})},
        "unusable h": {"piflow_edge": json.dumps(whole | {"settings": settings | {"h": "often"}})},
        "unusable conditioning": {"piflow_edge": json.dumps(whole | {"conditioning": "x"})},
        "unusable temperature": {
            "piflow_edge": json.dumps(whole | {"settings": settings | {"temperature": math.nan}})
        },
        "unusable settings": {"piflow_edge": json.dumps(whole | {"settings": {}})},
        "differ in length": {"piflow_edge": json.dumps(whole | {"conditioning": [{"label": 1}]})},
        "more text": {"piflow_edge": " " * ((1 << 20) + 1)},
    }
    for words, chunks in odd.items():
        with pytest.raises(PiFlowError, match=words):
            read_recipe(png(tmp_path / "odd.png", **chunks))
    assert CHUNK == "piflow-edge"
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (4, 4)).save(tmp_path / "a.bmp")
    for name in ("text.png", "a.bmp", "missing.png", "."):
        with pytest.raises(PiFlowError, match="cannot be read"):
            read_recipe(tmp_path / name)
    with pytest.raises(PiFlowError, match="is not JSON"):
        parse_recipe("[" * 100_000)


def test_values_no_sampler_takes_get_the_sampler_s_own_error():
    generator = gaussian_generator()
    recipe = generator([1]).recipe
    settings = recipe.settings
    for change in (
        dict(conditioning=[{"label": 7}]),
        dict(conditioning=[{"label": "1"}]),
        dict(conditioning=[{"smell": 1}]),
        dict(settings=replace(settings, solver="rk4")),
        dict(settings=replace(settings, nfe=1.5)),
    ):
        with pytest.raises(PiFlowError):
            generator.make_again(replace(recipe, **change))


# As release 0.1.0 wrote it, before recipes held the conditioner's own words.
VERSION_1 = {
    "version": 1, "bundle": "gaussian", "bundle_sha256": "0" * 64, "precision": "fp32", "engine": "exact",
    "device": "cpu", "labels": [1, 0], "seeds": [[7, 0], [7, 1]], "nfe": 2, "substeps": 9, "solver": "euler",
    "temperature": 0.3, "h": "inf", "strength": 1.0, "resamples": 0, "noise": None, "image": None, "mask": None,
    "release": "0.1.0",
}  # fmt: skip


def version_1(generator, **changes):
    sha256 = generator(
        [0] if generator.conditioner.inputs else None, None if generator.conditioner.inputs else 1
    )
    return json.dumps(VERSION_1 | {"bundle_sha256": sha256.recipe.bundle_sha256} | changes)


def test_pictures_of_older_releases_are_made_again(tmp_path):
    generator = gaussian_generator()
    recipe = read_recipe(png(tmp_path / "old.png", piflow_edge=version_1(generator)))
    expected = generator([1, 0], seed=7, nfe=2, substeps=9, temperature=0.3, h="inf")
    again = generator.make_again(recipe)
    np.testing.assert_array_equal(again.latents, expected.latents)
    assert again.recipe == expected.recipe and again.recipe.version == 2
    alone = generator.make_again(recipe.of(1))
    np.testing.assert_allclose(alone.latents, expected.latents[1:], rtol=0, atol=1e-6)
    for change in (dict(labels="x"), dict(labels=[1]), dict(nfe=0), dict(extra=1)):
        with pytest.raises(PiFlowError):
            parse_recipe(version_1(generator, **change))


def test_pictures_of_older_releases_without_classes_too():
    generator = gaussian_generator(class_names=())
    again = generator.make_again(parse_recipe(version_1(generator, labels=None)))
    expected = generator(count=2, seed=7, nfe=2, substeps=9, temperature=0.3, h="inf")
    np.testing.assert_array_equal(again.latents, expected.latents)
