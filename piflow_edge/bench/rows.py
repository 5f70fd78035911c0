"""What a benchmark found: one row of figures per setting, and the conditions."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

FORMAT = 1  # of the JSON; `comparison_of_runs` reads it


@dataclass(frozen=True)
class Setting:
    """What is timed. `calls`: of the network per image, in a batch. `substeps`: None for a teacher."""

    model: str
    engine: str
    device: str
    precision: str
    calls: int
    substeps: int | None
    batch: int

    @property
    def key(self) -> str:
        """The setting in words, which tells it from all others of a run."""
        calls = f"{self.calls} call{'s' if self.calls > 1 else ''}"
        policy = [] if self.substeps is None else [f"{self.substeps} substeps"]
        return ", ".join([self.model, self.engine, self.precision, calls, *policy, f"batch {self.batch}"])


@dataclass(frozen=True)
class Row:
    """One setting's figures; times in ms.

    `median`, `p90`, `p99`: of `rounds`, a call of the generator each: conditioning in, uint8 images out.
    `images_per_second`: over all rounds. `split`: median of every stage; "other" is the rest of the call; on an NVIDIA
    GPU of rounds that wait for it at the end of every stage, which sum up to more than the median. `warmup`: the rounds
    before. `trained`: False for a student that runs with calls it was not trained for. `cold`: see `cold_start`;
    medians of the processes, of whose warm calls `processes` has each one's median.
    """

    setting: Setting
    median: float
    p90: float
    p99: float
    images_per_second: float
    split: Mapping[str, float]
    rounds: Sequence[float]
    warmup: Sequence[float]
    trained: bool
    cold: Mapping[str, float | None] | None
    processes: Sequence[float]

    def as_json(self) -> dict:
        """All of it, with the setting's fields among the others."""
        figures = asdict(self)
        return {"key": self.setting.key, **figures.pop("setting"), **figures}


@dataclass(frozen=True)
class Benchmark:
    """What a run found. `machine_rounds`: ms of a fixed piece of NumPy in every round, the machine's pulse.

    `left_out`: what "all" engines could not run, or a teacher's graph that is not built, and why.
    """

    rows: Sequence[Row]
    machine_rounds: Sequence[float]
    conditions: Mapping
    left_out: Sequence[Mapping[str, str]] = field(default=())

    def as_json(self) -> dict:
        """For `comparison_of_runs` and other programs."""
        return {
            "format": FORMAT,
            "conditions": dict(self.conditions),
            "rows": [row.as_json() for row in self.rows],
            "machine_rounds": list(self.machine_rounds),
            "left_out": list(self.left_out),
        }
