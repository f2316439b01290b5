"""Toys: their densities integrate to 1, and their draws follow them."""

import numpy as np
import pytest

from dgm_jax.data import toys

NUM = 40_000


@pytest.fixture(params=toys.NAMES)
def toy(request):
    return toys.get(request.param)


def _cells(side, reach=6.0):
    """Centres `[side², 2]` of square cells over the plane, and the area of one."""
    edges = np.linspace(-reach, reach, side + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    return np.stack(np.meshgrid(middle, middle), axis=-1).reshape(-1, 2), (edges[1] - edges[0]) ** 2


def test_the_density_integrates_to_one(toy):
    """Cells of 0.05 are as fine as the narrowest part; edges of squares fall between them."""
    points, area = _cells(240)
    np.testing.assert_allclose(np.exp(toy.log_density(points)).sum() * area, 1, rtol=1e-6)


def test_draws_follow_the_density(toy):
    """Counts over cells of 0.5: each is a binomial with the probability of its cell."""
    x, _ = toy.draw(np.random.default_rng(0), NUM)
    points, area = _cells(240)
    which = lambda x: tuple(np.floor((x.T + 6) / 0.5).astype(int))  # noqa: E731
    expected, found = np.zeros((24, 24)), np.zeros((24, 24))
    np.add.at(expected, which(points), np.exp(toy.log_density(points)) * area)
    np.add.at(found, which(x), 1)
    likely = expected * NUM > 5
    expect = NUM * expected[likely]
    chi2 = np.sum((found[likely] - expect) ** 2 / expect)
    assert chi2 < likely.sum() + 5 * np.sqrt(2 * likely.sum())
    assert found[expected == 0].sum() == 0


def test_labels_tell_the_part(toy):
    x, labels = toy.draw(np.random.default_rng(0), NUM)
    assert x.dtype == np.float32 and labels.dtype == np.int32
    share = np.bincount(toy.labels) / len(toy.labels)
    np.testing.assert_allclose(np.bincount(labels) / NUM, share, atol=5 * np.sqrt(0.25 / NUM))
    for label in range(toy.labels.max() + 1):
        own = toy.centres[toy.labels == label]
        nearest = np.linalg.norm(x[labels == label][:500, None] - own[None], axis=2).min(axis=1)
        assert nearest.max() < (0.71 if toy.sigma is None else 5 * toy.sigma)


def test_how_many_modes_there_are():
    assert [toys.get(name).num_labels for name in toys.NAMES] == [2, 8, 8, 25]
    assert len(toys.get("grid").centres) == 25 and toys.get("mnist") is None


def test_the_seed_decides_everything():
    first, again, other = (toys.generate("two_moons", seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256
    assert first.train_x.shape == (toys.NUM_TRAIN, 2) and first.test_x.shape == (toys.NUM_TEST, 2)
