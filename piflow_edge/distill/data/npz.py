"""An `.npz` of images or latents. Large arrays that are not compressed stay on the disk."""

import logging
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from piflow_edge.conditioning import Arrays, ClassLabels, Conditioner, TensorSpec, Unconditional
from piflow_edge.errors import DataError, PiFlowError

from .captions import read_captions_array
from .image_data import PIECE, ImageData, Latent, pieces

# Arrays from this size on stay on the disk, where they are not compressed.
_IN_PLACE_FROM = 64 << 20
# What numbers of a kind are handed to the network as.
_DTYPES = {"f": "float32", "i": "int64", "u": "int64", "b": "bool"}
log = logging.getLogger(__name__)

# Items that are not finite and are named; the others are counted.
_NAMED = 10


def read_npz(path: Path) -> ImageData:
    """Images or latents of an `.npz`; see `data.load_images`."""
    try:
        arrays = _arrays(path)
    except (
        OSError,
        ValueError,
        TypeError,
        NotImplementedError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
    ) as error:
        raise DataError(f"{path} cannot be read as .npz: {_describe_fault(path, error)}") from error
    given = {k.removeprefix("cond_"): v for k, v in arrays.items() if k.startswith("cond_")}
    steered = given or {"labels", "captions"} & set(arrays)
    if ("images" in arrays) == ("latents" in arrays):
        raise DataError(f"{path} must hold 'images' or 'latents', one of both; it holds {sorted(arrays)}")
    if not steered:
        raise DataError(
            f"{path} must hold 'labels', 'captions' or arrays named 'cond_...', which say what each image is of; it "
            f"holds {sorted(arrays)}. Where all are of one kind, add labels=np.zeros(number of images, int)"
        )
    if "labels" in given:
        raise DataError(f"class ids in {path} are named 'labels', not 'cond_labels'")
    if "images" in arrays:
        images, latent = _images(path, arrays["images"]), None
    else:
        images, latent = _latents(path, arrays)
    captions = None
    if "captions" in arrays:
        captions = read_captions_array(path, arrays["captions"], len(images))
    steering = _steering(path, given, arrays, len(images))
    return ImageData(path.stem, images, *steering, latent, captions)


def _describe_fault(path: Path, error: Exception) -> str:
    """What is wrong with the file, in place of NumPy's advice to run what is in it."""
    with path.open("rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        return "it is one array, an .npy; write it with np.savez(file, images=..., labels=...)"
    if not start.startswith(b"PK"):
        return "it is another kind of file, or empty; write it with np.savez(file, images=..., labels=...)"
    if "object" in str(error).lower():
        return "it holds Python objects; give arrays of numbers, and texts as np.array(list_of_str)"
    return f"it is damaged or cut off; copy or write it again ({error})"


def _steering(
    path: Path, given: dict[str, np.ndarray], arrays: Mapping[str, np.ndarray], count: int
) -> tuple[Conditioner, dict[str, np.ndarray]]:
    """What steers, as the arrays say, and it for each image; captions steer once they are encoded."""
    classes = _classes(path, arrays, count) if "labels" in arrays else None
    if classes and not given:
        return classes
    if classes:
        given |= classes[1]
    return _conditions(path, given, arrays, count) if given else (Unconditional(), {})


def _conditions(
    path: Path, given: dict[str, np.ndarray], arrays: Mapping[str, np.ndarray], count: int
) -> tuple[Arrays, dict[str, np.ndarray]]:
    """The arrays that steer, and what stands for "no condition"."""
    for name, array in given.items():
        if array.shape[:1] != (count,) or array.dtype.kind not in "biuf":
            raise DataError(
                f"'cond_{name}' in {path} must hold numbers, one row for each of {count} images; got "
                f"{array.dtype} {array.shape}"
            )
        _check_finite(array, f"cond_{name}", path)
    null = {k.removeprefix("null_"): v for k, v in arrays.items() if k.startswith("null_")}
    if null and set(null) != set(given):
        odd = sorted(set(null) ^ set(given))[0]
        raise DataError(f"{path} must hold 'null_...' for every 'cond_...' or for none; {odd!r} has one only")
    specs = name_axes(given)
    try:
        return Arrays(specs, {name: row[None] for name, row in null.items()} or None), given
    except PiFlowError as error:
        raise DataError(f"'null_...' in {path} must fit 'cond_...': {error}") from error


def name_axes(arrays: Mapping[str, np.ndarray]) -> tuple[TensorSpec, ...]:
    """Return the inputs that arrays (M, ...) are for. The second axis of encodings is one of tokens, of any length.

    Encodings are arrays (M, T, D, ...); masks (M, T) of whole numbers or bool go with those of the same length. All
    other axes have one length.
    """
    lengths = sorted({array.shape[1] for array in arrays.values() if array.ndim > 2})
    tokens = {n: "tokens" if i == 0 else f"tokens_{i + 1}" for i, n in enumerate(lengths)}
    specs = []
    for name, array in arrays.items():
        shape: list[int | str] = ["batch", *array.shape[1:]]
        if array.ndim > 2 or (array.ndim == 2 and array.dtype.kind != "f" and array.shape[1] in tokens):
            shape[1] = tokens[array.shape[1]]
        specs.append(TensorSpec(name, _DTYPES[array.dtype.kind], tuple(shape)))
    return tuple(specs)


def _images(path: Path, images: np.ndarray) -> np.ndarray:
    """Pixels as (M, C, H, W); those of another kind are refused, since wrong images train without a word."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise DataError(
            f"images in {path} must be uint8 (M, H, W), (M, H, W, C) or (M, C, H, W), 0 for black to 255; got "
            f"{images.dtype} {images.shape}{_conversion(images)}"
        )
    if len(images) > 1 and images.max() <= 1:
        raise DataError(
            f"images in {path} hold no number above 1, so all are black; if 1 stands for white, multiply by 255"
        )
    if images.ndim == 3:
        return images[:, None]
    channels = [axis for axis in (3, 1) if images.shape[axis] in (1, 3)]
    if len(channels) == 1:
        return np.moveaxis(images, channels[0], 1)
    if not channels:
        raise DataError(
            f"images in {path} must have 1 or 3 channels, as the last axis or the second; got {images.shape}"
            + ("; lay what is transparent over white first" if images.shape[3] == 4 else "")
        )
    one, other = (f"{images.shape[1:3]} pixels of {images.shape[3]} channels",
                  f"{images.shape[2:]} pixels of {images.shape[1]}")  # fmt: skip
    raise DataError(
        f"images in {path} {images.shape} can be read as {one}, or as {other}; leave out the axis of channels where it "
        "is one, or give images of another size"
    )


def _conversion(images: np.ndarray) -> str:
    """How numbers of another kind become bytes, as the end of a message."""
    kind = images.dtype.kind
    if kind not in "fiub" or not images.size:
        return ""
    if kind == "f":
        low, high = float(np.nanmin(images)), float(np.nanmax(images))
        ranges = ((0, 1, "images * 255"), (-1, 1, "(images + 1) * 127.5"), (0, 255, "images"))
        fitting = next((way for least, most, way in ranges if least <= low and high <= most), None)
        return f"; they run from {low:g} to {high:g}" + (
            f": give np.rint({fitting}).astype(np.uint8)" if fitting else ""
        )
    return "; of 16 bits, give (images / 257).round().astype(np.uint8)" if images.dtype == np.uint16 else ""


def _latents(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Latent]:
    latents = arrays["latents"]
    if latents.dtype not in (np.float16, np.float32) or latents.ndim not in (4, 5) or not latents.size:
        raise DataError(
            f"latents in {path} must be float16 or float32 (M, C, H, W) or (M, C, T, H, W); got {latents.dtype} "
            f"{latents.shape}"
        )
    _check_finite(latents, "latents", path)
    found = {}
    for key in ("scale", "shift"):
        value = arrays.get(key)
        if value is None or value.size != 1 or value.dtype.kind not in "iuf":
            came = "none" if value is None else f"{value.dtype} {value.shape}"
            raise DataError(
                f"latents in {path} must come with the numbers 'scale' and 'shift', 1 and 0 where the network is to "
                f"see them as they are; {key!r} is {came}"
            )
        found[key] = float(value.item())
    if not (np.isfinite(list(found.values())).all() and found["scale"] != 0):
        raise DataError(f"scale and shift of latents are finite, and scale is not 0; {path} has {found}")
    return latents, Latent(**found)


def _classes(
    path: Path, arrays: Mapping[str, np.ndarray], count: int
) -> tuple[ClassLabels, dict[str, np.ndarray]]:
    labels = arrays["labels"]
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"labels in {path} must be one class id, 0 or more, per image ({count}); got {labels.dtype} "
            f"{labels.shape}{_suggest_labels(labels, count)}"
        )
    if labels.min() < 0:
        raise DataError(f"labels in {path} must be 0 or more; image {labels.argmin()} has {labels.min()}")
    highest = int(labels.max())
    if "class_names" in arrays:
        names = tuple(map(str, arrays["class_names"]))
        if highest >= len(names):
            raise DataError(f"labels in {path} go up to {highest}; class_names has only {len(names)}")
    else:
        _check_numbering(path, labels, highest)
        names = tuple(map(str, range(highest + 1)))
    if empty := sorted(set(range(highest + 1)) - set(np.unique(labels).tolist())):
        shown = ", ".join(repr(names[i]) for i in empty[:_NAMED])
        log.warning("%d classes of %s have no images: %s", len(empty), path, shown)
    return ClassLabels(names), {"labels": labels.astype(np.int64)}


def _suggest_labels(labels: np.ndarray, count: int) -> str:
    """Return how to make class ids of what came instead, as the end of a message; empty where nobody can tell."""
    if labels.shape == (count, 1):
        return "; save labels[:, 0]"
    if labels.ndim == 2 and len(labels) == count:
        return "; of one-hot rows save labels.argmax(1)"
    if labels.shape != (count,):
        return ""
    if labels.dtype.kind == "U":
        return "; of names save class_names, labels = np.unique(names, return_inverse=True)"
    return "; save labels.astype(np.int64)" if labels.dtype.kind in "bf" else ""


def _check_numbering(path: Path, labels: np.ndarray, highest: int) -> None:
    """Refuse labels that leave most numbers out: every one costs a row of weights that nothing trains."""
    found = len(np.unique(labels))
    if 2 * found < highest + 1 and highest >= _NAMED:
        raise DataError(
            f"labels in {path} go up to {highest} with {found} different ones; number the classes from 0 without gaps "
            "(np.unique(labels, return_inverse=True)[1]), or give class_names for all"
        )


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of the file; large ones that are not compressed in place, as `np.load` cannot."""
    # Opened here: np.load leaves the file open when it turns out to be broken.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        members = {i.filename.removesuffix(".npy"): i for i in archive.zip.infolist()}
        in_place = {
            name: info
            for name, info in members.items()
            if info.compress_type == zipfile.ZIP_STORED and info.file_size >= _IN_PLACE_FROM
        }
        return {
            name: _in_place(path, file, archive.zip, in_place[name]) if name in in_place else archive[name]
            for name in archive.files
        }


def _in_place(path: Path, file, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{info.filename} is .npy of version {version}")
        read_header = getattr(np.lib.format, "read_array_header_{}_{}".format(*version))
        shape, fortran_order, dtype = read_header(member)
        start = member.tell()
        while member.read(PIECE):  # to the end, where the checksum is compared
            pass
    if dtype.hasobject:
        raise ValueError(f"{info.filename} holds Python objects")
    file.seek(info.header_offset)
    name_length, extra_length = struct.unpack("<26x2H", file.read(30))
    start += info.header_offset + 30 + name_length + extra_length
    return np.memmap(path, dtype, "r", start, shape, "F" if fortran_order else "C")


def _check_finite(array: np.ndarray, what: str, path: Path) -> None:
    if array.dtype.kind != "f":
        return
    odd, seen = [], 0
    for piece in pieces(array, f"checking {what}"):
        finite = np.isfinite(piece).reshape(len(piece), -1).all(axis=1)
        odd += (seen + np.flatnonzero(~finite)).tolist()
        seen += len(piece)
    if odd:
        named = ", ".join(map(str, odd[:_NAMED])) + (
            f" and {len(odd) - _NAMED} more" if len(odd) > _NAMED else ""
        )
        raise DataError(
            f"{what} in {path} must be finite; NaN or infinity stands in item {named}; leave them out"
        )
