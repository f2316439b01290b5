"""Generated shapes: each factor is where image moments find it, and draws are uniform."""

import numpy as np
import pytest
from scipy import stats

from dgm_jax.data import shapes

PIXELS = np.arange(shapes.SIDE) - (shapes.SIDE - 1) / 2


@pytest.fixture(scope="module")
def some():
    """Factors and images [N, 28, 28] in [0, 1]: every shape, scale and rotation, various places."""
    rng = np.random.default_rng(0)
    first = np.stack(np.meshgrid(*map(np.arange, (3, 6, 10)), indexing="ij"), -1).reshape(-1, 3)
    factors = np.concatenate([first, rng.integers(0, 16, (len(first), 2))], axis=1)
    corners = [
        [s, 5, r, x, y] for s in range(3) for r in (0, 5, 9) for x in (0, 15) for y in (0, 15)
    ]
    factors = np.concatenate([factors, corners]).astype(np.int32)
    return factors, shapes.render(factors)[..., 0] / 255.0


def _centres(images):
    """Areas and centres of mass (area, x, y), each [N]."""
    area = images.sum(axis=(1, 2))
    return area, images.sum(axis=1) @ PIXELS / area, images.sum(axis=2) @ PIXELS / area


def test_the_area_follows_scale_whatever_the_other_factors(some):
    """From 25 to 64 square pixels, in equal steps of the root; grey edges are right to 6%."""
    factors, images = some
    expected = (5 + 3 * factors[:, 1] / 5) ** 2
    np.testing.assert_allclose(_centres(images)[0], expected, rtol=0.06)


def test_the_centre_of_mass_follows_x_and_y(some):
    factors, images = some
    _, x, y = _centres(images)
    for found, values in ((x, factors[:, 3]), (y, factors[:, 4])):
        np.testing.assert_allclose(found, -4.5 + 9 * values / 15, atol=0.2)


def test_the_long_axis_follows_rotation(some):
    """Of the second moments: half the angle of (xx - yy, 2 xy); 9 degrees a step."""
    factors, images = some
    area, x, y = _centres(images)
    dx, dy = PIXELS - x[:, None], PIXELS - y[:, None]
    xx = np.einsum("nij,nj->n", images, dx**2) / area
    yy = np.einsum("nij,ni->n", images, dy**2) / area
    xy = np.einsum("nij,ni,nj->n", images, dy, dx) / area
    degrees = np.rad2deg(np.arctan2(2 * xy, xx - yy)) / 2
    difference = (degrees - 9 * factors[:, 2] + 90) % 180 - 90
    assert np.max(np.abs(difference)) < 2.5


def test_a_shape_is_told_by_its_fourth_moment_and_its_skewness():
    """Along the long axis of an upright one: E[u⁴] / E[u²]² is 9/5 of a rectangle and 2 of an
    ellipse; E[u³] / E[u²]^(3/2) of a triangle is √(8/25) towards the apex, and else 0."""
    images = shapes.render(np.array([[s, 5, 0, 8, 8] for s in range(3)]))[..., 0] / 255.0
    area, x, _ = _centres(images)
    u = PIXELS - x[:, None]
    second, third, fourth = (np.einsum("nij,nj->n", images, u**power) / area for power in (2, 3, 4))
    np.testing.assert_allclose((fourth / second**2)[:2], [9 / 5, 2], rtol=0.02)
    np.testing.assert_allclose(third / second**1.5, [0, 0, np.sqrt(8 / 25)], atol=0.02)


def test_no_shape_is_cut_by_the_border(some):
    """The outermost pixels may be grey, no more than an edge covers."""
    _, images = some
    frame = np.ones((shapes.SIDE, shapes.SIDE), bool)
    frame[1:-1, 1:-1] = False
    assert images[:, frame].max() < 0.7


@pytest.fixture(scope="module")
def generated():
    return shapes.generate(0)


def test_factors_are_uniform_and_independent(generated):
    factors = generated.train_factors
    sizes = list(shapes.FACTORS.values())
    assert factors.shape == (20_000, 5) and factors.dtype == np.int32
    for i, size in enumerate(sizes):
        assert stats.chisquare(np.bincount(factors[:, i], minlength=size)).pvalue > 1e-4
        for j in range(i):
            table = np.histogram2d(factors[:, j], factors[:, i], bins=(sizes[j], size))[0]
            assert stats.chi2_contingency(table).pvalue > 1e-4
    np.testing.assert_array_equal(generated.arrays.train_labels, factors[:, 0])
    np.testing.assert_array_equal(generated.arrays.test_labels, generated.test_factors[:, 0])


def test_x_are_those_of_their_factors(generated):
    rows = np.array([0, 999, 1000, 4999])  # also on both sides of a part's end
    np.testing.assert_array_equal(
        generated.arrays.test_x[rows], shapes.render(generated.test_factors[rows])
    )


def test_pictures_are_told_apart_by_their_factors(generated):
    """No two combinations give one picture."""
    rows = generated.arrays.train_x.reshape(20_000, -1)
    assert len(np.unique(rows, axis=0)) == len(np.unique(generated.train_factors, axis=0))


def test_the_seed_decides_everything(monkeypatch):
    monkeypatch.setattr(shapes, "NUM_TRAIN", 300)
    first, again, other = (shapes.generate(seed) for seed in (0, 0, 1))
    assert again.arrays.sha256 == first.arrays.sha256 != other.arrays.sha256
    np.testing.assert_array_equal(again.test_factors, first.test_factors)
    assert np.mean(other.test_factors[:, 3] == first.test_factors[:, 3]) < 0.1
