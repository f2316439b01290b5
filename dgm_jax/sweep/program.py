"""Members that differ only in numbers, trained side by side in one compiled program."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from ml_collections import ConfigDict

from dgm_jax import config as configs
from dgm_jax import interruption, sharding, writers
from dgm_jax.checkpoint import Checkpoints, abstract
from dgm_jax.core import UserError
from dgm_jax.data import dataset as data
from dgm_jax.evaluators import likelihood, passes
from dgm_jax.experiment import Experiment, prepare, training_arrays
from dgm_jax.interruption import Interrupted
from dgm_jax.progress import Progress, say
from dgm_jax.train import NonFiniteError, means, refuse_non_finite
from dgm_jax.train_state import TrainState
from dgm_jax.train_step import Metrics, init_state, train_steps
from dgm_jax.workdir import Workdir, write_json

Numbers = dict[str, np.ndarray]  # float32 [M] by dotted path


class Outcome(NamedTuple):
    """What became of a member.

    Attributes:
      state: after its last good dispatch; NumPy arrays.
      seconds: its share of its program's time, as `train.train` returns.
      failure: why it was stopped, or None.
    """

    state: TrainState
    seconds: dict[str, float]
    failure: str | None


def group(members: Sequence[ConfigDict]) -> list[list[int]]:
    """Indices of members that one program can train, in the order of the first of each.

    They may differ in the seed, in real numbers of the model and the optimizer, in the lengths of
    `train.ramp`, and in how they are evaluated at the end; there are no more of them than
    `train.members_per_program`.
    """
    found: dict[str, list[int]] = {}
    for i, config in enumerate(members):
        fields = configs.fields(config)
        fields["train.ramp"] = re.sub(r" over [^,]*", "", config.train.ramp)
        rest = {path: value for path, value in fields.items() if not _may_differ(path, value)}
        averaged = config.optimizer.ema > 0  # a shape: whether there is an average at all
        found.setdefault(repr((rest, averaged)), []).append(i)
    groups = []
    for alike in found.values():
        most = members[alike[0]].train.members_per_program or len(alike)
        groups += [alike[start : start + most] for start in range(0, len(alike), most)]
    return groups


def _may_differ(path: str, value: Any) -> bool:
    """Whether members of one program may differ in a field."""
    return _is_traced(path, value) or path == "seed" or path.startswith("eval.")


def _is_traced(path: str, value: Any) -> bool:
    return isinstance(value, float) and path.startswith(("model.", "optimizer."))


def numbers_of(experiment: Experiment, members: Sequence[ConfigDict]) -> Numbers:
    """The real numbers in which members of one program, `experiment`, do differ."""
    columns = []
    for config in members:
        fields = configs.fields(config)
        columns.append({path: value for path, value in fields.items() if _is_traced(path, value)})
        columns[-1] |= experiment._replace(config=config).ramp_lengths
    return {
        path: np.array([column[path] for column in columns], np.float32)
        for path in columns[0]
        if len({column[path] for column in columns}) > 1
    }


def check(config: ConfigDict, dataset: data.Dataset) -> Experiment:
    """What one member is, every value checked; its mesh is of all devices.

    Raises:
      UserError: names a value that makes no sense, or none in a sweep.
    """
    absent = "mesh.fsdp", "train.keep_best", "train.init_from", "optimizer.skip_non_finite"
    for field in absent:
        if value := configs.value_of(config, field):
            raise UserError(f"{field}={value!r}: there is no such thing in a sweep; leave it out")
    if (most := config.train.members_per_program) < 0:
        raise UserError(f"train.members_per_program={most}: at least 1, or 0 for all")
    experiment = prepare(config, dataset, sharding.make_mesh(1))
    return experiment._replace(mesh=sharding.make_mesh())  # which shares the members


def train(
    members: Sequence[ConfigDict],
    dataset: data.Dataset,
    workdirs: Sequence[Workdir],
    folder: Path,
    title: str,
) -> list[Outcome]:
    """Train members of one program from its newest checkpoint, or from the start, to the end.

    A member that diverges stays as it was before the dispatch in which it did, one that is not
    finite on the validation split as it was then; the others go on. Who has failed by the time of
    a checkpoint is in the work directories: the checkpoint does not say it.

    As in `train.train` the next dispatch is started before the metrics of the previous one are
    fetched; which members go on is known on the devices.

    Args:
      members: configs of one `group`, each passed by `check`.
      dataset: what all are trained on.
      workdirs: theirs, claimed; rows and events go there.
      folder: for the checkpoints of the program.
      title: of its progress.

    Raises:
      Interrupted: SIGTERM or Ctrl-C came; what was reached is saved.
    """
    experiment, num = check(members[0], dataset), len(members)
    state, run_steps, inputs = compile_members(experiment, members)
    checkpoints = Checkpoints(folder)
    # Checkpoints are without the padding, and fit any number of devices.
    own = lambda state: jax.tree.map(lambda a: a[:num], state)  # noqa: E731
    host = SingleDeviceSharding(jax.devices("cpu")[0])  # no device may have room for all
    restored = checkpoints.restore(abstract(jax.eval_shape(own, state), host), say)
    if restored is not None:
        state = jax.tree.map(lambda new, old: _padded(new, old.sharding), restored, state)
        del restored
        say(f"resumed     {title} from step {int(state.step.max()):,}")
    done = first = int(state.step.max())
    checkpoints.tidy(first)
    log = _Log(experiment, workdirs, first, title)
    validate = _compile_validation(experiment, members)
    every = {name: experiment.steps(name) for name in ("validate_every", "checkpoint_every")}
    overdue = interruption.every(60 * experiment.config.train.checkpoint_minutes)
    going, pending = _padded(log.going, state.step.sharding), None
    with interruption.noted() as asked_to_stop:
        try:
            for step in range(first, experiment.num_steps, experiment.steps_per_dispatch):
                state, measured, going = run_steps(state, inputs, going)
                if pending is not None:
                    log.dispatch(*pending)
                done = step + experiment.steps_per_dispatch
                pending = done, measured, going
                # Only now: while metrics were waited for it may have come.
                signum = asked_to_stop()
                last = done == experiment.num_steps
                ended = last or not log.going.any()  # nothing left to train
                validating = validate and (done % every["validate_every"] == 0 or last)
                saving = done % every["checkpoint_every"] == 0 or ended or signum or overdue()
                if validating or saving:
                    log.dispatch(*pending)
                    pending = None
                if validating:
                    log.validation(done, validate(state, [config.seed for config in members]))
                    going = _padded(log.going, state.step.sharding)
                if saving:
                    log.keep_failures()
                    checkpoints.save(own(state))
                if ended or signum:
                    break
        finally:
            checkpoints.close()
            log.close()
        if signum := asked_to_stop():
            raise Interrupted(signum, interruption.saved_at(done))
    state = jax.device_get(state)
    each = [jax.tree.map(lambda a, i=i: np.asarray(a[i]), state) for i in range(num)]
    return [Outcome(s, log.clock.seconds, f) for s, f in zip(each, log.failures, strict=True)]


def _padded(values: jax.Array | np.ndarray, place: NamedSharding) -> jax.Array:
    """`[M, ...]` -> the same with the last repeated, as many as the devices can share equally."""
    rows = np.arange(len(values) + -len(values) % place.mesh.size)
    return jax.device_put(np.asarray(values)[np.minimum(rows, len(values) - 1)], place)


def compile_members(experiment: Experiment, members: Sequence[ConfigDict]) -> tuple:
    """The first state of all members, K updates of each as one jitted function, and its inputs.

    The function takes the state, the inputs, and which members go on, bool `[M]`, M with the
    padding; all, where it is left out. The inputs are the numbers in which the members differ and
    the data: other numbers are the same program. It returns the state, metrics `[M, K]`, and which
    members go on.
    """
    # The devices share the members equally: copies of the last fill up the last share.
    mesh = sharding.make_mesh(len(members))
    padded = [*members, *[members[-1]] * (-len(members) % mesh.size)]
    by_member = NamedSharding(mesh, PartitionSpec("data"))
    numbers = jax.device_put(numbers_of(experiment, padded), by_member)
    seeds = jnp.array([config.seed for config in padded], jnp.int32)
    train_config, dataset = experiment.config.train, experiment.dataset
    batch = data.some(dataset, "train", train_config.batch_size)
    averaged = experiment.config.optimizer.ema > 0

    def initial(numbers: Numbers, seed: jax.Array) -> TrainState:
        member = experiment._replace(numbers=numbers)
        return init_state(member.model, member.optimizer, seed, batch, averaged)

    def steps_of_one(numbers: Numbers, state: TrainState, arrays: Any) -> tuple:
        member = experiment._replace(numbers=numbers)
        run = train_steps(
            member.model_at,
            member.optimizer,
            member.ema_decay,
            dataset,
            train_config.batch_size,
            member.steps_per_dispatch,
            train_config.num_parts,
        )
        after, measured = run(state, arrays)
        # The last update's own loss was finite before it; its result need not be.
        finite = jnp.isfinite(optax.tree.norm(after.params))
        for values in measured.values():
            finite &= jnp.isfinite(values).all()
        return after, measured, finite

    def run_steps(
        state: TrainState, inputs: Any, going: jax.Array | bool = True
    ) -> tuple[TrainState, Metrics, jax.Array]:
        numbers, arrays = inputs
        after, measured, finite = jax.vmap(steps_of_one, (0, 0, None))(numbers, state, arrays)
        going &= finite
        keep = jax.vmap(lambda good, new, old: jnp.where(good, new, old))
        return jax.tree.map(lambda *leaves: keep(going, *leaves), after, state), measured, going

    state = jax.jit(jax.vmap(initial), out_shardings=by_member)(numbers, seeds)
    run = jax.jit(run_steps, donate_argnums=0, out_shardings=by_member)
    return state, run, (numbers, training_arrays(experiment._replace(mesh=mesh)))


def _compile_validation(experiment: Experiment, members: Sequence[ConfigDict]) -> Any:
    """`(state, seeds) -> [{name: float32 [N]}]`, a member after the other; None without a split."""
    if not len(experiment.dataset.splits["validation"]):
        return None
    numbers = numbers_of(experiment, members)

    def terms(member: Any, batch: Any, keys: jax.Array) -> dict[str, jax.Array]:
        model = experiment._replace(numbers=member["numbers"]).model
        return likelihood.elbo_terms(model, num_samples=1)(member["params"], batch, keys)

    size = experiment.config.eval.batch_size
    run = passes.compile_pass(terms, experiment.dataset, "validation", size, experiment.mesh)

    def validate(state: TrainState, seeds: Sequence[int]) -> list[dict[str, np.ndarray]]:
        whole = {"numbers": numbers, "params": jax.device_get(state.eval_params)}
        found = []
        for i, seed in enumerate(seeds):
            member = jax.tree.map(lambda a, i=i: a[i], whole)
            # Once, not for every batch.
            found.append(run(jax.device_put(member, sharding.replicated(experiment.mesh)), seed))
        return found

    return validate


class _Log:
    """Writes each member's rows, notes which have failed, and shows progress."""

    def __init__(
        self, experiment: Experiment, workdirs: Sequence[Workdir], step: int, title: str
    ) -> None:
        self._experiment, self._workdirs = experiment, workdirs
        self._writers = [writers.Writer(w.metrics, w.tensorboard, step) for w in workdirs]
        self.failures = [w.load_failure(until=step) for w in workdirs]
        self._new: dict[int, int] = {}  # who has failed since, and by which step
        # Of all: those of a member that failed end early.
        self.clock = writers.Clock(row for w in workdirs for row in writers.read(w.metrics))
        self._progress = Progress(title, experiment.num_steps, start=step)

    def dispatch(self, step: int, measured: Metrics, going: jax.Array) -> None:
        """A row for each member; metrics are `[M, K]`, `going` bool `[M]`, M with the padding."""
        measured, going = jax.device_get((measured, going))
        num = len(self._writers)
        config, steps = self._experiment.config, self._experiment.steps_per_dispatch
        examples_per_second = num * steps * config.train.batch_size / self.clock.lap(num)
        losses = []
        for i, writer in enumerate(self._writers):
            if self.failures[i] is not None:
                continue
            own = {name: values[i] for name, values in measured.items()}
            try:
                refuse_non_finite(step, steps, own)
            except NonFiniteError as error:  # its text advises what a sweep does not have
                self._note(i, step, f"{error.what} not finite at step {error.step:,}")
                continue
            if not going[i]:
                self._note(i, step, f"a parameter is not finite after step {step:,}")
                continue
            row = means(own)
            losses += [value for name, value in row.items() if name.endswith("/loss")]
            speed = {"examples_per_second": examples_per_second / num}
            writer.write(step, row | speed | self.clock.columns)
        stopped = len(self.failures) - self.failures.count(None)
        losses = f"losses {min(losses):.2f} to {max(losses):.2f}" if losses else "none is left"
        self._progress.advance(
            steps,
            f"{num} members  {examples_per_second:,.0f} examples/s  {losses}"
            + (f"  {stopped} failed" if stopped else ""),
        )

    def validation(self, step: int, found: list[dict[str, np.ndarray]]) -> None:
        """A row of validation means for each member that has not failed."""
        for i, (writer, per_example) in enumerate(zip(self._writers, found, strict=True)):
            if self.failures[i] is not None:
                continue
            try:
                of_member = passes.summarise(per_example, num_samples=1)
            except UserError as error:
                self._note(i, step, f"validation after step {step:,}: {error}")
            else:
                writer.write(step, {f"validation/{n}": m.value for n, m in of_member.items()})

    @property
    def going(self) -> np.ndarray:
        """Which members have not failed: bool `[M]`."""
        return np.array([failure is None for failure in self.failures])

    def _note(self, i: int, step: int, why: str) -> None:
        self.failures[i], self._new[i] = why, step

    def keep_failures(self) -> None:
        """Write to the work directories who has failed, by which step, and why.

        The checkpoint that follows may never come to be there: who goes on from one before that
        step has not failed yet.
        """
        for i, step in self._new.items():
            write_json(self._workdirs[i].failure, {"failure": self.failures[i], "step": step})
        self._new.clear()

    def close(self) -> None:
        """Close the files and the bar."""
        self._progress.close()
        for writer in self._writers:
            writer.close()
