"""How fast, how large, how warm: bundles measured in every engine, precision, number of calls, substeps and batch.

Warm figures come from one process, in which all contenders take turns, so that a slow spell of the machine hits all.
Cold starts and memory come from processes of their own (`cold_start`), several for each contender.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.manifest import guidance_trained_with
from piflow_edge.engines import ENGINES
from piflow_edge.errors import BundleError, EngineError, EngineNotBuiltError, MissingExtraError
from piflow_edge.runtime.loading import load
from piflow_edge.system.files import sha256
from piflow_edge.system.hardware import machine, power_state

from .cold_start import cold_start
from .config import ALL_ENGINES, DEFAULT_CONFIG, BenchConfig, TeacherConfig
from .lineup import LineupEntry, line_up_students, line_up_teacher
from .rounds import summarize_row, time_rounds, time_waiting_rounds
from .rows import Benchmark

LeftOut = Mapping[str, str]


def bench(
    bundles: Sequence[Path], config: BenchConfig = DEFAULT_CONFIG, teacher: TeacherConfig | None = None
) -> Benchmark:
    """Measure bundles and, if it is given, their teacher.

    Raises:
        EngineError, MissingExtraError: no such engine, or a named one cannot run here; or, of all, none can.
        BundleError: a bundle cannot be read, or has no such precision.
        ScheduleError: calls or substeps that make no sense.
    """
    if not bundles:
        raise BundleError("give one bundle or more to measure")
    opened = [Bundle(folder) for folder in bundles]
    if len({bundle.name for bundle in opened}) < len(opened):
        raise BundleError(
            f"bundles are told apart by name; got {', '.join(b.name for b in opened)}; export with --name"
        )
    contenders, left_out = _open_students(opened, config)
    scale = None
    if teacher is not None:
        scale = teacher.guidance_scale
        scale = distilled_guidance(opened[0]) if scale is None else scale
        teachers, not_built = _open_teachers(opened[0], contenders, config, teacher, scale)
        contenders, left_out = contenders + teachers, left_out + not_built
    contenders = list({contender.setting.key: contender for contender in contenders}.values())  # named twice
    before = _read_state()
    timed, pulse = time_rounds(contenders, config)
    waited = time_waiting_rounds(contenders, len(pulse) - config.warmup)
    cold = [
        [cold_start(one.child, device=one.setting.device) for _ in range(config.cold_starts)]
        for one in contenders
    ]
    rows = [summarize_row(*each, config.warmup) for each in zip(contenders, timed, waited, cold, strict=True)]
    conditions = {
        **machine(),
        "bundles": {bundle.name: _identify_bundle(bundle) for bundle in opened},
        "teacher": None if teacher is None else _identify_teacher(teacher, scale),
        "timed": "conditioning to uint8 images, in one process, all contenders in turn, each round in a new order",
        "split": "of these rounds; of a GPU's queue, of rounds of their own that wait at the end of every stage",
        "rounds": len(pulse) - config.warmup,
        "warmup": config.warmup,
        "cold_starts": config.cold_starts,
        "seed": config.seed,
        "options": asdict(config.options),
        "before": before,
        "after": _read_state(),
    }
    return Benchmark(rows, pulse[config.warmup :], conditions, left_out)


def _open_students(bundles: Sequence[Bundle], config: BenchConfig) -> tuple[list[LineupEntry], list[LeftOut]]:
    """Open every bundle in every engine and precision; of "all" engines, leave out those that do not run here."""
    contenders: list[LineupEntry] = []
    left_out: list[LeftOut] = []
    every = ALL_ENGINES in config.engines
    for bundle, engine in itertools.product(bundles, ENGINES if every else config.engines):
        for precision in config.precisions or bundle.manifest.precisions:
            bundle.precision(precision)  # a wrong name is an error, whatever runs here
            where = {"engine": engine, "precision": precision}
            try:
                generator = load(bundle.folder, device=config.device, options=config.options, **where)
            except (EngineError, MissingExtraError) as error:
                if not every:
                    raise
                left_out.append({"model": bundle.name, **where, "why": str(error)})
            else:
                contenders += line_up_students(generator, config)
    if not contenders:
        raise EngineError(
            "no engine runs here: " + "; ".join(f"{one['engine']}: {one['why']}" for one in left_out)
        )
    return contenders, left_out


def _open_teachers(
    bundle: Bundle,
    students: Sequence[LineupEntry],
    config: BenchConfig,
    teacher: TeacherConfig,
    scale: float,
) -> tuple[list[LineupEntry], list[LeftOut]]:
    """Open the teacher in every engine that runs a student; leave out those that would be built of it first."""
    contenders: list[LineupEntry] = []
    left_out: list[LeftOut] = []
    for engine, device in dict.fromkeys((c.setting.engine, c.setting.device) for c in students):
        try:
            contenders += line_up_teacher(bundle, engine, device, config, teacher, scale)
        except EngineNotBuiltError as error:  # what is built ahead is built of bundles
            left_out.append({"model": "teacher", "engine": engine, "precision": "fp32", "why": str(error)})
    if not contenders:
        raise EngineError(
            "no engine that runs the students runs the teacher; give --engine ort-cuda or ort-cpu"
        )
    return contenders, left_out


def distilled_guidance(bundle: Bundle) -> float:
    """Return the guidance scale of the teacher that a student was distilled from; 1 where the bundle does not say."""
    scale = guidance_trained_with(bundle.manifest)
    return 1.0 if scale is None else scale


def _identify_bundle(bundle: Bundle) -> dict:
    provenance = bundle.manifest.provenance
    return {
        "folder": bundle.folder.resolve().name,
        "sha256": sha256(bundle.manifest_bytes),
        "latent": list(bundle.manifest.latent.shape),
        "precision": bundle.manifest.precisions[0],
        "substeps": bundle.manifest.schedule.total_substeps,
        "parameters": provenance.get("parameters"),
    }


def _identify_teacher(teacher: TeacherConfig, scale: float | None) -> dict:
    return {"sha256": sha256(teacher.file.read_bytes()), "steps": teacher.steps, "guidance_scale": scale}


def _read_state() -> dict:
    """Return what else keeps the machine busy, and its clocks and power."""
    load_average = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
    return {"load": load_average, "power": power_state()}
