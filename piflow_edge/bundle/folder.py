"""The exported folder: what it holds, checked before anything in it is used.

The manifest (`manifest.py`) carries the SHA-256 and size of every other file and of itself; missing, extra or altered
files are refused. A bundle is data: no code from it runs, no link is followed, and a file is handed out only after its
hash matched.
"""

import hashlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from piflow_edge.errors import BundleError, EngineError
from piflow_edge.system.files import Content, sha256, view_file
from piflow_edge.system.onnx_outline import Outline, check_outline, read_outline

from .manifest import MANIFEST, MANIFEST_LIMIT, SIGNATURE, sampler_calls
from .parsing import parse_manifest
from .signature import SIGNATURE_LIMIT, TrustedKey, check_signature

# Bytes that are read at a time to be hashed.
_PIECE = 1 << 20


# Entries of a folder that are looked at for a name like one that is not there.
_MOST_SIBLINGS = 1000
# The bundles that come with the package.
SHIPPED = ("digits", "emoji")


def demo_bundle() -> Path:
    """The smallest bundle that comes with the package: digits in one call, fp32, 8x8 grey images, classes "0" to "9".

    `pf.load` and the command line call it `digits`. Made by `make assets`.
    """
    return _shipped_bundle("digits")


def find_bundle(bundle: str | os.PathLike[str]) -> Path:
    """Return the folder of a bundle that is given by its path, or by the name of one that comes with the package.

    Those are `digits`, see `demo_bundle`, and `emoji`: 64x64 colour images from prompts in one call, int8.

    Raises:
        BundleError: there is a folder of such a name here as well.
    """
    if not isinstance(bundle, (str, os.PathLike)):
        raise BundleError(f"a bundle is a folder, given by its path; got {bundle!r}")
    if bundle not in SHIPPED:
        return Path(bundle)
    if Path(bundle).exists():
        raise BundleError(
            f"{bundle!r} is a bundle that comes with piflow-edge, and there is one here too, which is "
            f".{os.sep}{bundle}; for the other, change the folder"
        )
    return _shipped_bundle(str(bundle))


def _shipped_bundle(name: str) -> Path:
    from importlib.resources import files  # slow to import

    return Path(str(files("piflow_edge") / "assets" / name))


def _describe_absence(folder: Path) -> str:
    """Say what is there instead of a bundle's folder, and what to do about it."""
    if folder.is_file():
        return (
            f"a file at {folder}; unpack it first: piflow-edge unpack {folder} --out {folder.with_suffix('')}"
        )
    import difflib  # late: only errors need it

    try:
        siblings = [file.name for file in islice(folder.parent.iterdir(), _MOST_SIBLINGS) if file.is_dir()]
    except OSError:
        siblings = []
    shipped = SHIPPED if folder == Path(folder.name) else ()  # their names mean nothing in another folder
    near = difflib.get_close_matches(folder.name, (*shipped, *siblings), n=1)
    return f"nothing at {folder}" + (f" (did you mean {str(folder.with_name(near[0]))!r}?)" if near else "")


@dataclass(frozen=True)
class NetworkFiles:
    """An ONNX model whose checksums matched, and which reaches for nothing outside of it.

    `model`: the bytes of the .onnx file. `weights`: content of the files it keeps weights in, by the name the model
    gives them; empty unless it is too large for one file. `source`: the arguments of `piflow-edge build` that build it.
    `outline`: of the model. `file`: the .onnx file where the network was looked at in its place; see `view_network`.
    """

    model: Content
    weights: Mapping[str, Content]
    source: str
    outline: Outline
    file: Path | None = None


class Bundle:
    """An exported folder whose every file has been checked.

    Args:
        folder: the bundle.
        trusted_keys: as in `load`.

    Raises:
        BundleError: it is not a bundle of this version, or is incomplete or altered, or not signed as it must be.
        SigningKeyError, MissingExtraError: as in `load`.
    """

    def __init__(self, folder: str | os.PathLike[str], *, trusted_keys: Sequence[TrustedKey] | None = None):
        if not isinstance(folder, (str, os.PathLike)):
            raise BundleError(f"a bundle is a folder, given by its path; got {folder!r}")
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise BundleError(f"a bundle is a folder; there is {_describe_absence(self.folder)}")
        self.manifest_bytes = self._bytes(MANIFEST, limit=MANIFEST_LIMIT)
        self.manifest = parse_manifest(self.manifest_bytes, self.folder)
        listed = set(self.manifest.files) | {MANIFEST}
        try:  # no more of them than show that there are too many
            found = {file.name for file in islice(self.folder.iterdir(), len(listed) + 2)}
        except OSError as error:
            raise BundleError(f"{self.folder} cannot be read: {error.strerror}") from error
        self.signature_bytes = self._bytes(SIGNATURE, limit=SIGNATURE_LIMIT) if SIGNATURE in found else None
        self.signature = check_signature(self.manifest_bytes, self.signature_bytes, self.folder, trusted_keys)
        found.discard(SIGNATURE)  # it cannot be listed in what it signs
        if listed != found:
            missing, extra = sorted(listed - found), sorted(found - listed)
            # Of too many files only some were listed: which are missing cannot be told.
            is_short = len(found) <= len(listed)
            what = f"{missing[0]} is missing" if missing and is_short else f"{extra[0]} does not belong to it"
            raise BundleError(
                f"bundle {self.folder} is not as it was exported: {what}; copy it again or re-export"
            )
        self._stamps: dict[str, tuple[int, ...]] = {}
        for name in self.manifest.files:
            self._check(name)

    @property
    def name(self) -> str:
        return self.manifest.name

    def read(self, name: str) -> bytes:
        """The content of one file, after its size and hash matched the manifest.

        Raises:
            BundleError: it is gone or was altered.
        """
        data = self._bytes(name, limit=self.manifest.files[name].size)
        self._compare(name, len(data), sha256(data))
        return data

    def read_asset(self, name: str) -> bytes:
        """The content of an asset, such as a tokenizer; see `read`.

        Raises:
            BundleError: the bundle has none of that name.
        """
        if name not in self.manifest.assets:
            raise BundleError(f"bundle {self.name!r} has no asset {name!r}; export it again")
        return self.read(self.manifest.assets[name])

    def _check(self, name: str) -> None:
        """`read` without keeping what was read: a file may be larger than half of the memory."""
        expected, digest, size = self.manifest.files[name], hashlib.sha256(), 0
        self._stamps[name] = self._stamp(name)  # before the first byte is read
        with self._open_file(name) as file:
            while size <= expected.size and (piece := file.read(_PIECE)):
                digest.update(piece)
                size += len(piece)
        self._compare(name, size, digest.hexdigest())

    def _check_unless_same(self, name: str) -> tuple[int, ...]:
        """Hash a file again, but not one that is the same since it was hashed; return which state of it that was."""
        if self._stamp(name) != self._stamps[name]:
            self._check(name)
        return self._stamps[name]

    def _stamp(self, name: str) -> tuple[int, ...]:
        """What changes with a file: whoever writes to it cannot leave the time of the last change as it was."""
        try:
            state = (self.folder / name).lstat()
        except OSError as error:
            raise BundleError(f"{self.folder / name} cannot be read: {error.strerror}") from error
        return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns

    def _compare(self, name: str, size: int, digest: str) -> None:
        expected = self.manifest.files[name]
        if (size, digest) != (expected.size, expected.sha256):
            raise BundleError(
                f"{name} in {self.folder} does not match its checksum in {MANIFEST}; copy it again or re-export"
            )

    def read_network(self, name: str, precision: str | None = None) -> NetworkFiles:
        """The files of one network, in the bundle's first precision unless one is named.

        Args:
            name: of the manifest's `networks`.
            precision: one of the bundle's.

        Raises:
            BundleError: the bundle has no such network or precision, a file was altered since it was opened, or the
                network reaches for what is not in the bundle (see `check_graphs`) or is not as the manifest says.
        """
        return self._read_network(name, precision, self.read)

    @contextmanager
    def view_network(self, name: str, precision: str | None = None) -> Iterator[NetworkFiles]:
        """As `read_network`, for a block in which an engine opens the files in their place instead of as bytes.

        That takes a third of the memory. Views that are handed out may be used in the block alone.

        Raises:
            BundleError: as `read_network`, or a file was altered while the engine read it.
        """
        files = self.manifest.network_files(name, self.precision(precision))
        seen: dict[str, tuple[int, ...]] = {}
        with ExitStack() as views:

            def view(file: str) -> memoryview:
                seen[file] = self._check_unless_same(file)
                try:
                    return views.enter_context(view_file(self.folder / file))
                except OSError as error:
                    raise BundleError(f"{self.folder / file} cannot be read: {error.strerror}") from error

            found = self._read_network(name, precision, view)
            yield replace(found, file=self.folder.resolve() / files[0])
            for file in files:
                if self._stamp(file) != seen[file]:
                    raise BundleError(f"{file} in {self.folder} was altered while it was read; load it again")

    def _read_network(
        self, name: str, precision: str | None, read: Callable[[str], bytes | memoryview]
    ) -> NetworkFiles:
        precision = self.precision(precision)
        file, *beside = self.manifest.network_files(name, precision)
        source = f"{shlex.quote(str(self.folder))} --precision {precision}"
        if (calls := sampler_calls(name)) is not None:
            source += f" --graph sampler --nfe {calls}"
        model, weights = read(file), {other: read(other) for other in beside}
        outline = self._read_outline(file, model, {other: len(content) for other, content in weights.items()})
        if problem := self.manifest.networks[name].find_mismatch(outline, self.manifest.axes):
            raise BundleError(
                f"{file} in {self.folder} is not the {name} of {MANIFEST}: {problem}; export again"
            )
        return NetworkFiles(model, weights, source, outline)

    def check_graphs(self) -> None:
        """Refuse graphs that reach for what is not in the bundle; `read_network` does it for the one it reads.

        Those are graphs that keep weights in a file which the bundle does not list, or which use operators that are not
        of the standard or of ONNX Runtime.

        Raises:
            BundleError: a graph is such a one, or is not whole.
        """
        sizes = {name: spec.size for name, spec in self.manifest.files.items()}
        for name in sizes:
            if name.endswith(".onnx"):
                self._read_outline(name, self.read(name), sizes)

    def _read_outline(self, file: str, model: bytes | memoryview, sizes: Mapping[str, int]) -> Outline:
        try:
            outline = read_outline(model)
            check_outline(outline, sizes)
        except EngineError as error:
            raise BundleError(f"{file} in {self.folder} is refused: {error}") from error
        return outline

    def precision(self, precision: str | None) -> str:
        """The named precision, or the bundle's first for None; BundleError if the bundle has no such one."""
        available = self.manifest.precisions
        if precision is not None and precision not in available:
            raise BundleError(
                f"bundle {self.name!r} holds {', '.join(available)}; got precision {precision!r}"
            )
        return precision or available[0]

    def _bytes(self, name: str, *, limit: int) -> bytes:
        with self._open_file(name) as file:
            return file.read(limit + 1)  # one more than allowed shows that it is too long

    @contextmanager
    def _open_file(self, name: str) -> Iterator[BinaryIO]:
        path = self.folder / name
        try:
            if path.is_symlink() or not path.is_file():
                state = "is a link" if path.is_symlink() else "is missing"
                raise BundleError(
                    f"{self.folder} is not a whole bundle: {name} {state}; copy it again or re-export"
                )
            with path.open("rb") as file:
                yield file
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}") from error
