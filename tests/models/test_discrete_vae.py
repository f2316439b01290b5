"""A discrete VAE with few enough codes to enumerate: bounds, weights, gradients, draws."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from dgm_jax import objectives
from dgm_jax.core import DataSpec, UserError
from dgm_jax.models import discrete_vae

PIXELS, ROWS = 4, 16
SPEC = DataSpec((2, 2, 1), "binary", np.linspace(0.2, 0.8, PIXELS).reshape(2, 2, 1))
FIELDS = {
    "latents": 2,
    "classes": 3,
    "encoder": (4,),
    "decoder": (4,),
    "prior_hidden": (5,),
    "temperature": 0.7,
}
X = np.array(list(itertools.product((0.0, 1.0), repeat=PIXELS))).reshape(ROWS, 2, 2, 1)
BATCH, RNG = {"x": jnp.asarray(X)}, jax.random.key(0)
CASES = [
    {"prior": "uniform"},
    {"prior": "autoregressive"},
    {"prior": "autoregressive", "latents": 3, "classes": 2},
]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _build(**fields):
    return discrete_vae.build(discrete_vae.Config(**(FIELDS | fields)), SPEC)


def _params(model):
    leaves, structure = jax.tree.flatten(jax.eval_shape(model.init, RNG, BATCH))
    rng = np.random.default_rng(1)
    drawn = [jnp.asarray(0.8 * rng.normal(size=leaf.shape)) for leaf in leaves]
    return jax.tree.unflatten(structure, drawn)


def _enumerate(params, x=X, **fields):
    """log p(x | z), log p(z) and log q(z | x) of all z: `[C^L, B]`, `[C^L, 1]`, `[C^L, B]`."""
    config = discrete_vae.Config(**(FIELDS | fields))
    every = np.array(list(itertools.product(range(config.classes), repeat=config.latents)))

    @jax.jit
    def enumerated(params):
        net = discrete_vae.Net(config, SPEC).bind({"params": params["discrete_vae"]})
        z, log_q = jnp.asarray(np.eye(config.classes)[every]), net.log_posterior(jnp.asarray(x))
        log_q = sum(log_q[:, i, every[:, i]] for i in range(config.latents)).T
        logits, pixels = net.outputs(z)[..., 0], x.reshape(len(x), -1)
        log_on, log_off = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
        return log_on @ pixels.T + log_off @ (1 - pixels).T, net.log_prior(z)[:, None], log_q

    return enumerated(params)


@functools.cache
def _enumerated(**fields):
    """Of all images, at the parameters of these tests."""
    return jax.device_get(_enumerate(_params(_build(**fields)), **fields))


def _bound(parts, k):
    """E[log 1/K Σ_k w_k] `[B]` by enumeration of all sets of K codes, in their order."""
    log_lik, log_prior, log_q = parts
    log_w, num = log_lik + log_prior - log_q, len(log_q)
    sets = np.array(list(itertools.product(range(num), repeat=k))).T
    bounds = jax.nn.logsumexp(log_w[sets], axis=0) - math.log(k)
    return jnp.sum(jnp.exp(jnp.sum(log_q[sets], axis=0)) * bounds, axis=0)


@pytest.mark.parametrize("fields", CASES)
def test_bounds_rise_to_log_p_of_x(fields):
    """The 16 images' probabilities sum to 1; more draws come nearer; q weighs each w to p(x)."""
    log_lik, log_prior, log_q = parts = _enumerated(**fields)
    log_p_x = special.logsumexp(log_lik + log_prior, axis=0)
    for log_probs in (log_p_x, log_prior, log_q):
        np.testing.assert_allclose(special.logsumexp(log_probs, axis=0), 0, atol=1e-10)
    bounds = jax.jit(lambda parts: jnp.stack([_bound(parts, k) for k in (1, 2, 3)]))(parts)
    assert np.all(np.diff([*np.asarray(bounds), log_p_x], axis=0) > 0)


@functools.cache
def _log_weights(**fields):
    """4,000 of the model's own, with the ELBO at other keys, each `[4000, B]`."""
    with jax.enable_x64(True):
        model = _build(**fields)
        params = _params(model)

        def one(key):
            first, second = jax.random.split(key)
            elbo = model.log_likelihood_fns["elbo"](params, BATCH, second)
            return model.log_weight(params, BATCH, first), elbo

        keys = jax.random.split(jax.random.key(1), 4000)
        return jax.device_get(jax.jit(jax.vmap(one))(keys))


@pytest.mark.parametrize("fields", CASES)
def test_weights_are_those_of_codes_drawn_from_q(fields):
    """Each is one of the enumerated ones, and comes as often as q says: chi-square."""
    log_lik, log_prior, log_q = _enumerated(**fields)
    found, _ = _log_weights(**fields)
    gaps = np.abs(found[:, None] - (log_lik + log_prior - log_q))  # [draws, codes, B]
    assert gaps.min(axis=1).max() < 1e-9
    for b in range(ROWS):
        counts = np.bincount(gaps[:, :, b].argmin(axis=1), minlength=len(log_q))
        expected = len(found) * np.exp(log_q[:, b])
        often = expected > 5
        pooled = [np.append(c[often], c[~often].sum() + 1e-9) for c in (counts, expected)]
        assert stats.chisquare(*pooled, sum_check=False).pvalue > 1e-5


@pytest.mark.parametrize("fields", CASES)
def test_the_elbo_is_that_of_the_discrete_model(fields):
    """Its mean is the enumerated one, by a rate in closed form or by draws."""
    expected = jax.jit(_bound, static_argnums=1)(_enumerated(**fields), 1)
    for draws in _log_weights(**fields):
        error = draws.std(axis=0, ddof=1) / math.sqrt(len(draws))
        assert np.all(np.abs(draws.mean(axis=0) - expected) < 4.5 * error)


@functools.cache
def _losses(prior):
    """What the loss of each objective gives for the same key."""
    models = {
        objective: _build(prior=prior, objective=objective, num_samples=2)
        for objective in objectives.usable(discrete_vae.PROVIDED)
    }

    @jax.jit
    def losses(params):
        return {name: model.loss_fn(params, BATCH, RNG) for name, model in models.items()}

    return jax.device_get(losses(_params(_build(prior=prior))))


def test_the_rate_to_a_uniform_prior_is_the_enumerated_divergence():
    _, log_prior, log_q = _enumerated(prior="uniform")
    expected = np.sum(np.exp(log_q) * (log_q - log_prior), axis=0)
    for _, aux in _losses("uniform").values():
        np.testing.assert_allclose(aux.terms["rate"], expected, rtol=1e-10)


@pytest.mark.parametrize("prior", discrete_vae.PRIORS)
def test_terms_are_of_discrete_draws_whatever_the_objective(prior):
    """The same key, the same draws; straight-through has their cost, Gumbel-softmax another."""
    costs, terms = {}, {}
    for objective, (cost, aux) in _losses(prior).items():
        costs[objective] = cost
        terms[objective] = np.stack([aux.terms["distortion"], aux.terms["rate"]])
    for found in terms.values():
        np.testing.assert_allclose(found, terms["vimco"], rtol=1e-12)
    total = np.mean(np.sum(terms["vimco"], axis=0))
    np.testing.assert_allclose(costs["straight_through"], total, rtol=1e-12)
    assert abs(costs["gumbel_softmax"] - total) > 1e-3


def _mean_gradients(model, params, batch, num):
    """Mean over `num` keys of the loss's gradient, and its standard error, by player's part."""
    keys = jax.random.split(jax.random.key(2), num)
    grad = jax.grad(lambda p, key: model.loss_fn(p, batch, key)[0])
    found = jax.vmap(grad, (None, 0))(params, keys)["discrete_vae"]
    mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), found)
    error = jax.tree.map(lambda g: jnp.std(g, axis=0, ddof=1) / math.sqrt(num), found)
    return mean, error


def _exact_gradients(params, x, k, **fields):
    """Of minus the enumerated bound."""
    cost = lambda params: -jnp.mean(_bound(_enumerate(params, x, **fields), k))  # noqa: E731
    return jax.jit(jax.grad(cost))(params)["discrete_vae"]


FEW = X[[1, 6, 13]]


@pytest.mark.parametrize("fields", CASES[:2])
def test_the_mean_of_vimco_is_the_gradient_of_the_enumerated_bound(fields):
    model = _build(objective="vimco", num_samples=2, **fields)
    params = _params(model)
    batch = {"x": jnp.asarray(FEW)}
    mean, error = jax.jit(lambda p: _mean_gradients(model, p, batch, 10_000))(params)
    exact = _exact_gradients(params, FEW, 2, **fields)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(exact)) > 0.05

    def close(m, e, g):
        assert np.all(np.abs(m - g) < 4.5 * e + 1e-12)

    jax.tree.map(close, mean, error, exact)


@pytest.mark.parametrize("fields", CASES[:2])
def test_straight_through_has_the_elbos_gradient_in_decoder_and_prior(fields):
    """Their part sees the discrete draws: unbiased. The encoder's is not, and differs."""
    model = _build(objective="straight_through", **fields)
    params = _params(model)
    batch = {"x": jnp.asarray(FEW)}
    mean, error = jax.jit(lambda p: _mean_gradients(model, p, batch, 10_000))(params)
    exact = _exact_gradients(params, FEW, 1, **fields)
    distance = jax.tree.map(lambda m, e, g: np.max(np.abs(m - g) / (e + 1e-9)), mean, error, exact)
    for name in set(distance) & {"decoder", "prior"}:
        assert max(jax.tree.leaves(distance[name])) < 4.5
    assert max(jax.tree.leaves(distance["head"])) > 8


@pytest.mark.parametrize("fields", CASES[:2])
def test_the_gradient_of_gumbel_softmax_tends_to_the_elbos(fields):
    """At temperature 2 the encoder's is off; at 0.1 hardly."""
    model = _build(**fields)
    params = _params(model)
    exact = _exact_gradients(params, FEW, 1, **fields)["head"]["kernel"]

    @jax.jit
    def gradients(temperature):
        model = _build(temperature=temperature, **fields)
        return _mean_gradients(model, params, {"x": jnp.asarray(FEW)}, 20_000)

    def miss(temperature):
        mean, error = gradients(temperature)
        gap = np.linalg.norm(mean["head"]["kernel"] - exact) / np.linalg.norm(exact)
        return gap, np.linalg.norm(error["head"]["kernel"]) / np.linalg.norm(exact)

    (warm, _), (cold, error) = miss(2.0), miss(0.1)
    assert error < 0.05
    assert cold < 0.05 + 3 * error
    assert warm > 3 * cold


def test_draws_have_the_classes_probabilities_and_relax_to_themselves():
    """Frequencies by chi-square; relaxed draws lie on the simplex, and at low τ at the corners."""
    log_probs = jnp.log(jnp.array([[[0.5, 0.3, 0.15, 0.05]]]))
    draw = jax.jit(lambda tau: discrete_vae.gumbel_draw(RNG, log_probs, 40_000, tau))
    z, relaxed = map(np.asarray, draw(0.5))
    assert z.shape == relaxed.shape == (40_000, 1, 1, 4)
    expected = 40_000 * np.exp(log_probs)[0, 0]
    assert stats.chisquare(z.sum(axis=(0, 1, 2)), expected).pvalue > 1e-4
    np.testing.assert_allclose(relaxed.sum(axis=-1), 1, rtol=1e-12)
    np.testing.assert_array_equal(relaxed.argmax(axis=-1), z.argmax(axis=-1))
    assert np.abs(relaxed - z).mean() > 0.1
    cold, corners = map(np.asarray, draw(1e-5)[::-1])
    np.testing.assert_array_equal(corners, z)
    assert np.abs(cold - z).mean() < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_relaxed_bernoulli_draws_have_the_gradient_of_their_integral(temperature):
    """z_1 = sigmoid((l + e) / τ) with e logistic: d E[z_1] / d l by quadrature.

    It tends to that of the probability sigmoid(l) itself.
    """
    logit = 0.8

    def slope(temperature):
        inner = lambda u: stats.logistic.pdf(u) * stats.logistic.pdf(temperature * u - logit)  # noqa: E731
        return integrate.quad(inner, -60, 60)[0]

    def total(logit):
        log_probs = jax.nn.log_softmax(jnp.stack([0.0 * logit, logit]))[None, None]
        return discrete_vae.gumbel_draw(RNG, log_probs, 100_000, temperature)[1][:, 0, 0, 1]

    slopes = np.asarray(jax.jit(lambda logit: jax.jvp(total, (logit,), (1.0,))[1])(logit))
    error = slopes.std(ddof=1) / math.sqrt(len(slopes))
    assert abs(slopes.mean() - slope(temperature)) < 4 * error
    exact = special.expit(logit) * special.expit(-logit)
    assert abs(slope(temperature) - exact) > 5e-3
    np.testing.assert_allclose(slope(1e-3), exact, rtol=1e-5)


@pytest.mark.parametrize("prior", discrete_vae.PRIORS)
def test_samples_have_the_models_distribution(prior):
    model = _build(prior=prior)
    params = _params(model)
    pairs = jax.jit(jax.vmap(lambda p, key: model.sample(p, key, 2)["x"], (None, 0)))
    x = np.asarray(pairs(params, jax.random.split(jax.random.key(3), 10_000)))
    index = x.reshape(-1, PIXELS).astype(int) @ 2 ** np.arange(PIXELS)[::-1]
    log_lik, log_prior, _ = _enumerated(prior=prior)
    expected = 20_000 * np.exp(special.logsumexp(log_lik + log_prior, axis=0))
    assert stats.chisquare(np.bincount(index, minlength=ROWS), expected).pvalue > 1e-4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latents", 0),
        ("classes", 1),
        ("network", "transformer"),
        ("encoder", ()),
        ("decoder", (3, 0)),
        ("prior_hidden", (-1,)),
        ("activation", "swisch"),
        ("likelihood", "poisson"),
        ("prior", "standard"),
        ("objective", "elbo"),
        ("objective", "dreg"),
        ("num_samples", 0),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("beta", -1.0),
    ],
)
def test_check_refuses_a_bad_field_by_its_name(field, value):
    with pytest.raises(UserError, match=rf"model\.{field}="):
        discrete_vae.check(discrete_vae.Config(**(FIELDS | {field: value})), SPEC)


def test_check_refuses_vimco_with_one_draw():
    with pytest.raises(UserError, match=r"model\.num_samples=1: 'vimco'"):
        discrete_vae.check(discrete_vae.Config(**FIELDS, objective="vimco"), SPEC)
