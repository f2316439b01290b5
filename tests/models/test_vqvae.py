"""Quantised autoencoders of two codes and four binary pixels, by enumeration and by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from dgm_jax.core import DataSpec, UserError
from dgm_jax.models import vqvae

PIXELS, ROWS = 4, 16
SPEC = DataSpec((2, 2, 1), "binary", np.full((2, 2, 1), 0.4, np.float32), 100)
X = np.array([[i >> j & 1 for j in range(PIXELS)] for i in range(ROWS)], float)
BATCH = {"x": jnp.asarray(X.reshape(ROWS, 2, 2, 1))}
FIELDS = {
    "positions": 2,
    "codebook": 3,
    "code_size": 2,
    "levels": (3, 2),
    "encoder": (5,),
    "decoder": (5,),
}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _config(quantiser):
    return vqvae.Config(**FIELDS, quantiser=quantiser)


def _model(quantiser):
    """The model, and random parameters of it."""
    model = vqvae.build(_config(quantiser), SPEC)
    shapes = jax.eval_shape(model.init, jax.random.key(0), BATCH)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), shapes)
    if quantiser == "ema":
        params["state"] = params["state"]._replace(count=jnp.array([1.0, 2.0, 3.0]))
    return model, params


def _entries(quantiser, params):
    """All codes of one position `[C, E]`, from their definition."""
    if quantiser == "gradient":
        return np.asarray(params["vqvae"]["codebook"])
    if quantiser == "ema":
        return np.asarray(params["state"].total) / np.array([[1.0], [2.0], [3.0]])
    return np.array([[a, b] for b in (-1, 0) for a in (-1, 0, 1)], float)


def _log_lik(params, quantiser, codes):
    """log p(x | c) `[M, 16]` for codes `[M, 2, E]`."""
    net = vqvae.Net(_config(quantiser), SPEC).bind({"params": params["vqvae"]})
    logits = np.asarray(net.outputs(jnp.asarray(codes)))[..., 0]
    return special.log_expit(logits) @ X.T + special.log_expit(-logits) @ (1 - X).T


@pytest.mark.parametrize("quantiser", vqvae.QUANTISERS)
def test_the_elbo_is_one_term_of_the_likelihood(quantiser):
    """log p(x) is a sum over all pairs of codes; the bound is the summand of x's own pair."""
    model, params = _model(quantiser)
    entries = _entries(quantiser, params)
    pairs = np.array(list(itertools.product(range(len(entries)), repeat=2)))
    prior = vqvae.quantise.AutoregressiveCodes(2, len(entries)).bind({"params": params["prior"]})
    log_prior = np.asarray(prior.log_prob(jnp.asarray(np.eye(len(entries))[pairs])))
    np.testing.assert_allclose(np.exp(log_prior).sum(), 1, rtol=1e-9)
    log_joint = _log_lik(params, quantiser, entries[pairs]) + log_prior[:, None]
    exact = special.logsumexp(log_joint, axis=0)

    codes = np.asarray(model.encode(params, BATCH, jax.random.key(0))).reshape(ROWS, 2, 2)
    distance = np.abs(codes[:, :, None] - entries[None, None]).sum(axis=-1)
    assert distance.min(axis=-1).max() < 1e-4  # every code is an entry
    own = distance.argmin(axis=-1) @ (len(entries), 1)
    elbo = model.log_likelihood_fns["elbo"](params, BATCH, jax.random.key(0))
    np.testing.assert_allclose(elbo, log_joint[own, np.arange(ROWS)], atol=1e-3)
    assert (np.asarray(elbo) < exact).all()
    terms = {}
    for player in model.players:
        terms |= player.loss_fn(params, BATCH, jax.random.key(0))[1].terms
    np.testing.assert_allclose(terms["distortion"] + terms["rate"], -elbo, rtol=1e-9)


@pytest.mark.parametrize("quantiser", vqvae.QUANTISERS)
def test_the_prior_cannot_move_the_codes(quantiser):
    """Its loss has no gradient with respect to the autoencoder, nor the other way round."""
    model, params = _model(quantiser)
    autoencoder, prior = model.players
    for player, other in ((autoencoder, "prior"), (prior, "vqvae")):
        gradient = jax.grad(
            lambda own, p=player, o=other: p.loss_fn({**params, o: own}, BATCH, None)[0]
        )
        assert all((g == 0).all() for g in jax.tree.leaves(gradient(params[other])))


def test_a_codebook_by_gradient_is_drawn_to_the_encoders_vectors():
    """∂/∂e_c of mean_b Σ |e - sg[z]|² is the sum of 2 (e_c - z) over what went to c."""
    model, params = _model("gradient")
    gradient = jax.grad(
        lambda own: model.players[0].loss_fn({**params, "vqvae": own}, BATCH, None)[0]
    )
    found = gradient(params["vqvae"])["codebook"]
    net = vqvae.Net(_config("gradient"), SPEC).bind({"params": params["vqvae"]})
    z = np.asarray(net.encode(BATCH["x"])).reshape(-1, 2)
    entries = np.asarray(params["vqvae"]["codebook"])
    index = ((z[:, None] - entries[None]) ** 2).sum(axis=-1).argmin(axis=1)
    expected = np.zeros_like(entries)
    np.add.at(expected, index, 2 * (entries[index] - z) / ROWS)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_an_ema_codebook_is_updated_from_real_rows_alone():
    model, params = _model("ema")
    mask = jnp.arange(ROWS) < 6
    junk = jnp.where(mask.reshape(-1, 1, 1, 1), BATCH["x"], 1 - BATCH["x"])
    states = [
        model.players[0].loss_fn(params, {"x": x, "mask": mask}, None)[1].state
        for x in (BATCH["x"], junk)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), *states)
    # Twelve vectors came in, each with the weight 1 - γ.
    np.testing.assert_allclose(states[0].count.sum(), 0.99 * 6 + 0.01 * 12, rtol=1e-9)


@pytest.mark.parametrize("quantiser", vqvae.QUANTISERS)
def test_samples_have_the_models_distribution(quantiser):
    model, params = _model(quantiser)
    entries = _entries(quantiser, params)
    pairs = np.array(list(itertools.product(range(len(entries)), repeat=2)))
    prior = vqvae.quantise.AutoregressiveCodes(2, len(entries)).bind({"params": params["prior"]})
    log_prior = np.asarray(prior.log_prob(jnp.asarray(np.eye(len(entries))[pairs])))
    log_joint = _log_lik(params, quantiser, entries[pairs]) + log_prior[:, None]
    p = np.exp(special.logsumexp(log_joint, axis=0))
    samples = jax.jit(model.sample, static_argnums=2)(params, jax.random.key(4), 20_000)
    index = np.asarray(samples["x"]).reshape(-1, PIXELS) @ (1 << np.arange(PIXELS))
    found = np.bincount(index.astype(int), minlength=ROWS) / 20_000
    assert (np.abs(found - p) < 4.5 * np.sqrt(p * (1 - p) / 20_000) + 1e-4).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantiser", "lfq"),
        ("positions", 0),
        ("codebook", 1),
        ("code_size", 0),
        *(("levels", v) for v in ((), (1, 3), (2.5,))),
        ("commitment", -0.1),
        ("decay", 1.0),
        ("encoder", (0,)),
        ("network", "resnet"),
        ("likelihood", "gaussian"),
    ],
)
def test_check_refuses_a_bad_value_by_its_name(field, value):
    with pytest.raises(UserError, match=rf"model\.{field}="):
        vqvae.check(vqvae.Config(**(FIELDS | {field: value})), SPEC)
