"""From latents to images, where the latents lie: through the bundle's decoder, if it has one."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from piflow_edge.bundle.manifest import Manifest
from piflow_edge.engines import OpenNetwork
from piflow_edge.errors import NotFiniteError
from piflow_edge.kernels import gpu_arrays
from piflow_edge.runtime.images import decode_float_there, decode_there

from .batching import cut_batches, join_arrays
from .stopwatch import Stopwatch

# Pixels that are decoded at a time: a decoder's inner states are hundreds of times larger than its images.
_DECODED_PIXELS = 1 << 20


class Decoding:
    """What makes images of a bundle's latents: its decoder, opened in one precision, or None for latents of pixels."""

    def __init__(self, manifest: Manifest, decoder: OpenNetwork | None, precision: str):
        self._manifest, self._decoder, self._precision = manifest, decoder, precision

    def inputs(self, latents: Any) -> dict[str, Any]:
        """What the decoder is fed for latents (B, C, H, W) as the student gives them: scaled back."""
        assert self._manifest.decoder is not None
        (given,) = self._manifest.decoder.inputs
        return {given.name: self._manifest.latent.restore(latents)}

    def queue_images(self, latents: Any, *, as_float: bool) -> dict[str, Any]:
        """Images of latents in a GPU's memory, left there and not waited for, in pieces by name: "images.0", ...

        Beside each piece, "finite.0", ..., what is NaN where the decoder made NaN or infinity.
        """
        convert, found = decode_float_there if as_float else decode_there, {}
        if self._decoder is None:
            return {"images.0": convert(latents, self._manifest.latent)}
        for i, piece in enumerate(self._pieces(latents)):
            (decoded,) = self._decoder.run(self.inputs(latents[piece])).values()
            found[f"finite.{i}"] = gpu_arrays.sum_up_finiteness(decoded)
            found[f"images.{i}"] = convert(decoded)
        return found

    def with_decoder(self, decoder: OpenNetwork | None) -> "Decoding":
        """The same with another way to run the decoder."""
        return Decoding(self._manifest, decoder, self._precision)

    def _pieces(self, latents: Any) -> Iterator[slice]:
        manifest, (*_, rows, columns) = self._manifest, latents.shape
        assert manifest.image_shape is not None and self._decoder is not None
        _, height, width = manifest.image_shape
        _, usual_rows, usual_columns = manifest.latent.shape
        pixels = height * width * rows * columns // (usual_rows * usual_columns)
        return cut_batches(len(latents), max(1, _DECODED_PIXELS // pixels), self._decoder)

    def images(self, latents: Any, *, as_float: bool, clock: Stopwatch) -> np.ndarray:
        """uint8 (B, H, W, C), or float32 from 0 to 1, in the host's memory, of latents (B, C, H, W).

        Raises:
            NotFiniteError: the decoder made NaN or infinity.
        """
        convert = decode_float_there if as_float else decode_there
        if self._decoder is None:
            return on_host(clock.run("decode", convert, latents, self._manifest.latent), clock)
        images = []
        for piece in self._pieces(latents):
            images.append(on_host(clock.run("decode", self._decode, latents[piece], convert), clock))
        return join_arrays(images)

    def _decode(self, latents: Any, convert: Callable[..., Any]) -> Any:
        assert self._decoder is not None
        (decoded,) = self._decoder.run(self.inputs(latents)).values()
        check_finite(decoded, "the decoder", self._manifest, self._precision, self._decoder)
        return convert(decoded)


def check_finite(array: Any, network: str, manifest: Manifest, precision: str, engine: OpenNetwork) -> None:
    """NotFiniteError for NaN and infinity: they would be black, or whatever the processor makes of them."""
    if not gpu_arrays.all_finite(array):
        raise not_finite(network, manifest, precision, engine)


def not_finite(network: str, manifest: Manifest, precision: str, engine: OpenNetwork) -> NotFiniteError:
    """The error that says which network made NaN or infinity."""
    return NotFiniteError(
        f"{network} of bundle {manifest.name!r} in {precision} on {engine.name} made NaN or infinity; load it in "
        f"another precision. `piflow-edge verify BUNDLE --precision {precision}` tells where"
    )


def on_host(array: Any, clock: Stopwatch) -> np.ndarray:
    """The array in the host's memory."""
    if isinstance(array, np.ndarray):
        return array
    return clock.run("transfer", gpu_arrays.to_host, array)
