"""The application that a web server runs: endpoints, and what stands before them."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from piflow_edge.runtime.generator import Generator

from . import native_shape, openai_shape
from .answers import ERROR_ANSWERS
from .counters import Counters
from .desk import Desk, encode_result
from .guards import Counting, KeyGuard
from .limits import ServeSettings
from .orders import FORMATS, OrderError, read_body
from .page_folder import ISOLATION, SiteFiles, collect_files
from .picture_store import PictureStore

_PICTURES = "/v1/images/files"
# Python guesses none for these, or a wrong one where a system's own list says so; browsers run no module without.
_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}


def build_app(
    generators: Sequence[Generator], limits: ServeSettings, runtime: Path | None = None
) -> Starlette:
    """Return the application that serves bundles, which it closes when it stops.

    `runtime`: ONNX Runtime's files for browsers, as in `collect_files`; with them the bundles' files are given to
    everybody, and None keeps them here.

    Raises:
        UsageError, BundleError: as `Desk` and `collect_files`.
    """
    counters = Counters()
    page = collect_files([generator.bundle for generator in generators], runtime, has_server=True)
    endpoints = Endpoints(Desk(generators, limits, counters), limits, counters, page)
    middleware = [
        Middleware(Counting, counters=counters),
        Middleware(TrustedHostMiddleware, allowed_hosts=limits.host_names, www_redirect=False),
    ]
    if limits.api_key is not None:
        middleware.append(Middleware(KeyGuard, api_key=limits.api_key, is_open=endpoints.is_open))
    return Starlette(
        routes=endpoints.routes(),
        middleware=middleware,
        exception_handlers=ERROR_ANSWERS,
        lifespan=endpoints.live,
    )


class Endpoints:
    """What callers can ask a server for."""

    def __init__(self, desk: Desk, limits: ServeSettings, counters: Counters, page: SiteFiles):
        self._desk, self._limits, self._counters, self._page = desk, limits, counters, page
        self._pictures, self._began = PictureStore(limits.max_pictures), int(time.time())

    def routes(self) -> list[Route]:
        return [
            Route("/v1/images/generations", self.generations, methods=["POST"]),
            Route("/v1/generate", self.generate, methods=["POST"]),
            Route(_PICTURES + "/{name}", self.picture),
            Route("/v1/models", self.models),
            Route("/metrics", self.metrics),
            Route("/healthz", self.healthz),
            *(Route(f"/{address}", self.page) for address in ("", *self._page)),
        ]

    def is_open(self, path: str) -> bool:
        """Return True for what needs no API key: the page, and pictures, whose names cannot be guessed."""
        return path in ("/", "/healthz") or path.startswith(_PICTURES + "/") or path[1:] in self._page

    @asynccontextmanager
    async def live(self, app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as closing:
            closing.push_async_callback(run_in_threadpool, self._desk.close)
            yield

    async def generations(self, request: Request) -> Response:
        with self._desk.entry():
            order = openai_shape.read_order(await read_body(request, self._limits), self._limits)
            result = await self._desk.fulfil(order, request)
            pictures, urls = await encode_result(result, order.format), None
        if order.has_urls:
            names = [self._pictures.add(picture.content, FORMATS[order.format]) for picture in pictures]
            urls = [str(request.url_for("picture", name=name)) for name in names]
        return JSONResponse(openai_shape.describe_pictures(pictures, urls))

    async def generate(self, request: Request) -> Response:
        with self._desk.entry():
            order = native_shape.read_order(await read_body(request, self._limits), self._limits)
            if order.has_progress:
                return await native_shape.open_stream(self._desk, order)
            result = await self._desk.fulfil(order, request)
            pictures = await encode_result(result, order.format)
        name = self._desk.find_bundle(order.bundle)
        return JSONResponse(native_shape.describe_result(name, result, pictures))

    async def picture(self, request: Request) -> Response:
        found = self._pictures.find(request.path_params["name"])
        if found is None:
            raise OrderError("there is no such picture, or it is too old", status=404)
        return Response(found[0], media_type=found[1], headers={"Cache-Control": "private, max-age=3600"})

    async def page(self, request: Request) -> Response:
        """A file of the page: only what stands in the list, so that no path leads elsewhere."""
        content = self._page.get(request.scope["path"][1:] or "index.html")
        if content is None:
            raise OrderError("there is nothing at this address", status=404)
        if isinstance(content, bytes):
            return Response(content, media_type="application/json", headers=ISOLATION)
        return FileResponse(content, headers=ISOLATION, media_type=_TYPES.get(content.suffix))

    async def models(self, request: Request) -> Response:
        data = [
            openai_shape.describe_model(name, self._desk.describe(name), self._began)
            for name in self._desk.generators
        ]
        return JSONResponse({"object": "list", "data": data})

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(
            self._counters.write(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def healthz(self, request: Request) -> Response:
        is_working = self._desk.is_working
        body = {"status": "ok" if is_working else "failed", "bundles": list(self._desk.generators)}
        return JSONResponse(body, 200 if is_working else 503)
