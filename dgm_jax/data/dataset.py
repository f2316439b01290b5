"""From arrays to batches: splits, binarisation, and the data card that goes into every result."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax.core import Batch, DataSpec, Labelled, UserError
from dgm_jax.data import image_sets, labelled, order, own, shapes, text, toys
from dgm_jax.rng import per_example, stream

GENERATED = ("shapes", *toys.NAMES)
FILES = ("text", "arrays")
DATASETS = (*image_sets.NAMES, "shapes", *toys.NAMES, *text.NAMES, "arrays")
BINARISATIONS = ("dynamic", "fixed", "none")
SUPPORTS = ("binary", "uint8", "tokens", "real")
_MOST_DIMS = 2**22  # of one example


@dataclasses.dataclass(frozen=True)
class Config:
    """The `data` section.

    Attributes:
      dataset: images: `mnist`, `fashion_mnist`, `cifar10`, or `shapes`, generated from `seed`;
        points in the plane, generated likewise: `two_moons`, `eight_gaussians`, `checkerboard` or
        `grid`; windows of characters: `shakespeare`, or `text`, the file at `path`; `arrays`,
        images, vectors or tokens in the file at `path`.
      source: `auto`, `tfds`, `download` or `embedded`; see `image_sets.load` and `text.load`.
      path: of the file that `dataset="text"` reads, or `dataset="arrays"`; see `own.load`.
      context: characters of a window of text.
      validation: number of training examples held out, drawn with `seed`; of a text, its last
        windows before the test split.
      binarisation: of the training images: `dynamic` (a fresh Bernoulli draw of the grey values at
        every visit), `fixed` (one draw per image) or `none`. Held-out images are drawn once, with
        `seed`, unless it is `none`. Of anything but images always `none`.
      labelled: training examples whose labels are told, as many of each class, drawn with `seed`;
        0: all. What is measured knows all labels.
      labelled_share: of the rows of each training batch, drawn from the labelled examples; the
        others come as they do, whether labelled or not.
      seed: of the validation split and of every draw made once. Not the run's seed: runs that
        differ in seed are measured on the same held-out bits.
    """

    dataset: str = "mnist"
    source: str = "auto"
    path: str = ""
    context: int = 64
    validation: int = 500
    binarisation: str = "dynamic"
    labelled: int = 0
    labelled_share: float = 0.0
    seed: int = 0


class Split(NamedTuple):
    """One split.

    Attributes:
      name: `train`, `validation` or `test`.
      x: `[N, *event]`: uint8 images and tokens, float32 vectors.
      labels: int32 `[N]`, from 0; -1 where there are none.
      factors: int32 `[N, G]`, what the images were generated from; G = 0 where nobody knows.
    """

    name: str
    x: np.ndarray
    labels: np.ndarray
    factors: np.ndarray

    def part(self, name: str, rows: np.ndarray) -> "Split":
        """The examples of the given row numbers as a split of their own."""
        return Split(name, self.x[rows], self.labels[rows], self.factors[rows])

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.x)


class Dataset(NamedTuple):
    """Splits, what a model may know of them, and how to say which data a number is about."""

    config: Config
    splits: dict[str, Split]
    spec: DataSpec
    card: dict[str, Any]

    @property
    def factor_names(self) -> list[str]:
        """What the columns of a split's `factors` are."""
        return self.card.get("factors", [])

    @property
    def told_labels(self) -> np.ndarray:
        """What training is told: int32 `[N]`, -1 where the label of a training example is not."""
        labels, config = self.splits["train"].labels, self.config
        return labelled.told(labels, config.labelled, self.spec.num_classes, config.seed)

    @property
    def toy(self) -> toys.Toy | None:
        """The distribution that the data were drawn from, where it is known."""
        return toys.get(self.config.dataset)


class _Found(NamedTuple):
    """What there is of a data set before it is described.

    Attributes:
      splits: by name.
      support: as in `DataSpec`, of what is stored.
      source: where it was found.
      sha256: fingerprint.
      known: more fields of the card.
    """

    splits: dict[str, Split]
    support: str
    source: str
    sha256: str
    known: Mapping[str, Any] = {}


def load(config: Config, announce: Callable[[str], None] = print) -> Dataset:
    """Find the data, split them and write their card.

    Args:
      config: the `data` section.
      announce: told, in a line, of any fall-back to another source.

    Raises:
      UserError: the source cannot be read, or a field makes no sense.
    """
    _check(config)
    if config.dataset in text.NAMES:
        found = _find_text(config, announce)
    else:
        found = _find_labelled(config, announce)
    train = found.splits["train"]
    binary = config.binarisation != "none"
    if binary and found.support != "uint8":
        raise UserError(
            f"data.binarisation={config.binarisation!r}: {config.dataset} has no grey values; "
            "set it to 'none'"
        )
    mean = train.x.mean(axis=0, dtype=np.float64).astype(np.float32)
    # Of all splits: the last class may have no example in one of them.
    num_classes = 1 + max(int(split.labels.max(initial=-1)) for split in found.splits.values())
    spec = DataSpec(
        event_shape=train.x.shape[1:],
        support="binary" if binary else found.support,
        mean=mean / 255 if binary else mean,
        num_examples=len(train),
        num_classes=num_classes,
        vocabulary=_vocabulary(found.known),
        labelled=labelled.checked(
            config.labelled, config.labelled_share, train.labels, num_classes
        ),
    )
    card = {
        "dataset": config.dataset,
        "source": found.source,
        "sha256": found.sha256,
        "counts": {name: len(split) for name, split in found.splits.items()},
        "event_shape": list(spec.event_shape),
        "support": spec.support,
        "num_classes": spec.num_classes,
        "binarisation": {
            "train": config.binarisation,
            "held_out": "one draw per image" if binary else "none",
        },
        "seed": config.seed,
        **({"labelled": spec.labelled._asdict()} if spec.labelled else {}),
        **found.known,
    }
    return Dataset(config, found.splits, spec, card)


def spec_of_card(card: Mapping[str, Any], mean: np.ndarray) -> DataSpec:
    """What a model may know of the data of a card, whose training mean is `mean` `[*event]`.

    Raises:
      UserError: the mean is of other data.
    """
    shape = tuple(card["event_shape"])
    if mean.shape != shape:
        raise UserError(f"the data's mean has the shape {mean.shape} and its card says {shape}")
    return DataSpec(
        event_shape=shape,
        support=card["support"],
        mean=mean,
        num_examples=card["counts"]["train"],
        num_classes=card["num_classes"],
        vocabulary=_vocabulary(card),
        labelled=Labelled(**card["labelled"]) if "labelled" in card else None,
    )


def checked_card(card: Any) -> dict[str, Any]:
    """A data card that somebody else may have written.

    Raises:
      Exception: of almost any kind, where it is none; see `files.reading`.
    """
    shape, counts, alphabet = card["event_shape"], card["counts"], card.get("alphabet", "")
    numbers = [*shape, *counts.values(), card["num_classes"]]
    if not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
        raise ValueError("a count, or a side of an example, is no whole number from 0 to 2^31")
    if not 1 <= len(shape) <= 3 or not 1 <= math.prod(shape) <= _MOST_DIMS:
        raise ValueError(f"event_shape: {shape}")
    if card["support"] not in SUPPORTS or "train" not in counts:
        raise ValueError("support, or the number of training examples, is missing or wrong")
    if not (isinstance(alphabet, str) and len(set(alphabet)) == len(alphabet)):
        raise ValueError("alphabet: a text in which each character is there once")
    if "labelled" in card:
        num, share = Labelled(**card["labelled"])
        if type(num) is not int or not (1 <= num <= counts["train"] and 0 < share <= 1):
            raise ValueError(f"labelled: {card['labelled']}")
    size = card.get("vocabulary", 0)
    if type(size) is not int or not 0 <= size <= own.MOST_TOKENS:
        raise ValueError(f"vocabulary: {size!r}")
    if card["support"] == "tokens" and not _vocabulary(card):
        raise ValueError("alphabet, or vocabulary: it is missing")
    return card


def _vocabulary(card: Mapping[str, Any]) -> int:
    """Number of different tokens: given, or that of the characters; 0 of other data."""
    return card.get("vocabulary", len(card.get("alphabet", "")))


def _check(config: Config) -> None:
    """Refuse fields that make no sense whatever the data hold."""
    if config.dataset not in DATASETS:
        raise UserError(f"data.dataset={config.dataset!r}: choose one of {', '.join(DATASETS)}")
    if config.binarisation not in BINARISATIONS:
        raise UserError(
            f"data.binarisation={config.binarisation!r}: choose one of {', '.join(BINARISATIONS)}"
        )
    if config.path and config.dataset not in FILES:
        raise UserError(
            f"data.path={config.path!r} is not read with data.dataset={config.dataset!r}: set that "
            f"to {' or '.join(map(repr, FILES))}, or leave out the path"
        )
    if config.source != "auto" and config.dataset in (*GENERATED, *FILES):
        origin = "generated" if config.dataset in GENERATED else "a file"
        raise UserError(
            f"data.source={config.source!r}: data.dataset={config.dataset!r} is {origin}; "
            "choose 'auto'"
        )
    if not 0 <= config.seed < 2**31:
        raise UserError(f"data.seed={config.seed}: must be at least 0 and below 2^31")


def _find_text(config: Config, announce: Callable[[str], None]) -> _Found:
    where = (config.dataset, config.source, config.path, config.context, config.validation)
    found = text.load(*where, announce)
    splits = {
        name: Split(name, x, np.full(len(x), -1, np.int32), np.zeros((len(x), 0), np.int32))
        for name, x in found.splits.items()
    }
    return _Found(splits, "tokens", found.source, found.sha256, {"alphabet": found.alphabet})


def _find_labelled(config: Config, announce: Callable[[str], None]) -> _Found:
    """All but text, a part of the training split drawn for validation."""
    factors, known = None, {}
    if config.dataset == "shapes":
        arrays, *factors = shapes.generate(config.seed)
        known = {"factors": list(shapes.FACTORS)}
    elif config.dataset == "arrays":
        arrays = own.load(config.path)
    elif config.dataset in toys.NAMES:
        arrays = toys.generate(config.dataset, config.seed)
    else:
        arrays = image_sets.load(config.dataset, config.source, announce=announce)
    if factors is None:
        sizes = len(arrays.train_labels), len(arrays.test_labels)
        factors = [np.zeros((size, 0), np.int32) for size in sizes]
    train = Split("train", arrays.train_x, arrays.train_labels, factors[0])
    if not 0 <= config.validation < len(train):
        raise UserError(
            f"data.validation={config.validation}: hold out between 0 and {len(train) - 1} "
            f"of the {len(train)} training examples"
        )
    order = np.random.default_rng(config.seed).permutation(len(train))
    held_out, kept = np.sort(order[: config.validation]), np.sort(order[config.validation :])
    splits = {
        "train": train.part("train", kept),
        "validation": train.part("validation", held_out),
        "test": Split("test", arrays.test_x, arrays.test_labels, factors[1]),
    }
    support = {"uint8": "uint8", "int32": "tokens", "float32": "real"}[train.x.dtype.name]
    if support == "tokens":
        known["vocabulary"] = 1 + int(train.x.max())
    return _Found(splits, support, arrays.source, arrays.sha256, known)


def describe(card: dict[str, Any]) -> str:
    """The data card in one line."""
    counts = " / ".join(f"{num:,} {name}" for name, num in card["counts"].items())
    drawn = ""
    if card["support"] in ("binary", "uint8"):
        binarisation = card["binarisation"]
        drawn = f"binarisation {binarisation['train']} (held out: {binarisation['held_out']}), "
    if "labelled" in card:
        drawn += f"{card['labelled']['num']:,} of the training labels told, "
    return (
        f"{card['dataset']} from {card['source']}, {counts}, {drawn}"
        f"seed {card['seed']}, sha256 {card['sha256'][:12]}"
    )


def binarise(images: jax.Array, words: jax.Array) -> jax.Array:
    """Draw x ~ Bernoulli(images / 255).

    Two pixels share one 32-bit word: random bits are a tenth of a small model's step. A pixel v
    is on where 16 random bits lie below 257·v + [v > 127], which makes black and white exact
    and any other grey right to 2^-17.

    Args:
      images: uint8 `[B, *event]`.
      words: uint32 `[B, ceil(D / 2)]`, uniform; D = prod(event).

    Returns:
      float32 `[B, *event]` in {0, 1}.
    """
    flat = images.reshape(len(images), -1).astype(jnp.uint32)
    halves = jnp.concatenate([words & 0xFFFF, words >> 16], axis=-1)[:, : flat.shape[1]]
    on = halves < 257 * flat + (flat > 127)
    return on.astype(jnp.float32).reshape(images.shape)


def num_words(event_shape: tuple[int, ...]) -> int:
    """Random words that `binarise` needs per example."""
    return -(-int(np.prod(event_shape)) // 2)


def train_ids(dataset: Dataset, batch_size: int, seed: jax.Array, step: jax.Array) -> jax.Array:
    """Which training examples update number `step` (from 0) sees: int32 `[B]`.

    With `data.labelled_share` the first rows are of labelled examples, in epochs of their own.
    """
    ids = order.batch_ids(seed, step, batch_size, len(dataset.splits["train"]))
    config = dataset.config
    if rows := labelled.num_rows(config.labelled, config.labelled_share, batch_size):
        known = np.flatnonzero(dataset.told_labels >= 0).astype(np.int32)
        chosen = order.batch_ids(seed, step, rows, len(known), "data/order/labelled")
        ids = ids.at[:rows].set(jnp.asarray(known)[chosen])
    return ids


def train_batch(
    dataset: Dataset, images: jax.Array, labels: jax.Array, ids: jax.Array, rng: jax.Array
) -> Batch:
    """The training batch of the given ids, inside the compiled program.

    Args:
      dataset: for its binarisation and seed; its arrays are not touched.
      images: `[N, *event]`, `Split.x` of the training split on the device; uint8 where they are
        binarised.
      labels: int32 `[N]`, as told.
      ids: int32 `[B]`.
      rng: this step's key, for dynamic binarisation.

    Returns:
      `x` float32 `[B, *event]`, `label` and `id` int32 `[B]`; without dynamic binarisation also
      `mask` bool `[B]`, all true.
    """
    if dataset.config.binarisation != "dynamic":
        return held_out_batch(dataset, "train", images, labels, ids)
    words = jax.random.bits(rng, (len(ids), num_words(images.shape[1:])), jnp.uint32)
    return {"x": binarise(images[ids], words), "label": labels[ids], "id": ids}


def held_out_batch(
    dataset: Dataset, split: str, images: jax.Array, labels: jax.Array, ids: jax.Array
) -> Batch:
    """A batch whose images are drawn once: the draw depends on `data.seed`, split and id alone.

    Arguments and result as in `train_batch`; ids beyond the split's end give padding, marked by
    `mask` bool `[B]`.
    """
    mask = ids < len(images)
    ids = jnp.minimum(ids, len(images) - 1)
    chosen = images[ids]
    if dataset.config.binarisation == "none":
        x = chosen.astype(jnp.float32) if chosen.dtype == jnp.uint8 else chosen
    else:
        keys = per_example(stream(dataset.config.seed, f"data/binarise/{split}"), ids)
        words = jax.vmap(lambda k: jax.random.bits(k, (num_words(images.shape[1:]),), jnp.uint32))(
            keys
        )
        x = binarise(chosen, words)
    return {"x": x, "label": labels[ids], "id": ids, "mask": mask}


def some(dataset: Dataset, split: str, num: int) -> Batch:
    """`num` examples spread evenly over a split, as a batch to look at or to try things on."""
    chosen = dataset.splits[split]
    # One program: its many small operations would be compiled one by one.
    make = jax.jit(lambda *arrays: held_out_batch(dataset, split, *arrays))
    return make(chosen.x, chosen.labels, _spread(len(chosen), num))


def spread(dataset: Dataset, split: str, num: int) -> Dataset:
    """The data set with `num` examples of a split in place of it, spread evenly over it.

    They are as a model sees them: bits are drawn by an example's number, which is another there.
    """
    chosen = dataset.splits[split]
    part = chosen.part(split, _spread(len(chosen), num))
    seen = Split(split, np.asarray(some(dataset, split, num)["x"]), part.labels, part.factors)
    config = dataclasses.replace(dataset.config, binarisation="none")
    return dataset._replace(config=config, splits={**dataset.splits, split: seen})


def _spread(size: int, num: int) -> np.ndarray:
    """Row numbers. Images are kept in the order of their bytes: neighbours look alike."""
    return np.linspace(0, size - 1, min(num, size)).astype(np.int32)
