"""The figures of one contender, from the features of its images, and those beside the teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .metrics import (
    DISTRACTORS,
    Agreement,
    FeatureSet,
    class_diversities,
    frechet_distance,
    frechet_interval,
    kernel_distance,
    paired_distance,
    territory,
)
from .prompt_features import PromptFeatures

# Neighbours of precision and recall, and of density and coverage, as in the papers.
NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5


@dataclass(frozen=True)
class Score:
    """One contender's figures; those beside the teacher are None where there is no teacher.

    `network_calls`: per image; a guided call runs the network on two samples. `fid`: Frechet distance to the real
    images' features; `fid_interval`: see `metrics.frechet_interval`. `fid_ratio`: to the teacher's. `kid`, `kid_std`:
    see `metrics.kernel_distance`. `diversity`: mean feature distance inside a class, averaged over classes.
    `diversity_ratio`: to the teacher's.
    `class_diversity`: class by class, and `class_diversity_ratio` to the teacher's. `worst_class`: where that is
    lowest. `precision`, `recall`, `density`, `coverage`: see `metrics.territory`. `mse`: to the teacher's images from
    the same noise, on pixels. `feature_distance`: to them, on features, over the teacher's diversity: 0 for the same
    images, 1 for others of the same class. `ms_per_image`: median, one image at a time. These three are None where the
    images were made before, of other noise. `prompt_accuracy`,
    `prompt_similarity`: see `metrics.prompt_agreement`; None where no prompts are compared with. Where prompts steer, a
    class is a prompt.
    """

    name: str
    network_calls: int
    fid: float
    fid_interval: tuple[float, float] | None = field(default=None, kw_only=True)
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
    ms_per_image: float | None
    prompt_accuracy: float | None = field(default=None, kw_only=True)
    prompt_similarity: float | None = field(default=None, kw_only=True)


def score_of(
    name: str,
    features: np.ndarray,
    real: FeatureSet,
    groups: np.ndarray,
    group_names: Sequence[str],
    *,
    network_calls: int,
    ms: float | None,
) -> Score:
    """One contender's figures, without those beside the teacher.

    Args:
        name: the contender's.
        features: of its images, (N, D).
        real: features of the real images.
        groups: of its images, (N,).
        group_names: one per group, each another.
        network_calls, ms: per image.
    """
    own = FeatureSet(features, name)
    fid, kid = frechet_distance(own, real), kernel_distance(own, real)
    lie = territory(real, own, neighbours=NEIGHBOURS, density_neighbours=DENSITY_NEIGHBOURS)
    diversity = {group_names[group]: value for group, value in class_diversities(own, groups).items()}
    return Score(
        name,
        network_calls,
        fid=fid,
        fid_interval=frechet_interval(own, real),
        kid=kid.mean,
        kid_std=kid.std,
        diversity=float(np.mean(list(diversity.values()))),
        class_diversity=diversity,
        **lie._asdict(),
        ms_per_image=ms,
    )


def beside_teacher(
    score: Score, teacher: Score, features: np.ndarray, teacher_features: np.ndarray, mse: float | None
) -> Score:
    """The same figures with those beside the teacher.

    Args:
        score, teacher: of either, without these figures.
        features, teacher_features: of the images of either, (N, D), from the same noise and conditioning.
        mse: to the teacher's images, on pixels; None where they were not made from the same noise.
    """
    ratios = {
        key: _ratio(value, teacher.class_diversity[key]) for key, value in score.class_diversity.items()
    }
    distance = paired_distance(features, teacher_features)
    return replace(
        score,
        fid_ratio=_ratio(score.fid, teacher.fid),
        diversity_ratio=_ratio(score.diversity, teacher.diversity),
        class_diversity_ratio=ratios,
        worst_class=min(ratios, key=ratios.__getitem__),
        mse=mse,
        feature_distance=None if mse is None else _ratio(distance, teacher.diversity),
    )


def agree_with_prompts(score: Score, agreement: Agreement | None) -> Score:
    """The same figures with those beside the prompts; None leaves them out."""
    if agreement is None:
        return score
    return replace(score, prompt_accuracy=agreement.accuracy, prompt_similarity=agreement.similarity)


def describe_agreement(
    prompt_features: PromptFeatures, prompts: int, real: Agreement
) -> dict[str, dict[str, Any]]:
    """Return how images were compared with prompts, for the conditions. `real`: what the real images reach."""
    return {
        "prompt_features": {
            "description": prompt_features.description,
            "source": prompt_features.source,
            "prompts": prompts,
            "other_prompts": min(DISTRACTORS, prompts - 1),
            "real_images": real._asdict(),
        }
    }


def _ratio(value: float, of: float) -> float:
    """A teacher that makes one image per class has no diversity; the same is 1, and more is finite."""
    return 1.0 if value == of else value / max(of, 1e-12)


def real_diversity(real: FeatureSet, groups: np.ndarray, names: list[str]) -> dict:
    """Of the real images, for the conditions; classes with a single one have none."""
    counts = np.bincount(groups, minlength=len(names))
    several = counts[groups] > 1
    found = class_diversities(real.features[several], groups[several])
    return {
        "real_diversity": float(np.mean(list(found.values()))),
        "real_class_diversity": {name: found.get(group) for group, name in enumerate(names)},
    }
