"""Timing in turns: every contender once a round, in a new order each, with the machine's own pulse beside it."""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from piflow_edge.runtime.drawing.stopwatch import STAGES
from piflow_edge.system.progress import progress

from .config import BenchConfig
from .lineup import LineupEntry
from .rows import Row

_MIN_ROUNDS = 5
# In which a GPU is waited for at the end of every stage.
_MOST_WAITING_ROUNDS = 20


def time_rounds(
    contenders: Sequence[LineupEntry], config: BenchConfig
) -> tuple[list[list[Mapping]], list[float]]:
    """Return every contender's timings, round by round with the warm-up first, and the machine's pulse."""
    order, random = list(range(len(contenders))), np.random.default_rng(config.seed)
    timed: list[list[Mapping]] = [[] for _ in contenders]
    pulse: list[float] = []
    began = math.inf
    total = config.warmup + config.rounds
    with progress("timing", total) as bar:
        for done in range(total):
            if done == config.warmup:
                began = time.perf_counter()
            enough = done - config.warmup >= min(_MIN_ROUNDS, config.rounds)
            if enough and time.perf_counter() - began > config.seconds:
                break
            random.shuffle(order)  # what ran before leaves its mark on caches and clock
            for i in order:
                timed[i].append(_time_call(contenders[i].draw))
            pulse.append(_time_machine())
            bar("")
    return timed, pulse


def _time_call(draw: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
    start = time.perf_counter()
    stages = draw()
    return {**stages, "total": 1000 * (time.perf_counter() - start)}


def time_waiting_rounds(contenders: Sequence[LineupEntry], rounds: int) -> list[list[Mapping]]:
    """Return timings of rounds that wait for the GPU after every stage; none for contenders that need no such ones."""
    timed: list[list[Mapping]] = [[] for _ in contenders]
    for _ in range(min(rounds, _MOST_WAITING_ROUNDS)):
        for contender, found in zip(contenders, timed, strict=True):
            if contender.waiting is not None:
                found.append(_time_call(contender.waiting))
    return timed


def _time_machine() -> float:
    """Return milliseconds of the same small piece of NumPy every time, on one core and within its cache."""
    values = np.linspace(0, 1, 1 << 14, dtype=np.float32)
    start = time.perf_counter()
    for _ in range(32):
        np.exp(values)
    return 1000 * (time.perf_counter() - start)


def summarize_row(
    contender: LineupEntry,
    timed: Sequence[Mapping],
    waited: Sequence[Mapping],
    cold: Sequence[Mapping],
    warmup: int,
) -> Row:
    """Put together a row from a contender's timings and what its fresh processes said."""
    rounds = [stages["total"] for stages in timed[warmup:]]
    staged = waited or timed[warmup:]
    split = {s: float(np.median([t[s] for t in staged])) for s in STAGES if s in staged[-1]}
    rest = [stages["total"] - sum(stages.get(s, 0.0) for s in STAGES) for stages in staged]
    split["other"] = float(np.median(rest))
    p90, p99 = np.percentile(rounds, [90, 99]).tolist()
    return Row(
        contender.setting,
        float(np.median(rounds)),
        p90,
        p99,
        1000 * contender.setting.batch * len(rounds) / sum(rounds),
        split,
        rounds,
        [stages["total"] for stages in timed[:warmup]],
        contender.trained,
        _find_medians(cold),
        [one["warm"] for one in cold],
    )


def _find_medians(found: Sequence[Mapping[str, float | None]]) -> dict[str, float | None] | None:
    """Return the median of every figure over the processes; None where one did not tell, or there was no process."""
    medians: dict[str, float | None] = {}
    for name in found[0] if found else ():
        values = [value for one in found if (value := one[name]) is not None]
        medians[name] = float(np.median(values)) if len(values) == len(found) else None
    return medians or None
