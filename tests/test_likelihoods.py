"""Likelihoods: probabilities that sum to one, draws that have them, and starts at the data's mean.

In double precision, but for the extremes.
"""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dgm_jax import likelihoods
from dgm_jax.core import DataSpec, UserError
from dgm_jax.likelihoods import LIKELIHOODS

# Compiling takes most of the time of these tests: none of it goes into faster code.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
GREY = np.arange(256.0)
DISCRETE = ("bernoulli", "categorical", "discretised_logistic_mixture")
GAUSSIANS = ("gaussian", "gaussian_fixed")
REAL = ("gaussian_mixture",)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _outputs(likelihood, *shape, seed=0):
    return 1.5 * np.random.default_rng(seed).normal(size=(*shape, likelihood.num_outputs))


def _values(likelihood):
    return {"binary": np.arange(2.0), "uint8": GREY, "real": GREY / 8 - 16}[likelihood.support]


def _table(likelihood, outputs):
    """log p of every value for each dimension: `[D, P]` -> `[V, D]`."""
    values = _values(likelihood)
    shape = (len(values), len(outputs), 1)  # each value for each dimension on its own
    outputs = np.broadcast_to(outputs[None, :, None], (*shape, outputs.shape[-1]))
    x = np.broadcast_to(values[:, None, None], shape)
    return np.asarray(jit(likelihood.log_prob)(outputs, x))


def test_every_likelihood_is_tested():
    assert set(LIKELIHOODS) == {*DISCRETE, *GAUSSIANS, *REAL}


def test_bernoulli_sums_to_one_over_all_images():
    likelihood = LIKELIHOODS["bernoulli"]()
    x = np.array(list(itertools.product((0.0, 1.0), repeat=3)))
    logits = np.array([[-3.0], [0.2], [5.0]])
    log_p = jit(likelihood.log_prob)(np.broadcast_to(logits, (8, 3, 1)), x)
    assert log_p.shape == (8,)
    np.testing.assert_allclose(np.exp(log_p).sum(), 1, rtol=1e-13)
    np.testing.assert_allclose(
        log_p, stats.bernoulli.logpmf(x, special.expit(logits[:, 0])).sum(axis=1), rtol=1e-12
    )


@pytest.mark.parametrize("name", DISCRETE)
def test_a_discrete_likelihood_sums_to_one_over_all_values(name):
    likelihood = LIKELIHOODS[name]()
    total = np.exp(_table(likelihood, _outputs(likelihood, 40))).sum(axis=0)
    np.testing.assert_allclose(total, np.ones(40), rtol=1e-12)


def test_categorical_equals_scipy():
    likelihood = likelihoods.categorical(7)
    logits, x = _outputs(likelihood, 5, 4), np.random.default_rng(1).integers(0, 7, (5, 4))
    picked = np.take_along_axis(special.log_softmax(logits, axis=-1), x[..., None], axis=-1)
    ours = jit(likelihood.log_prob)(logits, x.astype(float))
    np.testing.assert_allclose(ours, picked.sum(axis=(1, 2)), rtol=1e-12)


def test_uniform_logits_give_eight_bits_per_dimension():
    likelihood = LIKELIHOODS["categorical"]()
    x = np.random.default_rng(1).integers(0, 256, (3, 10)).astype(float)
    nats = -np.asarray(jit(likelihood.log_prob)(np.full((3, 10, 256), 0.7), x))
    np.testing.assert_allclose(nats / 10 / math.log(2), np.full(3, 8.0), rtol=1e-15)


def test_a_mixture_of_discretised_logistics_equals_differences_of_the_mixtures_cdf():
    likelihood = likelihoods.discretised_logistic_mixture(3)
    outputs = _outputs(likelihood, 6) / 1.5
    logits, location, log_scale = np.split(outputs, 3, axis=-1)
    sides = np.concatenate([[-np.inf], (GREY[1:] - 0.5) / 127.5 - 1, [np.inf]])
    cdf = special.expit((sides[:, None, None] - location) / np.exp(log_scale))
    expected = np.diff((special.softmax(logits, axis=-1) * cdf).sum(axis=-1), axis=0)
    # The differences are wrong by the rounding of a number close to one.
    np.testing.assert_allclose(np.exp(_table(likelihood, outputs)), expected, atol=4e-16, rtol=0)


def test_gaussian_equals_scipy():
    x = np.random.default_rng(1).uniform(0, 255, (5, 4))
    learned, fixed = (LIKELIHOODS[name]() for name in GAUSSIANS)
    outputs = _outputs(learned, 5, 4)
    sigma = np.logaddexp(0, outputs[..., 1]) + 1 / 255
    ours = jit(learned.log_prob)(outputs, x)
    expected = stats.norm.logpdf(x, 255 * outputs[..., 0], 255 * sigma).sum(axis=1)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    ours = jit(fixed.log_prob)(outputs[..., :1], x)
    expected = stats.norm.logpdf(x, 255 * outputs[..., 0], 25.5).sum(axis=1)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


@pytest.mark.parametrize("name", GAUSSIANS)
def test_a_gaussian_sums_to_one_over_whole_numbers(name):
    """Those beyond black and white included: its bits per dimension are never too few."""
    likelihood = LIKELIHOODS[name]()
    x = np.arange(-10_000.0, 10_001.0)
    # One dimension, seven outputs: the narrowest have the floor for their sigma.
    outputs = np.linspace(-2, 2, 7)[:, None] * np.ones(likelihood.num_outputs)
    outputs[:3, 0], outputs[:3, 1:] = [100 / 255, 100.25 / 255, 100.5 / 255], -1e4
    log_p = jit(jax.vmap(likelihood.log_prob, (0, None)))(outputs[:, None, None], x[:, None])
    total = np.exp(log_p).sum(axis=1)
    np.testing.assert_allclose(total, np.ones(7), rtol=1e-8)
    if name == "gaussian":  # what the floor costs: the most, nothing, the least
        np.testing.assert_allclose(total[:3] - 1, [5.35e-9, 0, -5.35e-9], rtol=1e-2, atol=1e-12)


def _mixture(outputs):
    """Weights, means and deviations `[..., M]` of a `gaussian_mixture`."""
    logits, mu, log_sigma = np.split(outputs, 3, axis=-1)
    return special.softmax(logits, axis=-1), mu, np.exp(log_sigma)


def test_a_mixture_of_gaussians_equals_scipy_and_integrates_to_one():
    likelihood = likelihoods.gaussian_mixture(3)
    outputs, x = _outputs(likelihood, 5), np.linspace(-60, 60, 48_001)
    at_each = jax.vmap(jax.vmap(likelihood.log_prob, (0, None)), (None, 0))
    density = np.exp(jit(at_each)(outputs[:, None], x[:, None]))
    weight, mu, sigma = _mixture(outputs)
    expected = np.sum(weight * stats.norm.pdf(x[:, None, None], mu, sigma), axis=-1)
    np.testing.assert_allclose(density, expected, rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(density.sum(axis=0) * (x[1] - x[0]), np.ones(5), rtol=1e-11)


def test_draws_of_a_mixture_of_gaussians_have_its_distribution_and_mean():
    likelihood = likelihoods.gaussian_mixture(3)
    outputs = _outputs(likelihood, 3)
    weight, mu, sigma = _mixture(outputs)
    mean = (weight * mu).sum(axis=-1)
    np.testing.assert_allclose(jit(likelihood.mean)(outputs), mean, rtol=1e-12)
    draws = _draws(likelihood, outputs)
    for d in range(3):

        def cdf(x, d=d):
            return np.sum(weight[d] * stats.norm.cdf(x[:, None], mu[d], sigma[d]), axis=-1)

        assert stats.kstest(draws[:, d], cdf).pvalue > 1e-4
    assert _share_no_noise(draws)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_log_probabilities_sum_over_the_dimensions_and_broadcast_over_draws(name):
    """outputs `[K, B, D, P]` of K posterior draws, x `[1, B, D]`."""
    likelihood = LIKELIHOODS[name]()
    outputs = _outputs(likelihood, 2, 3, 4)
    x = np.random.default_rng(1).choice(_values(likelihood), (1, 3, 4))
    together = jit(likelihood.log_prob)(outputs, x)
    assert together.shape == (2, 3)
    one = jit(jax.vmap(likelihood.log_prob))
    each = one(outputs.reshape(24, 1, -1), np.broadcast_to(x, (2, 3, 4)).reshape(24, 1))
    np.testing.assert_allclose(together, each.reshape(2, 3, 4).sum(axis=-1), rtol=1e-12)


def _draws(likelihood, outputs):
    """10,000 draws of x: many keys and two draws of each, so that noise in common would show."""
    keys, pair = jax.random.split(jax.random.key(3), 5_000), np.stack([outputs, outputs])
    draws = jit(jax.vmap(likelihood.draw, (0, None)))(keys, pair)
    return np.asarray(draws).reshape(10_000, len(outputs))


def _share_no_noise(draws):
    correlation = np.corrcoef(draws.T)[np.triu_indices(draws.shape[1], 1)]
    return np.all(np.abs(correlation) < 5 / math.sqrt(len(draws)))


def _agree(counts, expected):
    """By chi-square, what is rare taken together."""
    often = expected > 10
    pairs = [(c[often], c[~often].sum()) for c in (counts, expected)]
    observed, probable = (np.append(*pair) for pair in pairs)
    kept = probable > 0
    assert stats.chisquare(observed[kept], probable[kept]).pvalue > 1e-4


@pytest.mark.parametrize("name", DISCRETE)
def test_draws_have_the_probabilities(name):
    """Chi-square for each dimension; all in the support."""
    likelihood, num = LIKELIHOODS[name](), 10_000
    outputs = _outputs(likelihood, 3)
    if name == "discretised_logistic_mixture":  # narrow: half a grey value matters
        rng = np.random.default_rng(4)
        outputs[:, 5:10] = rng.uniform(-1.1, 1.1, (3, 5))
        outputs[:, 10:] = rng.uniform(-5, -4, (3, 5))
    draws, expected = _draws(likelihood, outputs), num * np.exp(_table(likelihood, outputs))
    assert np.isin(draws, _values(likelihood)).all()
    mean = (_values(likelihood)[:, None] * expected).sum(axis=0) / num
    assert np.all(np.abs(draws.mean(axis=0) - mean) < 5 * draws.std(axis=0) / math.sqrt(num))
    for d in range(3):
        _agree(np.bincount(draws[:, d].astype(int), minlength=len(expected)), expected[:, d])
    assert _share_no_noise(draws)


@pytest.mark.parametrize("name", GAUSSIANS)
def test_gaussian_draws_are_the_nearest_grey_values(name):
    """Black and white stand for all that lies beyond them."""
    likelihood = LIKELIHOODS[name]()
    outputs = _outputs(likelihood, 3)
    outputs[:, 0], outputs[:, 1:] = (0.1, 0.5, 0.95), -5  # narrow: 256 for 255 would show
    draws = _draws(likelihood, outputs)
    likelihoods.refuse_outside_support(draws, SPECS["uint8"])
    sigma = np.logaddexp(0, outputs[:, 1]) + 1 / 255 if name == "gaussian" else np.full(3, 0.1)
    for d in range(3):
        law = stats.norm(255 * outputs[d, 0], 255 * sigma[d])
        expected = len(draws) * np.diff([0, *law.cdf(GREY[:-1] + 0.5), 1])
        _agree(np.bincount(draws[:, d].astype(int), minlength=256), expected)
    assert _share_no_noise(draws)


@pytest.mark.parametrize("name", ["bernoulli", "categorical"])
def test_the_mean_is_that_of_the_probabilities(name):
    """Scaled to [0, 1]."""
    likelihood = LIKELIHOODS[name]()
    outputs = _outputs(likelihood, 6)
    values = _values(likelihood)
    expected = np.exp(_table(likelihood, outputs)).T @ values / values[-1]
    np.testing.assert_allclose(jit(likelihood.mean)(outputs), expected, rtol=1e-12)


def _mean_of_the_mixture(outputs):
    """`mean`, and the mean of the 256 probabilities, both on the scale of [0, 1]."""
    likelihood = likelihoods.discretised_logistic_mixture(outputs.shape[-1] // 3)
    exact = np.exp(_table(likelihood, outputs)).T @ GREY / 255
    return jit(likelihood.mean)(outputs), exact


def test_the_mean_of_narrow_logistics_inside_the_range_is_that_of_the_probabilities():
    """Discretisation moves a mean by less than the logistic's tails: to 1e-6 at scale e^-4."""
    rng = np.random.default_rng(2)
    parts = rng.normal(size=(8, 3)), rng.uniform(-0.6, 0.6, (8, 3)), np.full((8, 3), -4.0)
    ours, exact = _mean_of_the_mixture(np.concatenate(parts, axis=-1))
    np.testing.assert_allclose(ours, exact, atol=1e-6)


@pytest.mark.parametrize(
    ("locations", "log_scale", "known"),
    [
        ((-1.5, 4.0), -5.0, 0.5),  # half the mass at 0, half at 255
        ((-3.0, -3.0), -5.0, 0.0),
        ((0.5, 0.5), -0.5, None),  # wide: much of the mass in the open bins
        ((0.0, 0.0), 5.0, 0.5),
        ((30.0, 30.0), 7.0, None),
    ],
)
def test_the_mean_of_a_mixture_that_leaves_the_range_is_that_of_the_probabilities(
    locations, log_scale, known
):
    """To a quarter of a grey value."""
    ours, exact = _mean_of_the_mixture(np.array([[0, 0, *locations, log_scale, log_scale]]))
    if known is not None:
        np.testing.assert_allclose(exact, [known], atol=1e-6)
    np.testing.assert_allclose(ours, exact, atol=1e-3)


@pytest.mark.parametrize("name", GAUSSIANS)
def test_the_mean_of_a_gaussian_is_clipped_to_a_picture(name):
    likelihood = LIKELIHOODS[name]()
    outputs = np.zeros((3, likelihood.num_outputs))
    outputs[:, 0] = -0.5, 0.3, 1.5
    np.testing.assert_allclose(jit(likelihood.mean)(outputs), [0, 0.3, 1], rtol=1e-12)


@pytest.mark.parametrize("name", ["bernoulli", *GAUSSIANS])
def test_initial_outputs_give_exactly_the_mean_of_the_data(name):
    likelihood = LIKELIHOODS[name]()
    unit = np.linspace(0.05, 0.95, 7)
    initial = likelihood.initial(unit * _values(likelihood)[-1])
    assert initial.shape == (7, likelihood.num_outputs)
    np.testing.assert_allclose(jit(likelihood.mean)(initial), unit, rtol=1e-12)


def test_initial_categorical_outputs_are_uniform():
    initial = LIKELIHOODS["categorical"]().initial(np.linspace(0, 255, 7))
    np.testing.assert_array_equal(initial, np.zeros((7, 256)))


@pytest.mark.parametrize(
    ("name", "num", "located"),
    [
        ("discretised_logistic_mixture", 5, lambda mean: mean / 127.5 - 1),
        ("gaussian_mixture", 10, lambda mean: mean),
    ],
)
def test_initial_components_of_a_mixture_lie_around_the_mean_and_differ(name, num, located):
    """Equal ones would have equal gradients and remain one for ever."""
    mean = np.array([0.0, 100.0, 255.0])
    initial = LIKELIHOODS[name]().initial(mean)
    assert initial.shape == (3, 3 * num)
    logits, location, log_scale = np.split(initial, 3, axis=1)
    np.testing.assert_allclose(location.mean(axis=1), located(mean), rtol=1e-12, atol=1e-14)
    assert all(np.unique(row).size == num for row in location)
    assert np.all(logits == 0) and np.all(log_scale == log_scale[0, 0])


def test_initial_logits_are_never_a_certainty():
    initial = LIKELIHOODS["bernoulli"]().initial(np.array([0.0, 1.0]))
    np.testing.assert_allclose(special.expit(initial), [[1e-3], [1 - 1e-3]], rtol=1e-12)


EXTREMES = (1e3, -1e3, 10.0, -10.0, 0.0)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_raw_outputs_at_the_extremes_have_finite_log_probabilities_and_gradients(name):
    """In float32: all combinations of extremes, x at and beside both ends."""
    likelihood = LIKELIHOODS[name]()
    num, x = likelihood.num_outputs, _values(likelihood)[[0, 1, -2, -1]]
    # Logits, locations and log-scales; mu and raw sigma; one half of the logits and the other.
    parts = 3 if name.endswith("_mixture") else min(num, 2)
    combined = itertools.product(itertools.product(EXTREMES, repeat=parts), x)
    parameters, x = (np.array(c, np.float32) for c in zip(*combined, strict=True))
    outputs = np.repeat(parameters, num // parts, axis=1)
    with jax.enable_x64(False):
        one = jax.value_and_grad(lambda o, v: likelihood.log_prob(o[None], v[None]))
        value, gradient = jax.jit(jax.vmap(one))(outputs, x)
    assert value.dtype == np.float32
    bad = ~np.isfinite(value) | ~np.isfinite(gradient).all(axis=1)
    assert not bad.any(), (
        f"{bad.sum()} of {len(bad)}, at outputs {np.unique(parameters[bad], axis=0)}"
    )


SPECS = {
    "binary": DataSpec((2, 1), "binary", np.zeros((2, 1), np.float32)),
    "uint8": DataSpec((2, 1), "uint8", np.zeros((2, 1), np.float32)),
    "real": DataSpec((2,), "real", np.zeros(2, np.float32)),
}


@pytest.mark.parametrize("name", [*DISCRETE, *GAUSSIANS])
def test_check_accepts_a_likelihood_of_the_datas_support_and_refuses_the_other(name):
    support = LIKELIHOODS[name]().support
    other, mend = {
        "binary": ("uint8", "'dynamic' or 'fixed'"),
        "uint8": ("binary", "'none'"),
    }[support]
    likelihoods.check(name, SPECS[support])
    with pytest.raises(UserError) as refusal:
        likelihoods.check(name, SPECS[other])
    line = str(refusal.value)
    assert f"model.likelihood={name!r}" in line and "\n" not in line
    assert f"{support} data" in line and other in line
    assert "data.binarisation" in line and f"to {mend}" in line


@pytest.mark.parametrize(
    ("name", "data", "instead"),
    [("bernoulli", "real", "gaussian_mixture"), ("gaussian_mixture", "binary", "bernoulli")],
)
def test_check_names_the_likelihoods_that_fit_the_data(name, data, instead):
    likelihoods.check("gaussian_mixture", SPECS["real"])
    with pytest.raises(UserError, match=f"'{name}' needs .*these are {data}: choose {instead}, or"):
        likelihoods.check(name, SPECS[data])


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_an_exact_model_needs_a_likelihood_that_is_a_distribution(name):
    """Around black half of a Gaussian is below it: its draws are moved to 0, and not scored."""
    support, grey = LIKELIHOODS[name]().support, np.arange(256.0)
    spec = DataSpec((1,), support, np.zeros(1, np.float32), 2)
    if LIKELIHOODS[name]().draws_what_it_scores:
        likelihoods.check(name, spec, exact=True)
        return
    outputs = jnp.asarray(LIKELIHOODS[name]().initial(np.zeros(1)))
    log_prob = jax.vmap(lambda x: LIKELIHOODS[name]().log_prob(outputs, x[None]))(grey)
    assert float(jnp.sum(jnp.exp(log_prob))) < 0.6
    with pytest.raises(
        UserError, match=rf"model\.likelihood='{name}' gives the grey values probabilities"
    ):
        likelihoods.check(name, spec, exact=True)


def test_check_refuses_an_unknown_likelihood_and_names_them_all():
    with pytest.raises(UserError, match=r"model\.likelihood='bernouilli'") as refusal:
        likelihoods.check("bernouilli", SPECS["binary"])
    assert all(name in str(refusal.value) for name in LIKELIHOODS)


@pytest.mark.parametrize(
    ("support", "bad"),
    [
        *(("binary", v) for v in (0.5, 255, -1, 2, math.nan, math.inf)),
        *(("uint8", v) for v in (0.5, 254.999, -1, 256, math.nan, math.inf)),
    ],
)
def test_data_outside_the_support_are_refused(support, bad):
    x = np.zeros((4, 2, 1))
    x[0, 0], x[1, 1] = 1, 1 if support == "binary" else 255
    likelihoods.refuse_outside_support(x, SPECS[support])
    likelihoods.refuse_outside_support(jnp.asarray(x), SPECS[support])
    likelihoods.refuse_outside_support(x.astype(np.uint8), SPECS[support])
    x[3, 1] = bad
    allowed = r"\{0, 1\}" if support == "binary" else "0 to 255"
    value = re.escape(str(np.float64(bad)))
    with pytest.raises(UserError, match=rf"{allowed}, and this batch has the value {value}$"):
        likelihoods.refuse_outside_support(jnp.asarray(x), SPECS[support])


def test_traced_data_are_not_checked():
    """A compiled step cannot look at its values, and must not fail to try."""
    inside = jax.jit(lambda x: likelihoods.refuse_outside_support(x, SPECS["binary"]) or x + 1)
    assert inside(jnp.float64(0.5)) == 1.5
