"""The parts of the rate, for posteriors whose aggregate is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from dgm_jax import processes, sharding
from dgm_jax.core import DataSpec, Latents, Model
from dgm_jax.data import dataset as data
from dgm_jax.distributions import gaussian_log_prob, standard_gaussian_log_prob
from dgm_jax.evaluators import aggregate


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _dataset(values):
    """One-pixel images of the given grey values."""
    images, num = np.asarray(values, np.uint8).reshape(-1, 1, 1, 1), len(values)
    split = data.Split("test", images, np.zeros(num, np.int32), np.zeros((num, 0), np.int32))
    spec = DataSpec((1, 1, 1), "uint8", np.zeros((1, 1, 1), np.float32))
    return data.Dataset(data.Config(binarisation="none"), {"test": split}, spec, {})


def _model(means, sigma):
    """q(z | x) = N(means[x], sigma²), p(z) = N(0, 1); z is in a pytree."""

    def mu(batch):
        return means[batch["x"].reshape(-1).astype(int)]

    def draw_posterior(params, batch, rng):
        return {"z": mu(batch) + sigma * jax.random.normal(rng, (len(batch["x"]),))}

    def log_joint(params, batch, z):
        return jnp.zeros_like(z["z"]), standard_gaussian_log_prob(z["z"])

    def log_posterior(params, batch, z):
        return gaussian_log_prob(z["z"], mu(batch)[None], math.log(sigma))

    latents = Latents(None, draw_posterior, log_joint, log_posterior)
    return Model(init=None, players=(), log_likelihood_fns={}, latents=latents)


def _evaluate(means, sigma, values, batch_size=64, chunk=200, devices=None):
    model, dataset = _model(jnp.asarray(means), sigma), _dataset(values)
    mesh = sharding.make_mesh(devices)
    return aggregate.compile_evaluation(model, dataset, batch_size, chunk, mesh, "test")(None, 0)


def test_two_posteriors_against_quadrature():
    """Half of the images have one posterior, half the other: q(z) is a mixture of two."""
    means, sigma, values = [-0.4, 1.0], 0.6, np.arange(2000) % 2
    found = _evaluate(means, sigma, values)

    def mixture(z):
        return stats.norm(means, sigma).pdf(z).mean()

    marginal_kl, _ = integrate.quad(
        lambda z: mixture(z) * np.log(mixture(z) / stats.norm.pdf(z)), -8, 8
    )
    rate = np.mean([0.5 * (sigma**2 + mu**2 - 1) - math.log(sigma) for mu in means])
    for name, exact in (("marginal_kl", marginal_kl), ("mutual_information", rate - marginal_kl)):
        assert abs(found[name].value - exact) < 4 * found[name].standard_error
        assert found[name].standard_error < 0.02


def test_far_apart_the_code_tells_every_example_and_together_none():
    """I(n; z) is log N where no two posteriors meet, and 0 where they are one."""
    values = np.arange(250)  # more than the codes compared at once, and not a multiple
    apart = _evaluate(100.0 * np.arange(256), 0.5, values)["mutual_information"]
    np.testing.assert_allclose(apart.value, math.log(250), rtol=1e-12)
    together = _evaluate(np.zeros(256), 0.5, values)["mutual_information"]
    np.testing.assert_allclose(together.value, 0, atol=1e-12)


def test_several_processes_do_not_send_the_data_round(monkeypatch):
    """Each has them, and `device_put` would first compare them."""
    expected = _evaluate(np.zeros(256), 0.5, np.arange(10))
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(jax, "device_put", None)
    assert _evaluate(np.zeros(256), 0.5, np.arange(10)) == expected


def test_neither_batch_size_nor_chunk_nor_devices_change_the_result():
    means, sizes = 0.01 * np.arange(256), ((16, 7, 8), (64, 50, 1))
    one, other = (_evaluate(means, 0.5, np.arange(50), *size) for size in sizes)
    for name, metric in one.items():
        np.testing.assert_allclose(metric.value, other[name].value, rtol=1e-11)
