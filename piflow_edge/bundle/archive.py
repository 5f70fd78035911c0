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
from typing import BinaryIO

from piflow_edge.errors import BundleError
from piflow_edge.system.files import atomic_file, new_folder

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
    if (signature := opened.signature_bytes) is not None:
        contents[SIGNATURE] = lambda: signature
    for name in sorted(opened.manifest.files):
        contents[name] = lambda name=name: opened.read(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    size = sum(spec.size for spec in opened.manifest.files.values())
    with atomic_file(file, size=size) as target, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
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
        _check_layout(source, archive, file)
        manifest = _read(archive, entries[MANIFEST], MANIFEST_LIMIT, file)
        _check_listed(entries, parse_manifest(manifest, file), file)
        signed = _read(archive, entries[SIGNATURE], SIGNATURE_LIMIT, file) if SIGNATURE in entries else None
        check_signature(manifest, signed, file, trusted_keys)
        with new_folder(folder, size=sum(entry.file_size for entry in entries.values())) as work:
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


# --- one reading

# A program that finds the table of contents from the end of a .zip reads another archive than one that reads from its
# beginning, if bytes stand before, between or after what the first one sees. Below is where every byte belongs, by
# APPNOTE.TXT 6.3.10, section 4.3.
# Local file header: signature, version, flags, method, time, date, CRC-32, two sizes, lengths of name and extra field.
_LOCAL = struct.Struct("<4s5H3L2H")
# Length of an entry in the table of contents, without its name and extra field.
_ENTRY = 46
# End of the table: signature, four counts, size and place of the table, length of the comment.
_END = struct.Struct("<4s4H2LH")
# What stands before it where a number takes more than 32 bits: a record of 56 bytes, and 20 that say where it is.
_END_64 = 56 + 20
# Says that a number of 32 bits stands in the extra field, with 64.
_IN_EXTRA = 0xFFFF_FFFF
_ZIP64 = 1


def _check_layout(source: BinaryIO, archive: zipfile.ZipFile, file: Path) -> None:
    """Refuse a .zip with bytes that belong to nothing, or with two answers to what an entry is.

    Args:
        source: the file, opened.
        archive: the same, as zipfile reads it.
        file: for errors.

    Raises:
        BundleError: it is such a one.
    """
    at = 0
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        if entry.header_offset != at:
            raise _refusal(file, f"{abs(entry.header_offset - at)} bytes before the entry {entry.filename!r}")
        at += _read_length(source, entry, file) + entry.file_size
    if archive.start_dir != at:
        raise _refusal(file, "bytes before its table of contents")
    if archive.comment or any(entry.comment for entry in archive.infolist()):
        raise _refusal(file, "a comment")
    at += sum(_ENTRY + len(entry.orig_filename) + len(entry.extra) for entry in archive.infolist())
    rest = os.fstat(source.fileno()).st_size - at
    source.seek(at)
    end = source.read(_END_64 + _END.size)
    is_64 = end[:4] == b"PK\x06\x06" and struct.unpack_from("<Q", end, 4) == (56 - 12,)
    if rest != _END.size + (_END_64 if is_64 else 0) or end[rest - _END.size :][:4] != b"PK\x05\x06":
        raise _refusal(file, f"{rest} bytes after its table of contents")


def _read_length(source: BinaryIO, entry: zipfile.ZipInfo, file: Path) -> int:
    """Bytes of an entry's own header, once it says what the table of contents says of it."""
    source.seek(entry.header_offset)
    header = source.read(_LOCAL.size)
    if len(header) < _LOCAL.size:
        raise _refusal(file, f"half of the entry {entry.filename!r}")
    _, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL.unpack(header)
    name, extra = source.read(name_length), source.read(extra_length)
    if size == packed == _IN_EXTRA and len(extra) == 20:
        _, _, size, packed = struct.unpack("<HHQQ", extra)
    found = (name, flags, method, crc, size, packed)
    size = entry.file_size
    wanted = (entry.orig_filename.encode(), entry.flag_bits, entry.compress_type, entry.CRC, size, size)
    if found != wanted or not (_is_zip64(extra) and _is_zip64(entry.extra)):
        raise _refusal(file, f"other facts of {entry.filename!r} at the entry than in its table of contents")
    return _LOCAL.size + name_length + extra_length


def _is_zip64(extra: bytes) -> bool:
    """Whether an extra field is empty, or holds numbers of 64 bits and nothing else."""
    return not extra or (len(extra) >= 4 and struct.unpack_from("<HH", extra) == (_ZIP64, len(extra) - 4))


def _refusal(file: Path, what: str) -> BundleError:
    return BundleError(f"{file} is not as piflow-edge pack writes it: it has {what}; pack it again")
