"""Latents are what the autoencoder in diffusers makes, kept like images, and known by scale, shift and origin."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from piflow_edge.conditioning import Arrays, ClassLabels, TensorSpec
from piflow_edge.distill.data import autoencoder as module
from piflow_edge.distill.data.autoencoder import encode, load_autoencoder
from piflow_edge.distill.data.datasets import ImageData, load_images
from piflow_edge.errors import DataError, MissingExtraError
from tests.conftest import make_autoencoder

pytest.importorskip("diffusers", reason="autoencoders need the 'diffusers' extra")


@pytest.fixture(scope="module", params=["AutoencoderKL", "AutoencoderTiny"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return make_autoencoder(kind, tmp_path_factory.mktemp("autoencoders") / kind)


@pytest.fixture(scope="module")
def autoencoder(folder):
    return load_autoencoder(folder)


def pictures(*shape, count=5):
    pixels = np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)
    return ImageData("set", pixels, ClassLabels(("a", "b")), {"labels": np.arange(count) % 2})


def test_latents_are_those_of_diffusers(kind, folder, autoencoder):
    import diffusers

    theirs = getattr(diffusers, kind).from_pretrained(folder).eval()
    data = pictures(3, 8, 12)
    latents = encode(data, autoencoder)
    assert latents.shape == (4, 4, 6) and isinstance(latents.images, np.memmap)
    x_0, conditioning = latents.batch(np.array([3, 1]))
    images = torch.from_numpy(data.batch(np.array([3, 1]))[0])
    with torch.no_grad():
        encoded = theirs.encode(images)
        raw = encoded.latent_dist.mean if kind == "AutoencoderKL" else encoded.latents
    # As the pipelines of diffusers scale them.
    expected = (raw - (theirs.config.shift_factor or 0.0)) * theirs.config.scaling_factor
    # Five images at a time or two: float32 convolutions in another order.
    np.testing.assert_allclose(x_0, expected.numpy(), rtol=0, atol=1e-5)
    assert conditioning["labels"].tolist() == [1, 1] and latents.conditioner.names == ("a", "b")
    numbers = (latents.latent.scale, latents.latent.shift)
    assert numbers == ((0.3611, 0.1159) if kind == "AutoencoderKL" else (1.0, 0.0))
    assert latents.settings()["latent"]["autoencoder"] == autoencoder.sha256


def test_latents_are_made_once(autoencoder, monkeypatch):
    data = pictures(3, 4, 4)
    first = encode(data, autoencoder)
    monkeypatch.setattr(module, "_encode_all", None)
    second = encode(data, autoencoder)
    np.testing.assert_array_equal(first.images, second.images)
    assert first.fingerprint() == second.fingerprint() != data.fingerprint()


def test_other_weights_or_images_make_other_latents(kind, autoencoder, tmp_path):
    other = load_autoencoder(make_autoencoder(kind, tmp_path / "other", seed=1))
    data = pictures(3, 4, 4)
    assert other.sha256 != autoencoder.sha256
    assert not np.array_equal(encode(data, autoencoder).images, encode(data, other).images)
    changed = ImageData("set", data.images[::-1], data.conditioner, data.arrays)
    assert not np.array_equal(encode(data, autoencoder).images, encode(changed, autoencoder).images)


def test_the_same_autoencoder_elsewhere_is_the_same(folder, autoencoder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "_name_or_path": "elsewhere"}))
    assert load_autoencoder(copy).sha256 == autoencoder.sha256


def test_grey_images_are_encoded_as_colour(autoencoder):
    grey = pictures(1, 4, 4)
    colour = ImageData("set", grey.images.repeat(3, axis=1), grey.conditioner, grey.arrays)
    np.testing.assert_array_equal(encode(grey, autoencoder).images, encode(colour, autoencoder).images)


def test_conditions_stay_beside_latents(autoencoder):
    data = pictures(3, 4, 4)
    text = Arrays((TensorSpec("text", "float32", ("batch", 2)),))
    data = ImageData("set", data.images, text, {"text": np.arange(10.0).reshape(5, 2)})
    assert encode(data, autoencoder).batch(np.array([4]))[1]["text"].tolist() == [[8, 9]]


@pytest.mark.parametrize(
    ("shape", "words"),
    [((2, 4, 4), r"3 channels; .*'set' .*2"), ((3, 7, 4), "7 x 4 back as .* of 2")],
)
def test_images_it_does_not_take_are_refused(autoencoder, shape, words):
    with pytest.raises(DataError, match=words):
        encode(pictures(*shape), autoencoder)


def test_latents_are_not_encoded_again(autoencoder):
    with pytest.raises(DataError, match="holds latents already"):
        encode(encode(pictures(3, 4, 4), autoencoder), autoencoder)


def test_latents_that_are_not_finite_are_refused(kind, tmp_path):
    broken = load_autoencoder(make_autoencoder(kind, tmp_path / "broken"))
    next(broken.module.encoder.parameters()).data.fill_(float("nan"))
    data = pictures(3, 4, 4, count=2)
    fresh = ImageData(f"set of {kind}", 255 - data.images, data.conditioner, data.arrays)
    with pytest.raises(DataError, match="image 0"):
        encode(fresh, broken)


def test_a_folder_of_images_becomes_latents(autoencoder, tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        Image.new("RGB", (9, 12), (80 * i, 0, 0)).save(tmp_path / "a" / f"{i}.png")
    data = encode(load_images(str(tmp_path), size=(8, 6)), autoencoder)
    assert data.shape == (4, 4, 3) and data.arrays["labels"].tolist() == [0, 0, 0]


class TestFolder:
    """What is no usable autoencoder is refused with what is wrong."""

    @pytest.fixture
    def copy(self, autoencoder_folder, tmp_path):
        return shutil.copytree(autoencoder_folder, tmp_path / "copy")

    def assert_refused(self, folder, words):
        with pytest.raises(DataError, match=words):
            load_autoencoder(folder)

    def configure(self, folder, **changes):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    def test_absent(self, tmp_path):
        self.assert_refused(tmp_path, r"a folder with config\.json, .* there is none in")

    def test_a_whole_pipeline(self, copy, tmp_path):
        (tmp_path / "pipeline").mkdir()
        copy.rename(tmp_path / "pipeline" / "vae")
        self.assert_refused(tmp_path / "pipeline", r"there is none in .*; give .*vae")

    @pytest.mark.parametrize("text", ["{", "[]", "{}"])
    def test_another_config(self, copy, text):
        (copy / "config.json").write_text(text)
        self.assert_refused(copy, "cannot be read|holds None")

    def test_another_class(self, copy):
        self.configure(copy, _class_name="UNet2DModel")
        self.assert_refused(copy, "is one of AutoencoderKL, AutoencoderTiny, .*; .* holds 'UNet2DModel'")

    def test_a_scale_for_each_channel(self, copy):
        self.configure(copy, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
        self.assert_refused(copy, "scales each channel by itself")

    def test_weights_that_are_pickled(self, copy):
        weights = copy / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
        self.assert_refused(copy, "no safetensors weights")

    def test_weights_that_are_cut(self, copy):
        weights = copy / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        self.assert_refused(copy, "cannot be loaded")

    def test_weights_that_lack_a_tensor(self, copy):
        from safetensors.torch import load_file, save_file

        weights = copy / "diffusion_pytorch_model.safetensors"
        tensors = load_file(weights)
        del tensors["decoder.conv_out.bias"]
        save_file(tensors, weights, metadata={"format": "pt"})
        self.assert_refused(copy, r"decoder\.conv_out\.bias is missing")

    def test_weights_of_another_width(self, copy):
        self.configure(copy, block_out_channels=[8, 32])
        self.assert_refused(copy, r"loaded|shape")

    def test_without_diffusers(self, copy, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'piflow-edge\[diffusers\]'"):
            load_autoencoder(copy)
