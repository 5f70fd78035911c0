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
from tests.helpers.text_encoders import nasty_prompts, tiny_text_encoder

pytestmark = pytest.mark.torch
KINDS = ("bert", "clip", "t5", "qwen2_5_vl")


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_encoded_as_in_transformers(kind):
    encoder = tiny_text_encoder(kind)
    torch_side = open_prompts([encoder])
    with closing(open_engine(export_encoder(encoder), engine="ort-cpu")) as graph:
        ours = torch_side.spec.open(
            lambda asset: encoder.tokenizer, lambda name, inputs: graph.run(dict(inputs))
        )
        for prompt in ["a red apple", "", "a", *nasty_prompts(40)]:
            theirs, found = (text.encode(ConditionRequest(prompts=prompt)) for text in (torch_side, ours))
            for name, array in theirs.items():
                np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_hands_on_what_the_model_says(kind):
    encoder = tiny_text_encoder(kind)
    ids = torch.tensor([[3, 9, 5, 1]])
    found = encoder.module(ids, torch.ones_like(ids))
    with torch.no_grad():
        model = encoder.module.model(input_ids=ids, output_hidden_states=True)
    layers = [model.hidden_states[layer] for layer in encoder.spec.layers] or [model.last_hidden_state]
    torch.testing.assert_close(found[0], torch.cat(layers, dim=-1))
