"""Data so small that every model can be tried on them in seconds."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dgm_jax import models
from dgm_jax.core import DataSpec, UserError
from dgm_jax.data import dataset as data


def images() -> data.Dataset:
    """128 + 24 + 24 random grey images of 4x4 pixels, dynamically binarised."""
    rng = np.random.default_rng(0)
    splits = {
        name: data.Split(
            name,
            rng.integers(0, 256, (num, 4, 4, 1), np.uint8),
            rng.integers(0, 10, num).astype(np.int32),
            np.zeros((num, 0), np.int32),
        )
        for name, num in (("train", 128), ("validation", 24), ("test", 24))
    }
    mean = splits["train"].x.mean(axis=0).astype(np.float32) / 255
    return _dataset(data.Config(), splits, DataSpec((4, 4, 1), "binary", mean, 128, 10))


def _dataset(config: data.Config, splits: dict[str, data.Split], spec: DataSpec) -> data.Dataset:
    """With a data card."""
    card = {
        "dataset": f"random {spec.support}",
        "source": "tiny",
        "sha256": "0" * 64,
        "counts": {name: len(split) for name, split in splits.items()},
        "event_shape": list(spec.event_shape),
        "support": spec.support,
        "num_classes": spec.num_classes,
        "binarisation": {"train": config.binarisation, "held_out": "one draw per image"},
        "seed": 0,
    }
    if spec.vocabulary:
        card["alphabet"] = "abcde"[: spec.vocabulary]
    return data.Dataset(config, splits, spec, card)


def accepted_by(fields: Mapping[str, Any]) -> data.Dataset:
    """The first that a model does not refuse: binary images, grey ones, points, or tokens."""
    binary = images()
    for dataset in (binary, *_otherwise(binary)):
        try:
            models.check(fields, dataset.spec)
        except UserError as error:
            refused = error
        else:
            return dataset
    raise refused


def _otherwise(binary: data.Dataset) -> Iterator[data.Dataset]:
    """The grey images that the binary ones are drawn from, and as many points and texts."""
    config, rng = data.Config(binarisation="none"), np.random.default_rng(1)
    grey = binary.spec._replace(support="uint8", mean=255 * binary.spec.mean)
    yield _dataset(config, binary.splits, grey)
    for support, event in (("real", (2,)), ("tokens", (6,))):
        splits = {}
        for name, split in binary.splits.items():
            shape = (len(split), *event)
            x = rng.normal(size=shape).astype(np.float32)
            x = x if support == "real" else rng.integers(0, 5, shape, np.int32)
            splits[name] = data.Split(name, x, split.labels, split.factors)
        vocabulary = 5 if support == "tokens" else 0
        mean = np.zeros(event, np.float32)
        yield _dataset(config, splits, DataSpec(event, support, mean, 128, 10, vocabulary))
