"""Built engines on disk, each under all that it depends on: the graph, the software, the GPU, the builder's settings.

One file holds one engine: a line of JSON (its key, checksum, size and how it was built), then its bytes. Files appear
whole or not at all; builders of the same engine wait for one another; what does not match its checksum is never used.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from piflow_edge.engines import Graph
from piflow_edge.errors import EngineError, MissingExtraError
from piflow_edge.kernels import nvidia
from piflow_edge.system.cache_folder import cache_folder
from piflow_edge.system.files import sha256, write_atomic

log = logging.getLogger(__name__)

_MAGIC = "piflow-edge engine 1"
# A header is a few hundred bytes; a file whose first line is longer is none of ours.
_HEADER_LIMIT = 1 << 16


@dataclass(frozen=True)
class EngineKey:
    """All that an engine depends on.

    Args:
        backend: "tensorrt", "ort-tensorrt" or "tensorrt-rtx".
        onnx: of the graph; its `sha256`.
        precision: of the graph, as in the bundle.
        profile: sizes, as `Target.describe_profile` puts them.
        tensorrt: its version, and where it runs inside ONNX Runtime that one's.
        cuda: that the driver is made for, "12.6".
        gpu: its name.
        compute_capability: such as "8.7".
        options: of the builder, in one line.
    """

    backend: str
    onnx: str
    precision: str
    profile: str
    tensorrt: str
    cuda: str
    gpu: str
    compute_capability: str
    options: str

    @property
    def file_name(self) -> str:
        """Of the engine, in `folder`."""
        return sha256(json.dumps(asdict(self), sort_keys=True).encode())[:32] + ".engine"

    def differs_from(self, other: "EngineKey") -> list[str]:
        """One line for each part that is another one there."""
        return [
            f"{field.name.replace('_', ' ')} {_short(getattr(self, field.name))!r}, "
            f"there {_short(getattr(other, field.name))!r}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]


@dataclass(frozen=True)
class Entry:
    """An engine in the cache. `built`: how, as its builder told (seconds, bytes of memory); `path`: where it lies."""

    key: EngineKey
    path: Path
    sha256: str
    size: int
    built: dict[str, Any]
    date: float

    def read(self) -> bytes:
        """The engine.

        Raises:
            EngineError: the file is gone, or does not match its checksum.
        """
        try:
            with self.path.open("rb") as file:
                file.readline(_HEADER_LIMIT)
                data = file.read(self.size + 1)
        except OSError as error:
            raise EngineError(f"the engine {self.path} cannot be read: {error.strerror}") from error
        if len(data) != self.size or sha256(data) != self.sha256:
            raise EngineError(f"the engine {self.path} does not match its checksum; it must be built again")
        return data


def folder() -> Path:
    """Where engines are kept."""
    return cache_folder() / "engines"


def place(backend: str, release: str, device: str) -> dict[str, str]:
    """What an engine must have been built for to run here, as parts of an `EngineKey`.

    Args:
        backend: the engine's name.
        release: of TensorRT, as in the key.
        device: "cuda" or "cuda:N".

    Raises:
        EngineError: no such GPU.
    """
    ordinal = nvidia.ordinal_in(device)
    return {
        "backend": backend,
        "tensorrt": release,
        "cuda": nvidia.driver_version(),
        "gpu": nvidia.name(ordinal),
        "compute_capability": nvidia.device(ordinal).compute_capability,
    }


def entries() -> list[Entry]:
    """Of every engine whose first line can be read, the newest first. Their bytes are not looked at yet."""
    found = [entry for path in folder().glob("*.engine") if (entry := _header(path)) is not None]
    return sorted(found, key=lambda entry: entry.date, reverse=True)


def newest(graph: Graph, place: Mapping[str, str]) -> tuple[Entry, bytes] | None:
    """The last built engine of a graph for a `place`, with its bytes; damaged ones are left out, with a warning."""
    for entry in entries():
        here = all(getattr(entry.key, name) == value for name, value in place.items())
        if here and entry.key.onnx == graph.sha256:  # hashed only where there is an engine to compare with
            try:
                return entry, entry.read()
            except EngineError as error:
                log.warning("%s", error)
    return None


def miss(key: EngineKey) -> str:
    """Why there is no such engine: what is different from the nearest one."""
    others = [entry for entry in entries() if entry.key != key and entry.key.backend == key.backend]
    if not others:
        return f"no {key.backend} engine is in {folder()}"
    nearest = min(others, key=lambda entry: len(key.differs_from(entry.key)))
    return f"the nearest engine in {folder()} has another " + "; another ".join(key.differs_from(nearest.key))


def get_or_build(
    key: EngineKey,
    build: Callable[[], tuple[bytes, dict[str, Any]]],
    *,
    usable: Callable[[bytes], bool] = lambda data: True,
    rebuild: bool = False,
) -> tuple[Entry, bool]:
    """The engine of a key, built if it is not there or is no good. Other processes that want the same one wait.

    Args:
        key: all that it depends on.
        build: returns the engine and how it was built.
        usable: whether an engine from the cache can be opened here.
        rebuild: build it in any case.

    Returns:
        The entry, and whether it was built now.

    Raises:
        MissingExtraError: `filelock` is not installed.
    """
    path = folder() / key.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(path):
        # Nobody else writes this one now, so that what lies about is of a process that was killed.
        for left in path.parent.glob(f".{path.name}.*"):
            left.unlink(missing_ok=True)
        entry = None if rebuild else _header(path)
        if entry is not None and entry.key == key:
            try:
                if usable(entry.read()):
                    return entry, False
                log.warning("the engine %s cannot be opened here; it is built again", path)
            except EngineError as error:
                log.warning("%s", error)
        elif path.exists() and not rebuild:
            log.warning("%s is not an engine; it is built again", path)
        data, built = build()
        date = time.time()
        header = {"format": _MAGIC, "key": asdict(key), "sha256": sha256(data), "size": len(data), "built": built,
                  "date": date}  # fmt: skip
        write_atomic(path, json.dumps(header).encode() + b"\n" + data)
        return Entry(key, path, header["sha256"], len(data), built, date), True


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Keep other processes out of what belongs to `path`. A process that dies, however it dies, lets go.

    Raises:
        MissingExtraError: `filelock` is not installed.
    """
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise MissingExtraError(
            "building an engine needs filelock; get it with: pip install filelock"
        ) from error
    lock = FileLock(str(path.with_name(path.name + ".lock")))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("another process builds %s; waiting for it", path.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _header(path: Path) -> Entry | None:
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline(_HEADER_LIMIT))
        key = EngineKey(**header["key"])
        if header["format"] != _MAGIC or path.name != key.file_name:  # the name is the key's checksum
            return None
        return Entry(key, path, header["sha256"], int(header["size"]), dict(header["built"]),
                     float(header["date"]))  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _short(text: str) -> str:
    return text[:12] if len(text) == 64 else text
