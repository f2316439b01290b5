"""What the command line can do with a work directory: train, evaluate, sample, and more."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgm_jax import config as configs
from dgm_jax import metrics, models, processes, results, sharding, writers
from dgm_jax.core import UserError
from dgm_jax.data import dataset as data
from dgm_jax.data import text
from dgm_jax.evaluators import ais
from dgm_jax.experiment import Experiment, measure_speed, prepare
from dgm_jax.progress import Progress, say
from dgm_jax.rng import stream
from dgm_jax.train import train
from dgm_jax.train_state import num_parameters
from dgm_jax.trained_model import (
    Trained,
    density,
    draw,
    encode,
    encoder,
    evaluate,
    reopen,
    start_of,
)
from dgm_jax.workdir import Workdir, write, write_text

# Seconds of training beside which those that `measure_speed` takes are little.
_LONG_ENOUGH = 60
_RULE = "-" * 40  # between texts


def train_mode(config: ConfigDict, workdir: Workdir, mesh: Mesh | None = None) -> None:
    """Train to the end, evaluate, draw pictures, write `results.json`.

    Goes on from the last checkpoint of an unfinished work directory; says so and does nothing
    where the run is finished.

    Args:
      config: the config.
      workdir: everything goes there.
      mesh: of the devices; all that there are by default.
    """
    if processes.is_first():  # the others would see it being filled
        workdir.check_config(config)
    if processes.any_of(workdir.results.exists()):
        say(f"{workdir.path} is finished: its numbers are in {workdir.results}")
        return
    started = time.monotonic()
    results.git_revision()  # of the code that runs, not of what is there hours later
    experiment = prepare(config, load_data(config), mesh)
    dataset = experiment.dataset
    with workdir.claimed(config, dataset.card, dataset.spec.mean):
        _train(experiment, workdir, started)


def _train(experiment: Experiment, workdir: Workdir, started: float) -> None:
    """As `train_mode`, in a work directory that is this process's own."""
    config, dataset = experiment.config, experiment.dataset
    _say_header(experiment, workdir)
    state, seconds = train(experiment, workdir, start_of(config))
    began = time.monotonic()
    trained = Trained(config, experiment.model, state.eval_params, dataset.spec, int(state.step))
    found = evaluate(trained, dataset, experiment.mesh)
    seconds["evaluation"] = time.monotonic() - began
    trained = trained._replace(params=jax.tree.map(processes.on_host, trained.params))
    if not processes.is_first():
        return
    speed = _speed(experiment, workdir) if seconds["training"] > _LONG_ENOUGH else None
    began = time.monotonic()
    texts = _draw_pictures(trained, dataset, workdir)
    seconds["pictures"] = time.monotonic() - began
    seconds["this process"] = time.monotonic() - started
    about = {"seconds": seconds, "written": workdir.files(), "speed": speed, "texts": texts}
    result = results.write_measured(workdir.results, trained, dataset, found, **about)
    _say_table(found.metrics, result, workdir)


def evaluate_mode(workdir: Workdir, given: ConfigDict | None = None) -> None:
    """Measure the best or newest checkpoint on `eval.split`; write `evaluation.json`.

    Args:
      workdir: of the trained model.
      given: as in `trained_model.restore`.
    """
    restored = reopen(workdir, given)
    dataset = data_of(workdir, restored.config)
    began = time.monotonic()
    found = evaluate(restored, dataset)
    path, seconds = workdir.path / "evaluation.json", {"evaluation": time.monotonic() - began}
    result = results.write_measured(path, restored, dataset, found, seconds=seconds, written=[])
    _say_table(found.metrics, result, workdir)


def sample_mode(
    workdir: Workdir,
    num: int,
    seed: int,
    classes: Sequence[str] = (),
    given: ConfigDict | None = None,
) -> None:
    """Draw `num` samples; write `samples.npz`, and to look at `samples.png` or `samples.txt`.

    `classes` as in `trained_model.draw`, as the command line has them; `given` as in
    `trained_model.restore`, here and below.
    """
    if num < 1:
        raise UserError(f"--num={num}: draw at least one sample")
    if not all(text.isdecimal() for text in classes):
        raise UserError(f"--classes={','.join(classes)}: give whole numbers, as in --classes=3,7")
    restored = reopen(workdir, given)
    samples = draw(restored, num, seed, [int(text) for text in classes])
    write(workdir.path / "samples.npz", lambda file: np.savez_compressed(file, **samples))
    _show_samples(workdir, "samples", samples, f"step {restored.step:,}")
    say(f"{num:,} samples in {workdir.path}: samples.npz, and to look at, samples.*")


def ais_mode(workdir: Workdir, num: int, given: ConfigDict | None = None) -> None:
    """Annealed importance sampling of `num` test images, with a bracket; write `ais.json`."""
    if num < 1:
        raise UserError(f"--num={num}: measure at least one image")
    restored = reopen(workdir, given)
    config = restored.config
    dataset = data_of(workdir, config)
    if num > (most := len(dataset.splits["test"])):
        raise UserError(f"--num={num}: there are {most:,} test images")
    began = time.monotonic()
    batch = data.some(dataset, "test", num)
    section = configs.section(config, "eval")
    found = ais.evaluate(
        restored.model,
        restored.params,
        batch,
        section.ais_temperatures,
        section.ais_chains,
        config.seed,
    )
    path, seconds = workdir.path / "ais.json", {"evaluation": time.monotonic() - began}
    result = results.write(path, restored, dataset, found, seconds=seconds, written=[])
    _say_table(found, result, workdir)


def features_mode(workdir: Workdir, given: ConfigDict | None = None) -> None:
    """Encode the data; write `features.npz`, and what it is worth to `features.json`.

    Beside the features, and those of each layer of a hierarchy, stand raw pixels, as many
    principal components, and the features of the untrained model. Where the factors that made the
    images are known, all but pixels are scored for disentanglement. Without labels features are
    kept, and nothing is judged.
    """
    # scikit-learn: only where features are judged
    from dgm_jax.evaluators import disentanglement, features

    restored = reopen(workdir, given)
    config, model = restored.config, restored.model
    encoder(restored)  # raises where there is none
    dataset = data_of(workdir, config)
    began = time.monotonic()
    codes = encode(restored, dataset)
    layers = features.layers(codes, model.layer_sizes)
    labels = {split: dataset.splits[split].labels for split in codes}
    factors = {split: dataset.splits[split].factors for split in codes}
    arrays = {"features": codes, **layers, "labels": labels}
    if dataset.factor_names:
        arrays["factors"] = factors
    kept = {f"{split}_{name}": of[split] for name, of in arrays.items() for split in of}
    write(workdir.path / "features.npz", lambda file: np.savez_compressed(file, **kept))
    if dataset.spec.num_classes < 2:
        say(f"{workdir.path / 'features.npz'} is written; without labels there is nothing to judge")
        return
    raw = features.pixels(dataset)
    where = (dataset, config.eval.batch_size, sharding.make_mesh(), config.seed)
    judged = {
        config.model.name: codes,
        **layers,
        "untrained": features.random_features(model, *where, config.train.batch_size),
        "principal_components": features.principal_components(raw, codes["train"].shape[1]),
    }
    found = features.evaluate({**judged, "pixels": raw}, labels, config.seed)
    if dataset.factor_names:
        with Progress("disentanglement", len(judged)) as progress:
            for name, of in judged.items():  # forests on hundreds of pixels would take minutes
                found[name] |= disentanglement.evaluate(of, factors, config.seed)
                progress.advance(1, name)
    result = results.write(
        workdir.path / "features.json",
        restored,
        dataset,
        {f"{name}/{title}": m for name, of in found.items() for title, m in of.items()},
        seconds={"features": time.monotonic() - began},
        written=["features.npz"],
    )
    for name, metrics_of in found.items():
        say(f"\n{name}, test split")
        say(metrics.table(metrics_of))
    say(f"\nin {workdir.path}: {', '.join(result['files'])}")


def load_data(config: ConfigDict) -> data.Dataset:
    """The data that the config names; says that it may take a moment.

    Raises:
      UserError: also where the processes of one run have other data, or another config.
    """
    say("reading the data (some seconds the first time)")
    dataset = data.load(configs.section(config, "data"), announce=say)
    card = {name: value for name, value in dataset.card.items() if name != "source"}
    processes.refuse_unlike(f"{configs.to_json(config)} {card}")
    return dataset


def data_of(workdir: Workdir, config: ConfigDict) -> data.Dataset:
    """The data that the run in a work directory was trained on, as its config names them.

    Raises:
      UserError: also where what there is by that name is other data.
    """
    dataset = load_data(config)
    workdir.check_card(dataset.card)
    return dataset


def _speed(experiment: Experiment, workdir: Workdir) -> dict[str, float]:
    """Of the median dispatch; says it."""
    rows = [row["examples_per_second"] for row in writers.read(workdir.metrics) if "seconds" in row]
    found = measure_speed(experiment, float(np.median(rows)))
    fast, share = found["gflops"], found["share_of_limit"]
    say(
        f"speed       {found['examples_per_second']:,.0f} examples/s, {fast:,.1f} GFLOP/s of "
        f"matrix products, {share:.0%} of what these reach here alone"
    )
    return found


def _draw_pictures(trained: Trained, dataset: data.Dataset, workdir: Workdir) -> list[str]:
    """Whatever the model can show: samples, reconstructions, latents at work, the curve.

    Returns:
      A few samples, where they are texts.
    """
    from dgm_jax import pictures  # matplotlib: only where a picture is drawn

    say("drawing pictures")
    model, params, seed = trained.model, trained.params, trained.config.seed
    batch, rng = data.some(dataset, "test", 20), stream(seed, "pictures")
    texts = []
    if model.sample is not None:
        num = 2000 if dataset.spec.support == "real" else 100
        samples = draw(trained, num, seed)
        texts = _show_samples(workdir, "prior_samples", samples, "prior samples")
    plane = dataset.spec.support == "real" and dataset.spec.event_shape == (2,)
    if plane and model.sample is not None:
        points = dataset.splits["test"].x[:num]
        target = workdir.path / "plane.png"
        pictures.save_plane(target, points, samples["x"][: len(points)], density(trained))
    images = batch["x"].ndim == 4
    if model.reconstruct is not None and images:
        target = workdir.path / "reconstructions.png"
        pictures.save_reconstructions(target, model, params, batch, rng, dataset.spec.scale)
    if model.encode is not None and model.decode is not None and images:
        if len(batch["x"]) > 1:
            target = workdir.path / "interpolation.png"
            pictures.save_interpolation(target, model, params, batch, rng)
        many = data.some(dataset, "test", 500)
        pictures.save_traversals(workdir.path / "traversals.png", model, params, many, rng)
    pictures.save_learning_curve(workdir.path / "learning_curve.png", writers.read(workdir.metrics))
    return texts


def _show_samples(
    workdir: Workdir, stem: str, samples: dict[str, np.ndarray], title: str
) -> list[str]:
    """Draw samples, or where they are texts write them, say the first, and return a few."""
    from dgm_jax import pictures

    card = workdir.load_card()
    if card["support"] != "tokens":
        scale = data.spec_of_card(card, workdir.load_mean()).scale
        pictures.save_samples(workdir.path / f"{stem}.png", samples, title, scale)
        return []
    texts = text.decode(card.get("alphabet"), samples["x"])
    write_text(workdir.path / f"{stem}.txt", f"\n{_RULE}\n".join(texts) + "\n")
    say(f"{title}, the first of {len(texts):,}:\n{_RULE}\n{texts[0]}\n{_RULE}")
    return texts[:3]


def _say_header(experiment: Experiment, workdir: Workdir) -> None:
    config, num_steps = experiment.config, experiment.num_steps
    usual = models.defaults(config.model.name)
    chosen = [f"{k}={v}" for k, v in config.model.items() if v != usual[k]]
    count = num_parameters(experiment.abstract_state.params)
    epochs = num_steps / experiment.steps_per_epoch
    say(f"model       {', '.join([config.model.name, *chosen])} (the rest as the model's defaults)")
    say(f"parameters  {count:,}")
    say(f"data        {data.describe(experiment.dataset.card)}")
    say(f"devices     {jax.device_count()} x {jax.devices()[0].device_kind}")
    say(
        f"training    {num_steps:,} steps of {config.train.batch_size} examples "
        f"({epochs:.1f} epochs), {experiment.steps_per_dispatch} a dispatch"
    )
    say(f"output      {workdir.path}")


def _say_table(found: dict[str, metrics.Metric], result: dict[str, Any], workdir: Workdir) -> None:
    say(f"\n{result['split']} split after {result['step']:,} steps")
    say(metrics.table(found))
    say("  " + ", ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items()))
    say(f"  in {workdir.path}: {', '.join(result['files'])}")
