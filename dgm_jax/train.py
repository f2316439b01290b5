"""The training loop."""

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import interruption, processes, writers
from dgm_jax.checkpoint import Checkpoints
from dgm_jax.core import Params, UserError
from dgm_jax.evaluators import likelihood, passes
from dgm_jax.experiment import (
    Experiment,
    compile_steps,
    initial_state,
    training_arrays,
)
from dgm_jax.interruption import Interrupted
from dgm_jax.metrics import Metric
from dgm_jax.progress import Progress, say
from dgm_jax.train_state import TrainState
from dgm_jax.train_step import Metrics
from dgm_jax.workdir import Workdir, write_json

# What the processes tell each other, as they do the number of a signal to stop, which is larger.
_SAVE = 1


def best_or_newest(workdir: Workdir, like: TrainState) -> TrainState | None:
    """The best checkpoint where one is kept, else the newest that is whole; None without any.

    Args:
      workdir: of a run.
      like: its abstract state.
    """
    for directory in (workdir.best_checkpoint, workdir.checkpoints):
        with closing(Checkpoints(directory)) as checkpoints:
            state = checkpoints.restore(like, say)
        if state is not None:
            return state
    return None


def start_from(state: TrainState, params: Params) -> TrainState:
    """The first state with other parameters, which are averaged parameters too.

    Raises:
      UserError: they are not of such a model; names the first that differs.
    """
    leaves = jax.tree_util.tree_leaves_with_path
    given, wanted = (
        {jax.tree_util.keystr(path): leaf for path, leaf in leaves(of)}
        for of in (params, state.params)
    )
    for name in {**wanted, **given}:
        shapes = [of[name].shape if name in of else "absent" for of in (given, wanted)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"train.init_from: its parameter {name} is {shapes[0]}, and this model's is "
                f"{shapes[1]}: start from a model of the same fields"
            )
    place = lambda new, old: jax.device_put(jnp.copy(new), old.sharding)  # noqa: E731
    start = state.replace(params=jax.tree.map(place, dict(params), dict(state.params)))
    return start if state.ema is None else start.replace(ema=jax.tree.map(jnp.copy, start.params))


def first_state(
    experiment: Experiment, checkpoints: Checkpoints, start: Callable[[], Params] | None
) -> TrainState:
    """What training goes on from: the newest whole checkpoint, or else the start, of step 0.

    Args:
      experiment: what is trained.
      checkpoints: of its work directory.
      start: as in `train`.
    """
    # The devices may not hold two: the start is made only where it is wanted.
    restored = checkpoints.restore(experiment.abstract_state, say)
    if restored is not None:
        return restored
    state = initial_state(experiment)
    return state if start is None else start_from(state, start())


def train(
    experiment: Experiment, workdir: Workdir, start: Callable[[], Params] | None = None
) -> tuple[TrainState, dict[str, float]]:
    """Train from the newest whole checkpoint, or from the start, to the end.

    The order within a round matters: the next dispatch is started before the previous one's
    metrics are fetched, so the devices never wait for the host; and metrics are checked before
    the state they belong to is saved, so a checkpoint is never one of a run that had diverged.

    Args:
      experiment: what to train.
      workdir: a claimed work directory; rows, events and checkpoints go there.
      start: gives the parameters to start from, asked where there is no checkpoint; random ones by
        default.

    Returns:
      The final state, or the best where it is kept, and the seconds spent over all interruptions:
      `training` by the clock, and `training_cpu` summed over the processors, which other work on
      the machine does not change.

    Raises:
      NonFiniteError: a loss, term, gradient or parameter; names it and the step, of which
        `replay.json` is left.
      Interrupted: SIGTERM or Ctrl-C came; what was reached is saved.
    """
    config, model, mesh = experiment.config, experiment.model, experiment.mesh
    checkpoints = Checkpoints(workdir.checkpoints)
    state = first_state(experiment, checkpoints, start)
    done = first = int(state.step)
    if first:
        say(f"resumed     from the checkpoint of step {first:,}")
    checkpoints.tidy(first)
    if processes.is_first():  # of an attempt that stopped there; this one may not
        workdir.replay.unlink(missing_ok=True)
    best = _Best(experiment, workdir, first)
    processes.wait_for_all("earlier rows are read")
    log = _Log(experiment, workdir, first)

    arrays, run_steps = training_arrays(experiment), compile_steps(experiment)
    validate = None
    if len(experiment.dataset.splits["validation"]):
        validate = passes.compile_pass(
            likelihood.elbo_terms(model, num_samples=1),
            experiment.dataset,
            "validation",
            config.eval.batch_size,
            mesh,
        )
    validate_every = experiment.steps("validate_every")
    checkpoint_every = experiment.steps("checkpoint_every")
    overdue = interruption.every(60 * config.train.checkpoint_minutes)

    pending: tuple[int, Metrics] | None = None
    with interruption.noted() as asked_to_stop:
        heard = processes.heard()
        try:
            for step in range(first, experiment.num_steps, experiment.steps_per_dispatch):
                state, measured = run_steps(state, arrays)
                if pending is not None:
                    log.dispatch(*pending)
                done = step + experiment.steps_per_dispatch
                pending = done, measured
                last = done == experiment.num_steps
                # One clock for all processes: they save together.
                save = _SAVE if processes.is_first() and overdue() else 0
                told = heard(asked_to_stop() or save)
                validating = validate is not None and (done % validate_every == 0 or last)
                saving = done % checkpoint_every == 0 or last or told
                if validating or saving:
                    log.dispatch(*pending)
                    pending = None
                    _refuse_non_finite_parameters(done, state)
                if validating:
                    found = log.validation(done, validate(state.eval_params, config.seed))
                    best.save_if_better(state, found)
                if saving:
                    best.wait()  # who goes on from here takes it that the best so far is there
                    checkpoints.save(state)
                if told > _SAVE:
                    break
        except NonFiniteError as error:
            write_json(workdir.replay, {"step": error.step, "what": error.what})
            raise
        finally:
            # Also after an error or an interrupt: a save under way is finished, rows are kept.
            checkpoints.close()
            best.close()
            log.close()
        # Of several processes the first answer is to what was asked before, the second to this.
        if (signum := max(heard(asked_to_stop() or 0), heard(0))) > _SAVE:
            raise Interrupted(signum, interruption.saved_at(done))
    if config.train.keep_best:
        del state  # the devices may not hold two
        state = best_or_newest(workdir, experiment.abstract_state)
    return state, log.clock.seconds


class _Best:
    """Keeps the checkpoint that is best by `train.keep_best`."""

    def __init__(self, experiment: Experiment, workdir: Workdir, step: int) -> None:
        """`step` is that of the checkpoint from which training goes on."""
        self._name = experiment.config.train.keep_best
        # Likelihoods are better when higher; the rest are costs.
        self._sign = 1 if self._name in experiment.model.log_likelihood_fns else -1
        key = f"validation/{self._name}"
        rows = [row for row in writers.read(workdir.metrics) if row["step"] <= step and key in row]
        self._value = max((self._sign * row[key] for row in rows), default=-np.inf)
        self._checkpoints = Checkpoints(workdir.best_checkpoint, keep=1)

    def save_if_better(self, state: TrainState, found: Mapping[str, Metric]) -> None:
        if not self._name:
            return
        value = self._sign * found[self._name].value
        if value > self._value:
            self._value = value
            self._checkpoints.save(state)

    def wait(self) -> None:
        self._checkpoints.wait()

    def close(self) -> None:
        self._checkpoints.close()


class _Log:
    """Checks each dispatch's metrics, writes them, and shows progress."""

    def __init__(self, experiment: Experiment, workdir: Workdir, step: int) -> None:
        self._experiment = experiment
        self._several = len(experiment.model.players) > 1
        self._writer = writers.Writer(workdir.metrics, workdir.tensorboard, step)
        self.clock = writers.Clock(writers.read(workdir.metrics))
        self._progress = Progress("training", experiment.num_steps, start=step)

    def dispatch(self, step: int, measured: Metrics) -> None:
        """One row for the K updates that ended with number `step`; metrics are `[K]`."""
        measured = jax.device_get(measured)
        steps = self._experiment.steps_per_dispatch
        refuse_non_finite(step, steps, measured)
        elapsed = self.clock.lap()
        row = means(measured)
        speed = steps * self._experiment.config.train.batch_size / elapsed
        self._writer.write(step, row | {"examples_per_second": speed} | self.clock.columns)
        shown = "  ".join(
            f"{name if self._several else name.partition('/')[2]} {value:.2f}"
            for name, value in row.items()
            if not name.endswith("grad_norm")
        )
        self._progress.advance(
            steps, f"{steps / elapsed:,.0f} steps/s  {speed:,.0f} examples/s  {shown}"
        )

    def validation(self, step: int, per_example: dict[str, np.ndarray]) -> dict[str, Metric]:
        """One row of validation means, which it returns."""
        try:
            found = passes.summarise(per_example, num_samples=1)
        except UserError as error:
            raise UserError(f"validation after step {step:,}: {error}") from error
        self._writer.write(step, {f"validation/{n}": m.value for n, m in found.items()})
        return found

    def close(self) -> None:
        """Close the files and the bar."""
        self._progress.close()
        self._writer.close()


class NonFiniteError(UserError):
    """Training came to a number that is not finite.

    Attributes:
      step: number of the update in which it did.
      what: is not finite.
    """

    def __init__(self, what: str, step: int) -> None:
        """`what` is not finite in update number `step`."""
        super().__init__(
            f"{what} not finite at step {step:,}: training stopped and the last checkpoint is as "
            "it was; try a lower optimizer.learning_rate or optimizer.clip_norm, or --mode=replay "
            "to see where it comes from"
        )
        self.what, self.step = what, step


def refuse_non_finite(step: int, num_steps: int, measured: Mapping[str, np.ndarray]) -> None:
    """Refuse metrics `[num_steps]` of the updates up to number `step` that are not finite.

    Those of skipped updates may be whatever they are.

    Raises:
      NonFiniteError: names the metrics and the step at which they first are not.
    """
    bad = {
        name: np.flatnonzero(~np.isfinite(values) & ~_skipped(measured, name))
        for name, values in measured.items()
    }
    bad = {name: where[0] for name, where in bad.items() if where.size}
    if bad:
        at = min(bad.values())
        names = ", ".join(name for name, where in bad.items() if where == at)
        raise NonFiniteError(f"{names} is", step - num_steps + int(at) + 1)


def means(measured: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means of metrics `[K]` over the updates that were made, and how many were skipped."""
    row = {}
    for name, values in measured.items():
        made = ~_skipped(measured, name)
        if name.endswith("/skipped"):
            row[name] = float(values.sum())
        elif made.any():
            row[name] = float(values[made].mean())
    return row


def _skipped(measured: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Which of the K updates that a metric is of were skipped: bool `[K]`."""
    player, values = name.partition("/")[0], measured[name]
    return measured.get(f"{player}/skipped", np.zeros_like(values)) > 0


def _refuse_non_finite_parameters(step: int, state: TrainState) -> None:
    """The last update's own loss was finite before it; its result need not be."""
    for path, finite in jax.tree_util.tree_leaves_with_path(_are_finite(state.params)):
        if not processes.on_host(finite):
            raise NonFiniteError(f"parameters {jax.tree_util.keystr(path)} are", step)


@jax.jit
def _are_finite(params: Params) -> Any:
    """Of each array whether all of it is: a pytree of bools like `params`."""
    return jax.tree.map(lambda a: jnp.isfinite(a).all(), params)
