"""How fast, how large, how warm: bundles measured in every engine, precision, number of calls, substeps and batch.

Warm figures come from one process, in which all contenders take turns, so that a slow spell of the machine hits all.
Cold starts and memory come from processes of their own (`cold_start`), several for each contender.
"""

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.manifest import guidance_trained_with
from piflow_edge.engines import (
    DEFAULT_OPTIONS,
    ENGINE_NAMES,
    ENGINES,
    EngineOptions,
    open_engine,
    read_graph_file,
)
from piflow_edge.errors import BundleError, EngineError, EngineNotBuiltError, MissingExtraError, ScheduleError
from piflow_edge.noise import philox_normal
from piflow_edge.runtime.arguments import check_whole
from piflow_edge.runtime.drawing.stopwatch import STAGES
from piflow_edge.runtime.loading import load
from piflow_edge.runtime.teacher_engine import EngineTeacher
from piflow_edge.system.files import sha256
from piflow_edge.system.hardware import machine, power_state
from piflow_edge.system.progress import progress

from .cold_start import build_example, cold_start

FORMAT = 1  # of the JSON; `bench_compare` reads it
_MIN_ROUNDS = 5
# In which a GPU is waited for at the end of every stage.
_MOST_WAITING_ROUNDS = 20
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

    engines: Sequence[str] = ("auto",)
    precisions: Sequence[str] | None = None
    nfes: Sequence[int] | None = None
    substeps: Sequence[int] | None = None
    batches: Sequence[int] = (1,)
    rounds: int = 100
    warmup: int = 5
    seconds: float = 120.0
    cold_starts: int = 3
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
        for name, least in {"rounds": 1, "warmup": 0, "cold_starts": 0}.items():
            check_whole(name, getattr(self, name), least)
        for name in ("nfes", "substeps", "batches"):
            for value in getattr(self, name) or ():
                check_whole(f"each of {name}", value, 1)


@dataclass(frozen=True)
class TeacherConfig:
    """The baseline. `file`: its graph, as `export --teacher-graph` writes it. `steps`: Euler steps, each one call.

    `guidance_scale`: None is what the first bundle was distilled with; above 1 every call is of two samples per image.
    """

    file: Path
    steps: int = 50
    guidance_scale: float | None = None

    def __post_init__(self):
        if not self.file.is_file():
            raise EngineError(f"a teacher is a graph in a file; there is none at {self.file}")
        check_whole("steps", self.steps, 1)


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
        """For `bench_compare` and other programs."""
        return {
            "format": FORMAT,
            "conditions": dict(self.conditions),
            "rows": [row.as_json() for row in self.rows],
            "machine_rounds": list(self.machine_rounds),
            "left_out": list(self.left_out),
        }


@dataclass(frozen=True)
class _Contender:
    """`draw`: makes one batch of images and says how many ms each stage took. `child`: for `cold_start`.

    `waiting`: as `draw`, waiting for the GPU at the end of every stage; None where `draw` waits anyway.
    """

    setting: Setting
    draw: Callable[[], Mapping[str, float]]
    child: Mapping
    trained: bool = True
    waiting: Callable[[], Mapping[str, float]] | None = None


def bench(
    bundles: Sequence[Path], config: BenchConfig = BenchConfig(), teacher: TeacherConfig | None = None
) -> Benchmark:
    """Measure bundles and, if it is given, their teacher.

    Raises:
        EngineError, MissingExtraError: no such engine, or a named one cannot run here; or, of all, none can.
        BundleError: a bundle cannot be read, or has no such precision.
        ScheduleError: calls or substeps that make no sense.
    """
    if not bundles:
        raise BundleError("give one bundle or more to measure")
    contenders: list[_Contender] = []
    left_out: list[dict[str, str]] = []
    opened = [Bundle(folder) for folder in bundles]
    if len({bundle.name for bundle in opened}) < len(opened):
        raise BundleError(
            f"bundles are told apart by name; got {', '.join(b.name for b in opened)}; export with --name"
        )
    wanted = ENGINES if ALL_ENGINES in config.engines else config.engines
    for bundle, engine in itertools.product(opened, wanted):
        for precision in config.precisions or bundle.manifest.precisions:
            bundle.precision(precision)  # a wrong name is an error, whatever runs here
            try:
                generator = load(
                    bundle.folder,
                    engine=engine,
                    precision=precision,
                    device=config.device,
                    options=config.options,
                )
            except (EngineError, MissingExtraError) as error:
                if ALL_ENGINES not in config.engines:
                    raise
                left_out.append(
                    {"model": bundle.name, "engine": engine, "precision": precision, "why": str(error)}
                )
                continue
            contenders += _students(generator, config)
    if not contenders:
        raise EngineError(
            "no engine runs here: " + "; ".join(f"{one['engine']}: {one['why']}" for one in left_out)
        )
    scale = None
    if teacher is not None:
        scale = teacher.guidance_scale
        scale = distilled_guidance(opened[0]) if scale is None else scale
        engines = dict.fromkeys((c.setting.engine, c.setting.device) for c in contenders)
        students = len(contenders)
        for engine, device in engines:
            try:
                contenders += _teachers(opened[0], engine, device, config, teacher, scale)
            except EngineNotBuiltError as error:  # what is built ahead is built of bundles
                left_out.append(
                    {"model": "teacher", "engine": engine, "precision": "fp32", "why": str(error)}
                )
        if len(contenders) == students:
            raise EngineError(
                "no engine that runs the students runs the teacher; give --engine ort-cuda or ort-cpu"
            )
    contenders = list({contender.setting.key: contender for contender in contenders}.values())  # named twice
    before = {"load": _load(), "power": power_state()}
    timed, pulse = _rounds(contenders, config)
    waited = _waiting_rounds(contenders, len(pulse) - config.warmup)
    cold = [_cold(contender, config) for contender in contenders]
    conditions = {
        **machine(),
        "bundles": {bundle.name: _identity(bundle) for bundle in opened},
        "teacher": None if teacher is None else _teacher_identity(teacher, scale),
        "timed": "conditioning to uint8 images, in one process, all contenders in turn, each round in a new order",
        "split": "of these rounds; of a GPU's queue, of rounds of their own that wait at the end of every stage",
        "rounds": len(pulse) - config.warmup,
        "warmup": config.warmup,
        "cold_starts": config.cold_starts,
        "seed": config.seed,
        "options": asdict(config.options),
        "before": before,
        "after": {"load": _load(), "power": power_state()},
    }
    rows = [_row(*each, config.warmup) for each in zip(contenders, timed, waited, cold, strict=True)]
    return Benchmark(rows, pulse[config.warmup :], conditions, left_out)


def distilled_guidance(bundle: Bundle) -> float:
    """Guidance scale of the teacher that a student was distilled from; 1 where the bundle does not say."""
    scale = guidance_trained_with(bundle.manifest)
    return 1.0 if scale is None else scale


def _students(generator, config: BenchConfig) -> list[_Contender]:
    bundle, engine = generator.bundle, generator.engine
    trained = bundle.manifest.schedule
    nfes, substeps = config.nfes or generator.trained_nfes, config.substeps or [trained.total_substeps]
    found = []
    for nfe, steps, batch in itertools.product(nfes, substeps, config.batches):
        trained.schedule(
            nfe=nfe, total_substeps=steps
        )  # refuses what makes no sense before anything is timed
        request = {"nfe": nfe, "substeps": steps, "seed": config.seed}
        request["output"] = "numpy" if bundle.manifest.makes_images else "latent"
        example = build_example(generator.conditioner, batch)

        def draw(request=request, example=example, **how):
            return generator(**example, **request, **how).timings

        queued = engine.device.partition(":")[0] == "cuda"
        waiting = partial(draw, synchronize=True) if queued else None
        setting = Setting(bundle.name, engine.name, engine.device, generator.precision, nfe, steps, batch)
        child = {**_child(bundle, setting, config), "request": request, "batch": batch}
        found.append(_Contender(setting, draw, child, nfe in generator.trained_nfes, waiting))
    return found


def _teachers(bundle, engine: str, device: str, config: BenchConfig, teacher: TeacherConfig, scale: float):
    from piflow_edge.runtime.images import decode

    graph, conditioner = read_graph_file(teacher.file), bundle.manifest.conditioner
    guided = EngineTeacher(
        open_engine(graph, engine=engine, device=device, options=config.options), conditioner
    )
    latent, shift = bundle.manifest.latent, bundle.manifest.schedule.shift
    # Another graph, or one for other images, is better known before minutes of measuring.
    count = config.batches[0]
    guided.velocity(
        philox_normal(config.seed, range(count), latent.shape),
        1.0,
        conditioner.example(count),
        guidance_scale=scale,
    )
    for batch in config.batches:
        example = conditioner.example(batch)

        def draw(given=example, batch=batch):
            began = time.perf_counter()
            noise = philox_normal(config.seed, range(batch), latent.shape)
            drawn, before = time.perf_counter(), guided.network_seconds
            states = guided.sample(noise, given, teacher.steps, guidance_scale=scale, shift=shift)
            sampled, calls = time.perf_counter(), guided.network_seconds - before
            decode(states, latent)
            done = time.perf_counter()
            seconds = {"noise": drawn - began, "network": calls, "policy": sampled - drawn - calls,
                       "decode": done - sampled, "total": done - began}  # fmt: skip
            return {stage: 1000 * value for stage, value in seconds.items()}

        name = f"teacher, guidance {scale:g}"
        setting = Setting(name, engine, device, "fp32", teacher.steps, None, batch)
        child = {
            **_child(bundle, setting, config),
            "teacher": str(teacher.file),
            "batch": batch,
            "seed": config.seed,
            "shape": latent.shape,
            "shift": shift,
            "steps": teacher.steps,
            "guidance": scale,
            "conditioner": conditioner.to_json(),
        }
        yield _Contender(setting, draw, child)


def _child(bundle: Bundle, setting: Setting, config: BenchConfig) -> dict:
    return {
        "bundle": str(bundle.folder),
        "engine": setting.engine,
        "device": config.device,
        "options": asdict(config.options),
        "precision": setting.precision,
    }


def _rounds(contenders: Sequence[_Contender], config: BenchConfig) -> tuple[list[list[Mapping]], list[float]]:
    """Every contender's timings, round by round with the warm-up first, and the machine's pulse."""
    order, random = list(range(len(contenders))), np.random.default_rng(config.seed)
    timed: list[list[Mapping]] = [[] for _ in contenders]
    pulse: list[float] = []
    began = None
    total = config.warmup + config.rounds
    with progress("timing", total) as bar:
        for done in range(total):
            if done == config.warmup:
                began = time.perf_counter()
            enough = began is not None and done - config.warmup >= min(_MIN_ROUNDS, config.rounds)
            if enough and time.perf_counter() - began > config.seconds:
                break
            random.shuffle(order)  # what ran before leaves its mark on caches and clock
            for i in order:
                timed[i].append(_timed(contenders[i].draw))
            pulse.append(_pulse())
            bar()
    return timed, pulse


def _timed(draw: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
    start = time.perf_counter()
    stages = draw()
    return {**stages, "total": 1000 * (time.perf_counter() - start)}


def _waiting_rounds(contenders: Sequence[_Contender], rounds: int) -> list[list[Mapping]]:
    """Timings of rounds that wait for the GPU at the end of every stage; none for contenders that need no such ones."""
    timed: list[list[Mapping]] = [[] for _ in contenders]
    for _ in range(min(rounds, _MOST_WAITING_ROUNDS)):
        for contender, found in zip(contenders, timed, strict=True):
            if contender.waiting is not None:
                found.append(_timed(contender.waiting))
    return timed


def _pulse() -> float:
    """Milliseconds of the same small piece of NumPy every time, on one core and within its cache."""
    values = np.linspace(0, 1, 1 << 14, dtype=np.float32)
    start = time.perf_counter()
    for _ in range(32):
        np.exp(values)
    return 1000 * (time.perf_counter() - start)


def _row(
    contender: _Contender,
    timed: Sequence[Mapping],
    waited: Sequence[Mapping],
    cold: Sequence[Mapping],
    warmup: int,
) -> Row:
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
        _medians(cold),
        [one["warm"] for one in cold],
    )


def _cold(contender: _Contender, config: BenchConfig) -> list[dict[str, float | None]]:
    """What fresh processes tell; see `cold_start`."""
    return [cold_start(contender.child, device=contender.setting.device) for _ in range(config.cold_starts)]


def _medians(found: Sequence[Mapping[str, float | None]]) -> dict[str, float | None] | None:
    """Of every figure over the processes; None where one did not tell, or there was no process."""
    return {
        name: None
        if any(one[name] is None for one in found)
        else float(np.median([one[name] for one in found]))
        for name in (found[0] if found else ())
    } or None


def _identity(bundle: Bundle) -> dict:
    provenance = bundle.manifest.provenance
    return {
        "folder": bundle.folder.resolve().name,
        "sha256": sha256(bundle.manifest_bytes),
        "latent": list(bundle.manifest.latent.shape),
        "precision": bundle.manifest.precisions[0],
        "substeps": bundle.manifest.schedule.total_substeps,
        "parameters": provenance.get("parameters"),
    }


def _teacher_identity(teacher: TeacherConfig, scale: float) -> dict:
    return {"sha256": sha256(teacher.file.read_bytes()), "steps": teacher.steps, "guidance_scale": scale}


def _load() -> list[float] | None:
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
