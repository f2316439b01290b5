"""The hierarchy's weight, sampler and layers on a model small enough for quadrature."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dgm_jax import objectives
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


@functools.cache
def _losses():
    """What the loss of each objective gives for the same key."""
    batch, rng = {"x": jnp.asarray(X)}, jax.random.key(0)
    models = {objective: _build(objective=objective) for objective in objectives.LAYERED}

    @jax.jit
    def losses(params):
        return {name: model.loss_fn(params, batch, rng) for name, model in models.items()}

    return jax.device_get(losses(_params(MODEL)))


def _net(params):
    return hvae.Net(hvae.Config(**FIELDS), SPEC).bind({"params": params["hvae"]})


def _exact(params):
    """log p(x) of all 16 images: the sum over a grid of (z_1, z_2)."""
    net, axis = _net(params), np.linspace(-8, 8, 321)
    mu, log_sigma = (np.asarray(a)[:, 0] for a in jax.jit(net.down[0].__call__)(axis[:, None]))
    # [z_2, z_1]
    log_joint = stats.norm.logpdf(axis[None], mu[:, None], np.exp(log_sigma)[:, None])
    log_joint = log_joint + stats.norm.logpdf(axis)[:, None] + 2 * np.log(axis[1] - axis[0])
    log_p_z1 = special.logsumexp(log_joint, axis=0)
    logits = np.asarray(jax.jit(net.outputs.__call__)(axis[:, None]))[..., 0]
    x = X.reshape(ROWS, PIXELS)
    log_lik = special.log_expit(logits) @ x.T + special.log_expit(-logits) @ (1 - x).T
    return special.logsumexp(log_lik + log_p_z1[:, None], axis=0)


def _wide(params):
    """The same with posteriors of sigma about 1.3: their weights have a finite variance."""
    for layer in ("up_0", "up_1"):
        head = params["hvae"][layer]["Diagonal_0"]["Dense_0"]
        head["kernel"], head["bias"] = 0.1 * head["kernel"], np.array([0.0, 1.0])
    return params


def test_weights_are_unbiased_and_the_elbo_is_a_bound():
    """For all 16 images E[w] = p(x), and E[log w] = E[ELBO] < log p(x)."""
    params = _wide(_params(MODEL))
    log_p_x = _exact(params)
    np.testing.assert_allclose(special.logsumexp(log_p_x), 0, atol=1e-8)
    keys = jax.random.split(jax.random.key(1), (8000, 2))

    @jax.jit
    def draw(params, keys):
        def one(keys):
            batch = {"x": jnp.asarray(X)}
            elbo = MODEL.log_likelihood_fns["elbo"](params, batch, keys[1])
            return MODEL.log_weight(params, batch, keys[0]), elbo

        return jax.vmap(one)(keys)

    log_w, elbo = map(np.asarray, draw(params, keys))
    for draws, expected in ((np.exp(log_w - log_p_x), 1), (log_w - elbo, 0)):
        error = draws.std(axis=0, ddof=1) / math.sqrt(len(draws))
        assert np.all(np.abs(draws.mean(axis=0) - expected) < 4.5 * error)
    assert np.all(elbo.mean(axis=0) < log_p_x)


def test_samples_have_the_models_distribution():
    params = _params(MODEL)
    pairs = jax.jit(jax.vmap(lambda p, key: MODEL.sample(p, key, 2)["x"], (None, 0)))
    x = np.asarray(pairs(params, jax.random.split(jax.random.key(3), 20_000)))
    index = x.reshape(-1, PIXELS).astype(int) @ 2 ** np.arange(PIXELS)[::-1]
    counts = np.bincount(index, minlength=ROWS)
    expected = np.exp(_exact(params))
    assert stats.chisquare(counts, 40_000 * expected / expected.sum()).pvalue > 1e-4


def test_the_layers_rates_sum_to_the_rate():
    loss, aux = _losses()["elbo"]
    terms = aux.terms
    assert set(terms) == {"distortion", "rate", "rate_1", "rate_2"}
    np.testing.assert_allclose(terms["rate_1"] + terms["rate_2"], terms["rate"], rtol=1e-12)
    np.testing.assert_allclose(loss, np.mean(terms["distortion"] + terms["rate"]), rtol=1e-12)


@pytest.mark.parametrize("objective", objectives.LAYERED)
def test_every_objective_is_a_bound(objective):
    """All give the mean of -log w with one draw, whatever their gradient."""
    loss, aux = _losses()[objective]
    expected = np.mean(aux.terms["distortion"] + aux.terms["rate"])
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_held_out_terms_are_of_one_draw_and_sum_to_the_elbo():
    """However many draws it is trained on."""
    params, batch, key = _params(MODEL), {"x": jnp.asarray(X[:4])}, jax.random.key(2)
    many, one = (_build(objective="iwae", num_samples=k) for k in (5, 1))
    terms = jax.jit(many.players[0].terms)(params, batch, key)
    expected = jax.jit(one.loss_fn)(params, batch, key)[1].terms
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), terms, expected)
    elbo = jax.jit(many.log_likelihood_fns["elbo"])(params, batch, key)
    np.testing.assert_allclose(terms["distortion"] + terms["rate"], -elbo, rtol=1e-12)


def test_dreg_and_iwae_agree_on_the_model_and_in_the_mean_on_the_posterior():
    """The generative gradient draw by draw; the inference gradient over 1,000 keys."""
    params, batch = _wide(_params(MODEL)), {"x": jnp.asarray(X[:4])}
    keys = jax.random.split(jax.random.key(2), 1000)

    def gradients(objective):
        model = _build(objective=objective, num_samples=3)
        loss = lambda params, rng: model.loss_fn(params, batch, rng)[0]  # noqa: E731
        found = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, keys)["hvae"]
        return {
            name: np.concatenate(
                [np.asarray(leaf).reshape(1000, -1) for leaf in jax.tree.leaves(tree)], axis=1
            )
            for name, tree in found.items()
        }

    iwae, dreg = gradients("iwae"), gradients("dreg")
    for name in iwae:
        if name.startswith("up"):
            gap = dreg[name] - iwae[name]
            error = gap.std(axis=0, ddof=1) / math.sqrt(len(gap))
            assert np.all(np.abs(gap.mean(axis=0)) < 4.5 * error + 1e-12)
            assert np.abs(gap).max() > 1e-3
        else:
            np.testing.assert_allclose(dreg[name], iwae[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latents", ()),
        ("latents", (3, 0)),
        ("width", (5,)),
        ("width", (5, -1)),
        ("activation", "swisch"),
        ("objective", "vimco"),
        ("num_samples", 0),
        ("beta", -1.0),
        ("likelihood", "poisson"),
    ],
)
def test_check_refuses_a_bad_field_by_its_name(field, value):
    with pytest.raises(UserError, match=rf"model\.{field}="):
        hvae.check(hvae.Config(**(FIELDS | {field: value})), SPEC)
