"""A Transformer over few enough sequences to enumerate: text, bits, labels."""

import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special, stats

from dgm_jax.core import DataSpec, UserError
from dgm_jax.models import transformer

TEXT = DataSpec((4,), "tokens", np.zeros(4, np.float32), 100, vocabulary=3)
BITS = DataSpec((2, 2, 1), "binary", np.full((2, 2, 1), 0.5, np.float32), 100, num_classes=2)
GREY = BITS._replace(event_shape=(1, 2, 1), support="uint8")
CONFIG = transformer.Config(width=8, depth=2, heads=2, hidden=6)
RNG = jax.random.key(0)


def _everything(spec):
    """Every x there is, as the data hold it, and a label for each where there are labels."""
    values = itertools.product(range(spec.num_values), repeat=spec.num_dims)
    dtype = np.int32 if spec.support == "tokens" else np.float32
    x = jnp.asarray(np.array(list(values), dtype).reshape(-1, *spec.event_shape))
    return {"x": x, "label": jnp.ones(len(x), jnp.int32)}


def _params(model, batch, scale=0.6):
    leaves, structure = jax.tree.flatten(jax.eval_shape(model.init, RNG, batch))
    rng = np.random.default_rng(1)
    drawn = [jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, drawn)


@pytest.mark.parametrize(("spec", "conditional"), [(TEXT, False), (BITS, False), (BITS, True)])
def test_probabilities_sum_to_one_and_samples_have_them(spec, conditional):
    model = transformer.build(replace(CONFIG, conditional=conditional), spec)
    batch = _everything(spec)
    params = _params(model, batch)
    log_prob = jax.jit(model.log_likelihood_fns["log_prob"])(params, batch, RNG)
    np.testing.assert_allclose(special.logsumexp(log_prob), 0, atol=1e-5)
    assert np.std(log_prob) > 0.2
    samples = jax.jit(model.sample, static_argnums=2)(params, RNG, 20_000)
    x = np.asarray(samples["x"])
    assert x.dtype == batch["x"].dtype
    if conditional:
        np.testing.assert_array_equal(samples["label"][:3], [0, 1, 0])
        x = x[1::2]
    index = x.reshape(len(x), -1).astype(int) @ spec.num_values ** np.arange(4)[::-1]
    counts = np.bincount(index, minlength=len(log_prob))
    expected = len(x) * np.exp(np.asarray(log_prob, np.float64))
    often = expected > 5
    pooled = [np.append(c[often], c[~often].sum() + 1e-9) for c in (counts, expected)]
    assert stats.chisquare(*pooled, sum_check=False).pvalue > 1e-4


def test_grey_values_are_tokens():
    """The first pixel's 256 probabilities sum to 1, and so do the second's, given the first."""
    model = transformer.build(CONFIG, GREY)
    first = jnp.arange(256.0).reshape(256, 1, 1, 1)
    params = _params(model, {"x": jnp.zeros((1, 1, 2, 1))}, 0.3)
    log_prob = jax.jit(model.log_likelihood_fns["log_prob"])

    def total(first):
        second = jnp.arange(256.0).reshape(256, 1, 1, 1)
        x = jnp.concatenate([jnp.broadcast_to(first, second.shape), second], axis=2)
        return special.logsumexp(log_prob(params, {"x": x}, RNG))

    marginal = [total(value) for value in first]
    np.testing.assert_allclose(special.logsumexp(marginal), 0, atol=1e-4)
    samples = jax.jit(model.sample, static_argnums=2)(params, RNG, 50)["x"]
    assert samples.shape == (50, 1, 2, 1) and samples.dtype == np.float32
    assert np.isin(samples, np.arange(256)).all() and samples.max() > 100


def test_an_untrained_transformer_is_nearly_uniform():
    """The embedding starts small: about log C for each token."""
    model, batch = transformer.build(CONFIG, TEXT), _everything(TEXT)
    params = jax.jit(model.init)(RNG, batch)
    loss, aux = jax.jit(model.loss_fn)(params, batch, RNG)
    np.testing.assert_allclose(loss, 4 * math.log(3), rtol=0.01)
    assert not aux.terms


def test_it_learns_the_entropy_of_a_text():
    """A first-order Markov chain: no model can do better than its entropy, and this one does it."""
    spec = DataSpec((8,), "tokens", np.zeros(8, np.float32), 100, vocabulary=3)
    chain = np.array([[0.8, 0.1, 0.1], [0.05, 0.05, 0.9], [0.3, 0.7, 0.0]])
    cumulative, rng = chain.cumsum(axis=1), np.random.default_rng(0)
    x = np.zeros((4096, 8), np.int32)
    for i in range(1, 8):
        x[:, i] = (rng.uniform(size=(4096, 1)) > cumulative[x[:, i - 1]]).sum(axis=1)
    held_out = {"x": jnp.asarray(x[:1024])}
    truth = np.log(chain[x[:1024, :-1], x[:1024, 1:]]).sum(axis=1).mean()
    model, optimizer = transformer.build(replace(CONFIG, depth=1), spec), optax.adam(2e-2)
    params = jax.jit(model.init)(RNG, held_out)

    @jax.jit
    def step(carry, x):
        params, state = carry
        slopes, _ = jax.grad(model.loss_fn, has_aux=True)(params, {"x": x}, RNG)
        updates, state = optimizer.update(slopes, state)
        return (optax.apply_updates(params, updates), state), None

    batches = jnp.asarray(x[1024:].reshape(-1, 128, 8)[np.arange(240) % 24])
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), batches)
    found = jnp.mean(jax.jit(model.log_likelihood_fns["log_prob"])(params, held_out, RNG))
    assert truth - 0.15 < found < truth + 0.02


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("width", 9, "model.heads=2"),
        ("heads", 0, "at least 1"),
        ("depth", 0, "at least 1"),
        ("hidden", 0, "at least 1"),
        ("temperature", 0.0, "above 0"),
        ("top_p", 0.0, "at most 1"),
        ("top_p", 1.5, "at most 1"),
        ("conditional", True, "no labels"),
    ],
)
def test_check_refuses_a_bad_value_by_its_name(field, value, words):
    with pytest.raises(UserError) as refused:
        transformer.check(replace(CONFIG, **{field: value}), TEXT)
    message = str(refused.value)
    assert f"model.{field}={value!r}" in message and words in message and "\n" not in message


def test_check_refuses_data_that_are_no_tokens():
    for spec in (TEXT, BITS, GREY):
        transformer.check(CONFIG, spec)
    with pytest.raises(UserError, match="real vectors"):
        transformer.check(CONFIG, DataSpec((2,), "real", np.zeros(2, np.float32)))
