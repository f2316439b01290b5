"""One update, and K of them in one compiled program."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dgm_jax import optim, sharding
from dgm_jax.core import Batch, Model, Params, Player, UserError, disjoint, masked_mean
from dgm_jax.data import dataset as data
from dgm_jax.rng import stream
from dgm_jax.train_state import TrainState

Metrics = dict[str, jax.Array]


class Inputs(NamedTuple):
    """Of one update.

    Attributes:
      ids: int32 `[B]`, of the examples.
      rng: of their binarisation.
      rngs: a key for each player, by its name.
    """

    ids: jax.Array
    rng: jax.Array
    rngs: dict[str, jax.Array]


def init_state(
    model: Model, optimizer: optax.GradientTransformation, seed: int, batch: Batch, ema: bool
) -> TrainState:
    """The state before the first step.

    Raises:
      UserError: the model's `init` leaves a player without parameters.
    """
    params = model.init(stream(seed, "init"), batch)
    if missing := [player.name for player in model.players if player.name not in params]:
        raise UserError(
            f"the model's init has no parameters for its player {missing[0]!r}, but for "
            f"{', '.join(params) or 'none'}: give each player an entry of its own name"
        )
    return TrainState(
        step=jnp.int32(0),
        seed=jnp.int32(seed),
        params=params,
        opt_states={p.name: optimizer.init(params[p.name]) for p in model.players},
        # A copy: a donated state must not hold one array twice.
        ema=jax.tree.map(jnp.copy, params) if ema else None,
    )


def train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    state: TrainState,
    batch: Batch,
    rngs: Mapping[str, jax.Array],
    num_parts: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update of every player, in order; each sees what those before it have done.

    Args:
      model: the model, possibly built from traced numbers.
      optimizer: used for every player, with a state of its own for each.
      ema_decay: decay of the averaged parameters, used where `state.ema` is kept.
      state: the state before.
      batch: see `core`.
      rngs: a key for each player, by its name.
      num_parts: into which the batch is cut for memory's sake; gradients and metrics are the means
        over the parts, which follow one another, each with a key of its own and the
        `params["state"]` that the one before it left.

    Returns:
      The state after, and float32 `[]` metrics named `player/loss`, `player/grad_norm` and
      `player/<term>` (nats per example); with `optimizer.skip_non_finite` also `player/skipped`,
      1 where the player's update was skipped, else 0.
    """
    metrics: Metrics = {}
    params, opt_states = dict(state.params), dict(state.opt_states)
    for player in model.players:
        name, own, opt_state = player.name, params[player.name], opt_states[player.name]
        args = player, params, batch, rngs[name]
        grads, measured, new_state = _gradient_by_parts(*args, num_parts)
        updates, opt_states[name] = optimizer.update(grads, opt_state, own)
        params[name] = optax.apply_updates(own, updates)
        measured["grad_norm"] = optax.tree.norm(grads)
        if isinstance(opt_states[name], optim.SkipState):
            skipped = opt_states[name].in_a_row > 0
            measured["skipped"] = skipped.astype(jnp.float32)
            if new_state is not None:
                keep = functools.partial(jnp.where, skipped)
                new_state = jax.tree.map(keep, params["state"], new_state)
        if new_state is not None:
            params["state"] = new_state
        metrics |= {f"{name}/{metric}": value for metric, value in measured.items()}
    ema = state.ema
    if ema is not None:
        ema = optim.update_ema(ema, params, state.step, ema_decay)
    state = state.replace(step=state.step + 1, params=params, opt_states=opt_states, ema=ema)
    return state, metrics


def _gradient(player: Player, params: Params, batch: Batch, rng: jax.Array) -> tuple:
    """A player's gradient, metrics float32 `[]`, and new `params["state"]` or None."""

    def loss_of(own: Any) -> tuple:
        return player.loss_fn({**params, player.name: own}, batch, rng)

    (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(params[player.name])
    terms = {name: masked_mean(term, batch) for name, term in aux.terms.items()}
    return grads, disjoint({"loss": loss}, aux.scalars, terms), aux.state


def _gradient_by_parts(
    player: Player, params: Params, batch: Batch, rng: jax.Array, num_parts: int
) -> tuple:
    """`_gradient` of equal parts of the batch, one after another: their mean, and the last state.

    What is kept in `params["state"]` need not be a mean: each part goes on from what the part
    before it left.
    """
    if num_parts == 1:
        return _gradient(player, params, batch, rng)

    def cut(array: jax.Array) -> jax.Array:  # of every device's rows each part has as many
        return array.reshape(-1, num_parts, *array.shape[1:]).swapaxes(0, 1)

    def of_part(state: Any, part: tuple[Batch, jax.Array]) -> tuple:
        given = params if state is None else {**params, "state": state}
        grads, measured, new_state = _gradient(player, given, *part)
        return (grads, measured), new_state

    parts, state = (jax.tree.map(cut, batch), jax.random.split(rng, num_parts)), params.get("state")
    like, new_like = jax.eval_shape(of_part, state, jax.tree.map(lambda array: array[0], parts))
    nothing = jax.tree.map(lambda of: jnp.zeros(of.shape, of.dtype), like)

    def add(carry: tuple, part: tuple[Batch, jax.Array]) -> tuple[tuple, None]:
        total, state = carry
        found, new_state = of_part(state, part)
        total = jax.tree.map(lambda t, new: t + new / num_parts, total, found)
        return (total, state if new_state is None else new_state), None

    (total, state), _ = jax.lax.scan(add, (nothing, state), parts)
    return *total, None if new_like is None else state


def inputs_of(
    dataset: data.Dataset, batch_size: int, names: Sequence[str], seed: jax.Array, step: jax.Array
) -> Inputs:
    """What update number `step` (from 0) looks at and draws from: nothing else decides it.

    Args:
      dataset: for its sizes, and for which examples are labelled.
      batch_size: B.
      names: of the players.
      seed: int32 `[]`, the run's.
      step: int32 `[]`.
    """
    ids = data.train_ids(dataset, batch_size, seed, step)
    rngs = {name: stream(seed, f"train/{name}", step) for name in names}
    return Inputs(ids, stream(seed, "data/binarise", step), rngs)


def train_steps(
    model_at: Callable[[jax.Array], Model],
    optimizer: optax.GradientTransformation,
    ema_decay: float | jax.Array,
    dataset: data.Dataset,
    batch_size: int,
    num_steps: int,
    num_parts: int = 1,
    place: Callable[[Batch], Batch] = lambda batch: batch,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]:
    """K updates as one pure function of the state and the training arrays.

    Shuffling, binarisation and the updates all happen inside; the host does nothing per step.

    Args:
      model_at: step -> the model of that step; called inside the compiled program.
      optimizer, ema_decay: see `train_step`.
      dataset: for its binarisation, its sizes, and which examples are labelled.
      batch_size: B, over all devices.
      num_steps: K, updates per call.
      num_parts: see `train_step`.
      place: says on which devices a batch is.

    Returns:
      `(state, arrays) -> (state, metrics)` where `arrays` holds `x` `[N, *event]` and
      `labels` int32 `[N]`, and each metric is float32 `[K]`.
    """

    def run(state: TrainState, arrays: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        names = [player.name for player in model_at(state.step).players]

        def before(step: jax.Array) -> Inputs:
            return inputs_of(dataset, batch_size, names, state.seed, step)

        def body(state: TrainState, step: Inputs) -> tuple[TrainState, Metrics]:
            ids, rng, rngs = step
            batch = data.train_batch(dataset, arrays["x"], arrays["labels"], ids, rng)
            model = model_at(state.step)
            return train_step(model, optimizer, ema_decay, state, place(batch), rngs, num_parts)

        # For all steps at once: K small computations would cost more than one larger.
        prepared = jax.vmap(before)(state.step + jnp.arange(num_steps))
        return jax.lax.scan(body, state, prepared)

    return run


def compile_train_steps(
    model_at: Callable[[jax.Array], Model],
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    dataset: data.Dataset,
    batch_size: int,
    num_steps: int,
    mesh: Mesh,
    state_shardings: Any = None,
    num_parts: int = 1,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]:
    """`train_steps` jitted: batches split over the devices of `mesh`, the state donated.

    The state stays where `state_shardings` say, as from `sharding.of_state`; by default all of it
    is on every device.
    """

    def place(batch: Batch) -> Batch:
        return jax.lax.with_sharding_constraint(batch, sharding.split_batch(mesh))

    run = train_steps(
        model_at, optimizer, ema_decay, dataset, batch_size, num_steps, num_parts, place
    )
    everywhere = sharding.replicated(mesh)
    out_shardings = (everywhere if state_shardings is None else state_shardings, everywhere)
    return jax.jit(run, donate_argnums=0, out_shardings=out_shardings)
