"""Two layers of one latent each and four binary pixels, where everything can be integrated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dgm_jax.core import DataSpec, UserError
from dgm_jax.likelihoods import LIKELIHOODS
from dgm_jax.models import topdown

PIXELS, ROWS = 4, 16
SPEC = DataSpec((2, 2, 1), "binary", np.full((2, 2, 1), 0.4, np.float32), 100)
X = np.array([[i >> j & 1 for j in range(PIXELS)] for i in range(ROWS)], float)
BATCH = {"x": jnp.asarray(X.reshape(ROWS, 2, 2, 1))}
# Both layers at the resolution of one pixel.
FIELDS = {"layers": (0, 2), "latents": 1, "channels": 2, "width": 2}
AXIS = np.linspace(-9, 9, 181)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _build(**fields):
    return topdown.build(topdown.Config(**(FIELDS | fields)), SPEC)


def _random(model, batch=BATCH):
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: 0.5 * rng.normal(size=p.shape), shapes)


def _params():
    return _random(_build())


def _pairs():
    """Every pair on the grid: z_1 `[N², 1]`, z_2 `[N², 1]`."""
    return [a.reshape(-1, 1) for a in np.meshgrid(AXIS, AXIS, indexing="ij")]


@functools.cache
def _exact():
    """log p(x) of all 16 images, by the joint density on a grid of (z_1, z_2)."""
    params, log_joint = _params(), jax.jit(_build().latents.log_joint)
    z = tuple(jnp.asarray(a.reshape(-1, 1, 1, 1, 1)) for a in _pairs())
    cell = 2 * np.log(AXIS[1] - AXIS[0])
    log_p = []
    for i in range(ROWS):
        batch = {"x": BATCH["x"][i : i + 1]}
        log_lik, log_prior = log_joint(params, batch, z)
        log_p.append(special.logsumexp(np.asarray(log_lik + log_prior)[:, 0]) + cell)
    np.testing.assert_allclose(special.logsumexp(log_prior) + cell, 0, atol=1e-5)
    return np.array(log_p)


def _draws(fn, num):
    return np.asarray(jax.jit(jax.vmap(fn))(jax.random.split(jax.random.key(2), num)))


def _error(draws):
    return draws.std(axis=0, ddof=1) / np.sqrt(len(draws))


def test_weights_are_unbiased_and_the_elbo_is_a_bound():
    params, model = _params(), _build()
    exact = _exact()
    np.testing.assert_allclose(special.logsumexp(exact), 0, atol=1e-5)  # Σ_x p(x) = 1
    log_w = _draws(lambda key: model.log_weight(params, BATCH, key), 20_000)
    w = np.exp(log_w)
    assert (np.abs(w.mean(axis=0) - np.exp(exact)) < 4.5 * _error(w)).all()
    elbo = model.log_likelihood_fns["elbo"]
    bounds = _draws(lambda key: elbo(params, BATCH, key), 4000)
    assert (bounds.mean(axis=0) < exact).all()
    # The closed-form rates have the mean of the sampled ones, and a smaller spread.
    error = np.hypot(_error(bounds), _error(log_w))
    assert (np.abs(bounds.mean(axis=0) - log_w.mean(axis=0)) < 4.5 * error).all()


def test_each_layers_rate_is_the_mean_of_its_log_ratio():
    """In closed form given the layers above; z_1 is the lower of the two."""
    params, model = _params(), _build(num_samples=4)
    terms = _draws(lambda key: model.loss_fn(params, BATCH, key)[1].terms["rate_2"], 4)
    np.testing.assert_allclose(terms, np.broadcast_to(terms[:1], terms.shape), rtol=1e-9)
    net = topdown.Net(topdown.Config(**FIELDS), SPEC).bind({"params": params["topdown"]})

    def one(key):
        found = {}

        def choose(layer, q, p):
            z = topdown.draw_gaussian(jax.random.fold_in(key, layer), q(), 1)
            log_q, log_p = (topdown.gaussian_log_prob(z, *each) for each in (q(), p))
            found[layer] = (log_q - log_p).reshape(ROWS)
            return z

        net.down(net.features(BATCH["x"]), (1, ROWS), choose)
        return found

    ratios = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(5), 8000))
    rates = _draws(lambda key: model.loss_fn(params, BATCH, key)[1].terms["rate_1"], 2000)
    assert (np.abs(ratios[1].mean(axis=0) - terms[0]) < 4.5 * _error(np.asarray(ratios[1]))).all()
    error = np.hypot(_error(rates), _error(np.asarray(ratios[0])))
    assert (np.abs(ratios[0].mean(axis=0) - rates.mean(axis=0)) < 4.5 * error).all()


def test_at_the_start_every_layer_is_the_standard_gaussian():
    """q = p = N(0, 1) with zero heads: the rate is exactly 0, and z does not depend on x."""
    model = _build()
    params = jax.jit(model.init)(jax.random.key(0), BATCH)
    terms = jax.jit(model.loss_fn)(params, BATCH, jax.random.key(1))[1].terms
    np.testing.assert_allclose(terms["rate"], 0, atol=1e-7)
    z = jnp.zeros((1, ROWS, 1, 1, 1)), jnp.ones((1, ROWS, 1, 1, 1))
    _, log_prior = jax.jit(model.latents.log_joint)(params, BATCH, z)
    np.testing.assert_allclose(log_prior, stats.norm.logpdf([0, 1]).sum(), atol=1e-6)


def test_free_bits_charge_each_layer_its_mean_rate_or_the_least_allowed():
    """distortion + β Σ_l max(mean rate of layer l over the real rows, λ): below it, and above."""
    params, rng, least = _params(), jax.random.key(6), 0.51
    real = np.arange(ROWS) % 3 != 1
    model = _build(objective="free_bits", num_samples=2, beta=0.4, free_nats=least)
    loss, aux = jax.jit(model.loss_fn)(params, BATCH | {"mask": real}, rng)
    rates = [np.mean(aux.terms[name][real]) for name in ("rate_1", "rate_2")]
    assert min(rates) < least < max(rates)
    expected = np.mean(aux.terms["distortion"][real]) + 0.4 * (least + max(rates))
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_samples_have_the_models_distribution():
    params, model = _params(), _build()
    samples = jax.jit(model.sample, static_argnums=2)(params, jax.random.key(4), 40_000)
    index = np.asarray(samples["x"]).reshape(-1, PIXELS) @ (1 << np.arange(PIXELS))
    found = np.bincount(index.astype(int), minlength=ROWS) / 40_000
    p = np.exp(_exact())
    assert (np.abs(found - p) < 4.5 * np.sqrt(p * (1 - p) / 40_000)).all()


def test_codes_are_decoded_in_the_order_in_which_they_lie():
    """Layers of different sizes: decode(encode(x)) is the picture at the posterior means."""
    config = topdown.Config(layers=(1, 1), latents=2, channels=3, width=2)
    model = topdown.build(config, SPEC)
    assert model.layer_sizes == (2 * 2 * 2, 2)
    params = _random(model)
    codes = jax.jit(model.encode)(params, BATCH, jax.random.key(0))
    assert codes.shape == (ROWS, 10)
    net = topdown.Net(config, SPEC).bind({"params": params["topdown"]})

    @jax.jit
    def at_the_means(x):
        return net.down(net.features(x), (1, ROWS), lambda layer, q, p: q()[0])[1]

    expected = special.expit(np.asarray(at_the_means(BATCH["x"]))[0, ..., 0])
    found = np.asarray(jax.jit(model.decode)(params, codes)).reshape(ROWS, PIXELS)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood_and_odd_sides(likelihood):
    event = (5, 6, 3)
    support = LIKELIHOODS[likelihood]().support
    spec = DataSpec(event, support, np.full(event, 0.4, np.float32), 100)
    model = topdown.build(topdown.Config(layers=(0, 1, 1), channels=2, width=2), spec)
    batch = {"x": jnp.ones((2, *event))}
    params = _random(model, batch)
    assert np.isfinite(jax.jit(model.log_weight)(params, batch, jax.random.key(1))).all()
    samples = jax.jit(model.sample, static_argnums=2)(params, jax.random.key(1), 3)
    assert samples["x"].shape == (3, *event)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("layers", v) for v in ((), (0, 0), (1, -1), (0.5,))),
        *((f, 0) for f in ("latents", "channels", "width", "num_samples")),
        *(("activation", v) for v in ("gated", "sine")),
        *(("objective", v) for v in ("infovae", "tcvae")),
        ("likelihood", "gaussian"),
        ("beta", -1.0),
        ("free_nats", -1.0),
    ],
)
def test_check_refuses_a_bad_value_by_its_name(field, value):
    fields = FIELDS | ({"objective": "free_bits"} if field == "free_nats" else {})
    with pytest.raises(UserError, match=rf"model\.{field}="):
        topdown.check(topdown.Config(**(fields | {field: value})), SPEC)


def test_check_refuses_what_are_no_images():
    with pytest.raises(UserError, match=r"model\.name='topdown' needs images, and x is \(2,\)"):
        topdown.check(topdown.Config(), DataSpec((2,), "real", np.zeros(2, np.float32), 100))


def test_check_accepts_its_defaults():
    topdown.check(topdown.Config(), SPEC)


def test_what_layers_add_to_the_state_is_of_unit_size_together():
    """A matrix of each layer has fan-in variance 1 / L (Child 2021, section 3)."""
    spec = DataSpec((8, 8, 1), "binary", np.full((8, 8, 1), 0.5, np.float32), 100)
    config = topdown.Config(layers=(0, 8), latents=64, channels=64, width=8)
    model = topdown.build(config, spec)
    params = model.init(jax.random.key(0), {"x": jnp.zeros((1, 8, 8, 1))})
    leaves = jax.tree_util.tree_leaves_with_path(params)
    kernels = [leaf for path, leaf in leaves if "from_z" in str(path) and "kernel" in str(path)]
    assert len(kernels) == 8
    np.testing.assert_allclose(sum(kernel.var() * len(kernel) for kernel in kernels), 1, rtol=0.05)
