"""Log-densities and the Gaussian KL against scipy, quadrature and closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from dgm_jax.distributions import (
    bernoulli_log_prob,
    discretised_logistic_log_prob,
    draw_logistic,
    gaussian_kl,
    gaussian_kl_to_standard,
    gaussian_log_prob,
    standard_gaussian_log_prob,
)
from dgm_jax.models import flow

MU_GRID = (-30.0, -3.0, -0.5, 0.0, 0.1, 2.0, 30.0)
LOG_SIGMA_GRID = (-5.0, -1.0, -0.1, 0.0, 0.2, 1.0, 5.0)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def test_bernoulli_equals_scipy(x64):
    logits = np.linspace(-8, 8, 33)
    for x in (0.0, 1.0):
        ours = bernoulli_log_prob(jnp.asarray(logits), jnp.full(33, x))
        scipys = stats.bernoulli.logpmf(x, special.expit(logits))
        np.testing.assert_allclose(ours, scipys, rtol=1e-12, atol=1e-13)


def test_bernoulli_sums_to_one_over_its_support():
    logits = jnp.concatenate([jnp.linspace(-100, 100, 101), jnp.array([-1e4, 1e4])])
    total = sum(jnp.exp(bernoulli_log_prob(logits, jnp.full_like(logits, x))) for x in (0, 1))
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_bernoulli_and_its_gradient_at_extreme_logits():
    """log p = -softplus(∓l) and d log p / dl = x - sigmoid(l), where p itself is 0 or 1."""
    logits = jnp.array([1e4, 1e4, -1e4, -1e4, 100.0, -100.0])
    x = jnp.array([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    values = bernoulli_log_prob(logits, x)
    np.testing.assert_array_equal(values, [-1e4, 0, 0, -1e4, -100, -100])
    np.testing.assert_array_equal(values, -jax.nn.softplus(jnp.where(x == 1, -logits, logits)))
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(bernoulli_log_prob(v, x))))(logits)
    np.testing.assert_array_equal(gradient, [-1, 0, 0, 1, -1, 1])


def test_the_gradient_of_bernoulli_is_the_residual(x64):
    """x - sigmoid(l), also at l = 0 where a piecewise formula may have none."""
    logits = jnp.array([-30.0, -2.0, -1e-9, 0.0, 1e-9, 2.0, 30.0])
    for x in (0.0, 1.0):
        gradient = jax.vmap(jax.grad(bernoulli_log_prob), (0, None))(logits, x)
        np.testing.assert_allclose(gradient, x - special.expit(logits), rtol=1e-12, atol=1e-15)


def test_gaussian_equals_scipy(x64):
    x, mu, log_sigma = np.meshgrid((-40.0, -1.0, 0.0, 0.3, 7.0), MU_GRID, LOG_SIGMA_GRID)
    ours = gaussian_log_prob(jnp.asarray(x), jnp.asarray(mu), jnp.asarray(log_sigma))
    np.testing.assert_allclose(ours, stats.norm.logpdf(x, mu, np.exp(log_sigma)), rtol=1e-12)


@pytest.mark.parametrize("log_sigma", [-5.0, 0.0, 0.7, 5.0])
def test_gaussian_integrates_to_one_with_its_mean_and_variance(x64, log_sigma):
    mu, sigma = 3.0, math.exp(log_sigma)
    x = mu + sigma * np.linspace(-12, 12, 2001)
    density = np.exp(gaussian_log_prob(jnp.asarray(x), jnp.float64(mu), jnp.float64(log_sigma)))
    # The trapezoidal rule is exact to rounding for a function that vanishes at both ends.
    moments = [integrate.trapezoid(density * f, x) for f in (1 + 0 * x, x, (x - mu) ** 2)]
    np.testing.assert_allclose(moments, [1, mu, sigma**2], rtol=1e-11)


def test_standard_gaussian_is_the_gaussian_at_mean_zero_and_log_sigma_zero(x64):
    x = jnp.linspace(-40, 40, 81)
    zero = jnp.zeros_like(x)
    np.testing.assert_array_equal(standard_gaussian_log_prob(x), gaussian_log_prob(x, zero, zero))
    np.testing.assert_allclose(standard_gaussian_log_prob(x), stats.norm.logpdf(x), rtol=1e-14)


def _kl_by_quadrature(mu, log_sigma):
    sigma = math.exp(log_sigma)

    def integrand(e):
        z = mu + sigma * e
        return stats.norm.pdf(e) * (stats.norm.logpdf(z, mu, sigma) - stats.norm.logpdf(z))

    return integrate.fixed_quad(integrand, -14, 14, n=150)[0]


@pytest.mark.parametrize("mu", MU_GRID)
def test_kl_equals_quadrature(x64, mu):
    ours = [float(gaussian_kl_to_standard(jnp.float64(mu), jnp.float64(s))) for s in LOG_SIGMA_GRID]
    expected = [_kl_by_quadrature(mu, s) for s in LOG_SIGMA_GRID]
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)


def test_kl_takes_the_log_of_sigma_and_not_of_the_variance():
    """KL(N(0, 2²) ‖ N(0, 1)) = 3/2 - log 2; with log 2 read as log-variance it is ½ - ½ log 2."""
    kl = gaussian_kl_to_standard(jnp.zeros(()), jnp.log(2.0))
    np.testing.assert_allclose(kl, 1.5 - math.log(2), rtol=1e-6)


def test_kl_is_never_negative_and_zero_only_at_the_standard_gaussian(x64):
    assert gaussian_kl_to_standard(jnp.zeros(()), jnp.zeros(())) == 0
    mu, log_sigma = np.random.default_rng(0).normal(size=(2, 10_000)) * np.logspace(-4, 1, 10_000)
    assert np.all(gaussian_kl_to_standard(jnp.asarray(mu), jnp.asarray(log_sigma)) > 0)


def test_kl_is_the_mean_of_the_log_ratio_under_q():
    """Within four standard errors of a Monte-Carlo mean of log q(z) - log p(z), z ~ q."""
    n = 100_000
    for seed, (mu, log_sigma) in enumerate([(0.0, 0.5), (1.5, -1.0), (-2.0, 1.0)]):
        mus, log_sigmas = np.full((2, n), [[mu], [log_sigma]], np.float32)
        z = mus + np.exp(log_sigmas) * np.random.default_rng(seed).normal(size=n)
        log_q = gaussian_log_prob(jnp.asarray(z), mus, log_sigmas)
        log_ratio = np.asarray(log_q - standard_gaussian_log_prob(jnp.asarray(z)), np.float64)
        error = log_ratio.std() / math.sqrt(n)
        kl = gaussian_kl_to_standard(jnp.float32(mu), jnp.float32(log_sigma))
        assert abs(log_ratio.mean() - kl) < 4 * error


def test_kl_close_to_the_standard_gaussian():
    """The series s² + 2s³/3 + ..., where exp(2s) - 1 in float32 would be wrong by 6e-8."""
    log_sigma = np.array([1e-2, 1e-3, 1e-4, -1e-4, -1e-3, -1e-2], np.float32)
    s = log_sigma.astype(np.float64)
    series = s**2 + 2 / 3 * s**3 + s**4 / 3 + 2 / 15 * s**5
    kl = gaussian_kl_to_standard(jnp.zeros(6), jnp.asarray(log_sigma))
    # ½ expm1(2s) and s nearly cancel: what remains is right to the rounding of s.
    assert np.all(np.abs(kl - series) < 2 * np.spacing(np.abs(log_sigma)))


def test_extreme_scales_are_finite_with_finite_gradients():
    """At log sigma = ±20 in float32: the closed forms, and no overflow on the way."""
    log_sigma = jnp.array([-20.0, 20.0])

    def value_and_grad(fn):
        return jax.jit(jax.vmap(jax.value_and_grad(fn)))(log_sigma)

    kl, gradient = value_and_grad(lambda s: gaussian_kl_to_standard(1.0, s))
    np.testing.assert_allclose(kl, [20, 0.5 * math.exp(40)], rtol=1e-5)
    np.testing.assert_allclose(gradient, [-1, math.exp(40)], rtol=1e-5)
    log_prob, gradient = value_and_grad(lambda s: gaussian_log_prob(1.0, 0.0, s))
    expected = [-0.5 * math.exp(40), -20 - 0.5 * math.log(2 * math.pi)]
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, [math.exp(40), -1], rtol=1e-5)


discretised_logistic = jax.jit(discretised_logistic_log_prob)
GREY = np.arange(256.0)


def _logistics(locations, log_scales):
    """The masses `[256, N]` of all pairs, with the locations and the log-scales `[1, N]`."""
    pairs = np.stack(np.meshgrid(locations, log_scales), axis=-1).reshape(-1, 2)
    location, log_scale = pairs.T[:, None]
    return np.asarray(discretised_logistic(GREY[:, None], location, log_scale)), location, log_scale


@pytest.mark.parametrize("log_scale", [-12.0, -7.0, -5.0, -3.5, -2.0, 0.0, 2.0, 7.0, 12.0, 30.0])
def test_discretised_logistic_sums_to_one(x64, log_scale):
    """Locations within and without [-1, 1], on the sides of bins and on their middles."""
    locations = [-10, -1.5, -1, -0.999, -2 / 255, -1 / 255, 0, 1 / 255, 0.3, 0.77, 1, 1.003, 10]
    log_p, *_ = _logistics(locations, [log_scale])
    np.testing.assert_allclose(np.exp(log_p).sum(axis=0), np.ones(len(locations)), rtol=1e-12)


def test_discretised_logistic_equals_the_difference_of_cdfs(x64):
    """Of upper tails above the location, so that no difference is of numbers close to one."""
    log_p, location, log_scale = _logistics(np.linspace(-1.4, 1.4, 29), np.linspace(-6.5, 7, 28))
    law = stats.logistic(location, np.exp(log_scale))
    sides = np.concatenate([[-np.inf], (GREY[1:] - 0.5) / 127.5 - 1, [np.inf]])[:, None]
    cdf, tail = law.cdf(sides), law.sf(sides)
    below = sides[1:] < location
    mass = np.where(below, cdf[1:] - cdf[:-1], tail[:-1] - tail[1:])
    # What the difference loses: the rounding of its larger term.
    lost = 4e-15 * np.where(below, cdf[1:], tail[:-1]) + 1e-300
    well = lost < 1e-9 * mass
    assert well.mean() > 0.7
    assert np.all(np.abs(np.exp(log_p) - mass)[well] < (1e-11 * mass + lost)[well])


def test_the_first_and_the_last_bin_are_open(x64):
    """The cdf at the side of the first bin, the upper tail at that of the last."""
    log_p, location, log_scale = _logistics([-3.0, -0.9, 0.2, 1.1, 3.0], [-6.0, -2.0, 0.0, 3.0])
    law = stats.logistic(location[0], np.exp(log_scale[0]))
    np.testing.assert_allclose(log_p[0], law.logcdf(0.5 / 127.5 - 1), rtol=1e-10, atol=1e-300)
    np.testing.assert_allclose(log_p[-1], law.logsf(254.5 / 127.5 - 1), rtol=1e-10, atol=1e-300)


def test_discretised_logistic_is_symmetric(x64):
    """Grey values and location mirrored: x -> 255 - x, location -> -location."""
    log_p, location, log_scale = _logistics([-1.2, -0.31, 0.5], [-6.0, -2.0, 1.0])
    mirrored = discretised_logistic(255 - GREY[:, None], -location, log_scale)
    np.testing.assert_allclose(log_p, mirrored, rtol=1e-9, atol=1e-300)


def test_the_tails_of_a_discretised_logistic_decay_as_an_exponential(x64):
    """Where the cdf is 1 to rounding the mass is e^(-lower) - e^(-upper), all but exactly."""
    log_p, location, log_scale = _logistics([-1.0, -0.5, 0.0], [-6.0, -5.0, -4.5])
    lower = ((GREY[:, None] - 0.5) / 127.5 - 1 - location) / np.exp(log_scale)
    width = 2 / 255 / np.exp(log_scale)
    far = (lower > 35) & (GREY[:, None] < 255)
    assert far.sum() > 300
    expected = -lower + np.log(-np.expm1(-width))
    np.testing.assert_allclose(log_p[far], expected[far], rtol=1e-12)


def test_discretised_logistic_in_32_bits_equals_64_bits():
    """Up to the rounding of x - location, half a unit in 1e7, as a part of the scale."""
    x = np.repeat(GREY, 200)
    rng = np.random.default_rng(0)
    location, log_scale = rng.uniform(-1.2, 1.2, len(x)), rng.uniform(-7, 7, len(x))
    arguments = [a.astype(np.float32) for a in (x, location, log_scale)]
    single = discretised_logistic(*arguments)
    assert single.dtype == np.float32
    with jax.enable_x64(True):
        double = discretised_logistic(*(a.astype(np.float64) for a in arguments))
    allowed = 1e-6 * (1 + np.abs(double)) + 1e-6 * np.exp(-log_scale)
    assert np.all(np.abs(single - np.asarray(double)) < allowed)


def test_extreme_logistics_are_finite_with_finite_gradients():
    """In float32, where the masses themselves are 0 or 1."""
    x, location, log_scale = (
        a.ravel().astype(np.float32)
        for a in np.meshgrid(
            [0, 1, 100, 254, 255], [-1e3, -10, -1, 0, 1, 10, 1e3], [-20, -7, 0, 7, 20]
        )
    )
    both = jax.value_and_grad(discretised_logistic_log_prob, argnums=(1, 2))
    log_p, gradients = jax.jit(jax.vmap(both))(x, location, log_scale)
    assert np.isfinite(log_p).all() and np.all(log_p <= 0)
    assert np.isfinite(gradients[0]).all() and np.isfinite(gradients[1]).all()


def test_the_gradient_of_a_discretised_logistic_is_a_finite_difference(x64):
    rng = np.random.default_rng(1)
    x = jnp.asarray(np.array([0, 1, 17, 128, 200, 254, 255] * 20, float))
    location, log_scale = (jnp.asarray(rng.uniform(a, b, 140)) for a, b in ((-1.3, 1.3), (-5, 3)))

    def total(location, log_scale):
        return jnp.sum(discretised_logistic(x, location, log_scale))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(location, log_scale)
    h = 1e-6
    numeric = (
        discretised_logistic(x, location + h, log_scale)
        - discretised_logistic(x, location - h, log_scale),
        discretised_logistic(x, location, log_scale + h)
        - discretised_logistic(x, location, log_scale - h),
    )
    for gradient, difference in zip(gradients, numeric, strict=True):
        np.testing.assert_allclose(gradient, difference / (2 * h), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("q", [(0.3, -0.5), (-1.0, 0.4)])
@pytest.mark.parametrize("p", [(0.0, 0.0), (0.7, 0.6), (0.3, -0.5)])
def test_kl_between_gaussians_against_quadrature(q, p):
    z = np.linspace(-12, 12, 100_001)
    log_q, log_p = (stats.norm.logpdf(z, mu, np.exp(log_sigma)) for mu, log_sigma in (q, p))
    expected = np.sum(np.exp(log_q) * (log_q - log_p)) * (z[1] - z[0])
    with jax.enable_x64(True):
        found = gaussian_kl(*(jnp.float64(v) for v in (*q, *p)))
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_logistic_draws_have_the_tails_that_they_should():
    """Of a million with this key one is JAX's -87.3, of probability e⁻⁸⁷; here it is log 2⁻²⁴."""
    naive = jax.random.logistic(jax.random.key(4), (1_000_000,))
    found = draw_logistic(jax.random.key(4), (1_000_000,))
    assert float(naive.min()) < -80  # while JAX has them
    np.testing.assert_array_equal(found, np.maximum(naive, np.float32(-24 * math.log(2))))
    np.testing.assert_allclose(np.mean(found < -8), np.exp(-8), rtol=0.2)
    line, slope = flow.to_line(jnp.zeros((1, 1)), found.min()[None, None], 2, 0.0)
    assert np.isfinite(line).all() and np.isfinite(slope).all()
