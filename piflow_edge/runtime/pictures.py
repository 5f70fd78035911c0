"""Small images, laid out to be looked at, and written into files."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from piflow_edge.errors import ShapeError
from piflow_edge.system.files import atomic_file, write_atomic

from .images import as_pil
from .recipe import CHUNK, EXIF_START, EXIF_TAG, Recipe

# What pictures are written as; the first where nobody says.
PICTURE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
_GAP = 2
# Shorter sides are enlarged up to about this many pixels, whole pixels each, so that 8x8 digits can be seen.
VISIBLE = 64
# Longer sides are shrunk to this many where pictures are only to be compared.
_LARGEST = 256
_TEXT_SIZE = 14
# A segment of a JPEG file has no more than 65,533 bytes.
_LONGEST_EXIF = 65_000
# Images per row where all of a call are shown at once.
_COLUMNS = 10


def image_grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of equally large images on one white sheet; small images are enlarged by a whole factor."""
    width, height = rows[0][0].size
    factor = max(1, VISIBLE // max(width, height))
    width, height = width * factor, height * factor
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, len(rows) * (height + _GAP) + _GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (_GAP + x * (width + _GAP), _GAP + y * (height + _GAP)))
    return sheet


def side_by_side(rows: dict[str, Sequence[Image.Image]], headings: Sequence[str]) -> Image.Image:
    """`image_grid` with the rows' names on its left and a heading over every column, cut where it is too long."""
    grid = image_grid(list(rows.values()))
    font = _font()
    left = max(_width(font, name) for name in rows) + 2 * _GAP + 8
    top = _TEXT_SIZE + 8
    sheet = Image.new("RGB", (left + grid.width, top + grid.height), "white")
    sheet.paste(grid, (left, top))
    draw = ImageDraw.Draw(sheet)
    pitch = (grid.width - _GAP) // len(headings), (grid.height - _GAP) // len(rows)
    for x, heading in enumerate(headings):
        text = _fitted(font, heading, pitch[0] - 6)
        draw.text((left + _GAP + x * pitch[0], 2), text, "black", font)
    for y, name in enumerate(rows):
        middle = top + _GAP + y * pitch[1] + (pitch[1] - _TEXT_SIZE) // 2
        draw.text((_GAP + 4, middle), _printable(font, name), "black", font)
    return sheet


def at_most(image: Image.Image, side: int = _LARGEST) -> Image.Image:
    """The image, shrunk where a side is longer than `side` pixels."""
    factor = side / max(image.size)
    if factor >= 1:
        return image
    return image.resize([max(1, round(n * factor)) for n in image.size], Image.Resampling.LANCZOS)


def png_bytes(image: Image.Image, recipe: Recipe | None = None) -> bytes:
    """The image as a PNG file, which says how it was made if a recipe is given; see `recipe.read_recipe`."""
    file, text = io.BytesIO(), PngInfo()
    if recipe is not None:
        text.add_text(CHUNK, recipe.as_json())
    image.save(file, "PNG", optimize=True, pnginfo=text)
    return file.getvalue()


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
    file.write(_one_picture(images, ".png", recipe)) if _are_pictures(images) else np.save(file, images)


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
        with atomic_file(file) as opened:
            np.save(opened, array)


def _file_names(folder: Path, recipe: Recipe, suffix: str) -> list[Path]:
    """One file per image, named for its seed and index; where several are the same, with a third number."""
    files, seen = [], Counter()
    for pair in recipe.seeds:
        again = f"-{seen[pair]}" if seen[pair] else ""
        files.append(folder / f"{pair[0]}-{pair[1]}{again}{suffix}")
        seen[pair] += 1
    return files


def _font():
    try:
        return ImageFont.load_default(_TEXT_SIZE)
    except TypeError:  # Pillow 10.0 has one of a fixed size
        return ImageFont.load_default()


def _printable(font, text: str) -> str:
    """The text, without characters that Pillow's smallest font cannot draw."""
    return (
        text
        if isinstance(font, ImageFont.FreeTypeFont)
        else text.encode("latin-1", "replace").decode("latin-1")
    )


def _width(font, text: str) -> int:
    return int(font.getlength(_printable(font, text))) + 1


def _fitted(font, text: str, width: int) -> str:
    """As much of the text as fits into `width` pixels."""
    while text and _width(font, text) > width:
        text = text[:-1]
    return _printable(font, text)
