"""Images written into files, with the recipe that makes them again."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from piflow_edge.errors import ShapeError
from piflow_edge.system.files import atomic_file, write_atomic
from piflow_edge.system.sheets import VISIBLE, as_pil, encode_png, image_grid

from .recipe import CHUNK, EXIF_START, EXIF_TAG, Recipe

# What pictures are written as; the first where nobody says.
PICTURE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
# A segment of a JPEG file has no more than 65,533 bytes.
_LONGEST_EXIF = 65_000
# Images per row where all of a call are shown at once.
_COLUMNS = 10


def png_bytes(image: Image.Image, recipe: Recipe | None = None) -> bytes:
    """The image as a PNG file, which says how it was made if a recipe is given; see `recipe.read_recipe`."""
    return encode_png(image, {CHUNK: recipe.as_json()} if recipe is not None else None)


def show_images(images: Any) -> bytes:
    """Return PIL images, or an array (B, H, W, C) of bytes or of numbers from 0 to 1, as one PNG."""
    if isinstance(images, np.ndarray):
        images = as_pil(images if images.dtype == np.uint8 else np.rint(255 * images).astype(np.uint8))
    return png_bytes(image_grid([images[i : i + _COLUMNS] for i in range(0, len(images), _COLUMNS)]))


def encode_picture(image: Image.Image, suffix: str, recipe: Recipe | None = None) -> bytes:
    """Return the image as a file of that suffix: PNG, WebP without loss, or JPEG; see `png_bytes`."""
    if suffix == ".png":
        return png_bytes(image, recipe)
    file, exif = io.BytesIO(), Image.Exif()
    if recipe is not None:
        exif[EXIF_TAG] = EXIF_START + recipe.as_json()
    is_webp = suffix == ".webp"
    if max(image.size) > (16_383 if is_webp else 65_535) or (
        not is_webp and len(exif.tobytes()) > _LONGEST_EXIF
    ):
        raise ShapeError(
            f"so many images, or their recipe, do not fit into one file that ends in {suffix}; write a .png, or a "
            "folder with one file for each"
        )
    if is_webp:
        image.convert("RGB").save(file, "WEBP", lossless=True, exif=exif)
    else:
        image.save(file, "JPEG", quality=95, subsampling=0, exif=exif)
    return file.getvalue()


def write_images(file: BinaryIO, images: Any, recipe: Recipe) -> None:
    """Write PIL images into an open file, as one picture that holds its recipe; arrays as .npy."""
    if _are_pictures(images):
        file.write(_one_picture(images, ".png", recipe))
    else:
        _write_array(file, images)


def save_images(path: Path, images: Any, recipe: Recipe) -> list[Path]:
    """Write PIL images, or an array of one entry per image, into one file or, without a suffix, one for each."""
    are_pictures = _are_pictures(images)
    suffixes, suffix = PICTURE_SUFFIXES if are_pictures else (".npy",), path.suffix.lower()
    if suffix not in ("", *suffixes):
        kind = "pictures" if are_pictures else "arrays"
        raise ShapeError(
            f"{kind} go into a file that ends in {' or '.join(suffixes)}, or into a folder; got {path}"
        )
    (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
    files = [path] if suffix else _file_names(path, recipe, suffixes[0])
    if not are_pictures:
        _save_arrays(files, [images] if path.suffix else images)
    elif path.suffix:
        write_atomic(path, _one_picture(images, suffix, recipe))
    else:
        for i, (file, image) in enumerate(zip(files, images, strict=True)):
            write_atomic(file, png_bytes(image, recipe.of(i)))
    return files


def _are_pictures(images: Any) -> bool:
    return not isinstance(images, np.ndarray)


def _one_picture(images: Any, suffix: str, recipe: Recipe) -> bytes:
    # One that can be seen as it is gets no margin: it may be the image that the next call starts from.
    alone = len(images) == 1 and max(images[0].size) >= VISIBLE
    return encode_picture(images[0] if alone else image_grid([images]), suffix, recipe)


def _save_arrays(files: Sequence[Path], arrays: Any) -> None:
    for file, array in zip(files, arrays, strict=True):
        with atomic_file(file, size=array.nbytes) as opened:
            _write_array(opened, array)


def _write_array(file: BinaryIO, array: np.ndarray) -> None:
    # Through `write` alone: what NumPy raises of a real file that is full, or a pipe that is closed, has no number.
    writer: Any = SimpleNamespace(write=file.write)
    np.save(writer, array)


def _file_names(folder: Path, recipe: Recipe, suffix: str) -> list[Path]:
    """One file per image, named for its seed and index; where several are the same, with a third number."""
    files, seen = [], Counter()
    for pair in recipe.seeds:
        again = f"-{seen[pair]}" if seen[pair] else ""
        files.append(folder / f"{pair[0]}-{pair[1]}{again}{suffix}")
        seen[pair] += 1
    return files
