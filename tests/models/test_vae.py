"""The VAE's bound, its weight, its sampler and its gradient on a model small enough to enumerate.

In double precision, but for the extremes: what is asserted is then sharp to rounding.
"""

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
from dgm_jax.distributions import (
    bernoulli_log_prob,
    gaussian_kl_to_standard,
    gaussian_log_prob,
)
from dgm_jax.draws import Draws
from dgm_jax.models import vae

PIXELS, LATENTS, ROWS, NUM, CLASSES = 6, 2, 8, 37, 2
MEAN = np.linspace(0.1, 0.9, PIXELS, dtype=np.float32).reshape(3, 2, 1)
SPEC = DataSpec((3, 2, 1), "binary", MEAN, NUM, CLASSES)
# No two sizes are equal, so that a layer can be told by its shape.
FIELDS = {"latents": LATENTS, "encoder": (5,), "decoder": (7,)}
FIELDS |= {"components": 3, "flow_steps": 2, "flow_width": 8}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _build(spec=SPEC, **fields):
    return vae.build(vae.Config(**(FIELDS | fields)), spec)


def _params(model):
    """Random numbers everywhere, biases too: no special case of a fresh network."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0), _batch(1)))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [0.7 * rng.normal(size=leaf.shape) for leaf in leaves])


def _batch(rows=ROWS, seed=0):
    x = np.random.default_rng(seed).integers(0, 2, (rows, *SPEC.event_shape))
    return {"x": jnp.asarray(x.astype(float)), "label": jnp.arange(rows) // 2 % CLASSES}


def _net(params, **fields):
    return vae.Net(vae.Config(**(FIELDS | fields)), SPEC).bind({"params": params["vae"]})


MODEL = _build()
loss_and_grad = jax.jit(jax.value_and_grad(MODEL.loss_fn, has_aux=True))


def _masked_batch():
    return _batch() | {"mask": np.arange(ROWS) % 3 != 1}


def _map_layer(params, width, change):
    """`change` applied to every array whose last axis has `width` elements."""
    return jax.tree.map(lambda p: change(p) if p.shape[-1] == width else p, params)


@functools.partial(jax.jit, static_argnames="conditional")
def _everything(params, batch, rng, conditional=False):
    """All that the model says, and what it is made from: mu, log_sigma, z and the logits."""
    model, net = _build(conditional=conditional), _net(params, conditional=conditional)
    mu, log_sigma = net.context(batch["x"], batch["label"])

    def drawn(key):
        return mu + jnp.exp(log_sigma) * jax.random.normal(key, (1, *mu.shape))[0]

    z, other_z = drawn(jax.random.split(rng)[0]), drawn(rng)
    logits, other_logits = (net.outputs(each, batch["label"])[..., 0] for each in (z, other_z))
    loss, aux = model.loss_fn(params, batch, rng)
    said = {
        "loss": loss,
        **aux.terms,
        "elbo": model.log_likelihood_fns["elbo"](params, batch, rng),
        "log_weight": model.log_weight(params, batch, rng),
        "encode": model.encode(params, batch, rng),
        "reconstruct": model.reconstruct(params, batch, rng),
    }
    if not conditional:
        said["decode"] = model.decode(params, z)
    return said, (mu, log_sigma, z, logits, other_logits)


@pytest.mark.parametrize("conditional", [False, True])
def test_terms_are_sums_over_pixels_and_over_latents(conditional):
    """By NumPy and scipy from the networks' outputs; features and pictures come from the same."""
    batch, model = _batch(), _build(conditional=conditional)
    said, outputs = _everything(_params(model), batch, jax.random.key(1), conditional)
    mu, log_sigma, z, logits, other_logits = map(np.asarray, outputs)
    assert logits.dtype == np.float64
    logits, sigma = logits.reshape(batch["x"].shape), np.exp(log_sigma)
    x = np.asarray(batch["x"])
    log_p_x = np.where(x == 1, special.log_expit(logits), special.log_expit(-logits))
    log_p_x = log_p_x.reshape(ROWS, PIXELS).sum(1)
    rate = 0.5 * (sigma**2 + mu**2 - 1 - 2 * np.log(sigma)).sum(1)
    log_ratio = (stats.norm.logpdf(z) - stats.norm.logpdf(z, mu, sigma)).sum(1)
    expected = {
        "loss": np.mean(rate - log_p_x),
        "distortion": -log_p_x,
        "rate": rate,
        "elbo": log_p_x - rate,
        "log_weight": log_p_x + log_ratio,
        "encode": mu,
        "reconstruct": special.expit(other_logits).reshape(batch["x"].shape),
    }
    if not conditional:
        expected["decode"] = special.expit(logits)
    assert said.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(said[name], value, rtol=1e-12, err_msg=name)


def test_every_pixel_twice_doubles_the_distortion_and_leaves_the_rate():
    """No mean over pixels, nor a weight that depends on their number."""
    batch, rng = _batch(), jax.random.key(1)
    twice = _build(SPEC._replace(event_shape=(6, 2, 1), mean=np.repeat(SPEC.mean, 2, 0)))
    params = _params(MODEL)
    doubled = _map_layer(params, PIXELS, lambda p: np.repeat(p, 2, axis=-1))
    # The encoder takes the mean of the copies.
    doubled = jax.tree.map(
        lambda p: np.repeat(p, 2, axis=0) / 2 if p.ndim == 2 and len(p) == PIXELS else p, doubled
    )
    copies = np.repeat(np.asarray(batch["x"]).reshape(ROWS, PIXELS), 2, axis=1)
    one = _everything(params, batch, rng)[0]
    two = jax.jit(twice.loss_fn)(doubled, {"x": copies.reshape(ROWS, 6, 2, 1)}, rng)[1].terms
    np.testing.assert_allclose(two["distortion"], 2 * one["distortion"], rtol=1e-12)
    np.testing.assert_allclose(two["rate"], one["rate"], rtol=1e-12)


def test_beta_weighs_the_rate_and_nothing_else():
    """loss = mean(distortion + β rate), β traced or not; terms, ELBO and log weight know no β."""
    batch, rng = _batch(), jax.random.key(1)
    params = _params(MODEL)

    def with_beta(beta):
        model = _build(beta=beta)
        loss, aux = model.loss_fn(params, batch, rng)
        elbo = model.log_likelihood_fns["elbo"](params, batch, rng)
        return loss, {**aux.terms, "elbo": elbo, "log_weight": model.log_weight(params, batch, rng)}

    betas = np.array([0.0, 0.25, 1.0, 4.0])
    losses, unweighted = jax.jit(jax.vmap(with_beta))(betas)
    concrete = _everything(params, batch, rng)[0]  # its β is the number 1
    np.testing.assert_allclose(losses[2], concrete["loss"], rtol=1e-13)
    for name, values in unweighted.items():
        np.testing.assert_allclose(values, np.stack(4 * [concrete[name]]), rtol=1e-12)
    distortion, rate = np.asarray(concrete["distortion"]), np.asarray(concrete["rate"])
    expected = [np.mean(distortion + beta * rate) for beta in betas]
    np.testing.assert_allclose(losses, expected, rtol=1e-13)


def test_masked_rows_do_not_count():
    """The loss is the mean over the real rows; neither it nor its gradient sees the others."""
    params, batch, rng = _params(MODEL), _masked_batch(), jax.random.key(1)
    mask, other = batch["mask"], _batch(seed=9)["x"]
    (loss, aux), gradient = loss_and_grad(params, batch, rng)
    costs = np.asarray(aux.terms["distortion"] + aux.terms["rate"])
    np.testing.assert_allclose(loss, costs[mask].mean(), rtol=1e-14)
    batch["x"] = jnp.where(mask[:, None, None, None], batch["x"], other)
    (same, _), same_gradient = loss_and_grad(params, batch, rng)
    assert same == loss
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-12, 1e-15), same_gradient, gradient
    )


def test_the_gradient_is_a_finite_difference():
    """Along random directions at fixed noise: central differences, wrong by O(h²) = 1e-10."""
    params, batch, rng = _params(MODEL), _masked_batch(), jax.random.key(1)
    gradient = jax.device_get(loss_and_grad(params, batch, rng)[1])
    for seed in range(3):
        source = np.random.default_rng(seed)
        direction = jax.tree.map(lambda p, s=source: s.normal(size=p.shape), params)
        up, down = (
            loss_and_grad(jax.tree.map(lambda p, d, h=h: p + h * d, params, direction), batch, rng)
            for h in (1e-5, -1e-5)
        )
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(g * d), gradient, direction)))
        np.testing.assert_allclose(slope, (up[0][0] - down[0][0]) / 2e-5, rtol=1e-7)


# Priors, posteriors and labels that are told, each at least once.
CASES = [
    {},
    {"prior": "vamp"},
    {"prior": "realnvp"},
    {"posterior": "iaf"},
    {"prior": "mixture", "posterior": "full_covariance"},
    {"conditional": True},
]
IMAGES = np.array(list(itertools.product((0, 1), repeat=PIXELS)), np.float64)


@functools.cache
def _wide(**fields):
    """Posteriors of sigma about 1.3, and flows and priors not far from where they start.

    A narrow posterior has weights of no finite variance.
    """
    params = _params(_build(**fields))["vae"]
    for part, scale in (("prior", 0.3), ("posterior", 0.1)):
        params[part] = jax.tree.map(lambda p, s=scale: s * p, params.get(part, {}))
    head = params["posterior"].get("base", params["posterior"])["Dense_0"]
    head["bias"] += np.array([0.0, 0.0, 1.0, 1.0]) * (2 if "base" in params["posterior"] else 1)
    return {"vae": params}


@functools.cache
def _exact(**fields):
    """log p(x) `[64]` of all images, or log p(x | label) `[128]`: the trapezoidal rule over z."""
    axis = np.linspace(-9, 9, 121)
    z = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, LATENTS)
    net, log_cell = _net(_wide(**fields), **fields), 2 * np.log(axis[1] - axis[0])
    log_p_z = np.asarray(jax.jit(net.log_prior)(z)) + log_cell

    def log_p_x(label):
        logits = np.asarray(jax.jit(net.outputs)(z, np.full(len(z), label)))[..., 0]
        log_p_x_z = (
            special.log_expit(logits) @ IMAGES.T + special.log_expit(-logits) @ (1 - IMAGES).T
        )
        return special.logsumexp(log_p_x_z + log_p_z[:, None], axis=0)

    return np.concatenate([log_p_x(label) for label in range(1 + fields.get("conditional", 0))])


def _within_five_standard_errors(draws, expected):
    """Means over the first axis, up to 64 of them (by chance one in 30,000 such sets fails)."""
    error = draws.std(axis=0, ddof=1) / math.sqrt(len(draws))
    return np.all(np.abs(draws.mean(axis=0) - expected) < 5 * error + 1e-12)


@pytest.mark.parametrize("fields", CASES)
def test_weights_are_unbiased_and_the_loss_is_a_bound(fields):
    """For all 64 images E[w] = p(x) and E[log w] = -E[loss] < log p(x), over 4,000 draws.

    Told a label, p(x | label) of each.
    """
    params, model, log_p_x = _wide(**fields), _build(**fields), _exact(**fields)
    num = len(log_p_x) // len(IMAGES)
    np.testing.assert_allclose(special.logsumexp(log_p_x), math.log(num), atol=1e-9)
    x = np.tile(IMAGES.reshape(-1, *SPEC.event_shape), (num, 1, 1, 1))
    batch = {"x": jnp.asarray(x), "label": jnp.arange(len(x)) // len(IMAGES)}

    @jax.jit
    def draw(params, keys):
        def one(key):
            terms = model.loss_fn(params, batch, key)[1].terms
            return model.log_weight(params, batch, key), -terms["distortion"] - terms["rate"]

        return jax.vmap(one)(keys)

    log_w, elbo = jax.device_get(draw(params, jax.random.split(jax.random.key(1), 4000)))
    assert _within_five_standard_errors(np.exp(log_w - log_p_x), 1)
    assert _within_five_standard_errors(log_w - elbo, 0)
    assert np.all(elbo.mean(axis=0) < log_p_x)


@pytest.mark.parametrize("fields", [{}, {"prior": "vamp"}, {"conditional": True}])
def test_samples_have_the_models_distribution(fields):
    """Frequencies of all 64 images against p(x) by quadrature, or each label's: chi-square."""
    params, model = _wide(**fields), _build(**fields)
    # Many keys, few samples of each: noise that z and x had in common would show.
    pairs = jax.jit(jax.vmap(lambda p, key: model.sample(p, key, 2), (None, 0)))
    drawn = jax.device_get(pairs(params, jax.random.split(jax.random.key(3), 20_000)))
    x, mean = (drawn[name].reshape(-1, PIXELS) for name in ("x", "mean"))
    assert np.isin(x, (0, 1)).all()
    label = drawn.get("label", np.zeros((20_000, 2), int)).reshape(-1)
    index = len(IMAGES) * label + x.astype(int) @ 2 ** np.arange(PIXELS)[::-1]
    p = np.exp(_exact(**fields))
    counts = np.bincount(index, minlength=len(p))
    assert stats.chisquare(counts, 40_000 * p / p.sum()).pvalue > 1e-4
    # And x was drawn from the mean returned beside it.
    assert _within_five_standard_errors((x - mean) / np.sqrt(mean * (1 - mean)), 0)
    assert _within_five_standard_errors((x - mean) ** 2 - mean * (1 - mean), 0)


NUMBERS = {"beta": 0.3, "alpha": -0.6, "free_nats": 0.7, "mmd_weight": 5.0}


def _draws(params, batch, rng, prior, k):
    """All that objectives may ask of, put together here."""
    net, x = _net(params, prior=prior), batch["x"].reshape(1, ROWS, -1)
    (mu, log_sigma), (z_rng, prior_rng) = net.context(batch["x"], None), jax.random.split(rng)
    z = mu[None] + jnp.exp(log_sigma)[None] * jax.random.normal(z_rng, (k, *mu.shape))
    log_p_x_z = jnp.sum(bernoulli_log_prob(net.outputs(z, None)[..., 0], x), axis=-1)
    log_p_z = net.log_prior(z)
    log_q = jnp.sum(gaussian_log_prob(z, mu[None], log_sigma[None]), axis=-1)
    each = [gaussian_log_prob(z[0], mu[j][None], log_sigma[j][None]) for j in range(ROWS)]
    return Draws(
        z=z,
        log_likelihood=log_p_x_z,
        log_prior=log_p_z,
        log_posterior=log_q,
        log_joint_at=lambda z: (log_p_x_z, log_p_z),
        log_posterior_at=lambda z, detached: log_q,
        rate=gaussian_kl_to_standard(mu, log_sigma) if prior == "standard" else None,
        log_posterior_pairs=lambda z: jnp.stack(each, axis=1),
        draw_prior=lambda: net.draw_prior(prior_rng, ROWS),
        weight=batch["mask"].astype(float),
        num_examples=NUM,
    )


RELAXED = ("gumbel_softmax", "straight_through")


def test_every_loss_is_its_objective_of_its_own_numbers():
    """Under a prior of its own where it can be; rows of padding do not count."""
    batch, rng = _masked_batch(), jax.random.key(2)
    numbers = {"beta": 0.3, "alpha": -0.6, "free_nats": 0.7, "mmd_weight": 5.0}
    names = [each for each in objectives.OBJECTIVES if each not in RELAXED]
    priors = {name: "standard" if name == "free_bits" else "mixture" for name in names}
    cases = {name: (prior, 3) for name, prior in priors.items()}
    cases |= {"tcvae": ("mixture", 1), "infovae": ("realnvp", 1)}

    @jax.jit
    def both(params):
        draws = {case: _draws(params[case[0]], batch, rng, *case) for case in cases.values()}
        found, expected = {}, {}
        for name, (prior, k) in cases.items():
            model = _build(prior=prior, objective=name, num_samples=k, **numbers)
            found[name] = model.loss_fn(params[prior], batch, rng)[0]
            objective, options = objectives.OBJECTIVES[name].cost, objectives.Options(**numbers)
            expected[name] = jnp.mean(objective(draws[prior, k], options)[batch["mask"]])
        return found, expected

    used = {prior for prior, _ in cases.values()}
    found, expected = both({prior: _params(_build(prior=prior)) for prior in used})
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)


def test_pixels_in_turn_are_a_distribution_and_the_sampler_draws_it():
    """With a window: Σ_x p(x | z) = 1 at any z, and draws at it have these frequencies."""
    model = _build(window=3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), _batch(1))
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(structure, [0.4 * rng.normal(size=p.shape) for p in leaves])
    x = np.array(list(itertools.product((0, 1), repeat=PIXELS)), np.float64)
    axis = np.linspace(-9, 9, 61)
    z = jnp.asarray(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 1, LATENTS))
    batch = {"x": jnp.asarray(x.reshape(-1, *SPEC.event_shape))}
    log_p_x_z, log_p_z = jax.jit(model.latents.log_joint)(params, batch, jnp.tile(z, (1, 64, 1)))
    np.testing.assert_allclose(special.logsumexp(log_p_x_z, axis=1), 0, atol=1e-12)
    # The window is at work: the pixels are not independent given z.
    p_x_z = np.exp(np.asarray(log_p_x_z)[30 * 61 + 30])
    each = x.T @ p_x_z
    covariance = np.einsum("n,ni,nj->ij", p_x_z, x, x) - np.outer(each, each)
    assert np.abs(np.triu(covariance, 1)).max() > 1e-3

    log_cell = 2 * np.log(axis[1] - axis[0])
    log_p_x = special.logsumexp(np.asarray(log_p_x_z + log_p_z), axis=0) + log_cell
    pairs = jax.jit(jax.vmap(lambda key: model.sample(params, key, 2)["x"]))
    drawn = np.asarray(pairs(jax.random.split(jax.random.key(3), 20_000))).reshape(-1, PIXELS)
    counts = np.bincount(drawn.astype(int) @ 2 ** np.arange(PIXELS)[::-1], minlength=64)
    assert stats.chisquare(counts, 40_000 * np.exp(log_p_x)).pvalue > 1e-4
    # No decoder to call without the pixels; reconstructions are draws.
    assert model.decode is None
    assert np.isin(jax.jit(model.reconstruct)(params, batch, jax.random.key(4)), (0, 1)).all()


def test_a_fresh_decoder_gives_the_training_mean():
    """Exactly at z = 0, where only the output bias speaks; clipped, so never a certainty."""
    mean = SPEC.mean.copy()
    mean[0, 0], mean[2, 1] = 0, 1
    spec = SPEC._replace(mean=mean)
    z = jnp.zeros((1, LATENTS))

    @jax.jit
    def decoded(key):
        params = _build(spec).init(key, _batch(1))  # whatever the activation
        models = [_build(spec, activation=name) for name in ("relu", "tanh", "gelu")]
        return [model.decode(params, z)[0] for model in models]

    for found in decoded(jax.random.key(0)):
        np.testing.assert_allclose(found, np.clip(mean, 1e-3, 1 - 1e-3), rtol=1e-5)


@pytest.mark.parametrize("raw", [1e4, -1e4])
def test_sigma_neither_explodes_nor_vanishes(raw):
    """Encoder outputs of ±1e4 in float32: sigma is 1e4 or 1e-4, with finite loss and gradient."""
    with jax.enable_x64(False):
        output = np.array([0.0, 0.0, raw, raw])  # mu = 0, then what sigma is made from

        def set_output(p):
            return np.zeros_like(p) if p.ndim == 2 else output

        params = _params(MODEL)
        params["vae"]["posterior"] = _map_layer(params["vae"]["posterior"], 2 * LATENTS, set_output)
        (loss, aux), gradient = loss_and_grad(params, _batch(), jax.random.key(1))
    sigma = 1e4 if raw > 0 else 1e-4
    rate = LATENTS * (0.5 * (sigma**2 - 1) - math.log(sigma))
    np.testing.assert_allclose(aux.terms["rate"], np.full(ROWS, rate), rtol=1e-6)
    assert loss.dtype == np.float32 and np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_an_encoder_run_wild_gives_finite_loss_and_gradients():
    """Its last layer times 1e4, in float32."""
    with jax.enable_x64(False):
        params = _params(MODEL)
        params["vae"]["posterior"] = _map_layer(
            params["vae"]["posterior"], 2 * LATENTS, lambda p: 1e4 * p
        )
        (loss, aux), gradient = loss_and_grad(params, _batch(), jax.random.key(1))
    assert np.min(aux.terms["rate"]) > 1e6  # the outputs were huge indeed
    assert loss.dtype == np.float32 and np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("value", [0.5, 255.0, -1.0, math.nan])
def test_init_refuses_x_that_is_not_binary(value):
    batch = _batch()
    batch["x"] = batch["x"].at[3, 1, 1, 0].set(value)
    with pytest.raises(UserError, match=r"x must be in \{0, 1\}"):
        _build().init(jax.random.key(0), batch)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("latents", v) for v in (0, -1)),
        *((f, v) for f in ("encoder", "decoder") for v in ((), (0,), (10, -1))),
        ("activation", "swisch"),
        *(("objective", v) for v in RELAXED),
        *(("beta", v) for v in (-0.1, math.nan)),
    ],
)
def test_check_refuses_a_bad_field_by_its_name(field, value):
    with pytest.raises(UserError, match=rf"model\.{field}="):
        vae.check(vae.Config(**{field: value}), SPEC)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        *(
            ({"posterior": "iaf", "objective": name, "num_samples": 2}, "at given z.*'iaf'")
            for name in ("stl", "dreg", "vimco")
        ),
        ({"prior": "mixture", "objective": "free_bits"}, "each latent in closed form"),
        ({"posterior": "full_covariance", "objective": "free_bits"}, "each latent in closed form"),
        ({"posterior": "full_covariance", "objective": "tcvae"}, "latent by latent"),
        ({"posterior": "iaf", "objective": "tcvae"}, "latent by latent"),
        ({"prior": "mixture", "objective": "infovae"}, "prior that can be differentiated"),
        ({"prior": "vamp", "posterior": "full_covariance"}, "a mixture of posteriors"),
        ({"prior": "vamp", "conditional": True}, "pseudo-inputs without labels"),
    ],
)
def test_check_refuses_choices_that_do_not_go_together(fields, reason):
    with pytest.raises(UserError, match=reason):
        vae.check(vae.Config(**(FIELDS | fields)), SPEC)


def test_check_refuses_data_that_is_not_binary():
    with pytest.raises(UserError, match=r"data\.binarisation"):
        vae.check(vae.Config(), SPEC._replace(support="uint8"))


def test_check_accepts_the_defaults_no_rate_and_what_is_tested_here():
    vae.check(vae.Config(), SPEC)
    vae.check(vae.Config(beta=0.0), SPEC)
    for fields in CASES:
        vae.check(vae.Config(**(FIELDS | fields)), SPEC)


def test_pseudo_inputs_are_refused_of_points():
    """They lie in [0, 1], as images do."""
    spec = DataSpec((2,), "real", np.zeros(2, np.float32))
    vae.check(vae.Config(likelihood="gaussian_mixture"), spec)
    with pytest.raises(UserError, match=r"model\.prior='vamp' needs images"):
        vae.check(vae.Config(likelihood="gaussian_mixture", prior="vamp"), spec)
