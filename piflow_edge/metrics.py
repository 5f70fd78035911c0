"""Quality, diversity and agreement of generated images, from feature vectors (M, D) or from the images themselves."""

import numpy as np

from .errors import ShapeError


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Frechet distance between the Gaussians fitted to two sets of features; FID when these are an Inception's.

    `|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`, in float64. Lower is better; 0 for equal sets.

    Source: Heusel et al., GANs trained by a two time-scale update rule, arXiv:1706.08500.
    """
    a, b = _float64(features_a), _float64(features_b)
    if len(a) < 2 or len(b) < 2:
        raise ShapeError(
            f"a Frechet distance needs two images or more on each side; got {len(a)} and {len(b)}"
        )
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # tr (C_a C_b)^(1/2) through a symmetric matrix with the same eigenvalues: stable where C_a is near singular.
    values, vectors = np.linalg.eigh(np.atleast_2d(covariance_a))
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariance_b @ root), 0)).sum()
    distance = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.atleast_2d(covariance_a))
    return float(distance + np.trace(np.atleast_2d(covariance_b)) - 2 * cross)


def class_diversity(features: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance between the features of two images of one class, averaged over classes."""
    means = []
    for label in np.unique(labels):
        distances = _distances(features[labels == label], features[labels == label])
        count = len(distances)
        if count < 2:
            raise ShapeError(f"diversity needs two images or more per class; class {label} has {count}")
        means.append(distances.sum() / (count * (count - 1)))
    return float(np.mean(means))


def precision_recall(real: np.ndarray, generated: np.ndarray, *, neighbours: int = 3) -> tuple[float, float]:
    """Share of generated images that lie among the real ones, and of real ones that lie among the generated.

    A set's territory is the union of balls around its members that reach to their k-th nearest neighbour.

    Source: Kynkaanniemi et al., Improved precision and recall, arXiv:1904.06991.
    """
    between = _distances(real, generated)
    precision = np.any(between <= _reach(real, neighbours)[:, None], axis=0).mean()
    recall = np.any(between <= _reach(generated, neighbours)[None, :], axis=1).mean()
    return float(precision), float(recall)


def agreement(images: np.ndarray, reference: np.ndarray) -> float:
    """Mean squared error per value between images made from the same noise and labels."""
    if images.shape != reference.shape:
        raise ShapeError(f"agreement compares equal shapes; got {images.shape} and {reference.shape}")
    return float(np.mean((_float64(images) - _float64(reference)) ** 2))


def _reach(features, neighbours):
    if len(features) <= neighbours:
        raise ShapeError(f"precision and recall need more than {neighbours} images; got {len(features)}")
    # The nearest is the image itself, at distance 0.
    return np.partition(_distances(features, features), neighbours, axis=1)[:, neighbours]


def _distances(a, b):
    a, b = _float64(a), _float64(b)
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0))


def _float64(array):
    return np.asarray(array, np.float64)
