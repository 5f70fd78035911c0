"""Feature extractors: what they are fed, what they refuse, and numbers from other people's Inception."""

import numpy as np
import pytest

from piflow_edge.conditioning import Arrays, ClassLabels, TensorSpec
from piflow_edge.errors import FeatureError, PiFlowError
from piflow_edge.evaluation.features import OnnxFeatures, open_features
from piflow_edge.system.pixels import VALUE_RANGES, resize_images, round_to_bytes

torch = pytest.importorskip("torch", reason="feature extractors are made with the 'train' extra")
pytestmark = pytest.mark.torch


def extractor(
    path, *, shape=("batch", 3, 4, 4), dtype="FLOAT", outputs=("features",), metadata=None, op="Flatten"
):
    """An ONNX file whose features are the pixels themselves."""
    from onnx import TensorProto, helper

    kind = getattr(TensorProto, dtype)
    nodes = [helper.make_node(op, ["images"], [name]) for name in outputs]
    graph = helper.make_graph(
        nodes,
        "pixels",
        [helper.make_tensor_value_info("images", kind, shape)],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, metadata or {})
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def images():
    return (np.random.default_rng(0).integers(0, 256, (5, 3, 4, 4)) / 127.5 - 1).astype(np.float32)


class TestOnnx:
    def test_it_is_fed_the_images(self, tmp_path, images):
        features = open_features(str(extractor(tmp_path / "f.onnx")))
        found = features(images)
        assert found.dtype == np.float32
        # round_to_bytes leaves 8-bit pixels where they are, up to a rounding of float32
        np.testing.assert_allclose(found, images.reshape(5, -1), rtol=0, atol=2**-23)
        assert features.source["file"] == "f.onnx" and len(features.source["sha256"]) == 64
        assert features.description == "features of f.onnx"

    def test_in_the_range_that_it_takes(self, tmp_path, images):
        path = extractor(tmp_path / "f.onnx")
        pixel = (images[1, 2, 3, 0] + 1) / 2  # 0 to 1
        expected = {
            "-1,1": 2 * pixel - 1,
            "0,1": pixel,
            "0,255": 255 * pixel,
            "imagenet": (pixel - 0.406) / 0.225,
            "clip": (pixel - 0.40821073) / 0.27577711,
        }
        assert set(expected) == set(VALUE_RANGES)
        for name, value in expected.items():
            features = open_features(str(path), value_range=name)
            assert features(images).reshape(5, 3, 4, 4)[1, 2, 3, 0] == pytest.approx(value, abs=1e-4)
            assert features.source["value_range"] == name

    def test_the_range_that_the_file_names_holds_unless_another_is_asked_for(self, tmp_path, images):
        metadata = {"piflow_edge.value_range": "0,1", "piflow_edge.description": "pixels, plainly"}
        path = extractor(tmp_path / "f.onnx", metadata=metadata)
        features = OnnxFeatures(path)
        assert features(images).min() >= 0 and features.description == "pixels, plainly"
        assert OnnxFeatures(path, value_range="-1,1")(images).min() < 0

    def test_what_lies_outside_the_range_is_clipped_and_what_lies_between_levels_rounded(self, tmp_path):
        images = np.full((1, 3, 4, 4), 1.5, np.float32)
        images[0, 0, 0, :3] = -7, 0.001, 0.005
        found = OnnxFeatures(extractor(tmp_path / "f.onnx"), value_range="0,255")(images)[0]
        assert found[:4].tolist() == pytest.approx([0, 128, 128, 255], abs=1e-4)

    def test_images_of_another_size_are_resized_to_its_own(self, tmp_path, images):
        large = OnnxFeatures(extractor(tmp_path / "f.onnx", shape=("batch", 3, 8, 6)))(images)
        assert large.shape == (5, 3 * 8 * 6)
        free = OnnxFeatures(extractor(tmp_path / "free.onnx", shape=("batch", 3, "h", "w")))(images)
        assert free.shape == (5, 3 * 4 * 4)

    def test_grey_is_repeated_and_colour_is_never_dropped(self, tmp_path, images):
        grey = images[:, :1]
        found = OnnxFeatures(extractor(tmp_path / "f.onnx"))(grey).reshape(5, 3, 4, 4)
        np.testing.assert_array_equal(found[:, 0], found[:, 2])
        one = OnnxFeatures(extractor(tmp_path / "one.onnx", shape=("batch", 1, 4, 4)))
        assert one(grey).shape == (5, 16)
        with pytest.raises(FeatureError, match=r"1 channels; .*3"):
            one(images)

    def test_a_fixed_batch_and_half_precision(self, tmp_path, images):
        path = extractor(tmp_path / "f.onnx", shape=(2, 3, 4, 4), dtype="FLOAT16")
        np.testing.assert_allclose(OnnxFeatures(path)(images), images.reshape(5, -1), rtol=0, atol=1e-3)

    def test_pooled_maps_are_vectors_and_others_are_refused(self, tmp_path, images):
        pooled = OnnxFeatures(extractor(tmp_path / "p.onnx", op="GlobalAveragePool"))(images)
        np.testing.assert_allclose(pooled, images.mean((2, 3)), atol=1e-6)
        with pytest.raises(FeatureError, match="vector per image"):
            OnnxFeatures(extractor(tmp_path / "m.onnx", op="Relu"))(images)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"shape": ("batch", 4, 8, 8)}, "one input, float"),
            ({"shape": ("batch", 48)}, "one input, float"),
            ({"dtype": "INT64"}, "one input, float"),
            ({"outputs": ("a", "b")}, "name one 'features'"),
            ({"metadata": {"piflow_edge.value_range": "warm"}}, "range of values"),
        ],
    )
    def test_what_is_no_extractor_is_refused(self, tmp_path, settings, words):
        with pytest.raises(FeatureError, match=words):
            OnnxFeatures(extractor(tmp_path / "f.onnx", **settings))

    def test_of_several_outputs_the_one_called_features_is_taken(self, tmp_path, images):
        assert OnnxFeatures(extractor(tmp_path / "f.onnx", outputs=("a", "features")))(images).shape == (
            5,
            48,
        )


def test_resizing_is_torch_s_bilinear_with_antialiasing(images):
    images = np.random.default_rng(1).uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    for size in ((5, 7), (40, 33)):
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(images), size, mode="bilinear", align_corners=False, antialias=True
        )
        np.testing.assert_allclose(resize_images(images, *size), expected, rtol=0, atol=1e-5)
    assert resize_images(images, None, 16) is images


@pytest.mark.parametrize("spec", ["faces", "no-such.onnx", "no-such.pth", "no-such.safetensors", "."])
def test_what_is_not_there_is_refused(spec):
    with pytest.raises(FeatureError):
        open_features(spec)


def test_only_an_onnx_file_s_range_can_be_chosen():
    with pytest.raises(FeatureError, match=r"ONNX .*range"):
        open_features("digits", value_range="0,1")


def test_broken_files_are_refused(tmp_path):
    from piflow_edge.distill.networks.inception import InceptionFeatures

    for name in ("f.onnx", "f.pth", "f.pt", "f.safetensors"):
        (tmp_path / name).write_bytes(b"\x08\x00not a network")
        with pytest.raises(FeatureError, match=r"f\."):
            open_features(str(tmp_path / name), open_weights=InceptionFeatures)


def formula_weights(*, fid):
    """Weights that other people's Inceptions were given, too, from a generator that NumPy has frozen."""
    from piflow_edge.distill.networks.inception import Inception

    random = np.random.RandomState(0)
    weights = {}
    for name, value in sorted(Inception(fid=fid).state_dict().items()):
        shape = tuple(value.shape)
        if name.endswith("conv.weight"):
            drawn = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith("num_batches_tracked"):
            continue
        else:  # batch norm
            drawn = random.uniform(0.5, 1.5, shape) - name.endswith(("bias", "mean"))
        weights[name] = torch.from_numpy(drawn.astype(np.float32))
    weights["fc.weight"] = torch.zeros(1008 if fid else 1000, 2048)
    return weights


def formula_image():
    rows, columns = np.mgrid[0:40, 0:40] / 40
    planes = [np.sin(9 * rows + 5 * columns), np.cos(7 * rows - 11 * columns), np.sin(40 * rows * columns)]
    return round_to_bytes(np.stack(planes)[None].astype(np.float32))


# The first and last four features of `formula_image` under `formula_weights`, by torchvision 0.28.0's inception_v3
# with its own preprocessing, and by pytorch-fid 0.3.0's InceptionV3.
RECORDED = {
    False: [5.74772, 0.0, 1.83951, 9.954, 0.0980896, 3.47349, 0.0, 0.025647],
    True: [5.81506, 0.0, 2.2715, 11.0787, 0.0, 5.07224, 0.0, 0.0],
}


class TestInception:
    @pytest.mark.parametrize("fid", [False, True], ids=["torchvision", "pytorch-fid"])
    def test_it_is_theirs(self, tmp_path, fid):
        from piflow_edge.distill.networks.inception import InceptionFeatures

        path = tmp_path / "weights.pth"
        torch.save(formula_weights(fid=fid), path)
        features = InceptionFeatures(path)
        assert ("FID's" in features.description) == fid
        found = features(formula_image())
        assert found.shape == (1, 2048)
        # float32 through some fifty layers; features go up to 80
        np.testing.assert_allclose(np.r_[found[0, :4], found[0, -4:]], RECORDED[fid], rtol=0, atol=2e-3)

    def test_other_weights_are_refused(self, tmp_path):
        from safetensors.torch import save_file

        from piflow_edge.distill.networks.inception import InceptionFeatures

        save_file({"conv.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
        with pytest.raises(FeatureError, match=r"Conv2d_1a_3x3\.conv\.weight .*absent"):
            InceptionFeatures(tmp_path / "w.safetensors")
        torch.save([torch.zeros(3)], tmp_path / "w.pth")
        with pytest.raises(FeatureError, match="no state dict"):
            InceptionFeatures(tmp_path / "w.pth")

    def test_a_file_that_would_run_code_is_refused(self, tmp_path):
        from piflow_edge.distill.networks.inception import InceptionFeatures

        torch.save(torch.nn.Linear(1, 1), tmp_path / "network.pth")
        with pytest.raises(FeatureError, match="tensors alone"):
            InceptionFeatures(tmp_path / "network.pth")


@pytest.fixture(scope="module")
def reds():
    """Two classes of 12x12 pictures that differ in where they are red."""
    from piflow_edge.distill.data.datasets import ImageData

    random = np.random.default_rng(0)
    images = random.uniform(-0.2, 0.2, (120, 3, 12, 12)).astype(np.float32)
    labels = np.arange(120) % 2
    images[labels == 0, 0, 2:5, 2:5] = 1
    images[labels == 1, 0, 7:10, 7:10] = 1
    return ImageData("reds", images, ClassLabels(("left", "right")), {"labels": labels.astype(np.int64)})


class TestTrained:
    def test_it_tells_the_classes_apart_and_gives_the_classifier_s_features(self, reds, tmp_path):
        from piflow_edge.export.feature_extractor import train_features

        path = tmp_path / "new" / "reds.onnx"
        trained = train_features(reds, path, iterations=40)
        assert trained.images == {"train": 100, "held_out": 20}
        assert trained.accuracy["held_out"] > 0.9  # 0.5 by chance
        features = open_features(str(path))
        assert "'reds'" in features.description and "not Inception's" in features.description
        made = round_to_bytes(reds.images[:70])  # more than one batch
        expected = trained.classifier.features(torch.from_numpy(made)).numpy()
        np.testing.assert_allclose(features(made), expected, rtol=0, atol=1e-4 * np.abs(expected).max())

    def test_the_same_data_and_seed_give_the_same_file(self, reds, tmp_path):
        from piflow_edge.export.feature_extractor import train_features

        for name in ("a.onnx", "b.onnx"):
            train_features(reds, tmp_path / name, iterations=2)
        assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()

    def test_data_that_a_classifier_cannot_learn_from_are_refused(self, reds, tmp_path):
        from dataclasses import replace

        from piflow_edge.distill.data.datasets import Latent
        from piflow_edge.distill.networks.classifier import train_classifier

        with pytest.raises(PiFlowError, match="two classes"):
            train_classifier(replace(reds, arrays={"labels": np.zeros(120, np.int64)}))
        with pytest.raises(PiFlowError, match="8x8"):
            train_classifier(replace(reds, images=reds.images[..., :6, :6]))
        own = Arrays((TensorSpec("text", "float32", ("batch", 1)),))
        with pytest.raises(PiFlowError, match="labels; 'reds'"):
            train_classifier(replace(reds, conditioner=own, arrays={"text": np.arange(120.0)[:, None]}))
        with pytest.raises(PiFlowError, match="'reds' holds latents"):
            train_classifier(replace(reds, latent=Latent(1.0, 0.0)))
