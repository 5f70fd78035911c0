"""What the benchmarks share: contenders that take turns, fitted growth, and how an answer is given."""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from piflow_edge.system.files import write_atomic
from piflow_edge.system.hardware import machine, power_state


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


def growth(sizes: Sequence[float], rounds: Sequence[Sequence[float]], *, draws: int = 200) -> dict:
    """How times grow with sizes: time = fixed + a size^p, fitted to medians of rounds, each size weighing alike.

    Without the fixed cost, which hides the growth of small sizes, p would be that of no size. Fewer than four sizes
    cannot tell both apart, and it is 0.

    Returns:
        `exponent`, p, with its 95 % interval from `low` to `high`, of as many fits to rounds drawn anew; `fixed`, in
        the unit of the times; `off`, the greatest share by which a median differs from the fit; `local`, the exponents
        between neighbours, which tell whether there is one p at all.
    """
    sizes = np.asarray(sizes, float)
    drawn, random = [], np.random.default_rng(0)
    for times in rounds:
        picks = random.integers(len(times), size=(draws, len(times)))
        drawn.append(np.median(np.asarray(times, float)[picks], axis=1))
    medians = np.array([np.median(times) for times in rounds])
    (p, fixed, a), *_ = _fits(sizes, medians[None])
    ps = [p for p, _, _ in _fits(sizes, np.transpose(drawn))]
    low, high = np.percentile(ps, [2.5, 97.5]).tolist()
    fit = fixed + a * (sizes / sizes[0]) ** p
    return {
        "exponent": p,
        "low": low,
        "high": high,
        "fixed": fixed,
        "off": float(np.abs(fit / medians - 1).max()),
        "local": (np.diff(np.log(medians)) / np.diff(np.log(sizes))).tolist(),
    }


def _fits(sizes: np.ndarray, times: np.ndarray) -> list[tuple[float, float, float]]:
    """(p, fixed, a) of every row of `times`: the best of a grid of p, for each of which least squares give the rest."""
    grid = np.arange(0.02, 3, 0.005)
    found = []
    for row in times:
        # Relative errors: 1 is to be fixed / time + a size^p / time.
        u, v = 1 / row, (sizes / sizes[0]) ** grid[:, None] / row
        uu, uv, vv = (u * u).sum(), v @ u, (v * v).sum(1)
        determinant = uu * vv - uv**2
        fixed = (vv * u.sum() - uv * v.sum(1)) / np.where(determinant > 0, determinant, np.inf)
        fixed = np.maximum(fixed, 0) if len(sizes) > 3 else np.zeros_like(grid)
        a = (v.sum(1) - fixed * uv) / vv
        error = ((fixed[:, None] * u + a[:, None] * v - 1) ** 2).sum(1)
        best = int(np.argmin(error))
        found.append((float(grid[best]), float(fixed[best]), float(a[best])))
    return found


def parser(description: str) -> argparse.ArgumentParser:
    """With what every script takes."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, help="also write the JSON here")
    return made


def answer(options: argparse.Namespace, found: Mapping) -> None:
    """Print the conditions and what was found as one JSON line, and write it where `--out` says."""
    command = " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    whole = {"command": command, **machine(), "power": power_state(), **found}
    print(json.dumps(whole))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out, (json.dumps(whole, indent=1) + "\n").encode())
