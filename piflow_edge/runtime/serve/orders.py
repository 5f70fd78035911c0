"""What a request over HTTP asks for, read from its body: every field known, of the right kind and within the limits."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request

from piflow_edge.errors import PiFlowError
from piflow_edge.runtime.settings import suggest_ours
from piflow_edge.sampling_settings import SamplingSettings

from .limits import ServeSettings

# Seconds in which a caller sends the body of a request.
_BODY_SECONDS = 15
# Characters of a prompt or of class names; `build_request` checks what they say.
_LONGEST_TEXT = 4000
_LONGEST_LABEL = 200
FORMATS = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}


class OrderError(PiFlowError):
    """A request that cannot be answered. `status`: of HTTP. `field`: of the body that is to blame, or None."""

    def __init__(self, message: str, *, status: int = 400, field: str | None = None):
        super().__init__(message)
        self.status, self.field = status, field


@dataclass(frozen=True)
class Order:
    """Images that a caller asks for; None is the bundle's or the server's choice.

    `bundle`: its name. `asked`: arguments of a generator's `prepare`. `format`: one of `FORMATS`. `has_progress`,
    `has_previews`: told while images are drawn. `has_urls`: pictures are fetched by their address afterwards.
    """

    bundle: str | None
    asked: Mapping[str, Any]
    seed: Any
    settings: SamplingSettings
    format: str = "png"
    has_progress: bool = False
    has_previews: bool = False
    has_urls: bool = False


@dataclass(frozen=True)
class BodyField:
    """One field of a body: what it is in words, and what tells if a value is that."""

    says: str
    fits: Callable[[Any], bool]


def whole(least: int, most: int) -> BodyField:
    return BodyField(
        f"a whole number from {least} to {most}", lambda v: type(v) is int and least <= v <= most
    )


def number(least: float, most: float) -> BodyField:
    return BodyField(
        f"a number from {least:g} to {most:g}", lambda v: type(v) in (int, float) and least <= v <= most
    )


def choice(*values: Any) -> BodyField:
    return BodyField(
        f"one of {', '.join(map(json.dumps, values))}",
        lambda v: any(type(v) is type(one) and v == one for one in values),
    )


def either(*fields: BodyField) -> BodyField:
    says = " or ".join(each.says for each in fields)
    return BodyField(says, lambda v: any(each.fits(v) for each in fields))


def several(entry: BodyField, most: int) -> BodyField:
    return BodyField(
        f"a list of up to {most}, each {entry.says}",
        lambda v: isinstance(v, list) and 0 < len(v) <= most and all(map(entry.fits, v)),
    )


def text(longest: int) -> BodyField:
    return BodyField(
        f"a text of up to {longest} characters", lambda v: isinstance(v, str) and len(v) <= longest
    )


PROMPT, LABEL = text(_LONGEST_TEXT), either(text(_LONGEST_LABEL), whole(0, 10**9))
NAME, SEED, FLAG = text(200), whole(0, 2**64 - 1), choice(True, False)


def settings_fields(limits: ServeSettings) -> dict[str, BodyField]:
    """Return the fields of a body that are fields of `SamplingSettings`."""
    return {
        "nfe": whole(1, limits.max_nfe),
        "substeps": whole(1, limits.max_substeps),
        "solver": choice("euler", "multistep"),
        "temperature": either(number(0, 100), choice("auto")),
        "h": either(number(0, 1e6), choice("inf")),
        "height": whole(1, 1 << 16),
        "width": whole(1, 1 << 16),
    }


def check_fields(body: Mapping[str, Any], fields: Mapping[str, BodyField]) -> dict[str, Any]:
    """Return a body's fields that are not null.

    Raises:
        OrderError: an unknown field, or a value of another kind.
    """
    for name in body:
        if name not in fields:
            hint = suggest_ours(name) or f"there are {', '.join(fields)}"
            raise OrderError(f"there is no field {name!r:.80}; {hint}", field=name[:80])
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if not fields[name].fits(value):
            raise OrderError(f"{name} is {fields[name].says}; got {value!r:.80}", field=name)
    return given


async def read_body(request: Request, limits: ServeSettings) -> dict[str, Any]:
    """Return the JSON object that a request holds.

    Raises:
        OrderError: another type of content, too much or too slow of it, or no JSON object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a form of another web site can send is refused with it
        raise OrderError(f"the body is application/json; got {kind!r:.80}", status=415)
    received = bytearray()
    try:
        with anyio.fail_after(_BODY_SECONDS):
            async for piece in request.stream():
                received += piece
                if len(received) > limits.max_body:
                    raise OrderError(f"a body has up to {limits.max_body} bytes", status=413)
    except TimeoutError as error:
        raise OrderError(f"the body did not come within {_BODY_SECONDS} s", status=408) from error
    except ClientDisconnect as error:
        raise OrderError("the caller left", status=499) from error
    return _parse_object(bytes(received))


def _parse_object(received: bytes) -> dict[str, Any]:
    try:
        body = json.loads(received, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise OrderError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise OrderError(f"the body is a JSON object; got {type(body).__name__}")
    return body


def _refuse_constant(name: str) -> None:
    raise ValueError(f"there is no {name} in JSON")
