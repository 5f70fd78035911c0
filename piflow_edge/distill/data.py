"""Images to train on and compare with: the built-in digits, an `.npz`, or a folder with one folder per class."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from piflow_edge.errors import DataError
from piflow_edge.files import sha256

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class ImageData:
    """`images`: float32 (M, C, H, W) in [-1, 1]. `labels`: int64 (M,). `class_names`: one name per label."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self):
        return len(self.images)

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Images `x_0`, float32 (B, C, H, W), and what they are conditioned on, by name: "labels", int64 (B,)."""
        return self.images[indices], {"labels": self.labels[indices]}

    def fingerprint(self) -> str:
        """SHA-256 of images and labels."""
        return sha256(self.images.tobytes() + self.labels.tobytes())


def load_images(source: str, *, size: int | None = None) -> ImageData:
    """Read images and labels.

    Args:
        source: "digits" (scikit-learn's 1,797 handwritten digits, 8x8, part of its installation), an `.npz` file with
            `images` uint8 (M, H, W) or (M, H, W, C), `labels` (M,) and perhaps `class_names`, or a folder with
            one folder of images per class.
        size: side to resize the images of a folder to, which must else be square and alike; for folders only.

    Raises:
        DataError: nothing there, or nothing that can be used.
    """
    path = Path(source)
    if source != "digits" and path.is_dir():
        data = _folder(path, size)
    elif size is not None:
        raise DataError(f"only the images of a folder can be resized; {source!r} is no folder")
    elif source == "digits":
        data = _digits()
    elif path.suffix == ".npz" and path.is_file():
        data = _npz(path)
    else:
        raise DataError(
            f"data is 'digits', an .npz file or a folder with one folder per class; got {source!r}"
        )
    height, width = data.images.shape[2:]
    if height != width:
        hint = "; give --size to resize them" if path.is_dir() else ""
        raise DataError(f"images must be square; those of {source!r} are {height} x {width}{hint}")
    return data


def _digits() -> ImageData:
    from sklearn.datasets import load_digits  # slow to import, and only this source needs it

    digits = load_digits()
    images = (digits.images / 8.0 - 1.0).astype(np.float32)[:, None]  # 0..16 -> -1..1
    return ImageData("digits", images, digits.target.astype(np.int64), tuple("0123456789"))


def _npz(path: Path) -> ImageData:
    try:
        # Opened here: np.load leaves the file open when it turns out to be broken.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (
        OSError,
        ValueError,
        TypeError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
    ) as error:
        raise DataError(f"{path} cannot be read as .npz: {error}") from error
    if not {"images", "labels"} <= arrays.keys():
        raise DataError(f"{path} must hold 'images' and 'labels'; it holds {sorted(arrays)}")
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not len(images):
        raise DataError(
            f"images in {path} must be uint8 (M, H, W) or (M, H, W, C); got {images.dtype} {images.shape}"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise DataError(
            f"labels in {path} must be one class id, 0 or more, per image; got {labels.dtype} {labels.shape}"
        )
    images = images[..., None] if images.ndim == 3 else images
    names = arrays.get("class_names", np.arange(labels.max() + 1))
    if labels.max() >= len(names):
        raise DataError(f"labels in {path} go up to {labels.max()}; class_names has only {len(names)}")
    return ImageData(path.stem, _to_float(images), labels.astype(np.int64), tuple(str(n) for n in names))


def _folder(path: Path, size: int | None) -> ImageData:
    folders = [f for f in _listing(path) if f.is_dir()]
    if not folders:
        raise DataError(f"{path} must hold one folder of images per class; it holds no folder")
    arrays, labels = [], []
    for label, folder in enumerate(folders):
        files = [f for f in _listing(folder) if f.suffix.lower() in _SUFFIXES]
        if not files:
            raise DataError(f"class folder {folder} holds no images ({', '.join(sorted(_SUFFIXES))})")
        for file in files:
            arrays.append(_read(file, size))
            labels.append(label)
    if any(a.shape[-1] == 3 for a in arrays):  # a grey picture among coloured ones
        arrays = [a if a.shape[-1] == 3 else a.repeat(3, axis=-1) for a in arrays]
    shapes = {a.shape for a in arrays}
    if len(shapes) > 1:
        raise DataError(f"images in {path} differ in size: {sorted(shapes)[:3]}; give --size to resize them")
    return ImageData(path.name, _to_float(np.stack(arrays)), np.array(labels), tuple(f.name for f in folders))


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(f for f in folder.iterdir() if not f.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error


def _read(file: Path, size: int | None) -> np.ndarray:
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                # Pillow would clip these to white; their range is anybody's guess.
                raise ValueError(
                    f"its mode is {image.mode!r}, more than 8 bits per channel; convert it to 8 bits"
                )
            image = image.convert("L" if image.mode in ("1", "L") else "RGB")
            if size:
                image = image.resize((size, size), Image.Resampling.LANCZOS)
            pixels = np.asarray(image)
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # whatever Pillow raises
        raise DataError(f"{file} cannot be read as an image: {error}; repair or remove it") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _to_float(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0)
