"""Quantisers against their formulas, and densities of codes by enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dgm_jax.nn import quantise

NUM, CLASSES = 3, 3
ALL = np.array(list(itertools.product(range(CLASSES), repeat=NUM)))


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _prior():
    """A density of three codes with random parameters."""
    net = quantise.AutoregressiveCodes(NUM, CLASSES, width=8)
    z = jnp.asarray(np.eye(CLASSES)[ALL])
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), z, method="log_prob"))
    rng = np.random.default_rng(0)
    return net.bind(jax.tree.map(lambda p: rng.normal(size=p.shape), shapes)), z


def test_nearest_is_the_nearest():
    rng = np.random.default_rng(0)
    z, codebook = rng.normal(size=(5, 4, 3)), rng.normal(size=(7, 3))
    distance = np.sum((z[..., None, :] - codebook) ** 2, axis=-1)
    found = quantise.nearest(jnp.asarray(z), jnp.asarray(codebook))
    np.testing.assert_array_equal(found, distance.argmin(axis=-1))


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
    z, codes = jnp.array([0.3, -0.2]), jnp.array([1.0, -1.0])

    def cost(z, codes):
        return jnp.sum(quantise.straight_through(z, codes) ** 2)

    np.testing.assert_allclose(quantise.straight_through(z, codes), codes)
    to_z, to_codes = jax.grad(cost, argnums=(0, 1))(z, codes)
    np.testing.assert_allclose(to_z, 2 * codes)  # as if z had been at the codes
    np.testing.assert_array_equal(to_codes, 0)


def test_an_ema_codebook_moves_to_the_mean_of_its_vectors():
    """One step by hand, and many: entries end at the means; rows without weight do not count."""
    usage = quantise.Usage(jnp.ones(2), jnp.array([[1.0, 0.0], [0.0, 1.0]]))
    z = jnp.array([[2.0, 0.0], [4.0, 0.0], [0.0, 6.0], [100.0, 100.0]])
    index, weight = jnp.array([0, 0, 1, 1]), jnp.array([1.0, 1.0, 1.0, 0.0])
    once = quantise.updated_usage(usage, z, index, weight, decay=0.9)
    np.testing.assert_allclose(once.count, [0.9 + 0.2, 0.9 + 0.1])
    np.testing.assert_allclose(once.total, [[0.9 + 0.6, 0.0], [0.0, 0.9 + 0.6]])
    for _ in range(200):
        usage = quantise.updated_usage(usage, z, index, weight, decay=0.9)
    np.testing.assert_allclose(usage.codebook, [[3.0, 0.0], [0.0, 6.0]], rtol=2e-5)


def test_an_entry_that_is_never_used_stays_finite():
    usage = quantise.Usage(jnp.array([3.0, 0.0]), jnp.zeros((2, 2)))
    assert np.isfinite(usage.codebook).all()


@pytest.mark.parametrize("devices", [1, 8])
def test_an_ema_codebook_is_the_same_on_any_number_of_devices(devices):
    rng = np.random.default_rng(1)
    z, index = rng.normal(size=(16, 2)), rng.integers(0, 4, 16)
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    usage = quantise.Usage(jnp.ones(4), jnp.zeros((4, 2)))
    split = NamedSharding(mesh, PartitionSpec("data"))
    arrays = jax.device_put((z, index, np.ones(16)), split)
    usage = jax.device_put(usage, NamedSharding(mesh, PartitionSpec()))
    found = jax.jit(lambda u, a: quantise.updated_usage(u, *a, 0.9))(usage, arrays)
    total = np.stack([z[index == c].sum(axis=0) for c in range(4)])
    np.testing.assert_allclose(found.total, 0.1 * total, rtol=1e-12)
    np.testing.assert_allclose(found.count, 0.9 + 0.1 * np.bincount(index, minlength=4))


def test_perplexity_counts_the_codes_in_use():
    ones = jnp.ones(6)
    assert quantise.perplexity(jnp.arange(6), 6, ones) == pytest.approx(6)
    assert quantise.perplexity(jnp.zeros(6, int), 6, ones) == pytest.approx(1)
    half = jnp.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert quantise.perplexity(jnp.arange(6), 6, half) == pytest.approx(2)


@pytest.mark.parametrize("levels", [(5,), (4,), (2, 3), (3, 4, 5)])
def test_finite_scalars_take_every_value_and_are_numbered_one_to_one(levels):
    num = int(np.prod(levels))
    codes = quantise.index_to_scalars(jnp.arange(num), levels)
    assert len(np.unique(np.asarray(codes), axis=0)) == num
    assert np.abs(codes).max() <= 1
    np.testing.assert_array_equal(quantise.scalars_to_index(codes, levels), np.arange(num))
    # A fine sweep of each number meets all of its values and no others.
    sweep = jnp.linspace(-6, 6, 1001)[:, None] * jnp.ones((1, len(levels)))
    found = np.asarray(quantise.finite_scalars(sweep, levels))
    for j, most in enumerate(levels):
        expected = np.unique(np.asarray(codes)[:, j])
        assert len(expected) == most
        np.testing.assert_allclose(np.unique(found[:, j].round(12)), expected, atol=1e-12)


def test_finite_scalars_are_centred_and_pass_the_gradient_of_the_bound():
    """z = 0 falls on 0 for odd levels; the gradient is that of tanh, scaled, without rounding."""
    assert quantise.finite_scalars(jnp.zeros(1), (5,)) == 0
    gradient = jax.vmap(jax.grad(lambda z: quantise.finite_scalars(z[None], (5,))[0]))
    z = jnp.linspace(-2, 2, 9)
    half = 4 * (1 + 1e-3) / 2
    np.testing.assert_allclose(gradient(z), half / np.cosh(z) ** 2 / 2, rtol=1e-12)


def test_densities_of_codes_sum_to_one():
    prior, z = _prior()
    np.testing.assert_allclose(np.exp(prior.log_prob(z)).sum(), 1, rtol=1e-10)
    uniform = quantise.UniformCodes(NUM, CLASSES)
    np.testing.assert_allclose(np.exp(uniform.log_prob(z)).sum(), 1, rtol=1e-12)


def test_a_code_depends_on_those_before_it_alone():
    prior, z = _prior()
    jacobian = jax.jacobian(prior.log_probs)(z[0])  # [N, C, N, C]
    reach = np.abs(np.asarray(jacobian)).sum(axis=(1, 3))
    assert (reach[np.triu_indices(NUM)] == 0).all()
    assert (reach[np.tril_indices(NUM, -1)] > 1e-3).all()


@pytest.mark.parametrize("kind", ["uniform", "autoregressive"])
def test_draws_of_codes_have_their_density(kind):
    prior, z = _prior()
    if kind == "uniform":
        prior = quantise.UniformCodes(NUM, CLASSES)
    p, num = np.exp(prior.log_prob(z)), 20_000
    drawn = np.asarray(prior.draw(jax.random.key(1), num)).argmax(axis=-1)
    index = drawn @ CLASSES ** np.arange(NUM)[::-1]
    found = np.bincount(index, minlength=len(ALL)) / num
    assert (np.abs(found - p) < 4.5 * np.sqrt(p * (1 - p) / num) + 1e-9).all()
