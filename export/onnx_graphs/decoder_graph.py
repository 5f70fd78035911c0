"""An autoencoder's decoder -> ONNX graph."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from piflow_edge.bundle.sections import AxisSpec, NetworkSpec
from piflow_edge.bundle.sizes import HEIGHT, IMAGE_HEIGHT, IMAGE_WIDTH, WIDTH
from piflow_edge.conditioning import TensorSpec
from piflow_edge.distill.data.autoencoder import KINDS, Autoencoder
from piflow_edge.engines import Graph
from piflow_edge.export.onnx_graphs.to_onnx import (
    build_dims,
    name_dims,
    size_state,
    trace_graph,
    traced_lengths,
)

# Sides of latents that are enough to see how much larger a decoder makes them.
_ENOUGH = 8
DECODER_INPUTS = ("latents",)
DECODER_OUTPUTS = ("images",)


class _Decoder(nn.Module):
    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.autoencoder, self.decode = autoencoder.module, KINDS[autoencoder.kind].decode

    def forward(self, latents: Tensor) -> Tensor:
        return self.decode(self.autoencoder, latents)


def export_decoder(
    autoencoder: Autoencoder, shape: list[int], axes: Mapping[str, AxisSpec] | None = None
) -> Graph:
    """The decoder as an ONNX model in float32 with a dynamic batch.

    Input: `latents` float32 (batch, C, H, W), not scaled. Output: `images` float32 (batch, C, H, W), -1 black to 1
    white.

    Args:
        autoencoder: see `load_autoencoder`.
        shape: (C, H, W) of the latents.
        axes: lengths of height and width, where the graph is for several.

    Raises:
        CheckpointError, CheckFailedError: as of `trace_graph`.
    """
    named = {name: axis for name, axis in (axes or {}).items() if name in (HEIGHT, WIDTH)}
    traced, sides = size_state(shape, named, traced_lengths(named))
    dims = build_dims(named)
    shapes = ({0: dims["batch"], **{place: dims[name] for place, name in sides.items()}},)
    module, example = _Decoder(autoencoder).eval(), (torch.zeros(2, *traced),)
    return trace_graph(module, example, DECODER_INPUTS, DECODER_OUTPUTS, shapes, name_dims(named))


def measure_scale(autoencoder: Autoencoder, shape: Sequence[int]) -> tuple[int, int]:
    """Channels of the images, and pixels of an image per place of latents (C, H, W) along each side."""
    small = (shape[0], *(min(side, _ENOUGH) for side in shape[1:]))
    decoded = autoencoder.decode(torch.zeros(1, *small)).shape
    return decoded[1], decoded[2] // small[1]


def describe_decoder(
    autoencoder: Autoencoder, shape: list[int], opset: int, axes: Mapping[str, AxisSpec] | None = None
) -> NetworkSpec:
    """The manifest's entry for latents of `shape` (C, H, W) and a graph of `opset`; `axes` as of `export_decoder`."""
    channels, factor = measure_scale(autoencoder, shape)
    sides, decoded = shape[1:], [side * factor for side in shape[1:]]
    if axes and HEIGHT in axes:
        sides, decoded = [HEIGHT, WIDTH], [IMAGE_HEIGHT, IMAGE_WIDTH]
    return NetworkSpec(
        autoencoder.kind,
        [TensorSpec(DECODER_INPUTS[0], "float32", ("batch", shape[0], *sides))],
        [TensorSpec(DECODER_OUTPUTS[0], "float32", ("batch", channels, *decoded))],
        {},
        opset,
        {},
    )
