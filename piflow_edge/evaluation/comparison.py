"""Students beside their teacher and the real images: quality, diversity, agreement, network calls and time.

All contenders start from the same noise and labels, and all networks run in the same engine.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from piflow_edge.errors import DataError
from piflow_edge.noise import philox_normal
from piflow_edge.runtime.loading import load
from piflow_edge.system.hardware import machine
from piflow_edge.system.progress import progress

from .contenders import common_guidance, milliseconds, student_contenders, teacher_contenders, unique_names
from .features import DIGITS, Features, open_features
from .metrics import KID_SUBSET_SIZE, KID_SUBSETS, FeatureSet, agreement, check_finite
from .scores import (
    DENSITY_NEIGHBOURS,
    NEIGHBOURS,
    Score,
    beside_teacher,
    class_keys,
    real_diversity,
    score_of,
)

if TYPE_CHECKING:
    from piflow_edge.distill.data.datasets import ImageData

# Images that are made at a time: so many, or so few that they hold this many values.
_PIECE = 250
_PIECE_VALUES = 2**22

REAL = "real images"


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
        from piflow_edge.distill.data.datasets import load_images

        data = load_images(DIGITS)
    if data.latent is not None:
        raise DataError(f"images are compared, and {data.name!r} holds latents; give the images they are of")
    if data.labels is None:
        raise DataError(f"images are compared class by class; {data.name!r} has no labels")
    features = default_features(data) if features is None else features
    generators = dict(zip(unique_names(students), map(load, students), strict=True))
    contenders = [c for name, generator in generators.items() for c in student_contenders(name, generator)]
    fits = {
        n: (tuple(g.bundle.manifest.latent.shape), tuple(getattr(g.conditioner, "names", ())))
        for n, g in generators.items()
    }
    full = None
    if teacher_folder is not None:
        from piflow_edge.distill.loop.checkpoint import load_checkpoint

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
    names = class_keys(data.class_names)
    scores = []
    with progress("scoring", len(contenders)) as bar:
        for contender in contenders:
            name, calls = contender.name, contender.network_calls
            found = made.features[name]
            scores.append(score_of(name, found, real, labels, names, network_calls=calls, ms=times[name]))
            bar(name)
    if full is not None:
        teacher = scores[0]
        scores = [
            beside_teacher(s, teacher, made.features[s.name], made.features[teacher.name], made.mse[s.name])
            for s in scores
        ]
    conditions = {
        "data": data.name,
        "real_images": len(data),
        "images": count,
        "image_shape": list(data.shape),
        "images_per_class": dict(zip(names, np.bincount(labels).tolist(), strict=True)),
        "seed": seed,
        "guidance_scale": guidance_scale if full is not None else None,
        "features": features.description,
        "features_source": features.source,
        **real_diversity(real, data.labels, names),
        "kid": {
            "subsets": KID_SUBSETS,
            "images_per_subset": min(KID_SUBSET_SIZE, count // 2, len(data) // 2),
        },
        "neighbours": {"precision, recall": NEIGHBOURS, "density, coverage": DENSITY_NEIGHBOURS},
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


def _real_features(data: "ImageData", features: Features) -> np.ndarray:
    starts = range(0, len(data), _PIECE)
    with progress("real images", len(starts)) as bar:
        found = []
        for start in starts:
            found.append(features(data.batch(np.arange(start, min(start + _PIECE, len(data))))[0]))
            bar("")
    return np.concatenate(found)


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
