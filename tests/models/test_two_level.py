"""Two levels of one latent each and four binary pixels, where everything can be integrated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dgm_jax.core import DataSpec, UserError
from dgm_jax.models import two_level
from dgm_jax.nn import priors

PIXELS, ROWS = 4, 16
SPEC = DataSpec((2, 2, 1), "binary", np.full((2, 2, 1), 0.4, np.float32), 100)
X = np.array([[i >> j & 1 for j in range(PIXELS)] for i in range(ROWS)], float)
BATCH = {"x": jnp.asarray(X.reshape(ROWS, 2, 2, 1))}
FIELDS = {"latents": (1, 1), "width": 3, "components": 2}
AXIS = np.linspace(-9, 9, 241)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _build(**fields):
    return two_level.build(two_level.Config(**(FIELDS | fields)), SPEC)


def _params(**fields):
    shapes = jax.eval_shape(_build(**fields).init, jax.random.key(0), BATCH)
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    params = jax.tree.unflatten(structure, [0.7 * rng.normal(size=p.shape) for p in leaves])
    for name in ("infer_1_head", "infer_2"):  # wide posteriors: their weights have small tails
        head = params["two_level"][name]["Diagonal_0"]["Dense_0"]
        head["kernel"], head["bias"] = 0.1 * head["kernel"], np.array([0.0, 1.0])
    return params


def _net(params, **fields):
    config = two_level.Config(**(FIELDS | fields))
    return two_level.Net(config, SPEC).bind({"params": params["two_level"]})


def _gaussian(parameters, value):
    mu, log_sigma = parameters
    return stats.norm.logpdf(value, mu, np.exp(log_sigma))


@functools.cache
def _exact(prior):
    """log p(x) of all 16 images and the mean of each of their terms, on a grid of (z_1, z_2)."""
    net, z_2 = _net(_params(prior=prior), prior=prior), AXIS[:, None]
    log_step = np.log(AXIS[1] - AXIS[0])

    @jax.jit
    def networks(x):
        pixels, pairs = net.pixels(x)[:, None], (z_2[None], z_2[:, None])
        priors = net.log_prior_2(z_2)[:, None], net.generate_1(z_2)
        return *priors, net.infer_2(pixels), net.infer_1(pixels, z_2[None]), net.outputs(pairs)

    log_p_2, lower_prior, upper, lower, logits = jax.device_get(networks(BATCH["x"]))
    np.testing.assert_allclose(np.exp(log_p_2 + log_step).sum(), 1, atol=1e-6)
    # Each broadcasts to [x, z_2, z_1].
    log_q_1, log_p_1, log_q_2 = (
        _gaussian(lower, AXIS),
        _gaussian(lower_prior, AXIS),
        _gaussian(upper, z_2),
    )
    log_lik = (
        special.log_expit(logits[..., 0]) @ X.T + special.log_expit(-logits[..., 0]) @ (1 - X).T
    )
    log_lik = np.moveaxis(log_lik, -1, 0)
    q = np.exp(log_q_1 + log_q_2 + 2 * log_step)
    terms = {"distortion": -log_lik, "rate_1": log_q_1 - log_p_1, "rate_2": log_q_2 - log_p_2}
    log_p_x = special.logsumexp(log_lik + log_p_1 + log_p_2 + 2 * log_step, axis=(1, 2))
    return log_p_x, {name: np.sum(q * term, axis=(1, 2)) for name, term in terms.items()}


def _draws(fn, num):
    return jax.device_get(jax.jit(jax.vmap(fn))(jax.random.split(jax.random.key(2), num)))


def _error(draws):
    return draws.std(axis=0, ddof=1) / np.sqrt(len(draws))


@pytest.mark.parametrize("prior", ["standard", "mixture", "vamp"])
def test_weights_are_unbiased_and_each_level_has_its_rate(prior):
    """For all 16 images E[w] = p(x), and E[log w] is less by the terms' quadratures."""
    params, model = _params(prior=prior), _build(prior=prior)
    log_p_x, expected = _exact(prior)

    def one(key):
        return model.log_weight(params, BATCH, key), model.players[0].terms(params, BATCH, key)

    log_w, terms = _draws(one, 20_000)
    pairs = [(terms[name], value) for name, value in expected.items()]
    for draws, value in (*pairs, (log_w, -sum(expected.values())), (np.exp(log_w - log_p_x), 1)):
        assert (np.abs(draws.mean(axis=0) - value) < 4.5 * _error(draws)).all()
    assert (-sum(expected.values()) < log_p_x).all()


def test_the_posteriors_density_is_the_product_of_both_levels():
    """log q(z_1 | x, z_2) + log q(z_2 | x) by scipy, at z that nobody has drawn."""
    params, model = _params(), _build()
    net, rng = _net(params), np.random.default_rng(5)
    z = tuple(jnp.asarray(rng.normal(size=(2, ROWS, 1))) for _ in range(2))

    @jax.jit
    def posteriors(x):
        pixels = jnp.broadcast_to(net.pixels(x), (2, ROWS, PIXELS))
        return net.infer_1(pixels, z[1]), net.infer_2(pixels)

    expected = sum(
        stats.norm.logpdf(np.asarray(value), np.asarray(mu), np.exp(log_sigma))[..., 0]
        for value, (mu, log_sigma) in zip(z, posteriors(BATCH["x"]), strict=True)
    )
    found = jax.jit(model.latents.log_posterior)(params, BATCH, z)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_both_levels_feed_the_pixels_and_the_lower_posterior():
    """p(x | z_1, z_2) and q(z_1 | x, z_2) move with each of their inputs."""
    net = _net(_params())
    z = jnp.array([[0.3]]), jnp.array([[-0.4]])
    moved = jnp.array([[1.3]])
    outputs, infer_1 = jax.jit(net.outputs), jax.jit(net.infer_1)
    for pair in ((moved, z[1]), (z[0], moved)):
        assert not np.allclose(outputs(z), outputs(pair))
    pixels = net.pixels(BATCH["x"][:1])
    for inputs in ((-pixels, z[1]), (pixels, moved)):
        assert not np.allclose(infer_1(pixels, z[1])[0], infer_1(*inputs)[0])


def test_a_vampprior_of_one_component_is_the_posterior_there():
    """p(z_2) = q(z_2 | u) with u the one pseudo-input."""
    params = _params(components=1)
    net = _net(params, components=1)
    u = special.expit(params["two_level"]["prior"]["pseudo_inputs"])
    mu, log_sigma = (np.asarray(a) for a in jax.jit(lambda u: net.infer_2(net.pixels(u)))(u))
    z = np.linspace(-3, 3, 7)[:, None]
    expected = stats.norm.logpdf(z, mu, np.exp(log_sigma))[:, 0]
    np.testing.assert_allclose(jax.jit(net.log_prior_2)(z), expected, rtol=1e-9)


def test_samples_have_the_models_distribution():
    params, model = _params(), _build()
    samples = jax.jit(model.sample, static_argnums=2)(params, jax.random.key(4), 40_000)
    index = np.asarray(samples["x"]).reshape(-1, PIXELS) @ (1 << np.arange(PIXELS))
    found = np.bincount(index.astype(int), minlength=ROWS) / 40_000
    p = np.exp(_exact("vamp")[0])
    assert (np.abs(found - p) < 4.5 * np.sqrt(p * (1 - p) / 40_000)).all()


def test_codes_are_decoded_where_they_lie():
    """Features of both levels, in the order of the levels; their picture is E[x | z] there."""
    params, model = _params(), _build()
    codes = jax.jit(model.encode)(params, BATCH, jax.random.key(0))
    net = _net(params)

    @jax.jit
    def means_and_picture(x):
        pixels = net.pixels(x)
        z_2 = net.infer_2(pixels)[0]
        z_1 = net.infer_1(pixels, z_2)[0]
        return jnp.concatenate([z_1, z_2], axis=1), net.outputs((z_1, z_2))[..., 0]

    means, logits = means_and_picture(BATCH["x"])
    np.testing.assert_allclose(codes, means, rtol=1e-9)
    picture = np.asarray(jax.jit(model.decode)(params, codes)).reshape(ROWS, PIXELS)
    np.testing.assert_allclose(picture, special.expit(np.asarray(logits)), rtol=1e-9)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latents", (1,)),
        ("latents", (1, 0)),
        ("width", 0),
        ("activation", "sine"),
        ("likelihood", "gaussian"),
        ("components", 0),
        ("flow_steps", 0),
        ("objective", "tcvae"),
        ("num_samples", 0),
        ("beta", -1.0),
        *(("prior", name) for name in ("none", "realnvp")),  # the latter needs two latents
    ],
)
def test_check_refuses_a_bad_value_by_its_name(field, value):
    with pytest.raises(UserError, match=rf"model\.{field}="):
        two_level.check(two_level.Config(**(FIELDS | {field: value})), SPEC)


@pytest.mark.parametrize("prior", priors.PRIORS)
def test_check_accepts_every_prior(prior):
    fields = FIELDS | {"latents": (2, 2), "prior": prior}
    two_level.check(two_level.Config(**fields), SPEC)
