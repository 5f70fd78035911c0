"""An autoencoder's decoder -> ONNX graph."""

import torch
from torch import Tensor, nn

from piflow_edge.bundle.sections import NetworkSpec
from piflow_edge.conditioning import TensorSpec
from piflow_edge.distill.data.autoencoder import Autoencoder
from piflow_edge.export.onnx_graphs.to_onnx import OPSET, program_graph, quiet

DECODER_INPUTS = ("latents",)
DECODER_OUTPUTS = ("images",)


class _Decoder(nn.Module):
    def __init__(self, autoencoder: nn.Module):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents, return_dict=False)[0]


def export_decoder(autoencoder: Autoencoder, shape: list[int]) -> bytes:
    """The decoder as an ONNX model in float32 with a dynamic batch, its weights inside.

    Input: `latents` float32 (batch, C, H, W), not scaled. Output: `images` float32 (batch, C, H, W), -1 black to 1
    white.

    Args:
        autoencoder: see `load_autoencoder`.
        shape: (C, H, W) of the latents.

    Raises:
        CheckFailedError: the exported graph is not valid ONNX.
    """
    # Two samples: torch.export takes an axis of one for a constant.
    example = torch.zeros(2, *shape)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Decoder(autoencoder.module).eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(DECODER_INPUTS),
            output_names=list(DECODER_OUTPUTS),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
    return program_graph(program).model


def describe_decoder(autoencoder: Autoencoder, shape: list[int], opset: int) -> NetworkSpec:
    """The manifest's entry for latents of `shape` (C, H, W) and a graph of `opset`."""
    decoded = list(autoencoder.decode(torch.zeros(1, *shape)).shape[1:])
    return NetworkSpec(
        autoencoder.kind,
        [TensorSpec(DECODER_INPUTS[0], "float32", ("batch", *shape))],
        [TensorSpec(DECODER_OUTPUTS[0], "float32", ("batch", *decoded))],
        {},
        opset,
        {},
    )
