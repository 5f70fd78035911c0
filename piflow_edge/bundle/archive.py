"""A bundle as one .zip, to send: packed the same every time, unpacked without trusting a byte of it.

Entries are stored, not compressed: weights hardly shrink, and what is stored cannot grow beyond the archive itself.
"""

import io
import os
import re
import stat
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from piflow_edge.errors import BundleError
from piflow_edge.system.files import atomic_file, new_folder

from .archive_layout import check_layout
from .folder import Bundle
from .manifest import MANIFEST, MANIFEST_LIMIT, SIGNATURE, Manifest
from .parsing import parse_manifest
from .signature import SIGNATURE_LIMIT, TrustedKey, check_signature

# The first moment a .zip can name: what is packed does not depend on when.
_EPOCH = (1980, 1, 1, 0, 0, 0)
# Read at a time. Also the longest table of contents, which zipfile reads in one piece: some 15000 entries.
_CHUNK = 1 << 20
# Names that mean the same file on every system; the others are no file of ours.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._+-]*")
# All that zipfile raises on archives that are not whole: an OSError is a seek to before the file's beginning.
_BROKEN = (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, IndexError, OSError, struct.error)


def pack(bundle: str | os.PathLike[str], file: str | os.PathLike[str], *, overwrite: bool = False) -> Bundle:
    """Write a bundle, all of whose files are checked first, as one .zip.

    The same bundle gives the same bytes everywhere: no times, no owners, names in order.

    Args:
        bundle: the bundle's folder.
        file: the archive to write.
        overwrite: replace an archive that is there.

    Returns:
        The bundle that was packed.

    Raises:
        BundleError: not a bundle, or altered; or `file` exists and `overwrite` is False.
    """
    file = Path(file)
    if file.exists() and not overwrite:
        raise BundleError(f"{file} exists; give another place, or --overwrite to replace it")
    opened = Bundle(bundle)
    opened.check_graphs()
    contents = {MANIFEST: lambda: opened.manifest_bytes}
    if opened.signature is not None:
        contents[SIGNATURE] = lambda: opened.signature_bytes
    for name in sorted(opened.manifest.files):
        contents[name] = lambda name=name: opened.read(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as target, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system = 3  # else it tells the system that packed it
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, content())
    return opened


def unpack(
    file: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    trusted_keys: Sequence[TrustedKey] | None = None,
) -> Bundle:
    """Unpack a .zip that `pack` wrote; `folder` appears when every file has matched its checksum, or not at all.

    `bundle.json` is read first. Only what it lists is unpacked, and no more bytes than it says. Names that lead out of
    the folder, links, entries twice, unlisted, encrypted or compressed are refused before anything is written; so are
    bytes before, between or after the entries, which another program may read as another archive.

    Args:
        file: the archive.
        folder: where the bundle goes; must not exist.
        trusted_keys: as in `load`; checked before anything is written.

    Returns:
        The bundle in `folder`.

    Raises:
        BundleError: not a packed bundle, or altered, or not signed by one of the `trusted_keys`; or `folder` exists.
        SigningKeyError, MissingExtraError: as in `load`.
    """
    file, folder = Path(file), Path(folder)
    if folder.exists() or folder.is_symlink():
        raise BundleError(f"{folder} exists; a bundle is unpacked to a new place")
    try:
        source = _Frugal(file)
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror}") from error
    with source:
        try:
            archive = zipfile.ZipFile(source)
        except _BROKEN as error:
            raise BundleError(f"{file} is not a whole .zip: {error}; copy it again") from error
        entries = _entries(archive, file)
        check_layout(source, archive, file)
        manifest = _read(archive, entries[MANIFEST], MANIFEST_LIMIT, file)
        _check_listed(entries, parse_manifest(manifest, file), file)
        signed = _read(archive, entries[SIGNATURE], SIGNATURE_LIMIT, file) if SIGNATURE in entries else None
        check_signature(manifest, signed, file, trusted_keys)
        with new_folder(folder) as work:
            for name, entry in entries.items():
                with (work / name).open("xb") as target:
                    for chunk in _chunks(archive, entry, file):
                        target.write(chunk)
                    target.flush()
                    os.fsync(target.fileno())
            Bundle(work, trusted_keys=trusted_keys)
    return Bundle(folder, trusted_keys=trusted_keys)


class _Frugal(io.FileIO):
    """A file that is never read whole: zipfile reads as much at a time as the archive tells it to."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = _CHUNK + 1
        if size <= _CHUNK:
            return super().read(size)
        data = super().read(_CHUNK + 1)
        if len(data) > _CHUNK:
            raise zipfile.BadZipFile(f"its table of contents is above {_CHUNK} bytes")
        return data


def _entries(archive: zipfile.ZipFile, file: Path) -> dict[str, zipfile.ZipInfo]:
    """The entries by name, each of them a plain stored file beside the others."""
    entries: dict[str, zipfile.ZipInfo] = {}
    taken = set()  # by systems that do not tell capitals apart too
    for entry in archive.infolist():
        name = entry.orig_filename  # as it stands there; zipfile cuts `filename` at a NUL
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if not _NAME.fullmatch(name) or name != entry.filename:
            problem = "leads out of its folder, or is not a name for every system"
        elif name.casefold() in taken:
            problem = "is there twice"
        elif kind not in (0, stat.S_IFREG) or entry.external_attr & 0x10:  # the directory bit of MS-DOS
            problem = "is a link, a folder or another thing that is not a file"
        elif entry.flag_bits & 0x41:  # encrypted, or strongly encrypted
            problem = "is encrypted"
        elif entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            problem = "is compressed"
        else:
            entries[name] = entry
            taken.add(name.casefold())
            continue
        raise BundleError(f"{file} is not as piflow-edge pack writes it: the entry {name!r} {problem}")
    if MANIFEST not in entries:
        raise BundleError(f"{file} holds no bundle: {MANIFEST} is missing; pack one with piflow-edge pack")
    # Stored entries that do not overlap fit into the archive; overlapping ones are a bomb.
    if sum(entry.file_size for entry in entries.values()) > os.path.getsize(file):
        raise BundleError(f"{file} is not as piflow-edge pack writes it: its entries overlap")
    return entries


def _check_listed(entries: dict[str, zipfile.ZipInfo], manifest: Manifest, file: Path) -> None:
    listed, found = {MANIFEST, *manifest.files}, set(entries) - {SIGNATURE}
    if listed != found:
        missing, extra = sorted(listed - found), sorted(found - listed)
        what = f"{missing[0]} is missing" if missing else f"{extra[0]} does not belong to it"
        raise BundleError(f"{file} is not a whole bundle: {what}; copy it again or pack it again")
    for name, spec in manifest.files.items():
        if entries[name].file_size != spec.size:
            raise BundleError(
                f"{file} has {entries[name].file_size} bytes of {name}, {MANIFEST} says {spec.size}; copy it again"
            )


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int, file: Path) -> bytes:
    if entry.file_size > limit:
        raise BundleError(f"{file} holds no bundle: its {entry.filename} has {entry.file_size} bytes")
    return b"".join(_chunks(archive, entry, file))


def _chunks(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, file: Path) -> Iterator[bytes]:
    """The content of an entry; zipfile gives no more bytes than its table of contents says."""
    try:
        with archive.open(entry) as source:
            while chunk := source.read(_CHUNK):
                yield chunk
    except _BROKEN as error:
        raise BundleError(f"{file} is damaged at {entry.filename}: {error}; copy it again") from error
