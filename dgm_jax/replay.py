"""`--mode=replay`: the step in which training came to a number that is not finite, looked into.

Steps depend on the state, the seed and their number alone: from the last checkpoint before it, the
step is made again as it was, then once more with every intermediate value checked.
"""

import traceback
from contextlib import closing
from pathlib import Path

import flax
import jax
import jaxlib
import numpy as np
import optax
from jax.experimental import checkify
from ml_collections import ConfigDict

from dgm_jax.checkpoint import Checkpoints
from dgm_jax.core import UserError
from dgm_jax.data import dataset as data
from dgm_jax.experiment import (
    Experiment,
    compile_steps,
    prepare,
    training_arrays,
)
from dgm_jax.progress import Progress, say
from dgm_jax.run import data_of
from dgm_jax.train import first_state
from dgm_jax.train_state import TrainState
from dgm_jax.train_step import Metrics, inputs_of, train_step
from dgm_jax.trained_model import start_of
from dgm_jax.workdir import Workdir


def replay_mode(workdir: Workdir, given: ConfigDict | None = None) -> None:
    """Say what is not finite in the step that `replay.json` names, and where it first is not.

    Raises:
      UserError: training stopped at no such step, or its checkpoints are gone.
    """
    about = workdir.load_replay()
    config = workdir.load_config(given)
    dataset = data_of(workdir, config)
    experiment = prepare(config, dataset)
    if not 1 <= about["step"] <= (last := experiment.num_steps):
        raise UserError(f"{workdir.replay}: step {about['step']} of {last}: train again")
    one_by_one = config.copy_and_resolve_references()
    one_by_one.train.steps_per_dispatch = 1
    # Prepared anew it might have fewer steps, and with them another schedule.
    experiment = experiment._replace(config=one_by_one)
    state = _state_before(about["step"], experiment, workdir)
    say(f"step {about['step']:,}, in which {about['what']} not finite")
    for line in look_into(experiment, state):
        say(line)


def look_into(experiment: Experiment, state: TrainState) -> list[str]:
    """What is not finite in the step after `state`, in lines."""
    dataset, arrays = experiment.dataset, training_arrays(experiment)
    names = [player.name for player in experiment.model.players]
    batch_size = experiment.config.train.batch_size
    ids, rng, rngs = inputs_of(dataset, batch_size, names, state.seed, state.step)
    batch = data.train_batch(dataset, arrays["x"], arrays["labels"], ids, rng)

    def step(state: TrainState) -> tuple[TrainState, Metrics]:
        model = experiment.model_at(state.step)
        args = (model, experiment.optimizer, experiment.ema_decay)
        return train_step(*args, state, batch, rngs, experiment.config.train.num_parts)

    error, (after, measured) = jax.jit(checkify.checkify(step, checkify.nan_checks))(state)
    lines = _not_finite("parameter before it", state.params)
    lines += _not_finite("metric", measured)
    lines += _not_finite("parameter after it", after.params)
    return [*lines, _origin(error)]


def _origin(error: checkify.Error) -> str:
    """Where the first NaN was made, by the line that is not JAX's own."""
    found = error.get_exception()
    if found is None:
        return "no NaN is made: a value overflows"
    frames = traceback.extract_tb(found.traceback_info.as_python_traceback())
    libraries = [Path(module.__file__).parent for module in (jax, jaxlib, flax, optax)]
    own = [f for f in frames if not any(Path(f.filename).is_relative_to(of) for of in libraries)]
    return f"the first NaN: {own[-1].filename}:{own[-1].lineno}: {own[-1].line} ({found})"


def _not_finite(kind: str, tree: object) -> list[str]:
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        bad = int(np.sum(~np.isfinite(leaf)))
        if bad:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found.append(f"{kind} {name}: {bad:,} of {leaf.size:,} values are not finite")
    return found


def _state_before(number: int, experiment: Experiment, workdir: Workdir) -> TrainState:
    """The state before update `number`, from the newest checkpoint, or from the start."""
    with closing(Checkpoints(workdir.checkpoints)) as checkpoints:
        state = first_state(experiment, checkpoints, start_of(experiment.config))
    first = int(state.step)
    if first >= number:
        raise UserError(
            f"{workdir.path} has a checkpoint of step {first:,}, after step {number:,}: it has "
            "gone on since"
        )
    run_steps, arrays = compile_steps(experiment), training_arrays(experiment)
    with Progress("making the steps before it again", number - 1, start=first) as progress:
        for _ in range(first, number - 1):
            state, _ = run_steps(state, arrays)
            progress.advance(1)
    return state
