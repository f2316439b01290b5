"""What a model's features are worth: classifiers on them, beside the same on simple baselines.

The features are those of `core.Model.encode`, posterior means for a VAE. scikit-learn does the
classifying; every representation gets the same classifiers, standardised the same way.

`Codes` are one representation of the data: "train" and "test", each float `[N, F]`.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from dgm_jax.core import Model, Params
from dgm_jax.data import dataset as data
from dgm_jax.evaluators import likelihood, passes
from dgm_jax.metrics import Metric
from dgm_jax.progress import Progress
from dgm_jax.rng import stream

LABELS_PER_CLASS = (1, 5, 10, 100)
_DRAWS = 5  # of few-label training sets
_MOST = 10_000  # training examples of the probe and of the neighbours

Codes = dict[str, np.ndarray]


def encode(
    model: Model, params: Params, dataset: data.Dataset, batch_size: int, mesh: Mesh, seed: int
) -> Codes:
    """The features of both splits, float32 `[N, F]`, rows in the order of the split.

    Args:
      model: one that can encode.
      params: its parameters.
      dataset: where the splits are.
      batch_size: examples encoded at once; changes speed and memory, not results.
      mesh: the devices.
      seed: of what `encode` may draw.

    Raises:
      UserError: the model has no features.
    """
    model.require("encode")
    found = {}
    for split in ("train", "test"):
        fn = likelihood.features(model)
        whole = passes.compile_pass(fn, dataset, split, batch_size, mesh)
        found[split] = whole(params, seed, f"{split}: features")["codes"]
    return found


def layers(codes: Codes, sizes: tuple[int, ...]) -> dict[str, Codes]:
    """The parts of a hierarchy's features as `layer_1`, `layer_2`, ..., from the data up.

    Args:
      codes: of the whole, `[N, F]`.
      sizes: of the parts, as in `core.Model.layer_sizes`; they sum to F, or there are none.

    Returns:
      Of each layer `[N, size]`; empty where one layer is the whole.
    """
    if len(sizes) < 2:
        return {}
    ends = np.cumsum(sizes)
    return {
        f"layer_{i + 1}": {split: of[:, end - size : end] for split, of in codes.items()}
        for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
    }


def pixels(dataset: data.Dataset) -> Codes:
    """The data themselves, grey values scaled to [0, 1], `[N, D]`."""
    found = {}
    for split in ("train", "test"):
        x = dataset.splits[split].x.reshape(len(dataset.splits[split]), -1)
        found[split] = x / 255.0 if x.dtype == np.uint8 else x
    return found


def principal_components(codes: Codes, num: int) -> Codes:
    """The first `num` principal components of other features, fitted on the training split.

    `[N, F]` -> `[N, num]`, fewer where there are not so many features or examples.
    """
    pca = PCA(min(num, *codes["train"].shape), random_state=0).fit(codes["train"])
    return {split: pca.transform(values) for split, values in codes.items()}


def evaluate(
    representations: dict[str, Codes], labels: Codes, seed: int
) -> dict[str, dict[str, Metric]]:
    """Accuracies on the test split, by representation and classifier.

    Args:
      representations: name -> features of both splits, each `[N, F]` with an F of its own.
      labels: int `[N]` of both splits.
      seed: which training examples the classifiers see; the same ones for every representation.

    Returns:
      For each representation `linear_probe` and `nearest_neighbours` (5 neighbours), both with
      10,000 training examples at most, and `linear_probe_<n>_labels` with n labels per class, the
      mean over 5 training sets with its standard error.
    """
    rng = np.random.default_rng(seed)
    many = rng.permutation(len(labels["train"]))[:_MOST]
    few = {
        n: [_per_class(labels["train"], n, rng) for _ in range(_DRAWS)]
        for n in LABELS_PER_CLASS
        if n <= np.unique(labels["train"], return_counts=True)[1].min()
    }
    found: dict[str, dict[str, Metric]] = {}
    with Progress("classifiers", len(representations) * (2 + len(few))) as progress:
        for name, codes in representations.items():

            def accuracy(classifier: Pipeline, rows: np.ndarray, codes: Codes = codes) -> float:
                classifier.fit(codes["train"][rows], labels["train"][rows])
                return classifier.score(codes["test"], labels["test"])

            found[name] = {}
            for title, make in (("linear_probe", _probe), ("nearest_neighbours", _neighbours)):
                found[name][title] = _accuracy([accuracy(make(), many)], len(labels["test"]))
                progress.advance(1, name)
            for n, sets in few.items():
                values = [accuracy(_probe(), rows) for rows in sets]
                found[name][f"linear_probe_{n}_labels"] = _accuracy(values, len(labels["test"]))
                progress.advance(1, name)
    return found


def random_features(
    model: Model,
    dataset: data.Dataset,
    batch_size: int,
    mesh: Mesh,
    seed: int,
    train_batch_size: int,
) -> Codes:
    """The features of the model that training started from; see `encode`.

    Of some models the first parameters depend on a batch, which is one of training.
    """
    batch = data.some(dataset, "train", train_batch_size)
    params = jax.jit(model.init)(stream(seed, "init"), batch)
    return encode(model, params, dataset, batch_size, mesh, seed)


def _probe() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def _neighbours() -> Pipeline:
    return make_pipeline(StandardScaler(), KNeighborsClassifier(5))


def _per_class(labels: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """Row numbers of `num` random examples of each class."""
    choose: Callable[[int], np.ndarray] = lambda label: rng.choice(  # noqa: E731
        np.flatnonzero(labels == label), num, replace=False
    )
    return np.concatenate([choose(label) for label in np.unique(labels)])


def _accuracy(values: list[float], num_examples: int) -> Metric:
    error = None
    if len(values) > 1:
        error = float(np.std(values, ddof=1) / np.sqrt(len(values)))
    return Metric(float(np.mean(values)), "accuracy", error, num_examples)
