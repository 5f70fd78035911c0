"""Captions as the encodings that steer a network, made once by a frozen text encoder and kept in the cache."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from piflow_edge.conditioning import ConditionRequest, OpenedTextPrompts, TensorSpec, TextPrompts
from piflow_edge.errors import DataError
from piflow_edge.system.cache_folder import cache_folder
from piflow_edge.system.files import sha256
from piflow_edge.system.progress import progress

from .array_cache import ArrayWriter, load_or_build
from .captions import Captions
from .image_data import CaptionedData, ImageData

# Changes whenever the same captions would become other numbers.
_FORMAT = 1


def encode_captions(data: ImageData, prompts: OpenedTextPrompts, encoder: str) -> CaptionedData:
    """Return the images steered by their captions.

    Encodings are made one caption at a time, as at run time, and kept in half precision, which rounds by less than
    what training averages out.

    Args:
        data: images with captions.
        prompts: reads prompts with the encoders that the network is to be steered by.
        encoder: SHA-256 of those encoders; encodings in the cache are used again for the same ones.

    Raises:
        DataError: the data have no captions, or an encoding is too large for half precision.
    """
    captions = data.captions
    if captions is None:
        raise DataError(
            f"a text encoder reads captions, and {data.name!r} has none; give an .npz with 'captions', or a folder "
            "with captions.jsonl, captions.csv or a .txt file beside each image"
        )
    kept = _cached_encodings(captions, prompts, encoder)
    null = prompts.null(1)
    null = None if null is None else fill_up(null, prompts.spec)
    return CaptionedData(data.name, data.images, prompts, kept.unpack(), data.latent, captions, null)


def make_prompt_data(
    name: str, prompts: list[str], shape: tuple[int, ...], opened: OpenedTextPrompts, encoder: str
) -> CaptionedData:
    """Return data without images: prompts for a data-free run, and the shape (C, H, W) of what is made of them."""
    images = np.broadcast_to(np.float32(0), (len(prompts), *shape))
    captions = Captions.of_rows([[prompt] for prompt in prompts])
    data = ImageData(name, images, opened, {}, captions=captions)
    return encode_captions(data, opened, encoder)


def _cached_encodings(captions: Captions, prompts: OpenedTextPrompts, encoder: str) -> "PackedRows":
    specs = prompts.inputs

    def restore(packed: np.ndarray, known: dict) -> PackedRows:
        kept = PackedRows(packed, specs, {name: tuple(shape) for name, shape in known["shapes"].items()})
        if len(packed) != len(captions.texts) or set(kept.shapes) != {spec.name for spec in specs}:
            raise ValueError("captions and encodings do not fit")
        return kept

    def build(writer: ArrayWriter) -> dict:
        shapes: dict[str, list[int]] = {}
        with progress("encoding captions", len(captions.texts)) as bar:
            for text in captions.texts:
                encoding = fill_up(prompts.encode(ConditionRequest(prompts=[text])), prompts.spec)
                row = pack_row(encoding, specs)
                if not np.isfinite(row).all():
                    raise DataError(
                        f"encodings are kept in float16, up to 65504; that of {text!r:.60} holds larger numbers or NaN"
                    )
                shapes = shapes or {name: list(array.shape[1:]) for name, array in encoding.items()}
                writer.append(row[None])
                bar("")
        return {"shapes": shapes}

    description = [_FORMAT, encoder, prompts.to_json(), captions.texts]
    place = cache_folder() / "encodings" / sha256(json.dumps(description).encode())[:32]
    return load_or_build(place, "the encodings of the captions", build, restore)


def fill_up(encoding: Mapping[str, np.ndarray], spec: TextPrompts) -> dict[str, np.ndarray]:
    """Return the encoding of a prompt with as many tokens as the longest prompt may have, zeros where there are none.

    In a batch all have one length; most are filled up already.
    """
    lengths = {
        name: encoder.max_tokens - encoder.drop_tokens
        for encoder in spec.encoders
        for name in (encoder.hidden_input, encoder.mask_input)
    }
    filled = {}
    for name, array in encoding.items():
        missing = max(lengths.get(name, 0) - array.shape[1], 0)
        filled[name] = np.pad(array, [(0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)])
    return filled


def pack_row(encoding: Mapping[str, np.ndarray], specs: tuple[TensorSpec, ...]) -> np.ndarray:
    """Return the encoding of one prompt, a batch of one by name, as one row of float16."""
    with np.errstate(over="ignore"):
        return np.concatenate([encoding[spec.name][0].ravel().astype(np.float16) for spec in specs])


@dataclass(frozen=True)
class PackedRows:
    """Arrays of several inputs, kept side by side in one of float16 (N, numbers of all inputs).

    `shapes`: of one entry, by input.
    """

    packed: np.ndarray
    specs: tuple[TensorSpec, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def fingerprint(self) -> str:
        """SHA-256 of the numbers."""
        return sha256(np.ascontiguousarray(self.packed).data)

    def unpack(self) -> dict[str, np.ndarray]:
        """Return the arrays (N, ...), by input; they stay on the disk."""
        arrays, start = {}, 0
        for spec in self.specs:
            shape = self.shapes[spec.name]
            stop = start + int(np.prod(shape))
            arrays[spec.name] = self.packed[:, start:stop].reshape(len(self.packed), *shape)
            start = stop
        return arrays
