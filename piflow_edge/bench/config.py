"""What a benchmark measures: the settings that a caller gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from piflow_edge.engines import DEFAULT_OPTIONS, ENGINE_NAMES, EngineOptions
from piflow_edge.errors import EngineError, ScheduleError
from piflow_edge.option import find_options, option
from piflow_edge.runtime.arguments import check_whole

ALL_ENGINES = "all"


@dataclass(frozen=True)
class BenchConfig:
    """What is measured: every combination of the lists.

    `engines`: names, "auto", or "all" for whatever runs here. `precisions`, `nfes`, `substeps`: None is all precisions
    of each bundle, the calls it was trained for, its own substeps. `batches`: images in one call of the generator.
    `rounds`: timed calls of each contender, fewer once `seconds` are spent, but five. `warmup`: rounds before that.
    `cold_starts`: processes of each contender; 0 leaves out cold starts and memory. `device`, `options`: as in `load`.

    Raises:
        EngineError: no engine of that name.
        ScheduleError: a number out of range, or an empty list.
    """

    engines: Sequence[str] = option(("auto",), "Backends; all is every one that runs here.")
    precisions: Sequence[str] | None = option(None, "Else all of each bundle.")
    nfes: Sequence[int] | None = option(None, "Network calls per image; else as trained.", minimum=1)
    substeps: Sequence[int] | None = option(None, "Of the policy, in all; else the bundle's.", minimum=1)
    batches: Sequence[int] = option((1,), "Images at a time.", minimum=1)
    rounds: int = option(100, "Timed calls of each contender.", minimum=1)
    warmup: int = option(5, "Rounds before that.", minimum=0)
    seconds: float = option(120.0, "End the rounds after this time, but not before five.", minimum=0)
    cold_starts: int = option(3, "Fresh processes for first images and memory of each contender.", minimum=0)
    device: str | None = None
    options: EngineOptions = DEFAULT_OPTIONS
    seed: int = 0

    def __post_init__(self):
        for name in ("engines", "precisions", "nfes", "substeps", "batches"):
            values = getattr(self, name)
            listed = isinstance(values, Sequence) and not isinstance(values, str)
            if values is not None and not (listed and values):
                raise ScheduleError(f"{name} is a list of one or more; got {values!r}")
        for name in self.engines:  # beside "all" too, where no engine of that name would be looked for
            if name not in (ALL_ENGINES, *ENGINE_NAMES):
                raise EngineError(f"engine is one of {', '.join((ALL_ENGINES, *ENGINE_NAMES))}; got {name!r}")
        least = {name: int(limits.minimum or 0) for name, limits in find_options(self).items()}
        for name in ("rounds", "warmup", "cold_starts"):
            check_whole(name, getattr(self, name), least[name])
        for name in ("nfes", "substeps", "batches"):
            for value in getattr(self, name) or ():
                check_whole(f"each of {name}", value, least[name])


DEFAULT_CONFIG = BenchConfig()


@dataclass(frozen=True)
class TeacherConfig:
    """The baseline. `file`: its graph, as `export --teacher-graph` writes it. `steps`: Euler steps, each one call.

    `guidance_scale`: None is what the first bundle was distilled with; above 1 every call is of two samples per image.
    """

    file: Path
    steps: int = option(50, "Euler steps of the teacher.", minimum=1)
    guidance_scale: float | None = option(None, "Of the teacher; else the first bundle's.", minimum=1)

    def __post_init__(self):
        if not self.file.is_file():
            raise EngineError(f"a teacher is a graph in a file; there is none at {self.file}")
        check_whole("steps", self.steps, int(find_options(self)["steps"].minimum or 0))
