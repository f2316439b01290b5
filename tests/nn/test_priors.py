"""Priors are densities, and their draws have them: quadrature, histograms and autodiff Jacobians.

Parameters are random everywhere: a fresh coupling is the identity and would prove nothing.
"""

import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dgm_jax.nn import priors
from dgm_jax.nn.priors import PRIORS, mixture_log_prob

FLOWS = ("realnvp", "autoregressive")
# Compiling takes most of the time of these tests: none of it goes into faster code.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
mixture = jit(mixture_log_prob)
MEAN = np.full((2, 1), 0.5)  # of the data


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _posterior_of(latents):
    """A stand-in for the encoder: `[C, *event]` -> (mu, log_sigma), each `[C, L]`."""
    rng = np.random.default_rng(5)
    to_mu, to_log_sigma = rng.normal(size=(2, MEAN.size, latents))

    def posterior_of(u):
        h = u.reshape(len(u), -1) - 0.5
        return 4 * jnp.tanh(h @ to_mu), 0.5 * jnp.tanh(h @ to_log_sigma)

    return posterior_of


class Prior:
    """One prior with random parameters: its density and its draws as plain functions."""

    def __init__(self, name, latents, components=3, steps=2, mean=MEAN):
        sizes = priors.Sizes(latents, components, flow_steps=steps, flow_width=5, mean=mean)
        self.module = PRIORS[name](sizes)
        self.latents, self.posterior_of = latents, _posterior_of(latents)
        leaves, structure = jax.tree.flatten(jax.eval_shape(self.fresh))
        rng = np.random.default_rng(2)
        drawn = [jnp.asarray(0.6 * rng.normal(size=leaf.shape)) for leaf in leaves]
        self.variables = jax.tree.unflatten(structure, drawn)
        self.params = self.variables.get("params", {})
        self.log_prob = jit(lambda z: self._apply("log_prob", z))
        self._draw_pairs = jit(jax.vmap(lambda rng: self._apply("draw", rng, 2)))

    def fresh(self):
        """The variables before any training."""
        inputs = (jax.random.key(0), jnp.zeros((1, self.latents)), self.posterior_of)
        return self.module.init(*inputs, method="log_prob")

    def _apply(self, method, *inputs):
        return self.module.apply(self.variables, *inputs, self.posterior_of, method=method)

    def draw(self, num):
        """Many keys and two draws of each, so that noise in common would show: `[num, L]`."""
        keys = jax.random.split(jax.random.key(2), num // 2)
        return np.asarray(self._draw_pairs(keys)).reshape(num, self.latents)

    def draw_from(self, noise):
        """What `draw` makes of a vector of standard Gaussian noise `[L]`."""
        with mock.patch.object(jax.random, "normal", lambda key, shape: noise.reshape(shape)):
            return self._apply("draw", jax.random.key(0), 1)[0]

    def normalise(self, z):
        """The noise that the density of a flow sends z `[L]` to, and its log-determinant."""
        seen = []

        def spy(noise):
            seen.append(noise)
            return jnp.zeros_like(noise)

        with mock.patch.object(priors, "standard_gaussian_log_prob", spy):
            log_det = self._apply("log_prob", z[None])[0]
        return seen[0][0], log_det


CASES = [
    *(("standard", n) for n in (1, 2)),
    *(("mixture", n) for n in (1, 2)),
    *(("vamp", n) for n in (1, 2)),
    *((name, 2) for name in FLOWS),
]
CELLS, FINE = 40, 12  # of the histogram, and points of the quadrature in a cell, for each axis


def test_all_priors_are_tested():
    assert {name for name, _ in CASES} == set(PRIORS)


@functools.cache
def _density_and_draws(name, latents):
    """Points on a grid `[G, ..., L]`, the probability of each `[G, ...]`, and draws `[N, L]`.

    The midpoint rule: exact to rounding for a smooth density that vanishes at the sides of the box.
    """
    prior = Prior(name, latents)
    draws = prior.draw(100_000)
    centre = draws.mean(axis=0)
    radius = 2 * np.abs(draws - centre).max(axis=0)
    middles = (np.arange(CELLS * FINE) + 0.5) / (CELLS * FINE)
    axes = [c + r * (2 * middles - 1) for c, r in zip(centre, radius, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    volume = np.prod(2 * radius / (CELLS * FINE))
    return points, volume * np.exp(prior.log_prob(points)), draws


@pytest.mark.parametrize(("name", "latents"), CASES)
def test_the_density_integrates_to_one(name, latents):
    _, mass, _ = _density_and_draws(name, latents)
    np.testing.assert_allclose(mass.sum(), 1, rtol=1e-10)


@pytest.mark.parametrize(("name", "latents"), CASES)
def test_draws_have_the_moments_of_the_density(name, latents):
    """Means and all second moments within five standard errors of the quadrature's."""
    points, mass, draws = _density_and_draws(name, latents)

    def moments(z):
        return np.concatenate(
            [z, (z[..., :, None] * z[..., None, :]).reshape(*z.shape[:-1], -1)], -1
        )

    expected = np.tensordot(mass, moments(points), latents)
    drawn = moments(draws)
    error = drawn.std(axis=0, ddof=1) / math.sqrt(len(draws))
    assert np.all(np.abs(drawn.mean(axis=0) - expected) < 5 * error)


@pytest.mark.parametrize(("name", "latents"), CASES)
def test_draws_have_the_density(name, latents):
    """A histogram in all dimensions against the probability of each cell: chi-square."""
    points, mass, draws = _density_and_draws(name, latents)
    cells = mass.reshape((CELLS, FINE) * latents).sum(axis=tuple(range(1, 2 * latents, 2)))
    first, last = points.reshape(-1, latents)[[0, -1]]
    half = (last - first) / (CELLS * FINE - 1) / 2
    sides = [
        np.linspace(a - h, b + h, CELLS + 1) for a, b, h in zip(first, last, half, strict=True)
    ]
    counts = np.histogramdd(draws, sides)[0]
    assert counts.sum() == len(draws)
    expected = len(draws) * cells / cells.sum()
    often = expected > 10
    observed, expected = (np.append(c[often], c[~often].sum()) for c in (counts, expected))
    assert often.sum() > 6**latents
    assert stats.chisquare(observed, expected).pvalue > 1e-4


@pytest.mark.parametrize("name", PRIORS)
def test_densities_take_any_number_of_leading_axes(name):
    prior = Prior(name, 2)
    z = np.random.default_rng(0).normal(size=(3, 4, 2))
    each = [[prior.log_prob(v) for v in row] for row in z]
    np.testing.assert_allclose(prior.log_prob(z), each, rtol=1e-12)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("latents", [2, 3])
def test_a_flows_density_inverts_its_draw_with_the_autodiff_jacobian(name, latents):
    """At an odd number of latents too, whose halves differ."""
    prior = Prior(name, latents)
    noise = np.random.default_rng(3).normal(size=(20, latents))

    @jit
    @jax.vmap
    def there_and_back(e):
        z = prior.draw_from(e)
        return z, *prior.normalise(z), jax.jacfwd(prior.draw_from)(e)

    z, back, log_det, jacobian = there_and_back(noise)
    assert np.abs(z - noise).max() > 1  # far from the identity
    assert np.std(log_det) > 0.05
    np.testing.assert_allclose(back, noise, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(log_det, -np.linalg.slogdet(jacobian)[1], rtol=1e-10, atol=1e-10)
    expected = stats.norm.logpdf(noise).sum(axis=1) + log_det
    np.testing.assert_allclose(prior.log_prob(z), expected, rtol=1e-12)


def test_a_masked_autoregressive_flow_is_its_formula():
    """One step, z_j = mu_j + e_j exp(alpha_j), both functions of the latents before (eqs. 3, 4)."""
    prior = Prior("autoregressive", 3, steps=1)

    net = jit(lambda z: prior.module.bind(prior.variables).nets[0](z))

    def factor(z, j):
        mu, raw = np.asarray(net(z))[j]
        return stats.norm.logpdf(z[j], mu, np.exp(np.tanh(raw)))

    for z in np.random.default_rng(6).normal(size=(5, 3)):
        expected = sum(factor(z, j) for j in range(3))
        np.testing.assert_allclose(prior.log_prob(z), expected, rtol=1e-11)


def test_a_fresh_realnvp_is_the_identity():
    prior = Prior("realnvp", 3, steps=1)
    z = np.random.default_rng(0).normal(size=(5, 3))
    prior.variables = jit(prior.fresh)()
    np.testing.assert_allclose(prior.log_prob(z), stats.norm.logpdf(z).sum(1), rtol=1e-12)


@pytest.mark.parametrize("latents", [1, 2])
def test_a_vamp_prior_of_one_component_is_the_posterior_at_its_pseudo_input(latents):
    prior = Prior("vamp", latents, components=1)
    u = special.expit(prior.params["pseudo_inputs"])
    assert u.shape == (1, *MEAN.shape)
    mu, log_sigma = map(np.asarray, prior.posterior_of(u))
    z = np.random.default_rng(0).normal(size=(20, latents))
    expected = stats.norm.logpdf(z, mu, np.exp(log_sigma)).sum(1)
    np.testing.assert_allclose(prior.log_prob(z), expected, rtol=1e-12)


def test_a_vamp_prior_is_the_mean_of_the_posteriors_at_its_pseudo_inputs():
    prior = Prior("vamp", 2, components=7)
    mu, log_sigma = map(
        np.asarray, prior.posterior_of(special.expit(prior.params["pseudo_inputs"]))
    )
    z = np.random.default_rng(0).normal(size=(20, 2))
    densities = stats.norm.pdf(z[:, None], mu[None], np.exp(log_sigma)[None]).prod(axis=-1)
    np.testing.assert_allclose(prior.log_prob(z), np.log(densities.mean(axis=1)), rtol=1e-12)


def test_equal_pseudo_inputs_count_as_one():
    """-log C: without it, C copies of one component would have C times its density."""
    one, five = (Prior("vamp", 2, components=n) for n in (1, 5))
    u = one.params["pseudo_inputs"]
    five.variables = {"params": {"pseudo_inputs": jnp.concatenate([u] * 5)}}
    z = np.random.default_rng(0).normal(size=(20, 2))
    np.testing.assert_allclose(five.log_prob(z), one.log_prob(z), rtol=1e-12)


def test_fresh_pseudo_inputs_lie_around_the_mean_of_the_data():
    """Their logits at that of the mean, brought within [0.01, 0.99]: never a certainty."""
    mean = np.array([[0.2], [1.0]])
    fresh = jit(Prior("vamp", 2, components=10_000, mean=mean).fresh)()
    logits = np.asarray(fresh["params"]["pseudo_inputs"])
    assert logits.shape == (10_000, 2, 1)
    expected = special.logit((mean + 0.01) / 1.02)
    error = logits.std(axis=0, ddof=1) / 100
    assert np.all((error > 0) & (np.abs(logits.mean(axis=0) - expected) < 5 * error))


def _mixture(dtype, log_sigma_mean=0.0):
    rng = np.random.default_rng(7)
    weights = rng.dirichlet(np.ones(6))
    mu = 3 + 0.01 * rng.normal(size=(6, 4))
    log_sigma = log_sigma_mean + 0.3 * rng.normal(size=(6, 4))
    which = rng.integers(0, 6, 200)
    z = mu[which] + np.exp(log_sigma[which]) * rng.normal(size=(200, 4))
    return [np.asarray(a, dtype) for a in (z, np.log(weights), mu, log_sigma)]


def _mixture_by_scipy(*arguments):
    z, log_weights, mu, log_sigma = (np.asarray(a, np.float64) for a in arguments)
    each = stats.norm.logpdf(z[:, None], mu, np.exp(log_sigma)).sum(-1)
    return special.logsumexp(each + log_weights, axis=1)


def test_a_mixture_is_the_log_of_the_weighted_sum():
    arguments = _mixture(np.float64)
    np.testing.assert_allclose(
        mixture(*map(jnp.asarray, arguments)), _mixture_by_scipy(*arguments), rtol=1e-12
    )


def test_narrow_components_far_from_zero_keep_their_precision_in_32_bits():
    """sigma = 1e-3 at mu = 3: with the square expanded the terms are 1e7 and their rounding 1."""
    arguments = _mixture(np.float32, math.log(1e-3))
    with jax.enable_x64(False):
        found = mixture(*map(jnp.asarray, arguments))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, _mixture_by_scipy(*arguments), rtol=1e-6, atol=2e-5)


def test_a_mixture_far_from_all_its_components_is_finite_with_a_finite_gradient():
    """At z = 1e3 sigma = 1e-3 gives -5e11 nats: log Σ exp where each exp underflows."""
    mu, log_sigma = np.array([[-1.0], [2.0]]), np.full((2, 1), math.log(1e-3))
    with jax.enable_x64(False):
        value, gradient = jax.jit(jax.value_and_grad(mixture_log_prob))(
            jnp.array([1e3]), jnp.log(jnp.array([0.9, 0.1])), jnp.array(mu), jnp.array(log_sigma)
        )
    np.testing.assert_allclose(value, -0.5 * 998.0**2 * 1e6, rtol=1e-5)
    np.testing.assert_allclose(gradient, [-998.0 * 1e6], rtol=1e-5)
