"""`--mode=quality`: samples of a trained model, judged by the features of another network.

The judge is a classifier that the project trains itself on the same data, once, and keeps in the
cache folder; or a work directory or an ONNX file that the user names. Points are judged as they
are.
"""

import dataclasses
import hashlib
import importlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dgm_jax import cache, pictures, results, run, sharding, trained_model
from dgm_jax import config as configs
from dgm_jax.core import Batch, Params, UserError
from dgm_jax.data import dataset as data
from dgm_jax.evaluators import passes, quality
from dgm_jax.files import check_size
from dgm_jax.metrics import Metric, mean_over_examples, table
from dgm_jax.progress import Progress, say
from dgm_jax.workdir import Workdir

_MOST = 10_000  # samples, where the user names no number
_LEAST = 100
_BATCH = 500
_MOST_ONNX, _MOST_PIXELS = 2**31, 1024  # bytes of a file, and a side of what it takes
# Of the photographs that public networks were trained on; see torchvision's documentation.
_MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 1, 1, 3)
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 1, 1, 3)


class Judge(NamedTuple):
    """Whose features are measured.

    Attributes:
      name: said beside every number.
      features: `(x [N, *event], title) -> {"codes": [N, F]}`, x as the model of the samples has it;
        of a classifier also `label` `[N]`, the most probable class.
    """

    name: str
    features: Callable[[np.ndarray, str], dict[str, np.ndarray]]


def classifier_config() -> ConfigDict:
    """The classifier that judges where nobody names another: of grey values, of MNIST."""
    config = configs.experiment("classifier")
    config.data.binarisation = "none"
    config.train.duration = "3000 steps"
    config.train.batch_size = 100
    config.train.steps_per_dispatch = 100
    config.train.validate_every = "1000 steps"
    config.train.checkpoint_every = "1000 steps"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.05
    config.eval.elbo_samples = 1
    return config


def quality_mode(
    workdir: Workdir,
    num: int | None,
    seed: int,
    chosen: str | None,
    given: ConfigDict | None = None,
) -> None:
    """Hold `num` samples against as many test examples; write `quality.json`.

    Beside them stand as many other test examples, held against the same: no training example
    would do, as the judge has learned those.

    Args:
      workdir: of the trained model.
      num: samples; None for half as many as there are test examples, at most 10,000.
      seed: of the samples, and of which data they are held against.
      chosen: the judge: a work directory or an .onnx file; None for the project's own.
      given: as in `trained_model.restore`.

    Raises:
      UserError: the model cannot sample, or the judge cannot judge.
    """
    restored = trained_model.reopen(workdir, given)
    restored.model.require("sample")
    if restored.spec.support == "tokens":
        raise UserError("--mode=quality judges images and points, and these samples are tokens")
    dataset = run.data_of(workdir, restored.config)
    num = _number(num, dataset)
    began = time.monotonic()
    judge = _judge(dataset, chosen)
    say(f"judged by {judge.name}")

    classes: Sequence[int] = ()
    if restored.model.samples_have_label:  # each as often as in the data
        labels = dataset.splits["train"].labels
        classes = np.random.default_rng((seed, 1)).choice(labels, num).tolist()
    samples = trained_model.draw(restored, num, seed, classes)
    x = {split: _seen(dataset, split) for split in ("train", "test")} | {"samples": samples["x"]}
    judged = {name: judge.features(of, f"features: {name}") for name, of in x.items()}
    near, found = _compare({name: of["codes"] for name, of in judged.items()}, seed)
    if dataset.toy is not None:
        modes = quality.modes(samples["x"], dataset.toy)
        found |= {f"samples/{name}": metric for name, metric in modes.items()}
    if "label" in judged["test"] and dataset.spec.num_classes:
        right = judged["test"]["label"] == dataset.splits["test"].labels
        found["judge/accuracy"] = mean_over_examples(right, "of 1")
        if "label" in samples:
            right = judged["samples"]["label"] == samples["label"]
            found["samples/label_accuracy"] = mean_over_examples(right, "of 1")

    files = []
    if samples["x"].ndim == 4:
        pictures.save_nearest(
            workdir.path / "nearest.png", samples["x"], x["train"], near, dataset.spec.scale
        )
        files.append("nearest.png")
    seconds = {"quality": time.monotonic() - began}
    result = results.write(
        workdir.path / "quality.json",
        restored,
        dataset,
        found,
        seconds=seconds,
        written=files,
        judge=judge.name,
    )
    for name, title in (
        ("samples", f"{num:,} samples against as many test examples"),
        ("test", f"{num:,} other test examples against the same"),
        ("judge", "the judge itself on the test split"),
    ):
        if of := {k.partition("/")[2]: v for k, v in found.items() if k.startswith(f"{name}/")}:
            say(f"\n{title}")
            say(table(of))
    say(f"\nin {workdir.path}: {', '.join(result['files'])}")


def _compare(codes: dict[str, np.ndarray], seed: int) -> tuple[quality.Nearest, dict[str, Metric]]:
    """Features `[N, F]` of samples, and of other test examples, held against test examples.

    Returns:
      The training examples nearest to the samples, and the metrics by name.
    """
    num, found = len(codes["samples"]), {}
    rows = np.random.default_rng(seed).permutation(len(codes["test"]))
    reference, others = codes["test"][rows[:num]], codes["test"][rows[num : 2 * num]]
    with Progress("distances", 3) as progress:
        near = quality.nearest(codes["samples"], codes["train"])
        fresh = quality.nearest(codes["test"], codes["train"])
        progress.advance(1, "to the training data")
        for name, of in (("samples", codes["samples"]), ("test", others)):
            found |= {f"{name}/{k}": v for k, v in quality.evaluate(of, reference).items()}
            progress.advance(1, name)
    copying = quality.copying(near.distance, fresh.distance)
    found["samples/copying"] = Metric(copying, "of 1", num_examples=num)
    return near, found


def _number(num: int | None, dataset: data.Dataset) -> int:
    most = len(dataset.splits["test"]) // 2
    if most < _LEAST:
        raise UserError(
            f"--mode=quality needs at least {2 * _LEAST} test examples, and there are "
            f"{len(dataset.splits['test'])}"
        )
    if num is None:
        return min(_MOST, most)
    if not _LEAST <= num <= most:
        raise UserError(
            f"--num={num}: judge at least {_LEAST} samples, and at most {most:,}, half as many as "
            "there are test examples"
        )
    return num


def _seen(dataset: data.Dataset, split: str) -> np.ndarray:
    """x of a split as a model sees it, held-out draws and all: float32 `[N, *event]`."""

    def same(params: Params, batch: Batch, keys: jax.Array) -> dict[str, jax.Array]:
        del params, keys
        return {"x": batch["x"]}

    return passes.compile_pass(same, dataset, split, _BATCH, sharding.make_mesh())({}, 0)["x"]


def _judge(dataset: data.Dataset, chosen: str | None) -> Judge:
    if chosen is None and len(dataset.spec.event_shape) == 1:
        return Judge("the points themselves", lambda x, title: {"codes": x})
    if chosen is None and dataset.spec.num_classes < 2:
        raise UserError("these data have no labels to train a judge on: name a judge by --judge")
    if chosen is not None and chosen.endswith(".onnx"):
        return _of_onnx(Path(chosen), dataset.spec.scale)
    return _of_workdir(_own(dataset) if chosen is None else Workdir(Path(chosen)), dataset)


def _own(dataset: data.Dataset) -> Workdir:
    """The project's own classifier of these data, trained now if it never was."""
    config = classifier_config()
    config.data.update(dataclasses.asdict(dataset.config))
    config.data.update(labelled=0, labelled_share=0.0)  # it is told all, whatever the model was
    recipe = json.dumps([config.to_dict(), dataset.card["sha256"]], sort_keys=True)
    name = f"{dataset.config.dataset}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    workdir = Workdir(cache.folder() / "judges" / name)
    if workdir.results.exists():
        return workdir
    workdir.path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(workdir.path.with_suffix(".lock"))
    try:
        held = lock.acquire(blocking=False)
    except filelock.Timeout:
        say(f"another process trains the judge, in {workdir.path}: waiting for it")
        held = lock.acquire()
    with held:
        if not workdir.results.exists():
            say(f"training the judge, a classifier of these data, once; it stays in {workdir.path}")
            # On one device: its batch need not divide over those that there are.
            run.train_mode(config, workdir, sharding.make_mesh(1))
    return workdir


def _of_workdir(workdir: Workdir, dataset: data.Dataset) -> Judge:
    """Features of a trained model of such data."""
    restored = trained_model.restore(workdir.path)
    model, params = restored.model, restored.params
    encode = trained_model.encoder(restored)
    trained_model.check_data(restored, dataset, f"--judge={workdir.path}")
    config = dataclasses.replace(dataset.config, binarisation="none")

    def judged(params: Params, batch: Batch, keys: jax.Array) -> dict[str, jax.Array]:
        found = {"codes": encode(params, batch, keys[0])}
        if model.classify is not None:
            found["label"] = jnp.argmax(model.classify(params, batch), axis=1)
        return found

    def features(x: np.ndarray, title: str) -> dict[str, np.ndarray]:
        labels = np.zeros(len(x), np.int32)
        given = data.Split("given", x, labels, labels[:, None])
        as_given = dataset._replace(config=config, splits={"given": given})
        whole = passes.compile_pass(judged, as_given, "given", _BATCH, sharding.make_mesh())
        return whole(params, restored.config.seed, title)

    return Judge(f"{restored.config.model.name} in {workdir.path.name}", features)


def _of_onnx(path: Path, scale: float) -> Judge:
    """Features of a network in a file: its first output, for images as public networks take them.

    Images go in as `[N, 3, H, W]`, of the size that the file says, grey ones in three equal
    channels, standardised by the mean and deviation of ImageNet.
    """
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise UserError("--judge=...onnx needs onnxruntime: pip install onnxruntime") from error
    if not path.exists():
        raise UserError(f"--judge={path}: there is no such file")
    try:
        check_size(path, _MOST_ONNX)
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        given = session.get_inputs()[0]
    except Exception as error:  # onnxruntime's own, which it does not export
        raise UserError(f"--judge={path} is no network in ONNX ({error})") from error
    size = given.shape[2:] if len(given.shape) == 4 else ()
    if len(size) != 2 or given.shape[1] != 3 or not all(isinstance(side, int) for side in size):
        raise UserError(
            f"--judge={path} takes {given.shape}; it must take [N, 3, H, W] with numbers for H, W"
        )
    batch_size = given.shape[0] if isinstance(given.shape[0], int) else 50
    if not (1 <= min(size) <= max(size) <= _MOST_PIXELS and 1 <= batch_size <= _BATCH):
        raise UserError(
            f"--judge={path} takes {given.shape}; it must take at most {_BATCH} images at once, of "
            f"at most {_MOST_PIXELS} pixels a side"
        )

    @jax.jit
    def prepare(x: jax.Array) -> jax.Array:
        x = jnp.broadcast_to(x / scale, (*x.shape[:3], 3))
        x = jax.image.resize(x, (len(x), *size, 3), "cubic")
        return ((x - _MEAN) / _DEVIATION).transpose(0, 3, 1, 2)

    def features(x: np.ndarray, title: str) -> dict[str, np.ndarray]:
        parts: list[Any] = []
        with Progress(title, len(x)) as progress:
            for start in range(0, len(x), batch_size):
                part = x[start : start + batch_size]
                padded = np.concatenate([part, np.repeat(x[:1], batch_size - len(part), axis=0)])
                try:
                    output = session.run(None, {given.name: np.asarray(prepare(padded))})[0]
                    parts.append(output.reshape(batch_size, -1)[: len(part)])
                except Exception as error:  # one of onnxruntime
                    raise UserError(f"--judge={path} cannot be run ({error})") from error
                progress.advance(len(part))
        return {"codes": np.concatenate(parts)}

    return Judge(path.name, features)
