"""A trained model: brought back from its work directory, and asked for all that it can do."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgm_jax import config as configs
from dgm_jax import files, models, optim, sharding
from dgm_jax.core import Batch, DataSpec, Model, Params, UserError
from dgm_jax.data import dataset as data
from dgm_jax.evaluators import likelihood
from dgm_jax.experiment import abstract_state
from dgm_jax.progress import Progress, say
from dgm_jax.rng import stream
from dgm_jax.train import best_or_newest
from dgm_jax.train_state import TrainState
from dgm_jax.workdir import Workdir, check_writable

_AT_ONCE = 100  # samples


class Trained(NamedTuple):
    """A trained model, of this process or brought back: ready to evaluate or sample.

    Attributes:
      config: of the run.
      model: as pure functions.
      params: the averaged ones where the run keeps an average.
      spec: of its data.
      step: updates made.
    """

    config: ConfigDict
    model: Model
    params: Params
    spec: DataSpec
    step: int


def restore(path: str | Path, given: ConfigDict | Mapping[str, Any] | None = None) -> Trained:
    """The model of a work directory with its best or newest whole checkpoint's parameters.

    Needs no data: what the model knows of it is in the work directory.

    Args:
      path: of the work directory.
      given: what takes the place of the run's values where training does not depend on it, such as
        `{"eval.num_samples": 500}`; or a whole config.

    Raises:
      UserError: no work directory, one that is damaged or of another config, or nothing trained.
    """
    if given is not None and not isinstance(given, ConfigDict):
        given = configs.override(Workdir(Path(path)).load_config(), given)
    return _restore(path, given)[0]


def _restore(path: str | Path, given: ConfigDict | None = None) -> tuple[Trained, TrainState]:
    """As `restore`, and the state that it is from."""
    workdir = Workdir(Path(path))
    config, card = workdir.load_config(given), workdir.load_card()
    spec = data.spec_of_card(card, workdir.load_mean())
    own = workdir.load_config()
    with files.reading(workdir.config, "train again"):
        models.check(own.model, spec)
        optim.check(configs.section(own, "optimizer"))
    models.check(config.model, spec)  # what was given is not damaged but wrong
    model = models.build(config.model, spec)
    optimizer = optim.build(configs.section(config, "optimizer"), num_steps=1)
    like = abstract_state(config, model, optimizer, spec, sharding.make_mesh())
    state = best_or_newest(workdir, like)
    if state is None:
        raise UserError(f"{path} has no checkpoint yet: train first (--mode=train)")
    return Trained(config, model, state.eval_params, spec, int(state.step)), state


def start_of(config: ConfigDict) -> Callable[[], Params] | None:
    """What gives the parameters of `train.init_from`; None where training starts from random ones.

    They are the averaged ones, but for what no player trains: the mean of a Markov chain's states
    is none of its states.

    Raises:
      UserError: when it is asked, as `restore`.
    """
    origin = config.train.init_from

    def params() -> Params:
        try:
            trained, state = _restore(origin)
            kept = {"state": state.params["state"]} if "state" in state.params else {}
            return {**trained.params, **kept}
        except UserError as error:
            raise UserError(f"train.init_from: {error}") from error

    return params if origin else None


def reopen(workdir: Workdir, given: ConfigDict | None = None) -> Trained:
    """`restore`, for something to be written beside it: refuses now what would fail at the end.

    Raises:
      UserError: as `restore`, or the work directory is not writable, or `eval` makes no sense.
    """
    restored = restore(workdir.path, given)
    likelihood.check(configs.section(restored.config, "eval"))
    check_writable(workdir.path)
    return restored


def draw(
    trained: Trained, num: int, seed: int, classes: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """`num` samples in compiled batches; the first m are the same however many are drawn.

    Args:
      trained: the model.
      num: how many.
      seed: of the draws.
      classes: labels that the samples have in turn, of a model that is told one; all by default.

    Returns:
      What `model.sample` returns, as arrays `[num, *event]`.

    Raises:
      UserError: the model cannot sample, is told no label, or there is no such class.
    """
    sample, told = trained.model.require("sample"), []
    if trained.model.samples_have_label:
        told = list(classes) or list(range(trained.spec.num_classes))
        if wrong := [label for label in told if not 0 <= label < trained.spec.num_classes]:
            raise UserError(
                f"there is no class {wrong[0]}: choose from 0 to {trained.spec.num_classes - 1}"
            )
    elif classes:
        raise UserError(
            f"{trained.config.model.name} was trained without labels, so its samples have no class "
            "to choose: train with model.conditional=True, or a model that has this"
        )
    one_batch = jax.jit(
        lambda params, seed, i, *label: sample(params, stream(seed, "sample", i), _AT_ONCE, *label)
    )
    params, num_parts, parts = jax.device_put(trained.params), -(-num // _AT_ONCE), []
    labels = np.resize(np.int32(told), (num_parts, _AT_ONCE)) if told else None
    with Progress("sampling" if num_parts > 10 else None, num) as progress:
        for i in range(num_parts):
            label = () if labels is None else (labels[i],)
            parts.append(jax.device_get(one_batch(params, seed, i, *label)))
            progress.advance(min(_AT_ONCE, num - i * _AT_ONCE))
    return {name: np.concatenate([part[name] for part in parts])[:num] for name in parts[0]}


def evaluate(
    trained: Trained, dataset: data.Dataset, mesh: Mesh | None = None
) -> likelihood.Measured:
    """How likely the model finds the split `eval.split`, and each example; its other numbers.

    Args:
      trained: the model.
      dataset: where the split is.
      mesh: of the devices; all that there are by default.

    Raises:
      UserError: as `check_data`; or a number is not finite.
    """
    check_data(trained, dataset)
    config, mesh = trained.config, mesh or sharding.make_mesh()
    if not trained.model.log_likelihood_fns:
        has = ", ".join(trained.model.abilities)
        say(f"{config.model.name} has no likelihood: its costs are measured. It has: {has}")
    section = configs.section(config, "eval")
    measure = likelihood.compile_evaluation(trained.model, dataset, section, mesh)
    return measure(trained.params, config.seed)


def check_data(trained: Trained, dataset: data.Dataset, who: str = "the model") -> None:
    """Refuse data that are of another kind than those that a model was trained on.

    Raises:
      UserError: says what they are, and what `who` was trained on.
    """
    kinds = [f"{of.support} data of shape {of.event_shape}" for of in (trained.spec, dataset.spec)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{who} was trained on {kinds[0]}, and these are {kinds[1]}")


def encode(trained: Trained, dataset: data.Dataset) -> dict[str, np.ndarray]:
    """The features of the splits `train` and `test`, each float32 `[N, F]` in the split's order.

    Raises:
      UserError: as `encoder` and `check_data`.
    """
    from dgm_jax.evaluators import features  # scikit-learn

    check_data(trained, dataset)
    encoder(trained)
    where = (dataset, trained.config.eval.batch_size, sharding.make_mesh(), trained.config.seed)
    return features.encode(trained.model, trained.params, *where)


def encoder(trained: Trained) -> Callable[[Params, Batch, jax.Array], jax.Array]:
    """`Model.encode`, of one whose features say of the label no more than x does.

    Raises:
      UserError: the model has no features, or its encoder is told the label.
    """
    found = trained.model.require("encode")
    if trained.model.encoder_is_told:
        raise UserError(
            "model.conditional=True: the encoder is told the label, so its features would tell "
            "it; train without"
        )
    return found


def density(trained: Trained) -> Callable[[np.ndarray], np.ndarray] | None:
    """log p(x) of x as the data hold it, `[N, *event] -> float64 [N]`, nats; None if not known.

    A model that is told the label knows log p(x | label) instead.
    """
    exact = trained.model.log_likelihood_fns.get("log_prob")
    if exact is None or trained.model.samples_have_label:
        return None
    log_prob, rng = jax.jit(exact), stream(trained.config.seed, "pictures")
    at_once, params = trained.config.eval.batch_size, jax.device_put(trained.params)

    def log_p(x: np.ndarray) -> np.ndarray:
        parts = []
        with Progress("density", len(x)) as progress:
            for start in range(0, len(x), at_once):
                part = x[start : start + at_once]
                padding = [(0, at_once - len(part)), *[(0, 0)] * (x.ndim - 1)]
                full = np.pad(part, padding, mode="edge")
                parts.append(np.asarray(log_prob(params, {"x": full}, rng), np.float64))
                progress.advance(len(part))
        return np.concatenate(parts)[: len(x)]

    return log_p
