"""Small images, laid out on one sheet to be looked at."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

_GAP = 2
# Shorter sides are enlarged up to about this many pixels, whole pixels each, so that 8x8 digits can be seen.
VISIBLE = 64
# Longer sides are shrunk to this many where pictures are only to be compared.
_LARGEST = 256
_TEXT_SIZE = 14


def as_pil(images: np.ndarray) -> list[Image.Image]:
    """uint8 (B, H, W, C) -> PIL images, grey for C = 1."""
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in images]


def encode_png(image: Image.Image, text: dict[str, str] | None = None) -> bytes:
    """Return the image as a PNG file. `text`: what its text chunks hold, by key."""
    # Late, as all below: the first image of a process needs none of them.
    from PIL.PngImagePlugin import PngInfo

    file, chunks = io.BytesIO(), PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    image.save(file, "PNG", optimize=True, pnginfo=chunks)
    return file.getvalue()


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


def titled_grid(images: Sequence[Image.Image], titles: Sequence[str], columns: int) -> Image.Image:
    """Equally large images in rows of `columns`, each with its title under it, cut where it is too long."""
    from PIL import ImageDraw

    grids = [image_grid([images[i : i + columns]]) for i in range(0, len(images), columns)]
    font, pitch = _font(), grids[0].height + _TEXT_SIZE + 4
    sheet = Image.new("RGB", (grids[0].width, pitch * len(grids)), "white")
    draw = ImageDraw.Draw(sheet)
    width = (grids[0].width - _GAP) // min(columns, len(images))
    for y, grid in enumerate(grids):
        sheet.paste(grid, (0, y * pitch))
        for x, title in enumerate(titles[y * columns : (y + 1) * columns]):
            text = _fit_text(font, _printable(font, title), width - 4)
            draw.text((_GAP + x * width, y * pitch + grid.height), text, "black", font)
    return sheet


def side_by_side(rows: Mapping[str, Sequence[Image.Image]], headings: Sequence[str]) -> Image.Image:
    """`image_grid` with the rows' names on its left and a heading over every column, cut where it is too long."""
    from PIL import ImageDraw

    grid = image_grid(list(rows.values()))
    font = _font()
    left = max(_width(font, name) for name in rows) + 2 * _GAP + 8
    top = _TEXT_SIZE + 8
    sheet = Image.new("RGB", (left + grid.width, top + grid.height), "white")
    sheet.paste(grid, (left, top))
    draw = ImageDraw.Draw(sheet)
    pitch = (grid.width - _GAP) // len(headings), (grid.height - _GAP) // len(rows)
    for x, heading in enumerate(headings):
        text = _fit_text(font, heading, pitch[0] - 6)
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


def _font():
    from PIL import ImageFont

    try:
        return ImageFont.load_default(_TEXT_SIZE)
    except TypeError:  # Pillow 10.0 has one of a fixed size
        return ImageFont.load_default()


def _printable(font, text: str) -> str:
    """The text, without characters that Pillow's smallest font cannot draw."""
    from PIL import ImageFont

    return (
        text
        if isinstance(font, ImageFont.FreeTypeFont)
        else text.encode("latin-1", "replace").decode("latin-1")
    )


def _width(font, text: str) -> int:
    return int(font.getlength(_printable(font, text))) + 1


def _fit_text(font, text: str, width: int) -> str:
    """As much of the text as fits into `width` pixels."""
    while text and _width(font, text) > width:
        text = text[:-1]
    return _printable(font, text)
