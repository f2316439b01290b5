"""Classifiers on features: separable ones are told apart, noise is not, and the rows are fair."""

import jax
import numpy as np
import pytest

from dgm_jax import models, sharding
from dgm_jax.core import UserError
from dgm_jax.data import dataset as data
from dgm_jax.evaluators import features
from dgm_jax.models import hvae

CLASSES, PER_CLASS = 10, 120


@pytest.fixture(scope="module")
def found():
    """Three representations of the same labels: clear, useless, and clear again."""
    rng = np.random.default_rng(0)
    labels = {split: np.repeat(np.arange(CLASSES), PER_CLASS) for split in ("train", "test")}
    clear = {
        s: np.eye(CLASSES)[y] + 0.05 * rng.normal(size=(len(y), 10)) for s, y in labels.items()
    }
    noise = {s: rng.normal(size=(len(y), 10)) for s, y in labels.items()}
    return features.evaluate({"clear": clear, "noise": noise, "again": clear}, labels, seed=0)


def test_separable_classes_are_told_apart_with_a_hundredth_of_the_labels(found):
    for metric in found["clear"].values():
        assert metric.value == 1.0


def test_noise_is_at_chance(found):
    """Within five standard errors of 1/10, over 1,200 test examples."""
    error = np.sqrt(0.1 * 0.9 / (CLASSES * PER_CLASS))
    for name, metric in found["noise"].items():
        assert abs(metric.value - 0.1) < 5 * error, name


def test_every_representation_gets_the_same_examples(found):
    assert found["clear"] == found["again"]
    assert set(found["clear"]) == {
        "linear_probe",
        "nearest_neighbours",
        *(f"linear_probe_{n}_labels" for n in features.LABELS_PER_CLASS),
    }


def test_labels_need_not_begin_at_0_nor_leave_no_number_out(found):
    labels = {split: np.repeat([1, 4], 20) for split in ("train", "test")}
    codes = {split: np.eye(5)[of] for split, of in labels.items()}
    few = features.evaluate({"clear": codes}, labels, seed=0)["clear"]
    assert {name: metric.value for name, metric in few.items()} == {
        "linear_probe": 1.0,
        "nearest_neighbours": 1.0,
        **{f"linear_probe_{n}_labels": 1.0 for n in features.LABELS_PER_CLASS if n <= 20},
    }


def test_few_labels_are_drawn_per_class_without_repeats():
    labels = np.repeat(np.arange(4), 7)
    rows = features._per_class(labels, 5, np.random.default_rng(0))
    assert len(set(rows)) == 20
    np.testing.assert_array_equal(np.bincount(labels[rows]), [5, 5, 5, 5])


def test_principal_components_keep_the_directions_of_variance():
    """Uncorrelated columns of falling scale are their own components, up to sign."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(500, 5))
    q, _ = np.linalg.qr(q - q.mean(axis=0))
    x = q * np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    found = features.principal_components({"train": x, "test": x[:10]}, 2)
    np.testing.assert_allclose(np.abs(found["train"]), np.abs(x[:, :2]), atol=1e-10)
    np.testing.assert_allclose(found["test"], found["train"][:10], atol=1e-10)


def test_codes_are_the_models_features_in_order(tiny_dataset):
    fields = {"name": "vae", "latents": 3, "encoder": (8,), "decoder": (8,)}
    model = models.build(fields, tiny_dataset.spec)
    mesh = sharding.make_mesh()
    first = features.random_features(model, tiny_dataset, 8, mesh, 0, 16)
    other = features.random_features(model, tiny_dataset, 64, mesh, 0, 16)
    assert first["train"].shape == (128, 3) and first["test"].shape == (24, 3)
    for split in first:
        np.testing.assert_allclose(first[split], other[split], atol=1e-6)


def test_layers_are_the_consecutive_parts():
    codes = {"train": np.arange(24).reshape(4, 6), "test": np.arange(12).reshape(2, 6)}
    found = features.layers(codes, (3, 1, 2))
    assert list(found) == ["layer_1", "layer_2", "layer_3"]
    for split, whole in codes.items():
        parts = [layer[split] for layer in found.values()]
        assert [part.shape[1] for part in parts] == [3, 1, 2]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    assert features.layers(codes, ()) == features.layers(codes, (6,)) == {}


def test_a_hierarchys_layers_are_its_posterior_means_from_the_data_up(tiny_dataset):
    """The upper layer's means follow from the lower layer's by the network between them."""
    fields = {"latents": (3, 2), "width": (5, 4)}
    model = models.build({"name": "hvae", **fields}, tiny_dataset.spec)
    params = model.init(jax.random.key(0), data.some(tiny_dataset, "train", 8))
    mesh = sharding.make_mesh()
    codes = features.encode(model, params, tiny_dataset, 8, mesh, seed=0)
    lower, upper = features.layers(codes, model.layer_sizes).values()
    assert lower["test"].shape == (24, 3) and upper["test"].shape == (24, 2)
    net = hvae.Net(hvae.Config(**fields), tiny_dataset.spec).bind({"params": params["hvae"]})
    np.testing.assert_allclose(upper["test"], net.up[1](lower["test"])[0], atol=1e-5)


def test_a_model_without_features_is_refused(tiny_dataset):
    model = models.build(models.defaults("vae"), tiny_dataset.spec)._replace(encode=None)
    with pytest.raises(UserError, match="no encode"):
        features.encode(model, {}, tiny_dataset, 8, sharding.make_mesh(), 0)


def test_pixels_are_grey_values(tiny_dataset):
    found = features.pixels(tiny_dataset)
    assert found["test"].shape == (24, 16)
    np.testing.assert_allclose(255 * found["test"][3], tiny_dataset.splits["test"].x[3].ravel())
    assert jax.tree.all(jax.tree.map(lambda a: a.min() >= 0 and a.max() <= 1, found))


def test_what_are_no_grey_values_are_left_as_they_are(tiny_dataset):
    rng = np.random.default_rng(0)
    points = {
        name: data.Split(name, rng.normal(size=(len(split), 2)), split.labels, split.factors)
        for name, split in tiny_dataset.splits.items()
    }
    for name, x in features.pixels(tiny_dataset._replace(splits=points)).items():
        np.testing.assert_array_equal(x, points[name].x)
