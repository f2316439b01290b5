"""Where data come from: the first source that has them, and downloads that are checked."""

import hashlib
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from dgm_jax.core import UserError
from dgm_jax.files import reason

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

_TIMEOUT_SECONDS = 5.0  # to connect, and between two pieces of an answer


class LabelledArrays(NamedTuple):
    """A data set in memory, with labels where it has them.

    Attributes:
      train_x: images uint8 `[N, H, W, C]`, 0 to 255, or vectors float32 `[N, D]`. Those of
        `image_sets` are in canonical order, which is sorted: shuffle before taking a part.
      train_labels: int32 `[N]`, from 0; -1 where there are none.
      test_x: the same, `[M, ...]`.
      test_labels: int32 `[M]`.
      source: `"tfds"`, `"download"` (both complete), `"embedded"` (4,500 and 500 of MNIST's
        training images: a stand-in, its test numbers are not MNIST's), `"generator"` or `"file"`.
      sha256: hex fingerprint of the four arrays; equal exactly when they are.
    """

    train_x: np.ndarray
    train_labels: np.ndarray
    test_x: np.ndarray
    test_labels: np.ndarray
    source: str
    sha256: str


def fingerprint(arrays: Arrays) -> str:
    """SHA-256 in hex of the types, shapes and values."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


class Unavailable(UserError):
    """A source cannot be had here, why; `"auto"` goes on to the next one."""


def first_of(
    name: str,
    source: str,
    possible: tuple[str, ...],
    load_from: Callable[[str], Any],
    sizes: Callable[[Any], str],
    announce: Callable[[str], None],
) -> Any:
    """A data set from the named source, or with `"auto"` from the first that works.

    Args:
      name: of the data set.
      source: one of `possible`, or `"auto"`.
      possible: in the order in which they are tried.
      load_from: reads it from one of them; raises `Unavailable` where that is not there.
      sizes: says in a few words how large what was found is.
      announce: told, in a line, of a source that was passed over.

    Raises:
      UserError: the source is none of these, or is not to be had.
    """
    choices = f"auto, {', '.join(possible)}"
    if source != "auto" and source not in possible:
        raise UserError(f"data.source={source!r}: for {name} choose one of {choices}")
    reasons = []
    for where in possible if source == "auto" else [source]:
        try:
            found = load_from(where)
        except Unavailable as error:
            reasons.append(str(error))
            cause = error
            continue
        if reasons:
            why = ", and ".join(reasons)
            announce(f"{name}: {why}: using source {where!r} ({sizes(found)})")
        return found
    if len(possible) > 1:
        advice = f"mend this or take another source of {choices}"
    else:
        advice = (
            f"prepare it with 'tfds build {name} --file_format=array_record' (which takes "
            "TensorFlow and a network), or set TFDS_DATA_DIR to where it is"
        )
    raise UserError(f"data source {source!r}: {', and '.join(reasons)}; {advice}") from cause


def download(sha256: dict[str, str]) -> list[bytes]:
    """The content of files, by address, each checked against its SHA-256 in hex.

    Raises:
      Unavailable: no answer, or another content.
    """
    import pooch

    first = next(iter(sha256))
    if not host_answers(first):
        raise Unavailable(f"the download failed (no answer from {urlsplit(first).netloc})")
    pooch.get_logger().setLevel("ERROR")
    get = pooch.HTTPDownloader(timeout=_TIMEOUT_SECONDS, progressbar=sys.stderr.isatty())
    with tempfile.TemporaryDirectory() as folder:
        try:
            return [
                Path(pooch.retrieve(url, known, path=folder, downloader=get)).read_bytes()
                for url, known in sha256.items()
            ]
        except Exception as error:
            raise Unavailable(f"the download failed ({reason(error)})") from error


def host_answers(url: str) -> bool:
    """Whether the download's host answers within the time-out.

    A connection's time-out does not bound the look-up of a name, and holds for each of a host's
    many addresses anew; hence a thread, and one bound on everything it does.
    """
    import requests

    answers = []

    def ask() -> None:
        with suppress(Exception):  # whatever it is, there was no answer
            answers.append(requests.head(url, timeout=_TIMEOUT_SECONDS))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_TIMEOUT_SECONDS)
    return bool(answers)
