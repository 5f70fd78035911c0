"""Images to train on and compare with: the built-in digits, an `.npz`, or a folder with one folder per class."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from piflow_edge.errors import DataError

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


def load_images(source: str, *, size: int | None = None) -> ImageData:
    """Read images and labels.

    Args:
        source: "digits" (scikit-learn's 1,797 handwritten digits, 8x8, part of its installation), an `.npz` file with
            `images` uint8 (M, H, W) or (M, H, W, C), `labels` (M,) and perhaps `class_names`, or a folder with
            one folder of images per class.
        size: side to resize the images of a folder to; else they must be alike.

    Raises:
        DataError: nothing there, or nothing that can be used.
    """
    if source == "digits":
        return _digits()
    path = Path(source)
    if path.is_dir():
        return _folder(path, size)
    if path.suffix == ".npz" and path.is_file():
        return _npz(path)
    raise DataError(f"data is 'digits', an .npz file or a folder with one folder per class; got {source!r}")


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
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
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
    folders = sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not folders:
        raise DataError(f"{path} must hold one folder of images per class; it holds no folder")
    arrays, labels = [], []
    for label, folder in enumerate(folders):
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in _SUFFIXES)
        if not files:
            raise DataError(f"class folder {folder} holds no images ({', '.join(sorted(_SUFFIXES))})")
        for file in files:
            arrays.append(_read(file, size))
            labels.append(label)
    shapes = {a.shape for a in arrays}
    if len(shapes) > 1:
        raise DataError(f"images in {path} differ in size: {sorted(shapes)[:3]}; give --size to resize them")
    return ImageData(path.name, _to_float(np.stack(arrays)), np.array(labels), tuple(f.name for f in folders))


def _read(file: Path, size: int | None) -> np.ndarray:
    try:
        with Image.open(file) as image:
            image = image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB")
            if size:
                image = image.resize((size, size), Image.Resampling.LANCZOS)
            pixels = np.asarray(image)
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise DataError(f"{file} cannot be read as an image: {error}; repair or remove it") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _to_float(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0)
