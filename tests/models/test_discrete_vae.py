"""Three codes of two classes and four binary pixels: every sum over codes is taken whole."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from dgm_jax.core import DataSpec, UserError
from dgm_jax.models import discrete_vae

PIXELS, ROWS, NUM, CLASSES = 4, 16, 3, 2
SPEC = DataSpec((2, 2, 1), "binary", np.full((2, 2, 1), 0.4, np.float32), 100)
X = np.array([[i >> j & 1 for j in range(PIXELS)] for i in range(ROWS)], float)
BATCH = {"x": jnp.asarray(X.reshape(ROWS, 2, 2, 1))}
FIELDS = {"latents": NUM, "classes": CLASSES, "encoder": (4,), "decoder": (4,)}
CODES = jnp.asarray(np.eye(CLASSES)[list(itertools.product(range(CLASSES), repeat=NUM))])


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _build(**fields):
    return discrete_vae.build(discrete_vae.Config(**(FIELDS | fields)), SPEC)


def _params(**fields):
    shapes = jax.eval_shape(_build(**fields).init, jax.random.key(0), BATCH)
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(structure, [0.7 * rng.normal(size=p.shape) for p in leaves])


def _densities(params, **fields):
    """log p(x, c) and log q(c | x), each `[codes, images]`; differentiable."""
    config = discrete_vae.Config(**(FIELDS | fields))
    net = discrete_vae.Net(config, SPEC).bind({"params": params["discrete_vae"]})
    logits = net.outputs(CODES)[:, None, :, 0]
    x = jnp.asarray(X)[None]
    log_lik = jnp.sum(x * jax.nn.log_sigmoid(logits) + (1 - x) * jax.nn.log_sigmoid(-logits), -1)
    log_q = jnp.einsum("mnc,bnc->mb", CODES, net.log_posterior(BATCH["x"]))
    return log_lik + net.log_prior(CODES)[:, None], log_q


def _draws(fn, num):
    return jax.jit(jax.vmap(fn))(jax.random.split(jax.random.key(2), num))


def _assert_mean(draws, exact, scale=4.5):
    draws = np.asarray(draws)
    error = draws.std(axis=0, ddof=1) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - exact) < scale * error + 1e-9).all()


@pytest.mark.parametrize("prior", ["uniform", "autoregressive"])
def test_weights_are_unbiased_and_their_mean_logarithm_is_the_elbo(prior):
    params, model = _params(prior=prior), _build(prior=prior)
    log_joint, log_q = (np.asarray(a) for a in _densities(params, prior=prior))
    exact = special.logsumexp(log_joint, axis=0)
    np.testing.assert_allclose(special.logsumexp(exact), 0, atol=1e-9)  # Σ_x p(x) = 1
    log_w = _draws(lambda key: model.log_weight(params, BATCH, key), 10_000)
    _assert_mean(np.exp(log_w), np.exp(exact))
    elbo = np.sum(np.exp(log_q) * (log_joint - log_q), axis=0)
    _assert_mean(log_w, elbo)
    assert (elbo < exact).all()


@pytest.mark.parametrize("objective", discrete_vae.OBJECTIVES)
def test_terms_are_those_of_the_discrete_model_whatever_it_is_trained_on(objective):
    params, model = _params(), _build(objective=objective, num_samples=2)
    log_joint, log_q = (np.asarray(a) for a in _densities(params))
    terms = _draws(lambda key: model.loss_fn(params, BATCH, key)[1].terms, 5000)
    elbo = np.sum(np.exp(log_q) * (log_joint - log_q), axis=0)
    _assert_mean(terms["distortion"] + terms["rate"], -elbo)


def test_vimco_has_the_gradient_of_its_bound():
    """The expected bound with two draws, over all 64 pairs of codes, differentiated."""
    params, model = _params(), _build(objective="vimco", num_samples=2)

    def expected_cost(params):
        log_joint, log_q = _densities(params)
        log_w = log_joint - log_q
        bound = jnp.logaddexp(log_w[:, None], log_w[None]) - jnp.log(2)
        return -jnp.mean(jnp.sum(jnp.exp(log_q[:, None] + log_q[None]) * bound, axis=(0, 1)))

    def cost(params, key):
        return model.loss_fn(params, BATCH, key)[0]

    _assert_mean(_draws(lambda key: cost(params, key), 4000), expected_cost(params))
    exact = jax.jit(jax.grad(expected_cost))(params)
    draws = _draws(lambda key: jax.grad(cost)(params, key), 4000)
    jax.tree.map(_assert_mean, draws, exact)


def test_the_relaxation_becomes_the_elbo_as_the_temperature_falls():
    """Its value near temperature 0, where relaxed codes are the discrete ones."""
    params, model = _params(), _build(temperature=1e-3)
    log_joint, log_q = (np.asarray(a) for a in _densities(params))
    elbo = np.sum(np.exp(log_q) * (log_joint - log_q), axis=0).mean()
    losses = _draws(lambda key: model.loss_fn(params, BATCH, key)[0], 4000)
    _assert_mean(losses, -elbo)


def test_the_relaxed_gradient_is_that_of_what_is_computed():
    """Finite differences of the surrogate at fixed noise, in one direction."""
    params, model = _params(), _build(temperature=0.7)
    cost = jax.jit(lambda params: model.loss_fn(params, BATCH, jax.random.key(0))[0])
    rng = np.random.default_rng(3)
    direction = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
    slope = sum(
        jax.tree.leaves(
            jax.tree.map(lambda g, d: jnp.sum(g * d), jax.grad(cost)(params), direction)
        )
    )
    ends = [
        cost(jax.tree.map(lambda p, d, s=sign: p + s * 1e-5 * d, params, direction))
        for sign in (1, -1)
    ]
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-5, slope, rtol=1e-6)


@pytest.mark.parametrize("prior", ["uniform", "autoregressive"])
def test_samples_have_the_models_distribution(prior):
    params, model = _params(prior=prior), _build(prior=prior)
    samples = jax.jit(model.sample, static_argnums=2)(params, jax.random.key(4), 30_000)
    index = np.asarray(samples["x"]).reshape(-1, PIXELS) @ (1 << np.arange(PIXELS))
    found = np.bincount(index.astype(int), minlength=ROWS) / 30_000
    p = np.exp(special.logsumexp(np.asarray(_densities(params, prior=prior)[0]), axis=0))
    assert (np.abs(found - p) < 4.5 * np.sqrt(p * (1 - p) / 30_000)).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latents", 0),
        ("classes", 1),
        ("num_samples", 0),
        ("encoder", ()),
        ("network", "resnet"),
        ("likelihood", "gaussian"),
        ("prior", "vamp"),
        ("objective", "stl"),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("beta", -1.0),
    ],
)
def test_check_refuses_a_bad_value_by_its_name(field, value):
    with pytest.raises(UserError, match=rf"model\.{field}="):
        discrete_vae.check(discrete_vae.Config(**(FIELDS | {field: value})), SPEC)


def test_vimco_needs_two_draws():
    with pytest.raises(UserError, match=r"model\.num_samples=1"):
        discrete_vae.check(discrete_vae.Config(**FIELDS, objective="vimco"), SPEC)
