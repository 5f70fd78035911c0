"""A folder of images, by class or with captions, decoded once and kept in the cache."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from piflow_edge.conditioning import ClassLabels, Conditioner, Unconditional
from piflow_edge.errors import DataError
from piflow_edge.system.cache_folder import cache_folder
from piflow_edge.system.files import sha256
from piflow_edge.system.pixels import to_eight_bits
from piflow_edge.system.progress import progress

from .array_cache import ArrayWriter, load_or_build
from .captions import Captions, find_caption_file, read_caption_file, read_text_files
from .image_data import ImageData

log = logging.getLogger(__name__)

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
# Changes whenever the same files would become other pixels.
_FORMAT = 2
# Skipped images that are named; the others are counted.
_NAMED = 10

# (which files are kept, (M,)) -> what steers them, and it for each.
Steer = Callable[[np.ndarray], tuple[Conditioner, dict[str, np.ndarray]]]


@dataclass(frozen=True)
class Decoded:
    """Images of those files of a list that can be used.

    `data`: their pixels, in place on the disk, and what steers them. `kept`: which of the files they are, (M,).
    `skipped`: name and reason of every other one.
    """

    data: ImageData
    kept: np.ndarray
    skipped: list[list[str]]

    def fingerprint(self) -> str:
        """SHA-256 of images and numbers. The data's own is kept, so that a run need not read all pixels again."""
        return sha256(self.kept.tobytes() + self.data.fingerprint().encode())


def read_folder(path: Path, size: tuple[int, int] | None) -> ImageData:
    """Decoded images of `path`, from the cache where it has them; see `data.load_images`."""
    if file := find_caption_file(path):
        names, rows = read_caption_file(file)
        return _read_captioned(path, [path / name for name in names], rows, size)
    listed = _listing(path)
    images = [f for f in listed if _is_image(f)]
    if any(image.with_suffix(".txt").is_file() for image in images):
        return _read_captioned(path, images, read_text_files(images), size)
    folders = [f for f in listed if f.is_dir()]
    if not folders:
        raise DataError(
            f"{path} must hold one folder of images per class, or images with captions (captions.jsonl or "
            f"captions.csv, or a .txt file beside each); it holds {_count_images(images)}"
        )
    return _read_classes(path, folders, size)


def _count_images(images: list[Path]) -> str:
    """What a folder holds in place of classes, and what to do with it."""
    if not images:
        return "neither"
    return f"{len(images)} images and neither; where all are of one kind, move them into a folder inside it"


def _read_classes(path: Path, folders: list[Path], size: tuple[int, int] | None) -> ImageData:
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = [f for f in _listing(folder) if _is_image(f)]
        if not found:
            raise DataError(f"class folder {folder} holds no images ({', '.join(sorted(_SUFFIXES))})")
        files += found
        labels += [label] * len(found)
    conditioner, ids = ClassLabels(tuple(f.name for f in folders)), np.array(labels, np.int64)
    decoded = _decode(path, files, size, lambda kept: (conditioner, {"labels": ids[kept]}))
    for lost in sorted(set(range(len(folders))) - set(decoded.data.arrays["labels"].tolist())):
        lines = [entry for entry in decoded.skipped if entry[0].startswith(f"{folders[lost].name}/")]
        raise DataError(f"none of the images in {folders[lost]} can be used:{_name_files(lines)}")
    return decoded.data


def _read_captioned(
    path: Path, files: list[Path], rows: list[list[str]], size: tuple[int, int] | None
) -> ImageData:
    decoded = _decode(path, files, size, lambda kept: (Unconditional(), {}))
    # After the cache, whose images are whole whatever is said of them.
    return replace(decoded.data, captions=Captions.of_rows([rows[i] for i in decoded.kept]))


def _decode(path: Path, files: list[Path], size: tuple[int, int] | None, steer: Steer) -> Decoded:
    """The images in `files`, from the cache where it has them; those that cannot be used are named on the log."""

    def restore(images: np.ndarray, known: dict) -> Decoded:
        kept = np.array(known["kept"], np.int64)
        if images.dtype != np.uint8 or kept.shape != images.shape[:1]:
            raise ValueError("files and images do not fit")
        return Decoded(ImageData(path.resolve().name, images, *steer(kept)), kept, known["skipped"])

    def build(writer: ArrayWriter) -> dict:
        return _decode_all(path, files, size, writer)

    place = cache_folder() / "images" / _key(path, files, size)
    decoded = load_or_build(place, f"the decoded copy of {path}", build, restore)
    if decoded.skipped:
        log.warning(
            "skipped %d of %d images in %s that cannot be used:%s",
            len(decoded.skipped), len(files), path, _name_files(decoded.skipped),
        )  # fmt: skip
    return decoded


def _key(path: Path, files: list[Path], size: tuple[int, int] | None) -> str:
    """A name for exactly these files at this size."""
    listed = []
    for file in files:
        try:
            state = file.stat()
        except OSError:  # a link to nowhere: named and skipped when it is read
            listed.append([_short_name(path, file)])
        else:
            listed.append([_short_name(path, file), state.st_size, state.st_mtime_ns])
    return sha256(json.dumps([_FORMAT, str(path.resolve()), size, listed]).encode())[:32]


def _short_name(path: Path, file: Path) -> str:
    return file.relative_to(path).as_posix()


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _SUFFIXES


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(f for f in folder.iterdir() if not f.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error


def _decode_all(path: Path, files: list[Path], size: tuple[int, int] | None, writer: ArrayWriter) -> dict:
    """Write all images that can be used, and return which they are and why the others are not."""
    sink, kept, skipped = _ImageSink(path, writer), [], []
    for index, pixels in enumerate(_pixels_of_all(path, files, size)):
        name = _short_name(path, files[index])
        if isinstance(pixels, str):
            skipped.append([name, pixels])
        else:
            sink.append(name, pixels)
            kept.append(index)
    if 2 * len(skipped) > len(files):
        raise DataError(
            f"more than half of the images in {path} cannot be used ({len(skipped)} of {len(files)}):"
            f"{_name_files(skipped)}"
        )
    return {"kept": kept, "skipped": skipped}


def _pixels_of_all(path: Path, files: list[Path], size: tuple[int, int] | None) -> Iterator[np.ndarray | str]:
    """Pixels (C, H, W) of each file in turn, or why there are none."""
    workers = min(8, os.cpu_count() or 1)
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(workers) as pool,
        progress(f"reading {path.name}", len(files)) as bar,
    ):
        warnings.simplefilter("ignore")  # Pillow's, on odd metadata and very large images
        step = 4 * workers  # decoded at a time: more would pile up in memory
        for start in range(0, len(files), step):
            for pixels in pool.map(lambda file: _read(file, size), files[start : start + step]):
                bar("")
                yield pixels


class _ImageSink:
    """Writes images of one size; grey ones as colour from the first coloured one on."""

    def __init__(self, path: Path, writer: ArrayWriter):
        self._path, self._writer = path, writer
        self._first: tuple[str, tuple[int, ...]] | None = None
        self._channels = 0

    def append(self, name: str, pixels: np.ndarray) -> None:
        """Write the pixels (C, H, W) of the file `name`; DataError where they are of another size than the first."""
        if self._first is None:
            self._first, self._channels = (name, pixels.shape[1:]), len(pixels)
        if pixels.shape[1:] != self._first[1]:
            sizes = ((name, pixels.shape[1:]), self._first)
            other, one = (f"{n} is {height} x {width}" for n, (height, width) in sizes)
            raise DataError(
                f"images in {self._path} differ in size (height x width): {one}, {other}; give --size to bring them to "
                "one"
            )
        if len(pixels) > self._channels:  # the first coloured one after grey ones
            self._writer.rewrite(lambda item: item.repeat(3, axis=1))
            self._channels = len(pixels)
        self._writer.append(pixels.repeat(self._channels // len(pixels), axis=0)[None])


def _name_files(skipped: list) -> str:
    lines = "".join(f"\n  {name}: {reason}" for name, reason in skipped[:_NAMED])
    return lines + (f"\n  and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else "")


def _read(file: Path, size: tuple[int, int] | None) -> np.ndarray | str:
    """Pixels uint8 (C, H, W), C being 1 or 3; or why there are none."""
    try:
        with Image.open(file) as image:  # of an animation, the first frame
            # To 8 bits first: Pillow would clip 16 to white.
            image = _over_white(to_eight_bits(ImageOps.exif_transpose(image), "it"))
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
