"""Where an order becomes a job and a result an answer: the part that is alike for all endpoints."""

import asyncio
import base64
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from piflow_edge.errors import BundleError, UsageError
from piflow_edge.runtime.generator import Generator
from piflow_edge.runtime.pictures import encode_picture
from piflow_edge.runtime.result import Result
from piflow_edge.system.sheets import as_pil

from .batcher import Batcher
from .counters import Counters
from .jobs import Job, JobProgress
from .limits import ServeSettings
from .orders import Order, OrderError

# Pixels up to which an image becomes a file sooner than another thread begins with it.
_FEW_PIXELS = 1 << 14
# Seeds that a server draws fit into a number of JavaScript.
_SEEDS = 2**53


@dataclass(frozen=True)
class Picture:
    """An image as a file. `seed`, `index`: what makes it again."""

    content: bytes
    seed: int
    index: int
    recipe: str

    @property
    def base64(self) -> str:
        return base64.b64encode(self.content).decode()


class Desk:
    """The bundles of a server, each with its batcher.

    Raises:
        UsageError: two bundles of one name. BundleError: one that makes no images.
    """

    def __init__(self, generators: Iterable[Generator], limits: ServeSettings, counters: Counters):
        self.limits, self.generators = limits, {}
        self._encoding = anyio.CapacityLimiter(1)
        for generator in generators:
            name = generator.bundle.name
            if name in self.generators:
                raise UsageError(f"two bundles are called {name!r}; serve one of them, or export one anew")
            if not generator.bundle.manifest.makes_images:
                raise BundleError(
                    f"bundle {name!r} makes latents and has no decoder; export it with --autoencoder"
                )
            self.generators[name] = generator
        self._room = (limits.max_waiting + limits.max_batch) * len(self.generators)
        bounds = {"max_batch": limits.max_batch, "max_waiting": limits.max_waiting}
        self.batchers = {
            name: Batcher(generator, counters, **bounds) for name, generator in self.generators.items()
        }

    @property
    def is_working(self) -> bool:
        return all(batcher.is_working for batcher in self.batchers.values())

    def find_bundle(self, name: str | None) -> str:
        """Return the name of a bundle that is served; None is the first.

        Raises:
            OrderError: there is none of that name.
        """
        if name is None:
            return next(iter(self.generators))
        if name not in self.generators:
            raise OrderError(
                f"bundles here are {', '.join(self.generators)}; got {name!r:.80}", status=404, field="model"
            )
        return name

    @contextmanager
    def entry(self) -> Iterator[None]:
        """Let a request in, from before its body is read until it is answered: there is room for so many.

        Raises:
            BusyError: too many are in. Without this they would pile up before the queue that `place` looks at.
        """
        if self._room <= 0:
            raise max(self.batchers.values(), key=Batcher.count_waiting).refuse()
        self._room -= 1
        try:
            yield
        finally:
            self._room += 1

    @asynccontextmanager
    async def place(
        self, order: Order, on_progress: Callable[[JobProgress], None] | None = None
    ) -> AsyncIterator[Job]:
        """Let an order wait for its turn; who leaves the block before it is done gives it up.

        Raises:
            OrderError: more images than the server makes at a time. BusyError: too many wait.
            Others as a generator's call does, for what cannot be drawn.
        """
        name = self.find_bundle(order.bundle)
        batcher = self.batchers[name]
        batcher.check_room()  # before work is spent on prompts
        seed = secrets.randbelow(_SEEDS) if order.seed is None else order.seed
        generator = self.generators[name]
        prepare = partial(generator.prepare, **order.asked, seed=seed, settings=order.settings)
        # Prompts run an encoder, one at a time, for its memory; all else takes less time than a thread takes to begin.
        if generator.conditioner.networks:
            request = await anyio.to_thread.run_sync(prepare, limiter=self._encoding)
        else:
            request = prepare()
        if len(request) > self.limits.max_images:
            raise OrderError(f"a request makes up to {self.limits.max_images} images; got {len(request)}")
        job = Job(request, on_progress)
        batcher.submit(job)
        try:
            yield job
        finally:
            batcher.abandon(job)

    async def fulfil(self, order: Order, request: Request) -> Result:
        """Return the result of an order.

        Raises:
            OrderError: the caller left, or it took too long. Others as `place` does.
        """
        async with self.place(order) as job:
            result = asyncio.wrap_future(job.future)
            gone = asyncio.ensure_future(wait_until_gone(request))
            try:
                await asyncio.wait(
                    {result, gone}, timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED
                )
                if result.done():
                    return result.result()
                if gone.done():
                    raise OrderError("the caller left", status=499)
                raise self.too_late()
            finally:
                gone.cancel()

    def too_late(self) -> OrderError:
        return OrderError(f"the images took above {self.limits.timeout:g} s; ask for fewer", status=504)

    def close(self) -> None:
        """Stop the batchers, and free the bundles' memory."""
        for batcher in self.batchers.values():
            batcher.close()
        for generator in self.generators.values():
            generator.close()

    def describe(self, name: str) -> dict[str, Any]:
        """Return what a bundle makes, and of what, for a list of bundles."""
        generator = self.generators[name]
        manifest = generator.bundle.manifest
        channels, height, width = manifest.image_shape
        return {
            "asked_with": generator.conditioner.positional,
            "summary": generator.conditioner.summarize(),
            "size": f"{width}x{height}",
            "channels": channels,
            "nfe": manifest.schedule.nfe,
            "precision": generator.precision,
            "engine": generator.engine.name,
            "device": generator.engine.device,
        }


async def wait_until_gone(request: Request) -> None:
    """Return when the caller has closed the connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def encode_result(result: Result, format: str) -> list[Picture]:
    """Return the images of a result as files that hold their recipes; the loop goes on meanwhile."""
    if result.images[..., 0].size <= _FEW_PIXELS:
        return _encode_result(result, format)
    return await run_in_threadpool(_encode_result, result, format)


async def encode_previews(images: np.ndarray) -> list[str]:
    """Return images, uint8 (B, H, W, C), as PNG files in base64."""
    return await run_in_threadpool(_encode_previews, images)


def _encode_result(result: Result, format: str) -> list[Picture]:
    pictures = []
    assert result.seeds is not None, "nobody gives noise over HTTP"
    for i, (image, (seed, index)) in enumerate(zip(as_pil(result.images), result.seeds, strict=True)):
        recipe = result.recipe.of(i)
        content = encode_picture(image, f".{format}", recipe)
        pictures.append(Picture(content, seed, index, recipe.as_json()))
    return pictures


def _encode_previews(images: np.ndarray) -> list[str]:
    return [base64.b64encode(encode_picture(image, ".png")).decode() for image in as_pil(images)]
