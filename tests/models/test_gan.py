"""Objectives and penalties against closed forms, and a game that is fair: each player its own."""

import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import on_one_device
from scipy import special, stats

from dgm_jax import config as configs
from dgm_jax import optim, run, sharding
from dgm_jax.core import DataSpec, UserError
from dgm_jax.data.dataset import Config as DataConfig
from dgm_jax.data.dataset import Dataset, Split
from dgm_jax.models import gan
from dgm_jax.train_step import compile_train_steps, init_state, train_step
from dgm_jax.workdir import Workdir

ROWS, CLASSES = 6, 3
SPEC = DataSpec((4, 4, 1), "uint8", np.full((4, 4, 1), 100, np.float32), 100, CLASSES)
CONFIG = gan.Config(latents=3, network="mlp", generator=(6,), discriminator=(5,))
REAL, FAKE = jnp.array([-1.5, 0.0, 2.0]), jnp.array([0.25, 0.0, -3.0])


def _batch(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (rows, *SPEC.event_shape)).astype(np.float32)
    return {"x": jnp.asarray(x), "label": jnp.arange(rows) % CLASSES}


def _params(model):
    """Random numbers everywhere, biases too: no special case of a fresh network."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), _batch())
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    leaves = [np.asarray(0.5 * rng.normal(size=leaf.shape), np.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, leaves)


# Objectives.


def _sigmoid_costs(logits):
    """-log σ of each, by scipy."""
    return -special.log_expit(np.asarray(logits, np.float64))


@pytest.mark.parametrize(
    ("name", "discriminator", "generator"),
    [
        ("relativistic", _sigmoid_costs(REAL - FAKE), _sigmoid_costs(FAKE - REAL)),
        ("non_saturating", _sigmoid_costs(REAL) + _sigmoid_costs(-FAKE), _sigmoid_costs(FAKE)),
        ("hinge", [2.5 + 1.25, 1 + 1, 0 + 0], -FAKE),
        ("wasserstein", [1.75, 0.0, -5.0], -FAKE),
    ],
)
def test_costs_at_given_logits(name, discriminator, generator):
    costs = gan.OBJECTIVES[name](REAL, FAKE)
    np.testing.assert_allclose(costs.discriminator, discriminator, rtol=1e-6)
    np.testing.assert_allclose(costs.generator, generator, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "discriminator", "generator"),
    [
        ("relativistic", math.log(2), math.log(2)),
        ("non_saturating", 2 * math.log(2), math.log(2)),
        ("hinge", 2, 0),
        ("wasserstein", 0, 0),
    ],
)
def test_costs_of_a_discriminator_that_cannot_tell(name, discriminator, generator):
    costs = gan.OBJECTIVES[name](jnp.zeros(4), jnp.zeros(4))
    np.testing.assert_allclose(costs.discriminator, discriminator, rtol=1e-6)
    np.testing.assert_allclose(costs.generator, generator, atol=1e-6)


@pytest.mark.parametrize("name", gan.OBJECTIVES)
def test_which_costs_know_the_level_of_the_logits(name):
    before = gan.OBJECTIVES[name](REAL, FAKE)
    after = gan.OBJECTIVES[name](REAL + 3, FAKE + 3)
    same = np.allclose(before.discriminator, after.discriminator, rtol=1e-6)
    assert same == (name in ("relativistic", "wasserstein"))


@pytest.mark.parametrize("name", gan.OBJECTIVES)
def test_costs_at_the_extremes_are_finite(name):
    for real, fake in ((1e4, -1e4), (-1e4, 1e4)):
        value, slope = jax.value_and_grad(lambda r, f: sum(gan.OBJECTIVES[name](r, f)), (0, 1))(
            real, fake
        )
        assert np.isfinite([value, *slope]).all()


def test_the_best_discriminator_of_two_gaussians():
    """log p/q, which costs 2 log 2 - 2 JSD, or that and any constant where pairs are compared."""
    x = jnp.linspace(-8, 8, 801)
    log_p, log_q = (
        jax.nn.log_softmax(jnp.asarray(stats.norm.logpdf(x, mean, scale), jnp.float32))
        for mean, scale in ((-1, 1), (1, 1.5))
    )
    p, q, ratio = jnp.exp(log_p), jnp.exp(log_q), log_p - log_q

    def independent(logits):
        costs = gan.non_saturating(logits, jnp.zeros(1))
        of_real = jnp.sum(p * (costs.discriminator - math.log(2)))
        costs = gan.non_saturating(jnp.zeros(1), logits)
        return of_real + jnp.sum(q * (costs.discriminator - math.log(2)))

    def paired(logits):
        costs = gan.relativistic(logits[:, None], logits[None]).discriminator
        return jnp.sum(p[:, None] * q[None] * costs)

    with jax.numpy_rank_promotion("allow"):
        middle = (p + q) / 2
        jsd = (stats.entropy(p, middle) + stats.entropy(q, middle)) / 2
        assert float(independent(ratio)) == pytest.approx(2 * math.log(2) - 2 * jsd, rel=1e-5)
        for cost, best in ((independent, ratio), (paired, ratio + 0.7)):
            cost = jax.jit(cost)
            slope = jax.grad(cost)(best)
            np.testing.assert_allclose(slope, 0, atol=1e-7)
            for worse in (best + 0.3 * x, best + jnp.sin(x), 0.5 * best):
                assert cost(worse) > cost(best) + 1e-4


# Penalties.


W = jnp.array([[3.0, -1.0], [0.5, 2.0]])
NORM = float(jnp.linalg.norm(W))
X = jnp.asarray(np.random.default_rng(1).normal(size=(5, 2, 2)), jnp.float32)


def _linear(w):
    return lambda x: jnp.einsum("bij,ij->b", x, w)


@pytest.mark.parametrize(
    ("name", "value", "gradient"),
    [
        ("r1", NORM**2 / 2, W),
        ("r1_r2", NORM**2, 2 * W),
        ("gradient_penalty", (NORM - 1) ** 2, 2 * (NORM - 1) / NORM * W),
    ],
)
def test_penalty_of_a_linear_discriminator(name, value, gradient):
    def mean(w):
        return jnp.mean(gan.PENALTIES[name](_linear(w), X, -X, jax.random.key(0)))

    found, slope = jax.jit(jax.value_and_grad(mean))(W)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    np.testing.assert_allclose(slope, gradient, rtol=1e-5)


def test_where_penalties_look():
    """At ½ |x|² the slope is x itself: at the data, at what is generated, or in between."""

    def bowl(x):
        return jnp.sum(x**2, axis=(1, 2)) / 2

    real, fake, rng = X, 2 - X, jax.random.key(0)
    squares = [np.sum(np.asarray(x) ** 2, axis=(1, 2)) for x in (real, fake)]
    found = {
        name: jax.jit(fn, static_argnums=0)(bowl, real, fake, rng)
        for name, fn in gan.PENALTIES.items()
    }
    np.testing.assert_allclose(found["r1"], squares[0] / 2, rtol=1e-5)
    np.testing.assert_allclose(found["r1_r2"], sum(squares) / 2, rtol=1e-5)
    np.testing.assert_array_equal(found["none"], np.zeros(len(real)))

    ends = [jnp.full((4000, 1, 1), end) for end in (2.0, 5.0)]
    between = 1 + np.sqrt(jax.jit(gan.gradient_penalty, static_argnums=0)(bowl, *ends, rng))
    assert stats.kstest(between, stats.uniform(2, 3).cdf).pvalue > 1e-3


def test_a_flat_discriminator_has_a_gradient_penalty_with_a_gradient():
    flat = jnp.zeros_like(W)
    mean = lambda w: jnp.mean(gan.gradient_penalty(_linear(w), X, -X, jax.random.key(0)))  # noqa: E731
    value, slope = jax.value_and_grad(mean)(flat)
    np.testing.assert_allclose(value, 1, atol=1e-5)
    assert np.isfinite(slope).all()


# The game.


def _updated(model, player, params, batch):
    """The gradient of a player's loss, and the parameters after an update of it alone."""
    alone, optimizer, rng = model._replace(players=(player,)), optax.adam(0.1), jax.random.key(1)

    @jax.jit
    def update(params):
        grads, _ = jax.grad(player.loss_fn, has_aux=True)(params, batch, rng)
        state = init_state(alone, optimizer, 0, batch, False).replace(params=params)
        state, _ = train_step(alone, optimizer, 0.0, state, batch, {player.name: rng})
        return grads, state.params

    return jax.device_get(update(params))


@pytest.mark.parametrize("conditional", [False, True])
def test_no_player_moves_the_other(conditional):
    model = gan.build(replace(CONFIG, conditional=conditional), SPEC)
    params, batch = _params(model), _batch()
    for player, other in zip(model.players, reversed(model.players), strict=True):
        grads, after = _updated(model, player, params, batch)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads[other.name]))
        assert all((leaf != 0).any() for leaf in jax.tree.leaves(grads[player.name]))
        jax.tree.map(np.testing.assert_array_equal, after[other.name], params[other.name])
        moved = jax.tree.map(lambda a, b: (a != b).any(), after[player.name], params[player.name])
        assert all(jax.tree.leaves(moved))


# Each objective with some penalty, and each penalty with some objective: they are independent.
PAIRS = list(zip(gan.OBJECTIVES, itertools.cycle(gan.PENALTIES), strict=False))


@pytest.mark.parametrize(("objective", "penalty"), PAIRS)
def test_the_discriminators_loss_is_its_cost_and_its_penalty(objective, penalty):
    """The cost by hand, from what the networks say of the same draws."""
    config = replace(CONFIG, objective=objective, penalty=penalty)
    params, batch = _params(gan.build(config, SPEC)), _batch()

    @jax.jit
    def weighted(weight):
        model = gan.build(replace(config, penalty_weight=weight), SPEC)
        return model.players[0].loss_fn(params, batch, jax.random.key(3))

    (loss, aux), (cost, _) = weighted(0.3), weighted(0.0)
    np.testing.assert_allclose(loss, cost + 0.3 * aux.scalars["penalty"], rtol=1e-5)
    gap = np.log(np.expm1(np.asarray(aux.terms["discrimination"], np.float64)))  # fake - real
    if objective == "wasserstein":
        np.testing.assert_allclose(cost, gap.mean(), rtol=1e-4, atol=1e-5)
    if objective == "relativistic":
        np.testing.assert_allclose(cost, aux.terms["discrimination"].mean(), rtol=1e-6)
    if penalty == "r1":  # at the data, not at what is generated
        logit = lambda x: _logits(params, x[None])[0]  # noqa: E731
        slopes = jax.jit(jax.vmap(jax.grad(logit)))(batch["x"] / 255)
        expected = np.sum(np.asarray(slopes) ** 2) / ROWS / 2
        np.testing.assert_allclose(aux.scalars["penalty"], expected, rtol=1e-5)


def _logits(params, x):
    return gan.Discriminator(CONFIG).apply({"params": params["discriminator"]}, x, None)


@pytest.mark.parametrize("objective", gan.OBJECTIVES)
def test_the_generator_is_taught_by_the_discriminator(objective):
    """A small step down its loss makes the same noise look more real to the same discriminator."""
    model = gan.build(replace(CONFIG, objective=objective), SPEC._replace(support="real"))
    params, rng = _params(model), jax.random.key(4)
    batch = {"x": _batch()["x"] / 255}

    @jax.jit
    def realness(generator):
        return jnp.mean(_logits(params, model.sample({"generator": generator}, rng, ROWS)["x"]))

    grads, _ = jax.jit(jax.grad(model.players[1].loss_fn, has_aux=True))(params, batch, rng)
    moved = jax.tree.map(lambda p, g: p - 1e-3 * g, params["generator"], grads["generator"])
    assert realness(moved) > realness(params["generator"]) + 1e-4


def test_a_conditional_model_knows_the_label():
    model = gan.build(replace(CONFIG, conditional=True), SPEC)
    params, batch, rng = _params(model), _batch(), jax.random.key(5)
    loss_fn = jax.jit(model.players[0].loss_fn)
    terms = loss_fn(params, batch, rng)[1].terms["discrimination"]
    other = {**batch, "label": batch["label"].at[0].set(2)}
    changed = loss_fn(params, other, rng)[1].terms["discrimination"]
    assert terms[0] != changed[0]
    np.testing.assert_allclose(terms[1:], changed[1:], rtol=1e-5)
    # Of the discriminator's last layer each class has its own weights, untouched by the others.
    grad = jax.jit(jax.grad(model.players[0].loss_fn, has_aux=True))
    of_class_1, _ = grad(params, {**batch, "label": jnp.ones(ROWS, jnp.int32)}, rng)
    last = of_class_1["discriminator"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal((last != 0).any(axis=0), [False, True, False])
    samples = jax.jit(model.sample, static_argnums=2)(params, rng, 7)
    np.testing.assert_array_equal(samples["label"], [0, 1, 2, 0, 1, 2, 0])


def test_samples_are_grey_values_as_the_data_hold_them():
    model = gan.build(CONFIG, SPEC)
    samples = jax.jit(model.sample, static_argnums=2)(_params(model), jax.random.key(0), 50)
    assert set(samples) == {"x"}
    x = np.asarray(samples["x"])
    assert x.shape == (50, 4, 4, 1) and len(np.unique(x)) > 10
    assert (x == np.round(x)).all() and x.min() >= 0 and x.max() <= 255


@pytest.mark.parametrize("network", ["mlp", "conv", "points"])
def test_a_generator_starts_around_the_mean_of_the_data(network):
    """Of x / scale: its outputs where no feature says anything, in the pixels' order."""
    spec = SPEC._replace(mean=np.random.default_rng(0).uniform(0, 255, (4, 4, 1)))
    expected = spec.mean / 255
    if network == "points":
        spec = DataSpec((2,), "real", np.array([3.0, -5.0], np.float32), 100)
        network, expected = "mlp", spec.mean
    model = gan.build(replace(CONFIG, network=network), spec)
    params = jax.jit(model.init)(jax.random.key(0), {"x": jnp.zeros((1, *spec.event_shape))})
    head = params["generator"]["Head_0"]
    assert set(head) == {"Dense_0", "bias"}
    np.testing.assert_allclose(head["bias"], expected.ravel(), rtol=1e-6)
    silent = {**head, "Dense_0": jax.tree.map(jnp.zeros_like, head["Dense_0"])}
    params["generator"] = {**params["generator"], "Head_0": silent}
    x = jax.jit(model.sample, static_argnums=2)(params, jax.random.key(1), 3)["x"]
    whole = expected if spec.support == "real" else np.round(255 * expected)
    np.testing.assert_allclose(x, np.broadcast_to(whole, x.shape), rtol=1e-6)


# Training.

SIDE, STEP, SPREAD = 3, 85, 6.0  # 9 modes at 43, 128, 213, of this standard deviation
GRID = DataSpec((2,), "uint8", np.full(2, 127, np.float32), 10_000)


def _grid():
    rng = np.random.default_rng(0)
    centres = 43 + STEP * rng.integers(0, SIDE, (GRID.num_examples, 2))
    images = np.round(rng.normal(centres, SPREAD)).astype(np.uint8)
    split = Split("train", images, np.zeros(len(images), np.int32), np.zeros((len(images), 0)))
    return Dataset(DataConfig(binarisation="none"), {"train": split}, GRID, card={})


def _start(model, num_steps, per_dispatch, batch_size, ema):
    """The first state, and a function that makes `per_dispatch` updates of it."""
    dataset = _grid()
    optimizer = optim.build(optim.Config(learning_rate=5e-3, b1=0.0, b2=0.99), num_steps)
    split = dataset.splits["train"]
    batch = {"x": jnp.asarray(split.x[:8], jnp.float32)}
    state = jax.jit(lambda batch: init_state(model, optimizer, 0, batch, True))(batch)
    mesh = sharding.make_mesh(1)
    steps = compile_train_steps(
        lambda step: model, optimizer, ema, dataset, batch_size, per_dispatch, mesh
    )
    return state, lambda state: steps(state, {"x": split.x, "labels": split.labels})[0]


def test_every_mode_of_a_grid_is_found_and_little_else():
    """A fair share of each would be 278 of 2,500, and of points anywhere 25 % would be near."""
    config = replace(CONFIG, latents=2, generator=(64, 64), discriminator=(64, 64))
    model = gan.build(replace(config, penalty_weight=0.01), GRID)
    state, steps = _start(model, 2000, 2000, 128, 0.99)
    sample = jax.jit(model.sample, static_argnums=2)
    x = np.asarray(sample(steps(state).eval_params, jax.random.key(1), 2500)["x"])
    nearest = np.clip(np.round((x - 43) / STEP), 0, SIDE - 1)
    near = np.linalg.norm(x - 43 - STEP * nearest, axis=1) < 4 * SPREAD
    counts = np.bincount((nearest[near] @ [SIDE, 1]).astype(int), minlength=SIDE**2)
    assert (counts > 120).all() and near.mean() > 0.8


def test_samples_come_from_the_averaged_generator():
    """What is evaluated is the average of the generators that there were, update by update."""
    model = gan.build(CONFIG, GRID)
    state, step = _start(model, 10, 1, 16, 0.9)
    average = jax.device_get(state.params)
    for t in range(4):
        state = step(state)
        average = optim.update_ema(average, jax.device_get(state.params), t, 0.9)
    sample = jax.jit(lambda params: model.sample(params, jax.random.key(1), 20)["x"])
    own = {**state.params, "generator": average["generator"]}
    np.testing.assert_allclose(sample(state.eval_params), sample(own), atol=1e-6)
    assert np.abs(sample(state.eval_params) - sample(state.params)).max() > 1e-3


def test_a_game_that_diverges_stops_with_the_players_name(tmp_path):
    values = {
        "model.network": "mlp",
        "model.generator": (8,),
        "model.discriminator": (8,),
        "optimizer.learning_rate": 1e30,
        "optimizer.clip_norm": 1e30,
    }
    config = configs.load("configs/gan_mnist.py:smoke", values)
    with on_one_device(), pytest.raises(UserError) as refused:
        run.train_mode(config, Workdir(tmp_path / "run"))
    message = str(refused.value)
    assert "discriminator/" in message or "generator/" in message
    assert "not finite" in message and "\n" not in message


# Bad input.


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("objective", "saturating", ("relativistic", "non_saturating", "hinge", "wasserstein")),
        ("penalty", "r3", ("r1", "r1_r2", "gradient_penalty")),
        ("penalty_weight", -1.0, ("at least 0",)),
        ("penalty_weight", math.nan, ("at least 0",)),
        ("latents", 0, ("at least 1",)),
        ("generator", (), ("widths",)),
        ("discriminator", (0,), ("at least 1",)),
        ("activation", "sine", ("relu",)),
        ("network", "resnet", ("mlp, conv",)),
    ],
)
def test_check_refuses_a_bad_value_by_its_name(field, value, words):
    with pytest.raises(UserError) as refused:
        gan.check(replace(CONFIG, **{field: value}), SPEC)
    message = str(refused.value)
    assert f"model.{field}={value!r}" in message and "\n" not in message
    assert all(word in message for word in words)


def test_check_refuses_data_that_it_cannot_generate():
    gan.check(CONFIG, SPEC)
    with pytest.raises(UserError, match=r"these data are binary.*data\.binarisation='none'"):
        gan.check(CONFIG, SPEC._replace(support="binary"))
    with pytest.raises(UserError, match=r"model\.conditional=True.*no labels"):
        gan.check(replace(CONFIG, conditional=True), SPEC._replace(num_classes=0))
    with pytest.raises(UserError, match=r"model\.network='conv'.*\(2,\)"):
        gan.check(replace(CONFIG, network="conv"), GRID)


def test_points_are_generated_as_they_are():
    """Neither rounded nor clipped: G(z) itself, also below 0 and above 1."""
    model = gan.build(CONFIG, GRID._replace(support="real", mean=np.full(2, 0.2, np.float32)))
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0), {"x": jnp.zeros((1, 2))}))
    params["generator"] = jax.tree.map(lambda leaf: 3 * leaf, params["generator"])
    samples = jax.jit(model.sample, static_argnums=2)(params, jax.random.key(1), 50)
    assert set(samples) == {"x"} and samples["x"].shape == (50, 2)
    assert samples["x"].min() < 0 and samples["x"].max() > 1
    assert np.any(samples["x"] != np.round(samples["x"]))
