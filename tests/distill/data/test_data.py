import io
import logging
import os

import numpy as np
import pytest
from PIL import Image

from piflow_edge.conditioning import ClassLabels, Unconditional
from piflow_edge.distill.data import image_folder, npz
from piflow_edge.distill.data.datasets import ImageData, Latent, check_same_latents, load_images
from piflow_edge.errors import DataError, ShapeError
from piflow_edge.evaluation.features import open_features


@pytest.fixture
def folder(tmp_path):
    """Two classes with two 6x6 pictures each."""
    for name, level in [("cats", 0), ("dogs", 255)]:
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (6, 6), (level, level, 128)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def all_of(data):
    return data.batch(np.arange(len(data)))[0]


def levels(data):
    """Grey levels 0 to 255 of all images, (M, C, H, W)."""
    return np.rint((all_of(data) + 1) * 127.5).astype(int)


def test_digits_are_the_real_ones():
    digits = load_images("digits")
    images, conditioning = digits.batch(np.arange(1797))
    assert len(digits) == 1797 and digits.shape == (1, 8, 8)
    assert images.shape == (1797, 1, 8, 8) and images.dtype == np.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert digits.conditioner.names == tuple("0123456789")
    assert conditioning["labels"].dtype == np.int64 and np.bincount(conditioning["labels"]).min() > 170


def test_a_folder_per_class(folder):
    data = load_images(str(folder))
    x_0, conditioning = data.batch(np.array([2, 0]))
    assert data.conditioner.names == ("cats", "dogs") and data.arrays["labels"].tolist() == [0, 0, 1, 1]
    assert conditioning.keys() == {"labels"} and conditioning["labels"].tolist() == [1, 0]
    assert x_0.shape == (2, 3, 6, 6) and x_0.dtype == np.float32
    assert x_0[1, 0].max() == -1 and x_0[0, 0].min() == 1
    assert data.name == folder.name and data.latent is None


def test_images_of_a_folder_stay_bytes_on_the_disk(folder):
    data = load_images(str(folder))
    assert isinstance(data.images, np.memmap) and data.images.dtype == np.uint8


class TestSize:
    """On a picture of 4x8, white above black between grey outer columns, so that what is left of it shows."""

    @pytest.fixture
    def wide(self, tmp_path):
        pixels = np.zeros((4, 8), np.uint8)
        pixels[:, :2], pixels[:, 6:], pixels[:2, 2:6] = 100, 200, 255
        (tmp_path / "set" / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "set" / "a" / "0.png")
        return tmp_path / "set"

    def test_a_picture_that_is_not_square_is_kept_as_it_is(self, wide):
        assert load_images(str(wide)).shape == (1, 4, 8)

    def test_a_side_cuts_to_the_middle(self, wide):
        found = levels(load_images(str(wide), size=4))[0, 0]
        assert found[:2].min() == 255 and found[2:].max() == 0

    def test_height_and_width_scale_until_covered(self, wide):
        found = levels(load_images(str(wide), size=(8, 16)))[0, 0]
        assert found.shape == (8, 16)
        # Nothing cut, nothing squeezed; the filter rings by up to a tenth of the step beside it.
        assert abs(found[0, 0] - 100) < 16 and abs(found[0, -1] - 200) < 16
        tall = levels(load_images(str(wide), size=(8, 4)))[0, 0]  # scaled by 2, the middle 4 of 16 columns
        assert tall.shape == (8, 4) and tall[0].min() > 230 and tall[-1].max() < 25

    def test_each_size_is_kept_by_itself(self, wide):
        shapes = [load_images(str(wide), size=size).shape for size in (2, 4, (2, 4), 2)]
        assert shapes == [(1, 2, 2), (1, 4, 4), (1, 2, 4), (1, 2, 2)]

    def test_pictures_of_several_sizes_need_one(self, folder):
        Image.new("L", (5, 7)).save(folder / "cats" / "odd.png")
        with pytest.raises(DataError, match=r"cats/0\.png .*6 x 6, cats/odd\.png .*7 x 5; .*--size"):
            load_images(str(folder))
        assert load_images(str(folder), size=6).shape == (3, 6, 6)

    def test_anything_but_a_folder_has_the_size_it_has(self):
        with pytest.raises(DataError, match="folder"):
            load_images("digits", size=16)


class TestKinds:
    def one(self, tmp_path, image, name="0.png", **options):
        (tmp_path / "set" / "a").mkdir(parents=True)
        image.save(tmp_path / "set" / "a" / name, **options)
        return levels(load_images(str(tmp_path / "set")))[0]

    def test_grey_stays_one_channel(self, tmp_path):
        found = self.one(tmp_path, Image.new("L", (3, 2), 77))
        assert found.shape == (1, 2, 3) and (found == 77).all()

    @pytest.mark.parametrize("first", ["grey", "coloured"])
    def test_grey_and_coloured_may_be_mixed(self, tmp_path, first):
        (tmp_path / "a").mkdir()
        for i in range(40):  # more than are decoded at a time
            coloured = (i < 5) == (first == "coloured")
            image = Image.new("RGB", (6, 4), (i, 2 * i, 3 * i)) if coloured else Image.new("L", (6, 4), i)
            image.save(tmp_path / "a" / f"{i:02}.png")
        found = levels(load_images(str(tmp_path)))
        for i, image in enumerate(found):
            coloured = (i < 5) == (first == "coloured")
            assert image[:, 3, 5].tolist() == ([i, 2 * i, 3 * i] if coloured else [i, i, i])

    @pytest.mark.parametrize(("mode", "colour"), [("RGBA", (200, 0, 0, 51)), ("LA", (100, 51))])
    def test_what_is_transparent_shows_white(self, tmp_path, mode, colour):
        found = self.one(tmp_path, Image.new(mode, (2, 2), colour))
        # A fifth of the colour over four fifths of white.
        expected = [244, 204, 204] if mode == "RGBA" else [224]
        assert found[:, 0, 0].tolist() == expected

    def test_a_transparent_colour_of_a_palette_shows_white(self, tmp_path):
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putpixel((1, 0), 1)
        found = self.one(tmp_path, image, transparency=0)
        assert found[:, 0].T.tolist() == [[255, 255, 255], [40, 50, 60]]

    def test_a_photograph_is_turned_as_its_exif_says(self, tmp_path):
        image = Image.new("L", (4, 2), 0)
        image.paste(255, (0, 0, 1, 2))  # a white left column
        exif = Image.Exif()
        exif[0x0112] = 6  # turn a quarter clockwise to show
        found = self.one(tmp_path, image, exif=exif)
        assert found.shape == (1, 4, 2) and found[0, 0].min() == 255 and found[0, 1:].max() == 0

    def test_an_animation_gives_its_first_frame(self, tmp_path):
        frames = [Image.new("L", (3, 3), level) for level in (200, 10)]
        found = self.one(tmp_path, frames[0], "0.gif", save_all=True, append_images=frames[1:])
        assert (found == 200).all()

    def test_one_bit_and_cmyk(self, tmp_path):
        assert (self.one(tmp_path / "1", Image.new("1", (2, 2), 1)) == 255).all()
        found = self.one(tmp_path / "2", Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "0.tif")
        assert found[:, 0, 0].tolist() == [255, 0, 0]

    @pytest.mark.parametrize("name", ["0.png", "0.tif", "big.tif"])
    def test_sixteen_bits_become_eight(self, tmp_path, name):
        deep = np.array([[0, 128, 129, 257], [30000, 65280, 65535, 1]], np.uint16)
        image = Image.fromarray(deep)
        if name == "big.tif":
            image = Image.frombytes("I;16B", (4, 2), deep.astype(">u2").tobytes())
        expected = [[0, 0, 1, 1], [117, 254, 255, 0]]
        exif = Image.Exif()
        exif[0x0112] = 3  # half a turn to show
        assert self.one(tmp_path / "a", image, name)[0].tolist() == expected
        turned = self.one(tmp_path / "b", image, name, exif=exif)[0]
        assert turned.tolist() == [row[::-1] for row in expected[::-1]]


class TestBroken:
    def grow(self, folder, count=10):
        for name in ("cats", "dogs"):
            for i in range(2, count):
                Image.new("RGB", (6, 6)).save(folder / name / f"{i}.png")

    def spoil(self, folder):
        """One file of each kind that cannot be used, among eight good ones a class."""
        cats, whole = folder / "cats", (folder / "cats" / "1.png").read_bytes()
        (cats / "text.png").write_bytes(b"not an image")
        (cats / "empty.png").write_bytes(b"")
        (cats / "cut.png").write_bytes(whole[:45])
        Image.fromarray(np.full((6, 6), 40000, np.int32)).save(cats / "deep.tif")
        Image.fromarray(np.full((6, 6), 0.5, np.float32)).save(cats / "floats.tif")
        (cats / "nowhere.png").symlink_to(folder / "gone.png")
        return ["cut.png", "deep.tif", "empty.png", "floats.tif", "nowhere.png", "text.png"]

    def test_they_are_named_with_their_reason_and_skipped(self, folder, caplog):
        self.grow(folder)
        names = self.spoil(folder)
        data = load_images(str(folder))
        assert len(data) == 20 and np.bincount(data.arrays["labels"]).tolist() == [10, 10]
        (record,) = caplog.records
        assert record.levelno == logging.WARNING and "skipped 6 of 26 images" in record.getMessage()
        lines = record.getMessage().splitlines()[1:]
        assert [line.strip().partition(":")[0] for line in lines] == [f"cats/{name}" for name in names]
        assert "it has Pillow's mode 'I', numbers of any range" in lines[1] and "'F'" in lines[3]
        assert "not an image" in lines[2] and "not an image" in lines[5]

    def test_they_are_named_again_when_the_cache_is_used(self, folder, caplog):
        self.grow(folder)
        self.spoil(folder)
        load_images(str(folder))
        first = caplog.text
        caplog.clear()
        load_images(str(folder))
        assert "skipped 6 of 26" in first and caplog.text == first

    def test_many_are_counted(self, folder, caplog):
        self.grow(folder, 20)
        for i in range(14):
            (folder / "cats" / f"broken{i:02}.png").write_bytes(b"?")
        load_images(str(folder))
        assert "cats/broken09.png" in caplog.text and "broken10" not in caplog.text
        assert "and 4 more" in caplog.text

    def test_more_than_half_of_all_is_an_error(self, folder):
        for i in range(5):
            (folder / "cats" / f"x{i}.png").write_bytes(b"?")
        with pytest.raises(DataError, match=r"5 of 9.*\n  cats/x0\.png"):
            load_images(str(folder))

    def test_a_class_that_loses_all_is_an_error(self, folder):
        for i in range(2):
            (folder / "dogs" / f"{i}.png").write_bytes(b"?")
        with pytest.raises(DataError, match=r"dogs .*\n  dogs/0\.png"):
            load_images(str(folder))

    def test_a_class_without_images_is_an_error(self, folder):
        for file in (folder / "dogs").iterdir():
            file.unlink()
        with pytest.raises(DataError, match="dogs"):
            load_images(str(folder))

    def test_a_folder_without_folders_is_an_error(self, tmp_path):
        with pytest.raises(DataError, match="one folder of images per class"):
            load_images(str(tmp_path))

    def test_a_folder_that_may_not_be_read_is_an_error(self, folder, monkeypatch):
        def refuse(path):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(type(folder), "iterdir", refuse)
        with pytest.raises(DataError, match="Permission denied"):
            load_images(str(folder))


class TestKept:
    def count_reads(self, monkeypatch):
        reads, read = [], image_folder._read
        monkeypatch.setattr(image_folder, "_read", lambda *given: reads.append(given) or read(*given))
        return reads

    def test_images_are_decoded_once(self, folder, monkeypatch):
        first = load_images(str(folder))
        reads = self.count_reads(monkeypatch)
        second = load_images(str(folder))
        assert not reads and second.fingerprint() == first.fingerprint()
        np.testing.assert_array_equal(first.images, second.images)

    @pytest.mark.parametrize("change", ["content", "time", "new", "gone", "class"])
    def test_another_folder_is_decoded_again(self, folder, monkeypatch, change):
        load_images(str(folder))
        file = folder / "cats" / "0.png"
        if change == "content":
            Image.new("RGB", (6, 6), "red").save(file)
        elif change == "time":
            os.utime(file, ns=(1, 1))
        elif change == "new":
            Image.new("RGB", (6, 6)).save(folder / "cats" / "new.png")
        elif change == "gone":
            file.unlink()
        else:
            file.rename(folder / "dogs" / "2.png")
        reads = self.count_reads(monkeypatch)
        data = load_images(str(folder))
        assert len(reads) == len(data) == {"new": 5, "gone": 3}.get(change, 4)


def test_an_npz(tmp_path):
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    np.savez(tmp_path / "set.npz", images=pixels, labels=[0, 1], class_names=["a", "b"])
    data = load_images(str(tmp_path / "set.npz"))
    assert data.shape == (1, 3, 3) and data.conditioner.names == ("a", "b")
    np.testing.assert_array_equal(levels(data)[:, 0], pixels)


def test_an_npz_in_colour_that_is_not_square(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    np.savez(tmp_path / "set.npz", images=pixels, labels=np.arange(5) % 2)
    data = load_images(str(tmp_path / "set.npz"))
    assert data.shape == (3, 4, 6) and data.conditioner.names == ("0", "1")
    np.testing.assert_array_equal(levels(data), pixels.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("shape", [(5, 4, 3, 2), (5, 4, 2, 3, 2)], ids=["image", "video"])
def test_an_npz_of_latents(tmp_path, dtype, shape):
    latents = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    np.savez(tmp_path / "set.npz", latents=latents, scale=0.3611, shift=0.1159, labels=np.arange(5))
    data = load_images(str(tmp_path / "set.npz"))
    x_0, conditioning = data.batch(np.array([4, 1]))
    assert data.shape == shape[1:] and conditioning["labels"].tolist() == [4, 1]
    assert data.latent is not None and (data.latent.scale, data.latent.shift) == (0.3611, 0.1159)
    assert x_0.dtype == np.float32
    expected = (latents[[4, 1]].astype(np.float64) - 0.1159) * 0.3611
    np.testing.assert_allclose(x_0, expected, rtol=0, atol=1e-6)  # float32 of values of about 1
    assert data.settings()["latent"] == {"scale": 0.3611, "shift": 0.1159, "autoencoder": None}


def test_conditions_of_any_name(tmp_path):
    states = np.random.default_rng(0).standard_normal((3, 7, 5)).astype(np.float16)
    mask = np.tri(3, 7, dtype=bool)
    arrays = dict(latents=np.zeros((3, 4, 2, 2), np.float32), scale=1, shift=0)
    np.savez(tmp_path / "set.npz", **arrays, cond_encoder_hidden_states=states, cond_mask=mask)
    data = load_images(str(tmp_path / "set.npz"))
    x_0, conditioning = data.batch(np.array([2, 0]))
    assert data.conditioner.kind == "arrays" and len(x_0) == 2
    assert [spec.shape[1] for spec in data.conditioner.inputs] == ["tokens", "tokens"]
    assert conditioning.keys() == {"encoder_hidden_states", "mask"}
    assert conditioning["encoder_hidden_states"].dtype == np.float32
    np.testing.assert_array_equal(conditioning["encoder_hidden_states"], states[[2, 0]])
    np.testing.assert_array_equal(conditioning["mask"], mask[[2, 0]])
    np.savez(tmp_path / "set.npz", **arrays, labels=[0, 1, 0], cond_mask=mask)
    assert load_images(str(tmp_path / "set.npz")).batch(np.array([1]))[1].keys() == {"labels", "mask"}


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_npz_with_the_channels_first(tmp_path, order):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 6), np.uint8)
    np.savez(tmp_path / "set.npz", images=np.asarray(pixels, order=order), labels=np.arange(5) % 2)
    data = load_images(str(tmp_path / "set.npz"))
    assert data.shape == (3, 4, 6)
    np.testing.assert_array_equal(levels(data), pixels)


def test_classes_without_images_are_named(tmp_path, caplog):
    np.savez(tmp_path / "set.npz", images=np.full((10, 3, 3), 9, np.uint8), labels=np.arange(1, 11))
    assert len(load_images(str(tmp_path / "set.npz")).conditioner.names) == 11
    assert "1 classes of" in caplog.text and "no images: '0'" in caplog.text


GOOD = dict(latents=np.zeros((3, 4, 2, 2), np.float32), scale=1.0, shift=0.0, labels=[0, 1, 0])
PIXELS = np.full((2, 3, 3), 9, np.uint8)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (dict(images=PIXELS), r"'labels', 'captions' or arrays named 'cond_"),
        (dict(labels=[0, 1]), "'images' or 'latents', one of both"),
        (dict(images=np.zeros((2, 3, 3)), labels=[0, 1]), "must be uint8"),
        (
            dict(images=np.full((2, 3, 3), 0.5), labels=[0, 1]),
            r"from 0.5 to 0.5: give np.rint\(images \* 255\)",
        ),
        (dict(images=np.array([-1.0, 0.5] * 9).reshape(2, 3, 3), labels=[0, 1]), r"\(images \+ 1\) \* 127.5"),
        (dict(images=np.full((2, 3, 3), 1.5), labels=[0, 1]), r"np.rint\(images\)"),
        (dict(images=np.full((2, 3, 3), 400.0), labels=[0, 1]), "from 400 to 400$"),
        (dict(images=np.ones((2, 3, 3), np.uint16), labels=[0, 1]), r"images / 257"),
        (dict(images=np.ones((2, 3, 3), np.uint8), labels=[0, 1]), "no number above 1, .* multiply by 255"),
        (
            dict(images=np.full((2, 3, 5, 3), 9, np.uint8), labels=[0, 1]),
            r"\(3, 5\) pixels of 3 .* \(5, 3\) pixels",
        ),
        (
            dict(images=np.full((2, 8, 8, 4), 9, np.uint8), labels=[0, 1]),
            r"1 or 3 channels.* transparent over white",
        ),
        (dict(images=np.full((2, 8, 8, 5), 9, np.uint8), labels=[0, 1]), r"1 or 3 channels"),
        (dict(images=PIXELS, labels=[0, -2]), "0 or more; image 1 has -2"),
        (dict(images=PIXELS, labels=[3, 1_000_000]), "go up to 1000000 with 2 different"),
        (dict(images=PIXELS, labels=[0]), "one class id"),
        (dict(images=PIXELS, labels=[0.0, 1.0]), r"float64 \(2,\); save labels.astype\(np.int64\)"),
        (dict(images=PIXELS, labels=[True, False]), r"bool \(2,\); save labels.astype"),
        (dict(images=PIXELS, labels=["cat", "dog"]), r"np.unique\(names, return_inverse=True\)"),
        (dict(images=PIXELS, labels=[[0, 1], [1, 0]]), r"one-hot rows save labels.argmax\(1\)"),
        (dict(images=PIXELS, labels=[[0], [1]]), r"save labels\[:, 0\]"),
        (dict(images=PIXELS, labels=[0, 5], class_names=["a", "b"]), "only 2"),
        (dict(images=PIXELS, cond_text=np.zeros((3, 2))), r"2 images; .*float64"),
        (dict(images=PIXELS, cond_text=np.array(["a", "b"])), "must hold numbers"),
        (dict(images=PIXELS, cond_text=np.array([[0, 1], [np.nan, 1]])), "cond_text .* stands in item 1;"),
        (dict(images=PIXELS, cond_labels=np.array([0, 1])), "named 'labels'"),
        (GOOD | dict(images=np.zeros((3, 2, 2), np.uint8)), "'images' or 'latents'"),
        (GOOD | dict(latents=np.zeros((3, 4, 2, 2))), "float16 or float32"),
        (GOOD | dict(latents=np.zeros((3, 4, 2), np.float32)), r"\(M, C, H, W\) or"),
        (GOOD | dict(scale=0.0), "scale is not 0"),
        (GOOD | dict(shift=np.inf), "finite"),
        (GOOD | dict(scale=np.ones(4)), r"'scale' is float64 \(4,\)"),
        ({k: v for k, v in GOOD.items() if k != "shift"}, "1 and 0 where .* 'shift' is none"),
    ],
)
def test_an_npz_that_does_not_fit_is_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=words):
        load_images(str(tmp_path / "set.npz"))


def test_latents_that_are_not_finite_are_named(tmp_path):
    latents = np.zeros((100, 4, 2, 2), np.float16)
    latents[3:60:2, 1, 1, 0], latents[99, 0, 0, 0] = np.nan, -np.inf
    np.savez(tmp_path / "set.npz", **{**GOOD, "latents": latents, "labels": np.zeros(100, int)})
    words = "latents in .* item 3, 5, 7, 9, 11, 13, 15, 17, 19, 21 and 20 more; leave them out"
    with pytest.raises(DataError, match=words):
        load_images(str(tmp_path / "set.npz"))


class TestInPlace:
    """Large arrays of an .npz stay on the disk; here all of them are large."""

    @pytest.fixture(autouse=True)
    def everything_is_large(self, monkeypatch):
        monkeypatch.setattr(npz, "_IN_PLACE_FROM", 0)

    def save(self, tmp_path, save=np.savez):
        rng = np.random.default_rng(0)
        arrays = dict(images=rng.integers(0, 256, (5, 4, 6, 3), np.uint8), labels=np.arange(5))
        arrays["cond_text"] = np.asfortranarray(rng.standard_normal((5, 3, 2)).astype(np.float32))
        save(tmp_path / "set.npz", **arrays)
        return tmp_path / "set.npz", arrays

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_they_are_the_same_arrays(self, tmp_path, save):
        path, arrays = self.save(tmp_path, save)
        data = load_images(str(path))
        assert isinstance(data.images, np.memmap) == (save is np.savez)
        np.testing.assert_array_equal(levels(data), arrays["images"].transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(data.batch(np.array([3]))[1]["text"], arrays["cond_text"][[3]])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(npz, "_IN_PLACE_FROM", 1 << 30)
            assert load_images(str(path)).fingerprint() == data.fingerprint()

    def test_an_altered_byte_is_found(self, tmp_path):
        path, arrays = self.save(tmp_path)
        whole = bytearray(path.read_bytes())
        whole[whole.find(arrays["images"].tobytes()) + 100] ^= 1
        path.write_bytes(whole)
        with pytest.raises(DataError, match="Bad CRC"):
            load_images(str(path))


def test_sources_that_are_not_there_are_refused(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    file = io.BytesIO()
    np.savez_compressed(file, images=np.zeros((2, 3, 3), np.uint8), labels=[0, 1])
    corrupt = bytearray(file.getvalue())
    corrupt[50:70] = bytes(20)
    (tmp_path / "corrupt.npz").write_bytes(corrupt)
    np.savez(tmp_path / "objects.npz", images=np.array([None, {}]), labels=[0, 1])
    names = ("absent", "broken", "array", "corrupt", "objects")
    for source in ("no-such-set", *(str(tmp_path / f"{name}.npz") for name in names)):
        with pytest.raises(DataError):
            load_images(source)


@pytest.mark.parametrize(
    "change",
    [
        dict(images=np.ones((3, 1, 2, 2), np.uint8)),
        dict(arrays={"labels": np.array([0, 1, 1]), "text": np.zeros((3, 2))}),
        dict(arrays={"labels": np.array([0, 1, 0]), "text": np.ones((3, 2))}),
        dict(arrays={"labels": np.array([0, 1, 0]), "words": np.zeros((3, 2))}),
        dict(latent=Latent(1.0, 0.0)),
        dict(latent=Latent(2.0, 0.0)),
    ],
)
def test_the_fingerprint_tells_data_apart(change):
    fields = dict(name="a", images=np.zeros((3, 1, 2, 2), np.uint8), conditioner=Unconditional())
    fields |= dict(arrays={"labels": np.array([0, 1, 0]), "text": np.zeros((3, 2))})
    data, other = ImageData(**fields), ImageData(**fields | change)
    assert data.fingerprint() == ImageData(**fields).fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        (None, Latent(1.0, 0.0), r"pixels; 'a' .*--autoencoder"),
        (Latent(1.0, 0.0), None, r"latents; 'a' .*--autoencoder"),
        (Latent(1.0, 0.0), Latent(2.0, 0.0), r"scale .*1\.0, .*2\.0"),
        (Latent(1.0, 0.0), Latent(1.0, 0.5), r"shift .*0\.0, .*0\.5"),
        (Latent(1.0, 0.0, "aa"), Latent(1.0, 0.0, "bb"), r"autoencoder .*aa, .*bb"),
    ],
)
def test_a_teacher_of_other_latents_is_refused(was, now, words):
    def data(latent):
        return ImageData(
            "a", np.zeros((2, 1, 2, 2), np.float32), ClassLabels(("x",)), {"labels": np.zeros(2, int)}, latent
        )

    check_same_latents(data(was).settings(), data(was))
    check_same_latents(data(was).settings(), data(was and Latent(was.scale, was.shift)))  # of unknown origin
    with pytest.raises(DataError, match=words):
        check_same_latents(data(was).settings(), data(now))


def test_the_features_tell_digits_apart():
    digits = load_images("digits")
    features = open_features("digits")(all_of(digits))
    means = np.stack([features[digits.arrays["labels"] == label].mean(0) for label in range(10)])
    nearest = ((features[:, None] - means) ** 2).sum(-1).argmin(1)
    assert (nearest == digits.arrays["labels"]).mean() > 0.9  # 0.1 by chance


def test_features_of_anything_else_are_refused():
    with pytest.raises(ShapeError, match="8x8 grey digits"):
        open_features("digits")(np.zeros((2, 3, 16, 16), np.float32))
