"""Does a process that makes many images grow? One JSON line answers.

After a warm-up, images are made in calls of all kinds a generator knows: one and several, from an image, inpainted,
with noise between calls, with a callback, from two threads, cancelled, and opened anew and closed. Resident memory,
threads and open files are read along the way; the exit status is 1 if memory grew by more than --allowed MB, or
anything else at all.

Run: python -m benchmarks.soak demo/bundles/digits-nfe2
"""

import gc
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import piflow_edge as pf
from benchmarks.timing import answer, parser


def resident_mb() -> float:
    """Of this process, now and not at its peak; Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def kinds(bundle: Path, options: pf.EngineOptions):
    """The calls, over and over: each makes 4 images, and returns nothing."""
    generator = pf.load(bundle, options=options)
    count, height, width = 4, *generator.bundle.manifest.latent.shape[-2:]
    latents = generator(**_build_call(generator, count), seed=1, output="latent").latents
    mask = np.arange(height * width).reshape(height, width) % 2 == 0
    threads = ThreadPoolExecutor(2)

    def half(seed):
        generator(**_build_call(generator, count // 2), seed=seed)

    def cancel_one(seed):
        cancel = threading.Event()
        cancel.set()
        try:
            generator(**_build_call(generator, count), seed=seed, cancel=cancel)
        except pf.Cancelled:
            generator(**_build_call(generator, count), seed=seed)

    def anew(seed):
        with pf.load(bundle, options=options) as other:
            other(**_build_call(generator, count), seed=seed)

    plain, one = _build_call(generator, count), _build_call(generator, 1)
    return [
        lambda seed: generator(**plain, seed=seed),
        lambda seed: [generator(**one, seed=seed + i, nfe=1 + i, output="numpy") for i in range(4)],
        lambda seed: generator(**plain, seed=seed, h=0.5, nfe=3, output="float"),
        lambda seed: generator(**plain, seed=seed, image=latents, strength=0.5),
        lambda seed: generator(**plain, seed=seed, image=latents, mask=mask, nfe=2, resamples=1),
        lambda seed: generator(**plain, seed=seed, callback=lambda done: done.x_0, callback_every=16),
        lambda seed: list(threads.map(half, (seed, seed + 1))),
        cancel_one,
        anew,
    ]  # fmt: skip


def _build_call(generator: pf.Generator, count: int) -> dict:
    conditioning = generator.conditioner.example(count)
    return {"arrays": conditioning} if conditioning else {"count": count}


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument("bundle", type=Path)
    options.add_argument("--images", type=int, default=2000)
    options.add_argument("--warmup", type=int, default=2000, help="images before; memory settles in them")
    options.add_argument("--allowed", type=float, default=1.0, help="MB; what the allocator leaves behind")
    options.add_argument("--threads", type=int, help="of the CPU; else one for each core")
    options = options.parse_args(arguments)
    if not Path("/proc/self/statm").exists():
        sys.exit("this reads memory and open files from /proc, which only Linux has")

    logging.getLogger("piflow_edge").setLevel(logging.ERROR)  # other calls than trained are wanted here
    calls = kinds(options.bundle, pf.EngineOptions(num_threads=options.threads))
    readings, done, turn = [], 0, 0
    while done < options.warmup + options.images:
        if done >= options.warmup and (done - options.warmup) // 250 >= len(readings):
            readings.append(_reading(done - options.warmup))
        calls[turn % len(calls)](turn)
        done, turn = done + 4, turn + 1
    readings.append(_reading(done - options.warmup))
    first, last = readings[0], readings[-1]
    grown = {key: last[key] - first[key] for key in ("resident_mb", "open_files", "threads")}
    grew = grown["resident_mb"] > options.allowed or grown["open_files"] > 0 or grown["threads"] > 0
    found = {
        "images": last["images"],
        "warmup": options.warmup,
        "grown": grown,
        "grew": grew,
        "readings": readings,
    }
    answer(options, found)
    sys.exit(int(grew))


def _reading(images: int) -> dict:
    gc.collect()
    return {
        "images": images,
        "resident_mb": round(resident_mb(), 2),
        "open_files": open_files(),
        "threads": threading.active_count(),
    }


if __name__ == "__main__":
    main()
