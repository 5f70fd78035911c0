"""Quality, diversity and agreement of generated images, from feature vectors (M, D) or from the images themselves.

All in float64. Distances are made in blocks, so that no array grows with the product of two sets' sizes: 50,000 images
in the 2,048 features of an Inception take the features themselves and a few hundred megabytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np

from piflow_edge.errors import ShapeError

# Values of one block of distances: 64 MB in float64.
_BLOCK = 2**23
# Neighbours that are looked up at once, so that figures which ask for different ones share a pass.
_NEIGHBOURS = 8

# Features above which a distance is too slow to be computed a hundred times.
_MOST_BOOTSTRAPPED = 256
# Other prompts that an image's own is to be told from.
DISTRACTORS = 99
# As others report KID.
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


class FeatureSet:
    """The features of one set of images, and what several figures need of them, computed once when asked for.

    Every figure below takes one of these or a plain array.

    Args:
        features: (M, D), finite.
        whose: the images they belong to, for messages.

    Raises:
        ShapeError: another shape; values that are not finite, with the images they belong to.
    """

    def __init__(self, features: np.ndarray, whose: str = "these images"):
        self.features = np.asarray(features, np.float64)
        if self.features.ndim != 2:
            raise ShapeError(
                f"features are one vector per image, (M, D); those of {whose} are {self.features.shape}"
            )
        check_finite(self.features, f"the features of {whose}")

    @classmethod
    def of(cls, features: FeatureSet | np.ndarray) -> FeatureSet:
        return features if isinstance(features, FeatureSet) else cls(features)

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def squares(self) -> np.ndarray:
        return (self.features**2).sum(1)

    @cached_property
    def mean(self) -> np.ndarray:
        return self.features.mean(0)

    @cached_property
    def covariance(self) -> np.ndarray:
        """Unbiased, (D, D)."""
        total = np.zeros((self.features.shape[1],) * 2)
        for rows in _blocks(*self.features.shape):
            centred = self.features[rows] - self.mean
            total += centred.T @ centred
        return total / (len(self) - 1)

    @cached_property
    def root(self) -> np.ndarray:
        """Symmetric square root of the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T

    def distances(self, others: FeatureSet) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows of this set, block by block, and their distances to all of `others`."""
        if self.features.shape[1] != others.features.shape[1]:
            raise ShapeError(
                f"features of one kind are compared; got {self.features.shape[1]} and {others.features.shape[1]} values"
            )
        for rows in _blocks(len(self), len(others)):
            squares = self.features[rows] @ others.features.T
            squares *= -2
            squares += self.squares[rows, None] + others.squares
            if others is self:  # exactly 0, which rounding would leave near it
                squares[_own(rows)] = 0
            yield rows, np.sqrt(np.maximum(squares, 0, out=squares), out=squares)

    def reach(self, neighbours: int) -> np.ndarray:
        """Every image's distance to its k-th nearest neighbour in the set, itself not counted, (M,)."""
        if len(self) <= neighbours:
            raise ShapeError(
                f"balls around images reach to neighbour {neighbours}; there are {len(self)} images"
            )
        if neighbours > self._nearest.shape[1]:
            self._nearest = self._find_nearest(neighbours)
        return self._nearest[:, neighbours - 1]

    @cached_property
    def _nearest(self) -> np.ndarray:
        return self._find_nearest(min(_NEIGHBOURS, len(self) - 1))

    def _find_nearest(self, count: int) -> np.ndarray:
        nearest = np.empty((len(self), count))
        for rows, distances in self.distances(self):
            distances[_own(rows)] = np.inf
            nearest[rows] = np.sort(np.partition(distances, count - 1, axis=1)[:, :count], axis=1)
        return nearest


class Kid(NamedTuple):
    """Mean of the subsets' estimates, and their standard deviation: the spread of one subset, not of the mean."""

    mean: float
    std: float


class Territory(NamedTuple):
    """Where two sets of features lie relative to each other; see `territory`."""

    precision: float
    recall: float
    density: float
    coverage: float


def frechet_distance(a: FeatureSet | np.ndarray, b: FeatureSet | np.ndarray) -> float:
    """Frechet distance between the Gaussians fitted to two sets of features; FID when these are an Inception's.

    `|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`. Lower is better; 0 for equal sets.

    Source: Heusel et al., GANs trained by a two time-scale update rule, arXiv:1706.08500.
    """
    a, b = FeatureSet.of(a), FeatureSet.of(b)
    if len(a) < 2 or len(b) < 2:
        raise ShapeError(
            f"a Frechet distance needs two images or more on each side; got {len(a)} and {len(b)}"
        )
    # tr (C_a C_b)^(1/2) through a symmetric matrix with the same eigenvalues: stable where C_b is near singular. The
    # second set's root is kept, so that a comparison of many sets with one takes it once.
    values = np.linalg.eigvalsh(b.root @ a.covariance @ b.root)
    cross = np.sqrt(np.maximum(values, 0)).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return float(distance)


def frechet_interval(
    a: FeatureSet | np.ndarray, b: FeatureSet | np.ndarray, *, draws: int = 100
) -> tuple[float, float] | None:
    """Return a 95 % interval of the Frechet distance, from images of `a` drawn anew; None above 256 features.

    Drawing with replacement adds about as much bias as the sample itself has, so that the draws are mirrored about the
    figure ("basic" bootstrap). With thousands of features each draw would take seconds, and 2,000 images say too little
    of them in any case.

    Source: Efron & Tibshirani, An introduction to the bootstrap, 1993.
    """
    a, b = FeatureSet.of(a), FeatureSet.of(b)
    if a.features.shape[1] > _MOST_BOOTSTRAPPED:
        return None
    random, figure = np.random.default_rng(0), frechet_distance(a, b)
    drawn = [frechet_distance(a.features[random.integers(len(a), size=len(a))], b) for _ in range(draws)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return max(0.0, float(2 * figure - high)), max(0.0, float(2 * figure - low))


def kernel_distance(
    a: FeatureSet | np.ndarray,
    b: FeatureSet | np.ndarray,
    *,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = 0,
) -> Kid:
    """Squared maximum mean discrepancy of kernel `(x.y / D + 1)^3`; KID when features are an Inception's.

    Lower is better; unbiased: equal distributions give 0 on average, and single estimates below 0.

    Args:
        a, b: features (M, D).
        subsets: random subsets, drawn without replacement, that are estimated one by one.
        subset_size: of each; at most half of the smaller set, so that the subsets differ.
        seed: of the subsets.

    Source: Binkowski et al., Demystifying MMD GANs, arXiv:1801.01401.
    """
    a, b = FeatureSet.of(a), FeatureSet.of(b)
    size = min(subset_size, len(a) // 2, len(b) // 2)
    if size < 2:
        raise ShapeError(f"KID needs four images or more on each side; got {len(a)} and {len(b)}")
    random = np.random.default_rng(seed)
    estimates = []
    for _ in range(subsets):
        x = a.features[random.choice(len(a), size, replace=False)]
        y = b.features[random.choice(len(b), size, replace=False)]
        estimates.append(_unbiased_mmd(x, y))
    return Kid(float(np.mean(estimates)), float(np.std(estimates)))


def territory(
    real: FeatureSet | np.ndarray,
    generated: FeatureSet | np.ndarray,
    *,
    neighbours: int = 3,
    density_neighbours: int = 5,
) -> Territory:
    """How the territories of two sets overlap: balls around each image that reach to its k-th nearest neighbour.

    `precision`: share of generated images inside a real image's ball. `recall`: share of real images inside a
    generated image's ball; one stray image with a large ball can raise it. `density`: how many real balls a generated
    image lies in, over k; about 1 for equal distributions, and more where images crowd. `coverage`: share of real
    balls with a generated image inside.

    Args:
        real, generated: features (M, D).
        neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.

    Source: Kynkaanniemi et al., Improved precision and recall, arXiv:1904.06991; Naeem et al., Reliable fidelity and
    diversity metrics, arXiv:2002.09797.
    """
    real, generated = FeatureSet.of(real), FeatureSet.of(generated)
    real_balls, generated_balls = real.reach(neighbours), generated.reach(neighbours)
    density_balls = real.reach(density_neighbours)
    inside = np.zeros(len(generated), bool)
    recalled, covered, held = 0, 0, 0
    for rows, distances in real.distances(generated):
        inside |= np.any(distances <= real_balls[rows, None], axis=0)
        recalled += np.count_nonzero(np.any(distances <= generated_balls, axis=1))
        within = distances <= density_balls[rows, None]
        covered += np.count_nonzero(np.any(within, axis=1))
        held += np.count_nonzero(within)
    return Territory(
        float(inside.mean()),
        float(recalled / len(real)),
        float(held / (density_neighbours * len(generated))),
        float(covered / len(real)),
    )


def class_diversities(features: FeatureSet | np.ndarray, groups: np.ndarray) -> dict[int, float]:
    """Return, for every group in `groups` (M,), the mean distance between the features of two of its images."""
    features = FeatureSet.of(features)
    if groups.shape != (len(features),):
        raise ShapeError(f"one group per image; got {len(features)} images and groups {groups.shape}")
    means = {}
    for group in np.unique(groups).tolist():
        members = FeatureSet(features.features[groups == group])
        count = len(members)
        if count < 2:
            raise ShapeError(f"diversity needs two images or more per class; class {group} has {count}")
        means[group] = sum(float(d.sum()) for _, d in members.distances(members)) / (count * (count - 1))
    return means


def class_diversity(features: FeatureSet | np.ndarray, groups: np.ndarray) -> float:
    """Mean distance between the features of two images of one class, averaged over classes."""
    return float(np.mean(list(class_diversities(features, groups).values())))


def paired_distance(a: FeatureSet | np.ndarray, b: FeatureSet | np.ndarray) -> float:
    """Mean distance between the features of images made from the same noise and conditioning."""
    a, b = FeatureSet.of(a).features, FeatureSet.of(b).features
    if a.shape != b.shape:
        raise ShapeError(f"pairs need equal shapes; got {a.shape} and {b.shape}")
    return float(np.linalg.norm(a - b, axis=1).mean())


def agreement(images: np.ndarray, reference: np.ndarray) -> float:
    """Mean squared error per value between images made from the same noise and conditioning."""
    if images.shape != reference.shape:
        raise ShapeError(f"agreement compares equal shapes; got {images.shape} and {reference.shape}")
    return float(np.mean((np.asarray(images, np.float64) - np.asarray(reference, np.float64)) ** 2))


class Agreement(NamedTuple):
    """How well images agree with their prompts; see `prompt_agreement`."""

    accuracy: float
    similarity: float


def prompt_agreement(images: np.ndarray, prompts: np.ndarray, own: np.ndarray, *, seed: int = 0) -> Agreement:
    """Is an image's own prompt nearer to it than other prompts?

    `accuracy`: share of images whose own prompt is nearer than all of up to `DISTRACTORS` others, drawn for each image;
    a guess is right in one of as many and one. `similarity`: mean cosine of an image and its own prompt.

    Args:
        images: vectors of length 1, (N, D).
        prompts: vectors of length 1 in the same space, (P, D), each of another prompt.
        own: the prompt of each image, (N,), an index into `prompts`.
        seed: of the draw.

    Source: retrieval as in Radford et al., CLIP, arXiv:2103.00020; R-precision of Park et al., 2021.
    """
    if images.shape[1] != prompts.shape[1] or len(prompts) < 2:
        raise ShapeError(
            f"images and two prompts or more have vectors of one length; got {images.shape} and {prompts.shape}"
        )
    similarity = np.asarray(images, np.float64) @ np.asarray(prompts, np.float64).T
    random, right = np.random.default_rng(seed), []
    for row, mine in zip(similarity, own, strict=True):
        others = np.delete(np.arange(len(prompts)), mine)
        drawn = random.choice(others, min(DISTRACTORS, len(others)), replace=False)
        right.append(row[mine] > row[drawn].max())
    return Agreement(float(np.mean(right)), float(similarity[np.arange(len(own)), own].mean()))


def check_finite(array: np.ndarray, what: str, *, first: int = 0) -> None:
    """Refuse an array (M, ...) that holds NaN or infinity, naming the images; the first is number `first`.

    Raises:
        ShapeError: values that are not finite.
    """
    finite = np.isfinite(array.reshape(len(array), -1)).all(1)
    if not finite.all():
        bad = (first + np.flatnonzero(~finite)).tolist()
        named = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise ShapeError(
            f"{what} must be finite; NaN or infinity in image{'s' if len(bad) > 1 else ''} {named} (from 0)"
        )


def _unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
    width = x.shape[1]

    def kernel(p, q):
        values = p @ q.T / width + 1
        return values * values * values  # many times faster than a power

    def mean_of_pairs(p):
        values = kernel(p, p)
        return (values.sum() - np.trace(values)) / (len(p) * (len(p) - 1))

    return mean_of_pairs(x) + mean_of_pairs(y) - 2 * kernel(x, y).mean()


def _own(rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows of a block meet themselves."""
    return np.arange(rows.stop - rows.start), np.arange(rows.start, rows.stop)


def _blocks(count: int, width: int) -> Iterator[slice]:
    """Slices over `count` rows of `width` values, each of at most `_BLOCK` values."""
    rows = max(1, _BLOCK // width)
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))
