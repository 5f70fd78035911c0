"""What a generator's call returns."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from piflow_edge.errors import UsageError

from .arguments import Seeds
from .recipe import Recipe


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What a generator made. It has a length, is iterated image by image, and shows itself in a notebook.

    `images`: PIL images; for output="numpy" an array uint8 (B, H, W, C), for "float" float32 from 0 to 1; None for
    "latent". `latents`: float32 (B, C, H, W). `seeds`: for every image the (seed, index) that makes it again, None
    when the noise was given. `engine`, `device`: what ran the network. `timings`: milliseconds per stage ("noise",
    "network", "policy", "decode", "transfer" between host and device) and "total"; on a GPU see `synchronize` of a
    call. `recipe`: all settings used; see `Generator.make_again`.
    """

    images: Any
    latents: np.ndarray
    seeds: Seeds | None
    engine: str
    device: str
    timings: dict[str, float]
    recipe: Recipe

    def __len__(self) -> int:
        return len(self.latents)

    def __iter__(self) -> Iterator[Any]:
        """The images, or the latents where none were made."""
        return iter(self._images_or_latents)

    def __repr__(self) -> str:
        kind, items = "latents" if self.images is None else "images", self._images_or_latents
        sizes = items.shape[1:] if isinstance(items, np.ndarray) else items[0].size
        size = "x".join(map(str, sizes))
        seeds = "noise given" if self.seeds is None else f"seeds {_shorten(self.seeds)}"
        ran = f"{self.engine} on {self.device}, {self.timings['total']:.1f} ms"
        return f"<Result: {len(self)} {kind} of {size}, {seeds}, {ran}>"

    @property
    def _images_or_latents(self) -> Any:
        return self.latents if self.images is None else self.images

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write what was made, and return the files.

        Args:
            path: of a file: a picture with all images side by side, small ones enlarged, as PNG, WebP without loss, or
                JPEG by its suffix; or for arrays one .npy. A name without a suffix is a folder, which gets one file per
                image. A picture holds its recipe; see `read_recipe`.

        Raises:
            UsageError: an open file, or "-", which other programs take for standard output; see `write`.
            ShapeError: a suffix that such images are not written as.
        """
        from .pictures import save_images  # Pillow is only needed where pictures are written

        if hasattr(path, "write"):
            raise UsageError("a Result is saved under a path; into an open file: write(file)")
        if os.fspath(path) == "-":
            raise UsageError(
                "a Result is saved into a file or folder; for standard output: write(sys.stdout.buffer)"
            )
        return save_images(Path(path), self._images_or_latents, self.recipe)

    def write(self, file: BinaryIO) -> None:
        """Write what was made into an open file: one picture, as `save` makes it, or for arrays one .npy."""
        from .pictures import write_images

        write_images(file, self._images_or_latents, self.recipe)

    def _repr_png_(self) -> bytes | None:
        """All images side by side, for a notebook; None for latents."""
        if self.images is None:
            return None
        from .pictures import show_images

        return show_images(self.images)


def _shorten(seeds: Seeds) -> str:
    shown = ", ".join(f"{seed}-{index}" for seed, index in seeds[:3])
    return shown if len(seeds) <= 3 else f"{shown}, ..."
