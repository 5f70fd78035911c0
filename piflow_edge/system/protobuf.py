"""Protobuf's encoding, as strictly as a file from a stranger is read.

What protobuf forgives is refused here, since two readers may forgive it in two ways: a field that no message of the
kind has, a field twice that stands once (one reader takes the first, another the last, a third merges them), a value of
another wire type than the field's. Every length is compared with what is there before it is used.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from piflow_edge.errors import EngineError

# Real networks have some 100,000 fields; this many take some seconds to read.
MOST_FIELDS = 1 << 20
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIRE_TYPES = {"v": _VARINT, "d": _FIXED64, "b": _BYTES, "f": _FIXED32}


@dataclass(frozen=True)
class Message:
    """The fields of one kind of message: key as it stands in the file (number and wire type) -> name, is repeated."""

    name: str
    fields: Mapping[int, tuple[str, bool]]

    @classmethod
    def parse(cls, name: str, text: str) -> "Message":
        """From "1v ir_version, 8b* opset_import": number, wire type, and a star where the field may be repeated.

        Wire types: v varint, b bytes, f 32 bits, d 64 bits. Repeated numbers may come packed, as bytes.
        """
        fields: dict[int, tuple[str, bool]] = {}
        for entry in text.split(","):
            code, field_name = entry.split()
            repeated = code.endswith("*")
            number, wire = int(code.rstrip("*")[:-1]), _WIRE_TYPES[code.rstrip("*")[-1]]
            fields[number << 3 | wire] = (field_name, repeated)
            if repeated:
                fields[number << 3 | _BYTES] = (field_name, True)
        return cls(name, fields)


class FieldReader:
    """Reads the messages of one file, and ends with an error where they have too many fields in all."""

    def __init__(self):
        self._most = self._left = MOST_FIELDS

    def fields(self, message: Message, data: memoryview) -> Iterator[tuple[str, Any]]:
        """Name and value of each field, in order: varints as int, all else as the bytes that stand there.

        Raises:
            EngineError: the data are no such message, or two readers may read two things in it.
        """
        known, seen, at, end = message.fields, set(), 0, len(data)
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise damage_error(f"it has more than {self._most} parts")
            key, at = (data[at], at + 1) if data[at] < 0x80 else read_varint(data, at)
            wire = key & 7
            if wire == _VARINT:
                value, at = read_varint(data, at)
            else:
                size, at = _size(data, at, wire)
                if size > end - at:
                    raise damage_error(f"a part of {size} bytes stands where {end - at} are left")
                value, at = data[at : at + size], at + size
            name, repeated = known.get(key) or _refuse_key(message, key)
            if not repeated:
                if name in seen:
                    raise damage_error(f"{name} of a {message.name} stands there twice")
                seen.add(name)
            yield name, value


def _size(data: memoryview, at: int, wire: int) -> tuple[int, int]:
    """How many bytes a value of this wire type has, and where they begin."""
    if wire == _BYTES:
        return read_varint(data, at)
    if wire in (_FIXED32, _FIXED64):
        return (4 if wire == _FIXED32 else 8), at
    raise damage_error(f"wire type {wire} at byte {at} is none that ONNX uses")


def _refuse_key(message: Message, key: int):
    number, wire = key >> 3, key & 7
    for known, (name, _) in message.fields.items():
        if known >> 3 == number:
            found = "a number" if wire != _BYTES else "bytes"
            wanted = "a message or text" if known & 7 == _BYTES else "a number"
            raise damage_error(f"{name} of a {message.name}: {found} stands where {wanted} should")
    raise damage_error(f"field {number} of a {message.name} is none that this release knows")


def damage_error(what: str) -> EngineError:
    """The error for a file that cannot be read."""
    return EngineError(f"the file is not a whole ONNX model: {what}; copy it again or export again")


def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of up to 64 bits, seven to a byte, and where the next field begins."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise damage_error("it ends within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
    raise damage_error("a number has more than 64 bits")


def to_signed(value: int) -> int:
    """A varint as a whole number: negative ones come as 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def read_text(value: memoryview) -> str:
    """Bytes as text."""
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError as error:
        raise damage_error(f"a name is not UTF-8: {error}") from error


def read_integers(value: int | memoryview, most: float = math.inf) -> list[int]:
    """Whole numbers of a repeated field: one alone, or up to `most` in a row."""
    if isinstance(value, int):
        return [to_signed(value)]
    numbers, at = [], 0
    while at < len(value):
        number, at = read_varint(value, at)
        numbers.append(to_signed(number))
        if len(numbers) > most:
            raise damage_error(f"a list has more than {most} numbers")
    return numbers
