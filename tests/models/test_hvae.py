"""The hierarchy's weight, sampler and layers on a model small enough for quadrature."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dgm_jax.core import DataSpec, UserError
from dgm_jax.models import hvae

PIXELS, ROWS = 4, 16
SPEC = DataSpec((2, 2, 1), "binary", np.linspace(0.2, 0.8, PIXELS).reshape(2, 2, 1))
FIELDS = {"latents": (1, 1), "width": (5, 3)}
X = np.array(list(itertools.product((0.0, 1.0), repeat=PIXELS))).reshape(ROWS, 2, 2, 1)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _build(**fields):
    return hvae.build(hvae.Config(**(FIELDS | fields)), SPEC)


def _params(model):
    leaves, structure = jax.tree.flatten(
        jax.eval_shape(model.init, jax.random.key(0), {"x": jnp.asarray(X)})
    )
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(structure, [0.7 * rng.normal(size=leaf.shape) for leaf in leaves])


MODEL = _build()


def _net(params):
    return hvae.Net(hvae.Config(**FIELDS), SPEC).bind({"params": params["hvae"]})


def _gaussians(conditional, below, value):
    """log N(value; conditional(below)) of scalars, `[below, value]`."""
    mu, log_sigma = (np.asarray(a) for a in jax.jit(conditional.__call__)(below))
    return stats.norm.logpdf(value[None], mu, np.exp(log_sigma))


def _exact(params):
    """log p(x) of all 16 images and the mean of each of their terms, on a grid of (z_1, z_2)."""
    net, axis = _net(params), np.linspace(-8, 8, 321)
    log_step, z = np.log(axis[1] - axis[0]), axis[:, None]
    log_p_1 = _gaussians(net.down[0], z, axis)  # [z_2, z_1]
    log_p_2 = stats.norm.logpdf(z)
    log_q_1 = _gaussians(net.up[0], net.pixels(X), axis)  # [x, z_1]
    log_q_2 = _gaussians(net.up[1], z, axis).T  # [z_2, z_1]
    q_1, q_2 = np.exp(log_q_1 + log_step), np.exp(log_q_2 + log_step)
    logits = np.asarray(jax.jit(net.outputs.__call__)(z))[..., 0]
    x = X.reshape(ROWS, PIXELS)
    log_lik = special.log_expit(logits) @ x.T + special.log_expit(-logits) @ (1 - x).T
    log_p_z_1 = special.logsumexp(log_p_1 + log_p_2, axis=0) + 2 * log_step
    terms = {
        "distortion": -np.sum(q_1.T * log_lik, axis=0),
        "rate_1": np.sum(q_1 * (log_q_1 - np.sum(q_2 * log_p_1, axis=0)), axis=1),
        "rate_2": q_1 @ np.sum(q_2 * (log_q_2 - log_p_2), axis=0),
    }
    return special.logsumexp(log_lik + log_p_z_1[:, None], axis=0), terms


def _wide(params):
    """The same with posteriors of sigma about 1.3: their weights have a finite variance."""
    for layer in ("up_0", "up_1"):
        head = params["hvae"][layer]["Diagonal_0"]["Dense_0"]
        head["kernel"], head["bias"] = 0.1 * head["kernel"], np.array([0.0, 1.0])
    return params


def test_weights_are_unbiased_and_each_layer_has_its_rate():
    """For all 16 images E[w] = p(x), and E[log w] is less by the terms' quadratures."""
    params = _wide(_params(MODEL))
    log_p_x, expected = _exact(params)
    np.testing.assert_allclose(special.logsumexp(log_p_x), 0, atol=1e-8)

    @jax.jit
    def draw(params, keys):
        def one(key):
            batch = {"x": jnp.asarray(X)}
            terms = MODEL.players[0].terms(params, batch, key)
            return MODEL.log_weight(params, batch, key), terms

        return jax.vmap(one)(keys)

    log_w, terms = jax.device_get(draw(params, jax.random.split(jax.random.key(1), 8000)))
    assert set(terms) == {*expected, "rate"}
    pairs = [(terms[name], value) for name, value in expected.items()]
    for draws, value in (*pairs, (log_w, -sum(expected.values())), (np.exp(log_w - log_p_x), 1)):
        error = draws.std(axis=0, ddof=1) / math.sqrt(len(draws))
        assert np.all(np.abs(draws.mean(axis=0) - value) < 4.5 * error)
    assert np.all(-sum(expected.values()) < log_p_x)


def test_samples_have_the_models_distribution():
    params = _params(MODEL)
    pairs = jax.jit(jax.vmap(lambda p, key: MODEL.sample(p, key, 2)["x"], (None, 0)))
    x = np.asarray(pairs(params, jax.random.split(jax.random.key(3), 20_000)))
    index = x.reshape(-1, PIXELS).astype(int) @ 2 ** np.arange(PIXELS)[::-1]
    counts = np.bincount(index, minlength=ROWS)
    expected = np.exp(_exact(params)[0])
    assert stats.chisquare(counts, 40_000 * expected / expected.sum()).pvalue > 1e-4


def test_held_out_terms_are_of_one_draw_and_sum_to_the_elbo():
    """However many draws it is trained on."""
    params, batch, key = _params(MODEL), {"x": jnp.asarray(X[:4])}, jax.random.key(2)
    many, one = (_build(objective="iwae", num_samples=k) for k in (5, 1))
    terms = jax.jit(many.players[0].terms)(params, batch, key)
    expected = jax.jit(one.loss_fn)(params, batch, key)[1].terms
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), terms, expected)
    elbo = jax.jit(many.log_likelihood_fns["elbo"])(params, batch, key)
    np.testing.assert_allclose(terms["distortion"] + terms["rate"], -elbo, rtol=1e-12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latents", ()),
        ("latents", (3, 0)),
        ("width", (5,)),
        ("width", (5, -1)),
        ("activation", "swisch"),
        ("objective", "tcvae"),
        ("num_samples", 0),
        ("beta", -1.0),
        ("likelihood", "poisson"),
    ],
)
def test_check_refuses_a_bad_field_by_its_name(field, value):
    with pytest.raises(UserError, match=rf"model\.{field}="):
        hvae.check(hvae.Config(**(FIELDS | {field: value})), SPEC)
