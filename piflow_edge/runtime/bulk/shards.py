"""Shards of WebDataset: tar files in which the files of one sample share a name and stand beside each other.

A sample has `NAME.png`, which holds its recipe, `NAME.json`, the recipe again, and `NAME.txt`, its prompt or class,
where something steers it. The bytes follow from the samples alone: no time, user or order of writing is in them.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from piflow_edge.errors import DataError

PICTURE, RECIPE, TITLE = "png", "json", "txt"


@dataclass(frozen=True)
class Sample:
    """One image. `index`: its number in the job. `picture`: a PNG file. `title`: empty where nothing steers."""

    index: int
    picture: bytes
    recipe: str
    title: str


@dataclass(frozen=True)
class Place:
    """Where the picture of a sample lies. `offset`, `size`: in bytes, in the tar file `path`."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the PNG file."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def write_shard(file: BinaryIO, samples: Iterable[Sample]) -> None:
    """Write samples into an open file as a tar archive."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            parts = {PICTURE: sample.picture, RECIPE: sample.recipe.encode()}
            if sample.title:
                parts[TITLE] = sample.title.encode()
            for suffix, content in parts.items():
                entry = tarfile.TarInfo(f"{sample.index:012}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def list_pictures(path: Path) -> Iterator[tuple[int, str, Place]]:
    """Return number, title and place of every sample of a shard, in order; pictures are not read.

    Raises:
        DataError: it is no whole shard.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            entries = {entry.name: entry for entry in archive if entry.isfile()}
            for name, entry in entries.items():
                stem, _, suffix = name.partition(".")
                if suffix != PICTURE:
                    continue
                title = entries.get(f"{stem}.{TITLE}")
                content = archive.extractfile(title) if title is not None else None
                words = content.read().decode() if content is not None else ""
                yield int(stem), words, Place(path, entry.offset_data, entry.size)
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{path} is no shard of piflow-edge generate: {error}; make it again") from error
