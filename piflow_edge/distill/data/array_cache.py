"""Arrays made once and kept: an `.npy` that is read in place, and beside it what is known of it as `.json`.

Both are whole or absent. The array is written first and `.json` last, so that what has both was finished; its checksum
is compared whenever it is used again.
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from filelock import FileLock

from piflow_edge.errors import DataError
from piflow_edge.system.files import write_atomic

log = logging.getLogger(__name__)


class HasFingerprint(Protocol):
    def fingerprint(self) -> str: ...


Content = TypeVar("Content", bound=HasFingerprint)


class ArrayWriter:
    """An `.npy` file that grows by one item at a time; how many there will be need not be known."""

    def __init__(self, file):
        self._file, self._shape, self._dtype = file, (), np.dtype("u1")
        self._start = self.count = 0

    def append(self, items: np.ndarray) -> None:
        """Add items (B, ...), all of one shape and dtype."""
        if not self.count:
            self._shape, self._dtype = items.shape[1:], items.dtype
            self._start = self._write_header()
        assert items.shape[1:] == self._shape and items.dtype == self._dtype
        self._file.write(np.ascontiguousarray(items).data)
        self.count += len(items)

    def rewrite(self, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Replace every item that is there by what `change` makes of it, from the last to the first."""
        # Items only grow: from the last one on, none is overwritten before it was read.
        old_shape, old_bytes = self._shape, self._item_bytes()
        self._shape = change(np.zeros((1, *old_shape), self._dtype)).shape[1:]
        for i in reversed(range(self.count)):
            self._file.seek(self._start + i * old_bytes)
            item = np.frombuffer(self._file.read(old_bytes), self._dtype).reshape(1, *old_shape)
            self._file.seek(self._start + i * self._item_bytes())
            self._file.write(np.ascontiguousarray(change(item)).data)
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Put the final count in, and everything on the disk."""
        # NumPy leaves room in a header for a first axis that grows, so its length stays.
        start = self._write_header()
        assert start == self._start
        self._file.flush()
        os.fsync(self._file.fileno())

    def _item_bytes(self) -> int:
        return math.prod(self._shape) * self._dtype.itemsize

    def _write_header(self) -> int:
        self._file.seek(0)
        description = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": description, "fortran_order": False, "shape": (self.count, *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()


def load_or_build(
    place: Path,
    what: str,
    build: Callable[[ArrayWriter], dict],
    restore: Callable[[np.ndarray, dict], Content],
) -> Content:
    """What is kept at `place`; built first unless it is there and whole.

    Several processes may ask at once: one builds, the others wait for it.

    Args:
        place: path of the two files, without a suffix.
        what: is kept there, for messages.
        build: writes the array, and returns what else must be known, as JSON.
        restore: makes the result of the array, in place on the disk, and of what `build` returned.

    Raises:
        DataError: the cache folder cannot be written.
    """
    content = _restore(place, what, restore)
    if content is None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with _hold_lock(place.with_suffix(".lock")) as alone:
                if alone:  # what a killed process left
                    for stale in place.parent.glob(f".{place.name}.*"):
                        stale.unlink()
                content = _restore(place, what, restore)  # another process may have built it meanwhile
                if content is None:
                    content = _build(place, build, restore)
        except OSError as error:
            raise DataError(
                f"{what} cannot be kept in {place.parent}: {error.strerror or error}; make room there, or set "
                "PIFLOW_EDGE_CACHE to another folder"
            ) from error
    return content


def _restore(place: Path, what: str, restore: Callable[[np.ndarray, dict], Content]) -> Content | None:
    try:
        known = json.loads(place.with_suffix(".json").read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return _warn_of_damage(what, place, error)
    try:
        array = np.load(place.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        content = restore(array, known["known"])
        whole = content.fingerprint() == known["sha256"]
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
        return _warn_of_damage(what, place, error)
    return content if whole else _warn_of_damage(what, place, "the checksum differs")


def _warn_of_damage(what: str, place: Path, reason: object) -> None:
    log.warning("%s in the cache (%s) is damaged and made again: %s", what, place.parent, reason)


def _build(place: Path, build: Callable[[ArrayWriter], dict], restore: Callable[[np.ndarray, dict], Content]):
    array, description = place.with_suffix(".npy"), place.with_suffix(".json")
    work = array.with_name(f".{array.name}.{os.urandom(4).hex()}")
    try:
        with work.open("x+b") as file:
            writer = ArrayWriter(file)
            known = build(writer)
            writer.close()
        description.unlink(missing_ok=True)
        os.replace(work, array)
    finally:
        work.unlink(missing_ok=True)
    content = restore(np.load(array, mmap_mode="r", allow_pickle=False), known)
    write_atomic(description, json.dumps({"sha256": content.fingerprint(), "known": known}).encode())
    return content


@contextlib.contextmanager
def _hold_lock(path: Path) -> Iterator[bool]:
    """Hold the lock at `path`, released when this process ends however it does; False where there are no locks."""
    lock = FileLock(path)
    try:
        lock.acquire()
    except NotImplementedError:  # a file system without locks: all build, the last one stays
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
