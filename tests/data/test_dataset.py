"""Splits, binarisation and batches: exact rates, independence, draws that depend on ids only."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax.core import UserError
from dgm_jax.data import dataset as data
from dgm_jax.data import labelled, shapes

GREYS = np.arange(256, dtype=np.uint8)


@pytest.fixture(scope="module")
def embedded():
    return data.load(data.Config(source="embedded", validation=500))


def _hand_made(images, binarisation="dynamic", seed=0):
    """A data set whose every split holds the same images."""
    split = data.Split("any", images, np.arange(len(images), dtype=np.int32), None)
    config = data.Config(binarisation=binarisation, seed=seed)
    return data.Dataset(config, dict.fromkeys(("train", "validation", "test"), split), None, {})


def _held_out(images, ids, split="test", seed=0):
    return _jit_held_out(images, ids, split, seed)


@functools.partial(jax.jit, static_argnums=2)
def _jit_held_out(images, ids, split, seed):
    labels = jnp.arange(len(images))
    return data.held_out_batch(_hand_made(images, seed=seed), split, images, labels, ids)


@functools.partial(jax.jit, static_argnums=3)
def _train(images, ids, rng, binarisation="dynamic"):
    labels = jnp.arange(len(images))
    return data.train_batch(_hand_made(images, binarisation), images, labels, ids, rng)


def test_binarise_has_the_rate_of_every_grey_value():
    """Enumerated over all 2^16 half words, low and high: v / 255 to 2^-17, exact at 0 and 255."""
    half = np.arange(2**16, dtype=np.uint32)
    low_and_high = jax.jit(lambda images, words: jnp.sum(data.binarise(images, words), axis=0))
    for position, words in enumerate((half, half << 16)):
        on = np.zeros(256)
        for greys in GREYS.reshape(8, 32):
            # Two rows of 32 pixels: the first row takes the low halves, the second the high ones.
            images = np.broadcast_to(np.stack([greys, greys]), (2**16, 2, 32))
            tiled = np.broadcast_to(words[:, None], (2**16, 32))
            on[greys] = low_and_high(images, tiled)[position]
        np.testing.assert_allclose(on / 2**16, GREYS / 255, atol=2**-17, rtol=0)
        assert on[0] == 0 and on[255] == 2**16


@pytest.fixture(scope="module")
def many_draws():
    """4,000 draws of an image that has all grey values, through both kinds of batch."""
    images = np.broadcast_to(GREYS.reshape(16, 16, 1), (4000, 16, 16, 1))
    ids = np.arange(4000)
    return _held_out(images, ids)["x"], _train(images, ids, jax.random.key(1))["x"]


def test_the_mean_of_many_draws_is_the_grey_value(many_draws):
    """Within five standard errors for all 256, black and white exactly; only 0 and 1 occur."""
    p = GREYS / 255
    for x in many_draws:
        assert x.dtype == np.float32 and x.shape == (4000, 16, 16, 1)
        assert np.isin(x, (0, 1)).all()
        mean = np.asarray(x, np.float64).reshape(4000, 256).mean(axis=0)
        assert np.all(np.abs(mean - p) <= 5 * np.sqrt(p * (1 - p) / 4000))


def test_pixels_and_examples_are_drawn_independently(many_draws):
    """All correlations of the 192 middle greys, of which some share a word; no draw twice."""
    for x in many_draws:
        pixels = np.asarray(x).reshape(4000, 256)
        correlations = np.corrcoef(pixels[:, 32:224].T) - np.eye(192)
        assert np.max(np.abs(correlations)) < 5.5 / np.sqrt(4000)  # of 18,000; 1 in 1,000
        assert len(np.unique(pixels, axis=0)) == 4000


@pytest.mark.parametrize(("shape", "words"), [((1,), 1), ((2, 1), 1), ((3, 3, 1), 5)])
def test_num_words_covers_even_and_odd_numbers_of_pixels(shape, words):
    assert data.num_words(shape) == words
    images = np.random.default_rng(0).integers(0, 256, (50, *shape), dtype=np.uint8)
    bits = np.random.default_rng(1).integers(0, 2**32, (50, words), dtype=np.uint32)
    x = jax.jit(data.binarise)(images, bits)
    # By hand: pixels 0, 1, ... take the low halves of all words, the rest the high ones.
    halves = np.concatenate([bits & 0xFFFF, bits >> 16], axis=1)
    uniform = halves[:, : np.prod(shape)].reshape(images.shape) / 2**16
    np.testing.assert_array_equal(x, uniform < np.round(images / 255 * 2**16) / 2**16)


IMAGES = np.random.default_rng(0).integers(0, 256, (37, 5, 5, 1), dtype=np.uint8)
ALL = np.arange(37)


def test_a_held_out_draw_depends_on_seed_split_and_id_alone():
    whole = jax.device_get(_held_out(IMAGES, ALL))
    for ids in (ALL[::-1], np.full(37, 17), ALL * 5 % 37):
        batch = _held_out(IMAGES, ids)
        np.testing.assert_array_equal(batch["x"], whole["x"][ids])
        np.testing.assert_array_equal(batch["label"], ids)
        np.testing.assert_array_equal(batch["id"], ids)
    assert whole["mask"].all()
    p = IMAGES / 255
    expected = np.mean(2 * p * (1 - p))  # of the pixels differ between two independent draws
    for other in (_held_out(IMAGES, ALL, "validation"), _held_out(IMAGES, ALL, "test", 1)):
        differ = np.mean(other["x"] != whole["x"])
        assert abs(differ - expected) < 5 * np.sqrt(0.25 / IMAGES.size)


def test_ids_past_the_end_are_padding():
    ids = np.arange(20, 57)
    batch = _held_out(IMAGES, ids)
    np.testing.assert_array_equal(batch["mask"], ids < 37)
    np.testing.assert_array_equal(batch["id"][:17], ids[:17])
    np.testing.assert_array_equal(batch["x"][:17], _held_out(IMAGES, ALL)["x"][20:])


def test_dynamic_training_draws_anew_at_every_visit():
    first, again, second = (_train(IMAGES, ALL, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first["x"], again["x"])
    p = IMAGES / 255
    differ = np.mean(first["x"] != second["x"])
    assert abs(differ - np.mean(2 * p * (1 - p))) < 5 * np.sqrt(0.25 / p.size)
    np.testing.assert_array_equal(first["label"], ALL)


def test_fixed_training_draws_once_for_each_id():
    whole = jax.device_get(_train(IMAGES, ALL, jax.random.key(0), "fixed"))
    again = _train(IMAGES, ALL[::-1], jax.random.key(1), "fixed")
    np.testing.assert_array_equal(again["x"], whole["x"][::-1])
    assert np.any(whole["x"] != _held_out(IMAGES, ALL)["x"])


def test_without_binarisation_batches_are_the_images():
    train = _train(IMAGES, np.array([4, 36, 0]), jax.random.key(0), "none")
    held_out = data.some(_hand_made(IMAGES, "none"), "test", 3)
    for batch, ids in ((train, [4, 36, 0]), (held_out, [0, 18, 36])):
        np.testing.assert_array_equal(batch["x"], IMAGES[ids])
        assert batch["x"].dtype == np.float32


def test_a_part_that_is_spread_over_a_split_has_the_same_bits(tiny_dataset):
    """Also of the examples whose number is another there."""
    part = data.spread(tiny_dataset, "test", 7)
    found, same = data.some(part, "test", 7), data.some(tiny_dataset, "test", 7)
    np.testing.assert_array_equal(found["x"], same["x"])
    np.testing.assert_array_equal(found["label"], same["label"])
    assert set(np.unique(found["x"])) == {0, 1} and list(found["id"]) == list(range(7))


def test_some_spreads_over_the_split():
    dataset = _hand_made(IMAGES, "none")
    batch = data.some(dataset, "test", 5)
    np.testing.assert_array_equal(batch["id"], [0, 9, 18, 27, 36])
    assert batch["mask"].all()
    np.testing.assert_array_equal(data.some(dataset, "test", 1000)["id"], ALL)


@pytest.mark.parametrize("double", [False, True])
def test_the_draws_are_pinned_also_in_double_precision(double):
    """A change here changes the held-out bits of every number reported; jax_enable_x64 must not."""
    with jax.enable_x64(double):
        drawn = _held_out(IMAGES, ALL), _train(IMAGES, ALL, jax.random.key(0))
    bits = (np.packbits(np.asarray(batch["x"], bool)) for batch in drawn)
    assert [zlib.crc32(row.tobytes()) for row in bits] == [1035542881, 1213204766]


def _rows(*splits):
    return {
        (image.tobytes(), int(label))
        for s in splits
        for image, label in zip(s.x, s.labels, strict=True)
    }


def test_the_splits_are_disjoint_and_complete(embedded):
    splits = embedded.splits
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 4000,
        "validation": 500,
        "test": 500,
    }
    assert len(_rows(*splits.values())) == 5000  # all images of the source are distinct
    labels = np.concatenate([splits["train"].labels, splits["validation"].labels])
    assert np.bincount(labels).tolist() == [450] * 10
    # Random, not the first in the canonical order: every class is in it.
    assert np.bincount(splits["validation"].labels).min() > 20


def test_the_validation_split_depends_on_its_seed_alone(embedded):
    config = data.Config(source="embedded", validation=500)
    again = data.load(dataclasses.replace(config, binarisation="none"))
    other = data.load(dataclasses.replace(config, seed=1))
    for name in ("train", "validation", "test"):
        np.testing.assert_array_equal(again.splits[name].x, embedded.splits[name].x, strict=True)

    def rows(dataset, *names):
        return _rows(*(dataset.splits[name] for name in names))

    assert rows(other, "test") == rows(embedded, "test")
    assert rows(other, "train", "validation") == rows(embedded, "train", "validation")
    common = len(rows(other, "validation") & rows(embedded, "validation"))
    # Hypergeometric: 500 · 500 / 4,500 = 56 ± 7.
    assert 25 < common < 90


def test_validation_may_be_empty_but_not_everything():
    assert len(data.load(data.Config(source="embedded", validation=0)).splits["train"]) == 4500
    for validation in (-1, 4500):
        with pytest.raises(UserError, match=rf"data\.validation={validation}"):
            data.load(data.Config(source="embedded", validation=validation))
    with pytest.raises(UserError, match=r"data\.binarisation='grey'"):
        data.load(data.Config(source="embedded", binarisation="grey"))


def test_the_spec_is_of_the_training_images_as_the_model_sees_them(embedded):
    mean = embedded.splits["train"].x.astype(np.float64).mean(axis=0)
    assert embedded.spec.event_shape == (28, 28, 1) and embedded.spec.num_dims == 784
    assert embedded.spec.support == "binary" and embedded.spec.mean.dtype == np.float32
    np.testing.assert_allclose(embedded.spec.mean, mean / 255, rtol=1e-6)
    grey = data.load(data.Config(source="embedded", binarisation="none")).spec
    assert grey.support == "uint8"
    np.testing.assert_allclose(grey.mean, mean, rtol=1e-6)


def test_the_card_says_what_a_number_is_about(embedded):
    card = embedded.card
    assert card["source"] == "embedded" and card["seed"] == 0
    assert card["counts"] == {"train": 4000, "validation": 500, "test": 500}
    assert card["binarisation"] == {"train": "dynamic", "held_out": "one draw per image"}
    assert card["event_shape"] == [28, 28, 1] and card["support"] == "binary"
    assert len(card["sha256"]) == 64
    line = data.describe(card)
    for part in ("embedded", "4,000 train", "500 test", "dynamic", "seed 0", card["sha256"][:12]):
        assert part in line


def test_factors_stay_with_their_images():
    dataset = data.load(data.Config(dataset="shapes", validation=300))
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 19_700,
        "validation": 300,
        "test": 5_000,
    }
    for split in dataset.splits.values():
        rows = np.array([0, len(split) // 2, len(split) - 1])
        np.testing.assert_array_equal(split.x[rows], shapes.render(split.factors[rows]))
        np.testing.assert_array_equal(split.labels, split.factors[:, 0])
    assert dataset.factor_names == ["shape", "scale", "rotation", "x", "y"]
    assert dataset.spec.num_classes == 3
    assert dataset.card["dataset"] == "shapes" and dataset.card["source"] == "generator"
    assert data.describe(dataset.card).startswith("shapes from generator, 19,700 train")
    again = data.load(data.Config(dataset="shapes", validation=300, seed=1))
    assert again.card["sha256"] != dataset.card["sha256"]


def test_mnist_has_no_factors_and_the_card_it_always_had(embedded):
    assert embedded.factor_names == []
    assert all(split.factors.shape == (len(split), 0) for split in embedded.splits.values())
    assert embedded.card["dataset"] == "mnist"
    assert list(embedded.card) == [
        "dataset",
        "source",
        "sha256",
        "counts",
        "event_shape",
        "support",
        "num_classes",
        "binarisation",
        "seed",
    ]


def _with_labelled(num, share=0.0, seed=0):
    return data.Config(source="embedded", labelled=num, labelled_share=share, seed=seed)


def test_labels_are_told_of_as_many_of_each_class(embedded):
    """Others are -1, others with another seed; what is measured knows them all."""
    found, again = (data.load(_with_labelled(100, seed=seed)) for seed in (0, 1))
    told, labels = found.told_labels, found.splits["train"].labels
    np.testing.assert_array_equal(labels, embedded.splits["train"].labels)
    assert np.bincount(told[told >= 0]).tolist() == [10] * 10
    np.testing.assert_array_equal(told[told >= 0], labels[told >= 0])
    assert told.dtype == np.int32 and (told[told < 0] == -1).all()
    # Random, not the first of their class: 100 of 4,000, in the mean in the middle.
    rows = np.flatnonzero(told >= 0)
    assert abs(rows.mean() - 2000) < 4 * 4000 / np.sqrt(12 * 100)
    assert len(np.intersect1d(rows, np.flatnonzero(again.told_labels >= 0))) < 20
    np.testing.assert_array_equal(embedded.told_labels, labels)
    assert embedded.spec.labelled is None


def test_a_share_of_each_batch_is_labelled():
    """30 of 120 rows, none of them twice in three batches; in the others as many as by chance."""
    found = data.load(_with_labelled(100, 0.25))
    told = found.told_labels
    ids = jax.jit(jax.vmap(lambda step: data.train_ids(found, 120, jnp.int32(0), step)))
    rows = np.asarray(ids(jnp.arange(300)))
    assert rows.shape == (300, 120) and rows.dtype == np.int32
    assert (told[rows[:, :30]] >= 0).all()
    for i in range(0, 300, 3):
        assert len(np.unique(rows[i : i + 3, :30])) == 90
    # Of the other 90 rows 1 in 40: 675 ± 26 of 27,000.
    assert abs(np.sum(told[rows[:, 30:]] >= 0) - 675) < 4 * 26
    share = np.mean(told[rows] >= 0)
    assert found.spec.labelled == (100, 0.25 + 0.75 * 100 / 4000)
    assert abs(share - found.spec.labelled.share) < 4 * 26 / rows.size


def test_without_a_share_batches_come_as_they_do(embedded):
    found = data.load(_with_labelled(100))
    ids = [data.train_ids(of, 50, jnp.int32(3), jnp.int32(7)) for of in (found, embedded)]
    np.testing.assert_array_equal(*ids)
    assert found.spec.labelled == (100, 100 / 4000)


def test_the_card_says_how_many_labels_are_told():
    found = data.load(_with_labelled(100, 0.25))
    assert "100 of the training labels told" in data.describe(found.card)
    assert data.spec_of_card(data.checked_card(found.card), found.spec.mean).labelled == (
        found.spec.labelled
    )
    for wrong in ({"num": 0, "share": 0.5}, {"num": 5000, "share": 0.5}, {"num": 9, "share": 2.0}):
        with pytest.raises(ValueError, match="labelled"):
            data.checked_card({**found.card, "labelled": wrong})


@pytest.mark.parametrize(
    ("num", "share", "named"),
    [
        (-10, 0.0, r"data\.labelled=-10: .*10 classes"),
        (15, 0.0, r"data\.labelled=15: a multiple of the 10 classes"),
        (4000, 0.0, r"data\.labelled=4000: .*rarest"),
        (0, 0.5, r"data\.labelled_share=0\.5: set data\.labelled"),
        (10, 1.0, r"data\.labelled_share=1\.0: .*below 1"),
        (10, float("nan"), r"data\.labelled_share=nan"),
    ],
)
def test_labels_that_cannot_be_told_so_are_refused(num, share, named):
    with pytest.raises(UserError, match=named):
        data.load(_with_labelled(num, share))


def test_labels_of_data_that_have_none_are_refused(tmp_path):
    points = np.random.default_rng(0).normal(size=(50, 2))
    np.savez(tmp_path / "own.npz", train_x=points, test_x=points)
    config = data.Config("arrays", path=str(tmp_path / "own.npz"), binarisation="none")
    with pytest.raises(UserError, match=r"data\.labelled=10: these data have no labels"):
        data.load(dataclasses.replace(config, validation=5, labelled=10))


@pytest.mark.parametrize(("size", "named"), [(50, "12.5 rows"), (800, "at most data.labelled=100")])
def test_rows_that_a_batch_cannot_have_are_refused(size, named):
    with pytest.raises(UserError, match=rf"train\.batch_size={size} are .*{named}"):
        labelled.num_rows(100, 0.25, size)


def test_a_data_set_that_there_is_not():
    with pytest.raises(UserError, match=r"data\.dataset='mnits': choose one of mnist, .*shapes"):
        data.load(data.Config(dataset="mnits"))
    with pytest.raises(UserError, match=r"data\.source='tfds'.*generated.*'auto'"):
        data.load(data.Config(dataset="shapes", source="tfds"))
    with pytest.raises(UserError, match=r"data\.validation=20000.*19999"):
        data.load(data.Config(dataset="shapes", validation=20_000))


def test_toys_are_points_with_a_known_density():
    found = data.load(data.Config(dataset="grid", binarisation="none", validation=100))
    assert (found.spec.support, found.spec.event_shape) == ("real", (2,))
    assert found.spec.num_classes == 25 and found.spec.scale == 1 and found.toy.num_labels == 25
    batch = data.some(found, "validation", 7)
    assert (
        batch["x"].dtype == np.float32 and np.isin(batch["x"], found.splits["validation"].x).all()
    )
    assert "binarisation" not in data.describe(found.card)
    assert data.spec_of_card(found.card, found.spec.mean) == found.spec
