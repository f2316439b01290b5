"""The compiled step: the same answer on any number of devices, and after any interruption."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dgm_jax import config as configs
from dgm_jax import models, optim, sharding
from dgm_jax.core import Aux, Model, Player
from dgm_jax.data import dataset as data
from dgm_jax.data.order import batch_ids
from dgm_jax.experiment import initial_state, prepare
from dgm_jax.rng import stream
from dgm_jax.train_step import compile_train_steps, init_state, train_step

pytestmark = pytest.mark.usefixtures("programs_kept")
BATCH = 16
FIELDS = {"name": "vae", "latents": 3, "encoder": (8,), "decoder": (8,)}


def run(dataset, num_steps, per_dispatch, num_devices=1, seed=0, state=None, ema=0.9):
    """Train `num_steps` steps and return the state and the metrics of every step."""
    mesh, model = sharding.make_mesh(num_devices), models.build(FIELDS, dataset.spec)
    optimizer = optim.build(optim.Config(learning_rate=1e-2), num_steps=100)
    if state is None:
        batch = data.some(dataset, "train", BATCH)
        state = jax.jit(
            lambda batch: init_state(model, optimizer, seed, batch, ema > 0),
            out_shardings=sharding.replicated(mesh),
        )(batch)
    split = dataset.splits["train"]
    arrays = {"x": split.x, "labels": split.labels}
    arrays = jax.device_put(arrays, sharding.replicated(mesh))
    steps = compile_train_steps(
        lambda step: model, optimizer, ema, dataset, BATCH, per_dispatch, mesh
    )
    rows = []
    for _ in range(num_steps // per_dispatch):
        state, measured = steps(state, arrays)
        rows.append(jax.device_get(measured))
    assert steps._cache_size() == 1, "a second program was compiled"
    return state, {k: np.concatenate([row[k] for row in rows]) for k in rows[0]}


@pytest.fixture(scope="module")
def hundred_steps(tiny_dataset):
    """By one device."""
    return run(tiny_dataset, 100, per_dispatch=20)


def assert_equal(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), left, right)


def test_k_steps_in_one_dispatch_are_k_single_steps(tiny_dataset):
    one, one_rows = run(tiny_dataset, 12, per_dispatch=1)
    many, many_rows = run(tiny_dataset, 12, per_dispatch=12)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_allclose(one_rows["vae/loss"], many_rows["vae/loss"], rtol=1e-6)


@pytest.mark.parametrize("num_devices", [2, 4, 8])
def test_devices_do_not_change_the_answer(tiny_dataset, hundred_steps, num_devices):
    """Adam hides a wrong gradient scale, so the gradient norm is compared beside the result."""
    one, one_rows = hundred_steps
    many, many_rows = run(tiny_dataset, 100, per_dispatch=20, num_devices=num_devices)
    np.testing.assert_allclose(
        one_rows["vae/grad_norm"][0], many_rows["vae/grad_norm"][0], rtol=1e-6
    )
    np.testing.assert_allclose(one_rows["vae/loss"], many_rows["vae/loss"], rtol=2e-6)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_resuming_is_bit_exact(tiny_dataset):
    """2n steps, and n steps + a round trip through the host + n steps."""
    whole, whole_rows = run(tiny_dataset, 20, per_dispatch=5)
    half, first = run(tiny_dataset, 10, per_dispatch=5)
    host = jax.device_get(half)
    back = jax.device_put(host, sharding.replicated(sharding.make_mesh(1)))
    resumed, second = run(tiny_dataset, 10, per_dispatch=5, state=back)
    assert_equal(whole, resumed)
    for name in whole_rows:
        np.testing.assert_array_equal(whole_rows[name], np.concatenate([first[name], second[name]]))


def test_seeds_differ_and_repeat(tiny_dataset):
    again, rows = run(tiny_dataset, 5, 5, seed=1)
    assert_equal(again, run(tiny_dataset, 5, 5, seed=1)[0])
    assert not np.allclose(rows["vae/loss"], run(tiny_dataset, 5, 5, seed=2)[1]["vae/loss"])


def test_first_update_is_the_gradient_of_the_loss_on_the_first_batch(tiny_dataset):
    """Nothing is rescaled, reordered or dropped between the loss function and the optimizer."""
    model = models.build(FIELDS, tiny_dataset.spec)
    optimizer = optax.sgd(1.0)
    batch = data.some(tiny_dataset, "train", BATCH)
    state = jax.jit(lambda: init_state(model, optimizer, 0, batch, ema=False))()
    split = tiny_dataset.splits["train"]
    arrays = {"x": jnp.asarray(split.x), "labels": jnp.asarray(split.labels)}

    @jax.jit
    def gradient(params):
        ids = batch_ids(state.seed, state.step, BATCH, len(split))
        rng = stream(0, "data/binarise", 0)
        first = data.train_batch(tiny_dataset, arrays["x"], arrays["labels"], ids, rng)
        return jax.grad(model.loss_fn, has_aux=True)(params, first, stream(0, "train/vae", 0))[0]

    grads = gradient(state.params)
    steps = compile_train_steps(
        lambda step: model, optimizer, 0.0, tiny_dataset, BATCH, 1, sharding.make_mesh(1)
    )
    before = jax.device_get(state.params)
    after, _ = steps(state, arrays)
    jax.tree.map(
        lambda b, a, g: np.testing.assert_allclose(b - a, g, atol=1e-6), before, after.params, grads
    )


def test_players_move_only_their_own_parameters_and_see_earlier_updates():
    """min_a (a - b)², then min_b (b - a)²: with step ½, b meets the a that has already moved."""

    def cost(mine, other):
        def loss_fn(params, batch, rng):
            loss = (params[mine] - params[other]) ** 2
            return loss, Aux(terms={"gap": jnp.full(2, loss)})

        return loss_fn

    model = Model(
        init=lambda rng, batch: {"a": jnp.float32(0.0), "b": jnp.float32(8.0)},
        players=(Player("a", cost("a", "b")), Player("b", cost("b", "a"))),
        log_likelihood_fns={},
    )
    optimizer = optax.sgd(0.25)
    state = init_state(model, optimizer, 0, {}, ema=False)
    rngs = {name: jax.random.key(0) for name in ("a", "b")}
    state, measured = train_step(model, optimizer, 0.0, state, {"x": jnp.zeros((2, 1))}, rngs)
    assert float(state.params["a"]) == 4.0  # 0 + ½·8
    assert float(state.params["b"]) == 6.0  # 8 - ½·4, from the new a; 4 from the old one
    assert float(measured["a/loss"]) == 64.0
    assert float(measured["b/loss"]) == 16.0


def test_untrained_state_is_replaced_not_optimised():
    def loss_fn(params, batch, rng):
        return params["net"] * params["state"], Aux(terms={}, state=params["state"] + 1)

    model = Model(
        init=lambda rng, batch: {"net": jnp.float32(1.0), "state": jnp.float32(10.0)},
        players=(Player("net", loss_fn),),
        log_likelihood_fns={},
    )
    optimizer = optax.sgd(0.1)
    state = init_state(model, optimizer, 0, {}, ema=False)
    rngs = {"net": jax.random.key(0)}
    state, _ = train_step(model, optimizer, 0.0, state, {"x": jnp.zeros((2, 1))}, rngs)
    assert float(state.params["net"]) == 0.0  # 1 - 0.1·10
    assert float(state.params["state"]) == 11.0


@pytest.mark.parametrize(("start", "said"), [(0.0, ""), (3.0, " from 3")])
def test_a_ramp_goes_from_its_start_to_the_value(tiny_dataset, start, said):
    """The loss of step t weighs the rate by s + (β - s) min(1, t / length); s = 0 is KL warm-up."""
    values = {
        "train.batch_size": BATCH,
        "train.duration": "10 steps",
        "train.steps_per_dispatch": 10,
        "train.ramp": f"model.beta{said} over 4 steps",
        "model.beta": 0.5,
        "model.latents": 3,
        "model.encoder": (8,),
        "model.decoder": (8,),
        "eval.batch_size": 8,
    }
    experiment = prepare(configs.override(configs.experiment("vae"), values), tiny_dataset)
    assert experiment.ramps == {"beta": (start, 4)}
    steps = compile_train_steps(
        experiment.model_at, experiment.optimizer, 0.0, tiny_dataset, BATCH, 10, experiment.mesh
    )
    split = tiny_dataset.splits["train"]
    arrays = {"x": jnp.asarray(split.x), "labels": jnp.asarray(split.labels)}
    _, rows = steps(initial_state(experiment).replace(ema=None), arrays)
    beta = start + (0.5 - start) * np.minimum(1, np.arange(10) / 4)
    expected = rows["vae/distortion"] + beta * rows["vae/rate"]
    np.testing.assert_allclose(rows["vae/loss"], expected, rtol=1e-6)
