"""Codes, their gradients and a codebook that follows its vectors, against their definitions."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax import sharding
from dgm_jax.nn import quantise

B, N, D, K = 8, 3, 2, 5
RNG = np.random.default_rng(0)
V, CODEBOOK = RNG.normal(size=(B, N, D)), RNG.normal(size=(K, D))
ONES = np.ones(B)
UPDATE = jax.jit(quantise.ema_update)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def test_the_nearest_entry_is_that_of_the_smallest_distance():
    distances = np.linalg.norm(V[:, :, None] - CODEBOOK, axis=-1)
    index = quantise.nearest(jnp.asarray(V), jnp.asarray(CODEBOOK))
    np.testing.assert_array_equal(index, distances.argmin(axis=-1))
    assert len(np.unique(index)) > 2


def test_straight_through_has_the_codes_value_and_the_vectors_gradient():
    """To the bit, even where the vector is so large that adding a difference would round."""
    with jax.enable_x64(False):
        v, code = jnp.array([1e8, -3.0, 0.1]), jnp.array([0.3, 0.7, -0.2])
        np.testing.assert_array_equal(quantise.straight_through(v, code), code)
        weight = jnp.array([2.0, -1.0, 5.0])
        cost = lambda v, code: weight @ quantise.straight_through(v, code) ** 2  # noqa: E731
        to_v, to_code = jax.jit(jax.grad(cost, argnums=(0, 1)))(v, code)
        np.testing.assert_allclose(to_v, 2 * weight * code, rtol=1e-6)
        np.testing.assert_array_equal(to_code, 0)


def _updates(batches, decay, weight=ONES):
    state = quantise.ema_state(jnp.asarray(CODEBOOK))
    for v, index in batches:
        state = UPDATE(state, v, index, weight, decay)
    return state


def _batches(num):
    rng = np.random.default_rng(1)
    return [
        (jnp.asarray(rng.normal(size=(B, N, D))), jnp.asarray(rng.integers(0, K - 1, (B, N))))
        for _ in range(num)
    ]


def test_the_codebook_is_the_weighted_mean_of_the_vectors_seen():
    """Σ_t γ^(T-t) Σ v / Σ_t γ^(T-t) n over all batches; an entry never used stays."""
    decay, batches = 0.7, _batches(4)
    state = _updates(batches, decay)
    total, count = np.zeros((K, D)), np.zeros(K)
    for age, (v, index) in enumerate(reversed(batches)):
        for k in range(K):
            chosen = np.asarray(v)[np.asarray(index) == k]
            total[k] += decay**age * chosen.sum(axis=0)
            count[k] += decay**age * len(chosen)
    assert (count[:-1] > 0).all() and count[-1] == 0
    np.testing.assert_allclose(state["codebook"][:-1], total[:-1] / count[:-1, None], rtol=1e-10)
    np.testing.assert_array_equal(state["codebook"][-1], CODEBOOK[-1])
    np.testing.assert_allclose(state["count"], (1 - decay) * count, rtol=1e-12)


def test_a_first_update_moves_an_entry_to_the_mean_of_its_vectors_whatever_the_decay():
    for decay in (0.0, 0.5, 0.999):
        ((v, index),) = batch = _batches(1)
        means = [np.asarray(v)[np.asarray(index) == k].mean(axis=0) for k in range(K - 1)]
        np.testing.assert_allclose(_updates(batch, decay)["codebook"][:-1], means, rtol=1e-10)


def test_an_entry_long_unused_stays_and_comes_back():
    """2,000 steps at γ = 0.9 underflow its count in 32 bits: neither NaN nor a leap to the origin.

    What it then meets is all that it remembers.
    """
    with jax.enable_x64(False):
        state = quantise.ema_state(jnp.array([[1.0], [5.0]]))
        weight, v = jnp.ones(1), jnp.array([[[5.0]]])
        update = lambda state, v, k: UPDATE(state, v, k, weight, 0.9)  # noqa: E731
        state = update(state, jnp.array([[[1.25]]]), jnp.array([[0]]))
        for _ in range(2000):
            state = update(state, v, jnp.array([[1]]))
        assert float(state["count"][0]) == 0
        np.testing.assert_allclose(state["codebook"], [[1.25], [5.0]], rtol=1e-6)
        state = update(state, jnp.array([[[3.0]]]), jnp.array([[0]]))
        np.testing.assert_allclose(state["codebook"][0], [3.0], rtol=1e-6)


def test_padded_rows_move_no_entry_and_use_no_code():
    ((v, index),) = _batches(1)
    weight = np.arange(B) < 5
    padded = _updates([(v, index)], 0.9, weight.astype(float))
    alone = _updates([(v[:5], index[:5])], 0.9, np.ones(5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), padded, alone)
    np.testing.assert_allclose(
        quantise.perplexity(index, K, jnp.asarray(weight, float)),
        quantise.perplexity(index[:5], K, jnp.ones(5)),
        rtol=1e-12,
    )


def test_the_update_is_the_same_on_one_device_and_on_eight():
    ((v, index),) = _batches(1)
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    state, weight = quantise.ema_state(jnp.asarray(CODEBOOK)), jnp.asarray(ONES)
    update = lambda *args: UPDATE(state, *args, 0.9)  # noqa: E731
    split = jax.device_put((v, index, weight), sharding.split_batch(mesh))
    one, eight = update(v, index, weight), update(*split)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), one, eight)


def test_perplexity_is_the_number_of_codes_used_alike():
    for used in (1, 2, K):
        index = jnp.asarray(np.arange(4 * used).reshape(2, -1) % used)
        value = quantise.perplexity(index, K, jnp.ones(2))
        np.testing.assert_allclose(value, used, rtol=1e-12)
    value = quantise.perplexity(jnp.array([[0, 0, 0, 1]]), K, jnp.ones(1))
    np.testing.assert_allclose(value, math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))


LEVELS = [(2,), (3,), (4,), (5, 2), (3, 4, 2), (8, 5, 5)]


@pytest.mark.parametrize("levels", LEVELS)
def test_index_and_code_of_fsq_are_a_bijection(levels):
    """Every index has its own code, on the grid of the levels, and each code its index."""
    codes = np.asarray(quantise.fsq_codebook(levels))
    grid = {tuple(c) for c in itertools.product(*(np.linspace(-1, 1, n) for n in levels))}
    assert {tuple(np.round(c, 6)) for c in codes} == {tuple(np.round(c, 6)) for c in grid}
    assert len(codes) == len(grid) == math.prod(levels)
    index = quantise.fsq_index(jnp.asarray(codes), levels)
    np.testing.assert_array_equal(index, np.arange(len(codes)))


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_rounds_to_the_nearest_level(levels):
    """Odd numbers of levels have one at 0, even ones a boundary; ±∞ reach the outermost."""
    u = np.random.default_rng(0).uniform(-1, 1, (500, len(levels)))
    found = np.asarray(quantise.fsq_codebook(levels))[quantise.fsq_index(jnp.asarray(u), levels)]
    for i, num in enumerate(levels):
        grid = np.linspace(-1, 1, num)
        expected = grid[np.abs(u[:, i, None] - grid).argmin(axis=1)]
        np.testing.assert_allclose(found[:, i], expected, atol=1e-6)
        assert (0 in grid) == (num % 2 == 1)
    ends = jnp.tanh(jnp.array([[-50.0], [50.0]]) * jnp.ones((1, len(levels))))
    np.testing.assert_array_equal(quantise.fsq_index(ends, levels), [0, math.prod(levels) - 1])


def test_the_gradient_of_fsq_is_that_of_its_bound():
    levels, raw = (3, 4), jnp.asarray(RNG.normal(size=(6, 2)))

    def code(raw):
        u = jnp.tanh(raw)
        index = quantise.fsq_index(u, levels)
        return quantise.straight_through(u, quantise.fsq_codebook(levels)[index])

    grad = jax.jit(jax.grad(lambda raw: jnp.sum(3 * code(raw))))(raw)
    np.testing.assert_allclose(grad, 3 / np.cosh(raw) ** 2, rtol=1e-10)
