"""MADE: normalised, blind to what comes later, and drawn as it is scored."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dgm_jax.core import DataSpec, UserError
from dgm_jax.models import made

SPEC = DataSpec((3, 3, 1), "binary", np.full((3, 3, 1), 0.4, np.float32), 100, 3)
ALL = np.array(list(itertools.product((0.0, 1.0), repeat=9)), np.float32).reshape(-1, 3, 3, 1)


def _model(spec=SPEC, **fields):
    """With weights far from where they start."""
    config = made.Config(**{"hidden": (16, 16), **fields})
    made.check(config, spec)
    model = made.build(config, spec)
    params = model.init(jax.random.key(0), {"x": jnp.zeros((1, *spec.event_shape))})
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [p + 0.7 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return model, jax.tree.unflatten(structure, moved)


def _log_prob(model):
    return jax.jit(model.log_likelihood_fns["log_prob"])


@pytest.mark.parametrize("conditional", [False, True])
def test_probabilities_of_all_images_sum_to_one(conditional):
    """Of each class by itself, and the classes differ."""
    model, params = _model(conditional=conditional)
    found = []
    for label in range(3):
        batch = {"x": ALL, "label": jnp.full(len(ALL), label)}
        found.append(np.exp(np.asarray(_log_prob(model)(params, batch), np.float64)))
        np.testing.assert_allclose(found[-1].sum(), 1, rtol=1e-5)
    assert np.allclose(found[0], found[1], rtol=1e-4) is not conditional


def test_a_pixel_depends_on_all_before_it_and_on_none_after():
    _, params = _model(hidden=(64, 64))
    net = made.Net(made.Config(hidden=(64, 64)), SPEC)
    x = jax.random.uniform(jax.random.key(2), (9,))
    jacobian = jax.jacobian(lambda x: net.apply({"params": params["made"]}, x[None], None)[0, :, 0])
    slopes = np.asarray(jax.jit(jacobian)(x))
    assert np.all(np.triu(slopes) == 0)
    assert np.all(np.tril(slopes, -1)[np.tril_indices(9, -1)] != 0)


def test_samples_have_the_probabilities_that_are_scored():
    """A chi-square over all images, those that are expected less than five times as one."""
    model, params = _model()
    x = np.asarray(jax.jit(model.sample, static_argnums=2)(params, jax.random.key(3), 20_000)["x"])
    index = (x.reshape(-1, 9) @ 2.0 ** np.arange(9)[::-1]).astype(int)
    expected = 20_000 * np.exp(np.asarray(_log_prob(model)(params, {"x": ALL}), np.float64))
    found, often = np.bincount(index, minlength=512), expected > 5
    observed = [*found[often], found[~often].sum()]
    wanted = np.array([*expected[often], expected[~often].sum()])
    assert stats.chisquare(observed, wanted * 20_000 / wanted.sum()).pvalue > 1e-3


def test_the_best_of_independent_pixels_is_their_entropy():
    """No gradient at the logits of the true means, and the expected loss there is the entropy."""
    model, params = _model()
    p = np.linspace(0.1, 0.9, 9)
    zeros = jax.tree.map(jnp.zeros_like, params)
    bias = jnp.asarray(np.log(p / (1 - p)), jnp.float32)
    best = {"made": {**zeros["made"], "bias": bias}}
    weights = np.prod(np.where(ALL.reshape(-1, 9) == 1, p, 1 - p), axis=1)
    entropy = -np.sum(p * np.log(p) + (1 - p) * np.log(1 - p))

    def expected_loss(params):
        return -jnp.sum(weights * _log_prob(model)(params, {"x": ALL}))

    loss, grads = jax.jit(jax.value_and_grad(expected_loss))(best)
    np.testing.assert_allclose(loss, entropy, rtol=1e-6)
    np.testing.assert_allclose(grads["made"]["bias"], 0, atol=1e-6)


def test_grey_pixels_have_a_likelihood_of_256_values():
    """One pixel's, given the first: the sum over its values of p(x_1, x_2) is p(x_1)."""
    spec = DataSpec((1, 2, 1), "uint8", np.full((1, 2, 1), 90, np.float32), 100)
    model, params = _model(spec, likelihood="discretised_logistic_mixture")
    grid = np.stack(np.meshgrid(np.arange(256.0), np.arange(256.0)), -1).reshape(-1, 1, 2, 1)
    log_prob = np.asarray(_log_prob(model)(params, {"x": jnp.asarray(grid, jnp.float32)}))
    np.testing.assert_allclose(np.exp(log_prob.astype(np.float64)).sum(), 1, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": ()}, "model.hidden"),
        ({"hidden": (0,)}, "model.hidden"),
        ({"activation": "gated"}, "model.activation='gated'"),
        ({"likelihood": "categorical"}, "model.likelihood='categorical' needs uint8"),
    ],
)
def test_bad_input(fields, message):
    with pytest.raises(UserError, match=message):
        made.check(made.Config(**fields), SPEC)
    with pytest.raises(UserError, match="no labels"):
        made.check(made.Config(conditional=True), SPEC._replace(num_classes=0))
