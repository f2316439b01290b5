"""The training loop."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgm_jax import config as configs
from dgm_jax import interruption, limit, models, optim, processes, sharding, writers
from dgm_jax.checkpoint import Checkpoints, abstract
from dgm_jax.core import DataSpec, Model, Params, UserError
from dgm_jax.data import dataset as data
from dgm_jax.evaluators import likelihood, passes
from dgm_jax.interruption import Interrupted
from dgm_jax.metrics import Metric
from dgm_jax.nn import precision
from dgm_jax.progress import Progress, say
from dgm_jax.train_state import TrainState
from dgm_jax.train_step import Metrics, compile_train_steps, init_state, train_steps
from dgm_jax.workdir import Workdir, write_json


class Experiment(NamedTuple):
    """A config made concrete: checked, with its data and devices.

    Attributes:
      config: the config.
      dataset: what it is trained and measured on.
      mesh: the devices.
      num_steps: updates until the end.
      numbers: fields of the model and the optimizer, by dotted path, that replace the config's; may
        be traced.
    """

    config: ConfigDict
    dataset: data.Dataset
    mesh: Mesh
    num_steps: int
    numbers: Mapping[str, Any] = {}

    @property
    def model(self) -> Model:
        """The model, with its numbers at their full values."""
        return models.build(self._model_fields, self.dataset.spec)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer, its schedules as long as the run."""
        return optim.build(self._optimizer, self.num_steps)

    @property
    def ema_decay(self) -> float | jax.Array:
        """Decay of the averaged parameters; 0 where none are kept."""
        return self._optimizer.ema

    @property
    def _optimizer(self) -> optim.Config:
        return configs.section(self.config, "optimizer", self.numbers)

    @property
    def _model_fields(self) -> dict[str, Any]:
        return {**self.config.model, **configs.of_section(self.numbers, "model")}

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the training split."""
        return len(self.dataset.splits["train"]) // self.config.train.batch_size

    @property
    def steps_per_dispatch(self) -> int:
        """K, no more than the whole run has."""
        return min(self.config.train.steps_per_dispatch, self.num_steps)

    def model_at(self, step: jax.Array) -> Model:
        """The model of one step: each field that `train.ramp` names still on its way up.

        Args:
          step: int32 `[]`, from 0; may be traced.
        """
        fields = self._model_fields
        for field, length in self.ramps.items():
            fields[field] = fields[field] * jnp.minimum(1.0, step / length)
        model = models.build(fields, self.dataset.spec)
        return precision.training_in(model, self.config.train.compute_dtype)

    @property
    def ramps(self) -> dict[str, int]:
        """Fields of the model that rise linearly from 0, each with its number of steps."""
        found = {}
        for ramp in filter(None, self.config.train.ramp.split(",")):
            field, _, length = ramp.strip().partition(" over ")
            value = self.config.model.get(field.removeprefix("model."))
            if not field.startswith("model.") or not isinstance(value, float):
                raise UserError(
                    f"train.ramp={ramp.strip()!r}: name a field of the model that is a real "
                    "number, and how long it rises, such as 'model.beta over 20 epochs'"
                )
            found[field.removeprefix("model.")] = configs.num_steps(
                length, f"train.ramp={ramp.strip()!r}: length", self.steps_per_epoch, multiple=1
            )
        return found

    def steps(self, field: str) -> int:
        """A length of the `train` section in steps, a multiple of K."""
        return configs.num_steps(
            self.config.train[field],
            f"train.{field}",
            self.steps_per_epoch,
            self.steps_per_dispatch,
        )


def prepare(config: ConfigDict, dataset: data.Dataset, mesh: Mesh | None = None) -> Experiment:
    """Check every value of a config against the data and the devices, and build what it says.

    Args:
      config: the config.
      dataset: that it names.
      mesh: of the devices; all that there are by default.

    Raises:
      UserError: names the value that is wrong.
    """
    if not 0 <= config.seed < 2**31:
        raise UserError(f"seed={config.seed}: must be at least 0 and below 2^31")
    models.check(config.model, dataset.spec)
    optimizer, mesh = configs.section(config, "optimizer"), mesh or sharding.make_mesh()
    optim.check(optimizer)
    likelihood.check(configs.section(config, "eval"), mesh)
    train, num_train = config.train, len(dataset.splits["train"])
    if train.batch_size > num_train:
        raise UserError(
            f"train.batch_size={train.batch_size} is larger than the training split "
            f"({num_train:,} examples)"
        )
    sharding.check_batch("train.batch_size", train.batch_size, mesh)
    if train.num_parts < 1 or train.batch_size % (train.num_parts * mesh.size):
        raise UserError(
            f"train.num_parts={train.num_parts}: train.batch_size={train.batch_size} on "
            f"{mesh.size} device(s) cannot be cut into so many equal parts"
        )
    precision.check("train.compute_dtype", train.compute_dtype)
    if train.steps_per_dispatch < 1:
        raise UserError(f"train.steps_per_dispatch={train.steps_per_dispatch}: at least 1")
    exact = configs.num_steps(
        train.duration, "train.duration", num_train // train.batch_size, multiple=1
    )
    per_dispatch = min(exact, train.steps_per_dispatch)
    # Whole dispatches only: a shorter last one would be a second program to compile.
    num_steps = -(-exact // per_dispatch) * per_dispatch
    experiment = Experiment(
        config=config,
        dataset=dataset,
        mesh=mesh,
        num_steps=num_steps,
    )
    for field in ("validate_every", "checkpoint_every"):
        experiment.steps(field)  # raises where the text makes no sense
    _ = experiment.ramps  # likewise
    if train.keep_best and not len(dataset.splits["validation"]):
        raise UserError(f"train.keep_best={train.keep_best!r} needs data.validation above 0")
    return experiment


def initial_state(experiment: Experiment) -> TrainState:
    """The state before the first step, made on the devices it will stay on."""
    config = experiment.config
    batch = jax.device_get(data.some(experiment.dataset, "train", config.train.batch_size))
    # It runs once: compiling is what takes time (2.6 s, and 1.1 s without optimisation).
    once = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(
        lambda batch: init_state(
            experiment.model, experiment.optimizer, config.seed, batch, config.optimizer.ema > 0
        ),
        out_shardings=state_shardings(experiment),
        compiler_options=once,
    )(batch)


def abstract_state(
    config: ConfigDict,
    model: Model,
    optimizer: optax.GradientTransformation,
    spec: DataSpec,
    mesh: Mesh,
) -> TrainState:
    """Shapes of the state, for restoring it without data."""
    size = config.train.batch_size
    x = jax.ShapeDtypeStruct((size, *spec.event_shape), spec.dtype)
    batch = {"x": x, "label": jax.ShapeDtypeStruct((size,), jnp.int32)}
    state = jax.eval_shape(
        lambda batch: init_state(model, optimizer, config.seed, batch, config.optimizer.ema > 0),
        batch,
    )
    placed = sharding.of_state(state, mesh, configs.section(config, "mesh"))
    return abstract(state, placed)


def state_shardings(experiment: Experiment) -> Any:
    """On which devices the state is: one sharding for all of it, or a pytree like it."""
    if not experiment.config.mesh.fsdp:
        return sharding.replicated(experiment.mesh)  # without tracing the model
    of = (experiment.config, experiment.model, experiment.optimizer, experiment.dataset.spec)
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(*of, experiment.mesh))


def training_arrays(experiment: Experiment) -> dict[str, jax.Array]:
    """`x` `[N, *event]` and `labels` int32 `[N]` to train on, whole on every device."""
    split = experiment.dataset.splits["train"]
    return processes.on_every_device({"x": split.x, "labels": split.labels}, experiment.mesh)


def compile_steps(experiment: Experiment) -> Callable[..., tuple[TrainState, Metrics]]:
    """K updates, `(state, training_arrays) -> (state, metrics [K])`, jitted; donates the state."""
    return compile_train_steps(
        experiment.model_at,
        experiment.optimizer,
        experiment.ema_decay,
        experiment.dataset,
        experiment.config.train.batch_size,
        experiment.steps_per_dispatch,
        experiment.mesh,
        state_shardings(experiment),
        experiment.config.train.num_parts,
    )


def step_products(experiment: Experiment) -> limit.Products:
    """The matrix products of a device's share of one step, forward and backward."""
    split = experiment.dataset.splits["train"]
    step = train_steps(
        experiment.model_at,
        experiment.optimizer,
        experiment.ema_decay,
        experiment.dataset,
        experiment.config.train.batch_size // experiment.mesh.size,
        num_steps=1,
        num_parts=experiment.config.train.num_parts,
    )
    of = (experiment.config, experiment.model, experiment.optimizer, experiment.dataset.spec)
    state = abstract_state(*of, experiment.mesh)
    return limit.products_of(step, state, {"x": split.x, "labels": split.labels})


def measure_speed(experiment: Experiment, examples_per_second: float) -> dict[str, float]:
    """How fast training was, beside what its matrix products alone would allow on this machine.

    Takes some seconds: it compiles the products of one step and times them.

    Args:
      experiment: what was trained.
      examples_per_second: that it was trained at, over all devices.

    Returns:
      `examples_per_second`; `gflops` of its products, 10⁹ operations a second; and
      `share_of_limit`, the part of the step's time that its products would take alone.
    """
    products = step_products(experiment)
    operations = limit.num_operations(products) * experiment.mesh.size
    steps_per_second = examples_per_second / experiment.config.train.batch_size
    return {
        "examples_per_second": examples_per_second,
        "gflops": operations * steps_per_second / 1e9,
        "share_of_limit": limit.seconds_alone(products) * steps_per_second,
    }


def best_or_newest(workdir: Workdir, like: TrainState) -> TrainState | None:
    """The best checkpoint where one is kept, else the newest that is whole; None without any.

    Args:
      workdir: of a run.
      like: its abstract state.
    """
    for directory in (workdir.best_checkpoint, workdir.checkpoints):
        checkpoints = Checkpoints(directory)
        state = checkpoints.restore(like, say)
        checkpoints.close()
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


def train(
    experiment: Experiment, workdir: Workdir, params: Params | None = None
) -> tuple[TrainState, dict[str, float]]:
    """Train from the newest whole checkpoint, or from the start, to the end.

    The order within a round matters: the next dispatch is started before the previous one's
    metrics are fetched, so the devices never wait for the host; and metrics are checked before
    the state they belong to is saved, so a checkpoint is never one of a run that had diverged.

    Args:
      experiment: what to train.
      workdir: a claimed work directory; rows, events and checkpoints go there.
      params: to start from where there is no checkpoint; random ones by default.

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
    state = initial_state(experiment)
    checkpoints = Checkpoints(workdir.checkpoints)
    restored = checkpoints.restore(abstract(state, state_shardings(experiment)), say)
    if restored is not None:
        state = restored
        say(f"resumed     from the checkpoint of step {int(state.step):,}")
    elif params is not None:
        state = start_from(state, params)
    done = first = int(state.step)
    checkpoints.tidy(first)
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
                signum = heard(asked_to_stop() or 0)
                validating = validate is not None and (done % validate_every == 0 or last)
                saving = done % checkpoint_every == 0 or last or signum
                if validating or saving:
                    log.dispatch(*pending)
                    pending = None
                if validating:
                    found = log.validation(done, validate(state.eval_params, config.seed))
                    best.save_if_better(state, done, found)
                if saving:
                    _refuse_non_finite_parameters(done, state)
                    best.wait()  # who goes on from here takes it that the best so far is there
                    checkpoints.save(state)
                if signum:
                    break
        except NonFiniteError as error:
            write_json(workdir.replay, {"step": error.step, "what": error.what})
            raise
        finally:
            # Also after an error or an interrupt: a save under way is finished, rows are kept.
            checkpoints.close()
            best.close()
            log.close()
        if signum := heard(asked_to_stop() or 0):
            raise Interrupted(signum, done)
    if config.train.keep_best:
        state = best_or_newest(workdir, abstract(state, state_shardings(experiment)))
    return state, log.seconds


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

    def save_if_better(self, state: TrainState, step: int, found: Mapping[str, Metric]) -> None:
        if not self._name:
            return
        if self._name not in found:
            raise UserError(
                f"train.keep_best={self._name!r}: the validation split has {', '.join(found)}"
            )
        value = self._sign * found[self._name].value
        if value > self._value:
            self._value = value
            _refuse_non_finite_parameters(step, state)
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
        earlier = [row for row in writers.read(workdir.metrics) if "seconds" in row]
        last = earlier[-1] if earlier else {"seconds": 0.0, "cpu_seconds": 0.0}
        self.seconds = {"training": last["seconds"], "training_cpu": last["cpu_seconds"]}
        self._mark = self._now()
        self._progress = Progress("training", experiment.num_steps, start=step)

    def dispatch(self, step: int, measured: Metrics) -> None:
        """One row for the K updates that ended with number `step`; metrics are `[K]`."""
        measured = jax.device_get(measured)
        steps = self._experiment.steps_per_dispatch
        refuse_non_finite(step, steps, measured)
        now = self._now()
        spent, self._mark = {name: now[name] - self._mark[name] for name in now}, now
        self.seconds = {name: self.seconds[name] + spent[name] for name in now}
        elapsed = spent["training"]
        row = means(measured)
        examples_per_second = steps * self._experiment.config.train.batch_size / elapsed
        times = {"seconds": self.seconds["training"], "cpu_seconds": self.seconds["training_cpu"]}
        self._writer.write(step, {**row, "examples_per_second": examples_per_second, **times})
        shown = "  ".join(
            f"{name if self._several else name.partition('/')[2]} {value:.2f}"
            for name, value in row.items()
            if not name.endswith("grad_norm")
        )
        self._progress.advance(
            steps, f"{steps / elapsed:,.0f} steps/s  {examples_per_second:,.0f} examples/s  {shown}"
        )

    @staticmethod
    def _now() -> dict[str, float]:
        return {"training": time.monotonic(), "training_cpu": time.process_time()}

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
        self._progress.__exit__(None, None, None)
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
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        if not np.isfinite(processes.on_host(leaf)).all():
            raise NonFiniteError(f"parameters {jax.tree_util.keystr(path)} are", step)
