"""A student that reads prompts: exported with its text encoder, verified, and sampled by prompt without PyTorch."""

import base64
import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import piflow_edge as pf
from piflow_edge.bench.benchmark import bench
from piflow_edge.bench.cold_start import build_example
from piflow_edge.bench.config import BenchConfig, TeacherConfig
from piflow_edge.bundle.folder import Bundle
from piflow_edge.conditioning import ConditionRequest
from piflow_edge.distill.networks.flow_network import attach_policy_head
from piflow_edge.distill.networks.text_dit import TextDiTConfig, TextDiTNetwork
from piflow_edge.distill.networks.text_encoders import open_prompts
from piflow_edge.distill.sources import StudentModel
from piflow_edge.doctor.examination import bundle_finding
from piflow_edge.engines import open_engine, read_graph_file
from piflow_edge.errors import BundleError, ConditioningError, DataError, UsageError
from piflow_edge.export.onnx_graphs.teacher_graph import export_teacher
from piflow_edge.export.to_bundle import export_bundle
from piflow_edge.policies import GMPolicySpec
from tests.commands.command_line import run
from tests.helpers.text_encoders import tiny_text_encoder

pytestmark = pytest.mark.torch
EXAMPLES = ("a red apple", "a cat with a hat", "")


def make_text_student():
    """A text student of a few thousand weights that was never trained."""
    torch.manual_seed(0)
    config = TextDiTConfig(3, 16, 4, 24, 1, 2, text_size=32, pooled_size=32)
    teacher = TextDiTNetwork(config)
    for parameter in (teacher.module.head.out.weight, teacher.module.modulation.weight):
        torch.nn.init.normal_(parameter, std=0.2)  # adaLN-zero starts at 0, where bugs hide
    conditioner = open_prompts([tiny_text_encoder("bert")], examples=EXAMPLES).spec
    return StudentModel(
        attach_policy_head(teacher, GMPolicySpec(3)), nfe=2, total_substeps=16, conditioner=conditioner
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "text"
    settings = {"precisions": ("fp32", "fp16"), "samplers": [2]}
    rows = export_bundle(make_text_student(), folder, encoders=[tiny_text_encoder("bert")], **settings)
    assert all(row.passed for row in rows)
    assert {"tokens", "encodings"} <= {row.layer for row in rows}
    return folder


def test_a_prompt_gives_the_picture_that_pytorch_gives(folder):
    with pf.load(folder) as generator:
        found = generator("a red apple", seed=3, output="latent").latents
        encoded = open_prompts([tiny_text_encoder("bert")]).encode(ConditionRequest(prompts="a red apple"))
        expected = generator(arrays=encoded, seed=3, output="latent").latents
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_networks_that_are_equal_in_two_precisions_have_one_file(tmp_path):
    """Of a text encoder int8 and int8-weights are the same."""
    export_bundle(make_text_student(), tmp_path / "bundle", encoders=[tiny_text_encoder("bert")],
                  precisions=("fp32", "int8", "int8-weights"))  # fmt: skip
    files = Bundle(tmp_path / "bundle").manifest.networks["encoder.bert"].files
    assert files["int8"] == files["int8-weights"] == ["encoder.bert.int8.onnx"] != files["fp32"]
    assert len(list((tmp_path / "bundle").glob("encoder.*.onnx"))) == 2
    assert len(list((tmp_path / "bundle").glob("student.*.onnx"))) == 3


def test_prompts_steer_and_do_not_depend_on_each_other(folder):
    with pf.load(folder) as generator:
        both = generator(["a cat", "eine Katze, die lacht 🐈"], seed=0, output="latent")
        alone = generator("eine Katze, die lacht 🐈", seed=[(0, 1)], output="latent")
    assert np.abs(both.latents[0] - both.latents[1]).max() > 0.01
    np.testing.assert_allclose(alone.latents[0], both.latents[1], rtol=0, atol=1e-5)


def test_prompts_drawn_together_are_what_they_are_alone_to_the_bit(folder):
    prompts = ["a cat", "eine Katze, die lacht 🐈", "a red apple", ""]
    with pf.load(folder) as generator:
        requests = [generator.prepare(prompt, seed=i) for i, prompt in enumerate(prompts)]
        assert len({request.batch_key for request in requests}) == 1  # the encoder hands on one length
        for i, result in enumerate(generator.make_together(requests, output="latent")):
            alone = generator(prompts[i], seed=i, output="latent")
            np.testing.assert_array_equal(result.latents, alone.latents)
            assert result.recipe == alone.recipe


def test_a_sampler_graph_takes_encodings_in_triton_too(folder, tmp_path):
    from piflow_edge.runtime.triton import write_model

    model = write_model(Bundle(folder), tmp_path)
    config = (model / "config.pbtxt").read_text()
    for name, kind, dims in [
        ("encoder_hidden_states", "FP32", "40, 32"),
        ("encoder_attention_mask", "INT64", "40"),
        ("pooled_projections", "FP32", "32"),
    ]:
        assert f'name: "{name}"\n    data_type: TYPE_{kind}\n    dims: [ {dims} ]' in config
    graph = open_engine(read_graph_file(model / "1" / "model.onnx"), engine="ort-cpu")
    with pf.load(folder) as generator:
        drawn = generator("a cat", seed=4, nfe=2, output="numpy")
        encoded = generator.conditioner.encode(ConditionRequest(prompts="a cat"))
    noise = pf.philox_normal(4, [0], (3, 16, 16))
    made = graph.run({"noise": noise, **encoded})["images"]
    assert np.abs(made.astype(int) - drawn.images).max() <= 1


def test_the_timed_example_is_a_prompt_and_a_bundle_shows_some(folder):
    with pf.load(folder) as generator:
        assert build_example(generator.conditioner, 2) == {"prompt": list(EXAMPLES[:2])}
    shown = run("inspect", folder).output
    assert "'a red apple', 'a cat with a hat'" in shown


def test_without_tokenizers_doctor_tells_the_command_that_gets_them(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    finding = bundle_finding(folder)
    assert finding.status == "problem" and finding.fix == "pip install 'piflow-edge[text]'"


def test_evaluate_reads_captions_with_the_bundles_own_encoder(folder, tmp_path):
    from piflow_edge.distill.data.datasets import load_images
    from piflow_edge.distill.data.encodings import encode_captions
    from piflow_edge.export.feature_extractor import train_prompt_features

    random = np.random.default_rng(0)
    images = random.integers(0, 256, (200, 16, 16, 3), dtype=np.uint8)
    captions = np.array([f"a red apple number {number}" for number in range(200)])
    np.savez(tmp_path / "data.npz", images=images, captions=captions, labels=np.arange(200) % 2)
    prompts = open_prompts([tiny_text_encoder("bert")], examples=EXAMPLES)
    data = encode_captions(load_images(str(tmp_path / "data.npz")), prompts, "tiny")
    _, beside = train_prompt_features(data, tmp_path / "pair.onnx", iterations=3)
    pair = ("--features", tmp_path / "pair.onnx", "--prompt-features", tmp_path / "pair.onnx", beside)
    settings = ("--data", tmp_path / "data.npz", "--no-teacher", "--images", 100, "--json")
    answer = json.loads(run("evaluate", folder, *settings, *pair).stdout)
    (score,) = answer["scores"]
    assert 0 <= score["prompt_accuracy"] <= 1 and -1 <= score["prompt_similarity"] <= 1
    assert len(score["class_diversity"]) == 25 and set(score["class_diversity"]) <= set(captions.tolist())
    assert answer["conditions"]["prompt_features"]["other_prompts"] == 24


def test_many_images_of_prompts_are_those_of_a_call(folder, tmp_path):
    from piflow_edge.runtime.bulk.shards import list_pictures

    prompts = ["a cat", "eine Katze, die lacht 🐈", "a red apple"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    out = tmp_path / "images"
    asked = (
        "--prompts",
        tmp_path / "prompts.txt",
        "--count",
        2,
        "--seed",
        3,
        "--shard-size",
        4,
        "--out",
        out,
    )
    run("generate", folder, *asked)
    with pf.load(folder) as generator:
        expected = generator(prompts, count=2, seed=3, output="numpy").images
    found = [entry for shard in sorted(out.glob("*.tar")) for entry in list_pictures(shard)]
    assert [(index, title) for index, title, _ in found] == [(i, prompts[i // 2]) for i in range(6)]
    for image, (_, _, place) in zip(expected, found, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(place.read()))), image)


def test_a_server_draws_prompts_that_come_together_as_the_generator_draws_them(folder):
    for package in ("starlette", "prometheus_client", "httpx2"):
        pytest.importorskip(package, reason="a server needs the 'serve' extra, and its tests httpx2")
    from tests.runtime.serve.conftest import serve

    prompts = ["a cat", "eine Katze, die lacht 🐈", "a red apple"] * 4
    with serve(pf.load(folder)) as client, ThreadPoolExecutor(6) as pool:
        bodies = [{"prompt": prompt, "seed": i} for i, prompt in enumerate(prompts)]
        answers = list(pool.map(lambda body: client.post("/v1/images/generations", json=body).json(), bodies))
        refused = client.post("/v1/generate", json={"labels": 3})
    with pf.load(folder) as generator:
        for i, answer in enumerate(answers):
            found = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
            expected = generator(prompts[i], seed=i, output="numpy").images[0]
            np.testing.assert_array_equal(np.asarray(found), expected)
    assert refused.status_code == 400 and "labels have no meaning" in refused.json()["error"]["message"]


def test_the_recipe_holds_the_prompt_and_makes_the_picture_again(folder, tmp_path):
    with pf.load(folder) as generator:
        made = generator(["a cat", "a red apple"], seed=5)
        (file,) = made.save(tmp_path / "pair.png")
        recipe = pf.read_recipe(file)
        assert [one["prompt"] for one in recipe.conditioning] == ["a cat", "a red apple"]
        again = generator.make_again(recipe)
    np.testing.assert_array_equal(again.latents, made.latents)


@pytest.mark.parametrize(
    "given", [{"labels": [1]}, {"count": 2}, {"prompt": []}, {"prompt": "\ud83c"}, {"prompt": 3}]
)
def test_what_is_no_prompt_is_refused(folder, given):
    with pf.load(folder) as generator, pytest.raises(ConditioningError):
        generator(**given)


def test_a_negative_prompt_is_refused_with_the_reason(folder):
    with pf.load(folder) as generator, pytest.raises(UsageError, match=r"negative_prompt.*distilled"):
        generator("a cat", negative_prompt="a dog")


def test_without_its_encoder_a_bundle_takes_encodings(tmp_path):
    export_bundle(make_text_student(), tmp_path / "out")
    with pf.load(tmp_path / "out") as generator:
        with pytest.raises(ConditioningError, match="text encoders"):
            generator("a cat")
        encoded = open_prompts([tiny_text_encoder("bert")]).encode(ConditionRequest(prompts="a cat"))
        assert generator(arrays=encoded, output="numpy").images.shape == (1, 16, 16, 3)


def test_other_encoders_are_refused(tmp_path):
    with pytest.raises(DataError, match="trained with"):
        export_bundle(make_text_student(), tmp_path / "out", encoders=[tiny_text_encoder("clip")])
    assert list(tmp_path.iterdir()) == []


def test_an_altered_tokenizer_is_refused(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "tokenizer.bert.json"
    file.write_bytes(file.read_bytes().replace(b"apple", b"pears"))
    with pytest.raises(BundleError, match=r"tokenizer\.bert\.json"):
        pf.load(copy)


def test_a_teacher_steered_by_text_is_timed_beside_its_student(folder, tmp_path):
    student = make_text_student()
    teacher = TextDiTNetwork(TextDiTConfig(3, 16, 4, 24, 1, 2, text_size=32, pooled_size=32))
    torch.nn.init.normal_(teacher.module.head.out.weight, std=0.2)
    assert export_teacher(teacher, tmp_path / "teacher.onnx", student.conditioner) < 1e-4
    quick = BenchConfig(rounds=2, warmup=1, cold_starts=0, engines=["ort-cpu"], precisions=["fp32"])
    found = bench([folder], quick, TeacherConfig(tmp_path / "teacher.onnx", steps=2, guidance_scale=2.0))
    assert [row.setting.model for row in found.rows] == ["text", "teacher, guidance 2"]
