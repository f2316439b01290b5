"""Flows between Gaussians, whose velocity, map and density are known in closed form."""

import math
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, stats

from dgm_jax.core import DataSpec, UserError
from dgm_jax.models import flow_matching
from dgm_jax.nn import denoisers
from dgm_jax.nn.noise import precondition_straight

MEAN, SIGMA = np.array([0.8, -0.3]), np.array([0.5, 1.6])
PLANE = DataSpec((2,), "real", np.array([0.2, 0.1], np.float32), 100, 3)
GREY = DataSpec((1,), "uint8", np.array([100.0], np.float32), 100)
CONFIG = flow_matching.Config(width=4, depth=0, tolerance=1e-7, divergence="exact")
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _velocity(x, t, mean=MEAN, sigma=SIGMA):
    """E[ε - x₀ | x] of noise and N(mean, sigma²), `x` `[B, D]`, `t` `[B]`."""
    t = t[:, None]
    variance = ((1 - t) * sigma[None]) ** 2 + t**2
    slope = (t - (1 - t) * sigma[None] ** 2) / variance
    return -mean[None] + slope * (x - (1 - t) * mean[None])


class Exact:
    """A network behind which the velocity is a given one, and what the parameters make of it."""

    def __init__(self, velocity=_velocity):
        self.velocity = velocity

    def apply(self, variables, seen, time, label):
        t, variance = time[:, None], CONFIG.sigma_data**2
        of_x = (1 - t) ** 2 * variance + t**2
        x = seen * jnp.sqrt(of_x)
        features = jnp.stack([jnp.ones_like(x), x, t * x, jnp.sin(3 * x)])
        v = self.velocity(x, time) + jnp.einsum("fbd,fd->bd", features, variables["params"])
        return (v - (t - (1 - t) * variance) / of_x * x) * jnp.sqrt(of_x / variance)


ZERO = {"field": jnp.zeros((4, 2))}


def _build(config=CONFIG, spec=PLANE, velocity=_velocity):
    with mock.patch.object(flow_matching, "Denoiser", lambda _: Exact(velocity)):
        return flow_matching.build(config, spec)


# Training.


def test_the_velocity_minimises_the_loss():
    """Over a grid of x and noise that integrates their squares: no feature lowers it."""
    points, prob = np.polynomial.hermite_e.hermegauss(20)
    prob = prob / prob.sum()
    a, e = (g.ravel() for g in np.meshgrid(points, points, indexing="ij"))
    weight = np.outer(prob, prob).ravel()
    spec = PLANE._replace(mean=np.zeros(2, np.float32))
    model, x = _build(spec=spec), jnp.asarray(MEAN + SIGMA * a[:, None])
    noise = jnp.asarray(np.stack([e, e], axis=1))

    @jax.jit
    @jax.value_and_grad
    def loss(params, t):
        times = lambda rng, num: jnp.full(num, t)  # noqa: E731
        with (
            mock.patch.object(denoisers, "spread_times", times),
            mock.patch.object(jax.random, "normal", lambda key, shape: noise),
        ):
            terms = model.loss_fn(params, {"x": x}, KEY)[1].terms
        return jnp.sum(weight * terms["velocity"])

    for t in (0.15, 0.5, 0.9):
        value, gradient = loss(ZERO, t)
        # What is left is the variance of ε - x given x_t.
        variance = ((1 - t) * SIGMA) ** 2 + t**2
        left = 1 + SIGMA**2 - (t - (1 - t) * SIGMA**2) ** 2 / variance
        assert value == pytest.approx(left.sum() / 2, rel=1e-9)
        np.testing.assert_allclose(gradient["field"], 0, atol=1e-6)
        _, curved = loss({"field": jnp.full((4, 2), 0.1)}, t)
        assert np.abs(curved["field"]).min() > 1e-3


def test_preconditioning_is_of_unit_variance():
    """Of a Gaussian ε - x and x_t have a covariance: what x_t tells of it, and what is left."""
    t, variance = np.linspace(0, 1, 7), 0.7**2
    covariance, of_v, of_x = t - (1 - t) * variance, 1 + variance, (1 - t) ** 2 * variance + t**2
    skip, out, scale = precondition_straight(jnp.asarray(t), 0.7)
    np.testing.assert_allclose(skip, covariance / of_x, rtol=1e-12)
    np.testing.assert_allclose(out**2, of_v - covariance**2 / of_x, rtol=1e-12)
    np.testing.assert_allclose(scale**2 * of_x, 1, rtol=1e-12)


def test_a_fresh_flow_is_the_gaussian_of_the_data():
    """With their mean, and the deviation that they are said to have."""
    model = flow_matching.build(replace(CONFIG, sigma_data=0.7), PLANE)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(7, 2)))

    @jax.jit
    def log_prob(batch):
        return model.log_likelihood_fns["log_prob"](model.init(KEY, batch), batch, KEY)

    expected = stats.norm.logpdf(x, PLANE.mean, 0.7).sum(axis=1)
    np.testing.assert_allclose(log_prob({"x": x}), expected, atol=1e-5)


def test_all_pixels_of_images_have_one_mean():
    """Data without spread are drawn as it, whatever each pixel's own mean is."""
    spec = DataSpec((2, 2, 1), "uint8", np.float32([10, 20, 30, 100]).reshape(2, 2, 1), 100)
    config = replace(CONFIG, sigma_data=1e-4, divergence="none", sample_steps=10)
    model = flow_matching.build(config, spec)
    params = model.init(KEY, {"x": jnp.zeros((1, 2, 2, 1))})
    x = jax.jit(model.sample, static_argnums=2)(params, KEY, 5)["x"]
    np.testing.assert_array_equal(x, 40)


@pytest.mark.parametrize(("times", "law"), [("uniform", stats.uniform), ("logit_normal", None)])
def test_times_have_their_distribution(times, law):
    seen = []

    def velocity(x, t):
        seen.append(t)
        return x

    config = replace(CONFIG, times=times, logit_mean=0.5, logit_std=1.3)
    model = _build(config, velocity=velocity)
    model.loss_fn(ZERO, {"x": jnp.zeros((5000, 2))}, KEY)
    t = np.asarray(seen[0])
    if law is None:
        t, law = np.log(t / (1 - t)), stats.norm(0.5, 1.3)
    assert stats.kstest(t, law.cdf).pvalue > 0.1


# The coupling.


def test_optimal_transport_is_scipys():
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 40, 3, 2)) * np.array([2.0, 1.0]).reshape(2, 1, 1, 1) + 1
    found = np.asarray(jax.jit(flow_matching.nearest_noise)(x, noise, {}))
    cost = np.sum((x[:, None] - noise[None]) ** 2, axis=(2, 3))
    rows, columns = optimize.linear_sum_assignment(cost)
    np.testing.assert_array_equal(found, noise[columns])
    assert cost[rows, columns].sum() < 0.8 * np.trace(cost)


def test_what_is_not_real_has_no_say_in_the_coupling():
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 12, 2))
    mask = jnp.arange(12) < 9
    junk = np.where(mask[:, None], x, 50.0)
    nearest_noise = jax.jit(flow_matching.nearest_noise)
    pair = [nearest_noise(a, noise, {"mask": mask}) for a in (x, junk)]
    np.testing.assert_array_equal(pair[0][:9], pair[1][:9])
    assert len(np.unique(pair[0][:, 0])) == 12


def test_the_loss_uses_the_coupling():
    """Of the data that are the noise themselves nothing is left to move."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(30, 2)))
    still = lambda x, t: 0 * x  # noqa: E731
    spec = PLANE._replace(mean=np.zeros(2, np.float32))
    losses = []
    for coupling in flow_matching.COUPLINGS:
        model = _build(replace(CONFIG, coupling=coupling), spec, still)
        with mock.patch.object(jax.random, "normal", lambda key, shape: x[::-1]):
            losses.append(float(jax.jit(model.loss_fn)(ZERO, {"x": x}, KEY)[0]))
    assert losses[0] > 1 and losses[1] == pytest.approx(0, abs=1e-12)


def test_held_out_data_have_noise_of_their_own():
    """Evaluated one by one there is nothing to couple; the cost of a batch has another name."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(30, 2)))
    alone, coupled = (_build(replace(CONFIG, coupling=each)) for each in flow_matching.COUPLINGS)
    at, models = (ZERO, {"x": x}, KEY), (alone, coupled)
    held_out = [jax.jit(model.players[0].terms)(*at) for model in models]
    assert held_out[0].keys() == held_out[1].keys() == {"velocity"}
    np.testing.assert_array_equal(*(terms["velocity"] for terms in held_out))
    training = [jax.jit(model.loss_fn)(*at)[1].terms for model in models]
    np.testing.assert_array_equal(training[0]["velocity"], held_out[0]["velocity"])
    assert training[1].keys() == {"coupled_velocity"}
    assert np.mean(training[1]["coupled_velocity"]) < 0.8 * np.mean(training[0]["velocity"])


# The flow.


@pytest.mark.parametrize("solver", flow_matching.SOLVERS)
def test_samples_are_the_exact_map_of_their_noise(solver):
    steps = {"euler": 40_000, "dopri5": 50}.get(solver, 400)
    model = _build(replace(CONFIG, solver=solver, sample_steps=steps))
    shifted = MEAN + PLANE.mean  # the data's mean is taken off before, and added afterwards
    x = jax.jit(model.sample, static_argnums=2)(ZERO, KEY, 6)["x"]
    expected = shifted + SIGMA * np.asarray(jax.random.normal(KEY, (6, 2)))
    np.testing.assert_allclose(x, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("dopri5", 5)]
)
def test_order_of_convergence(solver, order):
    """On x' = 2 t x; the midpoint's would be three on the flow of a Gaussian."""

    def error(steps):
        field = lambda t, x: 2 * t * x  # noqa: E731
        solve = lambda x: flow_matching.solve(field, x, (1.0, 0.0), solver, steps)  # noqa: E731
        return abs(float(jax.jit(solve)(jnp.ones(1))[0]) - math.exp(-1))

    assert math.log2(error(32) / error(64)) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_the_likelihood_of_a_gaussian(divergence):
    """Whose velocity has a diagonal Jacobian: one direction of signs tells its trace."""
    model = _build(replace(CONFIG, divergence=divergence))
    x = np.random.default_rng(1).normal(size=(7, 2))
    (log_prob,) = model.log_likelihood_fns.values()
    found = jax.jit(log_prob)(ZERO, {"x": jnp.asarray(x)}, KEY)
    expected = stats.norm.logpdf(x, MEAN + PLANE.mean, SIGMA).sum(axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_likelihood_of_a_curved_velocity_is_the_density_of_its_samples():
    """Its divergence changes along each path; on a line one direction tells it."""
    spec = DataSpec((1,), "real", np.array([0.2], np.float32), 100)
    curved = lambda x, t: _velocity(x, t, MEAN[:1], SIGMA[:1]) + 0.7 * jnp.sin(3 * x)  # noqa: E731
    x, params, found = np.linspace(-8, 8, 1001), {"field": jnp.zeros((4, 1))}, []
    for divergence in ("exact", "hutchinson"):
        model = _build(replace(CONFIG, divergence=divergence, sample_steps=200), spec, curved)
        (log_prob,) = model.log_likelihood_fns.values()
        found.append(np.exp(jax.jit(log_prob)(params, {"x": jnp.asarray(x)[:, None]}, KEY)))
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    below = integrate.cumulative_trapezoid(found[0], x, initial=0)
    assert below[-1] == pytest.approx(1, abs=1e-6)
    samples = jax.jit(model.sample, static_argnums=2)(params, KEY, 5000)["x"][:, 0]
    assert stats.kstest(samples, lambda at: np.interp(at, x, below)).pvalue > 0.01


TURN = np.array([[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]])


def _turned(x, t):
    """The velocity of a Gaussian with correlated entries."""
    return _velocity(x @ TURN, t, TURN.T @ MEAN) @ TURN.T


def test_one_direction_tells_the_trace_in_the_mean():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)))
    at = lambda x, t: _turned(x, jnp.full(len(x), t))  # noqa: E731
    log_density = jax.jit(lambda x, signs: flow_matching.log_density(at, x, signs, 1e-7))
    exact = log_density(x, None)
    covariance = TURN @ np.diag(SIGMA**2) @ TURN.T
    expected = stats.multivariate_normal(MEAN, covariance).logpdf(x)
    np.testing.assert_allclose(exact, expected, atol=1e-5)
    signs = np.array([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)])
    each = [log_density(x, np.tile(s, (3, 1))) for s in signs]
    assert np.std(each, axis=0).min() > 0.05
    np.testing.assert_allclose(np.mean(each, axis=0), expected, atol=1e-5)


def test_a_flow_that_no_number_of_steps_solves_is_not_a_number():
    explodes = lambda t, x: x**2 * 1e3  # noqa: E731
    solve = lambda x: flow_matching.solve(explodes, x, (0.0, 1.0), "dopri5", 0, 1e-6)  # noqa: E731
    assert np.isnan(jax.jit(solve)(jnp.ones((1, 1)))).all()


# Whole numbers.


def test_the_bound_of_grey_values_comes_of_a_probability():
    """Averaged inside of the logarithm over the noise in each value's bin, 256 of them are 1."""
    mean, sigma = np.array([0.1]), np.array([0.02])
    narrow = lambda x, t: _velocity(x, t, mean, sigma)  # noqa: E731
    model = _build(replace(CONFIG, tolerance=1e-5), GREY, narrow)
    centre = 100 + 127.5 * 0.1
    values = np.arange(90.0, 136.0)
    inside = (np.arange(8) + 0.5) / 8 - 0.5  # the midpoint rule

    grid = jnp.asarray(inside)[:, None]
    x = jnp.asarray(np.repeat(values, 8))[:, None]
    noise = lambda key, shape, minval, maxval: jnp.tile(grid, (len(values), 1))  # noqa: E731
    with mock.patch.object(jax.random, "uniform", noise):
        elbo = jax.jit(model.log_likelihood_fns["elbo"])
        log_prob = elbo({"field": jnp.zeros((4, 1))}, {"x": x}, KEY)
    prob = np.exp(np.asarray(log_prob)).reshape(-1, 8).mean(axis=1)
    assert prob.sum() == pytest.approx(1, abs=1e-3)
    law = stats.norm(centre, 127.5 * 0.02)
    np.testing.assert_allclose(prob, law.cdf(values + 0.5) - law.cdf(values - 0.5), atol=1e-4)


def test_dequantisation_is_uniform_noise_that_rounding_takes_away():
    x = jnp.tile(jnp.array([[0.0], [17.0], [255.0]]), (3000, 1))
    dequantised = jax.jit(lambda x: flow_matching.dequantised(x, KEY, GREY))
    y = denoisers.unscaled(dequantised(x), GREY)
    assert stats.kstest(np.asarray(y - x)[:, 0], stats.uniform(-0.5, 1).cdf).pvalue > 1e-3
    np.testing.assert_array_equal(denoisers.whole(y, GREY), x)
    reals = jnp.array([[0.3, 0.4]])
    np.testing.assert_allclose(
        flow_matching.dequantised(reals, KEY, PLANE), reals - PLANE.mean[None], rtol=1e-6
    )


def test_a_conditional_flow_is_told_the_label_and_follows_it():
    config = replace(CONFIG, conditional=True, label_dropout=0.0, sample_steps=2)
    model = flow_matching.build(config, PLANE)
    batch = {"x": jnp.array([[0.3, 0.1], [-0.2, 0.4]]), "label": jnp.array([0, 1])}
    leaves, structure = jax.tree.flatten(jax.eval_shape(model.init, KEY, batch))
    rng = np.random.default_rng(0)
    moved = [jnp.asarray(0.3 * rng.normal(size=p.shape)) for p in leaves]
    params = jax.tree.unflatten(structure, moved)
    log_prob = jax.jit(model.log_likelihood_fns["log_prob"])
    found = [log_prob(params, {**batch, "label": jnp.array(c)}, KEY) for c in ([0, 1], [0, 2])]
    change = np.abs(found[0] - found[1])
    assert change[0] < 1e-4 and change[1] > 1e-3

    @jax.jit
    def sample(guidance):
        return flow_matching.build(replace(config, guidance=guidance), PLANE).sample(params, KEY, 4)

    always, seldom = (
        flow_matching.build(replace(config, label_dropout=rate), PLANE) for rate in (0.0, 0.999)
    )
    cost = always.loss_fn(params, batch, KEY)[1].terms["velocity"]
    held_out = seldom.players[0].terms(params, batch, KEY)["velocity"]
    np.testing.assert_array_equal(held_out, cost)
    assert (seldom.loss_fn(params, batch, KEY)[1].terms["velocity"] != cost).all()

    samples = sample(1.0)
    np.testing.assert_array_equal(samples["label"], [0, 1, 2, 0])
    assert np.abs(samples["x"] - sample(3.0)["x"]).max(axis=1).min() > 1e-4


@pytest.mark.parametrize(
    ("divergence", "of_reals", "of_grey"),
    [
        ("exact", {"log_prob"}, {"elbo"}),
        ("hutchinson", {"log_prob_hutchinson"}, {"elbo"}),
        ("none", set(), set()),
    ],
)
def test_only_what_is_exact_is_called_a_log_likelihood(divergence, of_reals, of_grey):
    for spec, names in ((PLANE, of_reals), (GREY, of_grey)):
        model = _build(replace(CONFIG, divergence=divergence), spec)
        assert set(model.log_likelihood_fns) == names


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"coupling": "sinkhorn"}, ("model.coupling='sinkhorn'", "independent")),
        ({"times": "cosine"}, ("model.times='cosine'", "uniform, logit_normal")),
        ({"solver": "rk4"}, ("model.solver='rk4'", "euler, midpoint")),
        ({"divergence": "skilling"}, ("model.divergence='skilling'", "hutchinson")),
        (
            {"coupling": "optimal_transport", "conditional": True},
            ("model.coupling='optimal_transport'", "model.conditional=True", "'independent'"),
        ),
        ({"sigma_data": 0.0}, ("model.sigma_data=0.0", "above 0")),
        ({"tolerance": 0.0}, ("model.tolerance=0.0", "above 0")),
        ({"logit_std": math.inf}, ("model.logit_std=inf", "finite")),
        ({"logit_mean": math.nan}, ("model.logit_mean=nan", "finite")),
        ({"sample_steps": 0}, ("model.sample_steps=0", "at least 1")),
        ({"network": "dit"}, ("model.network='dit' needs images",)),
    ],
)
def test_check_refuses_a_bad_value_by_its_name(values, words):
    flow_matching.check(CONFIG, PLANE)
    with pytest.raises(UserError) as refused:
        flow_matching.check(replace(CONFIG, **values), PLANE)
    message = str(refused.value)
    assert "\n" not in message and all(word in message for word in words)
