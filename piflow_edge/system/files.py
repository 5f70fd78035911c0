"""Files that are whole or absent: written beside their place, synced, then renamed over it."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def write_atomic(path: Path, data: bytes) -> None:
    """Put `data` at `path`: a reader, a full disk or Ctrl-C at any moment leaves the old file or the new one."""
    with atomic_file(path, size=len(data)) as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path, *, size: int | None = None) -> Iterator[BinaryIO]:
    """A file to write that appears at `path` only when the block ends without an error; see `write_atomic`.

    `size`: bytes that will be written, where it is known: a full disk's error says it.
    """
    work = _beside(path)
    try:
        with work.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)
    except BaseException as error:
        work.unlink(missing_ok=True)
        if isinstance(error, OSError):
            _name_file(error, work, path, size)
        raise


def check_room(folder: Path, size: int, what: str) -> None:
    """Raise OSError where a file of `size` bytes would not fit beside the one it replaces: known before a long run.

    `what`: it is, for the message. `folder` exists.
    """
    import shutil  # slow to import, and the runtime only hashes

    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        need = f"{what} takes {_megabytes(size)}, and room is needed for two; {_megabytes(free)} are free"
        raise OSError(errno.ENOSPC, f"not enough room on the disk: {need}", str(folder))


def check_place(path: Path) -> None:
    """Raise OSError where no file or folder can be made at `path`: known before a long run. Its folder is made."""
    try:
        path.stat()  # of a name that is too long, and of one below a file
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    probe = _beside(path)
    try:
        probe.open("xb").close()
    except OSError as error:
        error.filename = str(path)
        raise
    probe.unlink()


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.2g} MB"


def _name_file(error: OSError, work: Path, path: Path, size: int | None) -> None:
    """Let an error say what the caller asked for: a failed write names no file, and others the temporary one."""
    named = None if error.filename is None else Path(error.filename)
    if named is None or named == work or work in named.parents:
        error.filename = str(path if named is None else path / named.relative_to(work))
        if error.filename2 is not None:
            del error.filename2  # of a rename, where it went
    if error.errno in (errno.ENOSPC, errno.EDQUOT) and named in (None, work):  # else it was said inside
        import shutil  # slow to import, and the runtime only hashes

        need = "" if size is None else f", {_megabytes(size)} to write"
        error.strerror = f"{error.strerror}{need}, {_megabytes(shutil.disk_usage(path.parent).free)} free"


@contextmanager
def new_folder(path: Path, *, size: int | None = None) -> Iterator[Path]:
    """A folder to fill with `write_atomic` that appears at `path` only when the block ends without an error.

    What stood at `path` before stays until the new one is complete. No system call swaps two folders everywhere, so
    between two renames the old one stands beside `path` under a name that ends in `.old`; an error or Ctrl-C there
    puts it back. `size`: as of `atomic_file`.
    """
    import shutil  # slow to import, and the runtime only hashes

    path = path.resolve()  # a link to a folder stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    work = _beside(path)
    old = work.with_name(work.name + ".old")
    work.mkdir()
    try:
        yield work
        if path.exists():
            os.rename(path, old)
        os.rename(work, path)
    except BaseException as error:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError):
            _name_file(error, work, path, size)
        raise
    finally:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A hidden name next to `path` that nobody else uses, short where that of `path` is as long as names may be."""
    return path.with_name(f".{path.name[:40]}.{os.urandom(4).hex()}")


# Content of a file: bytes, or a view of a file that the system maps into memory. Python 3.10 has no type for both.
Content = Any


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8 that are not blank, without blanks at their ends.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read.
    """
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def sha256(data: Content) -> str:
    """SHA-256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def view_file(path: Path) -> Iterator[memoryview]:
    """The bytes of a file, for a block, without taking memory for them."""
    import mmap  # late: who only looks at a manifest needs none

    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:  # nothing to map
            yield memoryview(b"")
            return
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError:  # of a file system that maps no files
            yield memoryview(file.read())
            return
    view = memoryview(content)
    yield view
    # Not after an error: its traceback may hold parts of the view, and frees them when it goes.
    view.release()
    content.close()
