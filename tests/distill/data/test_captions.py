"""Captions as data: where they are read, how they are encoded, and what is trained on them."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from piflow_edge.conditioning import ConditionRequest, conditioner_from_json
from piflow_edge.distill.captioned import (
    _spread,
    caption_for_teacher,
    caption_for_training,
    prompts_for_teacher,
)
from piflow_edge.distill.configs import (
    FlowMatchingConfig,
    GuidanceConfig,
    ImitationConfig,
    RunConfig,
    TrainingConfig,
)
from piflow_edge.distill.data import encodings
from piflow_edge.distill.data.captions import Captions
from piflow_edge.distill.data.datasets import load_images
from piflow_edge.distill.networks.families import fit_architecture
from piflow_edge.distill.networks.text_encoders import open_prompts
from piflow_edge.distill.sources import teacher_from_checkpoint
from piflow_edge.distill.student import distill
from piflow_edge.distill.teacher import GuidedTeacher, as_tensors, preview_titles, train_teacher
from piflow_edge.errors import CheckpointError, DataError
from piflow_edge.export.onnx_graphs.teacher_graph import open_teacher
from piflow_edge.policies import GMPolicySpec
from tests.helpers.text_encoders import tiny_text_encoder

SHORT = TrainingConfig(iterations=4, batch_size=8, warmup=1)
ROWS = {"a.png": ["a red apple", "an apple"], "b.png": ["a cat"], "c.png": ["a happy face", "smile", "face"]}


@pytest.fixture
def pictures(tmp_path):
    for level, name in enumerate(ROWS):
        Image.new("RGB", (8, 8), (60 * level, 0, 0)).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def encoder(monkeypatch):
    """The encoder that every source stands for."""
    monkeypatch.setattr(
        "piflow_edge.distill.captioned.load_text_encoder", lambda source, **settings: of_settings(**settings)
    )
    monkeypatch.setattr(
        "piflow_edge.distill.captioned.load_text_encoders",
        lambda sources, conditioner: [of_settings(max_tokens=conditioner.encoders[0].max_tokens)],
    )


def of_settings(**settings):
    encoder = tiny_text_encoder("bert")
    return replace(encoder, spec=replace(encoder.spec, **settings))


def test_a_row_is_drawn_for_each_image():
    captions = Captions.of_rows([["a", "b"], ["c"], ["d", "e", "f"]])
    indices = np.array([0, 0, 1, 2, 2, 2])
    draws = np.array([0.49, 0.5, 0.99, 0.0, 0.34, 0.999])
    assert [captions.texts[row] for row in captions.rows(indices, draws)] == ["a", "b", "c", "d", "e", "f"]
    assert [captions.texts[row] for row in captions.rows(indices)] == ["a", "a", "c", "d", "d", "d"]


class TestFolders:
    def read(self, folder):
        data = load_images(str(folder))
        starts = data.captions.starts
        found = [list(data.captions.texts[a:b]) for a, b in pairwise(starts)]
        levels = [int(image[0, 0, 0]) // 60 for image in data.images]
        return dict(zip([list(ROWS)[level] for level in levels], found, strict=True))

    @pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl"])
    def test_lines_of_json(self, pictures, name):
        lines = [json.dumps({"file_name": file, "captions": texts}) for file, texts in ROWS.items()]
        (pictures / name).write_text("\n".join(lines) + "\n\n")
        assert self.read(pictures) == ROWS

    def test_a_table_with_several_lines_for_an_image(self, pictures):
        lines = [f'{file},"{text}"' for file, texts in ROWS.items() for text in texts]
        (pictures / "captions.csv").write_text("file_name,caption\n" + "\n".join(lines))
        assert self.read(pictures) == ROWS

    def test_a_text_file_beside_each(self, pictures):
        for file, texts in ROWS.items():
            (pictures / file).with_suffix(".txt").write_text("\n".join(texts) + "\n")
        assert self.read(pictures) == ROWS

    def test_images_in_folders_below_and_ones_that_are_not_listed(self, pictures):
        (pictures / "cats").mkdir()
        (pictures / "b.png").rename(pictures / "cats" / "b.png")
        (pictures / "captions.jsonl").write_text('{"file_name": "cats/b.png", "text": " a cat "}')
        assert self.read(pictures) == {"b.png": ["a cat"]}

    def test_an_image_that_cannot_be_read_takes_its_captions_along(self, pictures, caplog):
        (pictures / "a.png").write_bytes(b"no picture")
        lines = [json.dumps({"file": file, "captions": texts}) for file, texts in ROWS.items()]
        (pictures / "captions.jsonl").write_text("\n".join(lines))
        assert self.read(pictures) == {"b.png": ROWS["b.png"], "c.png": ROWS["c.png"]}
        assert "a.png: not an image" in caplog.text

    @pytest.mark.parametrize(
        ("files", "words"),
        [
            ({"captions.jsonl": "{]"}, "line 1 of .*captions.jsonl is no JSON"),
            (
                {"captions.jsonl": '{"file_name": "a.png"}'},
                r"line 1 .* 'captions' or .*; it has \['file_name'\]",
            ),
            ({"captions.csv": "name,caption\na.png,x"}, r"line 2 .* 'file_name' or 'file'"),
            (
                {"captions.jsonl": '{"file_name": "../a.png", "text": "x"}'},
                r"names no image below .*\.\./a\.png",
            ),
            ({"captions.jsonl": '{"file_name": "a.png", "text": " "}'}, "a.png in .* has none"),
            (
                {"captions.jsonl": '{"file_name": "a.png", "captions": [1]}'},
                "captions are texts; of a.png .* 1",
            ),
            ({"captions.jsonl": "\n"}, "holds no captions"),
            ({"captions.jsonl": "", "captions.csv": ""}, "captions.jsonl and captions.csv"),
            ({"a.txt": "x"}, r"the caption of b\.png cannot be read from .*b\.txt"),
            ({"a.txt": "", "b.txt": "x", "c.txt": "x"}, r"a\.txt in .* has none"),
        ],
    )
    def test_what_cannot_be_used_is_named(self, pictures, files, words):
        for name, text in files.items():
            (pictures / name).write_text(text)
        with pytest.raises(DataError, match=words):
            load_images(str(pictures))


class TestArrays:
    def save(self, folder, captions, **more):
        images = np.full((3, 8, 8, 3), 9, np.uint8)
        np.savez(folder / "set.npz", images=images, captions=captions, **more)
        return load_images(str(folder / "set.npz"))

    def test_rows_that_are_filled_up(self, tmp_path):
        data = self.save(tmp_path, np.array([["a", "b"], ["c", ""], ["d", " "]]))
        assert data.captions.texts == ("a", "b", "c", "d") and data.captions.starts.tolist() == [0, 2, 3, 4]

    def test_labels_steer_until_captions_are_encoded(self, tmp_path):
        data = self.save(tmp_path, np.array(["a", "b", "c"]), labels=np.array([0, 1, 1]))
        assert data.conditioner.kind == "class" and data.captions.texts == ("a", "b", "c")

    @pytest.mark.parametrize(
        ("captions", "words"),
        [
            (np.array(["a", "b"]), r"a row for each of 3 images; got <U1 \(2,\)"),
            (np.array([1, 2, 3]), r"texts .* got int64 \(3,\)"),
            (np.array(["a", "", "c"]), "image 1 in .* has none"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, tmp_path, captions, words):
        with pytest.raises(DataError, match=words):
            self.save(tmp_path, captions)


@pytest.fixture
def data(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    rows = np.array([[*row, "", ""][:3] for row in ROWS.values()])
    np.savez(tmp_path / "set.npz", images=images, captions=rows)
    return load_images(str(tmp_path / "set.npz"))


class TestEncodings:
    def test_an_image_gets_the_encoding_of_the_caption_that_is_drawn(self, data, encoder):
        captioned = caption_for_training(data, ["any"], max_tokens=16)
        opened = open_prompts([of_settings(max_tokens=16)])
        _, conditioning = captioned.batch(np.array([0, 2]), np.array([0.9, 0.4]))
        expected = opened.encode(ConditionRequest(prompts=["an apple", "smile"]))
        assert conditioning.keys() == expected.keys()
        for name, array in expected.items():
            # Kept in float16, of which a number of about 1 has 11 bits.
            np.testing.assert_allclose(conditioning[name], array, atol=2**-10, rtol=2**-11)
            assert conditioning[name].dtype == array.dtype
        assert captioned.titles(np.array([0, 2])) == ["a red apple", "a happy face"]

    def test_they_are_made_once(self, data, encoder, monkeypatch):
        first = caption_for_training(data, ["any"], max_tokens=16)
        monkeypatch.setattr(encodings, "pack_row", None)
        again = caption_for_training(data, ["any"], max_tokens=16)
        assert again.fingerprint() == first.fingerprint()
        with pytest.raises(TypeError):  # other tokens, other encodings
            caption_for_training(data, ["any"], max_tokens=12)

    def test_short_prompts_are_filled_up_where_the_encoder_does_not(self, data):
        opened = open_prompts([of_settings(max_tokens=12, fixed_length=False)])
        captioned = encodings.encode_captions(data, opened, "of lengths")
        hidden, mask = (captioned.arrays[f"encoder_{name}"] for name in ("hidden_states", "attention_mask"))
        assert hidden.shape == (6, 12, 32) and mask.shape == (6, 12)
        lengths = mask.sum(1).astype(int)
        assert 2 < lengths.min() < 12 and all(
            not row[length:].any() for row, length in zip(hidden, lengths, strict=True)
        )

    def test_numbers_that_half_precision_cannot_hold_are_refused(self, data, monkeypatch):
        opened = open_prompts([of_settings()])
        large = {spec.name: np.full((1, 4), 7e4, np.float32) for spec in opened.inputs}
        monkeypatch.setattr(type(opened), "encode", lambda self, asked: large)
        with pytest.raises(DataError, match="up to 65504; that of 'a red apple'"):
            encodings.encode_captions(data, opened, "large")

    def test_data_without_captions_are_refused(self, data, encoder):
        with pytest.raises(DataError, match=r"'set' has none; give an .npz with 'captions', or a folder"):
            caption_for_training(replace(data, captions=None), ["any"])

    def test_examples_come_from_all_over_the_data(self):
        captions = Captions.of_rows([[f"picture {i}", "also"] for i in range(100)])
        assert (
            _spread(captions)[:3] == ("picture 0", "picture 5", "picture 10") and len(_spread(captions)) == 20
        )


@pytest.fixture
def teacher(data, encoder, tmp_path):
    captioned = caption_for_training(data, ["any"], max_tokens=16)
    sizes = {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}
    architecture = fit_architecture(captioned.shape, captioned.conditioner, **sizes)
    config = FlowMatchingConfig(shift=3, noise_levels="logit-normal", sigma_floor=0.1)
    run = RunConfig(sample_every=4)
    checkpoint = train_teacher(captioned, architecture, config, SHORT, tmp_path / "teacher", run=run)
    assert (tmp_path / "teacher" / "samples" / "0000004.png").is_file()
    return teacher_from_checkpoint(checkpoint)


def distil(teacher, captioned, folder, **imitation):
    return distill(
        teacher,
        captioned,
        ImitationConfig(nfe=2, total_substeps=8, **imitation),
        SHORT,
        folder,
        guidance=GuidanceConfig(2.0),
        head=GMPolicySpec(2),
    )


def test_a_teacher_and_a_student_learn_from_captions(data, teacher, encoder, tmp_path):
    captioned = caption_for_teacher(data, ["any"], teacher.conditioner)
    assert captioned.conditioner.to_json() == teacher.conditioner.to_json()
    student = distil(teacher, captioned, tmp_path / "student")
    assert student.conditioner.kind == "text" and student.conditioner.to_json()["examples"][:2] == [
        "a red apple",
        "a cat",
    ]


def test_a_student_learns_from_prompts_alone(teacher, encoder, tmp_path):
    (tmp_path / "words.txt").write_text("a blue cat\n\na pizza\n")
    prompts = prompts_for_teacher(
        tmp_path / "words.txt", ["any"], teacher.conditioner, teacher.network.sample_shape
    )
    assert len(prompts) == 2 and prompts.titles(np.arange(2)) == ["a blue cat", "a pizza"]
    distil(teacher, prompts, tmp_path / "student", data_free=True)


def test_prompts_alone_and_captions_that_are_not_read_are_refused(data, teacher, encoder, tmp_path):
    (tmp_path / "words.txt").write_text("a blue cat\n")
    prompts = prompts_for_teacher(
        tmp_path / "words.txt", ["any"], teacher.conditioner, teacher.network.sample_shape
    )
    with pytest.raises(DataError, match=r"'words' holds prompts and no images; give --data-free"):
        distil(teacher, prompts, tmp_path / "student")
    with pytest.raises(DataError, match=r"nothing steers.*; give --text-encoder, which reads the captions"):
        distil(teacher, data, tmp_path / "student")


def test_prompts_need_an_encoder_and_something_in_the_file(teacher, encoder, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="a prompt on each line; it holds none"):
        prompts_for_teacher(tmp_path / "empty.txt", ["any"], teacher.conditioner, (3, 8, 8))
    with pytest.raises(CheckpointError, match="give --text-encoder"):
        prompts_for_teacher(tmp_path / "empty.txt", [], teacher.conditioner, (3, 8, 8))


def test_a_batch_is_the_same_however_it_is_cut(data, encoder, tmp_path):
    captioned = caption_for_training(data, ["any"], max_tokens=16)
    sizes = {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}
    architecture = fit_architecture(captioned.shape, captioned.conditioner, **sizes)
    whole, cut = (
        train_teacher(
            captioned, architecture, FlowMatchingConfig(), SHORT, tmp_path / str(pieces),
            run=RunConfig(gradient_accumulation=pieces),
        )
        for pieces in (1, 4)
    )  # fmt: skip
    for name, tensor in whole.group("ema").items():
        torch.testing.assert_close(cut.group("ema")[name], tensor, atol=1e-5, rtol=1e-4)


def test_sheets_of_samples_show_the_prompts(teacher, tmp_path):
    with Image.open(tmp_path / "teacher" / "samples" / "0000004.png") as sheet:
        # Four rows of ten pictures of 64 pixels, 8 enlarged, with a line of text under each.
        assert sheet.size == (662, 4 * (68 + 18))
        under = np.asarray(sheet.convert("L"))[68:86]
    assert preview_titles(teacher.conditioner)[:3] == ["a red apple", "a cat", "a happy face"]
    for start in range(2, 640, 66):
        assert under[:, start : start + 60].min() < 100, "something is written under each"


def test_a_teacher_is_guided_in_an_engine_as_in_pytorch(data, teacher, encoder):
    captioned = caption_for_teacher(data, ["any"], teacher.conditioner)
    # As it is read from a folder: its conditioner reads no prompts, and "no condition" is the data's.
    loaded = replace(teacher, conditioner=conditioner_from_json(teacher.conditioner.to_json()))
    given = captioned.conditioning(np.arange(3))
    x_t = np.random.default_rng(0).standard_normal((3, 3, 8, 8), np.float32)
    found = open_teacher(loaded, captioned).velocity(x_t, 0.7, given, guidance_scale=3.0)
    null = {name: row[0] for name, row in as_tensors(captioned.null()).items()}
    guided = GuidedTeacher(teacher.network, GuidanceConfig(3.0), null=null)
    expected = guided.velocity(torch.from_numpy(x_t), 0.7, **as_tensors(given)).numpy()
    plain = teacher.network.velocity(
        torch.from_numpy(x_t), torch.full((3,), 0.7), **as_tensors(given)
    ).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.abs(found - plain).max() > 1e-3 * np.abs(plain).max()  # guidance did something
