"""Students beside their teacher and the real images: quality, diversity, agreement, network calls and time.

All contenders start from the same noise and labels, and all networks run in the same engine.
"""

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from piflow_edge.engines.ort import runtime

from .errors import DataError
from .metrics import agreement, class_diversity, frechet_distance, territory
from .noise import philox_normal
from .progress import progress
from .sampling import Generator, load

# Rounds of one image each that the time per image is the median of; all contenders in turn.
_TIMED_ROUNDS = 15


@dataclass(frozen=True)
class Contender:
    """Something that makes images from noise. `sample`: (noise (B, C, H, W), labels (B,)) -> images like `noise`."""

    name: str
    network_calls: int
    sample: Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Score:
    """One contender's figures.

    `network_calls`: per image; a guided call runs the network on two samples. `fid`: Frechet distance to the real
    images in the shipped features. `fid_ratio`: to the teacher's. `diversity`: mean feature distance inside a class.
    `diversity_ratio`: to the teacher's. `precision`, `recall`: see `metrics.territory`. `mse`: to the
    teacher's images from the same noise. `ms_per_image`: median, one image at a time.
    """

    name: str
    network_calls: int
    fid: float
    fid_ratio: float
    diversity: float
    diversity_ratio: float
    precision: float
    recall: float
    mse: float
    ms_per_image: float


@dataclass(frozen=True)
class Evaluation:
    """Scores, the first of which is the full teacher's, the images they are of, and the conditions."""

    scores: list[Score]
    images: dict[str, np.ndarray]
    labels: np.ndarray
    conditions: dict

    def as_json(self) -> dict:
        """The figures alone."""
        return {"conditions": self.conditions, "scores": [asdict(score) for score in self.scores]}


def evaluate(
    students: Sequence[Path],
    teacher_folder: Path,
    *,
    count: int = 2000,
    seed: int = 0,
    guidance_scale: float | None = None,
    teacher_steps: int = 50,
    cut_steps: Sequence[int] = (1, 2, 4),
) -> Evaluation:
    """Compare bundles with their teacher, whole and cut to a few Euler steps.

    Args:
        students: bundles.
        teacher_folder: checkpoint of the teacher.
        count: images per contender, 100 or more.
        seed: of the common noise.
        guidance_scale: of the teacher; None is what the first student was distilled with, 1 without students.
        teacher_steps: Euler steps of the full teacher.
        cut_steps: Euler steps of the teacher cut short.

    Raises:
        DataError: too few images, or students of differently guided teachers and no `guidance_scale`.
        ShapeError: images that the shipped features do not know.
        BundleError, CheckpointError: a student or the teacher cannot be read.
    """
    from .distill.checkpoint import load_checkpoint
    from .distill.data import load_images
    from .distill.features import digit_features

    if count < 100:
        raise DataError(f"figures from fewer than 100 images mean nothing; got {count}")
    real = load_images("digits")  # the only images features are shipped for
    generators = dict(zip(unique_names(students), map(load, students), strict=True))
    if guidance_scale is None:
        guidance_scale = common_guidance(generators)
    velocity_steps = teacher_sampler(load_checkpoint(teacher_folder, kind="teacher"), guidance_scale)
    contenders = [
        Contender(
            f"teacher, {steps} step{'s' if steps > 1 else ''}",
            steps,
            lambda x, y, n=steps: velocity_steps(x, y, n),
        )
        for steps in (teacher_steps, *(cut for cut in cut_steps if cut != teacher_steps))
    ]
    contenders += [student_contender(name, generator) for name, generator in generators.items()]

    labels = np.arange(count) % len(real.class_names)
    noise = philox_normal(seed, range(count), real.images.shape[1:])
    images = {}
    with progress("evaluating", len(contenders) + 2) as bar:
        for contender in contenders:
            images[contender.name] = contender.sample(noise, labels)
            bar(contender.name)
        features = {name: digit_features(made) for name, made in images.items()}
        real_features = digit_features(real.images)
        bar("features")
        times = milliseconds(contenders, noise[:1], labels[:1])
        bar("times")
    full = contenders[0].name
    fid = {name: frechet_distance(f, real_features) for name, f in features.items()}
    diversity = {name: class_diversity(f, labels) for name, f in features.items()}
    scores = []
    for contender in contenders:
        name = contender.name
        precision, recall, *_ = territory(real_features, features[name])
        scores.append(
            Score(
                name,
                contender.network_calls,
                fid[name],
                fid[name] / fid[full],
                diversity[name],
                diversity[name] / diversity[full],
                precision,
                recall,
                agreement(images[name], images[full]),
                times[name],
            )
        )
    conditions = {
        "data": real.name,
        "images": count,
        "seed": seed,
        "guidance_scale": guidance_scale,
        "features": "64 features of the shipped digits classifier, not Inception's",
        "real_diversity": class_diversity(real_features, real.labels),
        "timing": f"median of {_TIMED_ROUNDS} rounds of one image, all contenders in turn, noise given",
        **machine(),
    }
    return Evaluation(scores, images, labels, conditions)


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
    """Guidance scale of the teacher that all students were distilled from; 1 without students."""
    scales = {n: g.bundle.manifest.provenance["settings"]["guidance_scale"] for n, g in generators.items()}
    if len(set(scales.values())) > 1:
        raise DataError(
            f"the students' teachers were guided differently ({scales}); give --guidance for the comparison"
        )
    return next(iter(scales.values()), 1.0)


def teacher_sampler(checkpoint, guidance_scale: float) -> Callable:
    """`(noise, labels, steps) -> images` by Euler steps of the guided teacher, its network in the runtime's engine."""
    import torch

    from .distill.teacher import GuidedTeacher
    from .engines import open_engine
    from .export.to_onnx import export_network

    engine = open_engine(export_network(checkpoint.network()))

    def network(x_t, t, labels):
        inputs = {"x_t": x_t.numpy(), "t": t.numpy(), "class_labels": labels.numpy()}
        return torch.from_numpy(engine.run(inputs)["u_t"])

    teacher = GuidedTeacher(network, checkpoint.architecture, guidance_scale)

    def sample(noise, labels, steps):
        pieces = [slice(start, start + 250) for start in range(0, len(noise), 250)]
        made = [
            teacher.sample(torch.from_numpy(noise[p]), torch.from_numpy(labels[p]), steps).numpy()
            for p in pieces
        ]
        return np.concatenate(made)

    return sample


def student_contender(name: str, generator: Generator) -> Contender:
    """A bundle as a contender."""

    def sample(noise, labels):
        return generator(labels=labels.tolist(), noise=noise, output="latent").latents

    return Contender(name, generator.bundle.manifest.schedule.nfe, sample)


def milliseconds(contenders: Sequence[Contender], noise: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Median time of each contender on one image, all in turn so that a slow spell hits them alike."""
    rounds = []
    for _ in range(_TIMED_ROUNDS + 2):  # two to warm up
        taken = {}
        for contender in contenders:
            began = time.perf_counter()
            contender.sample(noise, labels)
            taken[contender.name] = 1000 * (time.perf_counter() - began)
        rounds.append(taken)
    return {c.name: statistics.median(taken[c.name] for taken in rounds[2:]) for c in contenders}


def machine() -> dict:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {
            "numpy": np.__version__,
            "onnxruntime": runtime().__version__,
            "torch": version("torch"),
        },
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):  # Linux only; platform.processor() is empty there
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
