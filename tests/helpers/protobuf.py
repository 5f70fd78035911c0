"""Protobuf by hand, for ONNX files that no library would write."""

from piflow_edge.system.protobuf import read_varint

FLOAT = 1
# ModelProto.opset_import: the standard's operators, version 17.
OPSET = (8, b"\x0a\x00\x10\x11")


def message(*fields):
    """A message of fields: (number, bytes), (number, text) or (number, whole number)."""

    def varint(value):
        out = b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    def field(number, value):
        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        value = value.encode() if isinstance(value, str) else value
        return varint(number << 3 | 2) + varint(len(value)) + value

    return b"".join(field(number, value) for number, value in fields)


def fields_of(data):
    """The fields of a message, as `message` takes them; none of 32 or 64 bits."""
    found, at, data = [], 0, memoryview(data)
    while at < len(data):
        key, at = read_varint(data, at)
        value, at = read_varint(data, at)
        if key & 7 == 2:
            value, at = bytes(data[at : at + value]), at + value
        found.append((key >> 3, value))
    return found


def entry(key, value):
    """TensorProto.external_data: one key with its value."""
    return 13, message((1, key), (2, str(value)))


def outside(location, *, name="w", dims=(4,), **more):
    """A float tensor whose values lie in the file `location`."""
    places = [entry(key, value) for key, value in {"location": location, **more}.items()]
    return message(*[(1, n) for n in dims], (2, FLOAT), (8, name), *places, (14, 1))


def value(name, *dims):
    """ValueInfoProto of floats."""
    shape = message(*((1, message((1, n))) for n in dims))
    return message((1, name), (2, message((1, message((1, FLOAT), (2, shape))))))


def node(operator, inputs, outputs, *attributes, domain=""):
    """NodeProto; attributes as `message` made them."""
    named = [*((1, name) for name in inputs), *((2, name) for name in outputs), (4, operator)]
    return message(*named, *((5, attribute) for attribute in attributes), *([(7, domain)] if domain else []))


def graph(*fields):
    """GraphProto: y = x + w for x of four numbers, and whatever fields are given."""
    own = [(1, node("Add", ["x", "w"], ["y"])), (2, "g"), (11, value("x", 4)), (12, value("y", 4))]
    return message(*fields, *own)


def model(*fields, more=()):
    """ModelProto around the `graph` of these fields; `more`: fields of the model."""
    return message((1, 8), OPSET, (7, graph(*fields)), *more)
