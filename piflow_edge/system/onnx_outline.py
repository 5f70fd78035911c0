"""What an ONNX file reaches for, read before an engine opens it: operators, and weights that lie outside the file.

An engine follows whatever a graph says: ONNX Runtime reads a file of the current folder, or one at an absolute path,
where a tensor names it. So a graph is opened only if every place it names is a file that came with it, and every
operator one of a known kind.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from piflow_edge.errors import EngineError
from piflow_edge.system import onnx_messages as onnx
from piflow_edge.system.protobuf import FieldReader, damage_error, read_integers, read_text, to_signed

# Domains whose operators compute, and do nothing else. "com.microsoft": ONNX Runtime's own, which quantised graphs use.
KNOWN_DOMAINS = ("", "ai.onnx", "com.microsoft")
# Of those, operators that run code or a compiled engine which the graph holds or names by its file.
_REFUSED = {("com.microsoft", name) for name in ("EPContext", "PythonOp", "PythonOpGrad", "Snpe", "TritonOp")}
# Real graphs nest two deep.
_DEEPEST = 8
_MOST_AXES = 16
_IN_THE_FILE, _EXTERNAL = 0, 1
# Of a file, an operator or a domain, so that an error can quote it.
_LONGEST_NAME = 255
_NOTHING = memoryview(b"")
_PLACE_KEYS = ("location", "offset", "length", "checksum")


@dataclass(frozen=True)
class Place:
    """Where the values of a tensor lie: `size` bytes from `offset` on in the file `location`.

    `is_weight`: it is an initialiser of the model's own graph, not of a subgraph, a function or a node.
    """

    tensor: str
    location: str
    offset: int
    size: int
    is_weight: bool


@dataclass(frozen=True)
class GraphTensor:
    """An input or output of a graph. `dtype`: as NumPy names it; None where the file does not say, or has no such type.

    `shape`: a length is a number, or None where it may vary; the whole shape is None where the file does not say.
    """

    name: str
    dtype: str | None
    shape: tuple[int | None, ...] | None


@dataclass
class Outline:
    """What a model reaches for, takes and gives.

    `operators`: (domain, name). `functions`: those that the file defines itself. `inputs`, `outputs`: of the main
    graph; old files list weights among the inputs, which are left out here. `weight_bytes`: of the main graph's
    weights, wherever they lie, by the bits of one value.
    """

    inputs: list[GraphTensor] = field(default_factory=list)
    outputs: list[GraphTensor] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    operators: set[tuple[str, str]] = field(default_factory=set)
    functions: set[tuple[str, str]] = field(default_factory=set)
    weight_bytes: Counter[int] = field(default_factory=Counter)


def read_outline(model: bytes | memoryview) -> Outline:
    """The outline of an ONNX file.

    Raises:
        EngineError: it is not a whole ONNX model, or one that two readers may read in two ways.
    """
    data = memoryview(model)
    if data[4:8] == b"ORTM":  # ONNX Runtime would read it as its own format, whatever else it is
        raise damage_error("it is in ONNX Runtime's own format")
    walk = _Walk()
    walk.model(data)
    return walk.outline


def check_outline(outline: Outline, files: Mapping[str, int]) -> None:
    """Refuse a model that reaches for what did not come with it.

    Args:
        outline: of the model.
        files: size in bytes of each file that came with the model, by the name the model gives it.

    Raises:
        EngineError: it names another file or more of one than there is, or an operator of an unknown domain.
    """
    for place in outline.places:
        _check_place(place, files)
    for domain, name in sorted(outline.operators - outline.functions):
        if domain not in KNOWN_DOMAINS:
            raise EngineError(
                f"the network uses the operator {name!r} of the domain {domain!r}; operators are of the standard or of "
                f"{KNOWN_DOMAINS[-1]}: export the network with those"
            )
    for domain, name in sorted((outline.operators | outline.functions) & _REFUSED):
        raise EngineError(
            f"the network uses the operator {name!r} of {domain}, which runs code or a compiled engine; export the "
            "network itself"
        )


def _check_place(place: Place, files: Mapping[str, int]) -> None:
    what = f"weight {place.tensor!r} lies in the file {place.location!r}"
    if place.location not in files:
        raise EngineError(f"{what}, which did not come with the network; export again")
    size = files[place.location]
    if place.offset + place.size > size:
        raise EngineError(f"{what}: it lies at {place.offset}, {place.size} bytes, in a file of {size} bytes")
    if not place.is_weight:  # ONNX Runtime looks for these on the disk, though it was given the file
        raise EngineError(
            f"{what}, and only weights of the main graph may, not those of nodes, subgraphs and functions; export again"
        )


class _Walk:
    """Reads a model and notes what it reaches for."""

    def __init__(self):
        self.outline = Outline()
        self._reader = FieldReader()

    def model(self, data: memoryview) -> None:
        for name, value in self._reader.fields(onnx.MODEL, data):
            if name == "graph":
                self._graph(value, 1)
            elif name == "functions":
                self._function(value)
            elif name == "training_info":
                self._training(value)

    def _graph(self, data: memoryview, depth: int, *, is_main: bool | None = None) -> None:
        if depth > _DEEPEST:
            raise damage_error(f"graphs are nested more than {_DEEPEST} deep")
        is_main = depth == 1 if is_main is None else is_main
        weights: set[str] = set()
        for name, value in self._reader.fields(onnx.GRAPH, data):
            if name == "node":
                self._node(value, depth)
            elif name == "initializer":
                weights.add(self._tensor(value, is_weight=is_main))
            elif name == "sparse_initializer":
                self._sparse(value)
            elif is_main and name == "input":
                self.outline.inputs.append(self._value(value))
            elif is_main and name == "output":
                self.outline.outputs.append(self._value(value))
        if is_main:
            self.outline.inputs = [value for value in self.outline.inputs if value.name not in weights]

    def _value(self, data: memoryview) -> GraphTensor:
        fields = dict(self._reader.fields(onnx.VALUE, data))
        name = _read_name(fields.get("name", _NOTHING))
        tensor = dict(self._reader.fields(onnx.TYPE, fields.get("type", _NOTHING))).get("tensor_type")
        if tensor is None:
            return GraphTensor(name, None, None)
        facts = dict(self._reader.fields(onnx.TENSOR_TYPE, tensor))
        shape = None
        if "shape" in facts:
            dims = [dict(self._reader.fields(onnx.DIMENSION, dim)) for _, dim in
                    self._reader.fields(onnx.SHAPE, facts["shape"])]  # fmt: skip
            shape = tuple(to_signed(dim["dim_value"]) if "dim_value" in dim else None for dim in dims)
        return GraphTensor(name, onnx.DTYPES.get(facts.get("elem_type", 0)), shape)

    def _function(self, data: memoryview) -> None:
        domain, function_name = "", ""
        for name, value in self._reader.fields(onnx.FUNCTION, data):
            if name == "node":
                self._node(value, 1)
            elif name == "attribute_proto":
                self._attribute(value, 1)
            elif name == "domain":
                domain = _read_name(value)
            elif name == "name":
                function_name = _read_name(value)
        self.outline.functions.add((domain, function_name))

    def _training(self, data: memoryview) -> None:
        for name, value in self._reader.fields(onnx.TRAINING, data):
            if name in ("initialization", "algorithm"):
                self._graph(value, 1, is_main=False)

    def _node(self, data: memoryview, depth: int) -> None:
        domain, operator = "", ""
        for name, value in self._reader.fields(onnx.NODE, data):
            if name == "attribute":
                self._attribute(value, depth)
            elif name == "op_type":
                operator = _read_name(value)
            elif name == "domain":
                domain = _read_name(value)
        self.outline.operators.add((domain, operator))

    def _attribute(self, data: memoryview, depth: int) -> None:
        # All of them, whatever the attribute says of its type.
        for name, value in self._reader.fields(onnx.ATTRIBUTE, data):
            if name in ("t", "tensors"):
                self._tensor(value)
            elif name in ("g", "graphs"):
                self._graph(value, depth + 1)
            elif name in ("sparse_tensor", "sparse_tensors"):
                self._sparse(value)

    def _sparse(self, data: memoryview) -> None:
        for name, value in self._reader.fields(onnx.SPARSE_TENSOR, data):
            if name in ("values", "indices"):
                self._tensor(value)

    def _tensor(self, data: memoryview, *, is_weight: bool = False) -> str:
        """Note where the values lie, and return the tensor's name."""
        tensor, code, where, dims, entries, has_values = "", 0, _IN_THE_FILE, [], [], False
        for name, value in self._reader.fields(onnx.TENSOR, data):
            if name == "name":
                tensor = read_text(value)[:_LONGEST_NAME]
            elif name == "data_type":
                code = value
            elif name == "dims":
                dims += read_integers(value, _MOST_AXES)
            elif name == "data_location":
                where = value
            elif name == "external_data":
                entries.append(value)
            elif name.endswith("_data"):
                has_values = True
        # Before their product, which takes long of many.
        if len(dims) > _MOST_AXES or min(dims, default=0) < 0:
            raise damage_error(f"weight {tensor!r} has the shape {dims[:_MOST_AXES]}, and {len(dims)} axes")
        if where == _IN_THE_FILE and not entries:
            if is_weight and (bits := onnx.BITS.get(code)):
                # No more than can be there: a number of eight bytes may take one in the file.
                self.outline.weight_bytes[bits] += min(math.prod(dims) * bits // 8, 8 * len(data))
            return tensor
        if where != _EXTERNAL or not entries or has_values:
            raise damage_error(
                f"weight {tensor!r} says both that its values are in the file and that they are not"
            )
        place = self._place(tensor, code, dims, entries, is_weight)
        self.outline.places.append(place)
        if is_weight:
            self.outline.weight_bytes[onnx.BITS[code]] += place.size
        return tensor

    def _place(self, tensor: str, code: int, dims: list[int], entries: list, is_weight: bool) -> Place:
        found: dict[str, str] = {}
        for entry in entries:
            fields = dict(self._reader.fields(onnx.ENTRY, entry))
            key, value = (_read_name(fields.get(name, _NOTHING)) for name in ("key", "value"))
            if key in found or key not in _PLACE_KEYS:
                raise damage_error(f"the place of weight {tensor!r} has {key!r} twice, or is not to have it")
            found[key] = value
        if code not in onnx.BITS:
            raise damage_error(f"weight {tensor!r} has the type {code}, of which no size is known")
        size = -(-math.prod(dims) * onnx.BITS[code] // 8)
        offset, length = (
            _read_count(tensor, key, found[key]) if key in found else None for key in ("offset", "length")
        )
        if length not in (None, size):
            raise damage_error(f"weight {tensor!r} of {size} bytes takes {length} bytes")
        return Place(tensor, found.get("location", ""), offset or 0, size, is_weight)


def _read_count(tensor: str, key: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise damage_error(f"weight {tensor!r} has no place in its file: {key} is {text[:40]!r}")
    return int(text)


def _read_name(value: memoryview) -> str:
    name = read_text(value)
    if len(name) > _LONGEST_NAME:
        raise damage_error(f"a name has {len(name)} characters: {name[:40]!r}...")
    return name
