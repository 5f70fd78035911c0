"""What an evaluation compares: students, and a teacher in so many steps, each as a way from noise to images.

All their networks run in the same engine.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from piflow_edge.bundle.manifest import guidance_trained_with
from piflow_edge.engines import Graph, open_engine
from piflow_edge.errors import DataError
from piflow_edge.runtime.generator import Generator
from piflow_edge.runtime.teacher_engine import EngineTeacher

# Rounds of one image each that the time per image is the median of, all contenders in turn: so many, or as many as fit
# into so many seconds, but never fewer than three.
_TIMED_ROUNDS = 15
_TIMED_SECONDS = 60.0


@dataclass(frozen=True)
class Contender:
    """Something that makes images.

    `sample`: (noise (B, C, H, W), labels (B,), seeds of the noise) -> images float32 (B, C, H, W), -1 to 1 or about.
    """

    name: str
    network_calls: int
    sample: Callable[[np.ndarray, np.ndarray, list[tuple[int, int]]], np.ndarray]


def unique_names(paths: Sequence[Path]) -> list[str]:
    """The last part of every path, and as many before it as it takes to tell them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise DataError("every student is scored once; one was given twice")
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def common_guidance(generators: dict[str, Generator]) -> float:
    """Guidance scale of the teacher that all students were distilled from; 1 without any that records it."""
    recorded = {name: guidance_trained_with(g.bundle.manifest) for name, g in generators.items()}
    scales = {name: scale for name, scale in recorded.items() if scale is not None}
    if len(set(scales.values())) > 1:
        raise DataError(
            f"the students' teachers were guided differently ({scales}); give --guidance for the comparison"
        )
    return next(iter(scales.values()), 1.0)


def teacher_contenders(
    checkpoint, guidance_scale: float, steps: Sequence[int], decoder: Generator | None = None
) -> list[Contender]:
    """The teacher in so many Euler steps each; `decoder`: a student whose decoder makes images of its latents."""
    velocity_steps = teacher_sampler(checkpoint, guidance_scale)

    def sample(noise, labels, n):
        latents = velocity_steps(noise, labels, n)
        return latents if decoder is None else images_of(decoder, latents)

    return [
        Contender(
            f"teacher, {n} step{'s' if n > 1 else ''}",
            n,
            lambda noise, labels, seeds, n=n: sample(noise, labels, n),
        )
        for n in steps
    ]


def teacher_sampler(checkpoint, guidance_scale: float) -> Callable:
    """`(noise, labels, steps) -> images` by Euler steps of the guided teacher, its network in the runtime's engine."""
    from piflow_edge.distill.sources import network_of
    from piflow_edge.export.to_onnx import export_network

    network = network_of(checkpoint)
    engine = open_engine(Graph(export_network(network)))
    teacher = EngineTeacher(engine, guidance_scale, network.num_classes)

    def sample(noise, labels, steps):
        pieces = [slice(start, start + 250) for start in range(0, len(noise), 250)]
        return np.concatenate([teacher.sample(noise[p], labels[p], steps) for p in pieces])

    return sample


def student_contenders(name: str, generator: Generator) -> list[Contender]:
    """A bundle as a contender, or as several if it was trained for several numbers of calls."""
    noisy = generator.bundle.manifest.schedule.h != 0

    def sample(noise, labels, seeds, nfe):
        # A schedule that draws noise between calls wants the seeds, which make the same starting noise.
        start = {"seed": seeds} if noisy else {"noise": noise}
        made = generator(labels=labels.tolist(), output="latent", nfe=nfe, **start)
        return images_of(generator, made.latents)

    several = len(generator.trained_nfes) > 1
    return [
        Contender(
            f"{name}, {nfe} call{'s' if nfe > 1 else ''}" if several else name,
            nfe,
            lambda noise, labels, seeds, nfe=nfe: sample(noise, labels, seeds, nfe),
        )
        for nfe in generator.trained_nfes
    ]


def images_of(generator: Generator, latents: np.ndarray) -> np.ndarray:
    """Images float32 (B, C, H, W) of latents; pixels as they are, and what a decoder makes of the others in 8 bits."""
    manifest = generator.bundle.manifest
    if manifest.decoder is None:
        return latents / manifest.latent.scale + manifest.latent.shift
    return generator.decode(latents).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1


def milliseconds(
    contenders: Sequence[Contender], noise: np.ndarray, labels: np.ndarray, seeds: list[tuple[int, int]]
) -> tuple[dict[str, float], int]:
    """Median time of each contender on one image, all in turn so that a slow spell hits them alike; and the rounds."""
    rounds = []
    deadline = time.perf_counter() + _TIMED_SECONDS
    for _ in range(_TIMED_ROUNDS + 2):  # two to warm up
        taken = {}
        for contender in contenders:
            began = time.perf_counter()
            contender.sample(noise, labels, seeds)
            taken[contender.name] = 1000 * (time.perf_counter() - began)
        rounds.append(taken)
        if len(rounds) >= 2 + 3 and time.perf_counter() > deadline:
            break
    timed = rounds[2:]
    return {c.name: statistics.median(taken[c.name] for taken in timed) for c in contenders}, len(timed)
