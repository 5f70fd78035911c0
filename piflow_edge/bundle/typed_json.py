"""JSON -> dataclasses: values of the annotated types and the keys in order, or a BundleError that names the place."""

import json
import types
from dataclasses import Field, fields, is_dataclass
from types import MappingProxyType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from piflow_edge.errors import BundleError, PiFlowError

# Metadata of a field that files may lack, which then has its default: those written before the field was there.
ADDED_LATER = MappingProxyType({"added later": True})


def write_json(body: dict) -> bytes:
    """The one way in which a body is written, so that its checksum is one.

    Raises:
        ValueError: it holds NaN, infinity or text that is not Unicode.
    """
    return (json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def may_lack(described: Field) -> bool:
    """Return True if a file may lack the field; see `ADDED_LATER`."""
    return ADDED_LATER.keys() <= described.metadata.keys()


def read_typed(kind: Any, value: Any, where: str) -> Any:
    """Return `value` as an instance of the annotated type `kind`.

    Args:
        kind: a dataclass of these: dataclasses, `list`, `dict` with text as keys, `tuple` of any length, unions,
            `Literal`, plain types and `Any`. Of a union of dataclasses, the "kind" of the value chooses.
        value: what `json.loads` made.
        where: named in errors.

    Raises:
        BundleError: a value of another type; a key that is missing, unknown or not in its place.
    """
    origin, args = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if origin in (list, tuple) and isinstance(value, list):
        items = [read_typed(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if origin is list else tuple(items)
    if origin is dict and isinstance(value, dict):
        return {key: read_typed(args[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if origin in (Union, types.UnionType):
        return _read_union(args, value, where)
    if origin is Literal:
        if value in args:
            return value
    elif kind is Any or type(value) is kind or (kind is float and type(value) is int):
        return value
    raise BundleError(f"{where} has a value of the wrong kind: {value!r}")


def _read_dataclass(kind: type, value: Any, where: str) -> Any:
    names = [f.name for f in fields(kind)]
    present = [
        f.name for f in fields(kind) if not may_lack(f) or (isinstance(value, dict) and f.name in value)
    ]
    if not isinstance(value, dict) or list(value) != present:
        unknown = [name for name in value if name not in names] if isinstance(value, dict) else []
        problem = (
            f"has the unknown key {unknown[0]!r}" if unknown else f"must hold {', '.join(names)} in order"
        )
        raise BundleError(f"{where} {problem}; it was altered or made by another release")
    hints = get_type_hints(kind)
    values = {name: read_typed(hints[name], value[name], f"{where}: {name}") for name in present}
    try:
        return kind(**values)
    except PiFlowError as error:  # a number out of range
        raise BundleError(f"{where}: {error}") from error


def _read_union(options: tuple, value: Any, where: str) -> Any:
    described = [option for option in options if is_dataclass(option)]
    named = value.get("kind") if isinstance(value, dict) else None
    for option in described if len(described) > 1 else ():
        if named in get_args(get_type_hints(option)["kind"]):
            return read_typed(option, value, where)
    if type(value) in options or (float in options and type(value) is int):
        return value
    if len(described) == 1:
        return read_typed(described[0], value, where)
    raise BundleError(f"{where} has a value of the wrong kind: {value!r}")
