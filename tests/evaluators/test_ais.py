"""Annealed importance sampling on a linear-Gaussian model, whose log p(x) is known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dgm_jax.core import Latents, Model, UserError
from dgm_jax.distributions import gaussian_log_prob, standard_gaussian_log_prob
from dgm_jax.evaluators import ais

LATENTS, DIMS, CHAINS, SIGMA = 3, 5, 400, 0.5
W = np.random.default_rng(0).normal(size=(LATENTS, DIMS))


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _target(x):
    """p(z) = N(0, I), p(x | z) = N(z W, 0.25 I), every chain with its own row of x."""

    def log_likelihood(z):
        return jnp.sum(gaussian_log_prob(x, z @ W, jnp.log(SIGMA)), axis=-1)

    return ais.Target(lambda z: jnp.sum(standard_gaussian_log_prob(z), axis=-1), log_likelihood)


def _simulated(seed):
    """x drawn from the model, the z it came from, and log p(x)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(CHAINS, LATENTS))
    x = z @ W + SIGMA * rng.normal(size=(CHAINS, DIMS))
    cov = W.T @ W + SIGMA**2 * np.eye(DIMS)
    return x, z, stats.multivariate_normal(np.zeros(DIMS), cov).logpdf(x)


@jax.jit(static_argnums=2)
def _bracket(x, z, num, key):
    """log w forwards and backwards at `num` temperatures."""
    target, betas = _target(x), ais.temperatures(num)
    keys = jax.random.split(key, 4)
    prior = jax.random.normal(keys[0], (CHAINS, LATENTS))
    step_sizes = ais.tune(target, prior, betas, keys[1])
    prior = jax.random.normal(keys[2], (CHAINS, LATENTS))
    forward_key, backward_key = jax.random.split(keys[3])
    return (
        ais.forward(target, prior, betas, step_sizes, forward_key),
        ais.backward(target, z, betas, step_sizes, backward_key),
    )


def _mean_and_error(values):
    return values.mean(), values.std(ddof=1) / np.sqrt(len(values))


def test_the_bracket_holds_the_exact_likelihood_and_closes():
    """Lower < exact < upper on the average, and the gap falls with the temperatures."""
    x, z, exact = _simulated(0)
    gaps = []
    for num in (5, 20, 200):
        lower, upper = map(np.asarray, _bracket(x, z, num, jax.random.key(1)))
        below, below_error = _mean_and_error(exact - lower)
        above, above_error = _mean_and_error(upper - exact)
        assert below > -4 * below_error and above > -4 * above_error
        gaps.append(below + above)
    # Ten times the temperatures, about a tenth of the gap (Grosse et al. 2013: O(1/T)).
    assert gaps[0] > 2.5 * gaps[1] > 2.5 * 4 * gaps[2] > 0
    assert gaps[2] < 0.7


def test_weights_are_unbiased():
    """E[w] = p(x) however few the temperatures: forwards w / p(x) averages to 1."""
    x, z, exact = _simulated(2)
    ratios = [
        np.exp(np.asarray(_bracket(x, z, 20, jax.random.key(seed))[0]) - exact)
        for seed in range(40)
    ]
    mean, error = _mean_and_error(np.concatenate(ratios))
    assert abs(mean - 1) < 4 * error and error < 0.02


def test_one_step_from_prior_to_posterior_is_importance_sampling_from_the_prior():
    """With T = 1 log w is log p(x | z) at the prior's draw, whatever the transition does."""
    x, _, _ = _simulated(3)
    prior = jax.random.normal(jax.random.key(0), (CHAINS, LATENTS))
    log_w = ais.forward(
        _target(x), prior, jnp.array([0.0, 1.0]), jnp.array([0.1]), jax.random.key(1)
    )
    np.testing.assert_allclose(log_w, _target(x).log_likelihood(prior), rtol=1e-12)


def test_transitions_leave_their_target_alone():
    """Exact posterior draws, moved many times at β = 1, keep the posterior's moments."""
    x = np.repeat(_simulated(4)[0][:1], CHAINS, axis=0)
    precision = np.eye(LATENTS) + W @ W.T / SIGMA**2
    mean, cov = np.linalg.solve(precision, W @ x[0] / SIGMA**2), np.linalg.inv(precision)
    z = np.random.default_rng(0).multivariate_normal(mean, cov, CHAINS)
    target = _target(x)

    @jax.jit
    def move(z):
        keys = jax.random.split(jax.random.key(0), 200)
        step = lambda z, key: ais._hmc(target, z, 1.0, 0.15, key)  # noqa: E731
        moved, accepted = jax.lax.scan(step, z, keys)
        return moved, jnp.mean(accepted)

    moved, accepted = move(z)
    standardised = (np.asarray(moved) - mean) @ np.linalg.cholesky(precision)
    assert 0.3 < accepted < 0.999
    error = 1 / np.sqrt(CHAINS)
    assert np.all(np.abs(standardised.mean(axis=0)) < 4.5 * error)
    assert np.all(np.abs(np.cov(standardised.T) - np.eye(LATENTS)) < 4.5 * np.sqrt(2) * error)
    assert np.abs(np.asarray(moved) - z).min() > 0


def test_temperatures_rise_from_zero_to_one():
    betas = np.asarray(ais.temperatures(50))
    assert betas.shape == (51,) and betas[0] == 0 and betas[-1] == 1 and np.all(np.diff(betas) > 0)


def _model():
    """The same model, its latents in two parts, as the evaluators see it."""

    def log_joint(params, batch, z):
        z = jnp.concatenate(z, axis=-1)
        log_likelihood = gaussian_log_prob(batch["x"][None], z @ params, jnp.log(SIGMA))
        log_prior = standard_gaussian_log_prob(z)
        return jnp.sum(log_likelihood, -1), jnp.sum(log_prior, -1)

    def draw_joint(params, rng, num):
        z_rng, x_rng = jax.random.split(rng)
        z = jax.random.normal(z_rng, (num, LATENTS))
        x = z @ params + SIGMA * jax.random.normal(x_rng, (num, DIMS))
        return (z[:, :1], z[:, 1:]), {"x": x, "mean": x}

    latents = Latents(draw_joint, draw_posterior=None, log_joint=log_joint)
    return Model(init=None, players=(), log_likelihood_fns={}, latents=latents)


def test_evaluate_finds_the_likelihood_of_each_example_and_a_bracket_of_the_models_own():
    x, _, exact = _simulated(3)
    num = 23  # not a multiple of the rows annealed at once
    batch = {"x": jnp.asarray(x[:num])}
    found = ais.evaluate(_model(), jnp.asarray(W), batch, 200, 100, seed=0)
    assert all(metric.num_examples == num for metric in found.values())
    # What is left between the bounds is smaller than the noise, and that is small.
    gap = found["simulated_gap"]
    assert abs(gap.value) < 4 * gap.standard_error and gap.standard_error < 0.04
    assert abs(found["ais_bound"].value - exact[:num].mean()) < 0.08


def test_evaluate_refuses_a_model_without_continuous_latents():
    model = _model()
    without = model._replace(latents=None)
    codes = model.latents._replace(draw_joint=lambda *_: (jnp.zeros((2, 3), int), {}))
    for each in (without, model._replace(latents=codes)):
        with pytest.raises(UserError, match="latent"):
            ais.evaluate(each, W, {"x": jnp.zeros((2, DIMS))}, 2, 2, seed=0)
