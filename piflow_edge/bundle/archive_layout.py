"""Where every byte of a .zip belongs: to an entry, to the table of contents, or to its end; none is left over.

A program that finds the table from the end of a .zip reads another archive than one that reads from its beginning, if
bytes stand before, between or after what the first one sees. Layout and names: APPNOTE.TXT 6.3.10, section 4.3.
"""

import os
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from piflow_edge.errors import BundleError

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


def check_layout(source: BinaryIO, archive: zipfile.ZipFile, file: Path) -> None:
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
