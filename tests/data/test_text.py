"""Texts: nothing lost, nothing of the test split seen in training, and errors that help."""

import hashlib

import numpy as np
import pytest

from dgm_jax.core import UserError
from dgm_jax.data import dataset as data
from dgm_jax.data import text
from dgm_jax.data.sources import Unavailable

# The number of each line is in it: a window tells where it stood.
TEXT = "".join(f"{i:04d} grüße\n" for i in range(300))


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode())
    return str(file)


def _load(path, context=8, validation=5):
    return text.load("text", "auto", path, context, validation, print)


def test_the_splits_follow_one_another_and_do_not_overlap(path):
    found = _load(path)
    where = {name: text.decode(found.alphabet, x) for name, x in found.splits.items()}
    begin = int(0.9 * len(TEXT))
    test = TEXT[begin:]
    assert where["test"] == [test[i : i + 8] for i in range(0, len(test) - 7, 8)]
    held_out = TEXT[begin - 40 : begin]
    assert where["validation"] == [held_out[i : i + 8] for i in range(0, 40, 8)]
    train = TEXT[: begin - 40]
    assert where["train"] == [train[i : i + 8] for i in range(len(train) - 7)]
    assert found.alphabet == "".join(sorted(set(TEXT)))
    assert found.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()


def test_training_windows_start_an_eighth_apart(path):
    train = text.decode(*(lambda f: (f.alphabet, f.splits["train"]))(_load(path, context=32)))
    assert train[1] == TEXT[4:36] and train[2] == TEXT[8:40]


def test_the_data_set_is_of_tokens(path):
    config = data.Config(dataset="text", path=path, context=8, validation=5, binarisation="none")
    found = data.load(config)
    spec = found.spec
    assert (spec.support, spec.event_shape, spec.num_classes) == ("tokens", (8,), 0)
    assert spec.vocabulary == spec.num_values == len(set(TEXT)) and spec.dtype == np.int32
    batch = data.some(found, "test", 3)
    assert batch["x"].dtype == np.int32 and batch["x"].shape == (3, 8)
    assert text.decode(found.card["alphabet"], batch["x"])[0] == TEXT[int(0.9 * len(TEXT)) :][:8]
    assert data.spec_of_card(found.card, spec.mean) == spec


def test_python_carries_a_text():
    """A stand-in for a machine without a network; the same on every one of its Pythons."""
    found = text.load("shakespeare", "embedded", "", 64, 100, print)
    assert found.source == "embedded" and len(found.splits["train"]) > 10_000
    assert 50 < len(found.alphabet) < 128


def test_tiny_shakespeare_is_the_known_one(prepared_tfds, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared_tfds))
    found = text.load("shakespeare", "auto", "", 64, 100, print)
    assert found.source == "tfds" and len(found.alphabet) == 65
    assert text.decode(found.alphabet, found.splits["train"][:1])[0].startswith("First Citizen:")
    assert len(found.splits["test"]) == 111_540 // 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("text", "auto", "", 8, 5), r"data\.path=''.*name the file"),
        (("text", "auto", "nowhere.txt", 8, 5), r"data\.path='nowhere\.txt' cannot be read"),
        (("shakespeare", "paper", "", 8, 5), r"data\.source='paper'.*tfds, download, embedded"),
        (("shakespeare", "embedded", "", 1, 5), r"data\.context=1"),
        (("shakespeare", "embedded", "", 400_000, 5), r"data\.context=400000.*too few"),
        (("shakespeare", "embedded", "", 64, -1), r"data\.validation=-1: must be at least 0"),
        (("shakespeare", "embedded", "", 64, 100_000), r"data\.validation=100000.*too few"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(UserError, match=message):
        text.load(*arguments, print)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        _load(str(tmp_path / "bytes"))


def test_letters_have_no_grey_values():
    with pytest.raises(UserError, match=r"data\.binarisation='dynamic'.*'none'"):
        data.load(data.Config(dataset="shakespeare", source="embedded"))


def test_a_damaged_data_set_is_passed_over_only_where_nobody_named_it(tmp_path, monkeypatch):
    version = tmp_path / "tensorflow_datasets/tiny_shakespeare/1.0.0"
    version.mkdir(parents=True)
    (version / "features.json").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(Unavailable, match="is damaged"):
        text._read_tfds()
    monkeypatch.setenv("TFDS_DATA_DIR", str(version.parent.parent))
    with pytest.raises(UserError, match=r"is damaged.*unset TFDS_DATA_DIR"):
        text._read_tfds()
