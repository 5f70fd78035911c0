"""The endpoint in the shape of OpenAI's: what its clients send and read.

Fields that are this project's own: `seed` in a request, `seed` and `index` of each image in an answer.
"""

import re
import time
from collections.abc import Mapping
from typing import Any

from piflow_edge.sampling_settings import SamplingSettings

from .desk import Picture
from .limits import ServeSettings
from .orders import (
    FORMATS,
    NAME,
    PROMPT,
    SEED,
    BodyField,
    Order,
    OrderError,
    check_fields,
    choice,
    text,
    whole,
)

# Sent by clients of OpenAI; a student has nothing that they could set.
_WITHOUT_MEANING = (
    "user",
    "quality",
    "style",
    "background",
    "moderation",
    "output_compression",
    "partial_images",
)


def _fields(limits: ServeSettings) -> dict[str, BodyField]:
    return {
        "prompt": PROMPT,
        "model": NAME,
        "n": whole(1, limits.max_images),
        "size": text(20),
        "response_format": choice("b64_json", "url"),
        "output_format": choice(*FORMATS),
        "seed": SEED,
        "stream": choice(False),
        **dict.fromkeys(_WITHOUT_MEANING, BodyField("anything", lambda value: True)),
    }


def read_order(body: Mapping[str, Any], limits: ServeSettings) -> Order:
    """Return what the body of a request asks for.

    Raises:
        OrderError: unknown or unusable fields.
    """
    given = check_fields(body, _fields(limits))
    width, height = _read_size(given.get("size", "auto"))
    # An empty prompt is what a client must send where nothing steers.
    asked = {"subject": given.get("prompt") or None, "count": given.get("n", 1)}
    return Order(
        given.get("model"),
        asked,
        given.get("seed"),
        SamplingSettings(height=height, width=width),
        given.get("output_format", "png"),
        has_urls=given.get("response_format") == "url",
    )


def describe_pictures(pictures: list[Picture], urls: list[str] | None) -> dict[str, Any]:
    """Return the body of an answer. `urls`: of the pictures, or None to send the pictures themselves."""
    data = [
        {
            **({"b64_json": picture.base64} if urls is None else {"url": urls[i]}),
            "seed": picture.seed,
            "index": picture.index,
        }
        for i, picture in enumerate(pictures)
    ]
    return {"created": int(time.time()), "data": data}


def describe_model(name: str, details: Mapping[str, Any], created: int) -> dict[str, Any]:
    """Return an entry of the list of models."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "piflow-edge",
        "piflow": dict(details),
    }


def _read_size(size: str) -> tuple[int | None, int | None]:
    if size == "auto":
        return None, None
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size, re.ASCII)
    if found is None:
        raise OrderError(f"size is WIDTHxHEIGHT in pixels, or auto; got {size!r}", field="size")
    return int(found[1]), int(found[2])
