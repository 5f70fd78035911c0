"""What is compared, how it is labelled and shown, and what is refused. The figures themselves: test_metrics.py."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from piflow_edge.bundle.sections import LatentSpec
from piflow_edge.cli import main
from piflow_edge.conditioning import Unconditional
from piflow_edge.distill.data.datasets import Latent, load_images
from piflow_edge.errors import DataError, ShapeError
from piflow_edge.evaluation import comparison, made_images
from piflow_edge.evaluation.comparison import evaluate
from piflow_edge.evaluation.contenders import Contender, find_common_guidance, images_of, unique_names
from piflow_edge.evaluation.plan import choose_columns, share_groups
from piflow_edge.evaluation.report import picture_name
from piflow_edge.system.sheets import at_most, image_grid, side_by_side
from tests.commands.command_line import run
from tests.conftest import HAS_TORCH

needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="students are made with the 'train' extra")


def student(scale):
    provenance = {"settings": {"guidance": {"scale": scale}}}
    return SimpleNamespace(bundle=SimpleNamespace(manifest=SimpleNamespace(provenance=provenance)))


def test_students_are_named_by_as_little_of_their_path_as_tells_them_apart(tmp_path):
    assert unique_names([tmp_path / "x" / "a", tmp_path / "x" / "b"]) == ["a", "b"]
    assert unique_names([tmp_path / "x" / "a", tmp_path / "y" / "a"]) == ["x/a", "y/a"]
    assert unique_names([]) == []


def test_a_student_given_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match="given twice"):
        unique_names([tmp_path / "a", tmp_path / "x" / ".." / "a"])


def test_the_teacher_is_guided_as_the_students_were_taught():
    assert find_common_guidance({"a": student(1.5), "b": student(1.5)}) == 1.5
    assert find_common_guidance({}) == 1.0
    with pytest.raises(DataError, match="guided differently"):
        find_common_guidance({"a": student(1.5), "b": student(2.0)})


def test_a_decoder_s_images_are_what_is_compared():
    """Pixels come as the student leaves them, latents as the images that are decoded from them."""
    latent = LatentSpec("pixels", [2, 1, 1], scale=2.0, shift=0.5)
    latents = np.array([-3.0, 1.0], np.float32).reshape(1, 2, 1, 1)

    def generator(decoder):
        bundle = SimpleNamespace(manifest=SimpleNamespace(decoder=decoder, latent=latent))
        return SimpleNamespace(bundle=bundle, decode=lambda x: np.array([[[[0, 51, 255]]]], np.uint8))

    assert images_of(generator(None), latents).ravel().tolist() == [-1.0, 1.0]
    decoded = images_of(generator("a decoder"), latents)
    assert decoded.shape == (1, 3, 1, 1) and decoded.dtype == np.float32
    np.testing.assert_allclose(decoded.ravel(), [-1, -0.6, 1], atol=1e-6)


class TestLabels:
    def test_of_classes_about_as_large_come_in_turn(self):
        real = np.repeat([0, 1, 2], [100, 110, 105])
        assert share_groups(real, 3, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]

    def test_come_as_often_as_in_the_data_all_along(self):
        real = np.repeat([0, 1, 2], [600, 300, 100])
        labels = share_groups(real, 3, 1000)
        shares = np.array([2, 2, 2]) + 994 * np.array([0.6, 0.3, 0.1])
        assert np.abs(np.bincount(labels) - shares).max() < 1
        assert np.abs(np.bincount(labels[:500]) - shares / 2).max() < 2

    def test_of_a_rare_class_come_twice(self):
        labels = share_groups(np.repeat([0, 1], [100_000, 1]), 2, 100)
        assert np.bincount(labels).tolist() == [98, 2]

    @pytest.mark.parametrize("count", [100, 101, 137, 999])
    def test_are_as_many_as_asked_for(self, count):
        real = np.repeat(np.arange(7), [5, 10, 17, 31, 3, 64, 1])
        labels = share_groups(real, 7, count)
        assert len(labels) == count and np.bincount(labels, minlength=7).min() >= 2

    def test_of_too_many_or_empty_classes_are_refused(self):
        with pytest.raises(DataError, match=r"120 .*60 classes; .*100"):
            share_groups(np.arange(60), 60, 100)
        with pytest.raises(DataError, match="class 1"):
            share_groups(np.array([0, 2]), 3, 100)


class TestPictures:
    def test_show_every_class_in_turn_and_as_many_as_fit(self):
        labels = np.arange(200) % 10
        assert choose_columns(labels, 8) == list(range(20))
        assert choose_columns(labels, 128) == list(range(10))
        assert labels[choose_columns(labels, 256)].tolist() == [0, 2, 4, 7, 9]
        eight = np.arange(200) % 8
        assert eight[choose_columns(eight, 32)].tolist() == [*range(8), *range(8)]

    def test_of_a_class_with_few_images_repeat_none(self):
        labels = np.array([0, 0, 0, 1, 1, 2])
        columns = choose_columns(labels, 64)
        assert sorted(columns) == list(range(6))

    def test_side_by_side_keeps_the_grid_and_names_rows_and_columns(self):
        rows = {
            name: [Image.new("L", (8, 8), level)] * 3 for name, level in (("real", 10), ("ŝtudent 1", 200))
        }
        grid, sheet = (
            image_grid(list(rows.values())),
            side_by_side(rows, ["a", "b", "a name too long for 64 pixels"]),
        )
        left, top = sheet.width - grid.width, sheet.height - grid.height
        assert left > 20 and top > 10
        pixels = np.asarray(sheet)
        np.testing.assert_array_equal(pixels[top:, left:], np.asarray(grid))
        assert pixels[top:, :left].min() < 100 and pixels[:top, left:].min() < 100  # something is written

    def test_only_large_images_are_shrunk(self):
        small = Image.new("RGB", (200, 100))
        assert at_most(small) is small
        assert at_most(Image.new("RGB", (1024, 512))).size == (256, 128)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A data set of 8x8 colour pictures in three unequal classes, teacher, student and features, hardly trained."""
    if not HAS_TORCH:
        pytest.skip("students are made with the 'train' extra")
    folder = tmp_path_factory.mktemp("shapes")
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (90, 8, 8, 3), dtype=np.uint8)
    labels = np.repeat([0, 1, 2], [50, 30, 10])
    images[np.arange(90), :, labels] = 255  # a line per class
    names = np.array(["top <1>", "middle", "bottom"])
    np.savez(folder / "shapes.npz", images=images, labels=labels, class_names=names)
    data = ("--data", folder / "shapes.npz")
    tiny = ("--iterations", 2, "--batch-size", 4)
    sizes = ("--hidden-size", 16, "--depth", 1, "--num-heads", 2)
    run("train-teacher", *data, "--out", folder / "teacher", *tiny, *sizes)
    for name, nfe in (("student", "2"), ("both", "1,2")):
        student = folder / f"run-{name}"
        run("distill", *data, "--teacher", folder / "teacher", "--out", student, "--nfe", nfe, *tiny)
        run("export", student, "--out", folder / name)
    answer = run(
        "train-features", *data, "--out", folder / "features.onnx", "--iterations", 2, "--json"
    ).stdout
    assert json.loads(answer)["images"] == {"train": 75, "held_out": 15}
    return folder


@needs_torch
class TestOnOwnData:
    def settings(self, folder):
        return ("--data", folder / "shapes.npz", "--features", folder / "features.onnx", "--images", 120)

    def test_colour_pictures_with_a_teacher(self, shapes, tmp_path):
        teacher = ("--teacher", shapes / "teacher", "--teacher-steps", 3)
        done = run(
            "evaluate", shapes / "student", *self.settings(shapes), *teacher, "--out", tmp_path, "--json"
        )
        answer = json.loads(done.stdout)
        names = [score["name"] for score in answer["scores"]]
        assert names == [
            "teacher, 3 steps",
            "teacher, 1 step",
            "teacher, 2 steps",
            "teacher, 4 steps",
            "student",
        ]
        full, last = answer["scores"][0], answer["scores"][-1]
        assert (
            full["mse"] == full["feature_distance"] == 0 and full["fid_ratio"] == full["diversity_ratio"] == 1
        )
        assert last["mse"] > 0 and last["feature_distance"] > 0
        assert list(last["class_diversity"]) == ["top <1>", "middle", "bottom"]
        ratios = last["class_diversity_ratio"]
        assert ratios[last["worst_class"]] == min(ratios.values())
        for score in answer["scores"]:
            assert 0 <= score["precision"] <= 1 and 0 <= score["recall"] <= 1 and 0 <= score["coverage"] <= 1
            assert score["density"] >= 0 and score["kid_std"] > 0 and np.isfinite(score["kid"])
        conditions = answer["conditions"]
        assert conditions["image_shape"] == [3, 8, 8] and conditions["real_images"] == 90
        assert sum(conditions["images_per_class"].values()) == 120
        assert conditions["images_per_class"]["top <1>"] > conditions["images_per_class"]["bottom"]
        assert conditions["features_source"]["file"] == "features.onnx"
        page = (tmp_path / "report.html").read_text()
        assert "top &lt;1&gt;" in page and "top <1>" not in page
        assert json.loads((tmp_path / "evaluation.json").read_text()) == answer
        with Image.open(tmp_path / "all.png") as picture:
            assert picture.mode == "RGB" and picture.height > 6 * 64  # real, four teachers, student

    def test_without_a_teacher_nothing_is_said_of_one(self, shapes, tmp_path):
        done = run("evaluate", shapes / "student", *self.settings(shapes), "--out", tmp_path, "--json")
        (score,) = json.loads(done.stdout)["scores"]
        beside = (
            "fid_ratio",
            "diversity_ratio",
            "class_diversity_ratio",
            "worst_class",
            "mse",
            "feature_distance",
        )
        assert [score[name] for name in beside] == [None] * 6
        assert score["fid"] > 0 and json.loads(done.stdout)["conditions"]["guidance_scale"] is None
        assert "teacher" not in (tmp_path / "report.html").read_text().partition("<h2>Conditions")[0]
        table = run("evaluate", shapes / "student", *self.settings(shapes)).stdout
        assert "MSE" not in table and "×" not in table and "KID" in table

    def test_a_student_of_several_numbers_of_calls_is_scored_with_each(self, shapes, caplog):
        done = run("evaluate", shapes / "both", shapes / "student", *self.settings(shapes), "--json")
        scores = json.loads(done.stdout)["scores"]
        assert [(score["name"], score["network_calls"]) for score in scores] == [
            ("both, 1 call", 1),
            ("both, 2 calls", 2),
            ("student", 2),
        ]
        assert len({score["fid"] for score in scores}) == 3
        assert "was trained for" not in caplog.text

    def test_bundles_alone_are_compared_without_torch(self, shapes):
        arguments = list(map(str, ("evaluate", shapes / "student", *self.settings(shapes), "--json")))
        code = (
            "import sys; from piflow_edge.cli import main\n"
            f"main({arguments}, standalone_mode=False)\n"
            "assert not {'torch', 'onnx', 'sklearn'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["scores"][0]["name"] == "student"

    def test_features_are_asked_for(self, shapes):
        done = run("evaluate", shapes / "student", "--data", shapes / "shapes.npz", code=2)
        assert "train-features" in done.stderr and "--features" in done.stderr

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--data", "digits"], "the data 'digits': there are 10 classes"),
            (["--features", "digits"], "8x8 grey digits"),
            (["--features", "faces"], "features are 'digits', an .onnx file, or"),
            (["--no-teacher", "--teacher", "x"], "exclude each other"),
            (["--images", "99"], "99"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, shapes, arguments, words):
        settings = [*self.settings(shapes), *arguments]  # of two, the last one holds
        assert words in run("evaluate", shapes / "student", *settings, code=2).stderr

    def test_a_range_is_that_of_a_file(self, shapes):
        assert "--value-range is that of" in run("evaluate", "--value-range", "0,1", code=2).stderr
        from piflow_edge.system.pixels import VALUE_RANGES

        (option,) = [o for o in main.commands["evaluate"].params if o.name == "value_range"]
        assert list(option.type.choices) == list(VALUE_RANGES)

    def test_data_of_another_size_are_refused(self, shapes, tmp_path):
        with np.load(shapes / "shapes.npz") as archive:
            arrays = dict(archive)
        arrays["images"] = arrays["images"].repeat(2, 1).repeat(2, 2)
        np.savez(tmp_path / "large.npz", **arrays)
        done = run(
            "evaluate", shapes / "student", *self.settings(shapes), "--data", tmp_path / "large.npz", code=2
        )
        assert "makes images (3, 8, 8); those of 'large' are (3, 16, 16)" in done.stderr


@needs_torch
@pytest.mark.torch
@pytest.mark.parametrize("kind", ["function", "diffusers"])
def test_any_teacher_that_distill_takes_is_scored(shapes, tmp_path, monkeypatch, kind):
    import torch

    torch.manual_seed(0)
    if kind == "function":
        (tmp_path / "own_teacher.py").write_text(
            "from piflow_edge.distill.networks.dit import DiTConfig\n"
            "from piflow_edge.distill.networks.flow_network import DiTNetwork\n"
            "def make():\n"
            "    sizes = dict(patch_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3)\n"
            "    return DiTNetwork(DiTConfig(in_channels=3, sample_size=8, **sizes))\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        source = "own_teacher:make"
    else:
        diffusers = pytest.importorskip("diffusers")
        transformer = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=1,
            sample_size=8, patch_size=4, num_embeds_ada_norm=3, norm_num_groups=1,
        )  # fmt: skip
        source = tmp_path / "transformer"
        transformer.save_pretrained(source)
    settings = ("--data", shapes / "shapes.npz", "--features", shapes / "features.onnx", "--images", 100)
    steps = ("--teacher", source, "--teacher-steps", 1, "--guidance", 1.5)
    answer = json.loads(run("evaluate", *settings, *steps, "--json").stdout)
    names = [score["name"] for score in answer["scores"]]
    assert names == ["teacher, 1 step", "teacher, 2 steps", "teacher, 4 steps"]
    assert answer["conditions"]["guidance_scale"] == 1.5


@needs_torch
def test_students_and_a_teacher_of_latents_are_compared_by_their_decoded_images(
    latent_bundle, autoencoder_folder, tmp_path
):
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(40) % 10)  # the bundle's classes, 0 to 9
    data = ("--data", tmp_path / "set.npz")
    sizes = ("--hidden-size", 16, "--depth", 1, "--num-heads", 2, "--iterations", 1, "--batch-size", 4)
    vae = ("--autoencoder", autoencoder_folder)
    run("train-teacher", *data, *vae, *sizes, "--out", tmp_path / "teacher")
    run("train-features", *data, "--out", tmp_path / "features.onnx", "--iterations", 1)
    compared = ("--features", tmp_path / "features.onnx", "--teacher", tmp_path / "teacher", "--images", 100)
    student = (*data, *compared, "--teacher-steps", 2)
    done = run("evaluate", latent_bundle, *student, "--out", tmp_path / "report", "--json")
    scores = json.loads(done.stdout)["scores"]
    assert len(scores) == 4 and scores[0]["mse"] == 0 and 0 < scores[-1]["mse"] < 4
    with Image.open(tmp_path / "report" / "teacher-2-steps.png") as picture:
        assert picture.size == (20 * 66 + 2, 66 + 2)
    # Nobody decodes for a teacher alone.
    assert "for latents a student with its decoder" in run("evaluate", *student, code=2).stderr


@needs_torch
class TestOnDigits:
    def test_the_table_fits_into_120_columns(self, shared_bundle):
        from rich.console import Console

        from piflow_edge.commands.demo import shipped_teacher
        from piflow_edge.distill.sources import load_teacher
        from piflow_edge.evaluation.report import text_table
        from piflow_edge.export.onnx_graphs.teacher_graph import open_teacher

        digits = load_images("digits")
        teacher = open_teacher(load_teacher(shipped_teacher()), digits)
        answer = evaluate(
            [shared_bundle], digits, teacher=teacher, count=100, teacher_steps=3, cut_steps=(1,)
        )
        text = io.StringIO()
        Console(width=120, file=text).print(text_table(answer))
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        assert max(map(len, lines)) <= 120 and "…" not in text.getvalue()
        assert len([line for line in lines if line.startswith((" teacher", " tiny"))]) == 3

    def test_noise_and_images_do_not_depend_on_the_pieces(self, shared_bundle, monkeypatch):
        whole = evaluate([shared_bundle], load_images("digits"), count=100)
        monkeypatch.setattr(made_images, "_PIECE", 33)
        pieces = evaluate([shared_bundle], load_images("digits"), count=100)
        # ONNX Runtime sums in another order in a batch of another size.
        assert pieces.scores[0].fid == pytest.approx(whole.scores[0].fid, rel=1e-4)
        for name, row in whole.pictures.rows.items():
            np.testing.assert_allclose(pieces.pictures.rows[name], row, atol=1e-4)

    def test_images_that_are_not_finite_are_refused_with_whose_they_are(self, shared_bundle, monkeypatch):
        def broken(name, generator):
            def sample(noise, conditioning, seeds):
                images = noise.copy()
                images[[index == 61 for _, index in seeds]] = np.nan
                return images

            return [Contender(name, 1, sample)]

        monkeypatch.setattr(comparison, "student_contenders", broken)
        with pytest.raises(ShapeError, match=r"tiny .*finite; .*image 61"):
            evaluate([shared_bundle], load_images("digits"), count=100)

    def test_latents_and_images_without_labels_are_refused(self, shared_bundle):
        digits = load_images("digits")
        with pytest.raises(DataError, match="'digits' holds latents"):
            evaluate([], replace(digits, latent=Latent(1.0, 0.0)))
        with pytest.raises(DataError, match="the data have nothing"):
            evaluate([shared_bundle], replace(digits, conditioner=Unconditional(), arrays={}), count=100)

    def test_nothing_to_compare_and_a_handful_of_images_are_refused(self):
        with pytest.raises(DataError, match="nothing to compare"):
            evaluate([], load_images("digits"))
        with pytest.raises(DataError, match="fewer than 100"):
            evaluate([], load_images("digits"), count=99)


@needs_torch
@pytest.mark.parametrize(
    "given",
    [
        ["evaluate", "digits", "--no-teacher", "--images", 100],
        ["train-features", "--iterations", 1],
        ["bench", "digits"],
    ],
)
def test_a_place_where_nothing_can_be_written_is_known_before_the_work(given, tmp_path, monkeypatch):
    monkeypatch.setattr("piflow_edge.evaluation.comparison.evaluate", None)
    monkeypatch.setattr("piflow_edge.export.feature_extractor.train_features", None)
    (tmp_path / "file").write_bytes(b"")
    option = {"bench": "--csv"}.get(given[0], "--out")
    done = run(*given, option, tmp_path / "file" / "x.onnx", code=2)
    assert str(tmp_path / "file") in done.stderr


def test_pictures_of_contenders_have_names_that_files_may_have():
    assert picture_name("nfe 1, seed") == "nfe-1-seed.png"
    names = {picture_name("é" * 126 + end) for end in "ab"}
    assert len(names) == 2 and max(len(name.encode()) for name in names) <= 255
