"""Bytes of a `bundle.json` -> manifest, of every format that this release reads."""

import json
from pathlib import Path

from piflow_edge.errors import BundleError
from piflow_edge.system.files import sha256

from .format4 import read_format_4
from .manifest import FORMAT_VERSION, MANIFEST, Manifest
from .manifest_checks import check_manifest
from .typed_json import read_typed, write_json


def _read_format_5(body: dict, place: str) -> Manifest:
    return read_typed(Manifest, body, place)


_READERS = {FORMAT_VERSION: _read_format_5, 4: read_format_4}


def parse_manifest(data: bytes, folder: Path) -> Manifest:
    """The manifest that the bytes of a `bundle.json` hold; `folder` is named in errors.

    Raises:
        BundleError: it is none of a format that this release reads, does not match its own checksum, or does not hold
            together.
    """
    place = folder / MANIFEST
    try:
        body = json.loads(data)
        # Back again right here: JSON that cannot be written (NaN, half a surrogate pair) was never written by us.
        rewritten = write_json(body)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{place} is not JSON: {error}; copy the bundle again") from error
    version = body.get("format_version") if isinstance(body, dict) else None
    if type(version) is not int or version not in _READERS:
        raise BundleError(
            f"{place} has format version {version!r}, this release reads {FORMAT_VERSION} and 4; "
            "use the release that made it, or export again"
        )
    digest = body.pop("sha256", None)
    manifest = _READERS[version](body, str(place))
    # Byte for byte: a changed space is an altered file too.
    if data != rewritten or digest != sha256(write_json(body)):
        raise BundleError(f"{place} does not match its own checksum; copy the bundle again or re-export")
    check_manifest(manifest, place)
    return manifest
