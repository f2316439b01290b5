"""A stricter environment than the user's: eight devices, no implicit rank promotion."""

import os
from pathlib import Path

# Before jax is imported anywhere.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def _no_user_files(tmp_path_factory):
    """The suite neither reads nor writes the user's cache, nor a data set lying about."""
    os.environ["DGM_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("TFDS_DATA_DIR", None)


@pytest.fixture(scope="session")
def prepared_tfds() -> Path:
    """A directory of prepared TFDS data sets beside the checkout; skips where there is none."""
    directory = REPO.parent / "shared" / "data" / "tensorflow_datasets"
    if not (directory / "mnist").is_dir():
        pytest.skip("no prepared TFDS data sets beside the checkout")
    return directory
