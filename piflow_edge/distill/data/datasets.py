"""What to train on and compare with: the built-in digits, an `.npz` of images or latents, or a folder of images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from piflow_edge.conditioning import ClassLabels
from piflow_edge.errors import DataError

from .image_data import ImageData, Latent
from .image_folder import read_folder
from .npz import read_npz

__all__ = ["ImageData", "Latent", "check_same_latents", "load_images"]


def load_images(source: str, *, size: int | tuple[int, int] | None = None) -> ImageData:
    """Read images or latents, and what they are conditioned on.

    Args:
        source: one of

            - "digits": scikit-learn's 1,797 handwritten digits, 8x8, part of its installation.
            - an `.npz` file with `images` uint8 (M, H, W) or (M, H, W, C); or with `latents` float16 or float32
              (M, C, H, W) or (M, C, T, H, W), and their `scale` and `shift`: the network sees
              `(latent - shift) * scale`. With `labels` (M,) and perhaps `class_names`; or with arrays `cond_NAME`
              (M, ...), which the network gets as NAME, or with both; and perhaps `null_NAME` (...) for each, which
              stand for "no condition" and may have another length than what is given, such as fewer tokens. And
              perhaps with `captions`, texts (M,) or (M, P) filled up with "".
            - a folder with one folder of images per class, decoded once and then kept in the cache; see
              `cache_folder`. Images that cannot be used are named on the log and skipped.
            - a folder of images with captions: in a file captions.jsonl or captions.csv, see
              `captions.read_caption_file`, or in a `.txt` file beside each image, one on a line.

            Captions steer once they are encoded; see `encodings.encode_captions`.
        size: side, or (height, width), that the images of a folder are brought to: scaled until they cover it, and cut
            to its middle. Without it they must all be of one size. For folders only.

    Raises:
        DataError: nothing there, or nothing that can be used.
    """
    path = Path(source)
    if isinstance(size, int):
        size = (size, size)
    if source != "digits" and path.is_dir():
        return read_folder(path, size)
    if size is not None:
        raise DataError(f"only the images of a folder can be resized; {source!r} is no folder")
    if source == "digits":
        return _digits()
    if path.suffix == ".npz" and path.is_file():
        return read_npz(path)
    what = f"{source!r} is another kind of file" if path.exists() else f"there is nothing at {source!r}"
    raise DataError(
        f"data is 'digits', an .npz file, or a folder of images by class or with captions; {what}"
    )


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

    digits: Any = load_digits()
    images = (digits.images / 8.0 - 1.0).astype(np.float32)[:, None]  # 0..16 -> -1..1
    return ImageData(
        "digits", images, ClassLabels(tuple("0123456789")), {"labels": digits.target.astype(np.int64)}
    )
