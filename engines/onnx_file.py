"""ONNX files, read without the onnx package: as much of the protobuf format as a network needs.

Nothing is trusted: every length is checked against what is there, nesting and counts are bounded, and arrays are views
of the file's own bytes, so that a broken or hostile file costs an error and no more memory than a few times its size.
Field numbers are those of onnx.proto, wire types those of protobuf's encoding.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from piflow_edge.engines import Graph
from piflow_edge.errors import EngineError

# TensorProto.DataType -> NumPy's.
DTYPES = {
    1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_,
    10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64,
}  # fmt: skip
# Real networks have some 10,000 messages and nest two deep.
_MOST_MESSAGES = 1 << 20
_DEEPEST = 8
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EXTERNAL = 1


@dataclass
class Node:
    """One operator. An empty name among `inputs` or `outputs` stands for one left out."""

    operator: str
    domain: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]


@dataclass
class Subgraph:
    """Nodes in the order they run, with their constants."""

    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


@dataclass
class Model:
    """A network. `opset`: version of the standard operators."""

    graph: Subgraph
    opset: int


def read_model(graph: Graph) -> Model:
    """The network in an ONNX file.

    Raises:
        EngineError: it is not a whole ONNX model, or has parts that are not read: functions, sparse, string or
            bfloat16 tensors.
    """
    return _Reader(graph.weights).model(memoryview(graph.model))


class _Reader:
    def __init__(self, weights: Mapping[str, bytes]):
        self._weights = weights
        self._left = _MOST_MESSAGES

    def model(self, data: memoryview) -> Model:
        found, opset = None, None
        for number, value in self._fields(data):
            if number == 7:
                found = self._graph(_message(value), 1)
            elif number == 8:
                domain, version = self._opset(_message(value))
                opset = version if domain in ("", "ai.onnx") else opset
            elif number == 25:
                raise EngineError("the network has functions of its own; inline them before it is exported")
        if found is None or opset is None:
            raise _broken("it holds no graph" if found is None else "it does not say which operators it uses")
        return Model(found, opset)

    def _opset(self, data: memoryview) -> tuple[str, int]:
        values = dict(self._fields(data))
        return _text(values.get(1, b"")), _integer(values.get(2, 0))

    def _graph(self, data: memoryview, depth: int) -> Subgraph:
        if depth > _DEEPEST:
            raise _broken(f"graphs are nested more than {_DEEPEST} deep")
        graph, inputs = Subgraph(), []
        for number, value in self._fields(data):
            if number == 1:
                graph.nodes.append(self._node(_message(value), depth))
            elif number == 5:
                name, tensor = self._tensor(_message(value))
                graph.constants[name] = tensor
            elif number == 11:
                inputs.append(self._value_name(_message(value)))
            elif number == 12:
                graph.outputs.append(self._value_name(_message(value)))
            elif number == 15:
                raise EngineError("the network has sparse weights, which engine 'reference' does not read")
        graph.inputs = [
            name for name in inputs if name not in graph.constants
        ]  # old files list constants too
        return graph

    def _value_name(self, data: memoryview) -> str:
        return _text(dict(self._fields(data)).get(1, b""))

    def _node(self, data: memoryview, depth: int) -> Node:
        node = Node("", "", "", [], [], {})
        for number, value in self._fields(data):
            if number == 1:
                node.inputs.append(_text(value))
            elif number == 2:
                node.outputs.append(_text(value))
            elif number == 3:
                node.name = _text(value)
            elif number == 4:
                node.operator = _text(value)
            elif number == 5:
                name, attribute = self._attribute(_message(value), depth)
                node.attributes[name] = attribute
            elif number == 7:
                node.domain = _text(value)
        return node

    def _attribute(self, data: memoryview, depth: int) -> tuple[str, Any]:
        name, kind, single = "", None, {}
        floats: list[float] = []
        ints: list[int] = []
        for number, value in self._fields(data):
            if number == 1:
                name = _text(value)
            elif number == 20:
                kind = value
            elif number == 7:
                floats += _packed_floats(value)
            elif number == 8:
                ints += _packed_integers(value)
            else:
                single[number] = value
        if kind == 1:
            return name, float(_fixed(single.get(2, b"\0" * 4), "<f4"))
        if kind == 2:
            return name, _integer(single.get(3, 0))
        if kind == 3:
            return name, _text(single.get(4, b""))
        if kind == 4:
            return name, self._tensor(_message(single.get(5, memoryview(b""))))[1]
        if kind == 5:
            return name, self._graph(_message(single.get(6, memoryview(b""))), depth + 1)
        if kind in (6, 7):
            return name, floats if kind == 6 else ints
        raise EngineError(f"attribute {name!r} is of kind {kind!r}, which engine 'reference' does not read")

    def _tensor(self, data: memoryview) -> tuple[str, np.ndarray]:
        name, code, dims, raw, external, location = "", 0, [], None, {}, 0
        listed: dict[int, list] = {4: [], 5: [], 7: [], 10: [], 11: []}
        for number, value in self._fields(data):
            if number == 1:
                dims += _packed_integers(value)
            elif number == 2:
                code = value
            elif number == 4:
                listed[4].append(np.frombuffer(_whole(value, 4), "<f4"))
            elif number in (5, 7, 11):
                listed[number] += _packed_integers(value)
            elif number == 10:
                listed[10].append(np.frombuffer(_whole(value, 8), "<f8"))
            elif number == 8:
                name = _text(value)
            elif number == 9:
                raw = _message(value)
            elif number == 13:
                entry = dict(self._fields(_message(value)))
                external[_text(entry.get(1, b""))] = _text(entry.get(2, b""))
            elif number == 14:
                location = value
        if code not in DTYPES:
            raise EngineError(
                f"weight {name!r} is of ONNX type {code!r}, which engine 'reference' does not read"
            )
        dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        if any(n < 0 for n in dims) or len(dims) > 16:
            raise _broken(f"weight {name!r} has the shape {dims}")
        if location == _EXTERNAL:
            raw = self._external(name, external)
        values = np.frombuffer(raw, np.uint8) if raw is not None else _listed(dtype, listed)
        wanted = math.prod(dims) * dtype.itemsize
        if values.nbytes != wanted:
            raise _broken(f"weight {name!r} of shape {dims} takes {wanted} bytes and has {values.nbytes}")
        return name, values.view(dtype).reshape(dims)

    def _external(self, name: str, external: dict[str, str]) -> memoryview:
        place = external.get("location", "")
        if place not in self._weights:
            raise EngineError(
                f"weight {name!r} lies in the file {place!r}, which did not come with the network"
            )
        content = memoryview(self._weights[place])
        try:
            offset = int(external.get("offset", "0"))
            length = int(external.get("length", str(len(content) - offset)))
        except ValueError as error:
            raise _broken(f"weight {name!r} has no place in {place!r}: {error}") from error
        if offset < 0 or length < 0 or offset + length > len(content):
            raise _broken(
                f"weight {name!r} lies at {offset}, {length} bytes, in {place!r} of {len(content)} bytes"
            )
        return content[offset : offset + length]

    def _fields(self, data: memoryview) -> Iterator[tuple[int, Any]]:
        """The fields of a message, in order: whole numbers as int, all else as the bytes that stand there."""
        self._left -= 1
        if self._left < 0:
            raise _broken(f"it has more than {_MOST_MESSAGES} parts")
        at = 0
        while at < len(data):
            key, at = _varint(data, at)
            kind = key & 7
            if kind == _VARINT:
                value, at = _varint(data, at)
            else:
                if kind == _BYTES:
                    size, at = _varint(data, at)
                elif kind in (_FIXED32, _FIXED64):
                    size = 4 if kind == _FIXED32 else 8
                else:
                    raise _broken(f"wire type {kind} at byte {at} is none that ONNX uses")
                if size > len(data) - at:
                    raise _broken(f"a part of {size} bytes stands where {len(data) - at} are left")
                value, at = data[at : at + size], at + size
            yield key >> 3, value


def _broken(what: str) -> EngineError:
    return EngineError(f"the file is not a whole ONNX model: {what}; copy it again or export again")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of up to 64 bits, seven to a byte, and where the next field begins."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _broken("it ends within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
    raise _broken("a number has more than 64 bits")


def _message(value) -> memoryview:
    if isinstance(value, int):
        raise _broken("a number stands where a message should")
    return value


def _whole(value, size: int) -> memoryview:
    if len(_message(value)) % size:
        raise _broken(f"numbers of {size} bytes take {len(value)} bytes")
    return value


def _fixed(value, dtype: str):
    if isinstance(value, int) or len(value) != np.dtype(dtype).itemsize:
        raise _broken("a number is of another size than its field")
    return np.frombuffer(value, dtype)[0]


def _text(value) -> str:
    try:
        return str(_message(value), "utf-8")
    except UnicodeDecodeError as error:
        raise _broken(f"a name is not UTF-8: {error}") from error


def _integer(value) -> int:
    if not isinstance(value, int):
        raise _broken("bytes stand where a number should")
    return value - (1 << 64) if value >> 63 else value  # negative ones come as 64 bits


def _packed_integers(value) -> list[int]:
    """Whole numbers of a repeated field: one alone, or several in a row."""
    if isinstance(value, int):
        return [_integer(value)]
    numbers, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        numbers.append(_integer(number))
    return numbers


def _packed_floats(value) -> list[float]:
    return np.frombuffer(_whole(value, 4), "<f4").tolist()


def _listed(dtype: np.dtype, listed: dict[int, list]) -> np.ndarray:
    """Values that stand in fields of their own type rather than as raw bytes."""
    if dtype == np.float32 or dtype == np.float64:
        parts = listed[4 if dtype == np.float32 else 10]
        return np.concatenate(parts).view(dtype) if parts else np.empty(0, dtype)
    numbers = listed[7] if dtype == np.int64 else listed[11] if dtype in (np.uint32, np.uint64) else listed[5]
    stored = np.dtype(np.uint16 if dtype == np.float16 else np.uint8 if dtype == np.bool_ else dtype)
    if stored == np.uint64:  # read as negative
        numbers = [number % (1 << 64) for number in numbers]
    low, high = np.iinfo(stored).min, np.iinfo(stored).max
    if numbers and not low <= min(numbers) <= max(numbers) <= high:
        raise _broken(f"a weight of {dtype} holds numbers from {min(numbers)} to {max(numbers)}")
    values = np.array(numbers, stored)
    return (
        values.astype(dtype) if dtype == np.bool_ else values.view(dtype)
    )  # half precision comes as its bits
