"""Students beside their teacher and the real images: quality, diversity, agreement, network calls and time.

All contenders start from the same noise and conditioning, and all networks run in the same engine.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from piflow_edge.errors import DataError
from piflow_edge.noise import philox_normal
from piflow_edge.runtime.bulk.bulk_job import has_job
from piflow_edge.runtime.generator import Generator
from piflow_edge.runtime.loading import load
from piflow_edge.system.hardware import machine
from piflow_edge.system.progress import progress

from .contenders import (
    Contender,
    Teacher,
    find_common_guidance,
    measure_milliseconds,
    student_contenders,
    teacher_contenders,
    unique_names,
)
from .features import Features, choose_features
from .images_on_disk import ImageFolder
from .judgement import find_warnings
from .made_images import REAL, MadeImages, Pictures, extract_real_features, make_images
from .metrics import KID_SUBSET_SIZE, KID_SUBSETS, Agreement, FeatureSet, prompt_agreement
from .plan import ALL_IMAGES, Plan, RealImages, check_fit, choose_columns, plan_images
from .prompt_features import PromptFeatures
from .scores import (
    DENSITY_NEIGHBOURS,
    NEIGHBOURS,
    Score,
    agree_with_prompts,
    beside_teacher,
    describe_agreement,
    real_diversity,
    score_of,
)

# Fewer images are refused.
_LEAST_IMAGES = 100


@dataclass(frozen=True)
class Evaluation:
    """Scores, the first of which is the full teacher's if there is one, some of the images, and the conditions.

    `warnings`: reasons to distrust a figure, each a sentence.
    """

    scores: list[Score]
    pictures: Pictures
    conditions: dict
    warnings: list[str] = field(default_factory=list)

    @property
    def has_teacher(self) -> bool:
        return self.scores[0].fid_ratio is not None

    @property
    def compares_prompts(self) -> bool:
        return self.scores[0].prompt_accuracy is not None

    def as_json(self) -> dict:
        """The figures alone."""
        scores = [asdict(score) for score in self.scores]
        return {"conditions": self.conditions, "warnings": self.warnings, "scores": scores}


@dataclass(frozen=True)
class _Lineup:
    """All that are compared. `full`: the whole teacher's name, None without a teacher; `guidance_scale`: its own."""

    contenders: list[Contender]
    plan: Plan
    noise_shape: tuple[int, ...]
    full: str | None
    guidance_scale: float | None
    students: list[str]


def evaluate(
    students: Sequence[Path],
    data: RealImages,
    features: Features | None = None,
    *,
    teacher: Teacher | None = None,
    count: int = 2000,
    seed: int = 0,
    guidance_scale: float | None = None,
    teacher_steps: int = 50,
    cut_steps: Sequence[int] = (1, 2, 4),
    prompt_features: PromptFeatures | None = None,
) -> Evaluation:
    """Compare bundles with real images and, if there is one, with a teacher, whole and cut to a few Euler steps.

    Args:
        students: bundles, or folders that `piflow-edge generate` filled.
        data: the real images, with what steers them, of the students' size.
        features: what images are compared in; None is the shipped digits classifier, for the digits alone.
        teacher: what the students learnt from; None leaves out what is measured beside it.
        count: images per contender, 100 or more, and two or more per class.
        seed: of the common noise.
        guidance_scale: of the teacher; None is what the students were distilled with, 1 where nothing says.
        teacher_steps: Euler steps of the full teacher.
        cut_steps: Euler steps of the teacher cut short.
        prompt_features: compares images with their prompts, where captions steer; None leaves those figures out.

    Raises:
        DataError: nothing to compare; too few images; students or teacher of other classes, inputs, sizes or noise than
            the data or each other; students of differently guided teachers and no `guidance_scale`; no `features` for
            data other than the digits; `prompt_features` for images without prompts.
        ShapeError: images or features that are not finite, with whose they are.
        FeatureError: `features` that do not fit the images.
        BundleError: a student cannot be read.
    """
    if count < _LEAST_IMAGES:
        raise DataError(f"figures from fewer than {_LEAST_IMAGES} images mean nothing; got {count}")
    if data.latent is not None:
        raise DataError(f"images are compared, and {data.name!r} holds latents; give the images they are of")
    features = choose_features(data.name, data.shape) if features is None else features
    named = dict(zip(unique_names(students), students, strict=True))
    folders = {name: ImageFolder(path) for name, path in named.items() if has_job(path)}
    generators = {name: load(path) for name, path in named.items() if name not in folders}
    steps = (teacher_steps, *(cut for cut in cut_steps if cut != teacher_steps))
    lineup = _gather(generators, folders, teacher, data, count, steps, guidance_scale)
    plan = lineup.plan
    columns = choose_columns(plan.groups, data.shape[-1])
    if prompt_features is not None and not plan.prompts:
        raise DataError(f"no prompts steer the images of {data.name!r}; leave --prompt-features out")
    images = make_images(
        lineup.contenders, plan, features, columns, lineup.noise_shape, seed, reference=lineup.full,
        prompt_features=prompt_features,
    )  # fmt: skip
    real = FeatureSet(extract_real_features(data, features), f"the {REAL}")
    noise = philox_normal(seed, range(1), lineup.noise_shape)
    first = plan.conditioning(slice(1))
    times, rounds = measure_milliseconds(lineup.contenders, noise, first, [(seed, 0)])
    scores = _score(lineup, images, real, times)
    agreeing = {} if prompt_features is None else _measure_agreement(plan, images, prompt_features)
    scores = [agree_with_prompts(score, agreeing.get(score.name)) for score in scores]
    fewest, width = min(count, len(data)), real.features.shape[1]
    warnings = find_warnings(scores, lineup.students, fewest, width)
    conditions = _conditions(lineup, real, features, seed, rounds)
    if prompt_features is not None:
        conditions |= describe_agreement(prompt_features, len(plan.group_names), agreeing[REAL])
    return Evaluation(scores, images.pictures, conditions, warnings)


def _gather(
    generators: dict[str, Generator],
    folders: dict[str, ImageFolder],
    teacher: Teacher | None,
    data: RealImages,
    count: int,
    steps: Sequence[int],
    guidance_scale: float | None,
) -> _Lineup:
    """Bring students and teacher to one start, and plan what they make."""
    contenders = [c for name, generator in generators.items() for c in student_contenders(name, generator)]
    students = [contender.name for contender in contenders]
    takers = {name: generator.conditioner for name, generator in generators.items()}
    shapes = {name: tuple(g.bundle.manifest.latent.shape) for name, g in generators.items()}
    full = scale = None
    if teacher is not None:
        scale = find_common_guidance(generators) if guidance_scale is None else guidance_scale
        decoder = next((g for g in generators.values() if g.bundle.manifest.decoder is not None), None)
        teachers = teacher_contenders(teacher, scale, steps, decoder)
        contenders, full = teachers + contenders, teachers[0].name
        takers["the teacher"], shapes["the teacher"] = teacher.conditioner, tuple(teacher.sample_shape or ())
    steered = {name: bool(conditioner.inputs) for name, conditioner in takers.items()}
    steered |= {name: folder.is_steered for name, folder in folders.items()}
    if not steered:
        raise DataError("there is nothing to compare; give a student's bundle or a teacher")
    if len(set(steered.values())) > 1:
        raise DataError(f"all are steered or none is; steered: {steered}")
    plan = plan_images(data, count, steered=any(steered.values()))
    if plan.steered:
        check_fit(plan, takers)
    if len(set(shapes.values())) > 1:
        raise DataError(f"all start from the same noise, so of one shape; got {shapes}")
    made = [folder.contender(name, plan) for name, folder in folders.items()]
    shape = next(iter(shapes.values()), tuple(data.shape))
    return _Lineup([*contenders, *made], plan, shape, full, scale, [*students, *folders])


def _score(lineup: _Lineup, images: MadeImages, real: FeatureSet, times: dict[str, float]) -> list[Score]:
    plan, scores = lineup.plan, []
    with progress("scoring", len(lineup.contenders)) as bar:
        for contender in lineup.contenders:
            name, calls = contender.name, contender.network_calls
            found = images.features[name]
            scores.append(
                score_of(
                    name, found, real, plan.groups, plan.group_names, network_calls=calls, ms=times.get(name)
                )
            )
            bar(name)
    if lineup.full is None:
        return scores
    teacher = scores[0]
    return [
        beside_teacher(
            s, teacher, images.features[s.name], images.features[teacher.name], images.mse.get(s.name)
        )
        for s in scores
    ]


def _measure_agreement(
    plan: Plan, images: MadeImages, prompt_features: PromptFeatures
) -> dict[str, Agreement]:
    """Compare every contender's images with their prompts, and the real images of the same prompts."""
    prompts = prompt_features.encode_prompts(plan.group_names, plan.conditioning(plan.first_of_groups()))
    real = plan.data.batch(plan.chosen[plan.first_of_groups()])[0]
    found = {name: prompt_agreement(own, prompts, plan.groups) for name, own in images.prompt_vectors.items()}
    own = np.arange(len(prompts))
    return found | {REAL: prompt_agreement(prompt_features.encode_images(real), prompts, own)}


def _conditions(lineup: _Lineup, real: FeatureSet, features: Features, seed: int, rounds: int) -> dict:
    """What the figures were measured on and how."""
    plan, data = lineup.plan, lineup.plan.data
    counts = np.bincount(plan.groups, minlength=len(plan.group_names)).tolist()
    by_class = dict(zip(plan.group_names, counts, strict=True))
    diversity = real_diversity(real, plan.real_groups, [ALL_IMAGES] if plan.prompts else plan.group_names)
    return {
        "data": data.name,
        "real_images": len(data),
        "images": len(plan),
        "image_shape": list(data.shape),
        "images_per_class": by_class,
        "seed": seed,
        "guidance_scale": lineup.guidance_scale,
        "features": features.description,
        "features_source": features.source,
        **diversity,
        "kid": {
            "subsets": KID_SUBSETS,
            "images_per_subset": min(KID_SUBSET_SIZE, len(plan) // 2, len(data) // 2),
        },
        "neighbours": {"precision, recall": NEIGHBOURS, "density, coverage": DENSITY_NEIGHBOURS},
        "timing": f"median of {rounds} rounds of one image, all contenders in turn, noise given",
        **machine(),
    }
