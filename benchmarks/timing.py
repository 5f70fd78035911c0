"""What the benchmarks share: contenders that take turns, fitted exponents, and how an answer is given."""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from piflow_edge.files import write_atomic
from piflow_edge.hardware import machine, power_state


def time_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def rounds_of(
    calls: Mapping[str, Callable[[], object]], rounds: int, seconds: float = float("inf"), *, warmup: int = 0
) -> dict[str, list[float]]:
    """Times of every contender in ms: `rounds` of all, fewer once `seconds` are spent, but three or all."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    table: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(table) < min(3, rounds) or (len(table) < rounds and time.perf_counter() - start < seconds):
        # Shuffled, for what ran before leaves its mark on caches and clock.
        order = random.sample(list(calls), len(calls))
        table.append({name: time_ms(calls[name]) for name in order})
    return {name: [row[name] for row in table] for name in calls}


def medians_of(
    calls: Mapping[str, Callable[[], object]], rounds: int, *limits, **settings
) -> dict[str, float]:
    """Median ms of every contender; see `rounds_of`."""
    return {name: median(times) for name, times in rounds_of(calls, rounds, *limits, **settings).items()}


def exponent(sizes: Sequence[float], times: Sequence[float]) -> dict[str, float | None]:
    """p of times = a size^p, by least squares of the logarithms, with its 95 % interval; and of the last two alone.

    Two sizes have no interval. Where a fixed cost hides in the small sizes, p is below that of the large ones, which
    `last` shows.
    """
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(times, float))
    x = x - x.mean()
    slope = float((x * y).sum() / (x * x).sum())
    off = y - y.mean() - slope * x
    # Student's t for 95 %: 1 to 6 degrees of freedom.
    degrees = len(x) - 2
    t = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57}.get(degrees, 2.45)
    last = float((y[-1] - y[-2]) / (x[-1] - x[-2]))
    if not degrees:
        return {"exponent": slope, "low": None, "high": None, "last": last}
    wide = float(t * np.sqrt((off**2).sum() / degrees / (x * x).sum()))
    return {"exponent": slope, "low": slope - wide, "high": slope + wide, "last": last}


def parser(description: str) -> argparse.ArgumentParser:
    """With what every script takes."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, help="also write the JSON here")
    return made


def answer(options: argparse.Namespace, found: Mapping) -> None:
    """Print the conditions and what was found as one JSON line, and write it where `--out` says."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    whole = {"command": command, **machine(), "power": power_state(), **found}
    print(json.dumps(whole))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out, (json.dumps(whole, indent=1) + "\n").encode())
