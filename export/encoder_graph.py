"""A text encoder -> ONNX graph with a dynamic batch and number of tokens."""

import torch

from piflow_edge.distill.networks.text_encoders import TextEncoder
from piflow_edge.engines import Graph
from piflow_edge.export.to_onnx import OPSET, program_graph, quiet

ENCODER_INPUTS = ("input_ids", "attention_mask")


def export_encoder(encoder: TextEncoder) -> Graph:
    """The encoder in float32.

    Inputs: `input_ids` and `attention_mask`, int64 (batch, tokens). Outputs: `hidden_states` float32 (batch, tokens, D)
    and, where the encoder pools, `pooled` float32 (batch, P).

    Raises:
        CheckFailedError: the exported graph is not valid ONNX.
    """
    longest = encoder.spec.max_tokens
    # Two samples, and not one token: torch.export takes an axis of one for a constant.
    ids = torch.ones(2, min(7, longest), dtype=torch.int64)
    axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("tokens", min=1, max=longest)}
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            encoder.module,
            (ids, torch.ones_like(ids)),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(ENCODER_INPUTS),
            output_names=list(encoder.module.outputs),
            dynamic_shapes=(axes, axes),
            verbose=False,
        )
    return program_graph(program)
