"""The bound against exact likelihoods by quadrature, samplers against exact flows.

A network that answers 0, as a fresh one does, makes a model the exact denoiser of two kinds of
data: zero-mean Gaussians of deviation `sigma_data`, and independent bits of the data's mean.
"""

import functools
import math
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dgm_jax.core import DataSpec, UserError
from dgm_jax.models import diffusion
from dgm_jax.nn import denoisers
from dgm_jax.nn.noise import SCHEDULES, Schedule, alpha_sigma, noisy, precondition

SIGMA = 0.7
LINE = DataSpec((1,), "real", np.zeros(1, np.float32), 100, 3)
BIT = LINE._replace(support="binary", mean=np.array([0.3], np.float32))
GREY = LINE._replace(support="uint8", mean=np.array([90.0], np.float32))
CONFIG = diffusion.Config(width=4, depth=0, schedule="linear", sigma_data=SIGMA)
CONFIG = replace(CONFIG, gamma_min=-5.0, gamma_max=8.0)
EXACT = replace(CONFIG, gamma_min=-20.0, gamma_max=20.0)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _fresh(config, spec):
    """The model whose network answers 0, and whose schedule is as it starts."""
    model = diffusion.build(config, spec)
    batch = {"x": jnp.zeros((1, *spec.event_shape))}
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["diffusion"]
    return model, {"diffusion": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)}


def _with(times, noise):
    """Draws that are given: all noise is `noise`, and the times are `times`."""
    return (
        mock.patch.object(denoisers, "spread_times", lambda rng, num: jnp.asarray(times)),
        mock.patch.object(jax.random, "normal", lambda key, shape: jnp.asarray(noise)),
    )


def _expected(fn, x, x_prob, noise, noise_prob, times, times_prob):
    """Mean over a grid of x, noise and times of what `fn(x)` gives for each, `[N]` or a dict."""
    grid = np.meshgrid(x, noise, times, indexing="ij")
    weight = np.einsum("i,j,k->ijk", x_prob, noise_prob, times_prob).ravel()
    x, noise, t = (a.ravel() for a in grid)
    patches = _with(t, noise[:, None])
    with patches[0], patches[1]:
        found = jax.jit(fn)({"x": jnp.asarray(x)[:, None]})
    return jax.tree.map(lambda values: float(np.sum(weight * values)), found)


def _legendre(num):
    points, weights = np.polynomial.legendre.leggauss(num)
    return (points + 1) / 2, weights / 2


def _hermite(num):
    points, weights = np.polynomial.hermite_e.hermegauss(num)
    return points, weights / weights.sum()


def _gaussian_grid(times):
    """Three points integrate the squares of x and of noise exactly."""
    x, x_prob = _hermite(3)
    return SIGMA * x, x_prob, *_hermite(3), *times


def _bound(config, spec, grid):
    model, params = _fresh(config, spec)
    return _expected(lambda batch: model.log_likelihood_fns["elbo"](params, batch, KEY), *grid)


KEY = jax.random.key(1)


# The process.


def test_signal_and_noise_have_unit_power_and_the_ratio_that_gamma_says():
    gamma = np.linspace(-15, 15, 31)
    alpha, sigma = alpha_sigma(gamma)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)
    np.testing.assert_allclose(np.log(alpha**2 / sigma**2), -gamma, rtol=1e-9, atol=1e-9)
    z = noisy(jnp.full(31, 2.0), jnp.asarray(gamma), jnp.full(31, 3.0))
    np.testing.assert_allclose(z, 2 * alpha + 3 * sigma, rtol=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_signal_to_noise_falls_from_end_to_end(kind):
    """Whatever has been learned."""
    schedule = Schedule(kind, (-6.0, 7.0))
    t = jnp.linspace(0.0, 1.0, 501)
    params = jax.jit(schedule.init)(KEY, t)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda p: p + rng.normal(size=p.shape), params)
    at = lambda t: schedule.apply(moved, t)  # noqa: E731
    gamma, slope = jax.jit(lambda t: jax.jvp(at, (t,), (jnp.ones_like(t),)))(t)
    np.testing.assert_allclose(np.asarray(gamma)[[0, -1]], [-6, 7], rtol=1e-6)
    assert (np.diff(gamma) > 0).all() and (slope > 0).all()
    if kind == "monotone":  # whose slope jumps between the intervals
        np.testing.assert_allclose(np.mean(slope[:-1]), gamma[-1] - gamma[0], rtol=0.05)
    else:
        np.testing.assert_allclose(np.gradient(gamma, t)[1:-1], slope[1:-1], rtol=0.02)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_far_ends_are_where_they_should_be_in_float32(kind):
    """And everything between, against float64."""
    schedule, found = Schedule(kind, (-40.0, 40.0)), []
    for x64 in (True, False):
        with jax.enable_x64(x64):
            t = jnp.linspace(0.0, 1.0, 65)  # as exact in either
            fresh = jax.jit(lambda t: schedule.apply(schedule.init(KEY, t), t))
            found.append(np.asarray(fresh(t)))
    assert found[1].dtype == np.float32
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(found[1][[0, -1]], [-40, 40], rtol=1e-6)


def test_schedules_are_those_of_their_papers():
    t = np.linspace(0.05, 1, 20)
    at = lambda kind, ends: Schedule(kind, ends).apply({}, t)  # noqa: E731
    sigma = (0.002 ** (1 / 7) + t * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    ends = (2 * math.log(0.002), 2 * math.log(80))
    np.testing.assert_allclose(np.exp(at("karras", ends) / 2), sigma, rtol=1e-9)
    alpha, _ = alpha_sigma(at("cosine", (-40.0, 40.0)))
    np.testing.assert_allclose(alpha, np.cos(np.pi / 2 * t), atol=1e-7)


def test_what_the_network_is_given_and_asked_for_has_unit_variance():
    """And its answer 0 is the best linear guess: what is left is uncorrelated with z."""
    gamma = np.linspace(-15, 15, 31)
    alpha, sigma = alpha_sigma(gamma)
    skip, out, scale = precondition(gamma, SIGMA)
    variance = alpha**2 * SIGMA**2 + sigma**2  # of z
    np.testing.assert_allclose(scale**2 * variance, 1, rtol=1e-12)
    left = SIGMA**2 * (1 - skip * alpha) ** 2 + (skip * sigma) ** 2  # E (x - skip z)²
    np.testing.assert_allclose(left / out**2, 1, rtol=1e-9)
    np.testing.assert_allclose(alpha * SIGMA**2 - skip * variance, 0, atol=1e-12)


# The bound.


@functools.cache
def _gaussian_bound(config):
    times, prob = _legendre(600)
    if config.schedule == "cosine":  # all that happens does so near its ends
        times = special.expit(60 * times - 30)
        prob = prob * 60 * times * (1 - times)
    return _bound(config, LINE, _gaussian_grid((times, prob)))


@pytest.mark.parametrize("kind", ["linear", "cosine", "karras"])
def test_the_bound_of_a_gaussian_is_its_likelihood(kind):
    exact = -0.5 * math.log(2 * math.pi * math.e * SIGMA**2)
    assert _gaussian_bound(replace(EXACT, schedule=kind)) == pytest.approx(exact, abs=1e-5)


def test_a_bound_with_a_wrong_denoiser_is_below():
    exact = -0.5 * math.log(2 * math.pi * math.e * SIGMA**2)
    assert _gaussian_bound(replace(EXACT, sigma_data=1.3 * SIGMA)) < exact - 0.01


def test_the_bound_of_bits_is_their_entropy():
    """Bayes' rule for each, and the integral of the squared error: all there is to know of x."""
    p = 0.3
    noise = np.linspace(-9, 9, 241)
    noise_prob = stats.norm.pdf(noise) / stats.norm.pdf(noise).sum()
    grid = ([0.0, 1.0], [1 - p, p], noise, noise_prob, *_legendre(100))
    found = _bound(replace(CONFIG, gamma_min=-8.0, gamma_max=20.0), BIT, grid)
    assert found == pytest.approx(p * math.log(p) + (1 - p) * math.log(1 - p), abs=1e-5)


def test_more_steps_tighten_the_bound_to_that_of_infinitely_many():
    continuous = _gaussian_bound(EXACT)
    gaps = []
    for steps in (50, 100, 200):
        middles = (np.arange(steps) + 0.5) / steps, np.full(steps, 1 / steps)
        gaps.append(continuous - _bound(replace(EXACT, steps=steps), LINE, _gaussian_grid(middles)))
    assert (np.diff(gaps) < 0).all() and gaps[-1] > 0
    assert gaps[-2] / gaps[-1] == pytest.approx(2, rel=0.1)  # of first order in their length


def test_the_prior_term_is_a_divergence_that_noise_removes():
    x, gamma = jnp.array([[1.3]]), 0.8
    alpha, sigma = alpha_sigma(gamma)
    z = np.linspace(-12, 12, 4001)
    q, p = stats.norm(1.3 * alpha, sigma), stats.norm()
    expected = np.sum(q.pdf(z) * (q.logpdf(z) - p.logpdf(z))) * (z[1] - z[0])
    np.testing.assert_allclose(diffusion.prior_cost(x, gamma), [expected], rtol=1e-8)
    assert 0 < diffusion.prior_cost(x, 25.0)[0] < 1e-9


DECODER_LOG_PROB = {
    spec.support: jax.jit(functools.partial(diffusion.decoder_log_prob, spec))
    for spec in (BIT, GREY, LINE)
}


@pytest.mark.parametrize("gamma", [-12.0, -4.0, 0.0, 3.0])
def test_the_last_step_is_a_distribution_over_the_datas_values(gamma):
    for spec, values in ((BIT, [0.0, 1.0]), (GREY, np.arange(256.0))):
        for y in np.asarray([-0.2, 0.31, 0.8]) * spec.scale:
            x = np.asarray(values)[:, None]
            log_prob = DECODER_LOG_PROB[spec.support](x, np.full_like(x, y), gamma)
            np.testing.assert_allclose(np.exp(log_prob).sum(), 1, rtol=1e-9)
    x = np.array([[0.4], [1.0]])
    found = DECODER_LOG_PROB["real"](x, np.full_like(x, 0.5), gamma)
    expected = stats.norm.logpdf(x[:, 0], 0.5, math.exp(gamma / 2))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_a_bit_is_decoded_by_bayes_rule():
    gamma, z = 0.5, np.linspace(-2, 2, 9)[:, None]
    alpha, sigma = alpha_sigma(gamma)
    scaled = denoisers.scaled(jnp.array([[0.0], [1.0]]), BIT)
    density = stats.norm.pdf(z, np.asarray(alpha * scaled).T, sigma)
    y = denoisers.unscaled(z / alpha, BIT)
    found = diffusion.decoder_log_prob(BIT, jnp.ones_like(y), y, gamma)
    np.testing.assert_allclose(np.exp(found), density[:, 1] / density.sum(axis=1), rtol=1e-9)


@pytest.mark.parametrize("spec", [BIT, GREY, LINE], ids=lambda spec: spec.support)
def test_the_last_draw_has_the_probabilities_that_the_bound_says(spec):
    y = jnp.full((50_000, 1), 0.3 * spec.scale)
    gamma = {"binary": 0.5, "uint8": -7.0, "real": -2.0}[spec.support]
    x = np.asarray(jax.jit(lambda: diffusion.decode(spec, KEY, y, gamma))())[:, 0]
    if spec.support == "real":
        assert stats.kstest(x, stats.norm(0.3, math.exp(-1)).cdf).pvalue > 1e-4
        return
    values = np.arange(float(spec.num_values))
    log_prob = DECODER_LOG_PROB[spec.support](values[:, None], y[: len(values)], gamma)
    expected = len(x) * np.exp(log_prob)
    often = expected > 10
    observed = np.bincount(x.astype(int), minlength=len(values))
    pair = [np.append(c[often], c[~often].sum() + 1e-9) for c in (observed, expected)]
    assert stats.chisquare(pair[0], pair[1] * pair[0].sum() / pair[1].sum()).pvalue > 1e-4


# Training.

T = (np.arange(4000) + 0.5) / 4000


def _monotone(logits):
    config = replace(CONFIG, schedule="monotone", gamma_min=-6.0, gamma_max=6.0)
    model, params = _fresh(config, LINE)
    params["diffusion"]["schedule"]["logits"] = jnp.asarray(logits)
    return model, params


@jax.jit
def _diffusion_terms(logits):
    """Of one x and one noise at many times, and the gradient of the loss by the logits."""
    model, params = _monotone(logits)
    times = (np.arange(200_000) + 0.5) / 200_000
    patches = _with(times, np.full((len(times), 1), 0.9))
    with patches[0], patches[1]:
        batch = {"x": jnp.full((len(times), 1), 0.4)}
        grads, aux = jax.grad(model.loss_fn, has_aux=True)(params, batch, KEY)
    return aux.terms["diffusion"], grads["diffusion"]["schedule"]["logits"]


def test_a_schedule_changes_the_bounds_variance_and_learns_to_lower_it():
    """Its gradient is that of the logarithm of the second moment, here by differences."""
    logits = 2 * np.random.default_rng(0).normal(size=32)
    terms, gradient = _diffusion_terms(logits)
    flat, _ = _diffusion_terms(np.zeros(32))
    np.testing.assert_allclose(terms.mean(), flat.mean(), rtol=1e-3)
    assert terms.var() > 1.2 * flat.var()
    for i in np.argsort(-np.abs(gradient))[:3]:
        h = 0.05 * np.eye(32)[i]
        ends = [np.log(np.mean(_diffusion_terms(logits + e)[0] ** 2)) for e in (h, -h)]
        difference = float(ends[0] - ends[1])
        assert float(gradient[i]) == pytest.approx(difference / 0.1, rel=0.05)
    better, _ = _diffusion_terms(logits - 2.0 * np.asarray(gradient))
    assert better.var() < 0.95 * terms.var()


def test_the_loss_of_the_bound_is_minus_the_bound_whatever_moves_the_schedule():
    model, params = _monotone(np.random.default_rng(0).normal(size=32))
    batch = {"x": jnp.linspace(-1, 1, 16)[:, None]}
    loss, aux = jax.jit(model.loss_fn)(params, batch, KEY)
    elbo = jax.jit(model.log_likelihood_fns["elbo"])(params, batch, KEY)
    np.testing.assert_allclose(loss, -np.mean(elbo), rtol=1e-12)
    np.testing.assert_allclose(sum(aux.terms.values()), -elbo, rtol=1e-12)
    assert set(aux.terms) == {"prior", "reconstruction", "diffusion"}


def test_costs_of_0_leave_the_schedule_alone():
    """Bits so early that rounding leaves no doubt of them: the loss is the bound's other terms."""
    model, params = _fresh(replace(CONFIG, schedule="monotone"), BIT)
    logits = np.random.default_rng(0).normal(size=32)
    params["diffusion"]["schedule"]["logits"] = jnp.asarray(logits)
    patches = _with([0.01, 0.02], np.zeros((2, 1)))
    with patches[0], patches[1]:
        of_loss = jax.jit(jax.value_and_grad(model.loss_fn, has_aux=True))
        (loss, aux), grads = of_loss(params, {"x": jnp.array([[0.0], [1.0]])}, KEY)
    np.testing.assert_array_equal(aux.terms["diffusion"], 0)
    np.testing.assert_allclose(loss, np.mean(sum(aux.terms.values())), rtol=1e-12)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    np.testing.assert_array_equal(grads["diffusion"]["schedule"]["logits"], 0)


def test_held_out_terms_add_up_to_minus_the_bound_though_training_withholds_labels():
    config = replace(CONFIG, conditional=True, label_dropout=0.9)
    model = diffusion.build(config, LINE)
    batch = {"x": jnp.linspace(-1, 1, 16)[:, None], "label": jnp.arange(16) % 3}
    leaves, structure = jax.tree.flatten(jax.eval_shape(model.init, KEY, batch))
    rng = np.random.default_rng(0)
    moved = [jnp.asarray(0.3 * rng.normal(size=leaf.shape)) for leaf in leaves]
    params = jax.tree.unflatten(structure, moved)
    elbo = jax.jit(model.log_likelihood_fns["elbo"])(params, batch, KEY)
    (player,) = model.players
    held_out = jax.jit(player.terms)(params, batch, KEY)
    np.testing.assert_allclose(sum(held_out.values()), -elbo, rtol=1e-12)
    training = jax.jit(model.loss_fn)(params, batch, KEY)[1].terms
    assert held_out.keys() == training.keys()
    withheld = np.abs(sum(training.values()) + elbo) > 1e-6
    assert 0.5 < withheld.mean() < 1


def _quality_loss(**fields):
    """Its mean over Gaussian x and noise, at the times T, of the exact denoiser."""
    model, params = _fresh(replace(CONFIG, **fields), LINE)
    points, prob = _hermite(3)

    @jax.jit
    def loss(x, noise):
        patches = _with(T, jnp.full((len(T), 1), noise))
        with patches[0], patches[1]:
            return model.loss_fn(params, {"x": jnp.full((len(T), 1), x)}, KEY)[0]

    each = [[float(loss(SIGMA * x, noise)) for noise in points] for x in points]
    return prob @ each @ prob


def test_an_error_counts_by_what_the_network_was_asked_for():
    """Every noise level costs a network that answers 0 the same, the variance of its target."""
    for mean in (-1.2, 2.0):
        found = _quality_loss(objective="edm", schedule="karras", log_sigma_mean=mean)
        assert found == pytest.approx(1, rel=1e-9)


def test_an_error_counts_by_the_signal_to_noise_ratio_up_to_a_cap():
    """The exact denoiser's error is `out²`."""
    found = _quality_loss(objective="min_snr", schedule="cosine", snr_cap=2.0)
    first, last = (math.atan(math.exp(gamma / 2)) for gamma in (-5, 8))
    gamma = 2 * np.log(np.tan(first + (last - first) * T))
    _, out, _ = precondition(gamma, SIGMA)
    expected = float(np.mean(np.minimum(np.exp(-gamma), 2) * np.asarray(out) ** 2))
    assert found == pytest.approx(expected, rel=1e-9)


def test_noise_levels_are_log_normal():
    model, params = _fresh(replace(CONFIG, objective="edm", schedule="karras"), LINE)
    seen = []

    def spy(denoise, x, gamma, noise):
        seen.append(gamma)
        return jnp.zeros(len(x))

    @jax.jit
    def levels(x):
        with mock.patch.object(diffusion, "squared_error", spy):
            model.loss_fn(params, {"x": x}, KEY)
        return seen[0]

    assert stats.kstest(levels(jnp.zeros((5000, 1))) / 2, stats.norm(-1.2, 1.2).cdf).pvalue > 0.1


# Samplers, on the probability flow of a Gaussian: y / sqrt(s² + SIGMA²) is constant along it.


def _denoise(z, gamma):
    return precondition(gamma, SIGMA).skip[:, None] * z


def _solve(sampler, steps):
    """Its error after `steps` of equal length in gamma."""
    levels = jnp.linspace(4.0, -4.0, steps + 1)
    with mock.patch.object(jax.random, "normal", lambda key, shape: jnp.ones(shape)):
        draw = jax.jit(lambda: diffusion.draw(_denoise, levels, sampler, KEY, (1, 1)))
        found = draw()[0, 0]
    start = 1 / alpha_sigma(4.0)[0]
    ratio = (math.exp(-4) + SIGMA**2) / (math.exp(4) + SIGMA**2)
    return abs(found - start * math.sqrt(ratio))


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("heun", 2)])
def test_order_of_convergence(sampler, order):
    errors = [_solve(sampler, steps) for steps in (100, 200, 400)]
    slopes = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(slopes, order, atol=0.1)


@pytest.mark.parametrize(("sampler", "steps"), [("ancestral", 400), ("ddim", 400), ("heun", 100)])
def test_samples_of_a_gaussian_have_its_variance(sampler, steps):
    config = replace(CONFIG, gamma_min=-12.0, gamma_max=9.0, sampler=sampler, sample_steps=steps)
    model, params = _fresh(config, LINE._replace(mean=np.array([2.0], np.float32)))
    x = np.asarray(jax.jit(model.sample, static_argnums=2)(params, KEY, 10_000)["x"])[:, 0]
    assert abs(x.mean() - 2) < 5 * SIGMA / math.sqrt(len(x))
    assert x.std() == pytest.approx(SIGMA, rel=0.02)
    assert stats.kstest((x - 2) / x.std(), "norm").pvalue > 1e-4


def test_an_ancestral_step_is_the_posterior_of_less_noise():
    """q(z_s | z_t, x) by Bayes' rule, where x is known (Kingma et al. 2021, eq. 26)."""
    x, (t, s) = 0.4, (1.0, -1.5)
    noise = 0.7
    with mock.patch.object(jax.random, "normal", lambda key, shape: jnp.full(shape, noise)):
        levels = jnp.array([t, s])
        known = lambda z, gamma: jnp.full_like(z, x)  # noqa: E731
        y = jax.jit(lambda: diffusion.draw(known, levels, "ancestral", KEY, (1, 1)))()[0, 0]
    (a_t, v_t), (a_s, v_s) = ((float(a), float(b) ** 2) for a, b in map(alpha_sigma, (t, s)))
    # z_s ~ N(a_s x, v_s), and z_t given it ~ N(r z_s, v) with the r and v that lead to level t.
    ratio = a_t / a_s
    v = v_t - ratio**2 * v_s
    precision = 1 / v_s + ratio**2 / v
    mean = (a_s * x / v_s + ratio * noise / v) / precision
    assert a_s * y == pytest.approx(mean + noise / math.sqrt(precision), rel=1e-9)


# Labels.


def _moved(shapes):
    """Parameters away from the start, of these shapes."""
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(0.6 * rng.normal(size=leaf.shape)) for leaf in leaves]
    return jax.tree.unflatten(structure, drawn)


def test_a_conditional_model_knows_the_label():
    config = replace(CONFIG, conditional=True, label_dropout=0.0, sample_steps=3)
    model = diffusion.build(config, LINE)
    batch = {"x": jnp.array([[0.3], [-0.2]]), "label": jnp.array([0, 1])}
    params = _moved(jax.eval_shape(model.init, KEY, batch))
    elbo = jax.jit(model.log_likelihood_fns["elbo"])
    before, after = (elbo(params, {**batch, "label": jnp.array([0, c])}, KEY) for c in (1, 2))
    assert before[0] == after[0] and abs(before[1] - after[1]) > 1e-3

    @jax.jit
    def sample(guidance):
        return diffusion.build(replace(config, guidance=guidance), LINE).sample(params, KEY, 5)

    samples = sample(1.0)
    np.testing.assert_array_equal(samples["label"], [0, 1, 2, 0, 1])
    assert np.abs(samples["x"] - sample(3.0)["x"]).min() > 1e-6


def test_a_dropped_label_is_not_seen():
    config = replace(CONFIG, conditional=True, label_dropout=1 - 1e-9)
    model = diffusion.build(config, LINE)
    batch = {"x": jnp.array([[0.3], [-0.2]]), "label": jnp.array([0, 1])}
    params = _moved(jax.eval_shape(model.init, KEY, batch))
    loss = jax.jit(model.loss_fn)
    losses = [loss(params, {**batch, "label": jnp.array(c)}, KEY)[0] for c in ([0, 1], [2, 2])]
    assert losses[0] == losses[1]


# Bad input.


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"objective": "ddpm"}, ("model.objective='ddpm'", "vdm, edm, min_snr")),
        ({"schedule": "sigmoid"}, ("model.schedule='sigmoid'", "linear, monotone")),
        ({"sampler": "euler"}, ("model.sampler='euler'", "ancestral, ddim, heun")),
        ({"schedule": "monotone", "steps": 10}, ("model.schedule='monotone'", "model.steps=0")),
        ({"schedule": "monotone", "objective": "edm"}, ("model.schedule='monotone'", "'vdm'")),
        ({"gamma_min": 9.0}, ("model.gamma_max=8.0", "model.gamma_min=9.0")),
        ({"gamma_min": -40.0}, ("model.gamma_min=-40.0", "at least -30")),
        ({"gamma_max": math.inf}, ("model.gamma_max=inf",)),
        ({"gamma_max": 200.0}, ("model.gamma_max=200.0", "within ±80")),
        ({"sigma_data": 0.0}, ("model.sigma_data=0.0", "above 0")),
        ({"log_sigma_mean": math.nan}, ("model.log_sigma_mean=nan", "finite")),
        ({"log_sigma_std": -1.0}, ("model.log_sigma_std=-1.0", "above 0")),
        ({"snr_cap": 0.0}, ("model.snr_cap=0.0", "above 0")),
        ({"steps": -1}, ("model.steps=-1", "at least 0")),
        ({"sample_steps": 0}, ("model.sample_steps=0", "at least 1")),
        ({"network": "unet"}, ("model.network='unet' needs images",)),
    ],
)
def test_check_refuses_a_bad_value_by_its_name(values, words):
    diffusion.check(CONFIG, LINE)
    with pytest.raises(UserError) as refused:
        diffusion.check(replace(CONFIG, **values), LINE)
    message = str(refused.value)
    assert "\n" not in message and all(word in message for word in words)


def test_all_pixels_of_grey_images_have_one_mean():
    """Data without spread are drawn as it, whatever each pixel's own mean is."""
    mean = np.float32([10, 20, 30, 100]).reshape(2, 2, 1)
    spec = DataSpec((2, 2, 1), "uint8", mean, 100)
    config = replace(EXACT, sigma_data=1e-6, sampler="ddim", sample_steps=10)
    model, params = _fresh(config, spec)
    x = jax.jit(model.sample, static_argnums=2)(params, jax.random.key(0), 5)["x"]
    np.testing.assert_array_equal(x, 40)


def test_grey_values_are_refused_where_bits_were_promised():
    with pytest.raises(UserError, match="has the value"):
        diffusion.build(CONFIG, BIT).init(KEY, {"x": jnp.array([[0.5]])})
