"""Data of one's own: images, vectors or tokens in an .npz file, or folders of images."""

from pathlib import Path

import numpy as np

from dgm_jax.core import UserError
from dgm_jax.data.sources import LabelledArrays, fingerprint
from dgm_jax.files import read_arrays, reason
from dgm_jax.progress import Progress

_MOST_BYTES = 2**33
_MOST_CLASSES = 10_000
MOST_TOKENS = 2**20  # of a vocabulary
NAMES = ("train_x", "train_labels", "test_x", "test_labels")
_HINT = (
    "save uint8 images [N, H, W], [N, H, W, 1] or [N, H, W, 3], float vectors [N, D], or tokens "
    "[N, T], whole numbers from 0, by numpy.savez(path, train_x=..., test_x=...), with labels also "
    "train_labels and test_labels; or give a folder with the images in its folders train and test, "
    "or in one there for each class"
)
_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # Pillow's names of what 8 bits of RGB can hold
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def load(path: str) -> LabelledArrays:
    """What the file or folder at `path` holds; labels are -1 where it holds none.

    A file's arrays are `train_x` and `test_x`: uint8 images `[N, H, W]` or `[N, H, W, 1 or 3]`,
    from black 0 to white 255, float vectors `[N, D]`, or tokens `[N, T]`, whole numbers from 0; and
    with labels `train_labels` and `test_labels`, whole numbers `[N]` from 0.

    A folder holds images of one size in `train` and `test`, or there in a folder for each class,
    which are numbered in the order of their names. They have 8 bits, without transparency, and are
    grey if all of them are.

    Raises:
      UserError: it cannot be read, or holds something else; says what.
    """
    if not path:
        raise UserError(f"data.path='': name the file that data.dataset='arrays' reads: {_HINT}")
    try:
        where = Path(path)
        found = _read_folder(where) if where.is_dir() else read_arrays(where, _MOST_BYTES)
    except Exception as error:  # a damaged file makes zipfile and numpy raise almost anything
        raise UserError(f"data.path={path!r} cannot be read ({reason(error)}): {_HINT}") from error
    if (wrong := _what_is_wrong(found)) is not None:
        raise UserError(f"data.path={path!r}: {wrong}: {_HINT}")
    arrays = []
    for split in ("train", "test"):
        x = found[f"{split}_x"]
        if (kind := _kind(x)) == "images":
            x = x.reshape(*x.shape[:3], -1)
        else:
            x = x.astype(np.int32 if kind == "tokens" else np.float32)
        labels = found.get(f"{split}_labels", np.full(len(x), -1))
        arrays += [x, labels.astype(np.int32)]
    return LabelledArrays(*arrays, "file", fingerprint(tuple(arrays)))


def _read_folder(folder: Path) -> dict[str, np.ndarray]:
    """The arrays that a file would hold.

    Raises:
      ValueError, OSError: it does not hold such images; says which is wrong.
    """
    from PIL import Image  # where it is needed: few data sets are folders

    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    paths = {
        split: sorted(p for p in (folder / split).rglob("*") if p.suffix.lower() in _SUFFIXES)
        for split in ("train", "test")
    }
    all_paths = [path for of_split in paths.values() for path in of_split]
    colours, size = set(), (0, 0)
    with Progress("looking at images", len(all_paths)) as progress:
        for path in all_paths:
            with Image.open(path) as image:  # its header
                this, first = (each.relative_to(folder) for each in (path, all_paths[0]))
                if image.mode not in _MODES or "transparency" in image.info:
                    raise ValueError(
                        f"{this} is of mode {image.mode}, with more than 8 bits or transparent: "
                        "save it in 8 bits, grey or RGB"
                    )
                if classes and len(this.parts) < 3:
                    raise ValueError(f"{this} is beside the folders of the classes, in none")
                colours.add(image.mode)
                size = size if any(size) else image.size
                if image.size != size:
                    raise ValueError(f"{this} is {image.size}, and {first} {size}")
            progress.advance(1)
    mode, found = "L" if colours <= {"1", "L"} else "RGB", {}
    if (num_bytes := len(all_paths) * size[0] * size[1] * len(mode)) > _MOST_BYTES:
        raise ValueError(f"its images have {num_bytes:,} bytes, more than {_MOST_BYTES:,}")
    with Progress("reading images", len(all_paths)) as progress:
        for split, of_split in paths.items():
            images = []
            for path in of_split:
                with Image.open(path) as image:
                    images.append(np.asarray(image.convert(mode)))
                progress.advance(1)
            found[f"{split}_x"] = np.array(images, np.uint8)
            if classes:
                names = [path.relative_to(folder / split).parts[0] for path in of_split]
                if unknown := set(names) - set(classes):
                    raise ValueError(f"train has no class {min(unknown)!r}, and {split} has")
                numbers = [classes.index(name) for name in names]
                found[f"{split}_labels"] = np.array(numbers, np.int32)
    return found


def _kind(x: np.ndarray) -> str | None:
    """What an array holds; None where it is nothing of the kind."""
    if x.ndim == 2:
        return {"f": "vectors", "i": "tokens", "u": "tokens"}.get(x.dtype.kind)
    is_images = x.dtype == np.uint8 and (x.ndim == 3 or (x.ndim == 4 and x.shape[3] in (1, 3)))
    return "images" if is_images else None


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
        if (kind := _kind(x)) is None:
            return f"{split}_x is {x.dtype} {x.shape}"
        if kind == "vectors" and not np.isfinite(x.astype(np.float32)).all():
            return f"{split}_x holds what is not finite in float32"
        if x.shape[1:] != found["train_x"].shape[1:] or kind != _kind(found["train_x"]):
            return f"an example of test_x is {x.shape[1:]}, and of train_x otherwise"
        most = min(int(found["train_x"].max()), MOST_TOKENS - 1) if kind == "tokens" else 0
        if kind == "tokens" and (x.min() < 0 or x.max() > most):
            return f"{split}_x holds what is no token from 0 to {most}, the most in training"
        labels = found.get(f"{split}_labels")
        if labels is None:
            continue
        if labels.dtype.kind not in "iu" or labels.shape != x.shape[:1]:
            return f"{split}_labels is {labels.dtype} {labels.shape}, and {split}_x {x.shape}"
        most = min(int(found["train_labels"].max()), _MOST_CLASSES - 1)
        if labels.min() < 0 or labels.max() > most:
            return f"{split}_labels are not whole numbers from 0 to {most}, the most in training"
    if _kind(found["train_x"]) == "images" and found["train_x"].max() == 1:
        return "its images go from 0 to 1, which is nearly black: white is 255"
    return None
