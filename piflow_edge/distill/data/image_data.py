"""Images or latents and what they are conditioned on, as all that trains and compares sees them.

Images stay bytes, in place on the disk where they can, and become floats batch by batch.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from piflow_edge.conditioning import Conditioner, ConditionRequest
from piflow_edge.system.progress import progress

from .captions import Captions

# Bytes that are looked at at a time.
PIECE = 16 << 20
# Bytes that take more than about two seconds to go through.
_TAKES_LONG = 2 << 30


@dataclass(frozen=True)
class Latent:
    """How latents are seen by the network: as `(latent - shift) * scale`, shift and scale as in diffusers.

    `autoencoder`: SHA-256 of the one that made them, None where it is not known.
    """

    scale: float
    shift: float
    autoencoder: str | None = None


@dataclass(frozen=True)
class ImageData:
    """Images or latents, and what they are conditioned on.

    `images`: as they are kept, (M, C, H, W): uint8 pixels, floats from -1 to 1, or latents as their autoencoder makes
    them, which may have a frame axis before H. `conditioner`: what steers them; `arrays`: (M, ...) for each of its
    inputs. `latent`: None for pixels. `captions`: what is said of each image, None where nothing is; it steers only
    once it is encoded, see `CaptionedData`.
    """

    name: str
    images: np.ndarray
    conditioner: Conditioner
    arrays: Mapping[str, np.ndarray]
    latent: Latent | None = None
    captions: Captions | None = None

    # Whether an image has several conditionings, of which `batch` takes one.
    several: ClassVar[bool] = False

    def __len__(self):
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one item; (C, T, H, W) for video."""
        return self.images.shape[1:]

    @property
    def has_images(self) -> bool:
        """Whether there are images, and not prompts alone with the shape of what is made of them."""
        return self.images.strides[0] != 0

    def batch(
        self, indices: np.ndarray, draws: np.ndarray | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The items at `indices` (B,), as the network sees them, and what they are conditioned on.

        Args:
            draws: numbers in [0, 1), (B,), that choose where an item has several conditionings; None is the first.

        Returns:
            `x_0` float32 (B, C, H, W), pixels from -1 to 1 or scaled latents; and by name arrays (B, ...).
        """
        picked = self.images[indices]
        x_0 = np.array(picked, np.float32, order="C")
        if picked.dtype == np.uint8:  # in place: a batch may be large
            x_0 /= 127.5
            x_0 -= 1.0
        elif self.latent:
            x_0 -= self.latent.shift
            x_0 *= self.latent.scale
        return x_0, self.conditioning(indices, draws)

    def conditioning(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return what the items at `indices` (B,) are conditioned on, as `batch` does."""
        dtypes = {spec.name: spec.dtype for spec in self.conditioner.inputs}
        rows = self._rows(indices, draws)
        return {name: np.asarray(array[rows], dtypes[name]) for name, array in self.arrays.items()}

    def _rows(self, indices: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
        """Rows of `arrays` that belong to the items at `indices`."""
        return indices

    def null(self) -> Mapping[str, np.ndarray] | None:
        """Return what stands for "no condition", one entry (1, ...) by name, or None."""
        return self.conditioner.null(1)

    def titles(self, indices: np.ndarray) -> list[str]:
        """Return a few words for each of the items at `indices`."""
        given = self.conditioning(indices)
        request = ConditionRequest(arrays=given) if given else ConditionRequest(count=len(indices))
        return [self.conditioner.title(entry) for entry in self.conditioner.describe(request, given)]

    def settings(self) -> dict:
        """What a checkpoint records of the data, beside its name."""
        latent = {"latent": vars(self.latent).copy()} if self.latent else {}
        whole = {"data_sha256": self.fingerprint(), "data_count": len(self)}
        return {**whole, "data_images_sha256": self._digests[0], **latent}

    def fingerprint(self) -> str:
        """SHA-256 of all that a network would see."""
        return self._digests[1]

    @cached_property
    def _digests(self) -> tuple[str, str]:
        """SHA-256 of the images alone, and of all."""
        digest = hashlib.sha256()
        images = self.images if self.has_images else self.images[:1]  # of a shape, one is as good as all
        for piece in pieces(images, f"checking {self.name}"):
            digest.update(np.ascontiguousarray(piece).data)
        of_images = digest.hexdigest()
        for name, array in sorted(self.arrays.items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            for piece in pieces(array, f"checking {name} of {self.name}"):
                digest.update(np.ascontiguousarray(piece).data)
        if self.latent:
            digest.update(f"latent {self.latent.scale!r} {self.latent.shift!r}".encode())
        if self.captions:
            digest.update(json.dumps([self.captions.texts, self.captions.starts.tolist()]).encode())
        return of_images, digest.hexdigest()


@dataclass(frozen=True)
class CaptionedData(ImageData):
    """Images that are steered by their captions.

    `arrays`: (N, ...), of every one of the N captions. `encoded_null`: see `null`; it is kept, since the encoders may
    be closed when it is needed.
    """

    encoded_null: Mapping[str, np.ndarray] | None = None

    several: ClassVar[bool] = True

    def null(self) -> Mapping[str, np.ndarray] | None:
        """Return the encoding of the prompt that stands for "no condition", or None."""
        return self.encoded_null

    def _rows(self, indices: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
        assert self.captions is not None, "captions were encoded"
        return self.captions.rows(indices, draws)

    def titles(self, indices: np.ndarray) -> list[str]:
        """Return the first caption of each of the items at `indices`."""
        return self.prompts(indices)

    def prompts(self, indices: np.ndarray) -> list[str]:
        """Return the first caption of each of the items at `indices`, whose encoding `conditioning` returns."""
        assert self.captions is not None, "captions were encoded"
        return [self.captions.texts[row] for row in self._rows(indices, None)]


def pieces(array: np.ndarray, title: str) -> Iterator[np.ndarray]:
    """The array in pieces of some megabytes along its first axis, with a bar where that takes long."""
    rows = max(1, PIECE * len(array) // max(array.nbytes, 1))
    starts = range(0, len(array), rows)
    if array.nbytes < _TAKES_LONG:
        yield from (array[start : start + rows] for start in starts)
        return
    with progress(title, len(starts)) as bar:
        for start in starts:
            yield array[start : start + rows]
            bar("")
