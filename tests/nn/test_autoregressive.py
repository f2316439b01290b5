"""A distribution over few enough codes to enumerate: its sum, its draws and what each code sees."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dgm_jax.nn import autoregressive
from dgm_jax.nn.autoregressive import (
    AutoregressiveCategorical,
    AutoregressiveTransformer,
    nucleus,
)

# Compiling takes most of the time of these tests: none of it goes into faster code.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CASES = [(1, 3, 16), (5, 2, 16), (3, 4, 2)]  # N, C and E
# N and C of a Transformer, and what is special about it.
TRANSFORMERS = [
    (4, 3, {"absolute": False}),
    (4, 2, {"grid": (2, 2)}),
    (4, 2, {"grid": (1, 2), "labels": 3}),
    (1, 3, {}),
]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@functools.cache
def _prior(num, classes, embedding):
    """A prior with random parameters."""
    module = AutoregressiveCategorical(num, classes, (7, 9), embedding)
    codes = jnp.zeros((1, num, classes))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), codes, method="log_prob"))
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    drawn = [jnp.asarray(0.8 * rng.normal(size=leaf.shape)) for leaf in leaves]
    return module.bind(jax.tree.unflatten(structure, drawn))


@functools.cache
def _transformer(num, classes, fields):
    """A Transformer with random parameters, those that start small or at zero too."""
    module = AutoregressiveTransformer(num, classes, 8, 2, 2, 6, **dict(fields))
    label = jnp.zeros(1, jnp.int32) if module.labels else None
    codes = jnp.zeros((1, num, classes))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), codes, label, method="log_prob"))
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(2)
    drawn = [jnp.asarray(0.6 * rng.normal(size=leaf.shape)) for leaf in leaves]
    return module.bind(jax.tree.unflatten(structure, drawn))


def _all_codes(num, classes):
    """Every code, `[C^N, N]`, the last position counting fastest."""
    return np.array(list(itertools.product(range(classes), repeat=num)))


@functools.cache
def _log_probs(num, classes, embedding):
    """Of every code."""
    codes = np.eye(classes)[_all_codes(num, classes)]
    return np.asarray(jit(_prior(num, classes, embedding).log_prob)(codes))


@pytest.mark.parametrize(("num", "classes", "embedding"), CASES)
def test_the_probabilities_of_all_codes_sum_to_one(num, classes, embedding):
    log_probs = _log_probs(num, classes, embedding)
    assert log_probs.shape == (classes**num,)
    np.testing.assert_allclose(special.logsumexp(log_probs), 0, atol=1e-12)
    assert np.std(log_probs) > 0.2  # far from uniform


@pytest.mark.parametrize(("num", "classes", "embedding"), CASES)
def test_draws_have_the_probabilities(num, classes, embedding):
    """Many keys and two draws of each, so that noise in common would show: chi-square."""
    prior = _prior(num, classes, embedding)
    keys = jax.random.split(jax.random.key(2), 20_000)
    drawn = np.asarray(jit(jax.vmap(lambda key: prior.draw(key, 2)))(keys))
    assert drawn.shape == (20_000, 2, num, classes)
    assert np.isin(drawn, (0, 1)).all() and (drawn.sum(axis=-1) == 1).all()
    index = drawn.argmax(axis=-1).reshape(-1, num) @ classes ** np.arange(num)[::-1]
    expected = 40_000 * np.exp(_log_probs(num, classes, embedding))
    counts = np.bincount(index, minlength=len(expected))
    often = expected > 5
    pooled = [np.append(c[often], c[~often].sum() + 1e-9) for c in (counts, expected)]
    assert stats.chisquare(*pooled, sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize(("num", "classes", "embedding"), CASES)
def test_a_code_is_predicted_from_those_before_it_and_no_other(num, classes, embedding):
    prior = _prior(num, classes, embedding)
    codes = np.eye(classes)[_all_codes(num, classes)[1]]
    # [N, C of the logits, N, C of the codes]
    jacobian = np.abs(jit(jax.jacfwd(prior.logits))(codes)).max(axis=(1, 3))
    assert np.all(np.triu(jacobian) == 0)
    assert np.all(jacobian[np.tril_indices(num, -1)] > 1e-6)


def test_the_extension_to_relaxed_codes_is_linear_in_the_last():
    """Σ_c y_c log p(c): of the code that no other sees."""
    prior, rng = _prior(3, 4, 2), np.random.default_rng(3)
    before, last = np.eye(4)[[1, 3]], rng.dirichlet(np.ones(4))
    log_prob = jit(prior.log_prob)
    each = [log_prob(np.concatenate([before, [c]])) for c in np.eye(4)]
    relaxed = log_prob(np.concatenate([before, [last]]))
    np.testing.assert_allclose(relaxed, last @ np.array(each), rtol=1e-12)


# The Transformer.


def _case(num, classes, fields):
    """The Transformer, all sequences of codes `[C^N, N]`, and a label for each where it has any."""
    net, codes = _transformer(num, classes, tuple(fields.items())), _all_codes(num, classes)
    return net, codes, jnp.ones(len(codes), jnp.int32) if net.labels else None


@functools.cache
def _transformers_log_probs(num, classes, fields):
    """Of every code."""
    net, codes, label = _case(num, classes, dict(fields))
    return np.asarray(jit(net.log_prob)(np.eye(classes)[codes], label))


@pytest.mark.parametrize(("num", "classes", "fields"), TRANSFORMERS)
def test_a_transformers_probabilities_sum_to_one(num, classes, fields):
    log_probs = _transformers_log_probs(num, classes, tuple(fields.items()))
    assert log_probs.shape == (classes**num,)
    np.testing.assert_allclose(special.logsumexp(log_probs), 0, atol=1e-12)
    assert np.std(log_probs) > 0.2


@pytest.mark.parametrize(("num", "classes", "fields"), TRANSFORMERS)
def test_a_transformers_draws_have_the_probabilities(num, classes, fields):
    """One row for each key's pair of draws: chi-square."""
    net, _, label = _case(num, classes, fields)
    keys, pair = jax.random.split(jax.random.key(2), 10_000), None if label is None else label[:2]
    drawn = np.asarray(jit(jax.vmap(lambda key: net.draw(key, 2, pair)))(keys))
    assert drawn.shape == (10_000, 2, num, classes)
    assert np.isin(drawn, (0, 1)).all() and (drawn.sum(axis=-1) == 1).all()
    index = drawn.argmax(axis=-1).reshape(-1, num) @ classes ** np.arange(num)[::-1]
    expected = 20_000 * np.exp(_transformers_log_probs(num, classes, tuple(fields.items())))
    counts = np.bincount(index, minlength=len(expected))
    often = expected > 5
    pooled = [np.append(c[often], c[~often].sum() + 1e-9) for c in (counts, expected)]
    assert stats.chisquare(*pooled, sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize(("num", "classes", "fields"), TRANSFORMERS)
def test_a_transformer_predicts_a_code_from_those_before_it_and_no_other(num, classes, fields):
    net, codes, label = _case(num, classes, fields)
    one_hot = jnp.asarray(np.eye(classes)[codes[1:2]])
    label = None if label is None else label[:1]
    jacobian = jit(jax.jacfwd(lambda codes: net.logits(codes, label)[0]))(one_hot)[:, :, 0]
    jacobian = np.abs(jacobian).max(axis=(1, 3))
    assert np.all(np.triu(jacobian) == 0)
    assert np.all(jacobian[np.tril_indices(num, -1)] > 1e-6)


@pytest.mark.parametrize(("num", "classes", "fields"), TRANSFORMERS)
def test_the_sampler_draws_from_the_logits_of_the_scorer(num, classes, fields):
    """At every step of the cached pass, whatever was drawn before."""
    net, _, label = _case(num, classes, fields)
    label = None if label is None else jnp.arange(5) % net.labels

    seen = []

    def spy(logits, top_p):
        jax.debug.callback(lambda a: seen.append(np.asarray(a)), logits, ordered=True)
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoregressive, "nucleus", spy)
        codes = jit(lambda key: net.draw(key, 5, label))(jax.random.key(3))
        jax.effects_barrier()
    # A callback is told numbers of 32 bits.
    np.testing.assert_allclose(np.stack(seen, axis=1), jit(net.logits)(codes, label), atol=1e-6)
    assert len(np.unique(np.asarray(codes).argmax(axis=-1), axis=0)) > 1


def test_a_label_has_a_start_of_its_own_and_changes_every_code():
    net, codes, _ = _case(*TRANSFORMERS[2])
    one_hot = jnp.asarray(np.eye(2)[codes[:1]])
    logits = jit(net.logits)
    each = [logits(one_hot, jnp.array([label])) for label in range(3)]
    for other in each[:2]:
        assert np.all(np.abs(each[2] - other).max(axis=(0, 2)) > 1e-4)


def test_temperature_and_nucleus_by_hand():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
    for top_p, kept in ((0.3, [1]), (0.5, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (1.0, range(4))):
        found = nucleus(logits, top_p)
        expected = np.full((1, 4), -np.inf)
        expected[0, list(kept)] = logits[0, jnp.array(list(kept))]
        np.testing.assert_allclose(found, expected)
    np.testing.assert_array_equal(jit(nucleus)(logits, 0.6), nucleus(logits, 0.6))


def test_a_cold_transformer_draws_the_likeliest_code_each_time():
    net, _, _ = _case(*TRANSFORMERS[0])
    logits = jit(net.logits)
    for how in ({"temperature": 1e-6}, {"top_p": 1e-6}):
        codes = np.asarray(jit(lambda key, how=how: net.draw(key, 3, **how))(jax.random.key(5)))
        likeliest = np.asarray(logits(codes)).argmax(axis=-1)
        np.testing.assert_array_equal(codes.argmax(axis=-1), likeliest)
    warm = jit(lambda key: net.draw(key, 3000, temperature=1e6))(jax.random.key(6))
    share = np.asarray(warm).mean(axis=(0, 1))
    np.testing.assert_allclose(share, 1 / 3, atol=5 * np.sqrt(2 / 9 / 12_000))
