"""What takes turns in a benchmark: students and their teacher, each as a call that makes one batch of images."""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from piflow_edge.bundle.folder import Bundle
from piflow_edge.conditioning import Arrays, Conditioner
from piflow_edge.engines import open_engine, read_graph_file
from piflow_edge.noise import philox_normal
from piflow_edge.runtime.generator import Generator
from piflow_edge.runtime.images import decode
from piflow_edge.runtime.teacher_engine import EngineTeacher

from .cold_start import build_example
from .config import BenchConfig, TeacherConfig
from .rows import Setting


@dataclass(frozen=True)
class LineupEntry:
    """One thing that is measured. `draw`: makes one batch of images and returns the ms of each stage.

    `child`: for `cold_start`.
    `waiting`: as `draw`, waiting for the GPU at the end of every stage; None where `draw` waits anyway.
    """

    setting: Setting
    draw: Callable[[], Mapping[str, float]]
    child: Mapping
    trained: bool = True
    waiting: Callable[[], Mapping[str, float]] | None = None


def line_up_students(generator: Generator, config: BenchConfig) -> list[LineupEntry]:
    """Make a measured thing of every number of calls, substeps and batch of an opened bundle."""
    bundle, engine = generator.bundle, generator.engine
    trained = bundle.manifest.schedule
    nfes, substeps = config.nfes or generator.trained_nfes, config.substeps or [trained.total_substeps]
    found = []
    for nfe, steps, batch in itertools.product(nfes, substeps, config.batches):
        trained.schedule(
            nfe=nfe, total_substeps=steps
        )  # refuses what makes no sense before anything is timed
        request: dict[str, Any] = {"nfe": nfe, "substeps": steps, "seed": config.seed}
        request["output"] = "numpy" if bundle.manifest.makes_images else "latent"
        example = build_example(generator.conditioner, batch)

        def draw(request=request, example=example, **how):
            return generator(**example, **request, **how).timings

        queued = engine.device.partition(":")[0] == "cuda"
        waiting = partial(draw, synchronize=True) if queued else None
        setting = Setting(bundle.name, engine.name, engine.device, generator.precision, nfe, steps, batch)
        child = {**_describe_child(bundle, setting, config), "request": request, "batch": batch}
        found.append(LineupEntry(setting, draw, child, nfe in generator.trained_nfes, waiting))
    return found


def line_up_teacher(
    bundle: Bundle, engine: str, device: str, config: BenchConfig, teacher: TeacherConfig, scale: float
) -> list[LineupEntry]:
    """Make a measured thing of the teacher for every batch, in one engine; it is steered as the bundle is.

    Raises:
        EngineError: the graph does not run there, or is another one.
    """
    conditioner, latent = fill_null(bundle.manifest.conditioner), bundle.manifest.latent
    opened = open_engine(read_graph_file(teacher.file), engine=engine, device=device, options=config.options)
    guided = EngineTeacher(opened, conditioner)
    # Another graph, or one for other images, is better known before minutes of measuring.
    count = config.batches[0]
    noise = philox_normal(config.seed, range(count), latent.shape)
    guided.velocity(noise, 1.0, conditioner.example(count), guidance_scale=scale)
    return [
        _measure_teacher(guided, bundle, engine, device, config, teacher, scale, n) for n in config.batches
    ]


def fill_null(conditioner: Conditioner) -> Conditioner:
    """Return what steers a teacher that is timed: where the bundle holds no "no condition", any numbers will do."""
    if conditioner.null(1) is not None or not conditioner.inputs:
        return conditioner
    return Arrays(conditioner.inputs, conditioner.example(1))


def _measure_teacher(guided, bundle, engine, device, config, teacher, scale, batch) -> LineupEntry:
    latent, shift = bundle.manifest.latent, bundle.manifest.schedule.shift
    given = guided.conditioner.example(batch)

    def draw() -> Mapping[str, float]:
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

    setting = Setting(f"teacher, guidance {scale:g}", engine, device, "fp32", teacher.steps, None, batch)
    child = {
        **_describe_child(bundle, setting, config),
        "teacher": str(teacher.file),
        "batch": batch,
        "seed": config.seed,
        "shape": latent.shape,
        "shift": shift,
        "steps": teacher.steps,
        "guidance": scale,
        "conditioner": guided.conditioner.to_json(),
    }
    return LineupEntry(setting, draw, child)


def _describe_child(bundle: Bundle, setting: Setting, config: BenchConfig) -> dict:
    return {
        "bundle": str(bundle.folder),
        "engine": setting.engine,
        "device": config.device,
        "options": asdict(config.options),
        "precision": setting.precision,
    }
