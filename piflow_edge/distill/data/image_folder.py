"""A folder with one folder of images per class, decoded once and kept in the cache."""

import json
import logging
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from piflow_edge.conditioning import ClassLabels
from piflow_edge.errors import DataError
from piflow_edge.system.cache_folder import cache_folder
from piflow_edge.system.files import sha256
from piflow_edge.system.progress import progress

from .array_cache import ArrayWriter, cached
from .image_data import ImageData

log = logging.getLogger(__name__)

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
# Changes whenever the same files would become other pixels.
_FORMAT = 1
# Skipped images that are named; the others are counted.
_NAMED = 10


def read_folder(path: Path, size: tuple[int, int] | None) -> ImageData:
    """Decoded images of `path`, from the cache where it has them; see `data.load_images`."""
    folders = [f for f in _listing(path) if f.is_dir()]
    if not folders:
        raise DataError(f"{path} must hold one folder of images per class; it holds no folder")
    files = []
    for label, folder in enumerate(folders):
        found = [f for f in _listing(folder) if f.suffix.lower() in _SUFFIXES]
        if not found:
            raise DataError(f"class folder {folder} holds no images ({', '.join(sorted(_SUFFIXES))})")
        files += [(file, label) for file in found]
    class_names = tuple(f.name for f in folders)
    skipped: list = []

    def restore(images: np.ndarray, known: dict) -> ImageData:
        labels = np.array(known["labels"], np.int64)
        if images.dtype != np.uint8 or labels.shape != images.shape[:1]:
            raise ValueError("labels and images do not fit")
        skipped[:] = known["skipped"]
        return ImageData(path.resolve().name, images, ClassLabels(class_names), {"labels": labels})

    def build(writer: ArrayWriter) -> dict:
        return _decode_all(path, files, class_names, size, writer)

    place = cache_folder() / "images" / _key(path, files, size)
    data = cached(place, f"the decoded copy of {path}", build, restore)
    if skipped:
        log.warning(
            "skipped %d of %d images in %s that cannot be used:%s",
            len(skipped), len(files), path, _named(skipped),
        )  # fmt: skip
    return data


def _key(path: Path, files: list[tuple[Path, int]], size: tuple[int, int] | None) -> str:
    """A name for exactly these files at this size."""
    listed = []
    for file, label in files:
        try:
            state = file.stat()
        except OSError:  # a link to nowhere: named and skipped when it is read
            listed.append([file.name, label])
        else:
            listed.append([file.name, label, state.st_size, state.st_mtime_ns])
    return sha256(json.dumps([_FORMAT, str(path.resolve()), size, listed]).encode())[:32]


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(f for f in folder.iterdir() if not f.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error


def _decode_all(
    path: Path,
    files: list[tuple[Path, int]],
    class_names: tuple[str, ...],
    size: tuple[int, int] | None,
    writer: ArrayWriter,
) -> dict:
    """Write all images, grey ones as colour from the first coloured one on, and return labels and what was skipped."""
    labels, skipped = [], []
    channels = first = None
    workers = min(8, os.cpu_count() or 1)
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(workers) as pool,
        progress(f"reading {path.name}", len(files)) as bar,
    ):
        warnings.simplefilter("ignore")  # Pillow's, on odd metadata and very large images
        step = 4 * workers  # decoded at a time: more would pile up in memory
        for start in range(0, len(files), step):
            piece = files[start : start + step]
            decoded = pool.map(lambda item: _read(item[0], size), piece)
            for (file, label), pixels in zip(piece, decoded, strict=True):
                bar("")
                if isinstance(pixels, str):
                    skipped.append([f"{file.parent.name}/{file.name}", pixels])
                    continue
                if first is None:
                    channels, first = len(pixels), (file, pixels.shape[1:])
                if pixels.shape[1:] != first[1]:
                    one, other = (
                        f"{f.parent.name}/{f.name} is {s[0]} x {s[1]}"
                        for f, s in (first, (file, pixels.shape[1:]))
                    )
                    raise DataError(
                        f"images in {path} differ in size (height x width): {one}, {other}; give --size to bring them "
                        "to one"
                    )
                if len(pixels) > channels:  # the first coloured one after grey ones
                    writer.rewrite(lambda item: item.repeat(3, axis=1))
                    channels = len(pixels)
                writer.append(pixels.repeat(channels // len(pixels), axis=0)[None])
                labels.append(label)
    if 2 * len(skipped) > len(files):
        raise DataError(
            f"more than half of the images in {path} cannot be used ({len(skipped)} of {len(files)}):"
            f"{_named(skipped)}"
        )
    lost = sorted(set(range(len(class_names))) - set(labels))
    if lost:
        lines = [entry for entry in skipped if entry[0].startswith(f"{class_names[lost[0]]}/")]
        raise DataError(f"none of the images in {path / class_names[lost[0]]} can be used:{_named(lines)}")
    return {"labels": labels, "skipped": skipped}


def _named(skipped: list) -> str:
    lines = "".join(f"\n  {name}: {reason}" for name, reason in skipped[:_NAMED])
    return lines + (f"\n  and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else "")


def _read(file: Path, size: tuple[int, int] | None) -> np.ndarray | str:
    """Pixels uint8 (C, H, W), C being 1 or 3; or why there are none."""
    try:
        with Image.open(file) as image:  # of an animation, the first frame
            if image.mode.startswith(("I", "F")):
                # Pillow would clip these to white; their range is anybody's guess.
                return f"its mode is {image.mode!r}, more than 8 bits per channel; convert it to 8 bits"
            image = _over_white(ImageOps.exif_transpose(image))
            if size:
                image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
            pixels = np.asarray(image)
    except UnidentifiedImageError:
        return "not an image of a kind that Pillow knows"
    except Exception as error:  # a broken file makes Pillow raise whatever its reader stumbles over
        # Without the path that an OSError repeats.
        return getattr(error, "strerror", None) or str(error) or type(error).__name__
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _over_white(image: Image.Image) -> Image.Image:
    """The image in mode L or RGB; what is transparent shows white."""
    grey = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")
