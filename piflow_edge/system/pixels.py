"""Pixels as networks that look at images take them: rounded to 8 bits, resized, in another range of values."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from piflow_edge.errors import ShapeError

# Mean and standard deviation of ImageNet's pixels, by which most classifiers' inputs are normalised.
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
_STD = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]

# Of the pixels that OpenAI's CLIP was trained on.
_CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)[:, None, None]
_CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)[:, None, None]

# Name of a range of values that a network takes its pixels in -> from [-1, 1] to there.
VALUE_RANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "-1,1": lambda images: images,
    "0,1": lambda images: (images + 1) / 2,
    "0,255": lambda images: (images + 1) * 127.5,
    "imagenet": lambda images: ((images + 1) / 2 - _MEAN) / _STD,
    "clip": lambda images: ((images + 1) / 2 - _CLIP_MEAN) / _CLIP_STD,
}

# Entries in the metadata of an ONNX file that looks at images: the range that it takes them in, and what it is.
RANGE_KEY, DESCRIPTION_KEY = "piflow_edge.value_range", "piflow_edge.description"


def split_images(images: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Cut images (M, ...) into pieces of `size`, the last of them shorter."""
    return (images[start : start + size] for start in range(0, len(images), size))


def round_to_bytes(images: np.ndarray) -> np.ndarray:
    """Round images in [-1, 1] to the 256 levels that a PNG holds, and clip them; float32, still in [-1, 1]."""
    return (np.rint(np.clip((images + 1) * 127.5, 0, 255)) / 127.5 - 1).astype(np.float32)


def quantise_images(images: np.ndarray) -> np.ndarray:
    """Return images in [-1, 1], (M, C, H, W), as bytes (M, H, W, C)."""
    levels = np.rint(np.clip((images + 1) * 127.5, 0, 255)).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(0, 2, 3, 1))


def to_eight_bits(image: Any, what: str) -> Any:
    """Return a picture of Pillow with 16 bits a pixel in 8, as PNG and TIFF may have; others as they are.

    `what`: it is, for errors.

    Raises:
        ShapeError: whole or real numbers, whose range is anybody's guess.
    """
    if image.mode.startswith("I;16"):
        from PIL import Image  # it is loaded: the picture came from it

        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ShapeError(
            f"{what} has Pillow's mode {image.mode!r}, numbers of any range; convert it to 8 bits"
        )
    return image


def resize_images(images: np.ndarray, height: int | None, width: int | None) -> np.ndarray:
    """Resize images float32 (M, C, H, W), bilinear with antialiasing; None keeps a side."""
    from PIL import Image  # late: most callers keep the size

    size = (width or images.shape[3], height or images.shape[2])
    if images.shape[2:] == size[::-1]:
        return images

    def resize(plane: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR))

    planes = [resize(np.ascontiguousarray(plane)) for image in images for plane in image]
    return np.stack(planes).reshape(*images.shape[:2], *size[::-1])
