"""What is read cannot run code, fill the memory or hang, and is refused in one line."""

import gc
import gzip
import io
import json
import os
import shutil
import sys
import tracemalloc
import zipfile
from pathlib import Path
from unittest import mock

import fuzz
import jax
import numpy as np
import pytest

from dgm_jax import files, models, results, trained_model, writers
from dgm_jax.core import UserError
from dgm_jax.data import image_sets, sources, text
from dgm_jax.sweep.run import read_about
from dgm_jax.workdir import Workdir

# Orbax leaves coroutines of a failed read to the garbage collector, which complains.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
DEEP = "[" * 100_000 + "]" * 100_000
MEAN = np.full((4, 4, 1), 0.5, np.float32)


@pytest.fixture(autouse=True, scope="module")
def _garbage_stays_here():
    yield
    gc.collect()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A work directory with a checkpoint."""
    path = tmp_path_factory.mktemp("sound") / "run"
    fuzz.KINDS["workdir"].make(path)
    return path


@pytest.fixture
def workdir(sound, tmp_path):
    """A copy to be damaged."""
    shutil.copytree(sound, tmp_path / "run")
    return Workdir(tmp_path / "run")


def refused(load, *args):
    """The one line of the `UserError` that `load(*args)` must raise."""
    with pytest.raises(UserError) as caught:
        load(*args)
    assert str(caught.value).isprintable()
    return str(caught.value)


def edit(path, *keys, value=None):
    """Replace what stands at `keys` in a JSON file, or take it out."""
    whole = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    if value is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    path.write_text(json.dumps(whole))


def test_an_error_is_one_line_whatever_a_file_holds():
    error = UserError("a\nb\x1b[2J\ud800 é ∀" + "x" * 10**6)
    assert str(error).startswith(r"a\nb\x1b[2J\ud800 é ∀x")
    assert len(str(error)) < 3000


# JSON.

LOADERS = {
    "config.json": lambda path: Workdir(path.parent).load_config(),
    "data_card.json": lambda path: Workdir(path.parent).load_card(),
    "replay.json": lambda path: Workdir(path.parent).load_replay(),
    "failure.json": lambda path: Workdir(path.parent).load_failure(),
    "results.json": results.load,
    "sweep.json": lambda path: read_about(path.parent),
}
CONTENTS = {
    "deep": DEEP,
    "cut": '{"step": 1, "what": "vae',
    "empty": "",
    "null": "null",
    "a list": "[]",
    "nothing": "{}",
    "a number of 10,000 digits": "9" * 10_000,
    "half a surrogate pair": '{"failure": "\\ud800", "what": "\\ud800", "step": 1}',
    "no UTF-8": "\udcff",
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", LOADERS)
def test_json_that_is_none_of_its_kind(tmp_path, name, content):
    (tmp_path / name).write_bytes(CONTENTS[content].encode(errors="surrogateescape"))
    assert f"{tmp_path / name} is damaged" in refused(LOADERS[name], tmp_path / name)


@pytest.mark.parametrize("name", LOADERS)
def test_what_is_no_file_or_too_large_is_not_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)  # reading it would wait for ever
    assert "it is no file" in refused(LOADERS[name], tmp_path / name)
    (tmp_path / name).unlink()
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**33)
    assert "8,589,934,592 bytes" in refused(LOADERS[name], tmp_path / name)


@pytest.mark.parametrize(
    ("keys", "value", "word"),
    [
        (("event_shape",), [10**6, 10**6], "event_shape"),
        (("event_shape",), [4, -4, -1], "from 0 to"),
        (("event_shape",), [4, 4, 1.0], "from 0 to"),
        (("event_shape",), [], "event_shape"),
        (("event_shape",), [1] * 1000, "event_shape"),
        (("counts", "train"), -1, "from 0 to"),
        (("counts", "test"), 10**30, "from 0 to"),
        (("counts", "train"), None, "training examples"),
        (("counts",), [100], "AttributeError"),
        (("num_classes",), True, "from 0 to"),
        (("support",), "complex", "support"),
        (("support",), ["binary"], "support"),
        (("alphabet",), 5, "alphabet"),
        (("alphabet",), "abca", "alphabet"),
        (("vocabulary",), 2**30, "vocabulary"),
        (("vocabulary",), True, "vocabulary"),
        (("labelled",), {"num": 10**9, "share": 0.5}, "labelled"),
        (("labelled",), {"num": 10}, "TypeError"),
    ],
)
def test_a_data_card_that_makes_no_sense(workdir, keys, value, word):
    edit(workdir.data_card, *keys, value=value)
    assert word in refused(trained_model.restore, workdir.path)


@pytest.mark.parametrize(
    ("keys", "value", "word"),
    [
        (("model", "latents"), 10**12, "model.latents is too large"),
        (("model", "encoder"), [1] * 10**5, "model.encoder has more than"),
        (("model", "encoder"), [10**12], "model.encoder is too large"),
        (("model", "encoder"), ["a", None], "config.json is damaged"),
        (("model", "latents"), -5, "at least 1"),
        (("model", "name"), "os", "is not a model"),
        (("model", "name"), "../../evil", "is not a model"),
        (("model", "beta"), 10**400, "damaged"),
        (("train", "batch_size"), "many", "expected int"),
        (("optimizer", "learning_rate"), -1.0, "at least 0"),
        (("a\nb",), 1, r"no field a\nb"),
    ],
)
def test_a_config_that_makes_no_sense(workdir, keys, value, word):
    edit(workdir.config, *keys, value=value)
    assert word in refused(trained_model.restore, workdir.path)


def test_shapes_are_compared_before_anything_is_allocated(workdir):
    """Another batch is no other state; wider layers are not in the checkpoint."""
    restored = trained_model.restore(workdir.path)
    edit(workdir.config, "train", "batch_size", value=2**31 - 1)  # of 128 GiB
    again = trained_model.restore(workdir.path)
    jax.tree.map(np.testing.assert_array_equal, again.params, restored.params)
    edit(workdir.config, "model", "encoder", value=[2**30])  # of 64 GiB
    assert "no checkpoint" in refused(trained_model.restore, workdir.path)


def test_a_result_whose_numbers_are_none(tmp_path):
    path = tmp_path / "results.json"
    for keys, value in (
        (("schema",), 2),
        (("step",), "many"),
        (("seconds", "training"), []),
        (("metrics", "elbo", "value"), "x"),
        (("metrics", "elbo", "value"), 10**400),
        (("metrics", "elbo"), None),
        (("data", "counts"), "x"),
    ):
        fuzz.KINDS["results.json"].make(path)
        assert results.load(path)["step"] > 0
        if value is None:
            edit(path, *keys[:1], value=[])
        else:
            edit(path, *keys, value=value)
        assert "damaged" in refused(results.load, path)


def test_a_sweep_of_members_that_it_cannot_have(tmp_path):
    path = tmp_path / "sweep.json"
    for members, word in (
        ([{"model.laments": 1}], "model.laments"),
        ([{"seed": 0}] * 2, "the same"),
        ([{"seed": i} for i in range(10_001)], "10,000 members"),
        ([], "no members"),
    ):
        fuzz.KINDS["sweep.json"].make(path)
        edit(path, "members", value=members or [[]])
        if members:
            assert word in refused(read_about, tmp_path)
        else:
            refused(read_about, tmp_path)


def test_a_row_of_metrics_that_is_none_is_named(tmp_path):
    """Only the last row can be torn: the process died while writing it."""
    path, good = tmp_path / "metrics.jsonl", '{"step": 1, "loss": 2.5}\n'
    path.write_text(good * 2 + '{"step": 3, "lo')
    assert writers.read(path) == [{"step": 1, "loss": 2.5}] * 2
    for bad in (
        '{"step": 3, "lo',
        DEEP,
        "[]",
        "7",
        '{"loss": 1.0}',
        '{"step": -1}',
        '{"step": 1.5}',
        '{"step": 1, "loss": "x"}',
        '{"step": 1, "loss": null}',
        f'{{"step": 1, "loss": {10**400}}}',
        '{"step": 1, "seconds": 1.0}',
    ):
        path.write_text(good + bad + "\n" + good)
        assert "line 2" in refused(writers.read, path)


# Arrays.


def array_of(shape, dtype="<f4", data=b""):
    """An .npy file that says what it likes."""
    file = io.BytesIO()
    about = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue() + data


def pickled(executed):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(executed),)

    objects, file = np.empty(1, object), io.BytesIO()
    objects[0] = Bomb()
    np.lib.format.write_array(file, objects, allow_pickle=True)
    return file.getvalue()


def zipped(content, how=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        archive.writestr("mean.npy", content)
    return file.getvalue()


def test_a_header_that_is_no_python_literal_is_damage(tmp_path):
    """NumPy's tokenizer finds an IndentationError in it, which is a SyntaxError."""
    header = b"  a\n b\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    (tmp_path / "mean.npz").write_bytes(zipped(content))
    with pytest.raises(ValueError, match=r"mean\.npy has no header"):
        files.read_arrays(tmp_path / "mean.npz", 1000)


def overlapping():
    """One array of a megabyte, listed a thousand times."""
    content = zipped(array_of((2**18,), data=bytes(2**20)))
    start = content.index(b"PK\x01\x02")
    end = content.index(b"PK\x05\x06")
    many, tail = content[start:end] * 1000, bytearray(content[end:])
    tail[8:12] = (1000).to_bytes(2, "little") * 2
    tail[12:16] = len(many).to_bytes(4, "little")
    return content[:start] + many + bytes(tail)


NASTY = {
    "shape": (lambda _: zipped(array_of((10**6, 10**6))), "has 0 bytes"),
    "shape of no bytes": (lambda _: zipped(array_of((10**12,), "<U0")), "has 0 bytes"),
    "large items": (lambda _: zipped(array_of((1,), "|V1000000000")), "has 0 bytes"),
    "negative": (lambda _: zipped(array_of((-2, -2), data=bytes(16))), "ValueError"),
    "bomb": (
        lambda _: zipped(array_of((2**24,), data=bytes(2**26)), zipfile.ZIP_DEFLATED),
        "arrays are larger than the file",
    ),
    "compressed": (
        lambda _: zipped(array_of((4,), data=os.urandom(16)), zipfile.ZIP_LZMA),
        "compressed",
    ),
    "pickle": (lambda path: zipped(pickled(path)), "mean.npy says that it is object"),
    "no zip, but a pickle": (pickled, "not a zip file"),
    "array in front": (lambda _: array_of((10**12,)) + zipped(pickled(Path("x"))), "object"),
    "overlapping": (lambda _: overlapping(), "arrays are larger than the file"),
    "other type": (lambda _: zipped(array_of((16,), "<f8", bytes(128))), "no mean"),
    "nan": (lambda _: zipped(array_of((1,), data=np.float32(np.nan).tobytes())), "no mean"),
    "another name": (lambda _: zipped(b"").replace(b"mean", b"moan"), "magic"),
}


@pytest.mark.parametrize("name", NASTY)
def test_arrays_that_lie(tmp_path, name):
    make, word = NASTY[name]
    path, executed = Workdir(tmp_path).data_mean, tmp_path / "executed"
    path.write_bytes(make(executed))
    tracemalloc.start()
    try:
        assert word in refused(Workdir(tmp_path).load_mean)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    assert not executed.exists()


def test_the_pickle_would_run_where_it_is_allowed(tmp_path):
    """Or the test above would show nothing."""
    np.load(io.BytesIO(pickled(tmp_path / "executed")), allow_pickle=True)
    assert (tmp_path / "executed").exists()


def test_a_forged_cache_is_made_again(tmp_path):
    """Its own fingerprint, but no images of MNIST's shape."""
    said = []
    for change in ({"train_x": np.zeros((4, 9), np.uint8)}, {"test_labels": np.full(4, -1)}):
        x, y = np.zeros((4, 28, 28, 1), np.uint8), np.zeros(4, np.int32)
        good = {"train_x": x, "train_labels": y, "test_x": x, "test_labels": y}
        forged = good | change
        images = sources.LabelledArrays(
            *forged.values(), "embedded", sources.fingerprint(tuple(forged.values()))
        )
        key = f"format {image_sets._CACHE_FORMAT} k"
        image_sets._write_cache(tmp_path / "c.npz", images, key)
        read = lambda: tuple(good.values())  # noqa: B023, E731
        args = (tmp_path / "c.npz", "embedded", "k", read, (28, 28, 1), said.append)
        assert image_sets._cached(*args).test_labels.sum() == 0
    assert len(said) == 2 and all("no labelled images" in line for line in said)


def test_a_download_that_would_unpack_to_a_gigabyte():
    bomb = gzip.compress(bytes(2**25), 1) * 32  # 5 MB
    tracemalloc.start()
    try:
        assert "no idx file" in refused(image_sets._read_idx, bomb, (4, 28, 28, 1))
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("sides", [(4, 28, 29), (-1, 28, 28), (2**30, 2**30, 2**30), (4, 784), ()])
def test_an_idx_file_of_another_shape(sides):
    def packed(sides):
        head = bytes([0, 0, 8, len(sides)]) + np.array(sides, ">i4").tobytes()
        return gzip.compress(head + bytes(4 * 28 * 28))

    assert image_sets._read_idx(packed((4, 28, 28)), (4, 28, 28, 1)).shape == (4, 28, 28, 1)
    assert "no idx file" in refused(image_sets._read_idx, packed(sides), (4, 28, 28, 1))


@pytest.mark.parametrize("path", ["/dev/zero", "a\0b", "pipe"])
def test_a_text_without_end_is_not_read(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    assert "data.path" in refused(text.load, "text", "auto", path, 8, 2, print)


# TFDS.


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A data set of ten images, and beside it a module that came with it."""
    directory = tmp_path / "cifar10" / "3.0.2"
    fuzz.KINDS["array_record"].make(directory)
    facts = image_sets._DATASETS["cifar10"]._replace(num_train=6, num_test=4)
    monkeypatch.setitem(image_sets._DATASETS, "cifar10", facts)
    (tmp_path / "came_with_it.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield directory
    sys.modules.pop("came_with_it", None)


EVIL, OF_TFDS = "came_with_it.Feature", "tensorflow_datasets.core.features."
FEATURES = {
    "of the whole": {"pythonClassName": EVIL},
    "of a feature": {"featuresDict": {"features": {"label": {"pythonClassName": EVIL}}}},
    "in snake case": {"python_class_name": EVIL},
    "in the old form": {"type": EVIL, "content": {}},
    "nested": {
        "featuresDict": {
            "features": {
                "label": {
                    "pythonClassName": OF_TFDS + "features_dict.FeaturesDict",
                    "featuresDict": {"features": {"x": {"pythonClassName": EVIL}}},
                }
            }
        }
    },
    "in a text": {
        "featuresDict": {
            "features": {
                "label": {
                    "pythonClassName": OF_TFDS + "text_feature.Text",
                    "jsonFeature": {"json": json.dumps({"type": EVIL, "content": {}})},
                }
            }
        }
    },
}


@pytest.mark.parametrize("where", FEATURES)
def test_a_data_set_imports_nothing(prepared, where):
    about = json.loads((prepared / "features.json").read_text()) | FEATURES[where]
    (prepared / "features.json").write_text(json.dumps(about))
    assert "damaged" in refused(image_sets._read_tfds, "cifar10", prepared, True)
    assert "came_with_it" not in sys.modules


def test_tfds_itself_would_import_it(prepared):
    import tensorflow_datasets as tfds

    about = json.loads((prepared / "features.json").read_text()) | FEATURES["of the whole"]
    (prepared / "features.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="Unrecognized"):
        tfds.builder_from_directory(prepared)
    assert "came_with_it" in sys.modules


def test_an_image_is_not_decoded_where_its_head_says_another_size(prepared):
    images = [np.zeros((32, 32, 3), np.uint8)] * 9 + [np.zeros((4000, 4000, 3), np.uint8)]
    shutil.rmtree(prepared)
    fuzz.write_tfds(prepared, images, np.arange(10), {"train": 6, "test": 4})
    assert "(4000, 4000)" in refused(image_sets._read_tfds, "cifar10", prepared, True)


# Checkpoints.


def test_a_checkpoint_in_parts_larger_than_its_arrays(workdir, capsys):
    import tensorstore

    state = workdir.checkpoints / "0" / "state"
    at = {"driver": "ocdbt", "base": f"file://{state}/"}
    store = tensorstore.KvStore.open(at).result()
    keys = sorted(key.decode() for key in store.list().result())
    matrix = next(key for key in keys if key.endswith("kernel/.zarray"))
    whole = "is stored in parts of 40,000,000,000 bytes"
    for key, change, says in (
        (matrix, {"chunks": [10**5, 10**5]}, whole),
        ("step/.zarray", {"shape": [10**6], "chunks": [10**9]}, "step is int32 (1000000,) there"),
        ("step/.zarray", {"dtype": "|S1000000000"}, "is damaged"),
    ):
        about = store.read(key).result().value
        store.write(key, json.dumps({**json.loads(about), **change}).encode()).result()
        refused(trained_model.restore, workdir.path)
        assert says in capsys.readouterr().out
        store.write(key, about).result()


# Networks to judge by.


@pytest.mark.parametrize("shape", [["N", 3, 10**6, 10**6], [10**9, 3, 8, 8], [1, 3, 0, 8]])
def test_a_network_that_takes_absurd_images(tmp_path, shape):
    from onnx import TensorProto, helper, save

    from dgm_jax import judge

    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    found = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "g", [given], [found])
    opset = [helper.make_opsetid("", 17)]
    save(helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "n.onnx")
    assert "at most" in refused(judge._of_onnx, tmp_path / "n.onnx", 1.0)


# Many more, damaged by chance.

FEW = {"array_record": 20, "onnx": 20, "checkpoint": 15, "workdir": 10}
MANY = (
    *("config.json", "data_card.json", "data_mean.npz", "replay.json", "failure.json", "text"),
    *("metrics.jsonl", "results.json", "sweep.json", "cache.npz", "idx.gz", "arrays.npz"),
)


@pytest.mark.parametrize("name", [*MANY, *FEW])
def test_damaged_files_are_read_or_refused(tmp_path, name):
    path, found = tmp_path / "sound", []
    fuzz.KINDS[name].make(path)
    fuzz.try_inputs(name, path, range(FEW.get(name, 90)), found.append)
    found = {outcome.result for outcome in found}
    assert "refused" in found and found <= {"read", "refused"}


def test_every_kind_is_among_them():
    assert {*MANY, *FEW} == set(fuzz.KINDS)


@pytest.mark.parametrize("error", [SyntaxError, ImportError, NameError])
def test_a_module_that_cannot_be_imported_is_no_damaged_file(workdir, monkeypatch, error):
    monkeypatch.setattr(models, "get", mock.Mock(side_effect=error("in models/mine.py")))
    with pytest.raises(error, match=r"in models/mine\.py"):
        trained_model.restore(workdir.path)


def test_a_model_that_cannot_be_built_is_no_damaged_file(workdir, monkeypatch):
    monkeypatch.setattr(models, "build", mock.Mock(side_effect=TypeError("in models/mine.py")))
    with pytest.raises(TypeError, match=r"in models/mine\.py"):
        trained_model.restore(workdir.path)


@pytest.mark.parametrize(
    ("name", "load", "word"),
    [
        ("data_mean.npz", lambda path: dict(np.load(path, allow_pickle=True)), "Executed"),
        ("replay.json", lambda path: json.loads(path.read_bytes()), "RecursionError"),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # NumPy does not close damaged files
def test_a_careless_loader_is_found_out(tmp_path, monkeypatch, name, load, word):
    """The same inputs, and loaders as they could have been written."""
    kind = fuzz.KINDS[name]
    monkeypatch.setitem(fuzz.KINDS, name, kind._replace(load=load))
    found = []
    kind.make(tmp_path / "sound")
    fuzz.try_inputs(name, tmp_path / "sound", range(200), found.append)
    assert any(word in outcome.result for outcome in found)


def test_memory_that_was_refused_by_the_system_is_a_fault(tmp_path, monkeypatch):
    def load(path):
        try:
            raise MemoryError
        except MemoryError as error:
            raise UserError("damaged") from error

    kind = fuzz.KINDS["text"]
    monkeypatch.setitem(fuzz.KINDS, "text", kind._replace(load=load))
    assert fuzz.attempt("text", tmp_path, 0).result == "more memory than allowed"
