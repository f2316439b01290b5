"""Posteriors: their log-densities are those of their draws, by scipy and by autodiff Jacobians."""

import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dgm_jax.nn.posteriors import POSTERIORS, positive

# Compiling takes most of the time of these tests: none of it goes into faster code.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
FEATURES, ROWS = 3, 4
FIELDS = {"iaf": {"steps": 2, "width": 5}}
EVALUABLE = ("diagonal", "full_covariance")


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _features():
    return jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, FEATURES)))


class Posterior:
    """One posterior with random parameters, and its context for the features above."""

    def __init__(self, name, latents):
        self.latents = latents
        self.module = POSTERIORS[name](latents, **FIELDS.get(name, {}))
        leaves, structure = jax.tree.flatten(jax.eval_shape(self.fresh))
        rng = np.random.default_rng(1)
        drawn = [jnp.asarray(0.8 * rng.normal(size=leaf.shape)) for leaf in leaves]
        self.variables = jax.tree.unflatten(structure, drawn)
        self.context = jit(self.context_of)(self.variables)
        self.draw = jit(
            lambda rng, k: self.draw_of(self.variables, self.context, rng, k), static_argnums=1
        )
        self.log_prob = jit(
            lambda z: self.module.apply(self.variables, self.context, z, method="log_prob")
        )

    def fresh(self):
        """The variables before any training."""

        def touch(module, h):
            return module.draw(module(h), jax.random.key(0), 1)

        return self.module.init(jax.random.key(0), _features(), method=touch)

    def context_of(self, variables):
        return self.module.apply(variables, _features())

    def draw_of(self, variables, context, rng, k):
        return self.module.apply(variables, context, rng, k, method="draw")

    def draw_from(self, context, noise, variables=None):
        """Draws `[K, B, L]` made from the noise `[K, B, L]`, and their log-densities."""
        variables = self.variables if variables is None else variables
        with mock.patch.object(jax.random, "normal", lambda key, shape: noise.reshape(shape)):
            return self.draw_of(variables, context, jax.random.key(0), len(noise))

    def draw_one(self, context, noise):
        """The same for one draw `[L]` for one example."""
        context = jax.tree.map(lambda c: c[None], context)
        z, log_q = self.draw_from(context, noise[None, None])
        return z[0, 0], log_q[0, 0]

    def mean(self):
        return self.module.apply(self.variables, self.context, method="mean")

    def gaussian(self):
        """Means `[B, L]` and covariances `[B, L, L]` that the context stands for."""
        if len(self.context) == 2:
            mu, log_sigma = map(np.asarray, self.context)
            return mu, np.exp(2 * log_sigma)[..., None] * np.eye(self.latents)
        mu, _, cholesky = map(np.asarray, self.context)
        return mu, cholesky @ cholesky.swapaxes(1, 2)


@functools.cache
def _posterior(name, latents):
    return Posterior(name, latents)


def test_the_diagonal_context_is_a_dense_layer_and_softplus():
    posterior = _posterior("diagonal", 2)
    dense = posterior.variables["params"]["Dense_0"]
    out = np.asarray(_features()) @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    mu, log_sigma = posterior.context
    np.testing.assert_allclose(mu, out[:, :2], rtol=1e-12)
    np.testing.assert_allclose(np.exp(log_sigma), np.logaddexp(0, out[:, 2:]) + 1e-4, rtol=1e-12)


@pytest.mark.parametrize("latents", [1, 4])
def test_the_cholesky_factor_is_lower_triangular_with_a_positive_diagonal(latents):
    _, log_diagonal, cholesky = map(np.asarray, _posterior("full_covariance", latents).context)
    assert cholesky.shape == (ROWS, latents, latents)
    np.testing.assert_array_equal(cholesky, np.tril(cholesky))
    np.testing.assert_allclose(np.diagonal(cholesky, 0, 1, 2), np.exp(log_diagonal), rtol=1e-12)
    below = cholesky[:, *np.tril_indices(latents, -1)]
    assert np.all(below != 0) and np.unique(below).size == below.size


def test_a_fresh_full_covariance_is_diagonal():
    posterior = _posterior("full_covariance", 3)
    init_with_output = jit(posterior.module.init_with_output)
    (_, log_diagonal, cholesky), _ = init_with_output(jax.random.key(0), _features())
    diagonal = np.exp(log_diagonal)[..., None] * np.eye(3)
    np.testing.assert_allclose(cholesky, diagonal, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", EVALUABLE)
@pytest.mark.parametrize("latents", [1, 3])
def test_log_densities_equal_scipy(name, latents):
    """Of draws, as `draw` and as `log_prob` say them, and at other points."""
    posterior = _posterior(name, latents)
    mu, covariance = posterior.gaussian()

    def by_scipy(z):
        columns = [
            stats.multivariate_normal(m, c).logpdf(z[:, b].reshape(-1, latents))
            for b, (m, c) in enumerate(zip(mu, covariance, strict=True))
        ]
        return np.stack(columns, axis=1)

    noise = np.random.default_rng(2).normal(size=(5, ROWS, latents))
    z, log_q = jit(posterior.draw_from)(posterior.context, noise)
    np.testing.assert_allclose(log_q, by_scipy(np.asarray(z)), rtol=1e-10)
    np.testing.assert_allclose(posterior.log_prob(z), log_q, rtol=1e-12)
    other = 3 * np.random.default_rng(3).normal(size=z.shape)
    np.testing.assert_allclose(posterior.log_prob(other), by_scipy(other), rtol=1e-10)


@pytest.mark.parametrize("name", EVALUABLE)
def test_draws_have_the_mean_and_the_covariance_and_share_no_noise(name):
    """All moments of all examples together: between two examples the covariance is zero."""
    posterior, k = _posterior(name, 3), 20_000
    mu, covariance = posterior.gaussian()
    z = np.asarray(posterior.draw(jax.random.key(4), k)[0])
    expected = np.zeros((ROWS, 3, ROWS, 3))
    expected[np.arange(ROWS), :, np.arange(ROWS)] = covariance
    deviation = (z - mu).reshape(k, -1)
    products = deviation[:, :, None] * deviation[:, None]
    for draws, value in ((deviation, 0), (products, expected.reshape(12, 12))):
        error = draws.std(axis=0, ddof=1) / math.sqrt(k)
        assert np.all(np.abs(draws.mean(axis=0) - value) < 5 * error)
    if name == "full_covariance":
        off = np.abs(covariance[:, *np.tril_indices(3, -1)])
        assert np.all(off > 5 * products.std() / math.sqrt(k))  # what a diagonal one would miss


@pytest.mark.parametrize("name", POSTERIORS)
@pytest.mark.parametrize("latents", [1, 3])
def test_log_q_is_the_change_of_variables_from_the_noise(name, latents):
    """log q(z) = log N(e; 0, I) - log |det dz/de|, the Jacobian by autodiff."""
    posterior = _posterior(name, latents)
    noise = np.random.default_rng(5).normal(size=(6, ROWS, latents))

    def jacobian_of(context, e):
        return jax.jacfwd(lambda e: posterior.draw_one(context, e)[0])(e)

    @jit
    def draw(noise):
        jacobian = jax.vmap(jax.vmap(jacobian_of), (None, 0))(posterior.context, noise)
        return *posterior.draw_from(posterior.context, noise), jacobian

    z, log_q, jacobian = map(np.asarray, draw(noise))
    assert z.shape == noise.shape and log_q.shape == noise.shape[:2]
    expected = stats.norm.logpdf(noise).sum(axis=-1) - np.linalg.slogdet(jacobian)[1]
    np.testing.assert_allclose(log_q, expected, rtol=1e-11, atol=1e-11)
    if latents > 1 and name != "diagonal":
        assert np.abs(jacobian * (1 - np.eye(latents))).max() > 0.05  # the latents mix


def test_a_flow_of_one_latent_integrates_to_one():
    """Σ q(z) dz along the monotone map from noise to z, of second order in the step."""
    posterior = _posterior("iaf", 1)
    noise = np.linspace(-10, 10, 4001)[:, None]
    context = jax.tree.map(lambda c: c[0], posterior.context)
    z, log_q = jit(jax.vmap(lambda e: posterior.draw_one(context, e)))(noise)
    assert np.all(np.diff(z[:, 0]) > 0)
    np.testing.assert_allclose(np.trapezoid(np.exp(log_q), z[:, 0]), 1, rtol=1e-9)


def test_a_flow_sends_standard_noise_through_its_map():
    """Moments of many draws for each example against quadrature over the noise."""
    posterior, k = _posterior("iaf", 2), 20_000
    z = np.asarray(posterior.draw(jax.random.key(6), k)[0])
    axis = np.linspace(-9, 9, 101)
    noise = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 1, 2)
    mass = stats.norm.pdf(noise).prod(axis=(1, 2)) * (axis[1] - axis[0]) ** 2
    mapped = jit(posterior.draw_from)(
        posterior.context, np.broadcast_to(noise, (len(noise), ROWS, 2))
    )[0]

    def moments(z):
        return np.concatenate([z, z**2, z[..., :1] * z[..., 1:], np.cos(3 * z)], axis=-1)

    drawn, expected = moments(z), np.tensordot(mass, moments(np.asarray(mapped)), 1)
    error = drawn.std(axis=0, ddof=1) / math.sqrt(k)
    assert np.all(np.abs(drawn.mean(axis=0) - expected) < 5 * error)
    # No two examples share noise.
    correlation = np.corrcoef(z.reshape(k, -1).T)
    apart = np.kron(1 - np.eye(ROWS), np.ones((2, 2))).astype(bool)
    assert np.all(np.abs(correlation[apart]) < 5 / math.sqrt(k))


def test_an_inverse_autoregressive_step_is_its_formula():
    """σ ⊙ z + (1 - σ) ⊙ m, then the order of the latents is reversed (eq. 10)."""
    posterior = _posterior("iaf", 3)
    bound = posterior.module.bind(posterior.variables)
    mu, log_sigma, h = map(np.asarray, posterior.context)
    np.testing.assert_array_equal(h, _features())
    noise = np.random.default_rng(7).normal(size=mu.shape)
    z = mu + np.exp(log_sigma) * noise
    for net in bound.nets:
        m, s = np.moveaxis(np.asarray(net(z, h)), -1, 0)
        sigma = 1 / (1 + np.exp(-s - 1.5))
        z = (sigma * z + (1 - sigma) * m)[:, ::-1]
    found, _ = jit(posterior.draw_from)(posterior.context, noise[None])
    np.testing.assert_allclose(found[0], z, rtol=1e-11)


@pytest.mark.parametrize("name", POSTERIORS)
@pytest.mark.parametrize("latents", [1, 3])
def test_the_mean_is_the_draw_at_zero_noise(name, latents):
    """For a Gaussian that is its mean; for a flow it is where the flow takes the base's."""
    posterior = _posterior(name, latents)
    mean = jit(posterior.mean)()
    assert mean.shape == (ROWS, latents)
    z, _ = jit(posterior.draw_from)(posterior.context, np.zeros((1, ROWS, latents)))
    np.testing.assert_allclose(mean, z[0], rtol=1e-12)


def test_draws_are_reparameterised():
    """dz/dmu = I and dz/dC_ij = e_j in row i: of the context, not of a constant."""
    posterior = _posterior("full_covariance", 2)
    noise = np.array([0.7, -1.3])
    context = jax.tree.map(lambda c: c[0], posterior.context)
    to_mu, _, to_cholesky = jit(jax.jacfwd(lambda c: posterior.draw_one(c, noise)[0]))(context)
    np.testing.assert_allclose(to_mu, np.eye(2), rtol=1e-12)
    np.testing.assert_allclose(to_cholesky, np.einsum("ai,j->aij", np.eye(2), noise), rtol=1e-12)


def test_positive_is_the_log_of_softplus_above_a_floor():
    raw = np.concatenate([np.linspace(-60, 60, 121), [-1e4, 1e4]])
    expected = np.log(np.logaddexp(0, raw) + 1e-4)
    np.testing.assert_allclose(positive(jnp.asarray(raw)), expected, rtol=1e-12, atol=1e-14)
    gradient = jit(jax.vmap(jax.grad(positive)))(jnp.asarray(raw))
    slope = np.exp(-np.logaddexp(0, -raw)) / np.exp(expected)
    np.testing.assert_allclose(gradient, slope, rtol=1e-11, atol=1e-300)


def test_positive_at_the_extremes_in_32_bits():
    """sigma is raw at +1e4 and 1e-4 at -1e4; the gradient is 1 / raw and 0."""
    with jax.enable_x64(False):
        raw = jnp.array([1e4, -1e4, -1e2, 3e38, -3e38])
        values, gradient = jax.jit(jax.vmap(jax.value_and_grad(positive)))(raw)
    assert values.dtype == np.float32
    expected = np.log([1e4, 1e-4, 1e-4, 3e38, 1e-4])
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, [1e-4, 0, 0, 0, 0], rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("name", POSTERIORS)
def test_a_posterior_run_wild_has_finite_densities_and_gradients(name):
    """All that makes a scale is ±1e4 in float32: sigma is 1e4 or 1e-4, a flow's gate 1 or 0."""
    posterior = _posterior(name, 2)
    noise = np.random.default_rng(8).normal(size=(3, ROWS, 2)).astype(np.float32)

    def set_raw(raw, path, p):
        path, p = jax.tree_util.keystr(path), np.array(p, np.float32)
        if "Dense_0" in path and p.shape[-1] == 4:  # mu, then what sigma is made from
            p[..., 2:] = raw if p.ndim == 1 else 0
        if "out_" in path:  # m and s in turn
            p[..., 1::2] = raw if p.ndim == 1 else 0
        return p

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(variables):
        context = posterior.context_of(variables)
        z, log_q = posterior.draw_from(context, noise, variables)
        return jnp.sum(log_q) + jnp.sum(jnp.sin(z)), context[1]

    for raw in (1e4, -1e4):
        variables = jax.tree_util.tree_map_with_path(
            functools.partial(set_raw, raw), posterior.variables
        )
        with jax.enable_x64(False):
            (value, log_scale), gradient = total(variables)
        assert value.dtype == np.float32 and np.isfinite(value)
        expected = np.full((ROWS, 2), math.copysign(math.log(1e4), raw))
        np.testing.assert_allclose(log_scale, expected, rtol=1e-5)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
