"""Flows are densities, bounds are bounds, and draws have what the scorer says of them.

Normalisation by quadrature and by enumeration; parameters are random: a fresh flow proves little.
"""

import functools
import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from dgm_jax import models
from dgm_jax.core import DataSpec, UserError
from dgm_jax.evaluators.likelihood import importance_weighted
from dgm_jax.models import flow

# Compiling takes most of the time of these tests: none of it goes into faster code.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
PLANE = DataSpec((2,), "real", np.zeros(2, np.float32), 100)
BITS = DataSpec((2, 2, 1), "binary", np.full((2, 2, 1), 0.5, np.float32), 100)
GREY = BITS._replace(support="uint8", mean=np.full((2, 2, 1), 100, np.float32))
SMALL = flow.Config(hidden=(7,), steps=(2,), bins=3, bound=2.0)
KINDS = {
    "affine": replace(SMALL, transform="affine"),
    "spline": SMALL,
    "maf": replace(SMALL, transform="affine", structure="autoregressive"),
    "autoregressive spline": replace(SMALL, structure="autoregressive"),
    "logistic base": replace(SMALL, base="logistic", transform="affine", steps=(1,)),
}


def _params(model, spec, scale=0.3, seed=1):
    """Random numbers everywhere."""
    x = jnp.zeros((3, *spec.event_shape))
    shapes = jax.eval_shape(model.init, jax.random.key(0), {"x": x})
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    leaves = [jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, leaves)


# Real vectors: exact.


@functools.cache
def _density_and_draws(kind):
    """Cell masses `[40, 40]` of a box by quadrature, its sides, and draws `[N, 2]`."""
    model = flow.build(KINDS[kind], PLANE)
    params = _params(model, PLANE)
    draws = jit(lambda rng: model.sample(params, rng, 40_000)["x"])(jax.random.key(1))
    reach = 1.5 * float(np.abs(draws).max())
    cells, fine = 40, 20
    middles = reach * (2 * (np.arange(cells * fine) + 0.5) / (cells * fine) - 1)
    points = np.stack(np.meshgrid(middles, middles, indexing="ij"), axis=-1).reshape(-1, 2)
    log_prob = jit(lambda x: model.log_likelihood_fns["log_prob"](params, {"x": x}, None))
    mass = np.exp(np.asarray(log_prob(points.astype(np.float32)), np.float64))
    mass = mass.reshape(cells, fine, cells, fine).sum(axis=(1, 3)) * (middles[1] - middles[0]) ** 2
    return mass, np.linspace(-reach, reach, cells + 1), np.asarray(draws, np.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_integrates_to_one(kind):
    mass, _, _ = _density_and_draws(kind)
    np.testing.assert_allclose(mass.sum(), 1, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_density(kind):
    """A histogram against the probability of each cell: chi-square."""
    mass, sides, draws = _density_and_draws(kind)
    counts = np.histogram2d(*draws.T, [sides, sides])[0]
    expected = counts.sum() * mass / mass.sum()
    often = expected > 10
    observed, expected = (np.append(c[often], c[~often].sum()) for c in (counts, expected))
    assert often.sum() > 30
    assert stats.chisquare(observed, expected).pvalue > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_noise_and_decode_to_the_data(kind):
    model = flow.build(KINDS[kind], PLANE)
    params, x = _params(model, PLANE), jax.random.normal(jax.random.key(0), (50, 2))
    z = jit(lambda x: model.encode(params, {"x": x}, None))(x)
    np.testing.assert_allclose(jit(model.decode)(params, z), x, rtol=1e-4, atol=1e-4)
    assert np.abs(z - x).max() > 0.1


@pytest.mark.parametrize("structure", flow.STRUCTURES)
def test_a_gaussian_is_learned_to_its_entropy(structure):
    """One affine step is a Gaussian: the best cost is the data's entropy, here of 3 dimensions."""
    spec = DataSpec((3,), "real", np.zeros(3, np.float32), 1000)
    rng = np.random.default_rng(0)
    white = np.linalg.qr(rng.normal(size=(3000, 3)) - 0.0)[0]
    white = white - white.mean(axis=0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T, bias=True)).T)
    root = np.array([[2.0, 0, 0], [-1.0, 0.5, 0], [0.7, 0.3, 0.2]])
    x = jnp.asarray(white @ root.T + [5, -3, 0], jnp.float32)  # of covariance root rootᵀ exactly
    entropy = 1.5 * math.log(2 * math.pi * math.e) + math.log(2.0 * 0.5 * 0.2)
    config = replace(SMALL, transform="affine", structure=structure, steps=(1,))
    model = flow.build(config, spec)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 600))

    @jit
    def train(params):
        def step(state, _):
            params, opt_state = state
            (loss, _), grads = jax.value_and_grad(model.loss_fn, has_aux=True)(
                params, {"x": x}, jax.random.key(0)
            )
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), loss

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=600)
        return model.loss_fn(params, {"x": x}, jax.random.key(0))[0]

    found = float(train(jit(model.init)(jax.random.key(0), {"x": x})))
    # Of the sample a richer flow than a Gaussian may learn a little more than its second moments.
    assert entropy - 0.02 < found < entropy + 0.005


# Discrete data: a bound.


def _uniform(spec):
    """The flow that is the identity on logistic noise: uniform on [0, 1]."""
    config = replace(SMALL, base="logistic", margin=0.0)
    model = flow.build(config, spec)
    return model, jax.tree.map(lambda a: 0 * a, _params(model, spec))


def test_the_uniform_model_of_bytes_has_8_bits_for_each_dimension():
    spec = DataSpec((4, 4, 3), "uint8", np.zeros((4, 4, 3), np.float32))
    model, params = _uniform(spec)
    x = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3)).astype(np.float32)
    x[0], x[1] = 0, 255
    elbo = jit(model.log_likelihood_fns["elbo"])(params, {"x": x}, jax.random.key(0))
    np.testing.assert_allclose(-elbo / (48 * math.log(2)), 8.0, rtol=1e-6)


def test_the_uniform_model_draws_every_value_alike():
    model, params = _uniform(GREY)
    samples = jit(model.sample, static_argnums=2)(params, jax.random.key(0), 20_000)
    counts = np.bincount(np.ravel(samples["x"]).astype(int), minlength=256)
    assert len(counts) == 256 and stats.chisquare(counts).pvalue > 1e-3


DISCRETE = {
    "uniform noise": replace(SMALL, margin=0.0),
    "variational noise": replace(
        SMALL, margin=0.0, transform="affine", dequantisation="variational"
    ),
    "images": replace(SMALL, margin=0.0, network="conv", hidden=(3,), dequantisation="variational"),
    "margin": replace(SMALL, margin=0.1, network="conv", hidden=(3,)),
}
DISCRETE["images"] = replace(DISCRETE["images"], steps=(1,), dequantisation_steps=1)


@functools.cache
def _probabilities(name):
    """Importance-weighted estimates of p(x) of all 16 images of 4 bits, and their errors."""
    model = flow.build(DISCRETE[name], BITS)
    params = _params(model, BITS, 0.15)  # more, and the weights have heavy tails
    states = np.array(list(itertools.product((0, 1), repeat=4)), np.float32).reshape(-1, 2, 2, 1)
    one = lambda rng: model.log_weight(params, {"x": states}, rng)  # noqa: E731
    weights = jit(lambda keys: jax.lax.map(one, keys, batch_size=250))(
        jax.random.split(jax.random.key(2), 8000)
    )
    weights = np.exp(np.asarray(weights, np.float64))
    return model, params, weights.mean(axis=0), weights.std(axis=0) / math.sqrt(len(weights))


@pytest.mark.parametrize("name", DISCRETE)
def test_probabilities_of_all_images_sum_to_one(name):
    """With a margin to less: the rest lies beyond the data's range."""
    _, _, p, errors = _probabilities(name)
    total, error = p.sum(), math.sqrt((errors**2).sum())
    assert error < 0.02 and p.std() > 0.01
    if DISCRETE[name].margin:
        assert 0.5 < total < 1 - 5 * error
    else:
        assert abs(total - 1) < 5 * error


@pytest.mark.parametrize("name", [n for n in DISCRETE if not DISCRETE[n].margin])
def test_draws_have_the_probabilities_that_the_scorer_gives(name):
    model, params, p, errors = _probabilities(name)
    x = jit(model.sample, static_argnums=2)(params, jax.random.key(3), 10_000)["x"]
    counts = np.bincount((np.asarray(x).reshape(-1, 4) @ [8, 4, 2, 1]).astype(int), minlength=16)
    drawn = counts / counts.sum()
    error = np.sqrt(errors**2 + p * (1 - p) / counts.sum())
    assert (np.abs(drawn - p) < 5 * error).all()


def test_what_lies_beyond_the_range_is_the_mass_that_is_missing():
    """At the margin α: the share of logits outside those of [0, 1]."""
    _, params, p, errors = _probabilities("margin")
    config = DISCRETE["margin"]
    net = flow.flow(config, BITS)
    z = jax.random.normal(jax.random.key(5), (20_000, 4))
    variables = {"params": params["flow"]["net"]}
    line, _ = jit(lambda z: net.apply(variables, z, inverse=True))(z)
    most = math.log((1 - config.margin) / config.margin)
    inside = np.mean((np.abs(line) < most).reshape(len(z), -1).all(axis=1))
    error = math.sqrt((errors**2).sum() + 0.25 / len(z))
    assert abs(p.sum() - inside) < 5 * error


@pytest.mark.parametrize("name", ["uniform noise", "variational noise"])
def test_the_bound_rises_to_the_log_probability(name):
    """More draws of the noise, a tighter bound (and never above, but by chance)."""
    model, params, p, _ = _probabilities(name)
    states = np.array(list(itertools.product((0, 1), repeat=4)), np.float32).reshape(-1, 2, 2, 1)
    keys = jax.random.split(jax.random.key(4), 16)
    bounds = jit(importance_weighted(model, 1000, 250))(params, {"x": states}, keys)
    curve = [np.mean(bounds[f"importance_weighted_bound_{k}"]) for k in (1, 10, 100)]
    assert curve[0] < curve[1] < curve[2] < np.mean(np.log(p)) + 0.01
    assert np.mean(np.log(p)) - curve[2] < 0.1 < np.mean(np.log(p)) - curve[0]


def test_the_logit_is_that_of_the_scaled_data_with_autodiffs_slope():
    with jax.enable_x64(True):
        x = jnp.asarray([[0.0, 17.0, 254.0, 255.0]])
        v = jnp.asarray([[-3.0, 0.5, 1.0, 4.0]])
        for margin in (0.0, 0.05):
            line, log_det = flow.to_line(x, v, 256, margin)
            u = 1 / (1 + np.exp(-np.asarray(v)))
            y = margin + (1 - 2 * margin) * (np.asarray(x) + u) / 256
            np.testing.assert_allclose(line, np.log(y) - np.log(1 - y), rtol=1e-9)
            by_v = jax.grad(lambda v, m=margin: jnp.sum(flow.to_line(x, v, 256, m)[0]))(v)
            expected = np.sum(np.log(np.asarray(by_v) / (u * (1 - u))))
            np.testing.assert_allclose(log_det, [expected], rtol=1e-9)
            np.testing.assert_array_equal(flow.from_line(line, 256, margin), x)


@pytest.mark.parametrize("v", [-80.0, -20.0, 20.0, 80.0])
def test_noise_at_the_ends_of_its_bin_is_finite(v):
    """In float32 255 + u is 256 for u near 1, and the logit of 1 infinite."""
    x = jnp.asarray([[0.0, 255.0]])
    line, log_det = flow.to_line(x, jnp.full((1, 2), v), 256, 0.0)
    assert np.isfinite(line).all() and np.isfinite(log_det).all()


def test_variational_noise_starts_as_uniform_noise():
    """The same draws have the same weights: its two steps reverse the order twice."""
    both = [
        replace(DISCRETE["variational noise"], dequantisation=name) for name in flow.DEQUANTISATIONS
    ]
    uniform, variational = (flow.build(config, BITS) for config in both)
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (40, 2, 2, 1)), jnp.float32)
    params = jit(variational.init)(jax.random.key(0), {"x": x})
    found = [jit(m.log_weight)(params, {"x": x}, jax.random.key(1)) for m in (uniform, variational)]
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_variational_noise_is_learned():
    """The gradient of the bound reaches every parameter of q(u | x)."""
    model = flow.build(replace(DISCRETE["variational noise"], steps=(1,)), BITS)
    params = _params(model, BITS)
    x = jnp.zeros((2, 2, 2, 1)).at[1].set(1)
    grads = jit(jax.grad(lambda p: model.loss_fn(p, {"x": x}, jax.random.key(0))[0]))(params)
    assert all((g != 0).any() for g in jax.tree.leaves(grads["flow"]["dequantiser"]))


def test_pictures_decode_from_their_codes():
    config = replace(KINDS["affine"], network="conv", hidden=(3,), steps=(1, 1))
    spec = DataSpec((4, 4, 1), "uint8", np.zeros((4, 4, 1), np.float32))
    model = flow.build(config, spec)
    params = _params(model, spec)
    x = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1)).astype(np.float32)
    z = jit(lambda x: model.encode(params, {"x": x}, None))(x)
    assert z.shape == (5, 16)
    np.testing.assert_allclose(jit(model.decode)(params, z), x / 255, atol=1e-6)


def test_the_model_is_as_its_data():
    real, discrete = flow.build(SMALL, PLANE), flow.build(SMALL, BITS)
    assert set(real.log_likelihood_fns) == {"log_prob"} and real.log_weight is None
    assert set(discrete.log_likelihood_fns) == {"elbo"} and discrete.log_weight is not None
    assert real.reconstruct is None and real.latents is None
    assert models.get("flow") is flow


# Bad input.


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("transform", "cubic", ("affine, spline",)),
        ("structure", "parallel", ("coupling, autoregressive",)),
        ("base", "uniform", ("gaussian, logistic",)),
        ("dequantisation", "none", ("uniform, variational",)),
        ("network", "resnet", ("mlp, conv",)),
        ("activation", "sine", ("relu",)),
        ("hidden", (), ("widths",)),
        ("steps", (), ("at least 1",)),
        ("steps", (0,), ("at least 1",)),
        ("steps", (2, 2), ("one level",)),
        ("dequantisation_steps", 0, ("at least 1",)),
        ("bins", 1, ("2 to 100",)),
        ("bound", 0.0, ("above 0",)),
        ("bound", math.nan, ("above 0",)),
        ("margin", -0.1, ("at least 0",)),
        ("margin", 0.5, ("below 0.5",)),
        ("margin", math.nan, ("at least 0",)),
    ],
)
def test_check_refuses_a_bad_value_by_its_name(field, value, words):
    with pytest.raises(UserError) as refused:
        flow.check(replace(SMALL, **{field: value}), BITS)
    message = str(refused.value)
    assert f"model.{field}={value!r}" in message and "\n" not in message
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("changes", "spec", "message"),
    [
        ({}, PLANE._replace(support="tokens", vocabulary=5), "tokens are in no order"),
        ({}, PLANE._replace(event_shape=(1,)), "at least two dimensions"),
        ({"dequantisation": "variational"}, PLANE, r"model\.dequantisation.*real data need none"),
        ({"network": "conv"}, PLANE, r"model\.network='conv'.*\(2,\)"),
        ({"network": "conv", "structure": "autoregressive"}, BITS, "needs model.network='mlp'"),
        ({"activation": "gated", "structure": "autoregressive"}, BITS, "model.activation='gated'"),
        (
            {"network": "conv", "steps": (1, 1)},
            BITS,
            r"model\.steps=\(1, 1\).*2 times.*\(2, 2, 1\)",
        ),
    ],
)
def test_check_refuses_what_does_not_fit_together(changes, spec, message):
    with pytest.raises(UserError, match=message) as refused:
        flow.check(replace(SMALL, **changes), spec)
    assert "\n" not in str(refused.value)


def test_data_outside_their_support_are_refused():
    model = flow.build(SMALL, PLANE)
    with pytest.raises(UserError, match="finite"):
        model.init(jax.random.key(0), {"x": jnp.full((3, 2), jnp.nan)})
