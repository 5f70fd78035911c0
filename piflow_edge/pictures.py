"""Small images, laid out to be looked at."""

import io
from collections.abc import Sequence

from PIL import Image

_GAP = 2
# Shorter sides are enlarged up to about this many pixels, whole pixels each, so that 8x8 digits can be seen.
_VISIBLE = 64


def image_grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of equally large images on one white sheet; small images are enlarged by a whole factor."""
    width, height = rows[0][0].size
    factor = max(1, _VISIBLE // max(width, height))
    width, height = width * factor, height * factor
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, len(rows) * (height + _GAP) + _GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (_GAP + x * (width + _GAP), _GAP + y * (height + _GAP)))
    return sheet


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
