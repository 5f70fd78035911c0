"""Weights of graphs that memory may not hold: made when they are read, and written to a file when they are made.

Both stand where a `Graph` has the content of a file of weights, and are read by `large.load_tensor`.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Names of the file until the bundle gives it one: of one that is written, and of one that is not.
WEIGHTS, STORED = "weights", "stored"
# Where a weight begins, in bytes: engines map the file, and read numbers there.
_ALIGNMENT = 64
_READ_TOGETHER = 1 << 24


class WeightsOnDemand:
    """A file of weights that nobody has written: each is made when it is read."""

    def __init__(self):
        self._makers: dict[int, tuple[int, Callable[[], Any]]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, length: int, make: Callable[[], Any]) -> int:
        """Add a weight of `length` bytes, which `make` returns as a buffer; return where it begins."""
        start, self._size = self._size, self._size + length
        self._makers[start] = length, make
        return start

    def read(self, start: int, length: int) -> memoryview:
        """One weight's bytes, as `append` was told of it."""
        known, make = self._makers[start]
        data = memoryview(make()).cast("B")
        assert len(data) == known == length, "weights are read one by one, and whole"
        return data


class WeightFile:
    """A file of weights that grows, in a folder where it stays until `move` puts it into its place.

    Args:
        folder: on the disk that it will be moved on.
    """

    def __init__(self, folder: Path):
        self.path = folder / f"{os.urandom(4).hex()}.weights"
        self.path.open("xb").close()
        self._size, self._digest = 0, hashlib.sha256()

    @classmethod
    def read_again(cls, path: Path) -> "WeightFile":
        """A file that was written before, with the checksum of what is in it now."""
        found = cls.__new__(cls)
        found.path, found._digest, found._size = path, hashlib.sha256(), path.stat().st_size
        with path.open("rb") as file:
            while part := file.read(_READ_TOGETHER):
                found._digest.update(part)
        return found

    def __len__(self) -> int:
        return self._size

    def __eq__(self, other: object) -> bool:
        """Whether the other is a file of the same content."""
        return isinstance(other, WeightFile) and self.sha256() == other.sha256()

    __hash__ = None  # type: ignore[assignment]  # it grows

    def append(self, data: bytes | memoryview) -> int:
        """Write a weight; return where it begins."""
        start = -(-self._size // _ALIGNMENT) * _ALIGNMENT
        with self.path.open("ab") as file:
            for part in (bytes(start - self._size), data):
                file.write(part)
                self._digest.update(part)
        self._size = start + len(data)
        return start

    def read(self, start: int, length: int) -> bytes:
        """Bytes that were written."""
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def sha256(self) -> str:
        """Of all that was written, in hexadecimal."""
        return self._digest.hexdigest()

    def move(self, path: Path) -> None:
        """Put the file, which is written to no more, at `path`."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.path, path)
        self.path = path

    def drop(self) -> None:
        """Delete the file."""
        self.path.unlink()
