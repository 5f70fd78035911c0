"""A text encoder -> ONNX graph with a dynamic batch and number of tokens."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from piflow_edge.bundle.manifest import STUDENT
from piflow_edge.bundle.sections import NetworkSpec
from piflow_edge.conditioning import Conditioner, OpenedTextPrompts, TensorSpec
from piflow_edge.distill.networks.text_encoders import TextEncoder, open_prompts
from piflow_edge.engines import Graph
from piflow_edge.errors import ConditioningError, DataError
from piflow_edge.export.onnx_graphs.to_onnx import trace_graph

ENCODER_INPUTS = ("input_ids", "attention_mask")
# Prompts that a precision of an encoder is measured with: so many of the model's own, and these beside them. What is
# largest inside an encoder depends on the prompt, and on its length.
_EXAMPLES = 8
_MORE_PROMPTS = (
    "", "An oil painting of mountains at dawn, highly detailed, 4k", "一只戴帽子的猫", "a street in the rain, " * 100,
)  # fmt: skip


def tokens_axis(encoder: TextEncoder) -> str:
    """Name of the axis of an encoder's tokens."""
    return f"{encoder.spec.name}_tokens"


def describe_encoder(encoder: TextEncoder, opset: int) -> NetworkSpec:
    """Return the manifest's entry for an encoder."""
    ids = ("batch", tokens_axis(encoder))
    inputs = [TensorSpec(name, "int64", ids) for name in ENCODER_INPUTS]
    found = encoder.run({name: np.ones((1, 1), np.int64) for name in ENCODER_INPUTS})
    shapes: dict[str, tuple[Any, ...]] = {"hidden_states": (*ids, found["hidden_states"].shape[2])}
    if "pooled" in found:
        shapes["pooled"] = ("batch", found["pooled"].shape[1])
    outputs = [TensorSpec(name, "float32", shapes[name]) for name in encoder.module.outputs]
    targets = {"hidden_states": encoder.spec.hidden_input, "pooled": encoder.spec.pooled_input}
    feeds = {name: [f"{STUDENT}/{target}"] for name, target in targets.items() if name in found and target}
    return NetworkSpec(type(encoder.module.model).__name__, inputs, outputs, feeds, opset, {})


def export_encoder(encoder: TextEncoder) -> Graph:
    """The encoder in float32.

    Inputs: `input_ids` and `attention_mask`, int64 (batch, tokens). Outputs: `hidden_states` float32 (batch, tokens, D)
    and, where the encoder pools, `pooled` float32 (batch, P).

    Raises:
        CheckpointError, CheckFailedError: as of `trace_graph`.
    """
    longest = encoder.spec.max_tokens
    # Two samples, and not one token: torch.export takes an axis of one for a constant.
    ids = torch.ones(2, min(7, longest), dtype=torch.int64)
    axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("tokens", min=1, max=longest)}
    example = (ids, torch.ones_like(ids))
    return trace_graph(encoder.module, example, ENCODER_INPUTS, encoder.module.outputs, (axes, axes))


def join_encoders(conditioner: Conditioner, encoders: Sequence[TextEncoder]) -> OpenedTextPrompts:
    """Return the conditioner that reads prompts in the place of one that a student was trained with.

    Raises:
        DataError: the encoders make other arrays, or are not those of the student.
    """
    text = getattr(conditioner, "spec", conditioner)
    texts = {name: getattr(text, name) for name in ("null_prompt", "examples") if hasattr(text, name)}
    opened = open_prompts(encoders, **texts)
    names, wanted = ({spec.name: spec.dtype for spec in one.inputs} for one in (opened, conditioner))
    if names != wanted or (conditioner.networks and opened.to_json() != conditioner.to_json()):
        raise DataError(
            f"the text encoders make {', '.join(map(str, opened.inputs))}; the student was trained with "
            f"{', '.join(map(str, conditioner.inputs))}, or with other settings: give the encoders it was trained with"
        )
    return opened


def example_inputs(encoder: TextEncoder, conditioner: Conditioner) -> list[dict[str, np.ndarray]]:
    """Return what an encoder is fed for the conditioner's example prompts and some more, one batch each."""
    tokenizer = encoder.spec.build_tokenizer(encoder.tokenizer)
    prompts = dict.fromkeys([*conditioner.example_prompts(_EXAMPLES), *_MORE_PROMPTS])
    found = []
    for prompt in prompts:
        with suppress(ConditioningError):  # of "" some tokenizers make nothing
            found.append(encoder.spec.encoder_inputs(tokenizer.encode(prompt)))
    return found
