"""Two runs side by side: what their configs differ in, their numbers, and the difference.

    python scripts/compare.py runs/vae_mnist runs/mine
    python scripts/compare.py runs/vae_mnist runs/mine --of=evaluation

The difference of what is known of each example is the mean of the differences, ± its standard
error: the examples are the same, so it is smaller than that of either run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dgm_jax import config as configs
from dgm_jax import files, results
from dgm_jax.core import UserError

_MOST_BYTES = 2**32
_DATA = ("sha256", "counts", "binarisation", "seed")  # that two numbers may be compared
_FILES = ("results", "evaluation", "quality", "features", "ais")
_WITH_ARRAYS = _FILES[:2]  # what is known of each example beside them


def compare(first: Path, second: Path) -> str:
    """The text of the comparison of two results, `second` held against `first`.

    Raises:
      UserError: there is no such result, or they are of other data or of another split.
    """
    (a, each_a), (b, each_b) = (_read(path) for path in (first, second))
    for name in ("split", "judge", *_DATA):
        mine, theirs = (r["data"].get(name) if name in _DATA else r.get(name) for r in (a, b))
        if mine != theirs:
            raise UserError(f"numbers that cannot be compared: {name} is {mine}, and {theirs}")
    differ = configs.differences(configs.from_dict(b["config"]), configs.from_dict(a["config"]))
    lines = [
        f"{second} differs from {first} in",
        *(f"  {field}" for field in differ or ["nothing"]),
    ]
    rows = [("", first.parent.name, second.parent.name, "difference", "")]
    for name in (name for name in a["metrics"] if name in b["metrics"]):
        values = [result["metrics"][name]["value"] for result in (a, b)]
        difference = f"{values[1] - values[0]:+.4f}"
        if name in each_a and name in each_b:
            each = np.subtract(each_b[name], each_a[name], dtype=np.float64)
            difference += f" ± {each.std(ddof=1) / np.sqrt(len(each)):.4f}"
        rows.append((name, *map("{:.4f}".format, values), difference, a["metrics"][name]["unit"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in [(), *rows]]
    return "\n".join(lines)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A result, and what is known of each example."""
    if not path.exists():
        raise UserError(f"there is no {path}: train, or measure by --mode=evaluate, first")
    arrays, each = path.with_suffix(".npz"), {}
    if path.stem in _WITH_ARRAYS and arrays.exists():
        with files.reading(arrays, "measure again"):
            each = files.read_arrays(arrays, _MOST_BYTES)
    return results.load(path), each


def main(argv: Sequence[str]) -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path, help="a work directory")
    parser.add_argument("second", type=Path, help="another, held against it")
    parser.add_argument("--of", default="results", choices=_FILES, help="which of their files")
    args = parser.parse_args(argv)
    try:
        print(compare(*(of / f"{args.of}.json" for of in (args.first, args.second))))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
