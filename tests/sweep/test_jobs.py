"""A sweep's programs as jobs: processes of this machine, and a real SLURM where there is one."""

import csv
import os
import shutil
import subprocess
import threading
import time

import pytest
from conftest import REPO

from dgm_jax import config as configs
from dgm_jax.core import UserError
from dgm_jax.sweep import run as sweep

pytest.importorskip("submitit", reason="submitit is not installed")
TINY = {
    "train.duration": "40 steps",
    "train.steps_per_dispatch": 10,
    "train.validate_every": "20 steps",
    "train.checkpoint_every": "10 steps",
    "train.batch_size": 16,
    "eval.num_samples": 4,
    "eval.elbo_samples": 1,
    "eval.batch_size": 96,
    "eval.aggregate_examples": 0,
    "model.encoder": (8,),
    "model.decoder": (8,),
    "model.prior": "standard",
    "model.objective": "elbo",
}
MEMBERS = [{"model.latents": 3}, {"model.latents": 4}]


def _config():
    return configs.load(str(REPO / "configs/vae_mnist.py:smoke"), TINY)


def _finished(folder):
    with (folder / "sweep.csv").open() as file:
        return [(row["model.latents"], row["status"], row["step"]) for row in csv.DictReader(file)]


BOTH = [("3", "finished", "40"), ("4", "finished", "40")]


def test_programs_run_side_by_side_on_this_machine(tmp_path):
    sweep.run_sweep(tmp_path / "sweep", _config(), MEMBERS, launcher="local")
    assert _finished(tmp_path / "sweep") == BOTH
    assert len(list((tmp_path / "sweep/jobs").glob("*_submitted.pkl"))) == 2
    # Nothing is left: called again, no job is submitted.
    sweep.run_sweep(tmp_path / "sweep", _config(), MEMBERS, launcher="local")
    assert len(list((tmp_path / "sweep/jobs").glob("*_submitted.pkl"))) == 2


@pytest.mark.parametrize("launcher", ["cloud", "slurm;no_such_option=1"])
def test_a_launcher_that_is_none_is_refused(launcher, tmp_path):
    with pytest.raises(UserError, match=f"--launcher='{launcher}'"):
        sweep.run_sweep(tmp_path / "sweep", _config(), MEMBERS, launcher=launcher)


def test_a_program_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="--program=2: this sweep has the programs 0 to 1"):
        sweep.run_sweep(tmp_path / "sweep", _config(), MEMBERS, only=2)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A SLURM of one node with daemons of our own; needs Debian's slurm-wlm and munge, and root."""
    programs = ("munged", "slurmctld", "slurmd", "sbatch")
    missing = [name for name in programs if not shutil.which(name, path="/usr/sbin:/usr/bin")]
    if missing or os.geteuid() != 0:
        pytest.skip(f"no SLURM here (missing: {', '.join(missing) or 'root'})")
    host = os.uname().nodename
    config = tmp_path / "slurm.conf"
    config.write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
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
SlurmdPidFile={tmp_path}/slurmd.pid
SlurmdSpoolDir={tmp_path}/spool
StateSaveLocation={tmp_path}/state
KillWait=5
NodeName=localhost NodeAddr=127.0.0.1 Port=7011 CPUs=1
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""
    )
    monkeypatch.setenv("SLURM_CONF", str(config))
    monkeypatch.setenv("PATH", "/usr/sbin:" + os.environ["PATH"])
    key = tmp_path / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    munged = ["munged", "-F", "-f", f"--key-file={key}", f"--socket={tmp_path}/munge.socket"]
    munged += [f"--{name}-file={tmp_path}/munge.{name}" for name in ("pid", "log", "seed")]
    commands = [munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"]]
    daemons = []
    with (tmp_path / "daemons.log").open("w") as log:
        for command in commands:
            daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
            time.sleep(1.0)
        yield
        subprocess.run(["scancel", "--user=root"], check=False)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)


def test_a_preempted_job_of_a_cluster_is_queued_again_and_resumes(slurm, tmp_path):
    folder = tmp_path / "sweep"
    longer = {"train.duration": "3000 steps", "train.checkpoint_every": "100 steps"}

    def preempt():
        """Take away the first job as soon as it has saved a checkpoint, and let it start again."""
        while not list(folder.glob("programs/*/200")):
            time.sleep(0.1)
        running = subprocess.run(["squeue", "-h", "-t", "R", "-o", "%A"], capture_output=True)
        job = running.stdout.decode().split()[0]
        subprocess.run(["scontrol", "requeue", job], check=True)
        preempted.append(job)
        for _ in range(60):  # SLURM would let it wait for two minutes
            time.sleep(1.0)
            subprocess.run(
                ["scontrol", "update", f"jobid={job}", "starttime=now"],
                capture_output=True,
                check=False,
            )

    preempted: list[str] = []
    threading.Thread(target=preempt, daemon=True).start()
    config = configs.override(_config(), longer)
    sweep.run_sweep(folder, config, MEMBERS, launcher="slurm;cpus_per_task=1")
    assert preempted
    assert _finished(folder) == [("3", "finished", "3000"), ("4", "finished", "3000")]
    logs = "".join(path.read_text() for path in (folder / "jobs").glob("*_log.out"))
    assert "resumed     program 1 of 2 from step" in logs
