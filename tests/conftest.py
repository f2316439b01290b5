"""A stricter environment than the user's: eight devices, no implicit rank promotion."""

import os
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

# Before jax is imported anywhere. Compiling takes most of the tests' time: no optimisation, no
# threads, and the emitters that are quickest at it, which XLA had until jaxlib 0.11.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_cpu_parallel_codegen_split_count=1"
)
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest
import tiny

from dgm_jax import sharding

jax.config.update("jax_numpy_rank_promotion", "raise")

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def _no_user_files(tmp_path_factory):
    """The suite neither reads nor writes the user's cache, nor a data set lying about."""
    os.environ["DGM_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("TFDS_DATA_DIR", None)


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory():
    """What one module compiled is of no use to the next, and would fill gigabytes by the end."""
    yield
    jax.clear_caches()


@contextmanager
def on_one_device():
    """One of the eight: what a test of something else than devices need not compile for all."""
    axis = (jax.sharding.AxisType.Auto,)
    one = jax.make_mesh((1,), ("data",), axis_types=axis, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda: one)
        yield


@pytest.fixture(scope="session")
def prepared_tfds() -> Path:
    """A directory of prepared TFDS data sets beside the checkout; skips where there is none."""
    directory = REPO.parent / "shared" / "data" / "tensorflow_datasets"
    if not (directory / "mnist").is_dir():
        pytest.skip("no prepared TFDS data sets beside the checkout")
    return directory


@pytest.fixture(scope="session")
def tiny_dataset():
    """128 + 24 + 24 random grey images of 4x4 pixels, dynamically binarised."""
    return tiny.images()
