"""Draws pictures into a folder, or where another Python drew them there before, fails unless they are the same.

Run: python -m tests.system.same_pictures FOLDER
"""

import io
import pathlib
import sys

import numpy as np
from PIL import Image

import piflow_edge as pf

# In eight bits a rounding error is a whole step where a value lies between two, and versions of ONNX Runtime round
# differently: 0.8 levels on average from 1.19 to 1.32. Another picture of the same prompt is 40 levels away.
EMOJI_LEVELS = 3.0


def drawn() -> dict[str, bytes]:
    """PNG files by name: digits, a digit drawn from another one's image, an emoji of a prompt."""
    files = {}
    with pf.load("digits") as generator:
        digits = generator(range(10), seed=7)
        files["digits.png"] = as_png(digits)
        files["digits-image.png"] = as_png(generator([8], seed=2, image=digits.images[3], strength=1.0))
    with pf.load("emoji") as generator:
        files["emoji.png"] = as_png(generator("a red apple", seed=0))
    return files


def as_png(result: "pf.Result") -> bytes:
    file = io.BytesIO()
    result.write(file)
    return file.getvalue()


def levels(first: bytes, second: bytes) -> float:
    """Mean difference of two pictures in levels of 0 to 255."""
    first_image, second_image = (
        np.asarray(Image.open(io.BytesIO(file)), np.float64) for file in (first, second)
    )
    return float(np.abs(first_image - second_image).mean())


def main(folder: pathlib.Path):
    folder.mkdir(exist_ok=True)
    for name, file in drawn().items():
        before = folder / name
        if not before.exists():
            before.write_bytes(file)
        elif name == "emoji.png":
            apart = levels(before.read_bytes(), file)
            assert apart < EMOJI_LEVELS, f"{name} is {apart:.1f} levels from what another Python drew"
        else:
            assert before.read_bytes() == file, f"{name} is not the file that another Python drew"


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
