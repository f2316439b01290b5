"""Schedule, clipping, AdamW and the EMA against closed forms and NumPy written by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dgm_jax import optim
from dgm_jax.core import UserError


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def test_schedule_rises_linearly_and_falls_linearly(x64):
    config = optim.Config(learning_rate=0.3, warmup=0.1)
    rate = optim.schedule(config, 1000)
    expected = {
        0: 0.3 / 100,
        49: 0.15,
        99: 0.3,  # the end of the warm-up
        100: 0.3,
        325: 0.3 * 0.75,  # a quarter of the way down
        550: 0.15,
        1000: 0.0,
        2000: 0.0,
    }
    ours = jax.vmap(rate)(jnp.array(list(expected)))
    np.testing.assert_allclose(ours, list(expected.values()), rtol=1e-12, atol=1e-15)
    everywhere = np.asarray(jax.vmap(rate)(jnp.arange(1000)))
    assert np.all(np.diff(everywhere[:100]) > 0) and np.all(np.diff(everywhere[100:]) < 0)
    # Each part averages to one half, plus half a step for being read at its upper edge.
    np.testing.assert_allclose(everywhere.mean(), 0.3 * (0.5 + 1 / 1000), rtol=1e-12)


def test_schedule_without_warmup_starts_at_the_top(x64):
    rate = optim.schedule(optim.Config(learning_rate=0.3, warmup=0.0), 10)
    steps = np.arange(11)
    expected = 0.3 * (1 - steps / 10)
    np.testing.assert_allclose(jax.vmap(rate)(jnp.arange(11)), expected, rtol=1e-12, atol=1e-15)


def test_the_other_schedules(x64):
    """Half a cosine, which has fallen by half at the middle and by 1/4 at a third; and no decay."""
    config = optim.Config(learning_rate=0.3, warmup=0.1, schedule="cosine")
    ours = jax.vmap(optim.schedule(config, 1000))(jnp.array([49, 100, 400, 550, 1000]))
    np.testing.assert_allclose(ours, [0.15, 0.3, 0.225, 0.15, 0], rtol=1e-12, atol=1e-15)
    constant = optim.schedule(dataclasses.replace(config, schedule="constant"), 1000)
    ours = jax.vmap(constant)(jnp.array([49, 100, 550, 1000]))
    np.testing.assert_allclose(ours, [0.15, 0.3, 0.3, 0.3], rtol=1e-12)


def test_traced_numbers_give_the_same_schedule():
    """Bit for bit: the warm-up is a power of two, which float32 and Python's floats share."""

    def rates(learning_rate, warmup):
        config = optim.Config(learning_rate=learning_rate, warmup=warmup)
        return jax.vmap(optim.schedule(config, 400))(jnp.arange(401))

    traced = jax.jit(rates)(0.3, 0.125)
    concrete = jax.jit(lambda: rates(0.3, 0.125))()
    np.testing.assert_array_equal(traced, concrete)


PARAMS = {
    "kernel": np.linspace(-1, 2, 12).reshape(3, 4),
    "stack": np.linspace(-2, 1, 8).reshape(2, 2, 2),
    "bias": np.array([0.5, -1.0, 3.0]),
    "scale": np.array(2.0),
}


def _gradients(step):
    rng = np.random.default_rng(step)
    return {name: 3 * rng.normal(size=p.shape) for name, p in PARAMS.items()}


def _norm(tree):
    return math.sqrt(sum(np.sum(leaf**2) for leaf in tree.values()))


def _adamw_by_hand(config, num_steps, run_steps):
    """Parameters after each step, in NumPy: Loshchilov & Hutter 2019, algorithm 2."""
    params = {name: p.copy() for name, p in PARAMS.items()}
    m = {name: np.zeros_like(p) for name, p in PARAMS.items()}
    v = {name: np.zeros_like(p) for name, p in PARAMS.items()}
    warmup = config.warmup * num_steps
    for t in range(run_steps):
        done = max(0.0, (t - warmup) / (num_steps - warmup))
        rate = config.learning_rate * min(1.0, (t + 1) / warmup)
        rate *= 1 - done
        gradients = _gradients(t)
        clip = min(1.0, config.clip_norm / _norm(gradients))
        for name, g in gradients.items():
            g = g * clip
            m[name] = config.b1 * m[name] + (1 - config.b1) * g
            v[name] = config.b2 * v[name] + (1 - config.b2) * g**2
            step = m[name] / (1 - config.b1 ** (t + 1))
            step = step / (np.sqrt(v[name] / (1 - config.b2 ** (t + 1))) + config.eps)
            if name in ("kernel", "stack"):
                step = step + config.weight_decay * params[name]
            params[name] = params[name] - rate * step
        yield {name: p.copy() for name, p in params.items()}


def test_steps_equal_adamw_written_by_hand(x64):
    """Warm-up, decay, clipping of some gradients, weight decay on matrices only; big eps shows."""
    config = optim.Config(
        learning_rate=0.05, warmup=0.2, b1=0.8, b2=0.95, eps=0.01, weight_decay=0.3, clip_norm=14.0
    )
    clipped = [_norm(_gradients(t)) > config.clip_norm for t in range(10)]
    assert any(clipped) and not all(clipped)
    optimizer = optim.build(config, 10)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for t, expected in enumerate(_adamw_by_hand(config, 10, 10)):
        updates, state = update(jax.tree.map(jnp.asarray, _gradients(t)), state, params)
        params = optax.apply_updates(params, updates)
        for name, p in expected.items():
            np.testing.assert_allclose(params[name], p, rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("shape", [(30, 8), (2, 3, 5, 8)], ids=["dense", "convolution"])
def test_muon_moves_matrices_by_their_orthogonal_factor_and_all_else_by_adam(shape, x64):
    """First step of G = U S Vᵀ: -rate · 0.2 √(longer side) U V', five Newton-Schulz steps near it.

    They send each singular value to between 0.68 and 1.14 (Jordan et al. 2024). A convolution is
    the matrix of its patches.
    """
    rng = np.random.default_rng(0)
    gradient = {"kernel": rng.normal(size=shape), "bias": rng.normal(size=8)}
    params = jax.tree.map(jnp.zeros_like, gradient)
    config = optim.Config(name="muon", learning_rate=0.01, warmup=0.0, clip_norm=1e3)
    optimizer = optim.build(config, 1000)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(updates["bias"], -0.01 * np.sign(gradient["bias"]), rtol=1e-6)
    update = np.asarray(updates["kernel"]).reshape(30, 8)
    u, _, v = np.linalg.svd(gradient["kernel"].reshape(30, 8), full_matrices=False)
    # In the singular basis of the gradient the update is diagonal, and of one size.
    rotated = u.T @ update @ v.T / (-0.01 * 0.2 * math.sqrt(30))
    diagonal = np.diag(rotated)
    assert (diagonal > 0.65).all() and (diagonal < 1.2).all()
    np.testing.assert_allclose(rotated - np.diag(diagonal), 0, atol=1e-6)


@pytest.mark.parametrize("name", optim.NAMES)
def test_weight_decay_is_decoupled_and_of_matrices_alone(x64, name):
    """Without a gradient a matrix shrinks by rate · decay of itself, and a bias stays."""
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(3)}
    config = optim.Config(name=name, learning_rate=0.1, warmup=0.0, weight_decay=0.3)
    optimizer = optim.build(config, 1000)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.03, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


@pytest.mark.parametrize(("norm", "scale"), [(10.0, 0.1), (0.5, 1.0)])
def test_clipping_scales_the_whole_gradient_to_the_norm(x64, norm, scale):
    """Adam's first step is -rate · g / (|g| + eps), so a big eps shows the size of g."""
    config = optim.Config(learning_rate=1.0, warmup=0.0, eps=1.0, clip_norm=1.0)
    params = {"a": jnp.zeros(2), "b": jnp.zeros((2, 2))}
    gradient = {"a": jnp.array([0.6, 0.0]), "b": jnp.array([[0.0, -0.48], [0.64, 0.0]])}
    gradient = jax.tree.map(lambda g: norm * g, gradient)
    optimizer = optim.build(config, 1000)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    for name, g in gradient.items():
        clipped = scale * np.asarray(g)
        np.testing.assert_allclose(updates[name], -clipped / (np.abs(clipped) + 1), rtol=1e-12)


def test_traced_numbers_give_the_same_update(x64):
    """Every field may be searched over in one vmap: each lane equals the NumPy run of its own."""
    fields = {
        "learning_rate": 0.05,
        "warmup": 0.25,
        "b1": 0.8,
        "b2": 0.95,
        "eps": 0.01,
        "weight_decay": 0.3,
        "clip_norm": 2.0,
    }
    params = jax.tree.map(jnp.asarray, PARAMS)

    def two_steps(numbers):
        optimizer, own = optim.build(optim.Config(**numbers), 8), params
        state = optimizer.init(own)
        for t in range(2):
            updates, state = optimizer.update(_gradients(t), state, own)
            own = optax.apply_updates(own, updates)
        return own

    traced = jax.jit(jax.vmap(two_steps))({k: jnp.array([v, v / 2]) for k, v in fields.items()})
    for i in range(2):
        config = optim.Config(**{k: v / (i + 1) for k, v in fields.items()})
        *_, expected = _adamw_by_hand(config, 8, 2)
        for name, p in expected.items():
            np.testing.assert_allclose(traced[name][i], p, rtol=1e-10, atol=1e-12)


def _average(values, decay, start=0, first=0.0):
    # An int64 step: int32 / int32 is float32 also under x64, and would round the rate to 1e-7.
    average = {"p": jnp.float64(first)}
    for t, value in enumerate(values, start):
        average = optim.update_ema(average, {"p": jnp.float64(value)}, jnp.int64(t), decay)
    return float(average["p"])


def test_traced_numbers_give_muons_update_too(x64):
    """Learning rate and weight decay in one vmap: each lane is the update with its own numbers."""
    rng = np.random.default_rng(0)
    params, gradient = ({"kernel": rng.normal(size=(5, 4))} for _ in range(2))

    def update(rate, decay):
        config = optim.Config(name="muon", learning_rate=rate, weight_decay=decay, warmup=0.0)
        optimizer = optim.build(config, 10)
        return optimizer.update(gradient, optimizer.init(params), params)[0]["kernel"]

    rates, decays = np.array([0.1, 0.3]), np.array([0.0, 0.2])
    found = jax.jit(jax.vmap(update))(rates, decays)
    for i in range(2):
        np.testing.assert_allclose(found[i], update(rates[i], decays[i]), rtol=1e-10)


def test_ema_of_a_constant_is_the_constant(x64):
    assert _average([0.7] * 20, 0.999, first=0.7) == 0.7


def test_ema_is_geometric_once_the_warm_up_is_over(x64):
    """After n equal values v from 0: v (1 - d^n). Below d = 1/10 there is no warm-up at all."""
    np.testing.assert_allclose(_average([2.0] * 5, 0.1), 2 * (1 - 0.1**5), rtol=1e-12)
    np.testing.assert_allclose(_average([2.0] * 7, 0.9, start=1000), 2 * (1 - 0.9**7), rtol=1e-12)


def test_ema_warm_up_forgets_the_start(x64):
    """With d_t = (1 + t)/(10 + t) the start's weight after n steps is 9! n! / (n + 9)!."""
    n = 30
    left = _average([0.0] * n, 0.9999, first=1.0)
    np.testing.assert_allclose(left, 1 / math.comb(n + 9, 9), rtol=1e-12)


def test_ema_is_linear_in_what_it_averages(x64):
    """Weights (1 - d) d^(n-1-i), by hand, of a changing sequence."""
    values, d = [3.0, -1.0, 4.0, 1.5], 0.9
    expected = d**4 * 5.0 + sum((1 - d) * d ** (3 - i) * v for i, v in enumerate(values))
    np.testing.assert_allclose(_average(values, d, start=500, first=5.0), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "sgd"),
        ("schedule", "step"),
        *(("learning_rate", v) for v in (-1e-3, math.inf, math.nan)),
        *((f, v) for f in ("warmup", "b1", "b2", "ema") for v in (-0.1, 1.0, math.nan)),
        *(("weight_decay", v) for v in (-0.1, math.inf, math.nan)),
        *((f, v) for f in ("eps", "clip_norm") for v in (0.0, -1.0, math.nan)),
    ],
)
def test_check_refuses_a_bad_value_by_its_name(field, value):
    with pytest.raises(UserError, match=rf"optimizer\.{field}={value!r}"):
        optim.check(dataclasses.replace(optim.Config(), **{field: value}))


def test_check_accepts_the_edges():
    optim.check(optim.Config())
    optim.check(optim.Config(learning_rate=0.0, warmup=0.0, b1=0.0, b2=0.0, ema=0.0))


def test_a_skipped_update_is_as_if_it_had_not_been():
    """Adam with moments, clipping and weight decay: good, NaN, infinite, good is good, good."""
    config = optim.Config(skip_non_finite=2, weight_decay=0.1, clip_norm=1.0, warmup=0.0)
    good = [{"w": jnp.array([[1.0, -2.0]])}, {"w": jnp.array([[0.5, 3.0]])}]
    bad = [{"w": jnp.array([[jnp.nan, 1.0]])}, {"w": jnp.array([[1.0, -jnp.inf]])}]

    def after(config, grads):
        optimizer, params = optim.build(config, 10), {"w": jnp.array([[1.0, 1.0]])}
        state, counts = optimizer.init(params), []
        for grad in grads:
            updates, state = optimizer.update(grad, state, params)
            params = optax.apply_updates(params, updates)
            counts.append(int(getattr(state, "in_a_row", 0)))
        return params["w"], counts

    found, counts = after(config, [good[0], *bad, good[1]])
    plain, _ = after(dataclasses.replace(config, skip_non_finite=0), good)
    np.testing.assert_array_equal(found, plain)
    assert counts == [0, 1, 2, 0]
    found, counts = after(config, [*bad, bad[0]])  # one more than may be skipped is made
    assert not np.isfinite(found).any() and counts == [1, 2, 0]
