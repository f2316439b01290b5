"""Images or vectors of one's own, from the arrays of an .npz file."""

from pathlib import Path

import numpy as np

from dgm_jax.core import UserError
from dgm_jax.data.sources import LabelledArrays, fingerprint
from dgm_jax.files import read_arrays, reason

_MOST_BYTES = 2**33
_MOST_CLASSES = 10_000
NAMES = ("train_x", "train_labels", "test_x", "test_labels")
_HINT = (
    "save uint8 images [N, H, W], [N, H, W, 1] or [N, H, W, 3], or float vectors [N, D], by "
    "numpy.savez(path, train_x=..., test_x=...), with labels also train_labels and test_labels"
)


def load(path: str) -> LabelledArrays:
    """What the file at `path` holds; labels are -1 where it holds none.

    Its arrays are `train_x` and `test_x`: uint8 images `[N, H, W]` or `[N, H, W, 1 or 3]`, from
    black 0 to white 255, or float vectors `[N, D]`; and with labels `train_labels` and
    `test_labels`, whole numbers `[N]` from 0.

    Raises:
      UserError: it cannot be read, or holds something else; says what.
    """
    if not path:
        raise UserError(f"data.path='': name the file that data.dataset='arrays' reads: {_HINT}")
    try:
        found = read_arrays(Path(path), _MOST_BYTES)
    except Exception as error:  # a damaged file makes zipfile and numpy raise almost anything
        raise UserError(f"data.path={path!r} cannot be read ({reason(error)}): {_HINT}") from error
    if (wrong := _what_is_wrong(found)) is not None:
        raise UserError(f"data.path={path!r}: {wrong}: {_HINT}")
    arrays = []
    for split in ("train", "test"):
        x = found[f"{split}_x"]
        x = x.astype(np.float32) if x.ndim == 2 else x.reshape(*x.shape[:3], -1)
        labels = found.get(f"{split}_labels", np.full(len(x), -1))
        arrays += [x, labels.astype(np.int32)]
    return LabelledArrays(*arrays, "file", fingerprint(tuple(arrays)))


def _what_is_wrong(found: dict[str, np.ndarray]) -> str | None:
    if unknown := sorted(set(found) - set(NAMES)):
        return f"it holds an array {unknown[0]!r}, which nothing reads"
    if missing := [name for name in ("train_x", "test_x") if name not in found]:
        return f"it holds no {missing[0]}"
    if ("train_labels" in found) != ("test_labels" in found):
        return "it holds labels of one split alone"
    for split in ("train", "test"):
        x = found[f"{split}_x"]
        if not x.size:
            return f"{split}_x is empty"
        is_images = x.dtype == np.uint8 and (x.ndim == 3 or (x.ndim == 4 and x.shape[3] in (1, 3)))
        if not is_images and not (x.dtype.kind == "f" and x.ndim == 2):
            return f"{split}_x is {x.dtype} {x.shape}"
        if not is_images and not np.isfinite(x.astype(np.float32)).all():
            return f"{split}_x holds what is not finite in float32"
        if x.shape[1:] != found["train_x"].shape[1:] or x.dtype.kind != found["train_x"].dtype.kind:
            return f"an example of test_x is {x.shape[1:]}, and of train_x otherwise"
        labels = found.get(f"{split}_labels")
        if labels is None:
            continue
        if labels.dtype.kind not in "iu" or labels.shape != x.shape[:1]:
            return f"{split}_labels is {labels.dtype} {labels.shape}, and {split}_x {x.shape}"
        most = min(int(found["train_labels"].max()), _MOST_CLASSES - 1)
        if labels.min() < 0 or labels.max() > most:
            return f"{split}_labels are not whole numbers from 0 to {most}, the most in training"
    if found["train_x"].dtype == np.uint8 and found["train_x"].max() == 1:
        return "its images go from 0 to 1, which is nearly black: white is 255"
    return None
