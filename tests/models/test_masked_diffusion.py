"""Masked diffusion with the exact denoiser of a distribution that can be enumerated."""

import functools
import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from dgm_jax import likelihoods
from dgm_jax.core import DataSpec, UserError
from dgm_jax.models import masked_diffusion as md

V, D = 3, 4
TEXT = DataSpec((D,), "tokens", np.zeros(D, np.float32), 100, vocabulary=V)
BITS = DataSpec((4, 6, 1), "binary", np.full((4, 6, 1), 0.5, np.float32), 100)
GREY = DataSpec((4, 6, 3), "uint8", np.full((4, 6, 3), 100.0, np.float32), 100)
CONFIG = md.Config(width=8, depth=1, heads=2, hidden=6, channels=(4, 8))
RNG = jax.random.key(0)
ALL = np.array(list(itertools.product(range(V), repeat=D)))  # [V^D, D]
CATEGORICAL = likelihoods.categorical(V)


@functools.cache
def _joint():
    """log p of all sequences, `[V^D]`, of tokens that know of each other."""
    return special.log_softmax(1.5 * np.random.default_rng(3).normal(size=V**D))


@functools.cache
def _conditionals(noise):
    """log p(x_i = v | x_visible) `[(V + 1)^D, D, V]`, the digit V of a state being hidden.

    Those of `_joint`, by its sums; with noise, of a network that no joint distribution agrees with.
    """
    found = np.zeros(((V + 1) ** D, D, V))
    for row, state in enumerate(itertools.product(range(V + 1), repeat=D)):
        fits = ((state == ALL) | (np.array(state) == V)).all(axis=1)
        for i, v in np.ndindex(D, V):
            log_p = np.where(fits & (ALL[:, i] == v), _joint(), -50)
            found[row, i, v] = special.logsumexp(log_p)
    found += noise * np.random.default_rng(4).normal(size=found.shape)
    return special.log_softmax(found, axis=-1)


def _row(x, hidden):
    """Which state it is where `hidden` `[..., D]` of `x` `[..., D]` are."""
    np_or_jnp = jnp if isinstance(hidden, jax.Array) else np
    digits = np_or_jnp.where(hidden, V, x).astype(int)
    return digits @ (V + 1) ** np.arange(D)[::-1]


def _denoiser(noise):
    table = jnp.asarray(_conditionals(noise), jnp.float32)
    return lambda x, hidden: table[_row(x, hidden)]


@functools.cache
def _of_hidden(noise):
    """Σ_{i hidden} log p(x_i | x_visible) of every x, `[V^D]`, for each set of hidden tokens."""
    found = {}
    for subset in map(np.array, itertools.product((False, True), repeat=D)):
        rows = _conditionals(noise)[_row(ALL, subset[None])]
        each = np.take_along_axis(rows, ALL[..., None], axis=-1)[..., 0]
        found[tuple(subset)] = each @ subset
    return found


def _limit(noise, schedule):
    """The bound of continuous time by quadrature over t: ∫ m' / m E[Σ_{i hidden} log p] dt."""
    m, slope = {
        "linear": (lambda t: t, lambda t: 1.0),
        "cosine": (
            lambda t: 1 - (1 - math.cos(math.pi / 2 * (1 - t))),
            lambda t: math.pi / 2 * math.sin(math.pi / 2 * (1 - t)),
        ),
    }[schedule]
    found = _of_hidden(noise)

    def integrand(t):
        chance = {s: m(t) ** sum(s) * (1 - m(t)) ** (D - sum(s)) for s in found if any(s)}
        return slope(t) / m(t) * sum(chance[s] * found[s] for s in chance)

    return integrate.quad_vec(integrand, 1e-12, 1)[0]


def _by_order(noise):
    """log p of every x, token by token in each of the orders: `[D!, V^D]`."""
    found = []
    for order in itertools.permutations(range(D)):
        log_p = np.zeros(len(ALL))
        for done, i in enumerate(order):
            subset = np.isin(np.arange(D), order[done:])
            rows = _conditionals(noise)[_row(ALL, subset[None])]
            log_p += rows[np.arange(len(ALL)), i, ALL[:, i]]
        found.append(log_p)
    return np.array(found)


def _in_steps(revealed):
    """The exact denoiser's bound where these many tokens are revealed at a time, in any order."""
    found, total = _of_hidden(0), 0.0
    orders = list(itertools.permutations(range(D)))
    for order in orders:
        done = 0
        for num in revealed:
            subset = np.isin(np.arange(D), order[done:])
            # Those revealed now, of all that are hidden: a share of the sum, over all orders.
            total = total + num / subset.sum() * found[tuple(subset)]
            done += num
    return total / len(orders)


def _draws(noise, levels, num=4000):
    """Draws of the bound for all x, `[num, V^D]`."""
    x = jnp.asarray(ALL, jnp.float32)
    one = lambda key: md.bound(_denoiser(noise), CATEGORICAL, levels, x, key)  # noqa: E731
    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(RNG, num)), np.float64)


def _assert_mean(draws, expected):
    error = draws.std(axis=0, ddof=1) / math.sqrt(len(draws)) + 1e-5
    assert np.all(np.abs(draws.mean(axis=0) - expected) < 5 * error)


@pytest.mark.parametrize("schedule", md.SCHEDULES)
def test_with_the_exact_denoiser_the_bound_is_the_likelihood(schedule):
    """Whatever the order, the product of the conditionals is p; and whatever the schedule."""
    np.testing.assert_allclose(_limit(0, schedule), _joint(), rtol=1e-5)
    _assert_mean(_draws(0, md.levels(schedule, D, 0)), _joint())


@pytest.mark.parametrize("schedule", md.SCHEDULES)
def test_the_bound_is_the_integral_over_time_and_the_mean_over_orders(schedule):
    """Below the likelihood of what is drawn, the mean over orders of the product."""
    by_order = _by_order(1.0)
    expected = _limit(1.0, schedule)
    np.testing.assert_allclose(by_order.mean(axis=0), expected, rtol=1e-5)
    _assert_mean(_draws(1.0, md.levels(schedule, D, 0)), expected)
    likelihood = special.logsumexp(by_order, axis=0) - math.log(len(by_order))
    np.testing.assert_allclose(special.logsumexp(likelihood), 0, atol=1e-9)
    assert (expected < likelihood).all() and np.mean(likelihood - expected) > 0.05


def test_the_bound_of_few_steps_rises_to_that_of_the_limit():
    """Each by the sum over all orders; with as many steps as tokens it is the limit itself."""
    log_p, mean = _joint(), {}
    for steps, revealed in ((1, (4,)), (2, (2, 2)), (4, (1, 1, 1, 1))):
        expected = _in_steps(revealed)
        _assert_mean(_draws(0, md.levels("linear", D, steps)), expected)
        mean[steps] = np.exp(log_p) @ expected
    assert mean[1] < mean[2] - 0.05 < mean[4] - 0.1
    np.testing.assert_allclose(_in_steps((1,) * D), log_p, rtol=1e-9)


@pytest.mark.parametrize("spec", [TEXT, BITS])
def test_an_untrained_network_is_uniform_to_the_last_digit(spec):
    model = md.build(CONFIG, spec)
    x = jnp.zeros((5, *spec.event_shape), jnp.int32 if spec is TEXT else jnp.float32)
    params = jax.jit(model.init)(RNG, {"x": x})
    elbo = jax.jit(model.log_likelihood_fns["elbo"])(params, {"x": x}, RNG)
    np.testing.assert_allclose(elbo, -spec.num_dims * math.log(spec.num_values), rtol=1e-6)
    loss, aux = jax.jit(model.loss_fn)(params, {"x": x}, RNG)
    np.testing.assert_allclose(loss, -elbo[0], rtol=1e-6)
    assert not aux.terms


@pytest.mark.parametrize("noise", [0, 1.0])
def test_one_token_a_step_the_denoiser_draws_the_mean_over_orders(noise):
    """Of the exact one that is its distribution: chi-square over all sequences."""
    levels = md.levels("linear", D, 0)
    draw = jax.jit(lambda key: md.draw(_denoiser(noise), CATEGORICAL, levels, key, (40_000, D)))
    counts = np.bincount(np.asarray(draw(RNG), int) @ V ** np.arange(D)[::-1], minlength=V**D)
    expected = 40_000 * np.exp(_by_order(noise)).mean(axis=0)
    if noise == 0:
        np.testing.assert_allclose(expected, 40_000 * np.exp(_joint()), rtol=1e-6)
    often = expected > 5
    pooled = [np.append(c[often], c[~often].sum()) for c in (counts, expected)]
    assert stats.chisquare(*pooled, sum_check=False).pvalue > 1e-4


def test_in_one_step_each_token_is_drawn_from_its_own_distribution_alone():
    """Tokens of one step do not see each other: the product of the marginals, chi-square."""
    levels = md.levels("linear", D, 1)
    draw = jax.jit(lambda key: md.draw(_denoiser(0), CATEGORICAL, levels, key, (40_000, D)))
    counts = np.bincount(np.asarray(draw(RNG), int) @ V ** np.arange(D)[::-1], minlength=V**D)
    expected = 40_000 * np.exp(_of_hidden(0)[(True,) * D])
    assert expected.min() > 5 and stats.chisquare(counts, expected, sum_check=False).pvalue > 1e-4


def test_steps_of_a_process():
    """Of the linear schedule equal shares; each level is looked at as often as time is in it."""
    whole = md.levels("linear", 6, 0)
    np.testing.assert_array_equal(whole.hidden, range(1, 7))
    np.testing.assert_array_equal(whole.revealed, 1)
    np.testing.assert_allclose(whole.prob, 1 / 6)
    np.testing.assert_array_equal(md.levels("linear", 6, 6).hidden, whole.hidden)
    np.testing.assert_array_equal(md.levels("linear", 6, 3).hidden, [2, 4, 6])
    np.testing.assert_array_equal(md.levels("linear", 6, 1).revealed, [6])
    t = (np.arange(100_000) + 0.5) / 100_000
    for schedule in md.SCHEDULES:
        found = md.levels(schedule, 784, 0)
        hidden = np.ceil(784 * md.SCHEDULES[schedule].hidden(t)).astype(int)
        share = np.bincount(hidden, minlength=785)[1:] / len(t)
        np.testing.assert_allclose(found.prob, share, atol=2e-5)
        for steps in (0, 1, 5, 100, 784):
            levels = md.levels(schedule, 784, steps)
            assert levels.revealed.sum() == levels.hidden[-1] == 784
            assert (levels.revealed > 0).all()
            np.testing.assert_array_equal(np.cumsum(levels.revealed), levels.hidden)
            np.testing.assert_allclose(levels.prob.sum(), 1, rtol=1e-12)


def test_orders_are_permutations_and_all_alike():
    order = np.asarray(md.random_order(RNG, (60_000, 3)))
    assert (np.sort(order, axis=1) == np.arange(3)).all()
    counts = np.unique(order @ [9, 3, 1], return_counts=True)[1]
    assert len(counts) == 6 and stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        (TEXT, {}),
        (BITS, {}),
        (BITS, {"patch": 2}),
        (BITS, {"network": "unet"}),
        (GREY, {"patch": 2}),
        (GREY, {"network": "unet", "patch": 2}),
    ],
)
def test_the_network_sees_what_is_visible_from_everywhere_and_nothing_else(spec, fields):
    config = replace(CONFIG, **fields)
    net, dims, rng = md.Denoiser(config, spec), spec.num_dims, np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, spec.num_values, (2, dims)), jnp.float32)
    hidden = jnp.asarray(rng.uniform(size=(2, dims)) < 0.5)
    leaves, structure = jax.tree.flatten(jax.eval_shape(net.init, RNG, x, hidden))
    drawn = [jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    apply = jax.jit(lambda x, hidden: net.apply(jax.tree.unflatten(structure, drawn), x, hidden))
    outputs = apply(x, hidden)
    assert outputs.shape == (2, dims, md.likelihood_of(spec).num_outputs)
    other = (x + 1) % spec.num_values
    np.testing.assert_array_equal(outputs, apply(jnp.where(hidden, other, x), hidden))
    first = int(np.flatnonzero(~np.asarray(hidden[0]))[0])
    changed = apply(x.at[0, first].set(other[0, first]), hidden)
    assert np.all(np.abs(changed[0] - outputs[0]).max(axis=-1) > 0)
    np.testing.assert_array_equal(changed[1], outputs[1])
    as_hidden = apply(x, hidden.at[0, first].set(True))
    assert np.all(np.abs(as_hidden[0] - outputs[0]).max(axis=-1) > 0)


def test_patches_are_squares_of_the_image():
    net = md.Denoiser(replace(CONFIG, patch=2), BITS)
    x = jnp.arange(24).reshape(1, 24, 1)
    patches = net._patches(x)
    np.testing.assert_array_equal(patches[0, 1], [2, 3, 8, 9])
    np.testing.assert_array_equal(patches[0, 3], [12, 13, 18, 19])
    np.testing.assert_array_equal(net._pixels(patches, 1), x)


@pytest.mark.parametrize(("spec", "steps"), [(TEXT, 2), (BITS, 5), (GREY, 3)])
def test_samples_are_as_the_data_hold_them(spec, steps):
    model = md.build(replace(CONFIG, sample_steps=steps), spec)
    params = jax.jit(model.init)(RNG, {"x": jnp.zeros((1, *spec.event_shape))})
    x = np.asarray(jax.jit(model.sample, static_argnums=2)(params, RNG, 50)["x"])
    assert x.shape == (50, *spec.event_shape)
    assert x.dtype == (np.int32 if spec is TEXT else np.float32)
    assert np.isin(x, np.arange(spec.num_values)).all() and len(np.unique(x)) > 1


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("width", 9, "model.heads=2"),
        ("heads", 0, "at least 1"),
        ("depth", -1, "at least 0"),
        ("network", "mlp", "transformer, unet"),
        ("channels", (4, 0), "at least 1"),
        ("blocks", -1, "at least 0"),
        ("hidden", 0, "at least 1"),
        ("patch", 0, "at least 1"),
        ("patch", 4, "divide the sides"),
        ("schedule", "sine", "linear, cosine"),
        ("steps", -1, "24 tokens"),
        ("steps", 25, "24 tokens"),
        ("sample_steps", 25, "24 tokens"),
    ],
)
def test_check_refuses_a_bad_value_by_its_name(field, value, words):
    with pytest.raises(UserError) as refused:
        md.check(replace(CONFIG, **{field: value}), BITS)
    message = str(refused.value)
    assert f"model.{field}={value!r}" in message and words in message and "\n" not in message


def test_check_refuses_data_that_are_no_tokens():
    for spec in (TEXT, BITS, GREY):
        md.check(CONFIG, spec)
    with pytest.raises(UserError, match="real vectors"):
        md.check(CONFIG, DataSpec((2,), "real", np.zeros(2, np.float32)))
    with pytest.raises(UserError, match=r"model\.patch=2.*1 for a text"):
        md.check(replace(CONFIG, patch=2), TEXT)
    with pytest.raises(UserError, match=r"model\.network='unet' needs images.*\(4,\)"):
        md.check(replace(CONFIG, network="unet"), TEXT)
    md.check(replace(CONFIG, network="unet", width=9), BITS)
    with pytest.raises(UserError, match=r"model\.channels\[-1\]=9: .*model\.heads=2"):
        md.check(replace(CONFIG, network="unet", channels=(3, 9)), BITS)
