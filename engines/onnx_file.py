"""ONNX files, read without the onnx package: as much of the protobuf format as a network needs.

Nothing is trusted (see `system/protobuf.py`): nesting and counts are bounded, and arrays are views of the file's own
bytes, so that a broken or hostile file costs an error and no more memory than a few times its size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from piflow_edge.engines import Graph
from piflow_edge.errors import EngineError
from piflow_edge.system import onnx_messages as onnx
from piflow_edge.system.protobuf import FieldReader, damage_error, read_integers, read_text, to_signed

# TensorProto.DataType -> NumPy's.
DTYPES = {code: np.dtype(name).type for code, name in onnx.DTYPES.items() if name != "bfloat16"}
# Fields of a tensor that hold its values in their own type rather than as raw bytes.
_LISTED = ("float_data", "double_data", "int32_data", "int64_data", "uint64_data")
# Real networks nest two deep.
_DEEPEST = 8
_MOST_AXES = 16
_EXTERNAL = 1
_NOTHING = memoryview(b"")


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
        self._fields = FieldReader().fields

    def model(self, data: memoryview) -> Model:
        found, opset = None, None
        for name, value in self._fields(onnx.MODEL, data):
            if name == "graph":
                found = self._graph(value, 1)
            elif name == "opset_import":
                domain, version = self._opset(value)
                opset = version if domain in ("", "ai.onnx") else opset
            elif name == "functions":
                raise EngineError("the network has functions of its own; inline them before it is exported")
        if found is None or opset is None:
            raise damage_error(
                "it holds no graph" if found is None else "it does not say which operators it uses"
            )
        return Model(found, opset)

    def _opset(self, data: memoryview) -> tuple[str, int]:
        values = dict(self._fields(onnx.OPERATOR_SET, data))
        return read_text(values.get("domain", _NOTHING)), to_signed(values.get("version", 0))

    def _graph(self, data: memoryview, depth: int) -> Subgraph:
        if depth > _DEEPEST:
            raise damage_error(f"graphs are nested more than {_DEEPEST} deep")
        graph, inputs = Subgraph(), []
        for name, value in self._fields(onnx.GRAPH, data):
            if name == "node":
                graph.nodes.append(self._node(value, depth))
            elif name == "initializer":
                tensor_name, tensor = self._tensor(value)
                graph.constants[tensor_name] = tensor
            elif name == "input":
                inputs.append(self._value_name(value))
            elif name == "output":
                graph.outputs.append(self._value_name(value))
            elif name == "sparse_initializer":
                raise EngineError("the network has sparse weights, which engine 'reference' does not read")
        # Old files list constants too.
        graph.inputs = [name for name in inputs if name not in graph.constants]
        return graph

    def _value_name(self, data: memoryview) -> str:
        return read_text(dict(self._fields(onnx.VALUE, data)).get("name", _NOTHING))

    def _node(self, data: memoryview, depth: int) -> Node:
        node = Node("", "", "", [], [], {})
        for name, value in self._fields(onnx.NODE, data):
            if name == "input":
                node.inputs.append(read_text(value))
            elif name == "output":
                node.outputs.append(read_text(value))
            elif name == "name":
                node.name = read_text(value)
            elif name == "op_type":
                node.operator = read_text(value)
            elif name == "attribute":
                attribute_name, attribute = self._attribute(value, depth)
                node.attributes[attribute_name] = attribute
            elif name == "domain":
                node.domain = read_text(value)
        return node

    def _attribute(self, data: memoryview, depth: int) -> tuple[str, Any]:
        single: dict[str, Any] = {}
        floats: list[float] = []
        ints: list[int] = []
        for field_name, value in self._fields(onnx.ATTRIBUTE, data):
            if field_name == "floats":
                floats += np.frombuffer(_whole(value, 4), "<f4").tolist()
            elif field_name == "ints":
                ints += read_integers(value)
            else:
                single[field_name] = value
        name, kind = read_text(single.get("name", _NOTHING)), single.get("type")
        if kind == 1:
            return name, float(np.frombuffer(single.get("f", bytes(4)), "<f4")[0])
        if kind == 2:
            return name, to_signed(single.get("i", 0))
        if kind == 3:
            return name, read_text(single.get("s", _NOTHING))
        if kind == 4:
            return name, self._tensor(single.get("t", _NOTHING))[1]
        if kind == 5:
            return name, self._graph(single.get("g", _NOTHING), depth + 1)
        if kind in (6, 7):
            return name, floats if kind == 6 else ints
        raise EngineError(f"attribute {name!r} is of kind {kind!r}, which engine 'reference' does not read")

    def _tensor(self, data: memoryview) -> tuple[str, np.ndarray]:
        single: dict[str, Any] = {}
        dims: list[int] = []
        external: dict[str, str] = {}
        listed: dict[str, list] = {name: [] for name in _LISTED}
        for field_name, value in self._fields(onnx.TENSOR, data):
            if field_name == "dims":
                dims += read_integers(value, _MOST_AXES)
            elif field_name in ("float_data", "double_data"):
                kind = "<f4" if field_name == "float_data" else "<f8"
                listed[field_name].append(np.frombuffer(_whole(value, np.dtype(kind).itemsize), kind))
            elif field_name in _LISTED:
                listed[field_name] += read_integers(value)
            elif field_name == "external_data":
                entry = dict(self._fields(onnx.ENTRY, value))
                key, text = (read_text(entry.get(part, _NOTHING)) for part in ("key", "value"))
                external[key] = text
            else:
                single[field_name] = value
        name, code = read_text(single.get("name", _NOTHING)), single.get("data_type", 0)
        if code not in DTYPES:
            raise EngineError(
                f"weight {name!r} is of ONNX type {code!r}, which engine 'reference' does not read"
            )
        dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        if any(n < 0 for n in dims) or len(dims) > _MOST_AXES:
            raise damage_error(f"weight {name!r} has the shape {dims}")
        raw = single.get("raw_data")
        if single.get("data_location") == _EXTERNAL:
            raw = self._external(name, external)
        values = np.frombuffer(raw, np.uint8) if raw is not None else _values_of(dtype, listed)
        wanted = math.prod(dims) * dtype.itemsize
        if values.nbytes != wanted:
            raise damage_error(
                f"weight {name!r} of shape {dims} takes {wanted} bytes and has {values.nbytes}"
            )
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
            raise damage_error(f"weight {name!r} has no place in {place!r}: {error}") from error
        if offset < 0 or length < 0 or offset + length > len(content):
            raise damage_error(
                f"weight {name!r} lies at {offset}, {length} bytes, in {place!r} of {len(content)} bytes"
            )
        return content[offset : offset + length]


def _whole(value: memoryview, size: int) -> memoryview:
    if len(value) % size:
        raise damage_error(f"numbers of {size} bytes take {len(value)} bytes")
    return value


def _values_of(dtype: np.dtype, listed: dict[str, list]) -> np.ndarray:
    """Values that stand in fields of their own type rather than as raw bytes."""
    if dtype == np.float32 or dtype == np.float64:
        parts = listed["float_data" if dtype == np.float32 else "double_data"]
        return np.concatenate(parts).view(dtype) if parts else np.empty(0, dtype)
    kind = "int64" if dtype == np.int64 else "uint64" if dtype in (np.uint32, np.uint64) else "int32"
    numbers = listed[f"{kind}_data"]
    stored = np.dtype(np.uint16 if dtype == np.float16 else np.uint8 if dtype == np.bool_ else dtype)
    if stored == np.uint64:  # read as negative
        numbers = [number % (1 << 64) for number in numbers]
    low, high = np.iinfo(stored).min, np.iinfo(stored).max
    if numbers and not low <= min(numbers) <= max(numbers) <= high:
        raise damage_error(f"a weight of {dtype} holds numbers from {min(numbers)} to {max(numbers)}")
    values = np.array(numbers, stored)
    return (
        values.astype(dtype) if dtype == np.bool_ else values.view(dtype)
    )  # half precision comes as its bits
