"""`bundle.json` for programs that are not ours: its dataclasses as a JSON Schema.

The published file is `bundle.schema.json` beside this one. After a change of the dataclasses in `manifest.py` write it
again, from the repository's root:

    python -m piflow_edge.bundle.schema > piflow_edge/bundle/bundle.schema.json

The schema says what keys and kinds of values there are. `Bundle` checks more: checksums, the order of keys, that
everything fits together.
"""

import json
import re
import types
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .manifest import FORMAT_VERSION, Manifest
from .typed_json import may_lack

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}


def bundle_schema() -> dict[str, Any]:
    """What `bundle.json` may hold, as JSON Schema of draft 2020-12."""
    definitions: dict[str, dict] = {}
    manifest = _object(Manifest, definitions)
    manifest["properties"]["format_version"] = {"const": FORMAT_VERSION}
    # Not a field: `manifest_bytes` adds it.
    manifest["properties"]["sha256"] = {
        "type": "string",
        "pattern": "^[0-9a-f]{64}$",
        "description": "SHA-256 of this file without this key, indented by 2, with a line feed at the end.",
    }
    manifest["required"].append("sha256")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:piflow-edge:bundle:{FORMAT_VERSION}",
        "title": f"bundle.json of piflow-edge, format version {FORMAT_VERSION}",
        **manifest,
        "$defs": dict(sorted(definitions.items())),
    }


def schema_text() -> str:
    """The content of `bundle.schema.json`."""
    return json.dumps(bundle_schema(), indent=2, ensure_ascii=False) + "\n"


def _object(kind: type, definitions: dict[str, dict]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    return {
        "description": re.sub(r"\s+", " ", kind.__doc__ or "").strip(),
        "type": "object",
        "properties": {name: _schema(hints[name], definitions) for name in names},
        "required": [field.name for field in fields(kind) if not may_lack(field)],
        "additionalProperties": False,
    }


def _schema(kind: Any, definitions: dict[str, dict]) -> dict[str, Any]:
    """The schema of one annotated type, as `manifest.py` reads it."""
    origin, args = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = _object(kind, definitions)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if origin in (list, tuple):
        return {"type": "array", "items": _schema(args[0], definitions)}
    if origin is dict:
        if args[1] is Any:
            return {"type": "object"}
        return {"type": "object", "additionalProperties": _schema(args[1], definitions)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(option, definitions) for option in args]}
    if origin is Literal:
        return {"enum": list(args)}
    if kind is Any:
        return {}
    return {"type": _PLAIN[kind]}


if __name__ == "__main__":
    print(schema_text(), end="")
