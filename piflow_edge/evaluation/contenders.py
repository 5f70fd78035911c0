"""What an evaluation compares: students, and a teacher in so many steps, each as a way from noise to images.

All their networks run in the same engine.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from piflow_edge.bundle.manifest import guidance_trained_with
from piflow_edge.conditioning import Conditioner, Conditioning, take
from piflow_edge.errors import DataError
from piflow_edge.runtime.generator import Generator

from .plan import name_inputs

# Rounds of one image each that the time per image is the median of, all contenders in turn: so many, or as many as fit
# into so many seconds, but never fewer than three.
_TIMED_ROUNDS = 15
_TIMED_SECONDS = 60.0
# Images that a teacher makes at a time.
_TEACHER_BATCH = 250

Seeds = list[tuple[int, int]]


class Teacher(Protocol):
    """What the students learnt from, such as an `EngineTeacher`; whoever has PyTorch makes it and hands it in.

    `conditioner`: what steers it. `sample_shape`: (C, H, W) of its states.
    """

    @property
    def conditioner(self) -> Conditioner: ...

    @property
    def sample_shape(self) -> tuple[int, ...] | None: ...

    def sample(
        self, noise: np.ndarray, conditioning: Conditioning, steps: int, *, guidance_scale: float
    ) -> np.ndarray:
        """Return states at noise level 0 by `steps` Euler steps."""
        ...


@dataclass(frozen=True)
class Contender:
    """Something that makes images.

    `sample`: (noise (B, C, H, W), the data's conditioning, seeds of the noise) -> images float32 (B, C, H, W), -1 to 1
    or about. `is_drawn`: False where the images were made before, of other noise: then nothing is timed, and no image
    is held to the teacher's.
    """

    name: str
    network_calls: int
    sample: Callable[[np.ndarray, Conditioning, Seeds], np.ndarray]
    is_drawn: bool = True


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Return the last part of every path, and as many before it as it takes to tell them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise DataError("every student is scored once; one was given twice")
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def find_common_guidance(generators: Mapping[str, Generator]) -> float:
    """Find the guidance scale of the teacher that all students were distilled from; 1 without any that records it."""
    recorded = {name: guidance_trained_with(g.bundle.manifest) for name, g in generators.items()}
    scales = {name: scale for name, scale in recorded.items() if scale is not None}
    if len(set(scales.values())) > 1:
        raise DataError(
            f"the students' teachers were guided differently ({scales}); give --guidance for the comparison"
        )
    return next(iter(scales.values()), 1.0)


def teacher_contenders(
    teacher: Teacher, guidance_scale: float, steps: Sequence[int], decoder: Generator | None = None
) -> list[Contender]:
    """Make a contender of the teacher for each number of Euler steps.

    `decoder`: a student whose decoder makes images of the teacher's latents; None where it makes images itself.
    """

    def sample(noise, conditioning, number):
        given = name_inputs(conditioning, teacher.conditioner)
        pieces = [slice(start, start + _TEACHER_BATCH) for start in range(0, len(noise), _TEACHER_BATCH)]
        result = [
            teacher.sample(noise[p], take(given, p), number, guidance_scale=guidance_scale) for p in pieces
        ]
        latents = np.concatenate(result)
        return latents if decoder is None else images_of(decoder, latents)

    return [
        Contender(
            f"teacher, {n} step{'s' if n > 1 else ''}",
            n,
            lambda noise, conditioning, seeds, n=n: sample(noise, conditioning, n),
        )
        for n in steps
    ]


def student_contenders(name: str, generator: Generator) -> list[Contender]:
    """Make a contender of a bundle, or several if it was trained for several numbers of calls."""
    noisy = generator.bundle.manifest.schedule.h != 0

    def sample(noise, conditioning, seeds, nfe):
        # A schedule that draws noise between calls wants the seeds, which make the same starting noise.
        start = {"seed": seeds} if noisy else {"noise": noise}
        given = name_inputs(conditioning, generator.conditioner)
        request = {"arrays": given} if given else {"count": len(noise)}
        result = generator(**request, output="latent", nfe=nfe, **start)
        return images_of(generator, result.latents)

    several = len(generator.trained_nfes) > 1
    return [
        Contender(
            f"{name}, {nfe} call{'s' if nfe > 1 else ''}" if several else name,
            nfe,
            lambda noise, conditioning, seeds, nfe=nfe: sample(noise, conditioning, seeds, nfe),
        )
        for nfe in generator.trained_nfes
    ]


def images_of(generator: Generator, latents: np.ndarray) -> np.ndarray:
    """Return images float32 (B, C, H, W) of latents; pixels as they are, else what a decoder makes in 8 bits."""
    manifest = generator.bundle.manifest
    if manifest.decoder is None:
        return manifest.latent.restore(latents)
    return generator.decode(latents).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1


def measure_milliseconds(
    contenders: Sequence[Contender], noise: np.ndarray, conditioning: Conditioning, seeds: Seeds
) -> tuple[dict[str, float], int]:
    """Measure the median time of each contender on one image, all in turn so that a slow spell hits them alike.

    Contenders whose images were made before are left out.

    Returns:
        Milliseconds by contender, and the rounds that were timed.
    """
    rounds, timing = [], [contender for contender in contenders if contender.is_drawn]
    deadline = time.perf_counter() + _TIMED_SECONDS
    for _ in range(_TIMED_ROUNDS + 2):  # two to warm up
        taken = {}
        for contender in timing:
            began = time.perf_counter()
            contender.sample(noise, conditioning, seeds)
            taken[contender.name] = 1000 * (time.perf_counter() - began)
        rounds.append(taken)
        if len(rounds) >= 2 + 3 and time.perf_counter() > deadline:
            break
    timed = rounds[2:]
    return {c.name: statistics.median(taken[c.name] for taken in timed) for c in timing}, len(timed)
