"""Texts as windows of characters: tiny Shakespeare, or any file of the user's.

A text is cut once: its last tenth is the test split (the convention of nanoGPT), the windows before
that are held out for validation, the rest is trained on. Held-out windows stand side by side;
training windows overlap, each an eighth of its length after the one before.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dgm_jax.core import UserError
from dgm_jax.data import sources, tfds
from dgm_jax.data.sources import Unavailable
from dgm_jax.files import read_bytes, reason

NAMES = ("shakespeare", "text")
_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/"
    "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt"
)
_MOST_BYTES = 2**28  # its windows take some thirty times as much
_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Windows(NamedTuple):
    """A text as tokens.

    Attributes:
      splits: `train`, `validation` and `test`: int32 `[N, T]`, each entry the character's place in
        `alphabet`.
      alphabet: the different characters of the whole text, in order.
      source: `tfds`, `download`, `embedded` or `file`.
      sha256: of the text's UTF-8 bytes.
    """

    splits: dict[str, np.ndarray]
    alphabet: str
    source: str
    sha256: str


def load(
    name: str,
    source: str,
    path: str,
    context: int,
    validation: int,
    announce: Callable[[str], None],
) -> Windows:
    """A text, cut into splits and windows.

    Args:
      name: `shakespeare`, or `text` for the file at `path`.
      source: of `shakespeare`: `tfds`, `download`, `embedded` (the texts of Python's help(), a
        stand-in), or `auto`, the first of these that works.
      path: of the file, in UTF-8.
      context: T, characters of a window.
      validation: number of windows held out of training.
      announce: told, in a line, of a source that was passed over.

    Raises:
      UserError: names the value that is wrong.
    """
    if context < 2:
        raise UserError(f"data.context={context}: a window has at least 2 characters")
    if name == "text":
        where, text = "file", _read_file(path)
    else:
        where, text = sources.first_of(
            name,
            source,
            tuple(_SOURCES),
            lambda where: (where, _SOURCES[where]()),
            lambda found: f"{len(found[1]):,} characters",
            announce,
        )
    return Windows(*_cut(text, context, validation), where, _sha256(text))


def decode(alphabet: str | None, tokens: np.ndarray) -> list[str]:
    """Tokens int `[N, T]` as N texts; as numbers where they are no characters."""
    if alphabet is None:
        return [" ".join(map(str, row)) for row in np.asarray(tokens, np.int32)]
    characters = np.array(list(alphabet))
    return ["".join(characters[row]) for row in np.asarray(tokens, np.int32)]


def _cut(text: str, context: int, validation: int) -> tuple[dict[str, np.ndarray], str]:
    """The splits `[N, T]` of a text, and its alphabet."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    letters, tokens = np.unique(points, return_inverse=True)
    tokens = tokens.astype(np.int32)
    test = int(0.9 * len(tokens))  # where it begins
    held_out = test - validation * context
    if validation < 0:
        raise UserError(f"data.validation={validation}: must be at least 0")
    if len(tokens) - test < context or held_out < context:
        raise UserError(
            f"data.context={context}, data.validation={validation}: the text has "
            f"{len(tokens):,} characters, too few for windows to train, validate and test on"
        )
    strides = {"train": max(1, context // 8), "validation": context, "test": context}
    parts = np.split(tokens, [held_out, test])
    splits = {
        name: _windows(part, context, stride)
        for part, (name, stride) in zip(parts, strides.items(), strict=True)
    }
    return splits, "".join(map(chr, letters))


def _windows(tokens: np.ndarray, context: int, stride: int) -> np.ndarray:
    """Windows `[N, T]` of tokens `[M]`; a rest that fills none is left out."""
    if len(tokens) < context:
        return np.zeros((0, context), tokens.dtype)
    return np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(tokens, context)[::stride])


def _read_file(path: str) -> str:
    if not path:
        raise UserError("data.path='': name the file that data.dataset='text' is to read")
    try:
        return read_bytes(Path(path), _MOST_BYTES).decode()
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.path={path!r} cannot be read ({reason(error)}): name a file in UTF-8"
        ) from error


def _read_tfds() -> str:
    root, named = tfds.root()
    directory = tfds.prepared(root, "tiny_shakespeare")
    if directory is None:
        raise Unavailable(f"no prepared TFDS data set tiny_shakespeare in {root}")
    try:
        with tfds.quiet():
            builder = tfds.builder(directory)
            parts = [builder.as_data_source(s)[0]["text"] for s in ("train", "validation", "test")]
        content = b"".join(parts)
    except Exception as error:
        raise tfds.damage(directory, named, error) from error
    return _checked(content)


def _checked(content: bytes) -> str:
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise Unavailable("what was found is not tiny Shakespeare (its SHA-256 differs)")
    return content.decode()


def _read_embedded() -> str:
    """What Python's help() says of its own language: half a million characters, anywhere."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise Unavailable("this Python has no help texts") from error
    text = "".join(topics[name] for name in sorted(topics))
    return text.encode("ascii", "ignore").decode()


_SOURCES: dict[str, Callable[[], str]] = {
    "tfds": _read_tfds,
    "download": lambda: _checked(sources.download({_URL: _SHA256})[0]),
    "embedded": _read_embedded,
}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
