"""Arrays of one's own: what is in the file is what is trained on, and errors that help."""

from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

from dgm_jax import models
from dgm_jax.core import UserError
from dgm_jax.data import dataset as data
from dgm_jax.data import own, text

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (30, 6, 4), dtype=np.uint8)
VECTORS = RNG.normal(size=(30, 3))
LABELS = np.arange(30) % 3


def _load(tmp_path, validation=5, binarisation="none", **arrays):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays)
    config = data.Config("arrays", path=str(path), validation=validation, binarisation=binarisation)
    return data.load(config)


def _rows(dataset):
    both = [dataset.splits[name].x for name in ("train", "validation")]
    return np.concatenate(both).reshape(sum(map(len, both)), -1)


@pytest.mark.parametrize("x", [IMAGES, np.stack(3 * [IMAGES], axis=-1)])
def test_images_are_kept_as_they_are(tmp_path, x):
    found = _load(tmp_path, train_x=x, test_x=x[:7], train_labels=LABELS, test_labels=LABELS[:7])
    spec = found.spec
    assert spec.event_shape == (6, 4, x.size // IMAGES.size) and spec.support == "uint8"
    assert spec.num_classes == 3 and spec.num_examples == 25
    order = lambda rows: sorted(map(bytes, rows))  # noqa: E731
    assert order(_rows(found)) == order(x.reshape(30, -1))
    np.testing.assert_array_equal(found.splits["test"].x.ravel(), x[:7].ravel())
    np.testing.assert_array_equal(found.splits["test"].labels, LABELS[:7])
    for image, label in zip(found.splits["train"].x, found.splits["train"].labels, strict=True):
        assert (x.reshape(30, -1)[label == LABELS] == image.ravel()).all(axis=1).any()
    np.testing.assert_allclose(spec.mean, found.splits["train"].x.mean(axis=0), rtol=1e-6)
    assert data.spec_of_card(found.card, spec.mean) == spec


def test_bits_are_drawn_of_them_like_of_any_images(tmp_path):
    black_and_white = 255 * (IMAGES > 127).astype(np.uint8)
    found = _load(tmp_path, binarisation="dynamic", train_x=black_and_white, test_x=black_and_white)
    assert found.spec.support == "binary"
    seen = data.some(found, "test", 30)["x"]
    np.testing.assert_array_equal(seen.reshape(IMAGES.shape), IMAGES > 127)


def test_vectors_without_labels(tmp_path):
    found = _load(tmp_path, train_x=VECTORS, test_x=VECTORS[:9])
    assert found.spec.support == "real" and found.spec.event_shape == (3,)
    assert found.spec.num_classes == 0 and found.splits["train"].x.dtype == np.float32
    assert found.toy is None
    np.testing.assert_allclose(np.sort(_rows(found), axis=0), np.sort(VECTORS, axis=0), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_tokens_are_whole_numbers_of_any_type(tmp_path, dtype):
    """Codes of sound, or of anything else that is a sequence of symbols."""
    codes = RNG.integers(0, 12, (30, 8)).astype(dtype)
    codes[3, 2] = 12  # the largest is once in training
    found = _load(tmp_path, train_x=codes, test_x=codes[:9], **_labels(9))
    spec = found.spec
    assert (spec.support, spec.event_shape, spec.vocabulary) == ("tokens", (8,), 13)
    assert spec.num_values == 13 and spec.num_classes == 3
    np.testing.assert_array_equal(found.splits["test"].x, codes[:9])
    assert sorted(map(bytes, _rows(found))) == sorted(map(bytes, codes.astype(np.int32)))
    batch = data.some(found, "test", 9)
    assert batch["x"].dtype == spec.dtype == np.int32
    assert data.spec_of_card(data.checked_card(found.card), spec.mean) == spec
    assert text.decode(found.card.get("alphabet"), codes[:2]) == [
        " ".join(str(code) for code in row) for row in codes[:2]
    ]
    for name in ("transformer", "masked_diffusion"):
        models.check(models.defaults(name), spec)


def _labels(num_test):
    return {"train_labels": LABELS, "test_labels": LABELS[:num_test]}


def test_a_class_that_is_held_out_is_still_one(tmp_path):
    labels = np.where(np.arange(30) == 7, 2, LABELS % 2)
    for seed in range(100):  # until the only example is among the held-out ones
        order = np.random.default_rng(seed).permutation(30)
        if 7 in order[:5]:
            break
    arrays = {"train_x": IMAGES, "test_x": IMAGES, "train_labels": labels, "test_labels": labels}
    np.savez(tmp_path / "rare.npz", **arrays)
    path = str(tmp_path / "rare.npz")
    found = data.load(data.Config("arrays", path=path, validation=5, seed=seed))
    assert found.splits["train"].labels.max() == 1 and found.spec.num_classes == 3


def test_two_files_are_two_data_sets(tmp_path):
    marks = [_load(tmp_path, train_x=x, test_x=x).card["sha256"] for x in (IMAGES, IMAGES[::-1])]
    assert marks[0] != marks[1]


def _folder(tmp_path, images, by_class=True):
    """The images in order as a folder, two of three for training: class "b" is after "a"."""
    for i, image in enumerate(images):
        folder = tmp_path / ("test" if i % 3 == 2 else "train") / ("ab"[i % 2] if by_class else ".")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return data.Config("arrays", path=str(tmp_path), validation=0, binarisation="none")


def test_a_folder_holds_images_in_a_folder_for_each_class(tmp_path):
    found = data.load(_folder(tmp_path, IMAGES))
    order = [i for i in range(30) if i % 3 < 2]
    order = sorted(order, key=lambda i: (i % 2, i))  # as the folders are
    np.testing.assert_array_equal(found.splits["train"].x[..., 0], IMAGES[order])
    np.testing.assert_array_equal(found.splits["train"].labels, np.array(order) % 2)
    np.testing.assert_array_equal(found.splits["test"].labels, [0] * 5 + [1] * 5)
    assert found.spec.num_classes == 2


def test_a_folder_without_classes_in_colour_if_one_image_is(tmp_path):
    images = [IMAGES[0], np.stack(3 * [IMAGES[1]], axis=-1) // (1, 2, 3), IMAGES[2]]
    found = data.load(_folder(tmp_path, [image.astype(np.uint8) for image in images], False))
    assert found.spec.event_shape == (6, 4, 3) and found.spec.num_classes == 0
    np.testing.assert_array_equal(found.splits["train"].x[1], images[1])
    np.testing.assert_array_equal(found.splits["test"].x[0], np.stack(3 * [IMAGES[2]], axis=-1))


def test_a_folder_of_more_than_may_be_read_is_refused_by_its_headers(tmp_path, monkeypatch):
    config = _folder(tmp_path, IMAGES)
    for most, refused in ((30 * 24, False), (30 * 24 - 1, True)):
        monkeypatch.setattr(own, "_MOST_BYTES", most)
        with pytest.raises(UserError, match="720 bytes") if refused else nullcontext():
            data.load(config)


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    config = _folder(tmp_path, IMAGES[:6])
    Image.fromarray(IMAGES[0].T).save(tmp_path / "test" / "a" / "zz.png")
    with pytest.raises(UserError, match=r"zz\.png is \(6, 4\), and train.a.00\.png \(4, 6\)"):
        data.load(config)
    (tmp_path / "test" / "a" / "zz.png").unlink()
    (beside := tmp_path / "train" / "zz.png").write_bytes(
        (tmp_path / "train/a/00.png").read_bytes()
    )
    with pytest.raises(UserError, match=r"train.zz\.png is beside the folders of the classes"):
        data.load(config)
    beside.unlink()
    (tmp_path / "test" / "a").rename(tmp_path / "test" / "c")
    with pytest.raises(UserError, match=r"train has no class 'c', and test has"):
        data.load(config)
    (tmp_path / "test").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"test_x is empty.*folders train and test"):
        data.load(config)


@pytest.mark.parametrize(
    ("mode", "dtype", "shape"),
    [("I;16", np.uint16, ()), ("RGBA", np.uint8, (4,)), ("LA", np.uint8, (2,))],
)
def test_what_8_bits_of_colour_cannot_hold_is_not_cut_off(tmp_path, mode, dtype, shape):
    config = _folder(tmp_path, IMAGES[:6])
    Image.fromarray(np.full((6, 4, *shape), 9, dtype)).save(tmp_path / "test" / "a" / "zz.png")
    with pytest.raises(UserError, match=rf"zz\.png is of mode {mode}, .*save it in 8 bits"):
        data.load(config)


def test_a_transparent_colour_is_not_made_opaque(tmp_path):
    config = _folder(tmp_path, IMAGES[:6])
    Image.fromarray(IMAGES[0]).save(tmp_path / "test" / "a" / "zz.png", transparency=9)
    with pytest.raises(UserError, match=r"zz\.png is of mode L, .*transparent"):
        data.load(config)


GOOD = {"train_x": IMAGES, "test_x": IMAGES}
TOKENS = np.arange(90).reshape(30, 3)
TOLD = {**GOOD, "train_labels": LABELS, "test_labels": LABELS}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": IMAGES}, r"an array 'x'"),
        ({"train_x": IMAGES}, r"holds no test_x"),
        ({**GOOD, "test_x": IMAGES[:0]}, r"test_x is empty"),
        ({**GOOD, "train_x": IMAGES.astype(int)}, r"train_x is int64 \(30, 6, 4\)"),
        ({**GOOD, "train_x": IMAGES / 255}, r"train_x is float64 \(30, 6, 4\)"),
        ({**GOOD, "train_x": IMAGES[..., None].repeat(2, -1)}, r"train_x is uint8 \(30, 6, 4, 2\)"),
        ({**GOOD, "test_x": IMAGES[:, :5]}, r"an example of test_x is \(5, 4\)"),
        ({**GOOD, "test_x": VECTORS}, r"an example of test_x is \(3,\)"),
        ({"train_x": IMAGES // 255, "test_x": IMAGES // 255}, r"from 0 to 1.*white is 255"),
        ({"train_x": VECTORS * np.inf, "test_x": VECTORS}, r"train_x holds what is not finite"),
        ({"train_x": TOKENS, "test_x": TOKENS + 1}, r"test_x holds what is no token from 0 to 89"),
        ({"train_x": TOKENS - 1, "test_x": TOKENS}, r"train_x holds what is no token from 0"),
        ({"train_x": TOKENS, "test_x": VECTORS}, r"an example of test_x is \(3,\), and of train_x"),
        ({**GOOD, "train_labels": LABELS}, r"labels of one split alone"),
        ({**TOLD, "train_labels": LABELS[1:]}, r"train_labels is int64 \(29,\)"),
        ({**TOLD, "train_labels": LABELS / 2}, r"train_labels is float64"),
        ({**TOLD, "train_labels": LABELS - 1}, r"train_labels are not whole numbers from 0"),
        ({**TOLD, "test_labels": LABELS + 1}, r"test_labels are not whole numbers from 0 to 2"),
    ],
)
def test_what_is_wrong_is_said_with_what_would_be_right(tmp_path, arrays, words):
    with pytest.raises(UserError, match=rf"data\.path=.*own\.npz.*{words}.*numpy\.savez"):
        _load(tmp_path, **arrays)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"path": ""}, r"data\.path=''.*numpy\.savez"),
        ({"path": "absent.npz"}, r"data\.path='absent\.npz' cannot be read"),
        ({"source": "tfds", "path": "own.npz"}, r"data\.source='tfds'.*a file; choose 'auto'"),
        ({"dataset": "text", "source": "tfds"}, r"data\.source='tfds'.*a file; choose 'auto'"),
        ({"dataset": "mnist", "path": "own.npz"}, r"data\.path='own\.npz' is not read"),
    ],
)
def test_bad_fields(values, words):
    with pytest.raises(UserError, match=words):
        data.load(data.Config(**{"dataset": "arrays", "binarisation": "none", **values}))


def test_vectors_have_no_grey_values(tmp_path):
    with pytest.raises(UserError, match=r"data\.binarisation='dynamic'.*set it to 'none'"):
        _load(tmp_path, binarisation="dynamic", train_x=VECTORS, test_x=VECTORS)
