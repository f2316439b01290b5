"""Damage files of every kind that the project reads, and see what its own loaders make of them.

    python scripts/fuzz.py --keep                    # everything; the table goes to the page
    python scripts/fuzz.py --only metrics.jsonl      # one kind
    python scripts/fuzz.py --only metrics.jsonl --seed=17   # one input, with its traceback

Each input is a sound file with bits flipped, parts lost, moved or repeated, or numbers, names and
values replaced by ones that do harm. A loader may return a value or raise a `UserError` of one
line; anything else is a fault: another exception, an end of the process, code that was in the file
and ran, more than 30 s, or more than 256 MiB. Checkpoints and prepared data sets are made anew each
time, and some names in them are drawn by the libraries that write them: of these a seed makes a
like input again, not always the same.
"""

import argparse
import copy
import datetime
import gzip
import importlib.metadata
import io
import json
import os
import pickle
import platform
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from records import DOCS, Section, markdown

REPO = Path(__file__).resolve().parent.parent
MOST_SECONDS, MOST_MIB = 30.0, 256
STUCK = 120.0  # seconds of the clock after which an input is given up: the machine may be busy
EXTREMES = (-1, 0, 1, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1)
DEEP = b"[" * 100_000 + b"]" * 100_000


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
      title: what it is, for the table.
      make: writes a sound one, a file or a folder, at a path.
      load: the project's own loader of it.
      num: inputs of a full run.
      parts: of a folder, which files in it are damaged.
    """

    title: str
    make: Callable[[Path], object]
    load: Callable[[Path], object]
    num: int
    parts: str = "**/*"


class Executed(BaseException):
    """Code that was in a file has run."""


class Bomb:
    """What a pickle may hold."""

    def __reduce__(self) -> tuple:
        """Runs where it is loaded."""
        return exec, ("import fuzz; raise fuzz.Executed",)


# Damage.


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Damaged bytes; half of the time by what they mean, where that is known."""
    if rng.random() < 0.03:
        return _hostile(rng)
    edit = _edit_of(content)
    if edit is not None and rng.random() < 0.6:
        return edit(content, rng)
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = rng.choice(_DAMAGES)(content, rng)
    return content


def _hostile(rng: random.Random) -> bytes:
    """Something else altogether."""
    header = io.BytesIO()
    huge = {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
    np.lib.format.write_array_header_1_0(header, huge)
    return rng.choice(
        (
            b"",
            bytes(10**6),
            DEEP,
            b'{"a":' * 10_000,
            b"9" * 10_000,
            b"NaN",
            pickle.dumps(Bomb()),
            header.getvalue(),
            rng.randbytes(1000),
        )
    )


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8)) if content else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _flip_head(content: bytes, rng: random.Random) -> bytes:
    return _flip(content[:128], rng) + content[128:]


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randint(0, len(content))]


def _remove(content: bytes, rng: random.Random) -> bytes:
    start = rng.randint(0, len(content))
    return content[:start] + content[start + rng.choice((1, 4, 100, 4096)) :]


def _insert(content: bytes, rng: random.Random) -> bytes:
    start, many = rng.randint(0, len(content)), rng.choice((1, 8, 1000))
    return content[:start] + rng.choice((rng.randbytes(many), bytes(many))) + content[start:]


def _splice(content: bytes, rng: random.Random) -> bytes:
    start, end = sorted(rng.randint(0, len(content)) for _ in range(2))
    at = rng.randint(0, len(content))
    part = content[start : min(end, start + 4096)]
    return content[:at] + part + content[at + rng.choice((0, len(part))) :]


def _extreme(content: bytes, rng: random.Random) -> bytes:
    """A number in place of some bytes, most often near an end of the file, where sizes are."""
    size, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
    value = (rng.choice(EXTREMES) % 2 ** (8 * size)).to_bytes(size, order)
    near = rng.choice((len(content), 64))
    at = rng.randint(0, min(near, len(content)))
    at = rng.choice((at, max(0, len(content) - at)))
    return content[:at] + value + content[at + size :]


def _digits(content: bytes, rng: random.Random) -> bytes:
    """Another number in place of one that is written out."""
    found = list(re.finditer(rb"\d+", content[:100_000]))
    if not found:
        return content
    at, value = rng.choice(found), str(rng.choice((*EXTREMES, 10**12, 10**400))).encode()
    return content[: at.start()] + value + content[at.end() :]


_DAMAGES = (_flip, _flip_head, _cut, _remove, _insert, _splice, _extreme, _digits)


def _edit_of(content: bytes) -> Callable[[bytes, random.Random], bytes] | None:
    """How to change what the bytes mean."""
    if content.startswith(b"PK"):
        return _edit_arrays
    if content.startswith(b"\x1f\x8b"):
        return _edit_packed
    if content.lstrip()[:1] in (b"{", b"["):
        return _edit_json
    return None


def _edit_packed(content: bytes, rng: random.Random) -> bytes:
    """The same of what is unpacked; or something that unpacks to far more than it is."""
    if rng.random() < 0.02:
        return gzip.compress(bytes(10**8), 1)
    return gzip.compress(mutate(gzip.decompress(content), rng), 1)


def _edit_json(content: bytes, rng: random.Random) -> bytes:
    """Of the whole, or of one line where each is a value."""
    try:
        value = json.loads(content)
    except ValueError:
        lines = content.splitlines(keepends=True)
        at = rng.randrange(len(lines))
        with suppress(ValueError):
            lines[at] = _edit_value(json.loads(lines[at]), rng) + b"\n"
        return b"".join(lines)
    return _edit_value(value, rng)


def _edit_value(value: Any, rng: random.Random) -> bytes:
    """One place of a JSON value changed, or a few."""
    root = [value]
    for _ in range(rng.choice((1, 1, 1, 3))):
        where, key = rng.choice(list(_places(root)))
        match rng.choice(("value", "value", "value", "number", "remove", "name", "other")):
            case "value":
                where[key] = copy.deepcopy(rng.choice(_VALUES))
            case "number":
                where[key] = rng.choice((*EXTREMES, -(2**31), 10**12, 10**400, 0.5, 1e308))
            case "remove" if where is not root:
                del where[key]
            case "name" if isinstance(where, dict):
                where[rng.choice(("", "items", "a.b", f"{key}\n", "name"))] = where.pop(key)
            case "other":  # a copy: the same thing twice would make a circle
                source, other = rng.choice(list(_places(root)))
                where[key] = json.loads(json.dumps(source[other]))
    text = json.dumps(root[0]).encode()
    return text.replace(b'"DEEP"', DEEP).replace(b'"LONG"', b'"%s"' % (b"x" * 10**6))


_VALUES = (
    *(
        None,
        True,
        False,
        "",
        "DEEP",
        "DEEP",
        "LONG",
        "\n",
        "\x00",
        "\ud800",
        "../../etc/passwd",
        "1",
    ),
    *([], {}, [[]], [None], {"a": 1}, float("nan"), float("inf"), [1] * 10_000, [2**40, 2**40]),
)


def _places(value: Any) -> Any:
    """Every container within a list or dict, with each of its keys."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, under in list(inner):
        yield value, key
        if isinstance(under, (dict, list)):
            yield from _places(under)


def _edit_arrays(content: bytes, rng: random.Random) -> bytes:
    """An .npz file in which one array says that it is something else, or is packed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(entries))
    array = np.load(io.BytesIO(entries[name]), allow_pickle=False)
    data, how, new = array.tobytes(), zipfile.ZIP_STORED, io.BytesIO()
    match rng.choice(("header", "header", "pickle", "packed", "text", "name", "another")):
        case "header":
            shapes = ((10**12,), (-1,), (2**40, 2**40), (), (0, 10**9), (10**400,), array.shape)
            types = ("|O", "<U0", "|V1000000000", "<f8", ">i2", "<M8[s]", array.dtype.str)
            about = {"descr": rng.choice(types), "fortran_order": rng.random() < 0.5}
            about["shape"] = rng.choice(shapes)
            np.lib.format.write_array_header_1_0(new, about)
            new.write(data)
        case "pickle":
            objects = np.empty(1, object)
            objects[0] = Bomb()
            np.lib.format.write_array(new, objects, allow_pickle=True)
        case "packed":
            how = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
            np.lib.format.write_array(new, np.zeros(10**6))
        case "text":
            new.write(mutate(entries[name], rng))
        case "name":
            entries[rng.choice(("x", "../../x.npy", "a\n.npy", "é.npy"))] = entries[name]
            new.write(entries[name])
        case "another":
            kinds = (np.uint8, np.int32, np.float64, np.complex64, bool)
            np.lib.format.write_array(new, np.ones(rng.choice((3, array.shape)), rng.choice(kinds)))
    entries[name] = new.getvalue()
    if rng.random() < 0.05:
        del entries[name]
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", how) as archive:
        for entry, inner in entries.items():
            archive.writestr(entry, inner)
    return target.getvalue()


# Sound files, and their loaders. Imports are late: --help needs none of them.


def _config() -> Any:
    from dgm_jax import config as configs

    small = {"model.latents": 2, "model.encoder": (4,), "model.decoder": (4,)}
    return configs.load(f"{REPO}/configs/vae_mnist.py:gaussian", {**small, "train.batch_size": 8})


_CARD = {
    "dataset": "mnist",
    "source": "embedded",
    "sha256": "0" * 64,
    "counts": {"train": 100, "validation": 10, "test": 10},
    "event_shape": [4, 4, 1],
    "support": "binary",
    "num_classes": 10,
    "binarisation": {"train": "dynamic", "held_out": "one draw per image"},
    "seed": 0,
    "alphabet": "abc",
}
_MEAN = np.full((4, 4, 1), 0.5, np.float32)


def _write_workdir(path: Path) -> None:
    from dgm_jax.workdir import Workdir

    with Workdir(path).claimed(_config(), _CARD, _MEAN):
        pass
    (path / ".lock").unlink(missing_ok=True)


def _write_part(name: str) -> Callable[[Path], object]:
    """Of a work directory, as a file of its own: a folder of one would be slow to copy."""

    def make(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            _write_workdir(Path(folder, "run"))
            shutil.move(Path(folder, "run", name), path)

    return make


def _as(name: str, load: Callable[[Any], object]) -> Callable[[Path], object]:
    """Load the file as that of a work directory of which it has the name."""

    def load_it(path: Path) -> object:
        from dgm_jax.workdir import Workdir

        path.rename(path.with_name(name))
        try:
            return load(Workdir(path.parent))
        finally:
            path.with_name(name).unlink()

    return load_it


def _load_spec(workdir: Any) -> Any:
    from dgm_jax.data import dataset

    return dataset.spec_of_card(workdir.load_card(), _MEAN)


def _write_json(value: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(value, indent=2))


def _write_result(path: Path) -> None:
    shutil.copyfile(REPO / "docs" / "results" / "vae_mnist-seed0.json", path)


def _load_result(path: Path) -> Any:
    from dgm_jax import results

    return results.load(path)


def _write_metrics(path: Path) -> None:
    times = {"seconds": 1.5, "cpu_seconds": 2.5, "examples_per_second": 900.25}
    rows = [{"step": i, "vae/loss": 100.5 - i, **times} for i in range(1, 9)]
    rows += [{"step": 8, "validation/elbo": -99.5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _load_metrics(path: Path) -> Any:
    from dgm_jax import writers

    return writers.read(path)


def _write_sweep(path: Path) -> None:
    members = [{"model.beta": beta, "seed": seed} for beta in (0.5, 1.0) for seed in (0, 1)]
    _write_json({"config": _config().to_dict(), "members": members})(path)


def _load_sweep(path: Path) -> Any:
    from dgm_jax.sweep.run import read_about

    path.rename(path.with_name("sweep.json"))
    try:
        return read_about(path.parent)
    finally:
        path.with_name("sweep.json").unlink()


def _arrays() -> tuple[np.ndarray, ...]:
    x = np.arange(4 * 28 * 28, dtype=np.uint8).reshape(4, 28, 28, 1)
    return (x, np.arange(4, dtype=np.int32)) * 2


def _load_cached(path: Path) -> Any:
    """What is damaged is made again, which here is said in an error."""
    from dgm_jax.core import UserError
    from dgm_jax.data import image_sets

    def announce(line: str) -> None:
        raise UserError(line)

    return image_sets._cached(path, "embedded", "fuzz", _arrays, (28, 28, 1), announce)


def _write_cached(path: Path) -> None:
    from dgm_jax.data import image_sets, sources

    key = f"format {image_sets._CACHE_FORMAT} fuzz"
    images = sources.LabelledArrays(*_arrays(), "embedded", sources.fingerprint(_arrays()))
    image_sets._write_cache(path, images, key)


def _write_idx(path: Path) -> None:
    head = bytes([0, 0, 8, 3]) + np.array([4, 28, 28], ">i4").tobytes()
    path.write_bytes(gzip.compress(head + _arrays()[0].tobytes(), mtime=0))


def _load_idx(path: Path) -> Any:
    from dgm_jax.data import image_sets

    return image_sets._read_idx(path.read_bytes(), (4, 28, 28, 1))


def _write_own(path: Path) -> None:
    from dgm_jax.data.own import NAMES

    with path.open("wb") as file:  # or NumPy puts .npz behind a name that has none
        np.savez(file, **dict(zip(NAMES, _arrays(), strict=True)))


def _load_own(path: Path) -> Any:
    from dgm_jax.data import own

    return own.load(str(path))


def _write_text(path: Path) -> None:
    path.write_text("To be, or not to be: that is the question – ∀ε. " * 20)


def _load_text(path: Path) -> Any:
    from dgm_jax.data import text

    return text.load("text", "auto", str(path), 8, 2, print)


def write_tfds(
    directory: Path, images: np.ndarray, labels: np.ndarray, counts: dict[str, int]
) -> None:
    """A data set as TFDS prepares it, in array_record form, of the name `cifar10`.

    Args:
      directory: that is made.
      images: uint8 `[N, 32, 32, 3]`.
      labels: int `[N]`.
      counts: of each split, how many of these, one after the other.
    """
    from array_record.python.array_record_module import ArrayRecordWriter
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    directory.mkdir(parents=True)
    start, splits = 0, []
    for split, count in counts.items():
        file = directory / f"cifar10-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for i in range(start, start + count):
            encoded = io.BytesIO()
            Image.fromarray(images[i]).save(encoded, "PNG")
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(encoded.getvalue())
            example.features.feature["label"].int64_list.value.append(int(labels[i]))
            writer.write(example.SerializeToString())
        writer.close()
        start += count
        splits.append({"name": split, "shardLengths": [str(count)], "numBytes": "1"})
        splits[-1]["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": "cifar10", "version": "3.0.2", "fileFormat": "array_record", "splits": splits}
    (directory / "dataset_info.json").write_text(json.dumps(info))
    of, shape = "tensorflow_datasets.core.features.", {"dimensions": ["32", "32", "3"]}
    image = {
        "pythonClassName": of + "image_feature.Image",
        "image": {"dtype": "uint8", "shape": shape},
    }
    label = {
        "pythonClassName": of + "class_label_feature.ClassLabel",
        "classLabel": {"numClasses": "10"},
    }
    whole = {
        "pythonClassName": of + "features_dict.FeaturesDict",
        "featuresDict": {"features": {"image": image, "label": label}},
    }
    (directory / "features.json").write_text(json.dumps(whole))


def _write_prepared(path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
    write_tfds(path, images, np.arange(10), {"train": 6, "test": 4})


def _load_prepared(path: Path) -> Any:
    from dgm_jax.data import image_sets

    facts = image_sets._DATASETS["cifar10"]
    image_sets._DATASETS["cifar10"] = facts._replace(num_train=6, num_test=4)
    try:
        return image_sets._read_tfds("cifar10", path, named=True)
    finally:
        image_sets._DATASETS["cifar10"] = facts


def _write_onnx(path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper, save

    weights = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]),
        helper.make_node("GlobalAveragePool", ["h"], ["y"]),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])
    found = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 1, 1])
    graph = helper.make_graph(nodes, "g", [given], [found], [numpy_helper.from_array(weights, "w")])
    opset = [helper.make_opsetid("", 17)]
    save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)


def _load_onnx(path: Path) -> Any:
    from dgm_jax import judge

    return judge._of_onnx(path, 1.0).features(np.zeros((2, 4, 4, 1), np.float32), None)


def _tiny() -> tuple[Any, Any]:
    """A train state, and the same in the abstract on one device."""
    import jax
    import jax.numpy as jnp

    from dgm_jax import config as configs
    from dgm_jax import models, optim
    from dgm_jax.checkpoint import abstract
    from dgm_jax.data import dataset
    from dgm_jax.train_step import init_state

    config, spec = _config(), dataset.spec_of_card(_CARD, _MEAN)
    model = models.build(config.model, spec)
    optimizer = optim.build(configs.section(config, "optimizer"), num_steps=1)
    batch = {"x": jnp.zeros((8, 4, 4, 1)), "label": jnp.zeros(8, jnp.int32)}
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = jax.jit(
        lambda: init_state(model, optimizer, 0, batch, config.optimizer.ema > 0), out_shardings=one
    )()
    return state, abstract(state, one)


def _write_checkpoint(path: Path) -> None:
    from dgm_jax.checkpoint import Checkpoints

    checkpoints = Checkpoints(path)
    checkpoints.save(_tiny()[0])
    checkpoints.close()


def _checkpoint_loader() -> Callable[[Path], object]:
    like: list[Any] = []

    def load(path: Path) -> Any:
        from dgm_jax.checkpoint import Checkpoints

        like.extend([] if like else [_tiny()[1]])
        checkpoints = Checkpoints(path)
        try:
            return checkpoints.restore(like[0], lambda line: None)
        finally:
            checkpoints.close()

    return load


def _write_trained(path: Path) -> None:
    _write_workdir(path)
    _write_checkpoint(path / "checkpoints")


def _load_trained(path: Path) -> Any:
    from dgm_jax import trained_model

    return trained_model.restore(path)


KINDS = {
    "config.json": Kind(
        "a run's config",
        _write_part("config.json"),
        _as("config.json", lambda workdir: workdir.load_config()),
        1000,
    ),
    "data_card.json": Kind(
        "a run's data card", _write_json(_CARD), _as("data_card.json", _load_spec), 1000
    ),
    "data_mean.npz": Kind(
        "a run's training mean",
        _write_part("data_mean.npz"),
        _as("data_mean.npz", lambda workdir: workdir.load_mean()),
        1000,
    ),
    "replay.json": Kind(
        "the step to replay",
        _write_json({"step": 7, "what": "vae/loss is"}),
        _as("replay.json", lambda workdir: workdir.load_replay()),
        500,
    ),
    "failure.json": Kind(
        "why a member was stopped",
        _write_json({"failure": "vae/loss is not finite at step 3", "step": 3}),
        _as("failure.json", lambda workdir: workdir.load_failure()),
        500,
    ),
    "metrics.jsonl": Kind("rows of metrics", _write_metrics, _load_metrics, 1000),
    "results.json": Kind("a result", _write_result, _load_result, 1000),
    "sweep.json": Kind("what a sweep is about", _write_sweep, _load_sweep, 1000),
    "cache.npz": Kind("decoded images in the cache", _write_cached, _load_cached, 1000),
    "idx.gz": Kind("MNIST's original files", _write_idx, _load_idx, 1000),
    "arrays.npz": Kind("arrays to train on", _write_own, _load_own, 1000),
    "text": Kind("a text to train on", _write_text, _load_text, 500),
    "array_record": Kind(
        "a prepared TFDS data set", _write_prepared, _load_prepared, 400, parts="*"
    ),
    "onnx": Kind("a network to judge by", _write_onnx, _load_onnx, 300),
    "checkpoint": Kind("a checkpoint", _write_checkpoint, _checkpoint_loader(), 500),
    "workdir": Kind(
        "a work directory, to sample from", _write_trained, _load_trained, 150, parts="*.*"
    ),
}


# One input.


class Outcome(NamedTuple):
    """What became of an input.

    Attributes:
      seed: of the input.
      result: `read`, `refused`, or what is wrong.
      seconds: of processor time.
      mib: memory at most, above what there was before.
    """

    seed: int
    result: str
    seconds: float
    mib: int


def damaged(name: str, sound: Path, folder: Path, seed: int) -> Path:
    """The input of a seed, in `folder`: the sound one, of which something is damaged."""
    rng = random.Random(f"{name} {seed}")
    target = folder / "input"
    if sound.is_file():
        target.write_bytes(mutate(sound.read_bytes(), rng))
        return target
    shutil.copytree(sound, target)
    files = sorted(path for path in target.glob(KINDS[name].parts) if path.is_file())
    chosen = rng.choice(files)
    match rng.choice(("content",) * 8 + ("gone", "folder", "renamed")):
        case "content":
            chosen.write_bytes(mutate(chosen.read_bytes(), rng))
        case "gone":
            chosen.unlink()
        case "folder":
            chosen.unlink()
            chosen.mkdir()
        case "renamed":
            while chosen.parent != target and rng.random() < 0.6:
                chosen = chosen.parent
            new = rng.choice(("8", "-1", "x", "99999999999999999999", "0.orbax-tmp", "é\n"))
            chosen.rename(chosen.with_name(new))
    return target


def attempt(name: str, path: Path, seed: int) -> Outcome:
    """Load an input as the project does."""
    from dgm_jax.core import UserError

    before, began = _memory_from_now(), time.process_time()
    try:
        KINDS[name].load(path)
        result = "read"
    except UserError as error:
        result = "refused" if len(str(error).splitlines()) == 1 else "its error is not one line"
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError):
                result = "more memory than allowed"
            cause = cause.__cause__ or cause.__context__
    except BaseException as error:
        lines = traceback.format_exception_only(error)
        result = f"{lines[-1].strip()[:300]} ({traceback.extract_tb(error.__traceback__)[-1]})"
    seconds, mib = time.process_time() - began, _memory("VmHWM") - before
    if result in ("read", "refused"):
        result = f"{seconds:.0f} s" if seconds > MOST_SECONDS else result
        result = f"{mib} MiB" if mib > MOST_MIB else result
    return Outcome(seed, result, seconds, mib)


def _memory(which: str) -> int:
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) >> 10 if found else 0


def _memory_from_now() -> int:
    """Resident memory, MiB; its maximum is counted anew."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def try_inputs(name: str, sound: Path, seeds: range, tell: Callable[[Outcome], object]) -> None:
    """Each input in turn; `tell` is told of each."""
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            tell(attempt(name, damaged(name, sound, Path(folder), seed), seed))


# Many, in a process that may end.


def serve(name: str, sound: Path, seeds: range) -> None:
    """Try inputs, with little memory; a line of JSON of each goes to what was standard output."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:  # imports and first calls, and that it is sound
        whole = Path(folder, "input")
        (shutil.copytree if sound.is_dir() else shutil.copyfile)(sound, whole)
        KINDS[name].load(whole)
    # Data alone: libraries reserve far more addresses than they use.
    resource.setrlimit(resource.RLIMIT_DATA, ((_memory("VmData") + 2048) << 20,) * 2)
    try_inputs(name, sound, seeds, lambda found: print(json.dumps(found), file=channel, flush=True))


def run(name: str, sound: Path, num: int) -> list[Outcome]:
    """The outcomes of the seeds 0 to `num` - 1; a process that ends or hangs is a fault."""
    from dgm_jax.progress import Progress

    found: list[Outcome] = []
    with Progress(name, num) as progress:
        while len(found) < num:
            first = len(found)
            outcomes, how = _serve_in_process(name, sound, first, num, progress)
            found += outcomes
            if len(found) < num:
                if not outcomes and not first:
                    sys.exit(f"{name}: {how} with a sound file")
                found.append(Outcome(len(found), how, 0.0, 0))
                progress.advance(1)
    return found


def _serve_in_process(
    name: str, sound: Path, first: int, num: int, progress: Any
) -> tuple[list[Outcome], str]:
    """What was told before the process ended, and how it ended."""
    command = [sys.executable, __file__, "--serve", name, str(sound), str(first), str(num)]
    env = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    outcomes: list[Outcome] = []
    with subprocess.Popen(command, env=env, text=True, bufsize=1, **pipes) as process:
        while select.select([process.stdout], [], [], STUCK)[0]:
            if not (line := process.stdout.readline()):
                break
            outcomes.append(Outcome(*json.loads(line)))
            faults = sum(outcome.result not in ("read", "refused") for outcome in outcomes)
            progress.advance(1, f"{faults} faults")
        else:
            process.kill()
            return outcomes, f"no end within {STUCK:.0f} s"
    return outcomes, f"the process ended ({process.returncode})"


def table(kinds: dict[str, dict[str, Any]]) -> str:
    """A row for each kind, and what is a fault."""
    head = ("what is read", "inputs", "refused", "read", "faults", "slowest, s", "memory, MiB")
    rows: list[list[str]] = []
    whole: Counter = Counter()
    for name, of in ((name, kinds[name]) for name in KINDS if name in kinds):
        whole.update({key: of[key] for key in ("inputs", "refused", "read", "faults")})
        counts = [f"{of[key]:,}" for key in ("inputs", "refused", "read", "faults")]
        title = f"{KINDS[name].title} (`{name}`)"
        rows.append([title, *counts, f"{of['seconds']:.2f}", f"{of['mib']}"])
    sums = [f"{whole[key]:,}" for key in ("inputs", "refused", "read", "faults")]
    rows.append(["**together**", *sums, "", ""])
    made_with = ", ".join(sorted({of["with"] for of in kinds.values()}))
    below = (
        "`python scripts/fuzz.py --keep`, kinds apart with `--only` and `--share`: the slowest "
        "input by processor time, and the most memory above what there was before one. "
        f"{made_with}."
    )
    return f"{markdown(head, rows)}\n{below}"


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Counts, and the largest of each measure."""
    results = Counter(outcome.result for outcome in outcomes)
    packages = ("jax", "numpy", "orbax-checkpoint", "tensorflow-datasets", "onnxruntime")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    today = datetime.datetime.now(datetime.UTC).date()
    return {
        "inputs": len(outcomes),
        "refused": results["refused"],
        "read": results["read"],
        "faults": len(outcomes) - results["refused"] - results["read"],
        "seconds": max(outcome.seconds for outcome in outcomes),
        "mib": max(outcome.mib for outcome in outcomes),
        "with": f"Python {platform.python_version()}, {', '.join(versions)}; {today.isoformat()}",
    }


def main() -> None:
    """Try, show, and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--share", type=float, default=1.0, help="of the inputs of a full run (1)")
    parser.add_argument("--seed", type=int, help="this input alone, in this process")
    parser.add_argument("--keep", action="store_true", help="write the record and the page")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if chosen.serve:
        name, sound, first, num = chosen.serve
        serve(name, Path(sound), range(int(first), int(num)))
        return
    section = Section("untrusted input", DOCS / "reliability.json", DOCS / "reliability.md", table)
    if chosen.keep:
        section.check()
    kinds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen.only:
            kind, sound = KINDS[name], Path(folder, name)
            kind.make(sound)
            if chosen.seed is not None:
                kind.load(damaged(name, sound, Path(folder), chosen.seed))
                continue
            outcomes = run(name, sound, max(1, round(chosen.share * kind.num)))
            kinds[name] = summary(outcomes)
            for outcome in outcomes:
                if outcome.result not in ("read", "refused"):
                    print(f"FAULT: --only {name} --seed={outcome.seed}: {outcome.result}")
            if chosen.keep:  # of each, so that nothing is lost
                section.keep({**section.read(), name: kinds[name]})
    if kinds:
        print(table(kinds))


if __name__ == "__main__":
    main()
