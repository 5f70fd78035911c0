"""What is left of a bundle's speed over HTTP, what overload does, and does the server grow? One JSON line answers.

A server of its own process is asked on loopback by this one, over connections that stay open. Throughput: twice as
many images are asked for at a time as a batch has, `--images` by each caller, against the same process's bare
batches of that size; both in turn, `--rounds` times. Overload: more callers than may wait, who ask again at once when
they are refused. Growth: `--requests` requests more, after which resident memory and open files are read again. The
pictures are compared with the generator's. The exit status is 1 for another picture, or memory that grew by more than
--allowed MB.

Run: python -m benchmarks.serve_load digits
     python -m benchmarks.serve_load large --requests 0      a network of 8 million weights, made on the spot
"""

import asyncio
import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

import piflow_edge as pf
from benchmarks.timing import answer, parser

_PATH = "/v1/images/generations"
_CHECKED = 32


@contextmanager
def serving(bundle: str, *more: str):
    """A server's port on this machine."""
    command = [sys.executable, "-m", "piflow_edge.cli", "serve", bundle, "--port", "0", *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield int(process.stdout.readline().rpartition(":")[2])
        finally:
            process.send_signal(signal.SIGINT)


class Caller:
    """One connection that stays open. `http.client` would take a thread for each."""

    def __init__(self, port: int):
        self._port, self._reader, self._writer = port, None, None

    async def ask(self, path: str, body: dict | None = None) -> tuple[int, bytes]:
        """Status and body of an answer."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        self._writer.write(head.encode() + content)
        answered = await self._reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", answered)[1])
        return int(answered.split(b" ", 2)[1]), await self._reader.readexactly(length)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@dataclass
class Load:
    """What many callers got: `statuses`, `seconds` of each answered request, `wall` of all; `images` of each."""

    statuses: Counter
    seconds: list[float]
    wall: float
    images: int = 1

    @property
    def images_per_second(self) -> float:
        return self.images * self.statuses[200] / self.wall


async def press(
    port: int, callers: int, *, seconds: float = 1e9, requests: int = 10**9, images: int = 1
) -> Load:
    """Let so many callers ask for `images` each, over and over, for a time or a number of requests."""
    load, asked = Load(Counter(), [], 0.0, images), 0
    began = time.perf_counter()

    async def call() -> None:
        nonlocal asked
        caller = Caller(port)
        while time.perf_counter() - began < seconds and asked < requests:
            asked += 1
            start = time.perf_counter()
            status, _ = await caller.ask(_PATH, {"prompt": str(asked % 10), "seed": asked, "n": images})
            load.statuses[status] += 1
            if status == 200:
                load.seconds.append(time.perf_counter() - start)
            else:
                await asyncio.sleep(0.02)  # else the callers take the cores that they wait for
        caller.close()

    await asyncio.gather(*(call() for _ in range(callers)))
    load.wall = time.perf_counter() - began
    return load


async def read_process(port: int) -> dict[str, float]:
    """The server's memory and open files, as it says itself."""
    caller = Caller(port)
    _, body = await caller.ask("/metrics")
    caller.close()
    found = {line.split()[0]: line.split()[1] for line in body.decode().splitlines() if line[0] != "#"}
    return {
        "resident_mb": float(found["process_resident_memory_bytes"]) / 2**20,
        "open_files": float(found["process_open_fds"]),
    }


async def count_wrong_pictures(port: int, generator: pf.Generator) -> int:
    """How many of `_CHECKED` pictures that were asked for at once differ from the generator's."""

    async def fetch(seed: int) -> np.ndarray:
        caller = Caller(port)
        _, body = await caller.ask(_PATH, {"prompt": str(seed % 10), "seed": seed})
        caller.close()
        content = base64.b64decode(json.loads(body)["data"][0]["b64_json"])
        return np.asarray(Image.open(io.BytesIO(content)))

    pictures = await asyncio.gather(*map(fetch, range(_CHECKED)))
    alone = [np.asarray(generator(labels=[seed % 10], seed=seed).images[0]) for seed in range(_CHECKED)]
    return sum(not np.array_equal(*pair) for pair in zip(pictures, alone, strict=True))


def bare_images_per_second(generator: pf.Generator, batch: int, seconds: float) -> float:
    """Images of batches without a server."""
    began, made = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        generator(labels=[i % 10 for i in range(batch)], seed=made, output="numpy")
        made += batch
    return made / (time.perf_counter() - began)


def measure_throughput(port: int, generator: pf.Generator, options) -> dict:
    """Images per second, bare and served, in turn."""
    rounds = []
    for _ in range(options.rounds):
        bare = bare_images_per_second(generator, options.batch, options.seconds)
        callers = 2 * options.batch // options.images
        load = asyncio.run(press(port, callers, seconds=options.seconds, images=options.images))
        rounds.append({"bare": bare, "served": load.images_per_second, "p99_ms": _percentile(load, 99)})
    return {
        **{name: median(each[name] for each in rounds) for name in rounds[0]},
        "ratio": median(each["served"] / each["bare"] for each in rounds),
    }


def measure_overload(port: int, options) -> dict:
    """Latency of what is answered while more callers ask than may wait."""
    load = asyncio.run(press(port, 3 * options.waiting, seconds=2 * options.seconds))
    bound = (options.waiting + 2 * options.batch) / load.images_per_second
    return {
        "callers": 3 * options.waiting,
        "answered": load.statuses[200],
        "refused": load.statuses[429],
        "others": sum(load.statuses.values()) - load.statuses[200] - load.statuses[429],
        "p50_ms": _percentile(load, 50),
        "p99_ms": _percentile(load, 99),
        "bound_ms": bound * 1000,
    }


def measure_growth(port: int, options) -> dict:
    """Memory and open files of the server before and after many requests."""
    before = asyncio.run(read_process(port))
    load = asyncio.run(press(port, 2 * options.batch, requests=options.requests))
    after = asyncio.run(read_process(port))
    grown = {name: after[name] - before[name] for name in before}
    return {"requests": sum(load.statuses.values()), "before": before, "grown": grown}


def _percentile(load: Load, share: float) -> float:
    return float(np.percentile(load.seconds, share)) * 1000


def _make_large(folder: Path) -> str:
    from benchmarks.networks import LARGE, student_of, teacher_of, write_bundle

    return str(write_bundle(student_of(teacher_of(LARGE)), folder / "large"))


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument("bundle", help="a bundle with classes, digits, or large")
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--images", type=int, default=1, help="of a request, where throughput is measured")
    options.add_argument("--waiting", type=int, default=64, help="images that may wait")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=4.0, help="of each side of a round")
    options.add_argument("--requests", type=int, default=10_000)
    options.add_argument("--allowed", type=float, default=5.0, help="MB")
    options = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bundle = _make_large(Path(folder)) if options.bundle == "large" else options.bundle
        limits = ["--max-batch", str(options.batch), "--max-waiting", str(options.waiting)]
        with serving(bundle, *limits) as port, pf.load(bundle) as generator:
            wrong = asyncio.run(count_wrong_pictures(port, generator))
            asyncio.run(press(port, 2 * options.batch, requests=min(1000, options.requests)))  # a warm-up
            found = {
                "throughput": measure_throughput(port, generator, options),
                "overload": measure_overload(port, options),
                "growth": measure_growth(port, options),
            }
    grew = (
        found["growth"]["grown"]["resident_mb"] > options.allowed
        or found["growth"]["grown"]["open_files"] > 2
    )
    asked = {"batch": options.batch, "images_per_request": options.images}
    answer(options, {**asked, "load_average": os.getloadavg(), "wrong_pictures": wrong, **found})
    sys.exit(int(bool(wrong or grew)))


if __name__ == "__main__":
    main()
