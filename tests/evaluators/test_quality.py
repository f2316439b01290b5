"""Sample quality: distances with closed forms, and samples whose faults are known."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from dgm_jax.data import toys
from dgm_jax.evaluators import quality
from dgm_jax.evaluators.quality import Moments

RNG = np.random.default_rng(0)


def normal(num, features, mean=0.0, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return mean + scale * rng.normal(size=(num, features))


def test_frechet_distance_of_two_gaussians():
    """In one dimension (μ₁ - μ₂)² + (σ₁ - σ₂)²; if covariances commute, of each axis."""
    axes, _ = np.linalg.qr(RNG.normal(size=(3, 3)))
    first, second = np.array([1.0, 4.0, 9.0]), np.array([4.0, 0.25, 9.0])
    means = np.array([0.0, 1.0, -2.0]), np.array([1.0, 1.0, 0.0])
    found = quality.frechet_distance(
        Moments(means[0], axes @ np.diag(first) @ axes.T),
        Moments(means[1], axes @ np.diag(second) @ axes.T),
    )
    expected = 1 + 0 + 4 + np.sum((np.sqrt(first) - np.sqrt(second)) ** 2)
    assert found == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_covariances_that_do_not_commute():
    a, b = (m @ m.T for m in RNG.normal(size=(2, 4, 4)))
    expected = np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    found = quality.frechet_distance(Moments(np.zeros(4), a), Moments(np.zeros(4), b))
    assert found == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_to_itself_is_nothing():
    """Also of a singular covariance: more features than examples."""
    of = quality.moments(normal(10, 30))
    scale = np.trace(of.covariance)
    assert 0 <= quality.frechet_distance(of, of) < 1e-9 * scale


def test_moments_are_of_all_examples_at_once():
    """x = 0, 2: mean 1, variance 2 with N - 1 and 1 with N."""
    of = quality.moments(np.array([[0.0], [2.0]], np.float32))
    assert of.mean == 1 and of.covariance == 2 and of.covariance.shape == (1, 1)
    many = normal(999, 5, 1e4)  # float32 sums of squares would keep no digit of the variance
    of = quality.moments(many)
    np.testing.assert_allclose(of.covariance, np.cov(many.T), rtol=1e-12)


def test_kernel_distance_of_two_points_each():
    """k(x, y) = (xy + 1)³ in one dimension: x = 0, 1; y = 2, 3."""

    def k(x, y):
        return (x * y + 1) ** 3

    expected = k(0, 1) + k(2, 3) - (k(0, 2) + k(0, 3) + k(1, 2) + k(1, 3)) / 2
    found = quality.kernel_distance(np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]]))
    assert found.value == pytest.approx(expected) and found.standard_error is None


def test_kernel_distance_is_unbiased():
    """Of one distribution zero within four standard errors; biased, more than twice that."""
    found = quality.kernel_distance(normal(20_000, 3), normal(20_000, 3, seed=1))
    assert abs(found.value) < 4 * found.standard_error
    assert found.num_examples == 20_000
    rows = np.einsum("ij,ij->i", normal(1000, 3), normal(1000, 3))
    bias = 2 * np.mean((rows / 3 + 1) ** 3) / 250  # of the pairs of a point with itself
    assert bias > 8 * found.standard_error


def test_neighbourhoods_of_data_and_more_data():
    """Precision and recall near 1, density 1 and coverage 1 - 2^-5 (Naeem et al. 2020, lemma 2)."""
    found = quality.neighbourhoods(normal(4000, 2), normal(4000, 2, seed=1))
    assert found.precision > 0.95 and found.recall > 0.95
    assert found.density == pytest.approx(1, abs=0.02)
    assert found.coverage == pytest.approx(1 - 2**-5, abs=0.01)


def test_dropped_modes_cost_recall_and_bad_samples_cost_precision():
    """Data in four far clusters; samples in one of them, and a third as many without data."""
    centres = [[-50, 0], [50, 0], [0, -50], [0, 50]]
    data = np.concatenate([normal(1000, 2, at, seed=i) for i, at in enumerate(centres)])
    samples = np.concatenate([normal(900, 2, [-50, 0], seed=4), normal(300, 2, 90, seed=5)])
    found = quality.neighbourhoods(samples, data)
    assert found.precision == pytest.approx(0.75, abs=0.03)
    assert found.recall == pytest.approx(0.25, abs=0.03)
    assert found.coverage == pytest.approx(0.25 * (1 - 1.9**-5), abs=0.02)
    assert found.density == pytest.approx(0.75, abs=0.03)


def test_neighbourhoods_of_six_points_each():
    """On a line, by hand: reach to the third neighbour of their own set, or to the fifth."""
    data, samples = np.arange(6.0)[:, None], 7.5 + 2 * np.arange(6.0)[:, None]
    # Third neighbours are 3, 2, 2, 2, 2, 3 away, and 6, 4, 4, 4, 4, 6; the data's fifth ones
    # 5, 4, 3, 3, 4, 5.
    expected = (
        1 / 6,  # 7.5 alone is within 3 of 5
        4 / 6,  # 2, 3, 4 and 5 are within 6 of 7.5
        3 / 30,  # 7.5 and 9.5 are within 5 of 5, and 7.5 within 4 of 4
        2 / 6,  # those two
    )
    assert quality.neighbourhoods(samples, data) == pytest.approx(expected)


def test_neighbourhoods_do_not_depend_on_how_they_are_cut(monkeypatch):
    samples, data = normal(300, 2), normal(200, 2, 0.5, seed=1)
    whole = quality.neighbourhoods(samples, data)
    cut = quality.pairwise_distances_chunked

    def in_small_pieces(*arrays, working_memory):
        pieces = list(cut(*arrays, working_memory=0.05))
        assert len(pieces) > 3
        return pieces

    monkeypatch.setattr(quality, "pairwise_distances_chunked", in_small_pieces)
    assert quality.neighbourhoods(samples, data) == whole


def test_copies_are_found_out_and_fresh_samples_are_not():
    train, held_out = normal(2000, 4), normal(1000, 4, seed=1)
    of_held_out = quality.nearest(held_out, train).distance

    def copying(samples):
        return quality.copying(quality.nearest(samples, train).distance, of_held_out)

    assert copying(train[:500]) == 1
    assert copying(train[:500] + 0.01 * normal(500, 4, seed=2)) > 0.95
    # Over its standard deviation (12 · 333)^-½ = 0.016, five times.
    assert copying(normal(500, 4, seed=3)) == pytest.approx(0.5, abs=0.08)
    assert copying(normal(500, 4, seed=3, scale=5)) < 0.1
    assert quality.copying(of_held_out, of_held_out) == 0.5


def test_the_nearest_row_is_the_nearest():
    found = quality.nearest(np.array([[0.9], [5.0]]), np.array([[0.0], [1.0], [4.0]]))
    np.testing.assert_array_equal(found.row, [1, 2])
    np.testing.assert_allclose(found.distance, [0.1, 1.0])


def test_modes_of_a_toy():
    """All of its own draws; one fewer when a mode is left out; of noise few are in any."""
    toy = toys.get("grid")
    points, label = toy.draw(np.random.default_rng(0), 5000)
    found = quality.modes(points, toy)
    assert found["modes"].value == 25
    inside = 1 - np.exp(-(3**2) / 2)  # of a Gaussian in the plane within three deviations
    assert found["in_a_mode"].value == pytest.approx(inside, abs=0.006)
    assert quality.modes(points[label != 7], toy)["modes"].value == 24
    noise = np.random.default_rng(1).uniform(-5, 5, (5000, 2))
    area = 25 * np.pi * 0.15**2 / 100
    assert quality.modes(noise, toy)["in_a_mode"].value == pytest.approx(area, abs=0.006)


def test_modes_that_are_moons_or_squares():
    board, moons = toys.get("checkerboard"), toys.get("two_moons")
    points, label = board.draw(np.random.default_rng(0), 5000)
    assert quality.modes(points, board)["in_a_mode"].value == 1
    assert quality.modes(points[label != 3], board)["modes"].value == 7
    noise = np.random.default_rng(1).uniform(-2, 2, (5000, 2))  # half of the board is black
    assert quality.modes(noise, board)["in_a_mode"].value == pytest.approx(0.5, abs=0.035)
    points, label = moons.draw(np.random.default_rng(0), 5000)
    assert [quality.modes(x, moons)["modes"].value for x in (points, points[label == 0])] == [2, 1]
