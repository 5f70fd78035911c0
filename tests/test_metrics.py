import numpy as np
import pytest

from piflow_edge.errors import PiFlowError
from piflow_edge.metrics import agreement, class_diversity, frechet_distance, precision_recall


def gaussian(seed, count=4000, *, shift=0.0, scale=1.0, width=6):
    return np.random.default_rng(seed).standard_normal((count, width)) * scale + shift


def test_frechet_distance_of_a_set_to_itself_is_zero():
    features = gaussian(0)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_has_its_closed_form():
    # N(0, I) against N(d, s^2 I) in n dimensions: n d^2 + n (1 - s)^2, up to sampling error.
    assert frechet_distance(gaussian(0), gaussian(1, shift=2.0)) == pytest.approx(6 * 4, rel=0.03)
    assert frechet_distance(gaussian(0), gaussian(1, scale=3.0)) == pytest.approx(6 * 4, rel=0.05)


def test_frechet_distance_agrees_with_a_matrix_square_root():
    linalg = pytest.importorskip("scipy.linalg", reason="scipy comes with the 'train' extra")
    a, b = gaussian(0) @ gaussian(2, 6), gaussian(1, shift=0.3) @ gaussian(3, 6)
    c_a, c_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(c_a + c_b - 2 * linalg.sqrtm(c_a @ c_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_features_that_never_vary_do_not_break_the_frechet_distance():
    a, b = gaussian(0), gaussian(1)
    a[:, 0] = b[:, 0] = 0.0
    assert 0 <= frechet_distance(a, b) < 0.1


def test_diversity_is_the_mean_distance_inside_a_class():
    features, labels = np.array([[0.0], [2.0], [10.0], [11.0], [12.0]]), np.array([0, 0, 1, 1, 1])
    # class 0: 2; class 1: (1 + 2 + 1) / 3
    assert class_diversity(features, labels) == pytest.approx((2 + 4 / 3) / 2)


def test_collapse_shows_in_recall_and_noise_in_precision():
    real = gaussian(0, 400)
    assert precision_recall(real, real) == (1.0, 1.0)
    precision, recall = precision_recall(real, gaussian(1, 400, scale=0.05))
    assert precision > 0.9 and recall < 0.1
    precision, recall = precision_recall(real, gaussian(1, 400, scale=4.0))
    assert precision < 0.3 and recall > 0.8


def test_agreement_is_the_mean_squared_error():
    assert agreement(np.zeros((2, 1, 2, 2)), np.full((2, 1, 2, 2), 0.5)) == 0.25
    with pytest.raises(PiFlowError, match="equal shapes"):
        agreement(np.zeros((2, 1)), np.zeros((1, 2)))


def test_too_few_images_are_refused():
    for measure in (
        lambda: frechet_distance(gaussian(0, 1), gaussian(0, 9)),
        lambda: class_diversity(gaussian(0, 3), np.array([0, 0, 1])),
        lambda: precision_recall(gaussian(0, 3), gaussian(0, 9)),
    ):
        with pytest.raises(PiFlowError):
            measure()
