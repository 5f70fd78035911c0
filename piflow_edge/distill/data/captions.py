"""Captions: what is said of images, where it is read, and images that are steered by the encodings of it."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from piflow_edge.errors import DataError
from piflow_edge.system.files import read_lines

# Files beside images that hold their captions; the second name is that of Hugging Face's image folders.
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
_FILE_KEYS, _TEXT_KEYS = ("file_name", "file"), ("captions", "caption", "text")


@dataclass(frozen=True)
class Captions:
    """What is said of images, one text or more of each.

    `texts`: those of the first image, then those of the second, and so on. `starts`: int64 (M + 1,), where those of
    each image begin.
    """

    texts: tuple[str, ...]
    starts: np.ndarray

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[str]]) -> "Captions":
        """Return the captions of images in turn, one list or more texts for each."""
        starts = np.fromiter(accumulate(map(len, rows), initial=0), np.int64, len(rows) + 1)
        return cls(tuple(text for row in rows for text in row), starts)

    def rows(self, indices: np.ndarray, draws: np.ndarray | None = None) -> np.ndarray:
        """Return which text stands for each of the images `indices` (B,), as rows of `texts`, (B,).

        Args:
            draws: numbers in [0, 1), (B,), that choose among an image's texts; None takes the first of each.
        """
        first = self.starts[indices]
        if draws is None:
            return first
        return first + (draws * (self.starts[indices + 1] - first)).astype(np.int64)


def clean_rows(rows: Iterable[tuple[str, Iterable[Any]]], where: str) -> list[list[str]]:
    """Return the captions of images without those that are blank.

    Args:
        rows: name and captions of every image.
        where: they were read, for messages.

    Raises:
        DataError: an image has none, or one that is no text.
    """
    found = []
    for name, texts in rows:
        texts = list(texts)
        if odd := [text for text in texts if not isinstance(text, str)]:
            raise DataError(f"captions are texts; of {name} in {where} there is {odd[0]!r:.60}")
        said = [text.strip() for text in texts if text.strip()]
        if not said:
            raise DataError(f"every image needs a caption; {name} in {where} has none")
        found.append(said)
    return found


def find_caption_file(folder: Path) -> Path | None:
    """Return the file in `folder` that holds the captions of its images, or None.

    Raises:
        DataError: there are several.
    """
    found = [folder / name for name in CAPTION_FILES if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(
            f"{folder} holds {found[0].name} and {found[1].name}; leave the one that has the captions"
        )
    return found[0] if found else None


def read_caption_file(file: Path) -> tuple[list[str], list[list[str]]]:
    """Return the names of images in a `.jsonl` or `.csv` file, relative to its folder, and their captions.

    A line of `.jsonl` is an object such as {"file_name": "cat.png", "captions": ["a cat", "a black cat"]}; a `.csv`
    begins with a line of names, such as file_name,caption, and may have several lines for one image.

    Raises:
        DataError: it cannot be read, or an image has no caption.
    """
    texts: dict[str, list] = {}
    try:
        for number, entry in _entries(file):
            name, said = _pick(entry, _FILE_KEYS, file, number), _pick(entry, _TEXT_KEYS, file, number)
            if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise DataError(f"line {number} of {file} names no image below its folder: {name!r:.60}")
            texts.setdefault(name, []).extend(said if isinstance(said, list) else [said])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if not texts:
        raise DataError(f"{file} holds no captions")
    return list(texts), clean_rows(texts.items(), str(file))


def read_text_files(files: Sequence[Path]) -> list[list[str]]:
    """Return the captions in the `.txt` file beside each image, one on a line.

    Raises:
        DataError: one is missing, cannot be read or is empty.
    """
    rows = []
    for file in files:
        beside = file.with_suffix(".txt")
        try:
            rows.append((beside.name, read_lines(beside)))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"the caption of {file.name} cannot be read from {beside}: {reason}") from error
    return clean_rows(rows, str(files[0].parent))


def read_captions_array(path: Path, captions: np.ndarray, count: int) -> Captions:
    """Return the captions in an `.npz`: (M,), or (M, P) where some have fewer than P, filled up with "".

    Raises:
        DataError: no texts, or an image has none.
    """
    if captions.dtype.kind != "U" or captions.ndim not in (1, 2) or len(captions) != count:
        raise DataError(
            f"'captions' in {path} must be texts (M,) or (M, P), a row for each of {count} images; got "
            f"{captions.dtype} {captions.shape}"
        )
    rows = ((f"image {i}", row.tolist()) for i, row in enumerate(captions.reshape(count, -1)))
    return Captions.of_rows(clean_rows(rows, str(path)))


def read_prompts(file: Path) -> list[str]:
    """Return the prompts of a `.txt` file, one on a line; blank lines are left out.

    Raises:
        DataError: it cannot be read, or holds none.
    """
    try:
        prompts = read_lines(file)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as prompts: {error}") from error
    if not prompts:
        raise DataError(f"{file} must hold a prompt on each line; it holds none")
    return prompts


def _entries(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The lines of a caption file as objects, with their numbers."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if file.suffix == ".csv":
            yield from enumerate(csv.DictReader(lines), 2)
            return
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"line {number} of {file} is no JSON: {error}") from error
            yield number, entry if isinstance(entry, dict) else {}


def _pick(entry: Mapping[str, Any], keys: Sequence[str], file: Path, number: int) -> Any:
    for key in keys:
        if entry.get(key) is not None:
            return entry[key]
    raise DataError(
        f"line {number} of {file} must hold {' or '.join(map(repr, keys))}; it has {sorted(map(str, entry))}"
    )
