from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from piflow_edge import PiFlowError
from piflow_edge.bundle.sections import LatentSpec
from piflow_edge.runtime.images import decode, open_image, read_image, read_mask
from piflow_edge.system.sheets import as_pil

GREY, COLOUR = LatentSpec("pixels", [1, 4, 6], 1.0, 0.0), LatentSpec("pixels", [3, 4, 6], 0.5, 0.25)
LATENTS = LatentSpec("latents", [4, 2, 3], 0.36, 0.1)


@pytest.mark.parametrize("spec", [GREY, COLOUR], ids=["grey", "colour"])
def test_an_image_comes_back_from_its_latents(spec):
    channels = spec.shape[0]
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 6, channels), np.uint8)
    images[0].flat[:2] = 0, 255
    latents = read_image(images, spec, "b")
    assert latents.dtype == np.float32 and latents.shape == (2, channels, 4, 6)
    np.testing.assert_array_equal(decode(latents, spec), images)
    for given in (as_pil(images), images.tolist()):
        given = given if not isinstance(given[0], list) else np.array(given, np.uint8)
        np.testing.assert_array_equal(read_image(given, spec, "b"), latents)
    np.testing.assert_array_equal(read_image(as_pil(images)[1], spec, "b"), latents[1:])
    np.testing.assert_array_equal(read_image(latents, spec, "b"), latents)
    np.testing.assert_array_equal(read_image(latents[0], spec, "b"), latents[:1])


def test_pictures_are_brought_to_the_bundle_s_colours():
    picture = Image.new("RGB", (6, 4), (200, 200, 200))
    assert (decode(read_image(picture, GREY, "b")) == 200).all()
    assert decode(read_image(picture.convert("P"), COLOUR, "b"), COLOUR).shape == (1, 4, 6, 3)


@pytest.mark.parametrize(
    ("image", "spec", "words"),
    [
        (np.zeros((4, 5), np.uint8), GREY, "6x4 pixels"),
        (np.zeros((4, 6), np.int32), GREY, "6x4 pixels.*int32"),
        (Image.new("L", (4, 6)), GREY, "6x4 pixels"),
        (np.zeros((4, 6), np.uint8), COLOUR, r"\(4, 6, 3\)"),
        (np.zeros((1, 4, 7)), GREY, "are finite"),
        (np.full((1, 4, 6), np.nan), GREY, "are finite"),
        (np.full((1, 4, 6), 1e300), GREY, "are finite in float32"),
        ("cat.png", GREY, r"path; .*'cat\.png'"),
        ([[1], [1, 2]], GREY, "one array"),
        ([Image.new("L", (6, 4)), Image.new("L", (4, 6))], GREY, "one size"),
        (Image.new("RGB", (48, 32)), LATENTS, r"no encoder.*\(latents - 0.1\) \* 0.36"),
    ],
)
def test_what_cannot_be_a_start_gets_a_clear_error(image, spec, words):
    with pytest.raises(PiFlowError, match=words):
        read_image(image, spec, "b")


def test_a_latent_is_kept_only_where_all_its_pixels_are():
    mask = np.zeros((4, 6), bool)
    mask[1, 4] = True
    expected = [[False, False, True], [False, False, False]]
    np.testing.assert_array_equal(read_mask(mask, (2, 3))[0, 0], expected)
    white = Image.fromarray(mask.astype(np.uint8) * 255)
    for given in (white, [white], mask * 1.0, mask[None], white.convert("1")):
        np.testing.assert_array_equal(read_mask(given, (2, 3)), read_mask(mask, (2, 3)))
    np.testing.assert_array_equal(read_mask(mask, (4, 6))[0, 0], mask)


def test_a_mask_of_0_and_1_does_not_pass_for_one_that_draws_nothing():
    with pytest.raises(PiFlowError, match="bool"):
        read_mask(np.eye(2, 3, dtype=np.uint8), (2, 3))
    assert not read_mask(np.zeros((2, 3), np.uint8), (2, 3)).any()


@pytest.mark.parametrize(
    "mask", [np.zeros((4, 5), bool), np.zeros((2, 6), bool), np.zeros(6, bool), None, np.zeros((1, 1), bool)]
)
def test_a_mask_of_another_size_is_refused(mask):
    with pytest.raises(PiFlowError, match="3x2"):
        read_mask(mask, (2, 3))


GREYS = np.array([[0, 51, 255], [255, 0, 0]], np.uint8)
SHARES = GREYS / np.float32(255)


def with_alpha(colour, alpha):
    planes = [np.broadcast_to(np.uint8(plane), GREYS.shape) for plane in (*colour, alpha)]
    return Image.fromarray(np.stack(planes, axis=-1), "RGBA")


@pytest.mark.parametrize(
    "mask",
    [
        GREYS,
        SHARES.astype(np.float64),
        Image.fromarray(GREYS),
        Image.fromarray(GREYS.astype(np.uint16) * 257),
        Image.fromarray(GREYS).convert("RGB"),
        with_alpha([255] * 3, GREYS),
        with_alpha([0] * 3, GREYS),  # as paint programs save a brush: black, where it was not used too
        with_alpha([GREYS] * 3, 255),
    ],
    ids=["bytes", "floats", "grey", "16 bits", "colour", "white alpha", "black alpha", "opaque"],
)
def test_a_soft_mask_has_its_shares_however_it_is_given(mask):
    found = read_mask(mask, (2, 3))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0, 0], SHARES, rtol=0, atol=1e-7)


def test_a_latent_takes_the_largest_share_of_its_pixels():
    mask = np.zeros((4, 6), np.float32)
    mask[:2, :2] = [[0.2, 0.7], [0.1, 0.0]]
    assert read_mask(mask, (2, 3))[0, 0].tolist() == [[np.float32(0.7), 0, 0], [0, 0, 0]]


def test_a_mask_that_can_be_read_in_two_ways_is_refused():
    with pytest.raises(PiFlowError, match="both colour and alpha"):
        read_mask(with_alpha([GREYS] * 3, GREYS), (2, 3))
    with pytest.raises(PiFlowError, match="got 0 to 2"):
        read_mask(GREYS / 127.5, (2, 3))
    with pytest.raises(PiFlowError, match="got nan"):
        read_mask(np.full((2, 3), np.nan), (2, 3))


def test_a_mask_of_nothing_or_all_is_said(caplog):
    read_mask(np.zeros((2, 3), bool), (2, 3))
    read_mask(Image.new("L", (3, 2), 255), (2, 3))
    assert [record.getMessage()[:24] for record in caplog.records] == [
        "the mask selects nothing", "the mask selects everyth",
    ]  # fmt: skip


def test_a_mask_is_not_a_path():
    with pytest.raises(PiFlowError, match=r"path; got .*m\.png"):
        read_mask(Path("m.png"), (2, 3))


def test_files_that_hold_no_image_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", PICTURE := np.zeros((4, 6), np.uint8))
    as_pil(PICTURE[None, ..., None])[0].save(tmp_path / "a.png")
    for name in ("a.npy", "a.png"):
        np.testing.assert_array_equal(
            read_image(open_image(tmp_path / name), GREY, "b"), read_image(PICTURE, GREY, "b")
        )
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "several.npz", a=1)
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    for name in ("text.png", "text.npy"):
        (tmp_path / name).write_text("no picture")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "several.npy").read_bytes()[:40])
    for name in (
        "text.png",
        "text.npy",
        "object.npy",
        "several.npy",
        "cut.npy",
        "missing.png",
        "missing.npy",
    ):
        with pytest.raises(PiFlowError, match=name) as error:
            open_image(tmp_path / name)
        assert "allow_pickle" not in str(error.value)
