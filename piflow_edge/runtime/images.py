"""Latents <-> the pixels of images."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from piflow_edge.arrays import Array, SameArray
from piflow_edge.bundle.sections import LatentSpec
from piflow_edge.errors import ShapeError
from piflow_edge.system.pixels import to_eight_bits

log = logging.getLogger(__name__)


def decode(latents: Array, spec: LatentSpec | None = None) -> np.ndarray:
    """Latents (B, C, H, W) -> images, uint8 (B, H, W, C). Without a `spec`, latents are pixels from -1 to 1."""
    return _on_host(decode_there(latents, spec))


def decode_there(latents: Array, spec: LatentSpec | None = None) -> SameArray:
    """As `decode`, where the latents lie: of an image in a GPU's memory, bytes are what crosses the bus."""
    pixels = _pixels(latents, spec)
    if not isinstance(pixels, np.ndarray):
        from piflow_edge.kernels import gpu_arrays  # the array came from there

        pixels = gpu_arrays.round(gpu_arrays.clip((pixels + 1) * 127.5, 0, 255))
        return gpu_arrays.astype(gpu_arrays.permute_dims(pixels, (0, 2, 3, 1)), "uint8")
    levels = pixels + 1
    levels *= 127.5
    np.maximum(levels, 0, out=levels)  # np.clip takes twice as long on small ones
    np.minimum(levels, 255, out=levels)
    return np.rint(levels, out=levels).transpose(0, 2, 3, 1).astype(np.uint8, order="C")


def decode_float_there(latents: Array, spec: LatentSpec | None = None) -> SameArray:
    """Latents (B, C, H, W) -> images, float32 (B, H, W, C) from 0 to 1, where the latents lie."""
    pixels = _pixels(latents, spec)
    if not isinstance(pixels, np.ndarray):
        from piflow_edge.kernels import gpu_arrays  # the array came from there

        return gpu_arrays.permute_dims(gpu_arrays.clip((pixels + 1) * 0.5, 0, 1), (0, 2, 3, 1))
    return np.ascontiguousarray(np.clip((pixels + 1) * 0.5, 0, 1).transpose(0, 2, 3, 1))


def _on_host(array: Array) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    from piflow_edge.kernels import gpu_arrays  # the array came from there

    return gpu_arrays.to_host(array)


def _pixels(latents: Array, spec: LatentSpec | None) -> Array:
    return latents if spec is None else spec.restore(latents)


def read_image(images: Any, spec: LatentSpec, name: str) -> np.ndarray:
    """What a caller gives as an image -> latents float32 (B or 1, C, H, W) as the network sees them.

    Args:
        images: latents, floating point (C, H, W) or (B, C, H, W), as `Result.latents`; or, for a bundle of pixels, a
            PIL image or a list of them, or uint8 (H, W, C) or (B, H, W, C), for grey also without C.
        spec: of the bundle's latents.
        name: of the bundle, for errors.

    Raises:
        ShapeError: another size, kind or value than the bundle has use for.
    """
    shape = tuple(spec.shape)
    array = _array(images, "L" if shape[0] == 1 else "RGB")
    if np.issubdtype(array.dtype, np.floating):
        latents = array if array.ndim > len(shape) else array[None]
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused in the next line
            latents = latents.astype(np.float32, copy=False)
        if latents.shape[1:] != shape or not np.isfinite(latents).all():
            raise ShapeError(
                f"latents of bundle {name!r} are finite in float32, (B, {', '.join(map(str, shape))}); got "
                f"{array.dtype} {array.shape}"
            )
        return latents
    if spec.kind != "pixels":
        raise ShapeError(
            f"bundle {name!r} holds no encoder, so it cannot start from an image; give latents, floating point "
            f"(B, {', '.join(map(str, shape))}), such as Result.latents, or the encoder's scaled by "
            f"(latents - {spec.shift:g}) * {spec.scale:g}"
        )
    channels, height, width = shape
    if channels == 1 and array.ndim in (2, 3) and array.shape[-2:] == (height, width):
        array = array[..., None]
    pixels = array if array.ndim == 4 else array[None]
    if array.dtype != np.uint8 or pixels.shape[1:] != (height, width, channels):
        raise ShapeError(
            f"an image for bundle {name!r} is a PIL image of {width}x{height} pixels, or uint8 ({height}, {width}, "
            f"{channels}); got {array.dtype} {array.shape}"
        )
    pixels = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
    return np.ascontiguousarray((pixels - np.float32(spec.shift)) * np.float32(spec.scale))


def read_mask(mask: Any, size: tuple[int, int]) -> np.ndarray:
    """What a caller gives as a mask -> (B or 1, 1, H, W): bool, True where the student draws, or float32 if it is soft.

    Args:
        mask: a PIL image or a list of them, or an array (H, W) or (B, H, W): bool, or numbers, up to 255 if they are
            whole and up to 1 if not. 0 keeps the image, the largest number shows what is drawn, and what lies between
            mixes the two in this share. H and W those of the latents, or whole multiples, as an image has them: then a
            latent takes the largest of its pixels. Of a picture whose alpha varies and whose colour does not, the
            mask is its alpha.
        size: (H, W) of the latents.

    Raises:
        ShapeError: another size, or nothing that can be a mask.
    """
    array = _array(mask, "mask")
    if array.dtype.kind in "iu":
        if array.size and array.max() == 1:  # else nothing would be drawn
            raise ShapeError(
                "a mask of whole numbers has 255 for white; this one has 0 and 1: give it as bool"
            )
        array = array / np.float32(255)
    array = array if array.ndim == 3 else array[None]
    (height, width), (rows, columns) = size, array.shape[-2:] if array.ndim == 3 else (0, 0)
    factor = rows // height
    is_number = array.dtype == bool or array.dtype.kind == "f"
    if not is_number or not factor or (rows, columns) != (height * factor, width * factor):
        raise ShapeError(
            f"a mask is an image of {width}x{height}, or a whole multiple of that, white where something is to be "
            f"drawn; got {np.shape(mask) or getattr(mask, 'size', mask)!s}"
        )
    share = array.reshape(len(array), 1, height, factor, width, factor).max((3, 5))
    if not ((share >= 0) & (share <= 1)).all():
        raise ShapeError(f"a mask lies between 0 and 1, or 0 and 255; got {array.min():g} to {array.max():g}")
    if not share.any():
        log.warning("the mask selects nothing: the image stays as it is")
    elif (share == 1).all():
        log.warning("the mask selects everything: nothing of the image is kept")
    is_hard = bool(((share == 0) | (share == 1)).all())
    return share.astype(bool if is_hard else np.float32)


def _mask_of_picture(image: Any) -> Any:
    """A picture as the grey one of a mask; its alpha, where that is what varies."""
    if "transparency" not in image.info and "A" not in image.getbands():
        return image.convert("L")
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    varies = [low < high for low, high in image.getextrema()]
    if not varies[3] and alpha.getextrema()[0] == 255:
        return image.convert("L")
    if any(varies[:3]):
        raise ShapeError(
            "both colour and alpha of the mask vary, so either could be meant; give it in grey, white where something "
            "is to be drawn"
        )
    return alpha


# What a picture is brought to, by what it is for.
_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "L": lambda image: image.convert("L"),
    "RGB": lambda image: image.convert("RGB"),
    "mask": _mask_of_picture,
}


def open_image(path: Path) -> Any:
    """What a file holds for `read_image` or `read_mask`: an array from an .npy file, else a PIL image.

    Raises:
        ShapeError: it cannot be read.
    """
    if path.suffix.lower() == ".npy":
        return open_array(path)
    from PIL import Image  # only needed where pictures are read

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ShapeError(f"{path} cannot be read as an image: {error}") from error


def open_array(path: Path) -> np.ndarray:
    """The array in an .npy file; ShapeError if it cannot be read."""
    from zipfile import BadZipFile  # slow to import; NumPy does so here too

    try:
        with path.open("rb") as file:  # NumPy leaves what it cannot read open
            array = np.load(file, allow_pickle=False)
    except OSError as error:
        raise ShapeError(f"{path} cannot be read as an .npy file: {error.strerror or error}") from error
    except (ValueError, EOFError, BadZipFile) as error:  # whose text tells how to run what is in the file
        raise ShapeError(
            f"{path} cannot be read as an .npy file of numbers, as numpy.save writes it"
        ) from error
    if not isinstance(array, np.ndarray):
        raise ShapeError(f"{path} is an .npz file of several arrays; give one array, as numpy.save writes it")
    return array


def _array(images: Any, use: str) -> np.ndarray:
    """PIL images, or what is an array already, as an array. `use`: one of `_CONVERSIONS`."""
    if isinstance(images, (str, os.PathLike)):
        raise ShapeError(
            f"give what is in the file, as PIL.Image.open reads it, not its path; got {images!r}"
        )
    listed = images if isinstance(images, (list, tuple)) else [images]
    if listed and all(hasattr(image, "convert") for image in listed):
        what = "the mask" if use == "mask" else "the image"
        arrays = [np.asarray(_CONVERSIONS[use](to_eight_bits(image, what))) for image in listed]
        if len({array.shape for array in arrays}) > 1:
            raise ShapeError("images of one call must have one size; give them one by one")
        return np.stack(arrays) if images is listed else arrays[0]
    try:
        return np.asarray(images)
    except ValueError as error:
        raise ShapeError(f"images must be one array: {error}") from error
