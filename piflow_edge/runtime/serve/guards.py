"""What stands before every endpoint: who may come in, and what is counted."""

import hashlib
import hmac
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import answer_error
from .counters import Counters

_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class KeyGuard:
    """Lets in who sends the API key. `is_open`: tells of a path if everybody may see what is there."""

    def __init__(self, app: ASGIApp, api_key: str, is_open: Callable[[str], bool]):
        self._app, self._digest, self._is_open = app, _digest(api_key), is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope["path"]) or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        answer = answer_error(401, "send the API key as: Authorization: Bearer KEY")
        answer.headers["WWW-Authenticate"] = "Bearer"
        await answer(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        # Digests are of one length, so that the time to compare them says nothing of the key.
        return kind.lower() == "bearer" and hmac.compare_digest(_digest(key.strip()), self._digest)


class Counting:
    """Counts answers and their time by endpoint, and sets headers that every answer has."""

    def __init__(self, app: ASGIApp, counters: Counters):
        self._app, self._counters = app, counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        finally:
            endpoint = _name_endpoint(scope)
            self._counters.requests.labels(endpoint, str(status)).inc()
            self._counters.seconds.labels(endpoint).observe(time.perf_counter() - began)


def _name_endpoint(scope: Scope) -> str:
    """The name of the endpoint that answered: never the path, of which a caller can make any number."""
    endpoint = Request(scope).scope.get("endpoint")
    return getattr(endpoint, "__name__", None) or "none"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
