"""Energies against densities known in closed form: their slope, their Z, and what learning does."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from dgm_jax import mcmc
from dgm_jax.core import DataSpec, UserError
from dgm_jax.distributions import gaussian_log_prob, standard_gaussian_log_prob
from dgm_jax.models import energy

PLANE = DataSpec((2,), "real", np.array([0.3, -0.2], np.float32), 100)
GREY = DataSpec((4, 4, 1), "uint8", np.full((4, 4, 1), 100, np.float32), 100, 3)
CONFIG = energy.Config(hidden=(8, 8))
CHAINS = replace(
    CONFIG,
    objective="contrastive_divergence",
    sigma_min=0.0,
    num_chains=32,
    metropolis=True,
    restart=1.0,
    rounds=20,
)


def _points(num, seed=0, scale=0.7):
    """Gaussian, with the mean of `PLANE`."""
    noise = np.random.default_rng(seed).normal(size=(num, 2))
    return {"x": jnp.asarray(PLANE.mean[None] + scale * noise, jnp.float32)}


def _images(num, seed=0):
    x = np.random.default_rng(seed).integers(0, 256, (num, *GREY.event_shape))
    return {"x": jnp.asarray(x, jnp.float32)}


def _moved(params, size=0.5):
    """The network's numbers at random: no special case of a fresh one, which adds nothing."""
    leaves, structure = jax.tree.flatten(params["energy"])
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(size * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return {**params, "energy": jax.tree.unflatten(structure, leaves)}


# The partition function.


def _mixture(num_dims):
    """log of 7 times a mixture of two Gaussians, `u [B, D] -> [B]`, and its parts' moments."""
    means = np.array([[-1.0, 0.5, 0.2], [1.5, -1.0, 0.0]])[:, :num_dims]
    deviations, weights = np.array([0.6, 0.4]), np.array([0.3, 0.7])

    def log_density(u):
        each = [
            jnp.sum(gaussian_log_prob(u, mean[None], math.log(deviation)), axis=1) + math.log(w)
            for mean, deviation, w in zip(means, deviations, weights, strict=True)
        ]
        return jnp.logaddexp(*each) + math.log(7)

    return log_density, means, deviations, weights


def _tilt(num_dims):
    log_density = _mixture(num_dims)[0]
    return lambda u: log_density(u) - jnp.sum(standard_gaussian_log_prob(u), axis=1)


@pytest.mark.parametrize("num_dims", [1, 2])
def test_quadrature_finds_the_normaliser_of_a_mixture(num_dims):
    found = jax.jit(lambda: energy.log_normaliser(_tilt(num_dims), num_dims))()
    assert float(found) == pytest.approx(math.log(7), abs=1e-5)


def test_what_is_too_narrow_for_the_grid_has_no_normaliser():
    """A ridge of a hundredth of the grid's distance: its integral is a matter of where points lie.

    One of ten distances is integrated to the last digit that float32 has.
    """

    def tilt_to(deviation):
        narrow = functools.partial(gaussian_log_prob, mu=0.3, log_sigma=math.log(deviation))
        return lambda u: narrow(u[:, 0]) - standard_gaussian_log_prob(u[:, 0])

    for deviation, known in ((2e-4, False), (0.2, True)):
        log_z = float(jax.jit(lambda d=deviation: energy.log_normaliser(tilt_to(d), 2))())
        assert math.isnan(log_z) == (not known)
        assert not known or log_z == pytest.approx(0, abs=1e-5)


def test_annealing_finds_it_in_three_dimensions_between_its_bounds():
    """log Z of a forward run, and of the reverse one that starts at exact draws."""
    found = float(jax.jit(lambda: energy.log_normaliser(_tilt(3), 3))())
    assert found == pytest.approx(math.log(7), abs=0.15)
    _, means, deviations, weights = _mixture(3)
    rng = np.random.default_rng(0)
    part = rng.choice(2, size=256, p=weights)
    exact = means[part] + deviations[part, None] * rng.normal(size=(256, 3))
    target = mcmc.Target(lambda u: jnp.sum(standard_gaussian_log_prob(u), axis=1), _tilt(3))
    betas = mcmc.temperatures(100)
    start = jax.random.normal(jax.random.key(1), (256, 3))

    @jax.jit
    def bracket(start, end):
        step_sizes = mcmc.tune(target, start, betas, jax.random.key(2))
        keys = jax.random.split(jax.random.key(3))
        return (
            mcmc.forward(target, start, betas, step_sizes, keys[0]),
            mcmc.backward(target, end, betas, step_sizes, keys[1]),
        )

    low, high = map(np.asarray, bracket(start, jnp.asarray(exact, jnp.float32)))
    error = 3 * np.hypot(low.std(), high.std()) / 16
    assert low.mean() - error < math.log(7) < high.mean() + error
    assert high.mean() - low.mean() < 1


@pytest.mark.parametrize(
    "config", [replace(CONFIG, sigma_min=0.3), CHAINS], ids=["noise levels", "one level"]
)
def test_the_density_integrates_to_one(config):
    """On a grid that is not the one of Z: shifted, wider, and of another spacing."""
    model = energy.build(config, PLANE)
    params = _moved(model.init(jax.random.key(0), _points(50)))
    axis = np.linspace(-6.55, 7.1, 601)
    x = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    log_p = jax.jit(model.log_likelihood_fns["log_prob"])(
        params, {"x": jnp.asarray(x, jnp.float32)}, jax.random.key(0)
    )
    total = np.exp(np.asarray(log_p, np.float64)).sum() * (axis[1] - axis[0]) ** 2
    assert total == pytest.approx(1, abs=1e-4)
    gaussian = stats.multivariate_normal(PLANE.mean, 0.5 * np.eye(2)).logpdf(x)
    assert np.abs(np.asarray(log_p) - gaussian)[gaussian > -5].max() > 0.3  # no special case


def test_more_dimensions_have_an_estimate_under_its_own_name():
    """Of a fresh network, which adds nothing, it is exact."""
    spec = DataSpec((3,), "real", np.zeros(3, np.float32), 100)
    model = energy.build(CHAINS, spec)
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    params = model.init(jax.random.key(0), {"x": x})
    (name,) = model.log_likelihood_fns
    assert name == "log_prob_ais"
    found = jax.jit(model.log_likelihood_fns[name])(params, {"x": x}, jax.random.key(0))
    exact = stats.multivariate_normal(np.zeros(3), np.mean(x**2) * np.eye(3)).logpdf(x)
    np.testing.assert_allclose(found, exact, rtol=1e-4)
    assert not energy.build(CONFIG, GREY).log_likelihood_fns


# Objectives.


def _gradient(config, params, batch, seed=0):
    model = energy.build(config, PLANE)

    def loss(own):
        return model.loss_fn({**params, "energy": own}, batch, jax.random.key(seed))[0]

    return jax.jit(jax.grad(loss))(params["energy"])


def _flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_contrastive_divergence_has_the_gradient_of_the_likelihood():
    """∇ of the mean of log p(x), Z by quadrature: CD's, when the chains have gone to p.

    Of the last layer, in whose weights p is an exponential family: E[h] of data minus E[h] of p.
    """
    config = replace(CHAINS, num_chains=10_000, step_size=0.15, langevin_steps=50)
    model = energy.build(config, PLANE)
    params = _moved(model.init(jax.random.key(0), _points(200)))
    batch = {"x": _points(50)["x"] + 1}  # not what p is about

    def cost(own):
        fn = model.log_likelihood_fns["log_prob"]
        return -jnp.mean(fn({**params, "energy": own}, batch, jax.random.key(0)))

    exact, found = jax.jit(jax.grad(cost))(params["energy"]), _gradient(config, params, batch)
    last = lambda tree: np.ravel(tree["Dense_0"]["kernel"])  # noqa: E731
    of_data = np.linalg.norm(last(exact))
    assert of_data > 0.1
    np.testing.assert_allclose(last(found), last(exact), atol=0.03 * of_data)
    np.testing.assert_allclose(_flat(found), _flat(exact), atol=0.03 * np.abs(_flat(exact)).max())


def _known(params, scale):
    """The Gaussian's deviation set, in place of that of the first batch."""
    return {**params, "state": {**params["state"], "scale": jnp.float32(scale)}}


@pytest.mark.parametrize("deviation", [0.7, 1.2])
def test_denoising_costs_what_the_closed_form_says_of_gaussian_data(deviation):
    """With E the Gaussian of s = 0.7: D/2, and its slope zero, where the data's is the same."""
    scale, num = 0.7, 100_000
    batch = _points(num, scale=deviation)
    params = _known(energy.build(CONFIG, PLANE).init(jax.random.key(0), batch), scale)
    loss, aux = jax.jit(energy.build(CONFIG, PLANE).loss_fn)(params, batch, jax.random.key(1))
    sigma2 = np.geomspace(CONFIG.sigma_min, CONFIG.sigma_max, 1001) ** 2
    each = (sigma2 * deviation**2 + scale**4) / (scale**2 * (scale**2 + sigma2))  # D/2 = 1 of it
    error = 4.5 * float(np.std(aux.terms["score_matching"])) / math.sqrt(num)
    assert float(loss) == pytest.approx(np.trapezoid(each, dx=1e-3), abs=error)
    slope = np.abs(_flat(_gradient(CONFIG, params, batch))).max()
    assert slope < 0.01 if deviation == scale else slope > 0.05


def test_denoising_learns_the_score_of_the_noised_data():
    """-(x - μ) / (s² + σ²) of Gaussian data, at the lowest σ, where p(x) is."""
    model = energy.build(replace(CONFIG, sigma_min=0.4), PLANE)
    batch = _points(20)
    params = _known(model.init(jax.random.key(0), batch), 0.7)

    def log_p(x):
        return jnp.sum(model.log_likelihood_fns["log_prob"](params, {"x": x}, jax.random.key(0)))

    score = jax.jit(jax.grad(log_p))(batch["x"])
    exact = -(np.asarray(batch["x"]) - PLANE.mean) / (0.7**2 + 0.4**2)
    np.testing.assert_allclose(score, exact, rtol=1e-4, atol=1e-5)


def test_sliced_score_matching_of_one_dimension_is_exact():
    """½ E'² - E'', by differentiating the log-density twice."""
    spec = DataSpec((1,), "real", np.zeros(1, np.float32), 100)
    config = replace(CHAINS, objective="sliced_score_matching")
    model = energy.build(config, spec)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 1)), jnp.float32)
    params = _moved(model.init(jax.random.key(0), {"x": x}))

    def cost(x):
        fn = model.log_likelihood_fns["log_prob"]
        log_p = lambda x: fn(params, {"x": x.reshape(1, 1)}, jax.random.key(0))[0]  # noqa: E731
        return jax.grad(log_p)(x) ** 2 / 2 + jax.grad(jax.grad(log_p))(x)

    _, aux = jax.jit(model.loss_fn)(params, {"x": x}, jax.random.key(0))
    exact = jax.jit(jax.vmap(cost))(x[:, 0])
    np.testing.assert_allclose(aux.terms["score_matching"], exact, rtol=1e-3, atol=1e-3)
    assert np.abs(exact).max() > 1


@pytest.mark.parametrize(
    "config", [replace(CONFIG, sigma_min=0.3), CHAINS], ids=["denoising", "chains"]
)
def test_learning_approaches_the_density_of_the_data(config):
    """Of a stretched Gaussian, with the noise that belongs to it; a round one is 0.2 nats away."""
    covariance = np.array([[1.0, 0.8], [0.8, 1.0]]) / 2
    noisy = covariance + config.sigma_min**2 * np.eye(2)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.multivariate_normal(PLANE.mean, covariance, 4000), jnp.float32)
    held_out = rng.multivariate_normal(PLANE.mean, noisy, 4000)
    config = replace(config, hidden=(32, 32), step_size=0.1, num_chains=200)
    model = energy.build(config, PLANE)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 400))

    def step(carry, key):
        params, opt_state = carry
        row_rng, loss_rng = jax.random.split(key)
        batch = {"x": x[jax.random.randint(row_rng, (200,), 0, len(x))]}
        grads, aux = jax.grad(
            lambda own: model.loss_fn({**params, "energy": own}, batch, loss_rng), has_aux=True
        )(params["energy"])
        updates, opt_state = optimizer.update(grads, opt_state)
        own = optax.apply_updates(params["energy"], updates)
        return ({"energy": own, "state": aux.state or params["state"]}, opt_state), None

    @jax.jit
    def train(params):
        start = params, optimizer.init(params["energy"])
        return jax.lax.scan(step, start, jax.random.split(jax.random.key(0), 400))[0][0]

    def shortfall(params):
        log_p = jax.jit(model.log_likelihood_fns["log_prob"])
        found = log_p(params, {"x": jnp.asarray(held_out, jnp.float32)}, jax.random.key(0))
        return np.mean(stats.multivariate_normal(PLANE.mean, noisy).logpdf(held_out) - found)

    params = model.init(jax.random.key(0), {"x": x})
    assert shortfall(params) > 0.2
    assert -0.01 < shortfall(train(params)) < 0.03


# Chains and samples.


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, sigma_min=0.5, rounds=2, langevin_steps=400),
        replace(CHAINS, langevin_steps=20),
    ],
    ids=["noise levels", "one level"],
)
def test_samples_have_the_moments_of_the_density(config):
    """By the same quadrature that Z is from."""
    model, num = energy.build(replace(config, step_size=0.05), PLANE), 4000
    params = _moved(model.init(jax.random.key(0), _points(50)), 0.7)
    axis = np.linspace(-5, 5, 401)
    x = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    fn = jax.jit(model.log_likelihood_fns["log_prob"])
    p = np.exp(fn(params, {"x": jnp.asarray(x, jnp.float32)}, jax.random.key(0)))
    p /= p.sum()
    mean, samples = p @ x, jax.jit(model.sample, static_argnums=2)(params, jax.random.key(1), num)
    cov, drawn = (x - mean).T @ ((x - mean) * p[:, None]), np.asarray(samples["x"], np.float64)
    assert np.linalg.norm(mean - PLANE.mean) > 0.1  # where it would be, did the network add nothing
    deviation = np.sqrt(np.diag(cov))
    assert np.all(np.abs(drawn.mean(axis=0) - mean) < 4.5 * deviation / math.sqrt(num))
    assert np.all(np.abs(np.cov(drawn.T) - cov) < 0.08 * np.outer(deviation, deviation))


def test_pictures_are_samples_without_their_noise():
    """Of a fresh network N(μ, s² + σ²) and its best guess of the data, of deviation s² / √(...)."""
    config = replace(CONFIG, sigma_min=0.05, sigma_max=0.2)
    model = energy.build(config, GREY)
    params = _known(model.init(jax.random.key(0), _images(10)), 0.05)
    samples = jax.jit(model.sample, static_argnums=2)(params, jax.random.key(0), 500)
    x = np.asarray(samples["x"], np.float64)
    np.testing.assert_array_equal(x, np.round(x))
    assert x.std() / 255 == pytest.approx(0.05**2 / math.hypot(0.05, 0.05), rel=0.05)
    assert x.mean() == pytest.approx(100, abs=2.5)
    assert x.min() >= 0 and x.max() <= 255


def test_persistent_chains_live_in_the_state_and_move_with_each_update():
    model, batch = energy.build(CHAINS, PLANE), _points(20)
    params = model.init(jax.random.key(0), batch)
    before = params["state"]
    _, aux = jax.jit(model.loss_fn)(params, batch, jax.random.key(1))
    assert jax.tree.structure(aux.state) == jax.tree.structure(before)
    assert aux.state["chains"].shape == (32, 2)
    assert np.all(np.abs(aux.state["chains"] - before["chains"]).max(axis=1) > 0)
    np.testing.assert_array_equal(aux.state["scale"], before["scale"])
    for start in ("noise", "data"):
        without = energy.build(replace(CHAINS, start=start), PLANE)
        assert "chains" not in without.init(jax.random.key(0), batch)["state"]
        aux = jax.eval_shape(without.loss_fn, params, batch, jax.random.key(1))[1]
        assert aux.state is None


def test_a_part_of_the_uncorrected_chains_restarts_at_the_gaussian():
    """The others stay where they are: all of them at 0, and most by default."""
    config = replace(CHAINS, metropolis=False, langevin_steps=1, step_size=1e-6, num_chains=4000)
    batch, far = _points(20), jnp.full((4000, 2), 50.0)
    params = energy.build(config, PLANE).init(jax.random.key(0), batch)
    params = {**params, "state": {**params["state"], "chains": far}}
    for restart in (0.0, energy.Config().restart, 0.6):
        model = energy.build(replace(config, restart=restart), PLANE)
        _, aux = jax.jit(model.loss_fn)(params, batch, jax.random.key(1))
        near, stayed = (np.all(np.abs(aux.state["chains"] - at) < 5, axis=1) for at in (0, 50))
        assert np.all(near ^ stayed)
        assert abs(near.mean() - restart) <= 4.5 * math.sqrt(restart * (1 - restart) / 4000)


EVERY = {
    "persistent": CHAINS,
    "uncorrected": replace(CHAINS, metropolis=False, restart=0.05),
    "data": replace(CHAINS, start="data"),
    "sliced": replace(CHAINS, objective="sliced_score_matching"),
    "corrected denoising": replace(CONFIG, metropolis=True),
}


@pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
def test_padding_does_not_count_and_members_do_not_mix(config):
    """Nor is a key used twice; of every objective, as the contract tests have the default."""
    model, batch = energy.build(config, PLANE), _points(8)
    params = [_moved(model.init(jax.random.key(i), batch), 0.1 + i) for i in range(2)]
    mask = jnp.arange(8) < 5
    padded, whole = {**batch, "mask": mask}, jnp.ones(8, bool)
    junk = jnp.where(mask[:, None], batch["x"], 7.0)
    loss = jax.jit(lambda params, batch: model.loss_fn(params, batch, jax.random.key(1)))
    with jax.debug_key_reuse(True):
        alone = [loss(each, padded) for each in params]
        same, other = (loss(params[0], {"x": junk, "mask": rows})[0] for rows in (mask, whole))
    np.testing.assert_allclose(same, alone[0][0], rtol=1e-6)
    assert abs(float(other - alone[0][0])) > 1e-3
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    both = jax.vmap(loss, in_axes=(0, None))(stacked, padded)
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, both, expected)


@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "tanh", "gated"])
def test_what_the_network_adds_grows_no_faster_than_linearly(network, activation):
    """So that the Gaussian wins far out and Z is finite."""
    if (network, activation) == ("conv", "gated"):
        pytest.skip("of dense layers alone")
    config = replace(CONFIG, network=network, activation=activation)
    model, u = energy.Network(config), _images(6)["x"] / 127.5 - 1
    shapes = jax.eval_shape(model.init, jax.random.key(0), u, jnp.zeros(6))["params"]
    params, apply = _moved({"energy": shapes})["energy"], jax.jit(model.apply)
    far, farther = (apply({"params": params}, scale * u, jnp.zeros(6)) for scale in (1e4, 1e5))
    assert np.abs(far).max() > 0.1
    assert np.all(np.abs(farther) < 10.5 * np.abs(far) + 0.01 * np.abs(far).max())


# Bad input.


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("objective", "likelihood", energy.OBJECTIVES),
        ("start", "anywhere", energy.STARTS),
        ("activation", "relu", ("smooth", "silu")),
        ("network", "resnet", ("mlp, conv",)),
        ("hidden", (), ("widths",)),
        ("num_chains", 0, ("at least 1",)),
        ("langevin_steps", 0, ("at least 1",)),
        ("rounds", 0, ("at least 1",)),
        ("rounds", 1, ("at least 2",)),
        ("restart", 1.5, ("from 0 to 1",)),
        ("step_size", 0.0, ("above 0",)),
        ("step_size", math.nan, ("above 0",)),
        ("sigma_min", -1.0, ("at least 0",)),
        ("sigma_min", 0.0, ("above 0",)),
        ("sigma_max", 0.03, ("above model.sigma_min=0.03",)),
    ],
)
def test_check_refuses_a_bad_value_by_its_name(field, value, words):
    with pytest.raises(UserError) as refused:
        energy.check(replace(CONFIG, **{field: value}), PLANE)
    message = str(refused.value)
    assert f"model.{field}={value!r}" in message and "\n" not in message
    assert all(word in message for word in words)


def test_check_refuses_persistent_chains_that_all_restart():
    """Unless the restarts are proposals; of other starts no chain is kept anyhow."""
    uncorrected = replace(CHAINS, metropolis=False)
    for change in ({"metropolis": True}, {"start": "noise"}, {"start": "data"}, {"restart": 0.9}):
        energy.check(replace(uncorrected, **change), PLANE)
    energy.check(replace(uncorrected, restart=energy.Config().restart), PLANE)
    with pytest.raises(UserError, match=r"model\.restart=1\.0: .*model\.start='noise'"):
        energy.check(uncorrected, PLANE)


def test_check_refuses_data_without_such_a_density():
    for spec in (PLANE, GREY):
        energy.check(CONFIG, spec)
    energy.check(CHAINS, PLANE)
    with pytest.raises(UserError, match=r"binary.*data\.binarisation"):
        energy.check(CONFIG, GREY._replace(support="binary"))
    with pytest.raises(UserError, match=r"model\.sigma_min=0\.0.*grey"):
        energy.check(CHAINS, GREY)
    with pytest.raises(UserError, match=r"model\.network='conv'.*\(2,\)"):
        energy.check(replace(CONFIG, network="conv"), PLANE)
