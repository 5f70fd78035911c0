import numpy as np
import pytest
from PIL import Image

from piflow_edge.distill.data import load_images
from piflow_edge.distill.features import digit_features
from piflow_edge.errors import DataError, ShapeError


@pytest.fixture
def folder(tmp_path):
    """Two classes with two 6x6 pictures each."""
    for name, level in [("cats", 0), ("dogs", 255)]:
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (6, 6), (level, level, 128)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_digits_are_the_real_ones():
    digits = load_images("digits")
    assert digits.images.shape == (1797, 1, 8, 8) and digits.images.dtype == np.float32
    assert (digits.images.min(), digits.images.max()) == (-1, 1)
    assert digits.class_names == tuple("0123456789")
    assert np.bincount(digits.labels).min() > 170


def test_a_folder_per_class(folder):
    images = load_images(str(folder))
    assert images.class_names == ("cats", "dogs") and images.labels.tolist() == [0, 0, 1, 1]
    assert images.images.shape == (4, 3, 6, 6)
    assert images.images[0, 0].max() == -1 and images.images[2, 0].min() == 1


def test_images_of_a_folder_can_be_resized(folder):
    assert load_images(str(folder), size=4).images.shape == (4, 3, 4, 4)


def test_an_npz(tmp_path):
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    np.savez(tmp_path / "set.npz", images=pixels, labels=[0, 1], class_names=["a", "b"])
    images = load_images(str(tmp_path / "set.npz"))
    assert images.images.shape == (2, 1, 3, 3) and images.class_names == ("a", "b")
    np.testing.assert_allclose((images.images[:, 0] + 1) * 127.5, pixels, atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda f: (f / "cats" / "0.png").write_bytes(b"not an image"),
            r"cats.0\.png cannot be read as an image",
        ),
        (
            lambda f: (f / "cats" / "0.png").write_bytes((f / "cats" / "1.png").read_bytes()[:40]),
            r"0\.png cannot be",
        ),
        (lambda f: [p.unlink() for p in (f / "dogs").iterdir()], "dogs holds no images"),
        (lambda f: Image.new("L", (5, 5)).save(f / "cats" / "odd.png"), "differ in size"),
    ],
)
def test_an_unreadable_folder_is_refused_by_name(folder, spoil, words):
    spoil(folder)
    with pytest.raises(DataError, match=words):
        load_images(str(folder))


def test_grey_and_coloured_pictures_may_be_mixed(folder):
    Image.new("L", (6, 6), 128).save(folder / "cats" / "grey.png")
    assert load_images(str(folder)).images.shape == (5, 3, 6, 6)


def test_pictures_of_more_than_8_bits_are_refused_not_clipped(folder):
    Image.fromarray(np.full((6, 6), 40000, np.uint16)).save(folder / "cats" / "0.png")
    with pytest.raises(DataError, match="more than 8 bits per channel"):
        load_images(str(folder))


def test_pictures_that_are_not_square_are_refused(tmp_path):
    (tmp_path / "cats").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "cats" / "0.png")
    with pytest.raises(DataError, match=r"square; .* are 4 x 6; give --size"):
        load_images(str(tmp_path))
    assert load_images(str(tmp_path), size=4).images.shape == (1, 3, 4, 4)


def test_a_folder_that_may_not_be_read_is_refused(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(folder), "iterdir", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        load_images(str(folder))


def test_a_size_for_anything_but_a_folder_is_refused():
    with pytest.raises(DataError, match="only the images of a folder"):
        load_images("digits", size=16)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="one folder of images per class"):
        load_images(str(tmp_path))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (dict(images=np.zeros((2, 3, 3), np.uint8)), "must hold 'images' and 'labels'"),
        (dict(images=np.zeros((2, 3, 3)), labels=[0, 1]), "must be uint8"),
        (dict(images=np.zeros((2, 3, 3), np.uint8), labels=[0]), "one class id"),
        (dict(images=np.zeros((2, 3, 3), np.uint8), labels=[0.5, 1.0]), "one class id"),
        (dict(images=np.zeros((2, 3, 3), np.uint8), labels=[0, 5], class_names=["a", "b"]), "only 2"),
    ],
)
def test_an_npz_that_does_not_fit_is_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=words):
        load_images(str(tmp_path / "set.npz"))


def test_sources_that_are_not_there_are_refused(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    np.savez_compressed(tmp_path / "corrupt.npz", images=np.zeros((2, 3, 3), np.uint8), labels=[0, 1])
    data = bytearray((tmp_path / "corrupt.npz").read_bytes())
    data[50:70] = bytes(20)
    (tmp_path / "corrupt.npz").write_bytes(data)
    names = ("absent", "broken", "array", "corrupt")
    for source in ("no-such-set", *(str(tmp_path / f"{name}.npz") for name in names)):
        with pytest.raises(DataError):
            load_images(source)


def test_the_shipped_features_tell_digits_apart():
    digits = load_images("digits")
    features = digit_features(digits.images)
    means = np.stack([features[digits.labels == label].mean(0) for label in range(10)])
    nearest = ((features[:, None] - means) ** 2).sum(-1).argmin(1)
    assert (nearest == digits.labels).mean() > 0.9  # 0.1 by chance


def test_features_of_anything_else_are_refused():
    with pytest.raises(ShapeError, match="8x8 grey digits"):
        digit_features(np.zeros((2, 3, 16, 16), np.float32))
