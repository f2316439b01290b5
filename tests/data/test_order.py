"""The order of the data: a bijection, uniform, the same wherever it is computed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dgm_jax.data.order import batch_ids, permute


def _permutations(seed, count, n):
    """`count` permutations of n: int `[count, n]`."""
    round_keys = jax.random.bits(jax.random.key(seed), (count, 8))
    one = jax.vmap(permute, in_axes=(0, None, None))
    return np.asarray(jax.jit(lambda k: jax.vmap(lambda k: one(jnp.arange(n), k, n))(k))(round_keys))


def _p_value(values, num_categories):
    """Of the chi-square test that integers `values` are uniform."""
    counts = np.bincount(np.ravel(values), minlength=num_categories)
    assert len(counts) == num_categories
    return stats.chisquare(counts).pvalue


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 100, 255, 256, 257, 1000, 4500, 60_000])
def test_permute_is_a_bijection(n):
    for order in _permutations(n, 3, n):
        np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_permute_reaches_the_largest_domains():
    """Distinct and in range also where n needs 31 bits."""
    n = 2**31 - 1
    position = jnp.concatenate([jnp.arange(5000), n - 1 - jnp.arange(5000)])
    round_keys = jax.random.bits(jax.random.key(0), (8,))
    ids = np.asarray(jax.vmap(permute, in_axes=(0, None, None))(position, round_keys, n))
    assert len(np.unique(ids)) == 10_000 and ids.min() >= 0 and ids.max() < n
    assert stats.kstest(ids / n, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_permutation_is_equally_likely(n):
    orders = _permutations(0, 24_000, n)
    names = {order: i for i, order in enumerate(itertools.permutations(range(n)))}
    assert _p_value([names[tuple(order)] for order in orders.tolist()], len(names)) > 1e-4


@pytest.mark.parametrize("n", [5, 10, 13])
def test_positions_and_neighbours_are_uniform(n):
    """Over many orders: what is at a place, and which ordered pair follows one another there."""
    orders = _permutations(1, 20_000, n)
    for place in range(n):
        assert _p_value(orders[:, place], n) > 1e-4
    for place in range(n - 1):
        first, second = orders[:, place], orders[:, place + 1]
        second = second - (second > first)  # n - 1 left to choose from
        assert _p_value(first * (n - 1) + second, n * (n - 1)) > 1e-4


def test_a_long_order_looks_random():
    """Its serial correlation, fixed points and number of ascents are a random permutation's."""
    n = 60_000
    for order in _permutations(2, 3, n):
        position = np.arange(n)
        assert abs(np.corrcoef(position, order)[0, 1]) < 4 / np.sqrt(n)
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / np.sqrt(n)
        assert stats.poisson(1).sf(np.sum(order == position) - 1) > 1e-4
        # Ascents: mean (n-1)/2, variance (n+1)/12.
        assert abs(np.sum(np.diff(order) > 0) - (n - 1) / 2) < 4 * np.sqrt((n + 1) / 12)


def _epoch(seed, epoch, batch_size, n):
    per_epoch = n // batch_size
    steps = epoch * per_epoch + jnp.arange(per_epoch)
    ids = jax.vmap(lambda step: batch_ids(jnp.int32(seed), step, batch_size, n))(steps)
    assert ids.shape == (per_epoch, batch_size) and ids.dtype == jnp.int32
    return np.asarray(ids)


@pytest.mark.parametrize(("batch_size", "n"), [(100, 4000), (7, 100), (1, 5), (100, 100)])
def test_an_epoch_visits_distinct_examples(batch_size, n):
    """Every one of them, but for a remainder smaller than a batch."""
    for epoch in range(3):
        ids = _epoch(0, epoch, batch_size, n)
        assert len(np.unique(ids)) == ids.size == n - n % batch_size
        assert ids.min() >= 0 and ids.max() < n


def test_epochs_and_seeds_differ():
    """Two random orders of 4,000 agree in about one place (Poisson: over 10 is 1 in 10^8)."""
    orders = [_epoch(seed, epoch, 100, 4000).ravel() for seed in (0, 1) for epoch in (0, 1)]
    for a, b in itertools.combinations(orders, 2):
        assert np.sum(a == b) <= 10


def test_the_remainder_left_out_differs_between_epochs_and_is_uniform():
    left_out = [
        np.setdiff1d(np.arange(10), _epoch(0, epoch, 4, 10)).tolist() for epoch in range(3)
    ]
    assert len(set(map(tuple, left_out))) > 1
    first_steps = 2 * jnp.arange(5000)  # of 5,000 epochs of two batches of 4
    both = jnp.concatenate([first_steps, first_steps + 1])
    ids = jax.jit(jax.vmap(lambda step: batch_ids(jnp.int32(3), step, 4, 10)))(both)
    counts = np.bincount(np.ravel(ids), minlength=10)
    # Visited with probability 8/10 in each epoch.
    assert np.all(np.abs(counts - 4000) < 4 * np.sqrt(5000 * 0.8 * 0.2))


def test_traced_and_batched_over_seeds_it_is_the_same():
    seeds, steps = jnp.array([0, 1, 12345], jnp.int32), jnp.array([0, 9, 1007], jnp.int32)
    both = jax.vmap(jax.vmap(lambda a, b: batch_ids(a, b, 32, 300), (None, 0)), (0, None))
    traced = jax.jit(both)(seeds, steps)
    for i, seed in enumerate(seeds):
        for j, step in enumerate(steps):
            np.testing.assert_array_equal(traced[i, j], batch_ids(seed, step, 32, 300))
