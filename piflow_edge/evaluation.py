"""Students beside their teacher and the real images: quality, diversity, agreement, network calls and time.

All contenders start from the same noise and labels, and all networks run in the same engine.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from piflow_edge.engines import Graph, open_engine

from .errors import DataError
from .features import DIGITS, Features, open_features
from .generator import Generator
from .hardware import machine
from .loading import load
from .metrics import (
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    FeatureSet,
    agreement,
    check_finite,
    class_diversities,
    frechet_distance,
    kernel_distance,
    paired_distance,
    territory,
)
from .noise import philox_normal
from .progress import progress
from .teacher_engine import EngineTeacher

if TYPE_CHECKING:
    from .distill.data import ImageData

# Rounds of one image each that the time per image is the median of, all contenders in turn: so many, or as many as fit
# into so many seconds, but never fewer than three.
_TIMED_ROUNDS = 15
_TIMED_SECONDS = 60.0

# Images that are made at a time: so many, or so few that they hold this many values.
_PIECE = 250
_PIECE_VALUES = 2**22

# Neighbours of precision and recall, and of density and coverage, as in the papers.
_NEIGHBOURS, _DENSITY_NEIGHBOURS = 3, 5

REAL = "real images"


@dataclass(frozen=True)
class Contender:
    """Something that makes images.

    `sample`: (noise (B, C, H, W), labels (B,), seeds of the noise) -> images float32 (B, C, H, W), -1 to 1 or about.
    """

    name: str
    network_calls: int
    sample: Callable[[np.ndarray, np.ndarray, list[tuple[int, int]]], np.ndarray]


@dataclass(frozen=True)
class Score:
    """One contender's figures; those beside the teacher are None where there is no teacher.

    `network_calls`: per image; a guided call runs the network on two samples. `fid`: Frechet distance to the real
    images' features. `fid_ratio`: to the teacher's. `kid`, `kid_std`: see `metrics.kernel_distance`. `diversity`: mean
    feature distance inside a class, averaged over classes. `diversity_ratio`: to the teacher's.
    `class_diversity`: class by class, and `class_diversity_ratio` to the teacher's. `worst_class`: where that is
    lowest. `precision`, `recall`, `density`, `coverage`: see `metrics.territory`. `mse`: to the teacher's images from
    the same noise, on pixels. `feature_distance`: to them, on features, over the teacher's diversity: 0 for the same
    images, 1 for others of the same class. `ms_per_image`: median, one image at a time.
    """

    name: str
    network_calls: int
    fid: float
    fid_ratio: float | None = field(default=None, kw_only=True)
    kid: float
    kid_std: float
    diversity: float
    diversity_ratio: float | None = field(default=None, kw_only=True)
    class_diversity: dict[str, float]
    class_diversity_ratio: dict[str, float] | None = field(default=None, kw_only=True)
    worst_class: str | None = field(default=None, kw_only=True)
    precision: float
    recall: float
    density: float
    coverage: float
    mse: float | None = field(default=None, kw_only=True)
    feature_distance: float | None = field(default=None, kw_only=True)
    ms_per_image: float


@dataclass(frozen=True)
class Pictures:
    """Images side by side. `rows`: the real images and every contender's, float32 (N, C, H, W). `classes`: of each."""

    rows: dict[str, np.ndarray]
    classes: list[str]


@dataclass(frozen=True)
class Evaluation:
    """Scores, the first of which is the full teacher's if there is one, some of the images, and the conditions."""

    scores: list[Score]
    pictures: Pictures
    conditions: dict

    @property
    def has_teacher(self) -> bool:
        return self.scores[0].fid_ratio is not None

    def as_json(self) -> dict:
        """The figures alone."""
        return {"conditions": self.conditions, "scores": [asdict(score) for score in self.scores]}


def evaluate(
    students: Sequence[Path],
    teacher_folder: Path | None = None,
    *,
    data: "ImageData | None" = None,
    features: Features | None = None,
    count: int = 2000,
    seed: int = 0,
    guidance_scale: float | None = None,
    teacher_steps: int = 50,
    cut_steps: Sequence[int] = (1, 2, 4),
) -> Evaluation:
    """Compare bundles with real images and, if there is one, with a teacher, whole and cut to a few Euler steps.

    Args:
        students: bundles.
        teacher_folder: checkpoint of the teacher; None leaves out what is measured beside it.
        data: the real images, of the students' classes and size; None is the built-in digits.
        features: what images are compared in; None is the shipped digits classifier, for the digits alone.
        count: images per contender, 100 or more, and two or more per class.
        seed: of the common noise.
        guidance_scale: of the teacher; None is what the first student was distilled with, 1 without students.
        teacher_steps: Euler steps of the full teacher.
        cut_steps: Euler steps of the teacher cut short.

    Raises:
        DataError: nothing to compare; too few images; students or teacher of other classes, sizes or noise than the
            data or each other; students of differently guided teachers and no `guidance_scale`; no `features` for
            data other than the digits.
        ShapeError: images or features that are not finite, with whose they are.
        FeatureError: `features` that do not fit the images.
        BundleError, CheckpointError: a student or the teacher cannot be read.
    """
    if count < 100:
        raise DataError(f"figures from fewer than 100 images mean nothing; got {count}")
    if data is None:
        from .distill.data import load_images

        data = load_images(DIGITS)
    if data.latent is not None:
        raise DataError(f"images are compared, and {data.name!r} holds latents; give the images they are of")
    if data.labels is None:
        raise DataError(f"images are compared class by class; {data.name!r} has no labels")
    features = default_features(data) if features is None else features
    generators = dict(zip(unique_names(students), map(load, students), strict=True))
    contenders = [c for name, generator in generators.items() for c in student_contenders(name, generator)]
    fits = {n: (tuple(g.bundle.manifest.latent.shape), g.class_names) for n, g in generators.items()}
    full = None
    if teacher_folder is not None:
        from .distill.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(teacher_folder, kind="teacher")
        guidance_scale = common_guidance(generators) if guidance_scale is None else guidance_scale
        steps = (teacher_steps, *(cut for cut in cut_steps if cut != teacher_steps))
        decoder = next((g for g in generators.values() if g.bundle.manifest.decoder is not None), None)
        teachers = teacher_contenders(checkpoint, guidance_scale, steps, decoder)
        contenders, full = teachers + contenders, teachers[0].name
        fits["the teacher"] = tuple(checkpoint.network["sample_shape"]), checkpoint.class_names
    noise_shape = _common_noise(fits, data)

    labels = evaluation_labels(data.labels, len(data.class_names), count)
    columns = picture_columns(labels, data.shape[-1])
    made = _make(contenders, full, data, features, labels, columns, noise_shape, seed)
    real = FeatureSet(_real_features(data, features), f"the {REAL}")
    noise = philox_normal(seed, range(1), noise_shape)
    times, rounds = milliseconds(contenders, noise, labels[:1], [(seed, 0)])
    class_keys = _class_keys(data.class_names)
    scores = []
    with progress("scoring", len(contenders)) as bar:
        for contender in contenders:
            scores.append(_score(contender, made, real, labels, class_keys, times[contender.name]))
            bar(contender.name)
    if full is not None:
        scores = [_beside(score, scores[0], made) for score in scores]
    conditions = {
        "data": data.name,
        "real_images": len(data),
        "images": count,
        "image_shape": list(data.shape),
        "images_per_class": dict(zip(class_keys, np.bincount(labels).tolist(), strict=True)),
        "seed": seed,
        "guidance_scale": guidance_scale if full is not None else None,
        "features": features.description,
        "features_source": features.source,
        **_real_diversity(real, data.labels, class_keys),
        "kid": {
            "subsets": KID_SUBSETS,
            "images_per_subset": min(KID_SUBSET_SIZE, count // 2, len(data) // 2),
        },
        "neighbours": {"precision, recall": _NEIGHBOURS, "density, coverage": _DENSITY_NEIGHBOURS},
        "timing": f"median of {rounds} rounds of one image, all contenders in turn, noise given",
        **machine(),
    }
    return Evaluation(scores, made.pictures, conditions)


def default_features(data: "ImageData") -> Features:
    """The shipped classifier, for the digits.

    Raises:
        DataError: other images; nothing is shipped for them.
    """
    if data.name != DIGITS or data.shape != (1, 8, 8):
        raise DataError(
            f"features are shipped for 'digits' alone; for {data.name!r} give --features: Inception-v3 weights (.pth) "
            "for photographs, any extractor as .onnx, or one trained on these classes by: piflow-edge train-features"
        )
    return open_features(DIGITS)


def evaluation_labels(real: np.ndarray, classes: int, count: int) -> np.ndarray:
    """Labels of the images to be made, (count,): each class as often as in the real ones, so that quality is measured
    and not who has more cats; equally often where the classes' sizes are within a tenth of each other.

    Any stretch of them holds the classes in about those shares, and every class comes twice or more.

    Raises:
        DataError: `count` below two images per class, or a class without a real image.
    """
    sizes = np.bincount(real, minlength=classes)
    if count < 2 * classes:
        raise DataError(
            f"diversity needs two images per class or more: {2 * classes} for {classes} classes; got {count}"
        )
    if sizes.min() == 0:
        raise DataError(f"every class needs a real image; class {sizes.argmin()} has none")
    if sizes.max() <= 1.1 * sizes.min():
        return np.arange(count) % classes
    # Two for each, and the rest by size; what rounding leaves over goes to the largest remainders.
    exact = sizes * (count - 2 * classes) / sizes.sum()
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: count - 2 * classes - shares.sum()]] += 1
    shares += 2
    # The j-th of n images of a class stands at (j + 1/2) / n of the way.
    places = np.concatenate([(np.arange(n) + 0.5) / n for n in shares])
    return np.repeat(np.arange(classes), shares)[np.argsort(places, kind="stable")]


def picture_columns(labels: np.ndarray, side: int) -> list[int]:
    """Which images are shown: as many as fit a page, each class as often as the next, in the order of the classes.

    Args:
        labels: of all images.
        side: of an image, in pixels.
    """
    fit = int(np.clip(1280 // max(side, 64), 5, 20))
    shown = np.unique(labels)
    if len(shown) > fit:  # spread over all classes
        shown = shown[np.linspace(0, len(shown) - 1, fit).round().astype(int)]
    rounds = fit // len(shown)
    where = [np.flatnonzero(labels == label)[:rounds] for label in shown]
    return [int(places[n]) for n in range(rounds) for places in where if n < len(places)]


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
    recorded = {n: g.bundle.manifest.provenance.get("settings", {}) for n, g in generators.items()}
    scales = {n: settings["guidance"]["scale"] for n, settings in recorded.items() if "guidance" in settings}
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
    from .distill.sources import network_of
    from .export.to_onnx import export_network

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


@dataclass
class _Made:
    """What is kept of all images: features and squared errors of every contender, and some pictures."""

    features: dict[str, np.ndarray]
    mse: dict[str, float]
    pictures: Pictures


def _make(contenders, full, data, features, labels, columns, noise_shape, seed) -> _Made:
    """Make all images, a piece at a time, each from the same noise for every contender."""
    count, shape = len(labels), tuple(data.shape)
    size = max(1, min(_PIECE, _PIECE_VALUES // int(np.prod(shape))))
    starts = range(0, count, size)
    found = {c.name: [] for c in contenders}
    shown = {c.name: {} for c in contenders}
    errors = dict.fromkeys(found, 0.0)
    with progress("evaluating", len(starts) * len(contenders)) as bar:
        for start in starts:
            indices = range(start, min(start + size, count))
            noise = philox_normal(seed, indices, noise_shape)
            seeds = [(seed, i) for i in indices]
            reference = None
            for contender in contenders:
                name = contender.name
                images = contender.sample(noise, labels[start : indices.stop], seeds)
                if images.shape[1:] != shape:
                    raise DataError(
                        f"{name} makes images {images.shape[1:]}; those of {data.name!r} are {shape}; give the data "
                        "in the same size, and for latents a student with its decoder"
                    )
                check_finite(images, f"the images of {name}", first=start)
                if name == full:
                    reference = images
                if reference is not None:
                    errors[name] += agreement(images, reference) * len(images)
                found[name].append(features(images))
                shown[name] |= {i: images[i - start] for i in columns if i in indices}
                bar(name)
    pictures = {REAL: _real_pictures(data, labels[columns])}
    pictures |= {name: np.stack([images[i] for i in columns]) for name, images in shown.items()}
    return _Made(
        {name: np.concatenate(pieces) for name, pieces in found.items()},
        {name: total / count for name, total in errors.items()},
        Pictures(pictures, [data.class_names[label] for label in labels[columns]]),
    )


def _score(contender: Contender, made: _Made, real: FeatureSet, labels, class_names, ms: float) -> Score:
    """One contender's figures, without those beside the teacher."""
    features = FeatureSet(made.features[contender.name], contender.name)
    fid, kid = frechet_distance(features, real), kernel_distance(features, real)
    lie = territory(real, features, neighbours=_NEIGHBOURS, density_neighbours=_DENSITY_NEIGHBOURS)
    diversity = {class_names[label]: value for label, value in class_diversities(features, labels).items()}
    return Score(
        contender.name,
        contender.network_calls,
        fid=fid,
        kid=kid.mean,
        kid_std=kid.std,
        diversity=float(np.mean(list(diversity.values()))),
        class_diversity=diversity,
        **lie._asdict(),
        ms_per_image=ms,
    )


def _beside(score: Score, teacher: Score, made: _Made) -> Score:
    """The same figures with those beside the teacher."""
    ratios = {
        key: _ratio(value, teacher.class_diversity[key]) for key, value in score.class_diversity.items()
    }
    distance = paired_distance(made.features[score.name], made.features[teacher.name])
    return replace(
        score,
        fid_ratio=_ratio(score.fid, teacher.fid),
        diversity_ratio=_ratio(score.diversity, teacher.diversity),
        class_diversity_ratio=ratios,
        worst_class=min(ratios, key=ratios.__getitem__),
        mse=made.mse[score.name],
        feature_distance=_ratio(distance, teacher.diversity),
    )


def _ratio(value: float, of: float) -> float:
    """A teacher that makes one image per class has no diversity; the same is 1, and more is finite."""
    return 1.0 if value == of else value / max(of, 1e-12)


def _real_features(data: "ImageData", features: Features) -> np.ndarray:
    starts = range(0, len(data), _PIECE)
    with progress("real images", len(starts)) as bar:
        found = []
        for start in starts:
            found.append(features(data.batch(np.arange(start, min(start + _PIECE, len(data))))[0]))
            bar("")
    return np.concatenate(found)


def _real_diversity(real: FeatureSet, labels: np.ndarray, names: list[str]) -> dict:
    """Of the real images, for the conditions; classes with a single one have none."""
    counts = np.bincount(labels, minlength=len(names))
    several = counts[labels] > 1
    found = class_diversities(real.features[several], labels[several])
    return {
        "real_diversity": float(np.mean(list(found.values()))),
        "real_class_diversity": {name: found.get(label) for label, name in enumerate(names)},
    }


def _real_pictures(data: "ImageData", labels: np.ndarray) -> np.ndarray:
    """A real image per label, another one each time a label comes again until there is no other."""
    members = {label: np.flatnonzero(data.labels == label) for label in set(labels.tolist())}
    seen = dict.fromkeys(members, 0)
    chosen = []
    for label in labels.tolist():
        # Spread over the class: neighbours in a set are often alike.
        places = members[label]
        wanted = int(np.count_nonzero(labels == label))
        chosen.append(places[seen[label] * len(places) // wanted])
        seen[label] += 1
    return data.batch(np.array(chosen))[0]


def _class_keys(names: Sequence[str]) -> list[str]:
    """The classes' names, with their number where two are alike."""
    return [f"{i} {name}" if list(names).count(name) > 1 else str(name) for i, name in enumerate(names)]


def _common_noise(
    fits: dict[str, tuple[tuple[int, ...], Sequence[str]]], data: "ImageData"
) -> tuple[int, ...]:
    """Shape of everyone's starting noise, given each one's and its classes."""
    if not fits:
        raise DataError("there is nothing to compare; give a student's bundle or a teacher's checkpoint")
    for name, (_, classes) in fits.items():
        if tuple(classes) != tuple(data.class_names):
            raise DataError(
                f"{name} makes {_few(classes)}; the classes of {data.name!r} are {_few(data.class_names)}; give the "
                "data that it was trained on"
            )
    shapes = {name: shape for name, (shape, _) in fits.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"all start from the same noise, so of one shape; got {shapes}")
    return next(iter(shapes.values()))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
