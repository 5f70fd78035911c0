"""What to train on and compare with: the built-in digits, an `.npz` of images or latents, or a folder per class.

Images stay bytes, in place on the disk where they can, and become floats batch by batch.
"""

import hashlib
import json
import logging
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from piflow_edge.cache import cache_folder
from piflow_edge.errors import DataError
from piflow_edge.files import sha256
from piflow_edge.progress import progress

from .cache import ArrayWriter, cached

log = logging.getLogger(__name__)

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
# Changes whenever the same files would become other pixels.
_FOLDER_FORMAT = 1
# Skipped images that are named; the others are counted.
_NAMED = 10
# Arrays of an .npz from this size on stay on the disk, where they are not compressed.
_IN_PLACE_FROM = 64 << 20
_PIECE = 16 << 20
# Bytes that take more than about two seconds to go through.
_TAKES_LONG = 2 << 30


@dataclass(frozen=True)
class Latent:
    """How latents are seen by the network: as `(latent - shift) * scale`, shift and scale as in diffusers.

    `autoencoder`: SHA-256 of the one that made them, None where it is not known.
    """

    scale: float
    shift: float
    autoencoder: str | None = None


@dataclass(frozen=True)
class ImageData:
    """Images or latents, and what they are conditioned on.

    `images`: as they are kept, (M, C, H, W): uint8 pixels, floats from -1 to 1, or latents as their autoencoder makes
    them, which may have a frame axis before H. `labels`: int64 (M,), or None; `class_names`: one name per label.
    `conditions`: further arrays (M, ...) by the name the network knows them under. `latent`: None for pixels.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...]
    conditions: Mapping[str, np.ndarray] = field(default_factory=dict)
    latent: Latent | None = None

    def __len__(self):
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one item; (C, T, H, W) for video."""
        return self.images.shape[1:]

    @property
    def latent_scale(self) -> float:
        return self.latent.scale if self.latent else 1.0

    @property
    def latent_shift(self) -> float:
        return self.latent.shift if self.latent else 0.0

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The items at `indices` (B,), as the network sees them, and what they are conditioned on.

        Returns:
            `x_0` float32 (B, C, H, W), pixels from -1 to 1 or scaled latents; and by name arrays (B, ...): "labels"
            int64 where there are classes, and `conditions`, floats as float32.
        """
        picked = self.images[indices]
        x_0 = np.array(picked, np.float32, order="C")
        if picked.dtype == np.uint8:  # in place: a batch may be large
            x_0 /= 127.5
            x_0 -= 1.0
        elif self.latent:
            x_0 -= self.latent.shift
            x_0 *= self.latent.scale
        conditioning = {} if self.labels is None else {"labels": self.labels[indices]}
        for name, array in self.conditions.items():
            values = np.asarray(array[indices])
            floating = np.issubdtype(values.dtype, np.floating)
            conditioning[name] = values.astype(np.float32) if floating else values
        return x_0, conditioning

    def settings(self) -> dict:
        """What a checkpoint records of the data, beside its name."""
        latent = {"latent": vars(self.latent).copy()} if self.latent else {}
        return {"data_sha256": self.fingerprint(), **latent}

    def fingerprint(self) -> str:
        """SHA-256 of all that a network would see."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for piece in _pieces(self.images, f"checking {self.name}"):
            digest.update(np.ascontiguousarray(piece).data)
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        for name, array in sorted(self.conditions.items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            for piece in _pieces(array, f"checking {name} of {self.name}"):
                digest.update(np.ascontiguousarray(piece).data)
        if self.latent:
            digest.update(f"latent {self.latent.scale!r} {self.latent.shift!r}".encode())
        return digest.hexdigest()


def load_images(source: str, *, size: int | tuple[int, int] | None = None) -> ImageData:
    """Read images or latents, and what they are conditioned on.

    Args:
        source: one of

            - "digits": scikit-learn's 1,797 handwritten digits, 8x8, part of its installation.
            - an `.npz` file with `images` uint8 (M, H, W) or (M, H, W, C); or with `latents` float16 or float32
              (M, C, H, W) or (M, C, T, H, W), and their `scale` and `shift`: the network sees
              `(latent - shift) * scale`. With `labels` (M,) and perhaps `class_names`; or with arrays `cond_NAME`
              (M, ...), which the network gets as NAME, or with both.
            - a folder with one folder of images per class, decoded once and then kept in the cache; see
              `cache_folder`. Images that cannot be used are named on the log and skipped.
        size: side, or (height, width), that the images of a folder are brought to: scaled until they cover it, and cut
            to its middle. Without it they must all be of one size. For folders only.

    Raises:
        DataError: nothing there, or nothing that can be used.
    """
    path = Path(source)
    if isinstance(size, int):
        size = (size, size)
    if source != "digits" and path.is_dir():
        return _folder(path, size)
    if size is not None:
        raise DataError(f"only the images of a folder can be resized; {source!r} is no folder")
    if source == "digits":
        return _digits()
    if path.suffix == ".npz" and path.is_file():
        return _npz(path)
    raise DataError(f"data is 'digits', an .npz file or a folder with one folder per class; got {source!r}")


def check_same_latents(settings: Mapping, data: ImageData) -> None:
    """Refuse data whose latents are not those a network was trained on.

    Args:
        settings: of the network's checkpoint.
        data: it is to be trained on further, or to teach on.

    Raises:
        DataError: other scale or shift, pixels for latents or the reverse, another autoencoder.
    """
    was, now = settings.get("latent"), vars(data.latent) if data.latent else None
    if was is None or now is None:
        if was is not now:
            kinds = ("pixels", "latents") if was is None else ("latents", "pixels")
            hint = "give the same --autoencoder" if was else "leave --autoencoder out"
            raise DataError(f"the teacher was trained on {kinds[0]}; {data.name!r} gives {kinds[1]}; {hint}")
        return
    odd = [key for key in ("scale", "shift") if was[key] != now[key]]
    if was["autoencoder"] and now["autoencoder"] and was["autoencoder"] != now["autoencoder"]:
        odd.append("autoencoder")
    if odd:
        raise DataError(
            f"the teacher was trained on other latents than those of {data.name!r}: {odd[0]} was {was[odd[0]]}, is "
            f"{now[odd[0]]}; use the same autoencoder, scale and shift"
        )


def _digits() -> ImageData:
    from sklearn.datasets import load_digits  # slow to import, and only this source needs it

    digits = load_digits()
    images = (digits.images / 8.0 - 1.0).astype(np.float32)[:, None]  # 0..16 -> -1..1
    return ImageData("digits", images, digits.target.astype(np.int64), tuple("0123456789"))


def _npz(path: Path) -> ImageData:
    try:
        arrays = _read_npz(path)
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
        raise DataError(f"{path} cannot be read as .npz: {error}") from error
    conditions = {k.removeprefix("cond_"): v for k, v in arrays.items() if k.startswith("cond_")}
    if ("images" in arrays) == ("latents" in arrays) or not ("labels" in arrays or conditions):
        raise DataError(
            f"{path} must hold 'images' or 'latents', and 'labels' or arrays named 'cond_...'; it holds "
            f"{sorted(arrays)}"
        )
    if "images" in arrays:
        images, latent = _npz_images(path, arrays["images"]), None
    else:
        images, latent = _npz_latents(path, arrays)
    if "labels" in conditions:
        raise DataError(f"class ids in {path} are named 'labels', not 'cond_labels'")
    labels, names = _npz_labels(path, arrays, len(images)) if "labels" in arrays else (None, ())
    for name, array in conditions.items():
        if array.shape[:1] != images.shape[:1] or array.dtype.kind not in "biuf":
            raise DataError(
                f"'cond_{name}' in {path} must hold numbers, one row for each of {len(images)} images; got "
                f"{array.dtype} {array.shape}"
            )
        _check_finite(array, f"cond_{name}", path)
    return ImageData(path.stem, images, labels, names, conditions, latent)


def _npz_images(path: Path, images: np.ndarray) -> np.ndarray:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise DataError(
            f"images in {path} must be uint8 (M, H, W) or (M, H, W, C); got {images.dtype} {images.shape}"
        )
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)


def _npz_latents(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Latent]:
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


def _npz_labels(
    path: Path, arrays: Mapping[str, np.ndarray], count: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    labels = arrays["labels"]
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise DataError(
            f"labels in {path} must be one class id, 0 or more, per image; got {labels.dtype} {labels.shape}"
        )
    names = arrays.get("class_names", np.arange(labels.max() + 1))
    if labels.max() >= len(names):
        raise DataError(f"labels in {path} go up to {labels.max()}; class_names has only {len(names)}")
    return labels.astype(np.int64), tuple(str(n) for n in names)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
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
        while member.read(_PIECE):  # to the end, where the checksum is compared
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
    for piece in _pieces(array, f"checking {what}"):
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


def _pieces(array: np.ndarray, title: str) -> Iterator[np.ndarray]:
    """The array in pieces of some megabytes along its first axis, with a bar where that takes long."""
    rows = max(1, _PIECE * len(array) // max(array.nbytes, 1))
    starts = range(0, len(array), rows)
    if array.nbytes < _TAKES_LONG:
        yield from (array[start : start + rows] for start in starts)
        return
    with progress(title, len(starts)) as bar:
        for start in starts:
            yield array[start : start + rows]
            bar("")


def _folder(path: Path, size: tuple[int, int] | None) -> ImageData:
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
        return ImageData(path.resolve().name, images, labels, class_names)

    def build(writer: ArrayWriter) -> dict:
        return _decode_all(path, files, class_names, size, writer)

    place = cache_folder() / "images" / _folder_key(path, files, size)
    data = cached(place, f"the decoded copy of {path}", build, restore)
    if skipped:
        log.warning(
            "skipped %d of %d images in %s that cannot be used:%s",
            len(skipped), len(files), path, _named(skipped),
        )  # fmt: skip
    return data


def _folder_key(path: Path, files: list[tuple[Path, int]], size: tuple[int, int] | None) -> str:
    """A name for exactly these files at this size."""
    listed = []
    for file, label in files:
        try:
            state = file.stat()
        except OSError:  # a link to nowhere: named and skipped when it is read
            listed.append([file.name, label])
        else:
            listed.append([file.name, label, state.st_size, state.st_mtime_ns])
    return sha256(json.dumps([_FOLDER_FORMAT, str(path.resolve()), size, listed]).encode())[:32]


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
