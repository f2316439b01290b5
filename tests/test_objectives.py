"""Every objective on models whose log p(x), posterior and expectations are known exactly.

The testbed is linear and Gaussian: z ~ N(0, I), x ~ N(Wz + b, s²I). The columns of W are
orthogonal, so the exact posterior is diagonal. Expectations over draws are quadratures or
enumerations where they can be: the draws are then the nodes, one set of K in each row.
"""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from dgm_jax import objectives
from dgm_jax.core import UserError
from dgm_jax.distributions import (
    bernoulli_log_prob,
    gaussian_kl_to_standard,
    gaussian_log_prob,
    standard_gaussian_log_prob,
)
from dgm_jax.draws import Draws
from dgm_jax.objectives import OBJECTIVES, Options

LATENTS, PIXELS, ROWS, K = 2, 3, 5, 7
S = 0.7
MODEL = {
    "w": np.array([[1.0, 0.4], [0.5, -0.8], [-0.5, 0.0]]),
    "b": np.array([0.3, -0.2, 0.1]),
    "log_s": np.array(math.log(S)),
}
X = np.random.default_rng(0).normal(size=(ROWS, PIXELS))
EPS = np.random.default_rng(1).normal(size=(K, ROWS, LATENTS))
REAL = np.array([1.0, 0.0, 1.0, 1.0, 0.0])  # the rows that are not padding

# One latent, one pixel, one row, which broadcasts against any number of sets of draws.
LINE = {"w": np.array([[0.8]]), "b": np.array([0.1]), "log_s": np.array(-0.2)}
LINE_X = np.array([[1.3]])


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _exact_posterior(model, x):
    """mu and log_sigma `[B, L]` of p(z | x)."""
    variance = np.exp(2 * model["log_s"])
    precision = 1 + (model["w"] ** 2).sum(0) / variance
    mu = (x - model["b"]) @ model["w"] / variance / precision
    return {"mu": mu, "log_sigma": np.broadcast_to(-0.5 * np.log(precision), mu.shape)}


def _log_p_x(model, x):
    covariance = model["w"] @ model["w"].T + np.exp(2 * model["log_s"]) * np.eye(len(model["b"]))
    return stats.multivariate_normal(model["b"], covariance).logpdf(x)


def _shifted(posterior, mu, log_sigma):
    return {"mu": posterior["mu"] + mu, "log_sigma": posterior["log_sigma"] + log_sigma}


EXACT = _exact_posterior(MODEL, X)
WRONG = _shifted(EXACT, np.array([0.3, -0.2]), np.array([0.2, -0.15]))
LOG_P_X = _log_p_x(MODEL, X)
# KL(WRONG ‖ EXACT) `[B]`, by which the ELBO misses log p(x).
GAP = np.sum(0.5 * (np.exp([0.4, -0.3]) - 1) - [0.2, -0.15]) + 0.5 * np.sum(
    ([0.3, -0.2] / np.exp(EXACT["log_sigma"])) ** 2, axis=-1
)
LINE_WRONG = _shifted(_exact_posterior(LINE, LINE_X), 0.25, 0.1)


def _tiled(num):
    """The wrong posterior and x, `num` times over."""
    return {name: np.tile(each, (num, 1)) for name, each in WRONG.items()}, np.tile(X, (num, 1))


def _draws(model, posterior, eps, x=X, **fields):
    """z = mu + sigma eps, and all densities; a row of `posterior` for each of x, or one for all."""

    def log_joint_at(z):
        mean = z @ model["w"].T + model["b"][None, None]
        log_likelihood = gaussian_log_prob(x[None], mean, model["log_s"])
        return jnp.sum(log_likelihood, axis=-1), jnp.sum(standard_gaussian_log_prob(z), axis=-1)

    def log_posterior_at(z, detached):
        held = jax.lax.stop_gradient(posterior) if detached else posterior
        return jnp.sum(gaussian_log_prob(z, held["mu"][None], held["log_sigma"][None]), axis=-1)

    def log_posterior_pairs(z):
        mu, log_sigma = posterior["mu"], posterior["log_sigma"]
        return gaussian_log_prob(z[:, None], mu[None], log_sigma[None])

    z = posterior["mu"][None] + jnp.exp(posterior["log_sigma"])[None] * eps
    log_likelihood, log_prior = log_joint_at(z)
    draws = Draws(
        z=z,
        log_likelihood=log_likelihood,
        log_prior=log_prior,
        log_posterior=log_posterior_at(z, False),
        log_joint_at=log_joint_at,
        log_posterior_at=log_posterior_at,
        rate=gaussian_kl_to_standard(posterior["mu"], posterior["log_sigma"]),
        log_posterior_pairs=log_posterior_pairs,
    )
    return draws._replace(**fields)


@functools.partial(jax.jit, static_argnames="name")
def _cost(name, model, posterior, eps, options, x=X):
    return OBJECTIVES[name].cost(_draws(model, posterior, eps, x), options)


@functools.partial(jax.jit, static_argnames="name")
def _gradients(name, model, posterior, eps, options, x=X, weight=1.0):
    """Of the costs' weighted sum, with respect to the model and to the posterior."""

    def total(model, posterior):
        return jnp.sum(weight * OBJECTIVES[name].cost(_draws(model, posterior, eps, x), options))

    return jax.grad(total, argnums=(0, 1))(model, posterior)


def _assert_trees_close(found, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


def _errors(values, expected):
    """By how many standard errors the means over the first axis miss `expected`."""
    error = np.std(values, axis=0, ddof=1) / math.sqrt(len(values))
    return (np.mean(values, axis=0) - expected) / error


def _quadrature(num, dims):
    """Nodes `[num^dims, dims]` and weights `[num^dims]` for means over N(0, I)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num)
    grid = np.array(list(itertools.product(nodes, repeat=dims)))
    return grid, np.prod(list(itertools.product(weights / weights.sum(), repeat=dims)), axis=1)


def _numpy_log_densities(posterior, eps):
    """log p(x | z), log p(z), log q(z | x), each `[K, B]`, by scipy."""
    sigma = np.exp(posterior["log_sigma"])
    z = posterior["mu"] + sigma * eps
    return (
        stats.norm.logpdf(X, z @ MODEL["w"].T + MODEL["b"], S).sum(-1),
        stats.norm.logpdf(z).sum(-1),
        stats.norm.logpdf(z, posterior["mu"], sigma).sum(-1),
    )


def _numpy_rate(posterior):
    """KL(q(z | x) ‖ p(z)) `[B, L]`."""
    mu, log_sigma = posterior["mu"], posterior["log_sigma"]
    return 0.5 * (np.exp(2 * log_sigma) + mu**2 - 1) - log_sigma


def _numpy_pathwise(posterior, eps):
    """∂log w/∂z times ∂z/∂mu and ∂z/∂log_sigma, each `[K, B, L]`, the densities held."""
    sigma = np.exp(posterior["log_sigma"])
    z = posterior["mu"] + sigma * eps
    residual = X - MODEL["b"] - z @ MODEL["w"].T
    slope = residual @ MODEL["w"] / S**2 - z + (z - posterior["mu"]) / sigma**2
    return {"mu": slope, "log_sigma": slope * sigma * eps}


# The exact posterior.


def test_every_weight_is_the_evidence_at_the_exact_posterior():
    @jax.jit
    def both(posterior):
        draws = _draws(MODEL, posterior, EPS)
        return draws.log_weights(), draws.log_weights_at(draws.z, 1.0, True)

    for log_w in both(EXACT):
        np.testing.assert_allclose(log_w, np.tile(LOG_P_X, (K, 1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["elbo_monte_carlo", "stl", "iwae", "dreg", "vimco"])
def test_every_bound_is_tight_at_the_exact_posterior(name):
    cost = _cost(name, MODEL, EXACT, EPS, Options())
    np.testing.assert_allclose(cost, -LOG_P_X, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [-20.0, -1.0, 0.0, 0.5, 2.0, 20.0])
def test_every_renyi_bound_is_tight_at_the_exact_posterior(alpha):
    cost = _cost("renyi", MODEL, EXACT, EPS, Options(alpha=alpha))
    np.testing.assert_allclose(cost, -LOG_P_X, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["stl", "dreg"])
def test_the_path_gradient_vanishes_at_the_exact_posterior(name):
    _, posterior = _gradients(name, MODEL, EXACT, EPS, Options())
    _assert_trees_close(posterior, {"mu": 0 * X[:, :2], "log_sigma": 0 * X[:, :2]}, atol=1e-10)


@pytest.mark.parametrize("name", ["elbo_monte_carlo", "iwae"])
def test_the_score_is_what_remains_of_the_plain_gradient_at_the_exact_posterior(name):
    """The weights are equal, so it is the mean over draws of eps/sigma and of eps² - 1."""
    _, posterior = _gradients(name, MODEL, EXACT, EPS, Options())
    score = {"mu": EPS / np.exp(EXACT["log_sigma"]), "log_sigma": EPS**2 - 1}
    expected = {name: each.mean(0) for name, each in score.items()}
    _assert_trees_close(posterior, expected, rtol=0, atol=1e-10)
    assert min(np.abs(each).min() for each in expected.values()) > 1e-5


# A wrong posterior: values.


@pytest.mark.parametrize("name", ["elbo", "elbo_monte_carlo", "stl"])
def test_the_elbo_misses_the_evidence_by_the_divergence_from_the_exact_posterior(name):
    """E[cost] = KL(q(z | x) ‖ p(z | x)) - log p(x), by a quadrature exact for polynomials."""
    nodes, weights = _quadrature(3, LATENTS)
    posterior, x = _tiled(len(nodes))
    eps = np.repeat(nodes, ROWS, axis=0)[None]
    costs = np.asarray(_cost(name, MODEL, posterior, eps, Options(), x))
    np.testing.assert_allclose(weights @ costs.reshape(-1, ROWS), GAP - LOG_P_X, rtol=1e-12)


def test_closed_form_and_sampled_elbo_agree_on_average():
    """And they are not the same number: 4,000 sets of draws, in standard errors."""
    posterior, x = _tiled(4000)
    eps = np.random.default_rng(2).normal(size=(K, len(x), LATENTS))
    closed, sampled = (
        np.asarray(_cost(name, MODEL, posterior, eps, Options(), x)).reshape(-1, ROWS)
        for name in ("elbo", "elbo_monte_carlo")
    )
    assert np.abs(_errors(closed - sampled, 0)).max() < 4
    assert np.std(closed - sampled, axis=0).min() > 0.1


def test_a_rate_without_closed_form_is_taken_from_the_draws():
    def sampled(posterior, beta):
        draws = _draws(MODEL, posterior, EPS)._replace(rate=None)
        return draws.total_rate, objectives.elbo(draws, Options(beta=beta))

    log_p_x_z, log_p_z, log_q = _numpy_log_densities(WRONG, EPS)
    rate, cost = jax.jit(sampled)(WRONG, 0.3)
    np.testing.assert_allclose(rate, (log_q - log_p_z).mean(0), rtol=1e-12)
    np.testing.assert_allclose(cost, (0.3 * (log_q - log_p_z) - log_p_x_z).mean(0), rtol=1e-12)


def test_the_importance_weighted_bound_rises_to_the_evidence_from_below():
    """E[L_K] for K = 1, 4, 16, 64 from the same 3,000 x 64 draws, each rise in its own errors."""
    sets, most = 3000, 64
    posterior, x = _tiled(sets)
    eps = np.random.default_rng(3).normal(size=(most, len(x), LATENTS))

    @jax.jit
    def bounds(posterior, eps, x):
        draws = _draws(MODEL, posterior, eps, x)

        def bound(k):
            parts = {
                name: getattr(draws, name).reshape(k, -1)
                for name in ("log_likelihood", "log_prior", "log_posterior")
            }
            cost = objectives.iwae(draws._replace(**parts), Options())
            return -jnp.mean(cost.reshape(most // k, sets, ROWS), axis=0)

        return [bound(k) for k in (1, 4, 16, 64)]

    rising = [np.asarray(each) for each in bounds(posterior, eps, x)]
    assert np.abs(_errors(rising[0], LOG_P_X - GAP)).max() < 4
    for fewer, more in itertools.pairwise(rising):
        assert _errors(more - fewer, 0).min() > 10
    assert all(_errors((each - LOG_P_X).mean(1), 0) < -5 for each in rising)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 4.0])
def test_beta_weighs_the_rate_and_nothing_else(beta):
    """Every value by scipy's densities."""
    log_p_x_z, log_p_z, log_q = _numpy_log_densities(WRONG, EPS)
    log_w = log_p_x_z + beta * (log_p_z - log_q)
    rate = _numpy_rate(WRONG)
    importance = math.log(K) - special.logsumexp(log_w, axis=0)
    order = 1 - 0.4
    renyi = (math.log(K) - special.logsumexp(order * log_w, axis=0)) / order
    expected = {
        "elbo": -log_p_x_z.mean(0) + beta * rate.sum(-1),
        "elbo_monte_carlo": -log_w.mean(0),
        "stl": -log_w.mean(0),
        "iwae": importance,
        "dreg": importance,
        "vimco": importance,
        "renyi": renyi,
    }
    options = Options(beta=beta, alpha=0.4)
    for name, value in expected.items():
        cost = _cost(name, MODEL, WRONG, EPS, options)
        np.testing.assert_allclose(cost, value, rtol=1e-12, err_msg=name)


# A wrong posterior: gradients.


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_iwae_gradient_weighs_each_draw_by_its_share(beta):
    """Σ_k w̃_k ∇(-log w_k), the shares held, for the model and for the posterior."""

    def log_w(model, posterior):
        return _draws(model, posterior, EPS).log_weights(beta)

    share = special.softmax(np.asarray(log_w(MODEL, WRONG)), axis=0)
    each = jax.jit(jax.jacrev(log_w, argnums=(0, 1)))(MODEL, WRONG)  # [K, B, *parameter]
    expected = jax.tree.map(lambda g: -np.tensordot(share, g, axes=2), each)
    found = _gradients("iwae", MODEL, WRONG, EPS, Options(beta=beta))
    _assert_trees_close(found, expected, rtol=1e-11, atol=1e-13)


def test_stl_has_the_path_gradient_only():
    """By hand, -1/K Σ_k ∂log w_k/∂z_k ∂z_k/∂φ; the model's is the plain one."""
    model, posterior = _gradients("stl", MODEL, WRONG, EPS, Options())
    plain_model, plain_posterior = _gradients("elbo_monte_carlo", MODEL, WRONG, EPS, Options())
    expected = {name: -each.mean(0) for name, each in _numpy_pathwise(WRONG, EPS).items()}
    _assert_trees_close(posterior, expected, rtol=1e-11, atol=1e-13)
    _assert_trees_close(model, plain_model, rtol=1e-12, atol=1e-14)
    assert np.abs(posterior["mu"] - plain_posterior["mu"]).min() > 1e-5


def test_dreg_squares_the_shares_for_the_posterior_only():
    """By hand, -Σ_k w̃_k² ∂log w_k/∂z_k ∂z_k/∂φ; the model's is IWAE's."""
    model, posterior = _gradients("dreg", MODEL, WRONG, EPS, Options())
    plain_model, _ = _gradients("iwae", MODEL, WRONG, EPS, Options())
    log_p_x_z, log_p_z, log_q = _numpy_log_densities(WRONG, EPS)
    square = special.softmax(log_p_x_z + log_p_z - log_q, axis=0)[..., None] ** 2
    pathwise = _numpy_pathwise(WRONG, EPS)
    expected = {name: -(square * each).sum(0) for name, each in pathwise.items()}
    _assert_trees_close(posterior, expected, rtol=1e-11, atol=1e-13)
    _assert_trees_close(model, plain_model, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("beta", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("name", ["elbo_monte_carlo", "stl"])
def test_the_elbo_gradients_have_the_closed_forms_mean(name, beta):
    """Quadrature: the mean gradient is that of the closed form, for any weight of the rate."""
    nodes, weights = _quadrature(5, LATENTS)
    posterior = {name: each[:1] for name, each in WRONG.items()}

    def closed(model, posterior):
        mu, variance = posterior["mu"], jnp.exp(2 * posterior["log_sigma"])
        residual = X[:1] - model["b"][None] - mu @ model["w"].T
        square = jnp.sum(residual**2) + jnp.sum(variance * jnp.sum(model["w"] ** 2, 0)[None])
        distortion = 0.5 * square * jnp.exp(-2 * model["log_s"]) + PIXELS * model["log_s"]
        return distortion + beta * jnp.sum(gaussian_kl_to_standard(mu, posterior["log_sigma"]))

    expected = jax.jit(jax.grad(closed, argnums=(0, 1)))(MODEL, posterior)
    found = _gradients(name, MODEL, posterior, nodes[None], Options(beta=beta), X[:1], weights)
    _assert_trees_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("beta", [1.0, 0.3, 2.0])
def test_dreg_has_the_mean_of_the_iwae_gradient(beta):
    """Two draws in the plane of their noise: quadrature to rounding."""
    nodes, weights = _quadrature(64, 2)
    arguments = (LINE, LINE_WRONG, nodes.T[..., None], Options(beta=beta), LINE_X, weights)
    _assert_trees_close(
        _gradients("dreg", *arguments), _gradients("iwae", *arguments), rtol=1e-9, atol=1e-10
    )


def test_the_signal_to_noise_ratio_falls_with_k_for_iwae_and_rises_for_dreg():
    """As 1/√K and as √K (Rainforth et al. 2018; Tucker et al. 2019): slopes of the logarithms.

    The means agree, so DReG's, which is known well, is the signal of both.
    """
    counts, sets = np.array([1, 4, 16, 64, 256]), 5000

    @jax.jit
    def gradients(mu, eps):
        """With respect to a mu for each set `[S, 1]`: `[S]`, of IWAE and of DReG."""

        def total(mu, name):
            posterior = {"mu": mu, "log_sigma": LINE_WRONG["log_sigma"]}
            draws = _draws(LINE, posterior, eps, LINE_X)
            return jnp.sum(OBJECTIVES[name].cost(draws, Options()))

        return [jax.grad(total)(mu, name)[:, 0] for name in ("iwae", "dreg")]

    ratios = []
    for k in counts:
        eps = np.random.default_rng(k).normal(size=(k, sets, 1))
        iwae, dreg = map(np.asarray, gradients(np.tile(LINE_WRONG["mu"], (sets, 1)), eps))
        assert abs(_errors(iwae - dreg, 0)) < 4
        ratios.append([abs(dreg.mean()) / each.std(ddof=1) for each in (iwae, dreg)])
    steps = np.diff(np.log(ratios), axis=0) / np.diff(np.log(counts))[:, None]
    assert np.all(steps[:, 0] < -0.4) and np.all(steps[:, 1] > 0.2)
    np.testing.assert_allclose(steps[-2:].mean(0), [-0.5, 0.5], atol=0.03)


# Draws that cannot be reparameterised.

BITS = {"prior": np.array([0.4, -0.3]), "w": MODEL["w"], "b": MODEL["b"]}
BITS_X = np.array([1.0, 0.0, 1.0])
BITS_LOGITS = np.array([-0.7, 0.5])


def _bit_draws(model, logits, z):
    """z in {0, 1} `[K, B, 2]` given, three pixels, and q(z | x) Bernoulli."""

    def log_joint_at(z):
        outputs = z @ model["w"].T + model["b"][None, None]
        log_likelihood = bernoulli_log_prob(outputs, BITS_X[None, None])
        log_prior = bernoulli_log_prob(model["prior"][None, None], z)
        return jnp.sum(log_likelihood, axis=-1), jnp.sum(log_prior, axis=-1)

    def log_posterior_at(z, detached):
        held = jax.lax.stop_gradient(logits) if detached else logits
        return jnp.sum(bernoulli_log_prob(held[None, None], z), axis=-1)

    return Draws(z, *log_joint_at(z), log_posterior_at(z, False), log_joint_at, log_posterior_at)


def _all_bits(k):
    """Every one of the 4^k sets of k draws, `[k, 4^k, 2]`."""
    states = np.array(list(itertools.product((0.0, 1.0), repeat=2)))
    return np.array([states[list(s)] for s in itertools.product(range(4), repeat=k)]).swapaxes(0, 1)


@pytest.mark.parametrize("k", [2, 3])
def test_the_mean_of_vimco_is_the_gradient_of_the_enumerated_bound(k):
    z = jnp.asarray(_all_bits(k))

    def probability(logits):
        return jnp.exp(jnp.sum(bernoulli_log_prob(logits[None, None], z), axis=(0, 2)))

    def bound(model, logits, beta):
        draws = _bit_draws(model, logits, z)
        log_w = draws.log_likelihood + beta * (draws.log_prior - draws.log_posterior)
        return jnp.log(jnp.mean(jnp.exp(log_w), axis=0))

    def enumerated(model, logits, beta):
        value = bound(model, logits, beta)
        return -probability(logits) @ value, -value

    def estimated(model, logits, beta):
        cost = objectives.vimco(_bit_draws(model, logits, z), Options(beta=beta))
        return jax.lax.stop_gradient(probability(logits)) @ cost, cost

    @jax.jit
    def both(*arguments):
        return [
            jax.grad(function, argnums=(0, 1), has_aux=True)(*arguments)
            for function in (enumerated, estimated)
        ]

    for beta in (1.0, 0.4):
        (expected, value), (found, cost) = both(BITS, BITS_LOGITS, beta)
        _assert_trees_close(found, expected, rtol=0, atol=1e-10)
        np.testing.assert_allclose(cost, value, rtol=1e-12)
        assert np.abs(expected[1]).min() > 1e-3


def test_the_baseline_of_vimco_is_the_bound_with_the_mean_of_the_other_log_weights():
    """Set by set: Σ_k (L - L_-k) ∂log q(z_k) + Σ_k w̃_k ∂log w_k, in NumPy."""
    z = _all_bits(3)
    logits = np.broadcast_to(BITS_LOGITS, (z.shape[1], 2))

    @jax.jit
    def found(logits):
        def total(logits):
            # A set of its own for each row, so that the gradients are told apart.
            def one(logits, z):
                return objectives.vimco(_bit_draws(BITS, logits, z[:, None]), Options())[0]

            return jnp.sum(jax.vmap(one, (0, 1))(logits, z))

        return jax.grad(total)(logits)

    score = z - special.expit(BITS_LOGITS)
    outputs = z @ BITS["w"].T + BITS["b"]
    log_w = (BITS_X * outputs - np.logaddexp(0, outputs)).sum(-1)
    log_w += (z * BITS["prior"] - np.logaddexp(0, BITS["prior"])).sum(-1)
    log_w -= (z * BITS_LOGITS - np.logaddexp(0, BITS_LOGITS)).sum(-1)
    share = special.softmax(log_w, axis=0)
    expected = np.zeros_like(logits)
    for k, others in ((0, [1, 2]), (1, [0, 2]), (2, [0, 1])):
        replaced = log_w.copy()
        replaced[k] = log_w[others].mean(0)
        signal = special.logsumexp(log_w, axis=0) - special.logsumexp(replaced, axis=0)
        # log w_k holds -log q(z_k).
        expected -= (signal - share[k])[:, None] * score[k]
    np.testing.assert_allclose(found(logits), expected, rtol=1e-11, atol=1e-13)


def test_vimco_has_no_path_gradient():
    """Draws that do carry a gradient are held."""

    @jax.jit
    @jax.grad
    def slope(shift):
        draws = _draws(MODEL, WRONG, EPS)
        return jnp.sum(objectives.vimco(draws._replace(z=draws.z + shift), Options()))

    assert slope(0.0) == 0


# Rényi bounds.


def test_renyi_of_order_zero_is_iwae():
    cost = _cost("renyi", MODEL, WRONG, EPS, Options(alpha=0.0))
    np.testing.assert_allclose(cost, _cost("iwae", MODEL, WRONG, EPS, Options()), rtol=1e-14)
    found = _gradients("renyi", MODEL, WRONG, EPS, Options(alpha=0.0))
    expected = _gradients("iwae", MODEL, WRONG, EPS, Options())
    _assert_trees_close(found, expected, rtol=1e-12, atol=1e-14)


def test_renyi_bounds_fall_with_their_order_from_the_largest_weight_to_the_smallest():
    """Power means: draw by draw, and the extremes are off by less than log K / |1 - α|."""
    alphas = (-1e4, -10.0, -1.0, 0.0, 0.5, 0.9, 1.1, 2.0, 10.0, 1e4)
    bounds = -np.stack([_cost("renyi", MODEL, WRONG, EPS, Options(alpha=a)) for a in alphas])
    assert np.all(np.diff(bounds, axis=0) < 0)
    log_p_x_z, log_p_z, log_q = _numpy_log_densities(WRONG, EPS)
    log_w = log_p_x_z + log_p_z - log_q
    np.testing.assert_allclose(bounds[0], log_w.max(0) - math.log(K) / (1 + 1e4), rtol=1e-9)
    np.testing.assert_allclose(bounds[-1], log_w.min(0) + math.log(K) / (1e4 - 1), rtol=1e-9)


def test_renyi_bounds_tend_to_the_elbo_at_order_one():
    """log-mean-exp by its cumulants: mean(log w) + (1 - α)/2 var(log w) + ..."""
    log_p_x_z, log_p_z, log_q = _numpy_log_densities(WRONG, EPS)
    log_w = log_p_x_z + log_p_z - log_q
    h = 1e-4
    below, above = (
        -np.asarray(_cost("renyi", MODEL, WRONG, EPS, Options(alpha=a))) for a in (1 - h, 1 + h)
    )
    np.testing.assert_allclose((below + above) / 2, log_w.mean(0), rtol=0, atol=h**2)
    np.testing.assert_allclose((below - above) / h, log_w.var(0), rtol=1e-6)
    closest = _cost("renyi", MODEL, WRONG, EPS, Options(alpha=1 - 1e-6))
    np.testing.assert_allclose(closest, -log_w.mean(0), rtol=0, atol=1e-6 * log_w.var(0).max())
    # However near: a quotient of differences would have lost its digits here.
    for alpha in (1 - 1e-13, 1.0):
        closest = _cost("renyi", MODEL, WRONG, EPS, Options(alpha=alpha))
        np.testing.assert_allclose(closest, -log_w.mean(0), rtol=1e-11)


def test_renyi_of_order_minus_one_is_an_upper_bound_and_iwae_a_lower_one():
    """With many draws it is ½ log E[w²], by quadrature, above log p(x)."""
    num = 200_000
    mu, sigma = LINE_WRONG["mu"].item(), np.exp(LINE_WRONG["log_sigma"]).item()
    noise = math.exp(LINE["log_s"])

    def square(z):
        log_p = stats.norm.logpdf(1.3, 0.8 * z + 0.1, noise) + stats.norm.logpdf(z)
        return np.exp(2 * log_p - stats.norm.logpdf(z, mu, sigma))

    upper = 0.5 * math.log(integrate.quad(square, mu - 12 * sigma, mu + 12 * sigma)[0])
    log_p_x = _log_p_x(LINE, LINE_X)
    eps = np.random.default_rng(5).normal(size=(num, 1, 1))
    log_w = -np.asarray(_cost("iwae", LINE, LINE_WRONG, eps.swapaxes(0, 1), Options(), LINE_X))
    bound = -_cost("renyi", LINE, LINE_WRONG, eps, Options(alpha=-1.0), LINE_X)[0]
    ratio = np.exp(2 * (log_w - upper))  # of mean 1; half its error is the bound's
    error = 0.5 * ratio.std() / math.sqrt(num)
    assert abs(bound - upper) < 4 * error
    assert bound - log_p_x > 20 * error
    sets = eps.reshape(20, num // 20, 1)
    lower = -np.asarray(_cost("iwae", LINE, LINE_WRONG, sets, Options(), LINE_X))
    average = -np.asarray(_cost("renyi", LINE, LINE_WRONG, sets, Options(alpha=-1.0), LINE_X))
    assert _errors(lower, log_p_x) < -4 and _errors(average, log_p_x) > 4


# Rates that are charged otherwise.


def test_free_bits_charges_the_minimum_or_the_mean_rate_of_the_real_rows():
    """One latent below and one above; no row of padding counts, however large its rate."""
    rate = np.array([[0.2, 1.0], [50.0, 0.0], [0.1, 2.0], [0.6, 3.0], [0.0, 90.0]])
    distortion = -_numpy_log_densities(WRONG, EPS)[0].mean(0)

    def loss(rate, beta):
        draws = _draws(MODEL, WRONG, EPS, weight=REAL, rate=rate)
        cost = objectives.free_bits(draws, Options(beta=beta, free_nats=0.5))
        return jnp.sum(REAL * cost) / jnp.sum(REAL), cost

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    for beta in (1.0, 0.25):
        slope, cost = gradient(rate, beta)
        expected = distortion + beta * (0.5 + 2.0)  # not 0.9 / 3 but 0.5; 6 / 3
        np.testing.assert_allclose(cost[REAL == 1], expected[REAL == 1], rtol=1e-12)
        np.testing.assert_array_equal(slope[:, 0], 0 * REAL)
        np.testing.assert_allclose(slope[:, 1], beta * REAL / 3, rtol=1e-12)


def test_free_bits_of_no_nats_is_the_elbo_on_average():
    @jax.jit
    def means(posterior):
        draws, options = _draws(MODEL, posterior, EPS, weight=jnp.ones(ROWS)), Options(free_nats=0)
        return [jnp.mean(f(draws, options)) for f in (objectives.free_bits, objectives.elbo)]

    np.testing.assert_allclose(*means(WRONG), rtol=1e-12)


def _minibatch_weighted(posterior, z, num_examples):
    """log q(z_i) `[B]` and log q(z_i,l) `[B, L]`, pair by pair (Chen et al. 2018, eq. S6)."""
    real = np.flatnonzero(REAL)
    sigma = np.exp(posterior["log_sigma"])
    joint, each = np.zeros(ROWS), np.zeros((ROWS, LATENTS))
    for i, j in itertools.product(range(ROWS), real):
        densities = stats.norm.pdf(z[i], posterior["mu"][j], sigma[j])
        joint[i] += np.prod(densities) / (num_examples * len(real))
        each[i] += densities / (num_examples * len(real))
    return np.log(joint), np.log(each)


def test_tcvae_weighs_the_total_correlation_and_nothing_else():
    """cost(β) = Monte-Carlo ELBO's + (β - 1) TC on the real rows, the constants included."""

    @jax.jit
    def costs(posterior, betas):
        draws = _draws(MODEL, posterior, EPS[:1], weight=REAL, num_examples=37)
        vary = jax.vmap(lambda beta: objectives.tcvae(draws, Options(beta=beta)))
        return draws.z[0], vary(betas), objectives.elbo_monte_carlo(draws, Options())

    betas = np.array([0.0, 1.0, 3.0])
    z, found, plain = map(np.asarray, costs(WRONG, betas))
    joint, each = _minibatch_weighted(WRONG, z, 37)
    correlation = joint - each.sum(-1)
    expected = plain + (betas[:, None] - 1) * correlation
    np.testing.assert_allclose(found[:, REAL == 1], expected[:, REAL == 1], rtol=1e-12)
    assert np.abs(correlation).min() > 0.1


def test_the_total_correlation_of_a_gaussian_is_the_closed_form():
    """½ (Σ_l log C_ll - log |C|) of q(z) = N(0, C), and (L - 1) log N more of N examples: eq. S6
    has 1/N once in log q(z) and L times in Σ_l log q(z_l).

    x at the middles of 150 equal parts of a standard Gaussian, noise of ±1, exact for squares.
    """
    a, s, num, latents = np.array([0.9, -0.6, 0.5]), 0.8, 150, 3
    x = stats.norm.ppf((np.arange(num) + 0.5) / num)
    noise = np.array(list(itertools.product((-1.0, 1.0), repeat=latents)))
    mu, eps = np.repeat(x, len(noise))[:, None] * a, np.tile(noise, (num, 1))[None]
    posterior = {"mu": mu, "log_sigma": np.full(mu.shape, math.log(s))}
    model = {"w": np.zeros((1, latents)), "b": np.zeros(1), "log_s": np.array(0.0)}

    @jax.jit
    def correlation(posterior, num_examples):
        weight = jnp.ones(len(mu))
        draws = _draws(model, posterior, eps, mu[:, :1], weight=weight, num_examples=num_examples)
        costs = [objectives.tcvae(draws, Options(beta=beta)) for beta in (2.0, 1.0)]
        return jnp.mean(costs[0] - costs[1])

    covariance = np.outer(a, a) * np.mean(x**2) + s**2 * np.eye(latents)
    expected = 0.5 * (np.log(np.diag(covariance)).sum() - np.linalg.slogdet(covariance)[1])
    one, many = (float(correlation(posterior, num)) for num in (1, 1000))
    np.testing.assert_allclose(one, expected, rtol=5e-3)
    np.testing.assert_allclose(many - one, (latents - 1) * math.log(1000), rtol=1e-12)


def test_tcvae_does_not_see_padding():
    """Neither the real rows' costs nor any gradient."""

    def loss(posterior):
        draws = _draws(MODEL, posterior, EPS[:1], weight=REAL, num_examples=37)
        return REAL @ objectives.tcvae(draws, Options(beta=3.0))

    padding = np.where(REAL == 0, 5.0, 0.0)[:, None]
    both = jax.jit(jax.value_and_grad(loss))
    value, gradient = both(WRONG)
    other, other_gradient = both(_shifted(WRONG, padding, 0 * padding))
    np.testing.assert_allclose(other, value, rtol=1e-13)
    _assert_trees_close(other_gradient, gradient, rtol=1e-12, atol=1e-13)
    assert np.all(gradient["mu"][REAL == 0] == 0) and np.all(gradient["mu"][REAL == 1] != 0)


# The divergence of InfoVAE.


def test_mmd_is_the_u_statistic_pair_by_pair():
    """No pair of a point with itself, no row of padding in x, all of y."""
    x, y = np.random.default_rng(6).normal(size=(2, ROWS, LATENTS))
    rows, scale = np.flatnonzero(REAL), 2 * LATENTS

    def mean_kernel(pairs):
        values = [scale / (scale + sum((a - b) ** 2)) for a, b in pairs]
        return sum(values) / len(values)

    expected = (
        mean_kernel([(x[i], x[j]) for i in rows for j in rows if i != j])
        + mean_kernel([(y[i], y[j]) for i in range(ROWS) for j in range(ROWS) if i != j])
        - 2 * mean_kernel([(x[i], y[j]) for i in rows for j in range(ROWS)])
    )
    np.testing.assert_allclose(jax.jit(objectives.mmd)(x, y, REAL), expected, rtol=1e-12)


@pytest.mark.parametrize("rows", [1, 4])
def test_mmd_of_one_real_row_has_no_part_within_it(rows):
    """Of a batch of one there is no part within y either; the gradient pulls to the points of y."""
    x, y = np.random.default_rng(6).normal(size=(2, rows, LATENTS))
    scale, weight = 2 * LATENTS, np.eye(rows)[0]
    cross = np.mean([scale / (scale + np.sum((x[0] - b) ** 2)) for b in y])
    pairs = [(a, b) for a in range(rows) for b in range(rows) if a != b]
    within = sum(scale / (scale + np.sum((y[a] - y[b]) ** 2)) for a, b in pairs)
    found, slope = jax.jit(jax.value_and_grad(objectives.mmd))(x, y, weight)
    np.testing.assert_allclose(found, within / max(1, len(pairs)) - 2 * cross, rtol=1e-12)
    np.testing.assert_array_equal(slope[1:], 0)
    assert (np.abs(slope[0]) > 1e-3).all()


def test_mmd_is_zero_on_average_for_equal_distributions_and_known_for_shifted_ones():
    """4,000 pairs of samples, N(δ, 1) against N(0, 1); the mean by quadrature over x - y."""
    source = np.random.default_rng(7)
    x, y = source.normal(size=(2, 4000, 8, 1))
    weight = np.array([1.0] * 6 + [0.0] * 2)
    x[:, 6:] = 1e3
    many = jax.jit(jax.vmap(objectives.mmd, (0, 0, None)))

    def mean_kernel(shift):
        def integrand(d):
            return 2 / (2 + d**2) * stats.norm.pdf(d, shift, math.sqrt(2))

        return integrate.quad(integrand, shift - 15, shift + 15)[0]

    for shift in (0.0, 0.5, 2.0):
        values = np.asarray(many(x + shift, y, weight))
        expected = 2 * (mean_kernel(0) - mean_kernel(shift))
        assert abs(_errors(values, expected)) < 4
        assert shift == 0 or _errors(values, 0) > 10


def test_infovae_adds_the_weighted_divergence_to_the_elbo():
    prior = np.random.default_rng(8).normal(size=(ROWS, LATENTS))

    @jax.jit
    def both(posterior, beta):
        draws = _draws(MODEL, posterior, EPS, weight=REAL, draw_prior=lambda: prior)
        cost = objectives.infovae(draws, Options(beta=beta, mmd_weight=7.0))
        return cost, objectives.mmd(draws.z[0], prior, REAL)

    distortion = -_numpy_log_densities(WRONG, EPS)[0].mean(0)
    for beta in (0.0, 1.5):
        cost, divergence = both(WRONG, beta)
        expected = distortion + beta * _numpy_rate(WRONG).sum(-1) + 7 * float(divergence)
        np.testing.assert_allclose(cost, expected, rtol=1e-12)
    assert abs(divergence) > 1e-3


# Pieces.

EVERYTHING = tuple(objectives.DRAWS_MAY_HAVE)


@pytest.mark.parametrize("event", [(), (4,), (4, 5)])
def test_scale_gradient_is_the_identity_with_its_gradient_scaled_row_by_row(event):
    source = np.random.default_rng(9)
    z, cotangent = source.normal(size=(2, 3, 2, *event))
    scale = source.normal(size=(3, 2))
    value, pull = jax.vjp(objectives.scale_gradient, z, scale)
    np.testing.assert_array_equal(value, z)
    to_z, to_scale = pull(jnp.asarray(cotangent))
    expected = np.array([[scale[k, b] * cotangent[k, b] for b in range(2)] for k in range(3)])
    np.testing.assert_allclose(to_z, expected, rtol=1e-15)
    np.testing.assert_array_equal(to_scale, 0 * scale)


@pytest.mark.parametrize(
    ("name", "num_samples", "fields", "message"),
    [
        ("evidence", 1, {}, r"model\.objective='evidence': choose one of elbo, "),
        ("elbo", 0, {}, r"model\.num_samples=0: "),
        ("iwae", -3, {}, r"model\.num_samples=-3: "),
        ("vimco", 1, {}, r"model\.num_samples=1: 'vimco'"),
        ("renyi", 1, {"alpha": 0.5}, r"model\.num_samples=1: 'renyi'"),
        ("elbo", 1, {"beta": -0.1}, r"model\.beta=-0\.1: "),
        ("elbo", 1, {"beta": math.nan}, r"model\.beta=nan: "),
        ("elbo", 1, {"beta": math.inf}, r"model\.beta=inf: "),
        ("renyi", 5, {"alpha": 1.0}, r"model\.alpha=1\.0: "),
        ("renyi", 5, {"alpha": 1}, r"model\.alpha=1: "),
        ("renyi", 5, {"alpha": math.nan}, r"model\.alpha=nan: "),
        ("tcvae", 2, {}, r"model\.num_samples=2: "),
        ("infovae", 2, {}, r"model\.num_samples=2: "),
        ("free_bits", 1, {"free_nats": -0.5}, r"model\.free_nats=-0\.5: "),
        ("free_bits", 1, {"free_nats": math.nan}, r"model\.free_nats=nan: "),
        ("infovae", 1, {"mmd_weight": -10.0}, r"model\.mmd_weight=-10\.0: "),
        ("infovae", 1, {"mmd_weight": math.nan}, r"model\.mmd_weight=nan: "),
    ],
)
def test_check_refuses_a_bad_value_by_its_name(name, num_samples, fields, message):
    with pytest.raises(UserError, match=message) as error:
        objectives.check(name, num_samples, Options(**fields), EVERYTHING, "it")
    assert "\n" not in str(error.value)


def test_check_accepts_every_objective_and_the_edges_of_what_is_allowed():
    for name in OBJECTIVES:
        several = {"vimco": (2,), "renyi": (2,), "tcvae": (1,), "infovae": (1,)}
        for num_samples in several.get(name, (1, 2)):
            objectives.check(name, num_samples, Options(), EVERYTHING, "it")
            edges = Options(beta=0.0, alpha=-1.0, free_nats=0.0, mmd_weight=0.0)
            objectives.check(name, num_samples, edges, EVERYTHING, "it")
            if name != "renyi":
                objectives.check(name, num_samples, Options(alpha=1.0), EVERYTHING, "it")


def test_what_the_draws_do_not_have_is_said_with_what_can_be_used():
    """Each objective is refused exactly where one of its needs is taken away."""
    for name in OBJECTIVES:
        for missing in EVERYTHING:
            provided = [each for each in EVERYTHING if each != missing]
            if name in objectives.usable(provided):
                continue
            what = re.escape(objectives.DRAWS_MAY_HAVE[missing])
            with pytest.raises(UserError, match=rf"{name}' needs {what}, which it does not have"):
                objectives.check(name, 1, Options(), provided, "it")
    of_hierarchies = ["elbo", "elbo_monte_carlo", "stl", "iwae", "dreg", "vimco", "renyi"]
    assert objectives.usable(objectives.LAYERED) == of_hierarchies
    relaxed = ["vimco", "gumbel_softmax", "straight_through"]
    assert objectives.usable(("relaxed", "log_posterior_at")) == relaxed
    assert objectives.usable(EVERYTHING) == list(OBJECTIVES)
