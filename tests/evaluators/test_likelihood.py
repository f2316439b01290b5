"""The evaluator against a linear-Gaussian model, of which everything is known in closed form."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dgm_jax import sharding
from dgm_jax.core import Aux, DataSpec, Latents, Model, Player, UserError
from dgm_jax.data import dataset as data
from dgm_jax.evaluators import likelihood, passes
from dgm_jax.rng import per_example, stream

D, LATENTS = 4, 2
W = 40 * np.array([[1.0, 0.2], [-0.5, 0.7], [0.3, -0.9], [0.1, 0.6]])
NOISE = 20.0
PARAMS = {"linear": np.array([100.0, 120.0, 140.0, 130.0])}  # the offset b
# p(z | x) = N(GAIN (x - b), CHOL CHOL')
COVARIANCE = np.linalg.inv(np.eye(LATENTS) + W.T @ W / NOISE**2)
GAIN, CHOL = COVARIANCE @ W.T / NOISE**2, np.linalg.cholesky(COVARIANCE)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _dataset(num, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (num, 2, 2, 1), dtype=np.uint8)
    split = data.Split("any", images, np.zeros(num, np.int32), np.zeros((num, 0), np.int32))
    spec = DataSpec((2, 2, 1), "uint8", images.mean(0))
    splits = dict.fromkeys(("validation", "test"), split)
    return data.Dataset(data.Config(binarisation="none"), splits, spec, {})


def _exact(dataset):
    """log p(x) `[N]` = log N(x; b, WW' + s² I)."""
    x = dataset.splits["test"].x.reshape(-1, D).astype(float)
    covariance = W @ W.T + NOISE**2 * np.eye(D)
    return stats.multivariate_normal(PARAMS["linear"], covariance).logpdf(x)


@dataclasses.dataclass(frozen=True)
class Posterior:
    """q(z | x): the exact one, moved by `shift` and widened by `scale` along its own axes."""

    shift: tuple[float, float] = (0.0, 0.0)
    scale: tuple[float, float] = (1.0, 1.0)

    @property
    def kl(self):
        """KL(q ‖ p(z | x)), the same for every x; one dimension at a time."""
        shift, scale = np.array(self.shift), np.array(self.scale)
        return np.sum(0.5 * (scale**2 + shift**2 - 1) - np.log(scale))

    @property
    def chi_square(self):
        """Var_q[p(z | x) / q(z | x)], by quadrature."""
        axis = np.linspace(-15, 15, 4001)
        ratios = [
            np.trapezoid(stats.norm.pdf(axis) ** 2 / stats.norm.pdf(axis, *one), axis)
            for one in zip(self.shift, self.scale, strict=True)
        ]
        return math.prod(ratios) - 1


def _uniforms(key):
    """Two uniform numbers, of the key's own bits: compiling jax.random takes a second each time."""
    return (jax.random.key_data(key).astype(float) + 0.5) / 2.0**32


def _normals(key):
    """Two standard Gaussian numbers (Box & Muller 1958)."""
    a, b = _uniforms(key)
    return jnp.sqrt(-2 * jnp.log(a)) * jnp.stack([jnp.cos(2 * jnp.pi * b), jnp.sin(2 * jnp.pi * b)])


def _uniform(params, batch, key):
    return jnp.full(len(batch["x"]), _uniforms(key)[0])


def _weight(params, batch, key):
    """log w of a weight that is zero half of the time, else exponentially distributed."""
    a, b = _uniforms(key)
    return jnp.full(len(batch["x"]), jnp.where(a < 0.5, -jnp.inf, jnp.log(-jnp.log(b))))


@jax.jit
def _key_bits(seed):
    """Of the keys of 20 draws for each of 37 test examples: uint32 `[37, 20, 2]`."""
    keys = per_example(stream(seed, "eval/test"), jnp.arange(37, dtype=jnp.int32))
    draws = jnp.arange(20, dtype=jnp.int32)
    return jax.random.key_data(jax.vmap(lambda key: per_example(key, draws))(keys))


def _expected_weights(seed):
    """The 20 weights w (not their logs) that each of 37 examples draws with `_weight`."""
    a, b = np.moveaxis((np.asarray(_key_bits(np.int32(seed))) + 0.5) / 2**32, -1, 0)
    return np.where(a < 0.5, 0, -np.log(b))


def _linear_gaussian(q):
    """p(z) = N(0, I), p(x | z) = N(Wz + b, s² I), and q."""
    shift, root = np.array(q.shift), CHOL * np.array(q.scale)
    log_det = np.log(np.linalg.det(root))

    def draw(params, batch, rng):
        x = batch["x"].reshape(-1, D).astype(float)
        residual = x - params["linear"][None]
        mean = residual @ GAIN.T + (CHOL @ shift)[None]
        noise = jnp.broadcast_to(_normals(rng)[None], mean.shape)
        z = mean + noise @ root.T
        log_q = jnp.sum(jax.scipy.stats.norm.logpdf(noise), -1) - log_det
        log_p_z = jnp.sum(jax.scipy.stats.norm.logpdf(z), -1)
        log_p_x = jnp.sum(jax.scipy.stats.norm.logpdf((residual - z @ W.T) / NOISE), -1)
        log_p_x = log_p_x - D * np.log(NOISE)
        kl = 0.5 * (np.trace(root @ root.T) + jnp.sum(mean**2, -1) - LATENTS) - log_det
        return {"distortion": -log_p_x, "rate": kl}, log_p_x + log_p_z - log_q, mean

    def loss_fn(params, batch, rng):
        terms, _, _ = draw(params, batch, rng)
        return jnp.mean(terms["distortion"] + terms["rate"]), Aux(terms)

    def elbo(params, batch, rng):
        terms, _, _ = draw(params, batch, rng)
        return -terms["distortion"] - terms["rate"]

    return Model(
        init=lambda rng, batch: PARAMS,
        players=(Player("linear", loss_fn),),
        log_likelihood_fns={"elbo": elbo},
        log_weight=lambda *arguments: draw(*arguments)[1],
        latents=Latents(None, None, None),
        encode=lambda *arguments: draw(*arguments)[2],
    )


def _run(fn, dataset, batch_size=40, mesh=None, seed=0, split="test", params=PARAMS):
    mesh = mesh or sharding.make_mesh()
    return passes.compile_pass(fn, dataset, split, batch_size, mesh)(params, seed)


def _bound(model, dataset, num_samples, chunk=64, **more):
    fn = likelihood.importance_weighted(model, num_samples, chunk)
    return _run(fn, dataset, **more)["importance_weighted_bound"]


EXACT, WRONG = Posterior(), Posterior((0.5, -0.3), (1.5, 0.9))


def test_with_the_exact_posterior_every_weight_is_the_likelihood():
    """Whatever z is drawn, and so the bound for any number of them."""
    dataset, model = _dataset(37), _linear_gaussian(EXACT)
    exact = _exact(dataset)
    x = dataset.splits["test"].x.astype(float)
    log_weight = jax.jit(model.log_weight)
    for seed in range(3):
        weights = log_weight(PARAMS, {"x": x}, jax.random.key(seed))
        np.testing.assert_allclose(weights, exact, rtol=1e-10)
    np.testing.assert_allclose(_bound(model, dataset, 13, chunk=5), exact, rtol=1e-10)


def test_with_a_wrong_posterior_the_bound_rises_from_the_elbo_to_the_likelihood():
    """Over 2,000 images, of which L_K - log p(x) is an independent draw each."""
    dataset, model = _dataset(2000), _linear_gaussian(WRONG)
    exact = _exact(dataset)
    passes = {k: likelihood.importance_weighted(model, k, chunk=64) for k in (1, 8, 64)}

    def all_passes(*arguments):
        return {k: fn(*arguments)["importance_weighted_bound"] for k, fn in passes.items()}

    gaps = {k: v - exact for k, v in _run(all_passes, dataset, batch_size=1000).items()}

    def mean_and_error(values):
        return values.mean(), values.std(ddof=1) / math.sqrt(len(values))

    mean, error = mean_and_error(gaps[1])
    assert abs(mean + WRONG.kl) < 4 * error  # K = 1 is the ELBO
    for fewer, more in ((1, 8), (8, 64)):
        rise, error = mean_and_error(gaps[more] - gaps[fewer])
        assert rise > 4 * error
        # The gap to log p(x) is Var[p/q] / 2K and smaller terms, from below.
        mean, error = mean_and_error(gaps[more])
        assert -WRONG.chi_square / (2 * more) - 4 * error < mean < 4 * error
    # By K = 64 the smaller terms are below the noise.
    assert abs(mean + WRONG.chi_square / (2 * 64)) < 4 * error


def test_the_elbo_and_its_terms_are_their_means_over_draws():
    """ELBO = log p(x) - KL(q ‖ posterior), within four standard errors; terms add up to it."""
    dataset, model = _dataset(500), _linear_gaussian(WRONG)
    model = model._replace(log_likelihood_fns={**model.log_likelihood_fns, "uniform": _uniform})
    found = _run(likelihood.elbo_terms(model, 20), dataset, batch_size=256)
    np.testing.assert_allclose(found["distortion"] + found["rate"], -found["elbo"], rtol=1e-10)
    error = found["elbo"] - _exact(dataset) + WRONG.kl
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(500)
    # Not one draw twenty times: each has the key that it should have.
    expected = (np.asarray(_key_bits(np.int32(0)))[..., 0] + 0.5).mean(axis=1) / 2**32
    np.testing.assert_allclose(found["uniform"][:37], expected, rtol=1e-12)


def test_terms_of_held_out_data_are_those_that_the_player_says():
    """Where its loss has others: here twice as large."""
    model = _linear_gaussian(WRONG)
    loss_fn = model.loss_fn

    def terms_fn(params, batch, rng):
        return {name: 2 * term for name, term in loss_fn(params, batch, rng)[1].terms.items()}

    other = model._replace(players=(Player("linear", loss_fn, terms_fn),))
    dataset = _dataset(5)
    found, twice = (_run(likelihood.elbo_terms(m, 2), dataset, 8) for m in (model, other))
    for name in ("distortion", "rate"):
        np.testing.assert_allclose(twice[name], 2 * found[name], rtol=1e-12)
    np.testing.assert_array_equal(twice["elbo"], found["elbo"])


@pytest.fixture(scope="module")
def reference():
    """All kinds of results of 37 examples, in one batch, 20 draws at once, on 8 devices."""
    with jax.enable_x64(True):
        return _all_kinds(20, batch_size=40, mesh=sharding.make_mesh(8))


def _all_kinds(chunk, **more):
    model = _linear_gaussian(WRONG)
    kinds = (
        likelihood.elbo_terms(model, 10),
        likelihood.importance_weighted(model, 20, chunk),
        likelihood.features(model),
    )

    def everything(params, batch, keys):
        return {k: v for fn in kinds for k, v in fn(params, batch, keys).items()}

    return _run(everything, _dataset(37), **more)


@pytest.mark.parametrize(
    ("chunk", "batch_size", "devices"),
    [(1, 8, 8), (3, 16, 8), (7, 5, 1)],
)
def test_no_result_depends_on_batch_size_chunk_or_devices(reference, chunk, batch_size, devices):
    found = _all_kinds(chunk, batch_size=batch_size, mesh=sharding.make_mesh(devices))
    assert found.keys() == reference.keys()
    assert found.keys() >= {"elbo", "rate", "importance_weighted_bound", "codes"}
    for name, values in found.items():
        assert len(values) == 37
        np.testing.assert_allclose(values, reference[name], rtol=1e-11, err_msg=name)


def test_codes_are_the_posterior_means_of_the_examples_in_order(reference):
    x = _dataset(37).splits["test"].x.reshape(37, D)
    expected = (x - PARAMS["linear"]) @ GAIN.T + CHOL @ WRONG.shift
    np.testing.assert_allclose(reference["codes"], expected, rtol=1e-10)


def _with_weight(log_weight):
    return Model(init=None, players=(), log_likelihood_fns={}, log_weight=log_weight)


def test_exactly_k_distinct_draws_are_averaged():
    """A weight that is a draw of its key: the bound is the log-mean over K keys, zeros included."""
    w = _expected_weights(3)
    assert abs(np.sum(w == 0) - w.size / 2) < 4 * math.sqrt(w.size / 4)
    assert len(np.unique(w[w > 0])) == np.sum(w > 0)
    found = _bound(_with_weight(_weight), _dataset(37), 20, chunk=7, batch_size=16, seed=3)
    np.testing.assert_allclose(found, np.log(w.mean(axis=1)), rtol=1e-10, atol=1e-12)


def test_every_example_seed_and_split_has_its_own_key():
    def bits(params, batch, keys):
        return {"key": jax.random.key_data(keys)}

    found = [
        _run(bits, _dataset(37), seed=seed, split=split)["key"]
        for seed in (0, 1)
        for split in ("test", "validation")
    ]
    assert len(np.unique(np.concatenate(found), axis=0)) == 4 * 37


def test_a_curve_of_k_comes_from_repeats_with_the_same_draws():
    """⌊K / k⌋ bounds with k draws each, averaged; their error is what another seed would change."""
    draws, dataset = np.log(_expected_weights(3) + 1), _dataset(37)
    model = _with_weight(lambda *inputs: jnp.log1p(jnp.exp(_weight(*inputs))))
    bounds = likelihood.importance_weighted(model, 20, chunk=7)
    run = passes.compile_pass(bounds, dataset, "test", 40, sharding.make_mesh())
    found = run(PARAMS, 3)
    for k, repeats in ((1, 20), (10, 2)):
        each = special.logsumexp(draws.reshape(37, repeats, k), axis=2) - math.log(k)
        bound, variance = found[f"importance_weighted_bound_{k}"], found[f"variance_{k}"]
        np.testing.assert_allclose(bound, each.mean(axis=1), rtol=1e-10)
        np.testing.assert_allclose(variance, each.var(axis=1, ddof=1) / repeats, rtol=1e-9)
    # The error over repeats is the spread of the whole result over seeds.
    means = [run(PARAMS, seed)["importance_weighted_bound_1"].mean() for seed in range(40)]
    error = math.sqrt(found["variance_1"].sum()) / 37
    # A chi-squared with 39 degrees of freedom.
    assert 39 * np.var(means, ddof=1) / error**2 < stats.chi2(39).ppf(0.9999)
    assert 39 * np.var(means, ddof=1) / error**2 > stats.chi2(39).ppf(0.0001)


@pytest.mark.parametrize("k", [1, 5, 64, 100])
def test_equal_weights_have_themselves_as_the_bound(k):
    """Whether or not the chunks divide K, and where exp of the weight over- or underflows."""
    model = _with_weight(lambda params, batch, key: jnp.full(len(batch["x"]), params))
    run = passes.compile_pass(
        likelihood.importance_weighted(model, k, 64), _dataset(3), "test", 8, sharding.make_mesh()
    )
    for log_weight in (0.0, -2000.0, 2000.0):
        found = run(np.float64(log_weight), 0)["importance_weighted_bound"]
        np.testing.assert_allclose(found, log_weight, rtol=1e-14, atol=1e-13)


def test_single_precision_keeps_six_digits_of_large_weights():
    """log w around -1,000 in float32, against the same draws in double precision."""

    def weight(params, batch, key):
        return -1000 + _weight(params, batch, key)

    with jax.enable_x64(False):
        found = _bound(_with_weight(weight), _dataset(37), 20, chunk=1)
    assert found.dtype == np.float32
    expected = -1000 + np.log(_expected_weights(0).mean(axis=1))
    # log w itself is rounded to 2^-15 = 3e-5, and so is each of 20 additions.
    np.testing.assert_allclose(found, expected, rtol=0, atol=20 * 2**-15)


def test_padding_never_enters():
    """Each example once, in order, all of them real; 37 in batches of 16 leave 11 rows over."""

    def seen(params, batch, keys):
        return {"id": batch["id"], "mask": batch["mask"], "x": batch["x"]}

    dataset = _dataset(37)
    found = _run(seen, dataset, batch_size=16)
    np.testing.assert_array_equal(found["id"], np.arange(37))
    np.testing.assert_array_equal(found["x"], dataset.splits["test"].x)
    assert found["mask"].all()


def test_a_pass_is_compiled_once():
    """Whatever the parameters and seed, the last, padded batch included."""
    traces = []

    def fn(params, batch, keys):
        traces.append(1)
        return {"x": jnp.sum(batch["x"], (1, 2, 3)) * params}

    run = passes.compile_pass(fn, _dataset(37), "test", 16, sharding.make_mesh())
    one, two = run(np.float64(1.0), 0), run(np.float64(2.0), 5)
    np.testing.assert_array_equal(2 * one["x"], two["x"])
    assert len(traces) == 1


SMALL = likelihood.Config(num_samples=20, elbo_samples=10, batch_size=16, chunk=6)


def test_evaluate_reports_what_the_passes_find(reference):
    model, mesh = _linear_gaussian(WRONG), sharding.make_mesh()
    found, each = likelihood.compile_evaluation(model, _dataset(37), SMALL, mesh)(PARAMS, 0)
    measured = {name for name in reference if name != "codes" and not name.startswith("variance")}
    assert found.keys() == measured | {"bits_per_dim", "active_units"}
    assert each.keys() == measured
    curve = {name: k for k, name in likelihood.curve(20).items()}
    assert sorted(curve.values()) == [1, 10, 20]
    for name in measured:
        metric, values = found[name], reference[name]
        assert metric.unit == "nats" and metric.num_examples == 37
        assert metric.num_samples == curve.get(name, 10)
        np.testing.assert_allclose(each[name], values, rtol=1e-12)
        np.testing.assert_allclose(metric.value, values.mean(), rtol=1e-10)
        np.testing.assert_allclose(metric.standard_error, stats.sem(values), rtol=1e-10)
    # The tightest bound that there is, in bits per pixel.
    bits = -found["importance_weighted_bound"].value / (D * math.log(2))
    np.testing.assert_allclose(found["bits_per_dim"].value, bits, rtol=1e-12)
    assert found["active_units"].value == LATENTS  # the latents' variances are of order 1


def test_the_rate_has_those_of_the_latents_as_its_parts():
    """Example n gives latent l a rate of n l."""

    def latent_rates(params, batch):
        return batch["id"][:, None] * jnp.arange(3.0)[None]

    model = _linear_gaussian(WRONG)._replace(latent_rates=latent_rates)
    evaluate = likelihood.compile_evaluation(model, _dataset(37), SMALL, sharding.make_mesh())
    found = evaluate(PARAMS, 0).metrics
    assert found["rate"].parts == [0.0, 18.0, 36.0]  # the mean of 0, ..., 36 is 18
    assert found["distortion"].parts is None


def test_evaluate_of_a_model_with_an_exact_likelihood():
    """`log_prob` alone: it is averaged exactly, and bits/dim come from it."""
    covariance = W @ W.T + NOISE**2 * np.eye(D)
    whiten = np.linalg.inv(np.linalg.cholesky(covariance)).T
    log_scale = 0.5 * np.linalg.slogdet(covariance)[1]

    def log_prob(params, batch, rng):
        white = (batch["x"].reshape(-1, D).astype(float) - params["linear"][None]) @ whiten
        return jnp.sum(jax.scipy.stats.norm.logpdf(white), -1) - log_scale

    model = Model(init=None, players=(), log_likelihood_fns={"log_prob": log_prob})
    dataset = _dataset(37)
    found = likelihood.compile_evaluation(model, dataset, SMALL, sharding.make_mesh())(
        PARAMS, 0
    ).metrics
    assert found.keys() == {"log_prob", "bits_per_dim"}
    exact = _exact(dataset).mean()
    assert all(metric.num_samples is None for metric in found.values())  # nothing is drawn
    np.testing.assert_allclose(found["log_prob"].value, exact, rtol=1e-10)
    np.testing.assert_allclose(found["bits_per_dim"].value, -exact / (D * math.log(2)), rtol=1e-10)


def test_the_split_is_the_one_that_the_config_names():
    dataset, mesh = _dataset(37), sharding.make_mesh()
    dataset = dataset._replace(splits={**dataset.splits, "validation": _dataset(5).splits["test"]})
    chosen = dataclasses.replace(SMALL, split="validation")
    found = likelihood.compile_evaluation(_linear_gaussian(WRONG), dataset, chosen, mesh)(
        PARAMS, 0
    ).metrics
    assert found["importance_weighted_bound"].num_examples == 5
    dataset.splits["validation"] = dataset.splits["test"].part("validation", np.arange(0))
    with pytest.raises(UserError, match=r"eval\.split='validation' needs data\.validation above 0"):
        likelihood.compile_evaluation(_linear_gaussian(WRONG), dataset, chosen, mesh)
    with pytest.raises(UserError, match=r"eval\.split='train': choose one of test, validation"):
        likelihood.check(dataclasses.replace(SMALL, split="train"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_example_that_is_not_finite_stops_the_evaluation(bad):
    """It is named, not filtered out of the mean."""

    def log_weight(params, batch, key):
        return jnp.where((batch["id"] == 5) | (batch["id"] == 30), bad, 0.0)

    model = _with_weight(log_weight)
    with pytest.raises(UserError, match=r"importance_weighted_bound_1 .* 2 of 37 .* id 5\b"):
        likelihood.compile_evaluation(model, _dataset(37), SMALL, sharding.make_mesh())(PARAMS, 0)


def test_features_that_are_no_posterior_means_have_no_active_units():
    """Those of a classifier, a flow, a codebook: of models without continuous latents."""
    model = _linear_gaussian(WRONG)._replace(latents=None)
    found = likelihood.compile_evaluation(model, _dataset(5), SMALL, sharding.make_mesh())
    assert "active_units" not in found(PARAMS, 0).metrics


def test_active_units_counts_variances_above_a_hundredth():
    signs = np.array([1.0, -1.0] * 50)[:, None]  # of variance 1 exactly
    codes = 7 + signs * np.sqrt([0.0, 0.0099, 0.0101, 4.0])
    metric = likelihood.active_units(codes.astype(np.float32))
    assert metric.value == 2 and metric.unit == "of 4 units" and metric.num_examples == 100
    assert likelihood.active_units(codes, threshold=1.0).value == 1


@pytest.mark.parametrize("field", ["num_samples", "elbo_samples", "batch_size", "chunk"])
def test_check_refuses_a_bad_value_by_its_name(field):
    with pytest.raises(UserError, match=rf"eval\.{field}=0"):
        likelihood.check(dataclasses.replace(SMALL, **{field: 0}))


def test_devices_that_cannot_share_a_batch_equally_get_a_few_more_examples():
    """Twelve, of eight devices: each has two, and the order stays."""
    sizes = []

    def numbers(params, batch, keys):
        sizes.append(len(batch["id"]))
        return {"id": batch["id"].astype(jnp.float32)}

    for mesh in (sharding.make_mesh(), sharding.make_mesh(1)):
        found = passes.compile_pass(numbers, _dataset(37), "test", 12, mesh)({}, 0)
        np.testing.assert_array_equal(found["id"], np.arange(37))
    assert sizes == [16, 12]
