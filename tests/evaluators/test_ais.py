"""Annealed importance sampling on a linear-Gaussian model, whose log p(x) is known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dgm_jax.core import Latents, Model, UserError
from dgm_jax.distributions import gaussian_log_prob, standard_gaussian_log_prob
from dgm_jax.evaluators import ais

LATENTS, DIMS, SIGMA = 3, 5, 0.5
W = np.random.default_rng(0).normal(size=(LATENTS, DIMS))


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _model():
    """The model with its latents in two parts, as the evaluators see it."""

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
    model, params, num = _model(), jnp.asarray(W), 23  # no multiple of the rows annealed at once
    x = model.latents.draw_joint(params, jax.random.key(3), num)[1]["x"]
    exact = stats.multivariate_normal(np.zeros(DIMS), W.T @ W + SIGMA**2 * np.eye(DIMS)).logpdf(x)
    found = ais.evaluate(model, params, {"x": x}, 200, 100, seed=0)
    assert all(metric.num_examples == num for metric in found.values())
    # What is left between the bounds is smaller than the noise, and that is small.
    gap = found["simulated_gap"]
    assert abs(gap.value) < 4 * gap.standard_error and gap.standard_error < 0.04
    assert abs(found["ais_bound"].value - exact.mean()) < 0.08


def test_what_is_not_drawn_from_the_density_itself_brackets_nothing():
    model = _model()
    model = model._replace(latents=model.latents._replace(samples_are_exact=False))
    found = ais.evaluate(model, jnp.asarray(W), {"x": jnp.zeros((2, DIMS))}, 2, 2, seed=0)
    assert list(found) == ["ais_bound"]


def test_evaluate_refuses_a_model_without_latents():
    with pytest.raises(UserError, match="latents"):
        ais.evaluate(_model()._replace(latents=None), W, {"x": jnp.zeros((2, DIMS))}, 2, 2, seed=0)
