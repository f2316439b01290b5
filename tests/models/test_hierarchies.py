"""What holds for every hierarchy and its objectives, and for the VAE, a hierarchy of one layer."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from dgm_jax import models, objectives
from dgm_jax.core import DataSpec
from dgm_jax.nn.posteriors import UNIT_RAW

SPEC = DataSpec((2, 2, 1), "binary", np.full((2, 2, 1), 0.4, np.float32), 100)
X = np.array([[i >> j & 1 for j in range(4)] for i in (2, 7, 13)], np.float32)
BATCH, ROWS, K = {"x": X.reshape(3, 2, 2, 1)}, 3, 3
FIELDS = {
    "vae": {"latents": 3, "encoder": (4,), "decoder": (5,)},
    "hvae": {"latents": (3, 2), "width": (5, 4)},
    "two_level": {"latents": (3, 2), "width": 5, "prior": "standard"},
    "topdown": {"layers": (0, 2), "latents": 2, "channels": 3, "width": 3},
}
DISCRETE = {"latents": 2, "classes": 3, "encoder": (4,), "decoder": (5,), "prior": "uniform"}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _build(name, **fields):
    usual = FIELDS.get(name, DISCRETE)
    return models.build(models.defaults(name) | usual | fields, SPEC)


def _shapes(name):
    return jax.eval_shape(_build(name).init, jax.random.key(0), BATCH)


def _random(name):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: 0.5 * rng.normal(size=p.shape), _shapes(name))


def _at_the_exact_posterior(name):
    """Zero weights: no layer looks at x or at another layer, and all are N(0, 1)."""

    def value(path, leaf):
        keys = jax.tree_util.keystr(path)
        is_gaussian = "Diagonal_0" in keys or "'posterior'" in keys
        if not is_gaussian or path[-1].key != "bias":
            return jnp.zeros(leaf.shape)
        return jnp.repeat(jnp.array([0.0, UNIT_RAW]), leaf.shape[0] // 2)

    return jax.tree_util.tree_map_with_path(value, _shapes(name))


@functools.cache
def _gradient_fn(name, objective, k):
    model = _build(name, objective=objective, num_samples=k)
    loss = lambda params, rng: model.loss_fn(params, BATCH, rng)[0]  # noqa: E731
    return jax.jit(jax.vmap(jax.grad(loss), (None, 0)))


def _gradients(name, objective, params, k=K):
    """Of 400 draws, `[400, size]`, by the parameters' path."""
    found = _gradient_fn(name, objective, k)(params, jax.random.split(jax.random.key(2), 400))
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).reshape(400, -1)
        for path, leaf in jax.tree_util.tree_leaves_with_path(found)
    }


def _is_posterior(path):
    return any(
        part in path for part in ("'posterior'", "'up_0'", "'up_1'", "'infer_", "posterior_head")
    )


def _is_generative(path):
    """What no posterior looks at: of `topdown`, both of whose parts read one state, the head."""
    parts = ("'outputs'", "'down_0'", "'generate_", "'decoder", "'head'")
    return any(part in path for part in parts)


@pytest.mark.parametrize("objective", ["stl", "dreg"])
@pytest.mark.parametrize("name", FIELDS)
def test_at_the_exact_posterior_no_draw_moves_it(name, objective):
    """Roeder et al. 2017, section 3: there, every weight is p(x) and the gradient that is left is
    exactly the model's; the score term, which `iwae` keeps, would add noise of mean 0.
    """

    def largest(objective, k):
        found = _gradients(name, objective, _at_the_exact_posterior(name), k)
        return max(np.abs(each).max() for path, each in found.items() if _is_posterior(path))

    assert largest(objective, 1 if objective == "stl" else K) < 1e-12
    assert largest("iwae", K) > 1e-2


@pytest.mark.parametrize("name", FIELDS)
def test_dreg_and_iwae_agree_on_the_model_and_in_the_mean_on_the_posterior(name):
    """The generative gradient draw by draw; the others over 400 draws, in standard errors."""
    iwae, dreg = (_gradients(name, objective, _random(name)) for objective in ("iwae", "dreg"))
    for path in iwae:
        if _is_generative(path):
            np.testing.assert_allclose(dreg[path], iwae[path], rtol=1e-9, atol=1e-12)
        else:
            gap = dreg[path] - iwae[path]
            error = gap.std(axis=0, ddof=1) / math.sqrt(len(gap))
            assert np.all(np.abs(gap.mean(axis=0)) < 4.5 * error + 1e-12), path
            assert np.abs(gap).max() > 1e-3 or not _is_posterior(path), path


@pytest.mark.parametrize("name", [*FIELDS, "discrete_vae"])
def test_every_loss_is_its_formula_of_the_weights_and_of_beta(name):
    """K draws for each example are what one draw for each of K copies of it is, key by key."""
    names = objectives.usable(objectives.LAYERED)
    names = ("straight_through", "vimco") if name == "discrete_vae" else names
    model, beta, order, rng = _build(name), 0.4, 1.6, jax.random.key(3)
    copies = {"x": jnp.tile(BATCH["x"], (K, 1, 1, 1))}

    @jax.jit
    def found(params):
        fields = {"num_samples": K, "beta": beta}
        fields |= {} if name == "discrete_vae" else {"alpha": 1 - order}
        losses = [_build(name, objective=each, **fields).loss_fn for each in names]
        terms = model.players[0].terms(params, copies, rng)
        log_w = model.log_weight(params, copies, rng)
        return terms, log_w, [loss(params, BATCH, rng)[0] for loss in losses]

    terms, log_w, losses = jax.device_get(found(_random(name)))
    if layers := [value for term, value in terms.items() if term.startswith("rate_")]:
        np.testing.assert_allclose(sum(layers), terms["rate"], rtol=1e-12)
    elbo = np.mean(terms["distortion"] + beta * terms["rate"])
    log_w = (beta * log_w - (1 - beta) * terms["distortion"]).reshape(K, ROWS)
    iwae = np.mean(math.log(K) - special.logsumexp(log_w, axis=0))
    expected = {"elbo": elbo, "straight_through": elbo, "stl": -log_w.mean()}
    expected["elbo_monte_carlo"] = -log_w.mean()
    renyi = special.logsumexp(order * log_w, axis=0) - math.log(K)
    expected["renyi"] = -np.mean(renyi) / order
    for objective, loss in zip(names, losses, strict=True):
        value = expected.get(objective, iwae)
        np.testing.assert_allclose(loss, value, rtol=1e-10, err_msg=objective)


@pytest.mark.parametrize("name", FIELDS)
def test_a_weight_is_the_joint_density_over_the_posteriors(name):
    """At the draw that both were told, the posterior's density found anew."""
    model, rng = _build(name), jax.random.key(4)

    @jax.jit
    def both(params):
        z = jax.tree.map(lambda a: a[None], model.latents.draw_posterior(params, BATCH, rng))
        log_joint = sum(model.latents.log_joint(params, BATCH, z))
        log_ratio = log_joint - model.latents.log_posterior(params, BATCH, z)
        return log_ratio[0], model.log_weight(params, BATCH, rng)

    np.testing.assert_allclose(*both(_random(name)), rtol=1e-10)
