"""Average velocities of a flow between Gaussians, in closed form: one step is the exact map."""

import math
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dgm_jax.core import DataSpec, UserError
from dgm_jax.models import mean_flow
from dgm_jax.nn.noise import precondition_straight

MEAN, SIGMA = np.array([0.8, -0.3]), np.array([0.5, 1.6])
PLANE = DataSpec((2,), "real", np.zeros(2, np.float32), 100, 3)
CONFIG = mean_flow.Config(width=4, depth=0)
KEY = jax.random.key(0)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def _mean_and_deviation(t):
    t = t[:, None]
    return (1 - t) * MEAN[None], jnp.sqrt(((1 - t) * SIGMA[None]) ** 2 + t**2)


def _flow(z, t, r):
    """Where z at time t is at time r."""
    mean, deviation = _mean_and_deviation(t)
    new_mean, new_deviation = _mean_and_deviation(r)
    return new_mean + new_deviation / deviation * (z - mean)


def _average(z, r, t):
    return (z - _flow(z, t, r)) / (t - r)[:, None]


def _velocity(z, t):
    return jax.jvp(lambda s: _flow(z, t, s), (t,), (jnp.ones_like(t),))[1]


def test_the_identity_holds_for_the_average_velocity(x64):
    rng = np.random.default_rng(0)
    z, (r, t) = jnp.asarray(rng.normal(size=(50, 2))), np.sort(rng.uniform(size=(2, 50)), axis=0)
    r, t = jnp.asarray(r), jnp.asarray(t + 1e-3)
    found, target = mean_flow.average_and_target(_average, z, r, t, _velocity(z, t))
    np.testing.assert_allclose(found, target, rtol=1e-6, atol=1e-7)
    wrong = lambda z, r, t: _average(z, r, t) + 0.1 * z  # noqa: E731
    found, target = mean_flow.average_and_target(wrong, z, r, t, _velocity(z, t))
    assert np.abs(found - target).mean() > 1e-2


def test_the_target_has_no_gradient_and_is_the_velocity_where_the_times_are_equal(x64):
    z, t = jnp.ones((3, 2)), jnp.array([0.2, 0.5, 0.9])
    v = jnp.full((3, 2), 0.7)

    def target_of(scale):
        u = lambda z, r, t: scale * z * t[:, None]  # noqa: E731
        return mean_flow.average_and_target(u, z, t, t, v)[1]

    np.testing.assert_array_equal(target_of(2.0), v)
    assert (jax.jacfwd(target_of)(2.0) == 0).all()


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_any_number_of_steps_is_the_exact_map(x64, steps):
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(20, 2)))
    found = jax.jit(lambda noise: mean_flow.draw(_average, noise, steps))(noise)
    np.testing.assert_allclose(found, MEAN + SIGMA * np.asarray(noise), rtol=1e-10, atol=1e-12)


def test_a_fresh_flow_is_the_mean_in_one_step_and_in_more_has_the_velocity_of_a_gaussian(x64):
    """With the mean of the data, and the deviation that they are said to have."""
    spec, noise = PLANE._replace(mean=MEAN), np.asarray(jax.random.normal(KEY, (20, 2)))
    for steps in (1, 3):
        model = mean_flow.build(replace(CONFIG, sigma_data=0.7, sample_steps=steps), spec)
        params = model.init(KEY, {"x": jnp.zeros((1, 2))})
        drawn = jax.jit(model.sample, static_argnums=2)(params, KEY, 20)["x"]
        left = 1.0  # of the noise, in Euler's steps; E[ε - x | z] is covariance / variance · z
        for t in np.arange(steps, 0, -1) / steps:
            covariance, variance = t - (1 - t) * 0.7**2, (1 - t) ** 2 * 0.7**2 + t**2
            left *= 1 - covariance / variance / steps
        assert (steps == 1) == (left == 0)
        np.testing.assert_allclose(drawn, MEAN + left * noise, rtol=1e-6, atol=1e-7)


def test_all_pixels_of_images_have_one_mean():
    """Data without spread are drawn as it, whatever each pixel's own mean is."""
    spec = DataSpec((2, 2, 1), "uint8", np.float32([10, 20, 30, 100]).reshape(2, 2, 1), 100)
    model = mean_flow.build(replace(CONFIG, sigma_data=1e-4), spec)
    params = model.init(KEY, {"x": jnp.zeros((1, 2, 2, 1))})
    x = jax.jit(model.sample, static_argnums=2)(params, KEY, 5)["x"]
    np.testing.assert_array_equal(x, 40)


class Stub:
    """A network behind which the average velocity is given: `answer(params, z, times, label)`."""

    def __init__(self, answer):
        self.answer = answer

    def apply(self, variables, seen, times, label):
        skip, out, scale = precondition_straight(times[:, :1], CONFIG.sigma_data)
        z = seen / scale
        return (self.answer(variables["params"], z, times, label) - skip * z) / out


def _build(config, answer):
    with mock.patch.object(mean_flow, "Denoiser", lambda _: Stub(answer)):
        return mean_flow.build(config, PLANE)


def test_the_loss_is_the_error_and_its_gradient_the_weighted_ones(x64):
    """With nothing but equal times the target is ε - x; the answer here is one number."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)))
    noise = lambda key, shape: jnp.zeros(shape)  # noqa: E731
    config = replace(CONFIG, interval=0.0, power=0.5)
    model = _build(config, lambda params, z, times, label: 0 * z + params)
    with mock.patch.object(jax.random, "normal", noise):
        both = jax.jit(jax.value_and_grad(model.loss_fn, has_aux=True))
        (loss, aux), gradient = both({"average": jnp.array(0.3)}, {"x": x}, KEY)
    gap = 0.3 + np.asarray(x)
    error = np.sum(gap**2, axis=1)
    np.testing.assert_allclose(loss, error.mean() / 2, rtol=1e-9)
    np.testing.assert_allclose(aux.terms["identity"], error / 2, rtol=1e-9)
    weight = (error + 1e-2) ** -0.5
    expected = np.mean(weight * 2 * gap.sum(axis=1))
    np.testing.assert_allclose(gradient["average"], expected, rtol=1e-9)


def test_guidance_is_trained_in(x64):
    """Answers that do not move: the target is the guided velocity."""
    told, untold = 0.4, -0.2
    answer = lambda params, z, times, label: (  # noqa: E731
        0 * z + untold + (told - untold) * jnp.sum(label, axis=1, keepdims=True)
    )
    config = replace(CONFIG, conditional=True, guidance=2.5, label_dropout=0.0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
    batch = {"x": x, "label": jnp.arange(5) % 3}
    noise = lambda key, shape: jnp.ones(shape)  # noqa: E731
    for dropout, expected in (
        (0.0, told - (untold + 2.5 * (1 - np.asarray(x) - untold))),
        (1 - 1e-9, untold - (1 - np.asarray(x))),
    ):
        model = _build(replace(config, label_dropout=dropout), answer)
        with mock.patch.object(jax.random, "normal", noise):
            terms = jax.jit(model.loss_fn)({"average": jnp.zeros(())}, batch, KEY)[1].terms
        np.testing.assert_allclose(terms["identity"], 0.5 * np.sum(expected**2, axis=1), rtol=1e-6)


def test_of_held_out_data_the_network_is_told_every_label(x64):
    answer = lambda params, z, times, label: z * jnp.sum(label, axis=1, keepdims=True)  # noqa: E731
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
    batch = {"x": x, "label": jnp.arange(5) % 3}
    config = replace(CONFIG, conditional=True)
    always, seldom = (
        _build(replace(config, label_dropout=rate), answer) for rate in (0.0, 1 - 1e-9)
    )
    cost, training = (
        jax.jit(model.loss_fn)({"average": None}, batch, KEY)[1].terms["identity"]
        for model in (always, seldom)
    )
    held_out = jax.jit(seldom.players[0].terms)({"average": None}, batch, KEY)
    assert held_out.keys() == {"identity"}
    np.testing.assert_array_equal(held_out["identity"], cost)
    assert (training != cost).all()


def test_times_are_two_draws_in_order_and_often_equal():
    seen = []

    def answer(params, z, times, label):
        seen.append(times)
        return z

    with jax.disable_jit():
        model = _build(replace(CONFIG, interval=0.25, logit_mean=0.5), answer)
        with mock.patch.object(
            mean_flow, "average_and_target", lambda u, z, r, t, v: (u(z, r, t), v)
        ):
            model.loss_fn({"average": jnp.zeros(())}, {"x": jnp.zeros((20_000, 2))}, KEY)
    t, length = np.asarray(seen[0]).T
    apart = length > 0
    assert (length >= 0).all() and (t - length > 0).all()
    assert abs(apart.mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(t))
    both = np.concatenate([t[apart], (t - length)[apart]])
    assert stats.kstest(np.log(both / (1 - both)), stats.norm(0.5, 1).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("r", "t"), [(0.1, 0.9), (0.0, 1.0), (0.6, 0.6)])
def test_the_average_velocity_is_where_training_comes_to_rest(x64, r, t):
    """Shown ε - x alone, over a grid that integrates their squares: no feature moves it."""
    points, prob = np.polynomial.hermite_e.hermegauss(20)
    a, e = (g.ravel() for g in np.meshgrid(points, points, indexing="ij"))
    weight = np.outer(prob, prob).ravel() / prob.sum() ** 2
    x, noise = MEAN + SIGMA * a[:, None], np.stack([e, e], axis=1)
    z, v = jnp.asarray((1 - t) * x + t * noise), jnp.asarray(noise - x)
    ends, same = (jnp.full(len(z), r), jnp.full(len(z), t)), r == t

    def loss(params):
        def u(z, r, t):
            average = _velocity(z, t) if same else _average(z, r, t)
            features = jnp.stack([jnp.ones_like(z), z, jnp.sin(3 * z), t[:, None] * z])
            return average + jnp.einsum("fbd,fd->bd", features, params)

        found, target = mean_flow.average_and_target(u, z, *ends, v)
        return jnp.sum(weight[:, None] * (found - target) ** 2)

    slope = jax.jit(jax.grad(loss))
    np.testing.assert_allclose(slope(jnp.zeros((4, 2))), 0, atol=1e-6)
    assert np.abs(slope(jnp.full((4, 2), 0.1))).min() > 1e-3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"interval": 1.5}, ("model.interval=1.5", "from 0 to 1")),
        ({"logit_mean": math.inf}, ("model.logit_mean=inf", "finite")),
        ({"sigma_data": 0.0}, ("model.sigma_data=0.0", "above 0")),
        ({"logit_std": 0.0}, ("model.logit_std=0.0", "above 0")),
        ({"power": -1.0}, ("model.power=-1.0", "at least 0")),
        ({"sample_steps": 0}, ("model.sample_steps=0", "at least 1")),
        ({"network": "unet"}, ("model.network='unet' needs images",)),
    ],
)
def test_check_refuses_a_bad_value_by_its_name(values, words):
    mean_flow.check(CONFIG, PLANE)
    with pytest.raises(UserError) as refused:
        mean_flow.check(replace(CONFIG, **values), PLANE)
    message = str(refused.value)
    assert "\n" not in message and all(word in message for word in words)
