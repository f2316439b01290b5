"""A stricter environment than the user's: eight devices, no implicit rank promotion."""

import gc
import os
import shutil
import signal
import subprocess
import time
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
# Tracing takes most of the rest: no tracebacks in programs, and below no garbage collected.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["JAX_PLATFORMS"] = "cpu"
# Each of several workers, and what they start: more threads than cores wait for one another.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import jax
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache

from dgm_jax import sharding

jax.config.update("jax_numpy_rank_promotion", "raise")
assert jax.device_count() == 8  # JAX has started: no test does it with other flags
gc.disable()  # `_bounded_memory` collects

REPO = Path(__file__).resolve().parent.parent
# Of a process of its own: the same programs, on one device.
COMPILING = os.environ["XLA_FLAGS"].partition(" ")[2]


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
    gc.collect()


@pytest.fixture(scope="module")
def programs_kept(tmp_path_factory):
    """For a module that makes many runs of one config: a program is compiled once, then read."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    compilation_cache.reset_cache()
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def _usual_handlers():
    """Whatever the tests were started with: a shell's background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def on_devices(num: int):
    """So many of the eight, whoever asks for how many."""
    mesh = sharding.make_mesh(num)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda num=None: mesh)
        yield


def on_one_device():
    """What a test of something else than devices need not compile for all."""
    return on_devices(1)


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


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A SLURM of two nodes, both this machine, with daemons of our own.

    Needs Debian's slurm-wlm and munge, and root.
    """
    programs = ("munged", "slurmctld", "slurmd", "sbatch")
    missing = [name for name in programs if not shutil.which(name, path="/usr/sbin:/usr/bin")]
    if missing or os.geteuid() != 0:
        pytest.skip(f"no SLURM here (missing: {', '.join(missing) or 'root'})")
    config = tmp_path / "slurm.conf"
    config.write_text(
        f"""ClusterName=test
SlurmctldHost={os.uname().nodename}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={tmp_path}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
ReturnToService=2
SlurmctldPort=6927
SlurmctldPidFile={tmp_path}/slurmctld.pid
SlurmdPidFile={tmp_path}/slurmd-%n.pid
SlurmdSpoolDir={tmp_path}/spool-%n
StateSaveLocation={tmp_path}/state
KillWait=60
NodeName=n[0-1] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[7011-7012] CPUs=1
PartitionName=main Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP
"""
    )
    monkeypatch.setenv("SLURM_CONF", str(config))
    monkeypatch.setenv("PATH", "/usr/sbin:" + os.environ["PATH"])
    key = tmp_path / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    munged = ["munged", "-F", "-f", f"--key-file={key}", f"--socket={tmp_path}/munge.socket"]
    munged += [f"--{name}-file={tmp_path}/munge.{name}" for name in ("pid", "log", "seed")]
    nodes = [["slurmd", "-D", "-N", name] for name in ("n0", "n1")]
    daemons = []
    with (tmp_path / "daemons.log").open("w") as log:
        for command in (munged, ["slurmctld", "-D"], *nodes):
            daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
            time.sleep(1.0)
        yield
        subprocess.run(["scancel", "--user=root"], check=False)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)


def preempt(job: str) -> None:
    """Take a job of that SLURM away, and let it start again without the two minutes' wait."""
    subprocess.run(["scontrol", "requeue", job], check=True)
    for _ in range(60):
        time.sleep(1.0)
        subprocess.run(
            ["scontrol", "update", f"jobid={job}", "starttime=now"],
            capture_output=True,
            check=False,
        )
