"""A config made concrete: checked, with its state, its compiled steps and their speed."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgm_jax import config as configs
from dgm_jax import likelihoods, limit, models, optim, processes, sharding
from dgm_jax.checkpoint import abstract
from dgm_jax.core import DataSpec, Model, UserError
from dgm_jax.data import dataset as data
from dgm_jax.data import labelled
from dgm_jax.evaluators import likelihood
from dgm_jax.nn import precision
from dgm_jax.train_state import TrainState
from dgm_jax.train_step import Metrics, compile_train_steps, init_state, train_steps

_MOST_DISPATCHES = 100_000  # of a run: the file of its metrics is read whole


class Experiment(NamedTuple):
    """A config made concrete: checked, with its data and devices.

    Attributes:
      config: the config.
      dataset: what it is trained and measured on.
      mesh: the devices.
      num_steps: updates until the end.
      numbers: fields of the model and the optimizer, by dotted path, and `ramp_lengths`, that
        replace the config's; may be traced.
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
    def abstract_state(self) -> TrainState:
        """Shapes of the state, and on which devices it is."""
        return abstract_state(self.config, self.model, self.optimizer, self.dataset.spec, self.mesh)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the training split."""
        return len(self.dataset.splits["train"]) // self.config.train.batch_size

    @property
    def steps_per_dispatch(self) -> int:
        """K, no more than the whole run has."""
        return min(self.config.train.steps_per_dispatch, self.num_steps)

    def model_at(self, step: jax.Array) -> Model:
        """The model of one step: each field that `train.ramp` names still on its way.

        Args:
          step: int32 `[]`, from 0; may be traced.
        """
        fields = self._model_fields
        for field, (start, length) in self.ramps.items():
            length = self.numbers.get(f"train.ramp.{field}", length)
            fields[field] = start + (fields[field] - start) * jnp.minimum(1.0, step / length)
        model = models.build(fields, self.dataset.spec)
        return precision.training_in(model, self.config.train.compute_dtype)

    @property
    def ramps(self) -> dict[str, tuple[float, int]]:
        """Fields of the model that go linearly to their value, from where and in how many steps."""
        found = {}
        for ramp in (text.strip() for text in self.config.train.ramp.split(",") if text):
            way, _, length = ramp.partition(" over ")
            path, _, start = way.partition(" from ")
            field = path.removeprefix("model.")
            is_real = isinstance(self.config.model.get(field), float)
            if not path.startswith("model.") or not is_real or not _is_number(start or "0"):
                raise UserError(
                    f"train.ramp={ramp!r}: name a field of the model that is a real number, from "
                    "where it goes to its value if not from 0, and how long, such as "
                    "'model.beta over 20 epochs' or 'model.beta from 5 over 20 epochs'"
                )
            if field in found:
                raise UserError(f"train.ramp={self.config.train.ramp!r}: {path} is there twice")
            found[field] = (
                float(start or 0),
                configs.num_steps(
                    length, f"train.ramp={ramp!r}: length", self.steps_per_epoch, multiple=1
                ),
            )
        return found

    @property
    def ramp_lengths(self) -> dict[str, int]:
        """Steps of each ramp, named as `numbers` may replace them: `train.ramp.<field>`."""
        return {f"train.ramp.{field}": length for field, (_, length) in self.ramps.items()}

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
    evaluation = configs.section(config, "eval")
    likelihood.check(evaluation)
    likelihood.check_split(evaluation, dataset)
    train, num_train = config.train, len(dataset.splits["train"])
    if train.batch_size > num_train:
        raise UserError(
            f"train.batch_size={train.batch_size} is larger than the training split "
            f"({num_train:,} examples)"
        )
    sharding.check_batch(train.batch_size, mesh.size)
    labelled.num_rows(dataset.config.labelled, dataset.config.labelled_share, train.batch_size)
    sharding.check_parts(train.num_parts, train.batch_size, mesh.size)
    precision.check("train.compute_dtype", train.compute_dtype)
    if train.steps_per_dispatch < 1:
        raise UserError(f"train.steps_per_dispatch={train.steps_per_dispatch}: at least 1")
    exact = configs.num_steps(
        train.duration, "train.duration", num_train // train.batch_size, multiple=1
    )
    per_dispatch = min(exact, train.steps_per_dispatch)
    # Whole dispatches only: a shorter last one would be a second program to compile.
    num_steps = -(-exact // per_dispatch) * per_dispatch
    if num_steps // per_dispatch > _MOST_DISPATCHES:
        raise UserError(
            f"train.duration={train.duration!r} makes {num_steps // per_dispatch:,} dispatches, "
            "each a row of metrics, which are too many: set train.steps_per_dispatch to at least "
            f"{-(-exact // _MOST_DISPATCHES)}"
        )
    experiment = Experiment(
        config=config,
        dataset=dataset,
        mesh=mesh,
        num_steps=num_steps,
    )
    for field in ("validate_every", "checkpoint_every"):
        experiment.steps(field)  # raises where the text makes no sense
    for field, (start, _) in experiment.ramps.items():  # raises where a text makes no sense
        try:
            models.check({**config.model, field: start}, dataset.spec)
        except UserError as error:
            text = f"train.ramp: model.{field} would go from {start:g}, but {error}"
            raise UserError(text) from None
    if not train.checkpoint_minutes >= 0:
        raise UserError(f"train.checkpoint_minutes={train.checkpoint_minutes}: at least 0")
    if train.keep_best:
        _check_keep_best(experiment)
    return experiment


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _check_keep_best(experiment: Experiment) -> None:
    """Refuse to keep what is best by a number that the validation split will not have."""
    name, dataset = experiment.config.train.keep_best, experiment.dataset
    if not len(dataset.splits["validation"]):
        raise UserError(f"train.keep_best={name!r} needs data.validation above 0")
    terms = likelihood.elbo_terms(experiment.model, num_samples=1)
    batch, keys = data.some(dataset, "validation", 1), jax.random.key(0)[None]
    known = jax.eval_shape(terms, experiment.abstract_state.params, batch, keys)
    if name not in known:
        raise UserError(f"train.keep_best={name!r}: the validation split has {', '.join(known)}")


def initial_state(experiment: Experiment) -> TrainState:
    """The state before the first step, made on the devices it will stay on."""
    config = experiment.config
    batch = jax.device_get(data.some(experiment.dataset, "train", config.train.batch_size))
    likelihoods.refuse_outside_support(batch["x"], experiment.dataset.spec)
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
    return jax.tree.map(lambda leaf: leaf.sharding, experiment.abstract_state)


def training_arrays(experiment: Experiment) -> dict[str, jax.Array]:
    """`x` `[N, *event]` and `labels` int32 `[N]` to train on, whole on every device."""
    dataset = experiment.dataset
    arrays = {"x": dataset.splits["train"].x, "labels": dataset.told_labels}
    return processes.on_every_device(arrays, experiment.mesh)


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
    dataset, split = experiment.dataset, experiment.dataset.splits["train"]
    # Which examples they are changes no product, and a device's share of the labelled need not be
    # a whole number.
    config = dataclasses.replace(dataset.config, labelled_share=0.0)
    step = train_steps(
        experiment.model_at,
        experiment.optimizer,
        experiment.ema_decay,
        dataset._replace(config=config),
        experiment.config.train.batch_size // experiment.mesh.size,
        num_steps=1,
        num_parts=experiment.config.train.num_parts,
    )
    return limit.products_of(
        step, experiment.abstract_state, {"x": split.x, "labels": split.labels}
    )


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
