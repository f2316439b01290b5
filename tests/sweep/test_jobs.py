"""A sweep's programs as jobs: processes of this machine, and a real SLURM where there is one."""

import csv
import subprocess
import threading
import time

import pytest
from conftest import REPO, preempt

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


def test_a_preempted_job_of_a_cluster_is_queued_again_and_resumes(slurm, tmp_path):
    folder = tmp_path / "sweep"
    longer = {"train.duration": "3000 steps", "train.checkpoint_every": "100 steps"}

    def preempt_first():
        """As soon as it has saved a checkpoint."""
        while not list(folder.glob("programs/*/200")):
            time.sleep(0.1)
        running = subprocess.run(["squeue", "-h", "-t", "R", "-o", "%A"], capture_output=True)
        preempted.append(running.stdout.decode().split()[0])
        preempt(preempted[0])

    preempted: list[str] = []
    threading.Thread(target=preempt_first, daemon=True).start()
    config = configs.override(_config(), longer)
    sweep.run_sweep(folder, config, MEMBERS, launcher="slurm;cpus_per_task=1;slurm_nodelist=n0")
    assert preempted
    assert _finished(folder) == [("3", "finished", "3000"), ("4", "finished", "3000")]
    logs = "".join(path.read_text() for path in (folder / "jobs").glob("*_log.out"))
    assert "resumed     program 1 of 2 from step" in logs
