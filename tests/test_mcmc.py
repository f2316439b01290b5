"""Chains against the distributions that they are for: stationary, unbiased, and sure of log Z."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dgm_jax import mcmc
from dgm_jax.distributions import gaussian_log_prob, standard_gaussian_log_prob

LATENTS, DIMS, CHAINS, SIGMA = 3, 5, 400, 0.5
W = np.random.default_rng(0).normal(size=(LATENTS, DIMS))
STIFFNESS = np.array([0.5, 1.0, 4.0])


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


# Langevin dynamics.


def _quadratic(x):
    """E(x) = Σ k_i x_i² / 2, of event shape (3, 1): the deviations are k^-1/2."""
    return jnp.sum(STIFFNESS[None] * x[..., 0] ** 2, axis=1) / 2


@jax.jit(static_argnums=(1, 2))
def _equilibrium(step_size, metropolis, num):
    """`num` chains from zero for long enough to forget it."""
    return mcmc.langevin(
        _quadratic, jnp.zeros((num, 3, 1)), step_size, 150, jax.random.key(0), metropolis
    )


@pytest.mark.parametrize("step_size", [0.1, 0.3])
def test_the_variance_of_langevin_dynamics_has_its_known_bias_and_corrected_none(step_size):
    """1 / (k (1 - εk/2)), and 1 / k: at ε = 0.3 and k = 4 the first is 2.5 times the second."""
    num, exact = 20_000, 1 / STIFFNESS
    error = 4.5 * np.sqrt(2 / num)
    biased, accepted = _equilibrium(step_size, False, num)
    expected = exact / (1 - step_size * STIFFNESS / 2)
    assert np.all(np.abs(np.var(biased[..., 0], axis=0) / expected - 1) < error)
    np.testing.assert_array_equal(accepted, 1)
    corrected, accepted = _equilibrium(step_size, True, num)
    assert np.all(np.abs(np.var(corrected[..., 0], axis=0) / exact - 1) < error)
    assert accepted.shape == (num,) and 0.5 < np.mean(accepted) < 0.999
    assert np.all(np.abs(np.mean(corrected[..., 0], axis=0)) < 4.5 * np.sqrt(exact / num))


def test_one_step_follows_the_definition():
    x, step_size = jnp.array([[[1.0], [-2.0], [0.5]]]), 0.05
    moved, _ = mcmc.langevin(_quadratic, x, step_size, 1, jax.random.key(0))
    noise_rng, _ = jax.random.split(jax.random.split(jax.random.key(0), 1)[0])
    noise = jax.random.normal(noise_rng, x.shape)
    expected = x - step_size * STIFFNESS[None, :, None] * x + np.sqrt(2 * step_size) * noise
    np.testing.assert_allclose(moved, expected, rtol=1e-12)


def test_the_correction_refuses_steps_out_of_the_finite_numbers():
    """Far out a quartic's slope throws a chain to infinity, where the energy is NaN or inf."""
    x = jnp.array([[1e3], [0.0]])
    quartic = lambda x: jnp.sum(jnp.sin(x) + x**4, axis=1)  # noqa: E731
    wild, _ = mcmc.langevin(quartic, x, 1.0, 30, jax.random.key(0))
    assert not np.isfinite(wild).all()
    kept, accepted = mcmc.langevin(quartic, x, 1.0, 30, jax.random.key(0), metropolis=True)
    assert np.isfinite(kept).all()
    assert accepted[0] == 0 and kept[0] == x[0]


def test_jumps_lead_to_the_target_between_modes_that_no_small_step_joins():
    """All chains start in the lesser of two modes; q is one wide Gaussian over both."""
    weights, centres, num = np.array([0.2, 0.8]), np.array([-5.0, 5.0]), 10_000

    def log_weight(x):
        modes = gaussian_log_prob(x, jnp.asarray(centres)[None], jnp.log(0.5))
        log_p = jax.nn.logsumexp(modes + jnp.log(jnp.asarray(weights))[None], axis=1)
        return log_p - gaussian_log_prob(x[:, 0], 0.0, jnp.log(5.0))

    def step(x, key):
        of_rng, jump_rng = jax.random.split(key)
        return mcmc.jump(log_weight, x, 5 * jax.random.normal(of_rng, x.shape), jump_rng), None

    start = jnp.full((num, 1), -5.0)
    x, _ = jax.jit(lambda x: jax.lax.scan(step, x, jax.random.split(jax.random.key(0), 150)))(start)
    share = np.mean(np.asarray(x) > 0)
    assert abs(share - 0.8) < 4.5 * np.sqrt(0.2 * 0.8 / num)
    upper = np.asarray(x)[np.asarray(x) > 0]
    assert abs(upper.std() / 0.5 - 1) < 4.5 * np.sqrt(0.5 / len(upper))


# Annealed importance sampling on a linear-Gaussian model, whose log p(x) is known exactly.


def _target(x):
    """p(z) = N(0, I), p(x | z) = N(z W, 0.25 I), every chain with its own row of x."""

    def log_likelihood(z):
        return jnp.sum(gaussian_log_prob(x, z @ W, jnp.log(SIGMA)), axis=-1)

    return mcmc.Target(lambda z: jnp.sum(standard_gaussian_log_prob(z), axis=-1), log_likelihood)


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
    target, betas = _target(x), mcmc.temperatures(num)
    keys = jax.random.split(key, 4)
    prior = jax.random.normal(keys[0], (CHAINS, LATENTS))
    step_sizes = mcmc.tune(target, prior, betas, keys[1])
    prior = jax.random.normal(keys[2], (CHAINS, LATENTS))
    forward_key, backward_key = jax.random.split(keys[3])
    return (
        mcmc.forward(target, prior, betas, step_sizes, forward_key),
        mcmc.backward(target, z, betas, step_sizes, backward_key),
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
    log_w = mcmc.forward(
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
        step = lambda z, key: mcmc.hmc(target, z, 1.0, 0.15, key)  # noqa: E731
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
    betas = np.asarray(mcmc.temperatures(50))
    assert betas.shape == (51,) and betas[0] == 0 and betas[-1] == 1 and np.all(np.diff(betas) > 0)
