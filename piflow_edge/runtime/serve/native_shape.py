"""The endpoint that can do all that a generator's call can, with progress and previews while images are drawn."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

from starlette.responses import StreamingResponse

from piflow_edge.errors import PiFlowError
from piflow_edge.runtime.result import Result
from piflow_edge.sampling_settings import SamplingSettings

from .desk import Desk, Picture, encode_previews, encode_result
from .jobs import JobProgress
from .limits import ServeSettings
from .orders import (
    FLAG,
    FORMATS,
    LABEL,
    NAME,
    PROMPT,
    SEED,
    Order,
    check_fields,
    choice,
    either,
    settings_fields,
    several,
    whole,
)

# Seconds of silence after which a comment shows that the connection is alive, or is found to be closed.
_SILENCE = 1.0


def read_order(body: Mapping[str, Any], limits: ServeSettings) -> Order:
    """Return what the body of a request asks for.

    Raises:
        OrderError: unknown or unusable fields.
    """
    most = limits.max_images
    settings = settings_fields(limits)
    fields = {
        "bundle": NAME,
        "prompt": either(PROMPT, several(PROMPT, most)),
        "labels": either(LABEL, several(LABEL, most)),
        "count": whole(1, most),
        "seed": either(SEED, several(either(SEED, several(SEED, 2)), most)),
        **settings,
        "format": choice(*FORMATS),
        "stream": FLAG,
        "previews": FLAG,
    }
    given = check_fields(body, fields)
    return Order(
        given.get("bundle"),
        {name: given.get(name) for name in ("prompt", "labels", "count")},
        given.get("seed"),
        SamplingSettings(**{name: given[name] for name in settings if name in given}),
        given.get("format", "png"),
        has_progress=given.get("stream", False),
        has_previews=given.get("previews", False),
    )


def describe_result(name: str, result: Result, pictures: list[Picture]) -> dict[str, Any]:
    """Return the body of an answer."""
    return {
        "bundle": name,
        "engine": result.engine,
        "device": result.device,
        "timings_ms": {stage: round(ms, 3) for stage, ms in result.timings.items()},
        "images": [
            {
                "b64_json": picture.base64,
                "seed": picture.seed,
                "index": picture.index,
                "recipe": json.loads(picture.recipe),
            }
            for picture in pictures
        ],
    }


class EventStream(StreamingResponse):
    """An answer in server-sent events: "progress" after every network call, then "result" or "error"."""

    def __init__(self, events: AsyncIterator[str], giving_up: AsyncExitStack):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._giving_up = giving_up

    async def __call__(self, scope, receive, send) -> None:
        async with self._giving_up:  # also where the caller left before the first event
            await super().__call__(scope, receive, send)


async def open_stream(desk: Desk, order: Order) -> EventStream:
    """Let an order wait for its turn, and return the answer that tells how it goes.

    Raises:
        As `Desk.place`.
    """
    loop, reports = asyncio.get_running_loop(), asyncio.Queue()

    def report(progress: JobProgress) -> None:
        done = progress.progress
        said = {"call": done.call, "nfe": done.nfe, "sigma_t": done.sigma_t, "first": progress.first}
        previews = progress.preview if order.has_previews and done.call < done.nfe else None
        loop.call_soon_threadsafe(reports.put_nowait, (said, previews))

    giving_up = AsyncExitStack()
    job = await giving_up.enter_async_context(desk.place(order, report))
    job.future.add_done_callback(lambda future: loop.call_soon_threadsafe(reports.put_nowait, None))

    async def tell() -> AsyncIterator[str]:
        deadline = loop.time() + desk.limits.timeout
        while True:
            try:
                found = await asyncio.wait_for(reports.get(), _SILENCE)
            except asyncio.TimeoutError:  # of Python 3.10 it is another class than TimeoutError
                if loop.time() > deadline:
                    yield _write_event("error", {"message": str(desk.too_late())})
                    return
                yield ": still at it\n\n"
                continue
            if found is None:
                yield await _tell_end(desk, order, job.future)
                return
            said, previews = found
            if previews is not None:
                said["previews"] = await encode_previews(previews)
            yield _write_event("progress", said)

    return EventStream(tell(), giving_up)


async def _tell_end(desk: Desk, order: Order, future: Any) -> str:
    try:
        result = future.result()
    except PiFlowError as error:
        return _write_event("error", {"message": str(error)})
    pictures = await encode_result(result, order.format)
    return _write_event("result", describe_result(desk.find_bundle(order.bundle), result, pictures))


def _write_event(name: str, body: Mapping[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(body)}\n\n"
