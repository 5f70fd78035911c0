"""Text encoders as graphs: the same encodings as `transformers` makes, for any batch and number of tokens."""

from contextlib import closing

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from piflow_edge.conditioning import ConditionRequest
from piflow_edge.distill.networks.text_encoders import open_prompts
from piflow_edge.engines import open_engine
from piflow_edge.export.onnx_graphs.encoder_graph import export_encoder
from tests.helpers.text_encoders import nasty_prompts, tiny_text_encoder, transformers_tokenizer

pytestmark = pytest.mark.torch
TOKENIZERS = {"bert": "wordpiece", "clip": "clip", "t5": "unigram", "qwen2_5_vl": "qwen"}
KINDS = tuple(TOKENIZERS)


def encode_in_transformers(kind, encoder, prompts):
    """Hidden states, mask and pooled vectors as a pipeline of `transformers` makes them, in one batch."""
    words, spec = transformers_tokenizer(TOKENIZERS[kind]), encoder.spec
    words.pad_token_id = spec.pad_id
    texts = [spec.template.replace("{}", prompt, 1) for prompt in prompts]
    padding = "max_length" if spec.pad_to_max else "longest"
    batch = words(
        texts,
        padding=padding,
        truncation=True,
        max_length=spec.max_tokens,
        padding_side="right",
        return_tensors="pt",
    )
    mask = torch.ones_like(batch.attention_mask) if spec.sees_padding else batch.attention_mask
    with torch.no_grad():
        found = encoder.module.model(batch.input_ids, attention_mask=mask, output_hidden_states=True)
    layers = [found.hidden_states[layer] for layer in spec.layers] or [found.last_hidden_state]
    pooled = encoder.module.pool(found, mask).numpy() if encoder.module.pool else None
    hidden = torch.cat(layers, dim=-1) * batch.attention_mask[..., None]
    return hidden.numpy()[:, spec.drop_tokens :], batch.attention_mask.numpy()[:, spec.drop_tokens :], pooled


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_encoded_as_in_transformers(kind):
    encoder, prompts = tiny_text_encoder(kind), nasty_prompts(520)
    hidden, mask, pooled = encode_in_transformers(kind, encoder, prompts)
    with closing(open_engine(export_encoder(encoder), engine="ort-cpu")) as graph:
        text = open_prompts([encoder]).spec.open(
            lambda asset: encoder.tokenizer, lambda name, inputs: graph.run(dict(inputs))
        )
        found = text.encode(ConditionRequest(prompts=prompts))
    length = hidden.shape[1]
    np.testing.assert_array_equal(found["encoder_attention_mask"][:, :length], mask)
    assert not found["encoder_attention_mask"][:, length:].any()
    # Padding in a batch adds in another order.
    np.testing.assert_allclose(found["encoder_hidden_states"][:, :length], hidden, rtol=0, atol=1e-4)
    assert ("pooled_projections" in found) == (pooled is not None)
    if pooled is not None:
        np.testing.assert_allclose(found["pooled_projections"], pooled, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_hands_on_what_the_model_says(kind):
    encoder = tiny_text_encoder(kind)
    ids = torch.tensor([[3, 9, 5, 1]])
    found = encoder.module(ids, torch.ones_like(ids))
    with torch.no_grad():
        model = encoder.module.model(input_ids=ids, output_hidden_states=True)
    layers = [model.hidden_states[layer] for layer in encoder.spec.layers] or [model.last_hidden_state]
    torch.testing.assert_close(found[0], torch.cat(layers, dim=-1))
