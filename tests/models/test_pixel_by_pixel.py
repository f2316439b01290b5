"""MADE and PixelCNN: normalised, blind to what comes later, and drawn as they are scored."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dgm_jax.core import DataSpec, UserError
from dgm_jax.models import made, pixelcnn

SPEC = DataSpec((3, 3, 1), "binary", np.full((3, 3, 1), 0.4, np.float32), 100, 3)
ALL = np.array(list(itertools.product((0.0, 1.0), repeat=9)), np.float32).reshape(-1, 3, 3, 1)
SMALL = {
    made: {"hidden": (32, 32), "orders": 2},
    pixelcnn: {"channels": 4, "window": 2, "dilations": (1, 2)},
}


@pytest.fixture(params=SMALL, ids=lambda family: family.__name__.rpartition(".")[2])
def family(request):
    return request.param


def _model(family, spec=SPEC, **fields):
    """With random weights."""
    config = family.Config(**{**SMALL[family], **fields})
    family.check(config, spec)
    model = family.build(config, spec)
    batch = {"x": jnp.zeros((1, *spec.event_shape))}
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda p: np.float32(0.6 * rng.normal(size=p.shape)), shapes)


@functools.cache
def _usual(family, conditional):
    return _model(family, conditional=conditional)


def _log_prob(model):
    return jax.jit(model.log_likelihood_fns["log_prob"])


@pytest.mark.parametrize("conditional", [False, True])
def test_probabilities_of_all_images_sum_to_one(family, conditional):
    """Of each class by itself, and the classes differ."""
    model, params = _usual(family, conditional)
    log_prob, found = _log_prob(model), []
    for label in range(3):
        batch = {"x": ALL, "label": jnp.full(len(ALL), label)}
        found.append(np.exp(np.asarray(log_prob(params, batch), np.float64)))
        np.testing.assert_allclose(found[-1].sum(), 1, rtol=1e-5)
    assert np.allclose(found[0], found[1], rtol=1e-4) is not conditional


def test_a_pixel_depends_on_all_before_it_and_on_none_after(family):
    """Also far up to the right, where a PixelCNN of one stream is blind."""
    spec = SPEC._replace(event_shape=(4, 5, 1), mean=np.full((4, 5, 1), 0.4, np.float32))
    _, params = _model(family, spec)
    config, (own,) = family.Config(**SMALL[family]), params.values()
    net, shape = pixelcnn.Net, (1, 4, 5, 1)
    if family is made:
        net, own, shape = _net_of_means, own["order_0"], (1, 20)

    def logits(x):
        return net(config, spec).apply({"params": own}, x.reshape(shape), None)[0, :, 0]

    slopes = np.asarray(jax.jit(jax.jacobian(logits))(jax.random.uniform(jax.random.key(2), (20,))))
    assert np.all(np.triu(slopes) == 0)
    assert np.all(slopes[np.tril_indices(20, -1)] != 0)


def _net_of_means(config, spec, order=slice(None)):
    return made.Net(config, spec.mean.ravel()[order])


def test_orders_are_permutations_the_first_row_by_row():
    """No two are the same, and a run that goes on has those that it began with."""
    orders = [order.tolist() for order in made._orders(4, 20)]
    assert orders[0] == list(range(20))
    assert [sorted(order) for order in orders] == [orders[0]] * 4
    assert len(set(map(tuple, orders))) == 4
    assert orders == [order.tolist() for order in made._orders(4, 20)]
    assert sorted(order.tolist() for order in made._orders(2, 2)) == [[0, 1], [1, 0]]


def test_each_order_is_trained_by_itself_and_their_mixture_is_scored():
    """The loss is the mean of -log p_o(x); log p(x) is the log of the mean of p_o(x)."""
    spec = SPEC._replace(mean=np.linspace(0.1, 0.9, 9, dtype=np.float32).reshape(3, 3, 1))
    model, params = _model(made, spec)
    config, each = made.Config(**SMALL[made]), []
    orders = made._orders(config.orders, 9)
    for order, own in zip(orders, params["made"].values(), strict=True):
        x = ALL.reshape(-1, 9)[:, order]
        net = jax.jit(_net_of_means(config, spec, order).apply)
        logits = np.asarray(net({"params": own}, x, None)[..., 0], np.float64)
        each.append(np.sum(x * logits - np.logaddexp(0, logits), axis=1))
    batch = {"x": ALL, "mask": jnp.ones(len(ALL))}
    loss, _ = jax.jit(model.players[0].loss_fn)(params, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, -np.mean(each), rtol=1e-5)
    mixture = np.log(np.mean(np.exp(each), axis=0))
    np.testing.assert_allclose(_log_prob(model)(params, batch), mixture, rtol=1e-5, atol=1e-5)


def test_a_single_draw_may_be_of_any_order():
    """The mean of a thousand is that of the mixture, within four standard errors."""
    model, params = _usual(made, False)
    keys = jax.random.split(jax.random.key(5), 1000)
    draws = jax.jit(jax.vmap(lambda key: model.sample(params, key, 1)["x"][0]))(keys)
    probs = np.exp(np.asarray(_log_prob(model)(params, {"x": ALL}), np.float64))
    mean = np.tensordot(probs, ALL, 1)
    assert np.all(np.abs(draws.mean(0) - mean) < 4 * np.sqrt(mean * (1 - mean) / len(keys)))


@pytest.mark.parametrize("conditional", [False, True])
def test_samples_have_the_probabilities_that_are_scored(family, conditional):
    """A chi-square over all images."""
    model, params = _usual(family, conditional)
    samples = jax.jit(model.sample, static_argnums=2)(params, jax.random.key(3), 30_000)
    index = (np.asarray(samples["x"]).reshape(-1, 9) @ 2.0 ** np.arange(9)[::-1]).astype(int)
    log_prob = _log_prob(model)
    for label in range(3) if conditional else [None]:
        chosen = index if label is None else index[samples["label"] == label]
        batch = {"x": ALL, "label": jnp.full(len(ALL), label or 0)}
        prob = np.exp(np.asarray(log_prob(params, batch), np.float64))
        assert _p_value(np.bincount(chosen, minlength=512), prob) > 1e-3


def _p_value(found, prob):
    """Of a chi-square of counts; those that are expected less than five times as one."""
    expected = found.sum() * prob
    often = expected > 5
    observed = [*found[often], found[~often].sum()]
    wanted = np.array([*expected[often], expected[~often].sum() + 1e-9])
    return stats.chisquare(observed, wanted * found.sum() / wanted.sum()).pvalue


def test_of_points_it_is_a_density_and_samples_have_it():
    """Of two networks, of which the second begins with the second coordinate."""
    spec = DataSpec((2,), "real", np.array([0.5, -0.3], np.float32), 100)
    fields = {"likelihood": "gaussian_mixture", "hidden": (4, 4), "orders": 2}
    model, params = _model(made, spec, **fields)
    params = jax.tree.map(lambda p: 0.6 * p, params)  # so that hardly anything is far out
    edges = np.linspace(-10, 10, 41)
    axis = np.linspace(-10, 10, 401, dtype=np.float32)[:-1] + 0.025
    x = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    density = np.exp(_log_prob(model)(params, {"x": x})).reshape(40, 10, 40, 10)
    prob = density.sum(axis=(1, 3)) * 0.05**2
    np.testing.assert_allclose(prob.sum(), 1, atol=1e-3)
    samples = jax.jit(model.sample, static_argnums=2)(params, jax.random.key(3), 30_000)["x"]
    found, _, _ = np.histogram2d(*samples.T, bins=(edges, edges))
    assert _p_value(found, prob) > 1e-3


def test_the_best_of_independent_pixels_is_their_entropy(family):
    """No gradient at the logits of the true means, and the expected loss there is the entropy."""
    p = np.linspace(0.1, 0.9, 9)
    spec = SPEC._replace(mean=p.reshape(3, 3, 1).astype(np.float32))
    model = family.build(family.Config(**SMALL[family]), spec)

    @jax.jit
    def start(rng):
        """All weights at zero, and biases as they start: from the mean of the data."""
        params = model.init(rng, {"x": jnp.zeros((1, 3, 3, 1))})
        return jax.tree.map(lambda a: a if a.shape == (9,) else jnp.zeros_like(a), params)

    params = start(jax.random.key(0))
    weights = np.prod(np.where(ALL.reshape(-1, 9) == 1, p, 1 - p), axis=1)
    entropy = -np.sum(p * np.log(p) + (1 - p) * np.log(1 - p))

    def expected_loss(params):
        return -jnp.sum(weights * model.log_likelihood_fns["log_prob"](params, {"x": ALL}))

    loss, grads = jax.jit(jax.value_and_grad(expected_loss))(params)
    np.testing.assert_allclose(loss, entropy, rtol=1e-6)
    for leaf in jax.tree.leaves(grads):
        np.testing.assert_allclose(leaf, 0, atol=1e-6)


def test_grey_pixels_have_a_likelihood_of_256_values(family):
    """The sum over all values of two pixels is 1."""
    spec = DataSpec((1, 2, 1), "uint8", np.full((1, 2, 1), 90, np.float32), 100)
    model, params = _model(family, spec, likelihood="discretised_logistic_mixture")
    grid = np.stack(np.meshgrid(np.arange(256.0), np.arange(256.0)), -1).reshape(-1, 1, 2, 1)
    log_prob = np.asarray(_log_prob(model)(params, {"x": jnp.asarray(grid, jnp.float32)}))
    np.testing.assert_allclose(np.exp(log_prob.astype(np.float64)).sum(), 1, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (made, {"hidden": ()}, "model.hidden"),
        (made, {"hidden": (0,)}, "model.hidden"),
        (made, {"orders": 0}, "model.orders=0"),
        (made, {"orders": 362_881}, r"model\.orders=362881: at most 362,880"),
        (made, {"activation": "gated"}, "model.activation='gated'"),
        (made, {"likelihood": "categorical"}, "model.likelihood='categorical' needs uint8"),
        (pixelcnn, {"likelihood": "categorical"}, "model.likelihood='categorical' needs uint8"),
        (pixelcnn, {"channels": 0}, "model.channels=0"),
        (pixelcnn, {"window": 0}, "model.window=0"),
        (pixelcnn, {"dilations": (1, 0)}, "model.dilations"),
    ],
)
def test_bad_input(family, fields, message):
    with pytest.raises(UserError, match=message):
        family.check(family.Config(**fields), SPEC)


def test_data_that_they_are_not_for(family):
    with pytest.raises(UserError, match="no labels"):
        family.check(family.Config(conditional=True), SPEC._replace(num_classes=0))
    with pytest.raises(UserError, match="one channel"):
        pixelcnn.check(pixelcnn.Config(), SPEC._replace(event_shape=(3, 3, 3)))
