"""A distribution over few enough codes to enumerate: its sum, its draws and what each code sees."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dgm_jax.nn.autoregressive import AutoregressiveCategorical

# Compiling takes most of the time of these tests: none of it goes into faster code.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CASES = [(1, 3, 16), (5, 2, 16), (3, 4, 2)]  # N, C and E


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


def _all_codes(num, classes):
    """Every code, `[C^N, N]`, the last position counting fastest."""
    return np.array(list(itertools.product(range(classes), repeat=num)))


@pytest.mark.parametrize(("num", "classes", "embedding"), CASES)
def test_the_probabilities_of_all_codes_sum_to_one(num, classes, embedding):
    prior, codes = _prior(num, classes, embedding), _all_codes(num, classes)
    log_probs = jit(prior.log_prob)(np.eye(classes)[codes])
    assert log_probs.shape == (classes**num,)
    np.testing.assert_allclose(special.logsumexp(log_probs), 0, atol=1e-12)
    assert np.std(log_probs) > 0.2  # far from uniform


@pytest.mark.parametrize(("num", "classes", "embedding"), CASES)
def test_draws_have_the_probabilities(num, classes, embedding):
    """Many keys and two draws of each, so that noise in common would show: chi-square."""
    prior, codes = _prior(num, classes, embedding), _all_codes(num, classes)
    keys = jax.random.split(jax.random.key(2), 20_000)
    drawn = np.asarray(jit(jax.vmap(lambda key: prior.draw(key, 2)))(keys))
    assert drawn.shape == (20_000, 2, num, classes)
    assert np.isin(drawn, (0, 1)).all() and (drawn.sum(axis=-1) == 1).all()
    index = drawn.argmax(axis=-1).reshape(-1, num) @ classes ** np.arange(num)[::-1]
    expected = 40_000 * np.exp(jit(prior.log_prob)(np.eye(classes)[codes]))
    counts = np.bincount(index, minlength=len(codes))
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
    each = [prior.log_prob(jnp.asarray(np.concatenate([before, [c]]))) for c in np.eye(4)]
    relaxed = prior.log_prob(jnp.asarray(np.concatenate([before, [last]])))
    np.testing.assert_allclose(relaxed, last @ np.array(each), rtol=1e-12)
