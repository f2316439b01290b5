"""Reading files that may be damaged, or made to do harm: a sound value, or one line that says why.

Nothing read here can run code: JSON, and arrays without Python objects in them. Sizes are checked
before anything is allocated. docs/reliability.md says what is trusted, and what is read with this.
"""

import json
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dgm_jax.core import UserError, one_line


@contextmanager
def reading(path: Path, advice: str) -> Iterator[None]:
    """Whatever goes wrong within is said in one line.

    Except for what only code gets wrong: a module that cannot be imported is no damaged file.

    Args:
      path: of the file that is read and looked at within.
      advice: what to do where it is damaged.

    Raises:
      UserError: `path` is damaged, and why.
    """
    try:
        yield
    except (ImportError, NameError, SyntaxError):
        raise
    except Exception as error:  # a damaged file makes json, zipfile and numpy raise almost anything
        raise UserError(f"{path} is damaged ({reason(error)}): {advice}") from error


def reason(error: BaseException) -> str:
    """One short line from any exception."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, UserError):
        return lines[0]
    return one_line(f"{type(error).__name__}: {lines[0]}"[:160].rstrip(": "))


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """The content of a file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no file (but a pipe, or a device, which may never end), or is too large.
    """
    check_size(path, most_bytes)
    return path.read_bytes()


def check_size(path: Path, most_bytes: int) -> None:
    """Refuse what is no file, or is larger than `most_bytes`.

    Raises:
      OSError: it is not there.
      ValueError: says which.
    """
    size = path.stat().st_size  # raises where there is nothing
    if not path.is_file():
        raise ValueError("it is no file")
    if size > most_bytes:
        raise ValueError(f"it has {size:,} bytes, and at most {most_bytes:,} are read")


def read_json(path: Path, most_bytes: int = 2**24) -> Any:
    """The value in a JSON file.

    Raises:
      OSError, ValueError, RecursionError: it cannot be read; see `reading`.
    """
    return parse_json(read_bytes(path, most_bytes))


def parse_json(text: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
      ValueError, RecursionError: it is none, is nested too deep, or could not be written again.
    """
    value = json.loads(text.decode())
    json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no character
    return value


def read_arrays(path: Path, most_bytes: int) -> dict[str, np.ndarray]:
    """The arrays of an .npz file as `np.savez` writes it.

    They are stored and not compressed, so that together they are smaller than the file.

    Args:
      path: of the file.
      most_bytes: of the file.

    Raises:
      Exception: of almost any kind, where it cannot be read; see `reading`.
    """
    check_size(path, most_bytes)
    found = {}
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its arrays are larger than the file")
        for entry in entries:
            with archive.open(entry) as member:
                _check_array(member, entry)
            with archive.open(entry) as member:
                name = entry.filename.removesuffix(".npy")
                found[name] = np.lib.format.read_array(member, allow_pickle=False)
    return found


def _check_array(member: zipfile.ZipExtFile, entry: zipfile.ZipInfo) -> None:
    """Refuse an array that is not as large as its header says: NumPy allocates first."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename} is compressed")
    if np.lib.format.read_magic(member) != (1, 0):
        raise ValueError(f"{entry.filename} is of another version of the format")
    try:
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    except SyntaxError as error:  # from NumPy's own reading of a header, which is a Python literal
        raise ValueError(f"{entry.filename} has no header ({error})") from error
    size = entry.file_size - member.tell()
    if not dtype.itemsize or math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{entry.filename} says that it is {dtype} {shape}, and has {size} bytes")
