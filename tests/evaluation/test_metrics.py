"""Every figure against its closed form, or against the definition written out."""

import tracemalloc

import numpy as np
import pytest

from piflow_edge.errors import PiFlowError, ShapeError
from piflow_edge.evaluation import metrics
from piflow_edge.evaluation.metrics import (
    FeatureSet,
    agreement,
    class_diversities,
    class_diversity,
    frechet_distance,
    kernel_distance,
    paired_distance,
    territory,
)


def gaussian(seed, count=4000, *, shift=0.0, scale=1.0, width=6):
    return np.random.default_rng(seed).standard_normal((count, width)) * scale + shift


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows, the last of them shorter: what large sets meet."""
    monkeypatch.setattr(metrics, "_BLOCK", 700)


class TestFrechetDistance:
    def test_of_a_set_to_itself_is_zero(self):
        features = gaussian(0)
        assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)

    def test_has_its_closed_form(self):
        # N(0, I) against N(d, s^2 I) in n dimensions: n d^2 + n (1 - s)^2, up to sampling error.
        assert frechet_distance(gaussian(0), gaussian(1, shift=2.0)) == pytest.approx(6 * 4, rel=0.03)
        assert frechet_distance(gaussian(0), gaussian(1, scale=3.0)) == pytest.approx(6 * 4, rel=0.05)

    def test_agrees_with_a_matrix_square_root(self, small_blocks):
        linalg = pytest.importorskip("scipy.linalg", reason="scipy comes with the 'train' extra")
        a, b = gaussian(0) @ gaussian(2, 6), gaussian(1, shift=0.3) @ gaussian(3, 6)
        c_a, c_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        root = linalg.sqrtm(c_a @ c_b).real
        expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(c_a + c_b - 2 * root)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
        assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)

    def test_survives_features_that_never_vary_and_fewer_images_than_features(self):
        a, b = gaussian(0), gaussian(1)
        a[:, 0] = b[:, 0] = 0.0
        assert 0 <= frechet_distance(a, b) < 0.1
        few = gaussian(2, 20, width=50)
        # Thirty directions without variance: each leaves the root of float64's rounding, of a trace of 50.
        assert frechet_distance(few, few) == pytest.approx(0, abs=30 * 1e-8 * 50)

    def test_of_one_feature(self):
        # (0 - 3)^2 + (1 - 2)^2
        assert frechet_distance([[-1.0], [0.0], [1.0]], [[1.0], [3.0], [5.0]]) == pytest.approx(9 + 1)


class TestKernelDistance:
    def test_of_one_subset_is_the_definition(self):
        a, b = gaussian(0, 12, width=3), gaussian(1, 14, shift=0.5, width=3)
        x = a[np.random.default_rng(5).choice(12, 6, replace=False)]  # the draws in their documented order
        random = np.random.default_rng(5)
        random.choice(12, 6, replace=False)
        y = b[random.choice(14, 6, replace=False)]

        def kernel(p, q):
            return (np.dot(p, q) / 3 + 1) ** 3

        def inside(z):
            return sum(kernel(z[i], z[j]) for i in range(6) for j in range(6) if i != j) / (6 * 5)

        expected = inside(x) + inside(y) - 2 * sum(kernel(p, q) for p in x for q in y) / 36
        answer = kernel_distance(a, b, subsets=1, seed=5)
        assert answer.mean == pytest.approx(expected, rel=1e-12) and answer.std == 0

    def test_has_its_closed_form(self):
        # In one dimension (xy + 1)^3 = 1 + 3xy + 3x^2y^2 + x^3y^3, so MMD^2 = 3 d1^2 + 3 d2^2 + d3^2 with d_i the
        # difference of the i-th moments; N(0, 1) has 0, 1, 0 and N(1, 1) has 1, 2, 4.
        a, b = gaussian(0, 20000, width=1), gaussian(1, 20000, shift=1.0, width=1)
        mean, std = kernel_distance(a, b, subsets=30)
        assert mean == pytest.approx(3 * 1 + 3 * 1 + 16, rel=0.05)
        assert 0 < std < mean

    def test_is_unbiased(self):
        means = [kernel_distance(gaussian(s, 200), gaussian(s + 100, 200), subsets=5).mean for s in range(40)]
        # Within three standard errors of 0. The biased estimate would be above 0 by more than ten.
        assert abs(np.mean(means)) < 3 * np.std(means) / np.sqrt(40)

    def test_subsets_are_the_same_every_time_and_differ_from_each_other(self):
        a, b = gaussian(0, 300), gaussian(1, 300)
        assert kernel_distance(a, b) == kernel_distance(FeatureSet(a), FeatureSet(b))
        assert kernel_distance(a, b).std > 0  # with subsets of all 300 it would be 0


class TestTerritory:
    def test_collapse_shows_in_recall_and_noise_in_precision(self):
        real = gaussian(0, 400)
        assert territory(real, real)[:2] == (1.0, 1.0)
        narrow = territory(real, gaussian(1, 400, scale=0.05))
        assert narrow.precision > 0.9 and narrow.recall < 0.1
        assert narrow.density > 1.5 and narrow.coverage < 0.2
        wide = territory(real, gaussian(1, 400, scale=4.0))
        assert wide.precision < 0.3 and wide.recall > 0.8
        assert wide.density < 0.3 and wide.coverage < 0.3

    def test_density_and_coverage_of_equal_distributions(self):
        # Naeem et al., section 4: density 1, coverage 1 - (m-1)...(m-k) / (2m-1)...(2m-k), whatever the distribution.
        answers = [territory(gaussian(s, 300), gaussian(s + 50, 300)) for s in range(10)]
        expected = 1 - np.prod([(300 - i) / (600 - i) for i in range(1, 6)])
        assert np.mean([a.density for a in answers]) == pytest.approx(1, abs=0.05)
        assert np.mean([a.coverage for a in answers]) == pytest.approx(expected, abs=0.01)

    @pytest.mark.parametrize("neighbours", [(3, 5), (1, 10)])
    def test_is_the_definition_and_blocks_change_nothing(self, small_blocks, neighbours):
        real, made = gaussian(0, 60), gaussian(1, 50, shift=0.5)

        def balls(points, k):
            return [
                sorted(np.linalg.norm(points - p, axis=1))[k] for p in points
            ]  # the first is the point itself

        k, k_density = neighbours
        between = np.array([[np.linalg.norm(r - g) for g in made] for r in real])
        in_real = between <= np.array(balls(real, k))[:, None]
        in_made = between <= np.array(balls(made, k))[None, :]
        in_dense = between <= np.array(balls(real, k_density))[:, None]
        expected = (
            in_real.any(0).mean(),
            in_made.any(1).mean(),
            in_dense.sum() / k_density / 50,
            in_dense.any(1).mean(),
        )
        answer = territory(real, made, neighbours=k, density_neighbours=k_density)
        assert answer == pytest.approx(expected, abs=1e-12)

    def test_large_sets_need_no_matrix_of_all_distances(self):
        real, made = gaussian(0, 6000), gaussian(1, 6000)
        tracemalloc.start()
        territory(real, made)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # All distances would be 288 MB. A block is 64 MB, and a few stand side by side.
        assert peak < 240e6


def test_diversity_is_the_mean_distance_inside_a_class(small_blocks):
    features, labels = np.array([[0.0], [2.0], [10.0], [11.0], [12.0]]), np.array([0, 0, 7, 7, 7])
    assert class_diversities(features, labels) == pytest.approx({0: 2, 7: (1 + 2 + 1) / 3})
    assert class_diversity(features, labels) == pytest.approx((2 + 4 / 3) / 2)
    features, labels = gaussian(0, 90), np.arange(90) % 2
    odd = features[1::2]
    expected = sum(np.linalg.norm(a - b) for a in odd for b in odd) / (45 * 44)
    assert class_diversities(features, labels)[1] == pytest.approx(expected, rel=1e-12)


def test_agreement_is_the_mean_squared_error():
    assert agreement(np.zeros((2, 1, 2, 2)), np.full((2, 1, 2, 2), 0.5)) == 0.25
    with pytest.raises(PiFlowError, match="equal shapes"):
        agreement(np.zeros((2, 1)), np.zeros((1, 2)))


def test_paired_distance_is_the_mean_over_pairs():
    assert paired_distance([[0.0, 0.0], [1.0, 1.0]], [[3.0, 4.0], [1.0, 2.0]]) == pytest.approx((5 + 1) / 2)
    with pytest.raises(PiFlowError, match="equal shapes"):
        paired_distance(np.zeros((2, 1)), np.zeros((1, 1)))


def test_too_few_images_are_refused():
    for measure in (
        lambda: frechet_distance(gaussian(0, 1), gaussian(0, 9)),
        lambda: kernel_distance(gaussian(0, 3), gaussian(0, 9)),
        lambda: class_diversity(gaussian(0, 3), np.array([0, 0, 1])),
        lambda: territory(gaussian(0, 9), gaussian(0, 3)),
        lambda: territory(gaussian(0, 4), gaussian(0, 9)),
    ):
        with pytest.raises(PiFlowError):
            measure()


def test_features_of_another_kind_or_shape_are_refused():
    with pytest.raises(ShapeError, match="6 and 5"):
        territory(gaussian(0, 9), gaussian(0, 9, width=5))
    with pytest.raises(ShapeError, match="vector per image"):
        FeatureSet(np.zeros(4))
    with pytest.raises(ShapeError, match="one group per image"):
        class_diversities(gaussian(0, 4), np.array([0, 0]))


def test_features_that_are_not_finite_are_refused_with_the_images_they_are_of():
    features = gaussian(0, 20)
    features[3, 1], features[17, 0] = np.nan, np.inf
    with pytest.raises(ShapeError, match=r"teacher .*finite.* 3, 17 "):
        FeatureSet(features, "the teacher")
    features[:] = np.nan
    with pytest.raises(ShapeError, match="0, 1, 2, 3, 4 and 15 more"):
        FeatureSet(features)
