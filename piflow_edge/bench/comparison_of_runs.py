"""Two runs of `bench`, side by side: what moved beyond noise, and what was not alike when they were measured.

Noise is judged from the rounds. Those of each run are drawn anew, in stretches, for a slow spell covers several rounds;
the medians' ratio over many such draws has an interval. A setting moved if 1 lies outside it, and if it moved by more
than two processes with the same work differ, which the rounds of one process cannot show: the fresh processes do, in
which both runs measured their cold starts.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from piflow_edge.errors import DataError

from .rows import FORMAT

# Level of the interval: with 95 % every twentieth setting would have moved by chance.
_LEVEL = 0.99
_DRAWS = 2000
# How far two processes differ where too few were measured to tell: 95 % of pairs did by less, of calls of about 1 ms on
# two cores of a virtual machine (benchmarks/results/noise.json).
PROCESS_NOISE = 0.2
# Fewer deviations say too little of how far processes differ.
_MIN_DEGREES = 4
# Of the standard normal distribution, for `_LEVEL`.
_Z = 2.576

# Conditions of a run that say nothing of how fast the machine is.
_UNLIKE_ANYWAY = ("before.load", "after.load", "before.power.cpu_mhz", "after.power.cpu_mhz")


@dataclass(frozen=True)
class Change:
    """One setting in both runs. `ratio`: new median over old; `low`, `high`: its interval. `verdict`: "slower",
    "faster" or "within noise"."""

    key: str
    old: float
    new: float
    ratio: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """`machine`: of the machine's pulse; where that moved, so did all. `differs`: condition, old, new.

    `process_noise`: what a ratio must differ from 1 by; `measured`: whether the runs' fresh processes say so, or it is
    assumed.

    `only_old`, `only_new`: settings that the other run lacks.
    """

    changes: Sequence[Change]
    machine: Change
    process_noise: float
    measured: bool
    differs: Sequence[tuple[str, object, object]]
    only_old: Sequence[str]
    only_new: Sequence[str]

    def as_json(self) -> dict:
        """For other programs."""
        return asdict(self)


def read_benchmark(file: Path) -> dict:
    """What `bench --json` wrote.

    Raises:
        DataError: another file.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as the JSON of piflow-edge bench: {error}") from error
    if not (isinstance(found, dict) and found.get("format") == FORMAT and _is_whole(found)):
        raise DataError(f"{file} is not what piflow-edge bench --json of this version writes")
    return found


def _is_whole(found: Mapping) -> bool:
    """Whether all is there that `compare` reads: an editor or another program may have had it."""
    rows = found.get("rows")
    return (
        isinstance(found.get("conditions"), dict)
        and isinstance(rows, list)
        and all(isinstance(row, dict) and isinstance(row.get("key"), str) for row in rows)
        and all(map(_are_times, [found.get("machine_rounds"), *(row.get("rounds") for row in rows)]))
        and all(_are_times(row["processes"]) for row in rows if row.get("processes", []) != [])
    )


def _are_times(rounds: object) -> bool:
    return (
        isinstance(rounds, list)
        and bool(rounds)
        and all(isinstance(ms, int | float) and 0 < ms < float("inf") for ms in rounds)
    )


def compare(old: Mapping, new: Mapping) -> Comparison:
    """Set `new` beside `old`, both as `Benchmark.as_json` gives them."""
    before, after = ({row["key"]: row for row in run["rows"]} for run in (old, new))
    measured_noise = process_noise([before[key] for key in before if key in after] + [*after.values()])
    noise = PROCESS_NOISE if measured_noise is None else measured_noise
    changes = [
        _change(key, before[key]["rounds"], row["rounds"], noise)
        for key, row in after.items()
        if key in before
    ]
    conditions = [_flat(run["conditions"]) for run in (old, new)]
    names = [name for name in dict.fromkeys([*conditions[0], *conditions[1]]) if name not in _UNLIKE_ANYWAY]
    pairs = [(name, *(c.get(name) for c in conditions)) for name in names]
    return Comparison(
        changes,
        _change("the machine's pulse", old["machine_rounds"], new["machine_rounds"], noise),
        noise,
        measured_noise is not None,
        [(name, was, now) for name, was, now in pairs if was != now],
        [key for key in before if key not in after],
        [key for key in after if key not in before],
    )


def process_noise(rows: Sequence[Mapping]) -> float | None:
    """How far the medians of two processes with the same work differ at most, by 99 %; None if too few were measured.

    From the medians that the fresh processes of each row tell: their logarithms are taken for normal, with one spread.
    """
    logs = [np.log(row["processes"]) for row in rows if len(row.get("processes", ())) > 1]
    degrees = sum(len(one) - 1 for one in logs)
    if degrees < _MIN_DEGREES:
        return None
    spread = math.sqrt(sum(float(((one - one.mean()) ** 2).sum()) for one in logs) / degrees)
    return math.expm1(_t(degrees) * math.sqrt(2) * spread)


def _t(degrees: int) -> float:
    """Student's t for `_LEVEL`, to 2 % from 4 degrees of freedom on. Source: Abramowitz & Stegun, 26.7.5."""
    z = _Z
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def _change(key: str, old: Sequence[float], new: Sequence[float], noise: float) -> Change:
    random = np.random.default_rng(0)
    medians = [_medians(np.asarray(rounds), random) for rounds in (old, new)]
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(medians[1] / medians[0], [tail, 100 - tail]).tolist()
    was, now = float(np.median(old)), float(np.median(new))
    verdict = "within noise"
    if low > 1 and now / was > 1 + noise:
        verdict = "slower"
    elif high < 1 and was / now > 1 + noise:
        verdict = "faster"
    return Change(key, was, now, now / was, low, high, verdict)


def _medians(rounds: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Medians of as many draws, each of stretches of rounds that are put together to the length of the run.

    Source: the circular block bootstrap, Politis & Romano 1992; a length of n^(1/3) is the usual order.
    """
    count = len(rounds)
    length = max(1, round(count ** (1 / 3)))
    starts = random.integers(count, size=(_DRAWS, -(-count // length)))
    places = (starts[..., None] + np.arange(length)) % count
    return np.median(rounds[places.reshape(_DRAWS, -1)[:, :count]], axis=1)


def _flat(conditions: Mapping, prefix: str = "") -> dict[str, object]:
    """Nested conditions by their dotted names."""
    found: dict[str, object] = {}
    for name, value in conditions.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
