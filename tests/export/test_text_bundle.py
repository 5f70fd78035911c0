"""A student that reads prompts: exported with its text encoder, verified, and sampled by prompt without PyTorch."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import piflow_edge as pf
from piflow_edge.conditioning import ConditionRequest
from piflow_edge.distill.networks.flow_network import attach_policy_head
from piflow_edge.distill.networks.text_dit import TextDiTConfig, TextDiTNetwork
from piflow_edge.distill.networks.text_encoders import open_prompts
from piflow_edge.distill.sources import StudentModel
from piflow_edge.errors import BundleError, ConditioningError, DataError
from piflow_edge.export.to_bundle import export_bundle
from piflow_edge.policies import GMPolicySpec
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
    rows = export_bundle(
        make_text_student(), folder, encoders=[tiny_text_encoder("bert")], precisions=("fp32", "fp16")
    )
    assert all(row.passed for row in rows)
    assert {"tokens", "encodings"} <= {row.layer for row in rows}
    return folder


def test_a_prompt_gives_the_picture_that_pytorch_gives(folder):
    with pf.load(folder) as generator:
        found = generator("a red apple", seed=3, output="latent").latents
        encoded = open_prompts([tiny_text_encoder("bert")]).encode(ConditionRequest(prompts="a red apple"))
        expected = generator(arrays=encoded, seed=3, output="latent").latents
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


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
