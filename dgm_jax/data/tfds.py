"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow."""

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dgm_jax import files
from dgm_jax.core import UserError
from dgm_jax.data.sources import Unavailable

# What a data set may consist of, by TFDS's class, each with the field that describes it.
_FEATURES = {
    "tensorflow_datasets.core.features.image_feature.Image": "image",
    "tensorflow_datasets.core.features.class_label_feature.ClassLabel": "classLabel",
    "tensorflow_datasets.core.features.text_feature.Text": "text",
}
_WHOLE = {"tensorflow_datasets.core.features.features_dict.FeaturesDict": "featuresDict"}


def root() -> tuple[Path, bool]:
    """The directory of TFDS's data sets, and whether the user named it.

    Raises:
      UserError: TFDS_DATA_DIR names a directory that is not there.
    """
    named = os.environ.get("TFDS_DATA_DIR")
    path = Path(named or "~/tensorflow_datasets").expanduser().resolve()
    if named and not path.is_dir():
        raise UserError(f"TFDS_DATA_DIR: there is no directory {path}; correct it or unset it")
    return path, bool(named)


def prepared(root: Path, name: str) -> Path | None:
    """The directory of the newest version of a data set under TFDS's directory `root`."""
    found = [d for d in root.glob(f"{name}/*/") if re.fullmatch(r"\d+\.\d+\.\d+", d.name)]
    return max(found, key=lambda d: [int(part) for part in d.name.split(".")], default=None)


def damage(directory: Path, named: bool, error: Exception) -> UserError:
    """What to raise: only a prepared data set that the user did not name may be passed over."""
    fault = f"the TFDS data set in {directory} is damaged ({files.reason(error)})"
    if named:
        return UserError(f"{fault}; prepare it again, or unset TFDS_DATA_DIR")
    return Unavailable(fault)


def builder(directory: Path) -> Any:
    """TFDS's builder of a prepared data set.

    Raises:
      Exception: of almost any kind, where it is damaged.
    """
    import tensorflow_datasets as tfds

    # TFDS imports whatever module its features name, which could be one that came with the data.
    whole = files.read_json(directory / "features.json")
    parts = whole["featuresDict"]["features"].values()
    for feature, known in ((whole, _WHOLE), *((part, _FEATURES) for part in parts)):
        kind = feature["pythonClassName"]
        if kind not in known or feature.keys() - {"pythonClassName", "description", known[kind]}:
            raise ValueError(f"features.json: {kind!r} is not read, or not so described")
    files.check_size(directory / "dataset_info.json", 2**24)
    return tfds.builder_from_directory(directory)


@contextmanager
def quiet() -> Iterator[None]:
    """No log lines below errors, and no warnings, from other people's imports and reads."""
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def prepare(root: Path, name: str) -> None:
    """TFDS's own preparation, in a process of its own: TensorFlow would take this one's GPU.

    Raises:
      Unavailable: it failed, why.
    """
    code = (
        "import sys, tensorflow_datasets as tfds; "
        "tfds.builder(sys.argv[1], data_dir=sys.argv[2], file_format='array_record')"
        ".download_and_prepare(file_format='array_record')"
    )
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", code, name, str(root)]
    try:
        subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=True)
    except subprocess.SubprocessError as error:
        output = str(getattr(error, "stderr", None) or "").strip() or str(error)
        why = output.splitlines()[-1][:160]
        raise Unavailable(f"TFDS could not prepare {name} in {root} ({why})") from error
