"""`results.json`: numbers, and all that is needed to know what they are about."""

import functools
import importlib.metadata
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dgm_jax import config as configs
from dgm_jax import files, workdir
from dgm_jax.data.dataset import Dataset, checked_card
from dgm_jax.evaluators.likelihood import Measured
from dgm_jax.metrics import Metric
from dgm_jax.train_state import num_parameters
from dgm_jax.trained_model import Trained

SCHEMA = 1
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml-collections", "numpy")


def write(
    path: Path,
    trained: Trained,
    dataset: Dataset,
    metrics: Mapping[str, Metric],
    *,
    seconds: Mapping[str, float],
    written: Sequence[str],
    split: str = "test",
    per_example: Mapping[str, np.ndarray] | None = None,
    speed: Mapping[str, float] | None = None,
    texts: Sequence[str] = (),
    judge: str | None = None,
) -> dict[str, Any]:
    """Write a result by the schema in `docs/results_schema.md`, and return it.

    Args:
      path: of the JSON file, which is written last.
      trained: the model.
      dataset: what it was measured on.
      metrics: what was measured.
      seconds: wall-clock time by part.
      written: names of the files written, relative to the work directory.
      split: the split measured on.
      per_example: the same of each example; goes beside `path`, with the suffix `.npz`.
      speed: of training, where it was measured.
      texts: a few samples, where they are texts.
      judge: whose features were measured, where the metrics are of features.
    """
    written = [*written, path.name]
    if per_example is not None:
        arrays = path.with_suffix(".npz")
        workdir.write(arrays, lambda file: np.savez(file, **per_example))
        written = [*dict.fromkeys([*written, arrays.name])]  # once, also after an interruption
    result = {
        "schema": SCHEMA,
        "split": split,
        "step": trained.step,
        "metrics": {name: metric._asdict() for name, metric in metrics.items()},
        "data": dataset.card,
        "config": trained.config.to_dict(),
        "num_parameters": num_parameters(trained.params),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "speed": speed,
        "peak_memory_mib": round(_peak_memory_mib()),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "git_revision": git_revision(),
        "files": written,
    }
    if texts:
        result["samples"] = list(texts)
    if judge:
        result["judge"] = judge
    workdir.write_json(path, result)
    return result


def write_measured(
    path: Path, trained: Trained, dataset: Dataset, found: Measured, **about: Any
) -> dict[str, Any]:
    """`write`, of what was measured on `eval.split`, for each example as well."""
    split, each = trained.config.eval.split, found.per_example
    return write(path, trained, dataset, found.metrics, split=split, per_example=each, **about)


def load(path: Path) -> dict[str, Any]:
    """A result that was written before, by whomever.

    Raises:
      UserError: it is none: what `write` says of its fields does not hold.
    """
    with files.reading(path, "measure again, or take it away"):
        result = files.read_json(path)
        if result["schema"] != SCHEMA:
            raise ValueError(f"its schema is {result['schema']!r} instead of {SCHEMA}")
        checked_card(result["data"])
        configs.from_dict(result["config"])
        numbers = {"step": result["step"], **result["seconds"]}
        numbers |= {name: metric["value"] for name, metric in result["metrics"].items()}
        for name, number in numbers.items():
            if type(number) not in (int, float):
                raise ValueError(f"{name} is no number")
            float(number)  # raises where it is too large for one
        return result


@functools.cache
def git_revision() -> str | None:
    """The commit of this checkout when first asked, with `-dirty` where files differ or are new.

    None outside git, also where this is installed within somebody else's checkout.
    """
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        dirty = "-dirty" if git("status", "--porcelain", ".") else ""
        return git("rev-parse", "HEAD") + dirty
    except (OSError, subprocess.SubprocessError):
        return None


def _peak_memory_mib() -> float:
    # On Linux getrusage would count the parent's memory from before exec; macOS counts in bytes.
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
