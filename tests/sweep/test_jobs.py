"""A sweep's programs as jobs: processes of this machine, and a real SLURM where there is one."""

import csv
import functools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import COMPILING, REPO, preempt

from dgm_jax import config as configs
from dgm_jax.core import UserError
from dgm_jax.interruption import TRY_AGAIN, Interrupted
from dgm_jax.sweep import jobs
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
    "data.validation": 0,
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


def test_programs_run_side_by_side_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", COMPILING)  # one device
    sweep.run_sweep(tmp_path / "sweep", _config(), MEMBERS, launcher="local;parallel=2")
    assert _finished(tmp_path / "sweep") == BOTH
    assert len(list((tmp_path / "sweep/jobs").glob("*_submitted.pkl"))) == 2
    # Nothing is left: called again, no job is submitted.
    sweep.run_sweep(tmp_path / "sweep", _config(), MEMBERS, launcher="local")
    assert len(list((tmp_path / "sweep/jobs").glob("*_submitted.pkl"))) == 2


def test_programs_run_one_after_another_where_nobody_says_how_many(tmp_path, monkeypatch):
    text = f"echo begins >> {tmp_path}/log; sleep 0.5; echo ends >> {tmp_path}/log"
    monkeypatch.setattr(
        jobs, "Job", lambda *args: functools.partial(subprocess.call, ["sh", "-c", text])
    )
    left = iter([[0, 1], [0, 1], []])
    jobs.run(tmp_path, lambda: next(left), "local")
    assert (tmp_path / "log").read_text().split() == ["begins", "ends"] * 2


@pytest.mark.parametrize(
    ("launcher", "says"),
    [
        ("cloud", "choose local or slurm"),
        ("local;no_such_option=1", "Unknown executor 'no'"),
        ("local;timeout_min=2h", 'but value: "2h"'),
        ("local;stderr_to_stdout=yes", 'but value: "yes"'),
        ("local;nodes=2", "only one node"),
        ("local;parallel=0", "parallel=0 is no number"),
    ],
)
def test_a_launcher_that_is_none_is_refused(launcher, says, tmp_path):
    with pytest.raises(UserError, match=f"--launcher='{launcher}': .*{says}"):
        jobs.run(tmp_path, lambda: [0], launcher)


def test_the_values_of_a_launcher_are_pythons():
    values = {
        "mem_gb": 7.5,
        "timeout_min": 30,
        "stderr_to_stdout": True,
        "slurm_setup": ["module load cuda"],
        "slurm_time": "2:00:00",
        "slurm_partition": "gpu",
    }
    assert jobs._parse("; ".join(f"{name}={value}" for name, value in values.items())) == values


def test_a_program_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="--program=2: this sweep has the programs 0 to 1"):
        sweep.run_sweep(tmp_path / "sweep", _config(), MEMBERS, only=2)


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """A SLURM of scripts: `squeue` answers with a line of the file `queue` after the other."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "srun": "",
        "sbatch": f"cat {tmp_path}/queue >> {tmp_path}/before; echo Submitted batch job 8",
        "squeue": f"head -n 1 {tmp_path}/queue; sed -i 1d {tmp_path}/queue",
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(jobs, "_PAUSE", 0.0)
    return tmp_path


def test_jobs_that_a_cluster_refuses(pretended):
    says = "echo 'sbatch: error: invalid partition specified: nosuch' >&2; exit 1"
    (pretended / "bin/sbatch").write_text(f"#!/bin/sh\n{says}\n")
    launcher = "slurm;slurm_partition=nosuch"
    with pytest.raises(UserError, match=f"--launcher='{launcher}': .*invalid partition"):
        jobs.run(pretended / "sweep", lambda: [0], launcher)


def test_jobs_of_a_cluster_go_on_and_the_same_command_waits_for_them(
    pretended, monkeypatch, capsys
):
    folder, queue = pretended / "sweep", pretended / "queue"

    def interrupt(seconds):
        queue.write_text("8_0 8_1 5_0\n")
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(jobs.time, "sleep", interrupt)
        with pytest.raises(Interrupted, match=r"SIGTERM: 2 jobs go on.*scancel 8 ends") as stopped:
            jobs.run(folder, lambda: [0, 1], "slurm")
    assert stopped.value.status == TRY_AGAIN
    queue.write_text(2 * "8_1 5_0\n")
    left = iter([[0, 1], [0], []])  # 8_0 has failed
    jobs.run(folder, lambda: next(left), "slurm")
    said = [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert [line for line in said if not line.startswith("jobs")] == [
        "submitted   2 jobs",
        "waiting     for 1 jobs of an earlier command",
        "submitted   1 jobs",
    ]
    assert (pretended / "before").read_text() == ""  # nothing was at work when jobs were submitted


def test_processes_of_this_machine_are_stopped_with_the_command(tmp_path, monkeypatch):
    sleeping = functools.partial(subprocess.call, ["sleep", "600"])
    monkeypatch.setattr(jobs, "Job", lambda *args: sleeping)
    sleep, told = time.sleep, []

    def interrupt(seconds):
        sleep(seconds)
        if seconds == 1.0 and not told:  # they were waited for
            told.append(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(jobs.time, "sleep", interrupt)
    with pytest.raises(Interrupted, match="SIGINT: the same command goes on"):
        jobs.run(tmp_path, lambda: [0, 1], "local;parallel=2")
    pids = [int(path.name.partition("_")[0]) for path in tmp_path.glob("jobs/*_submitted.pkl")]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def _trainer(folder, told):
    """A program that waits to be told to stop; `told` are the lines of what it does then."""
    path = folder / "trainer"
    path.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, signal, sys, time\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "def write(name, text):\n"
        "    (folder / 'part').write_text(text)\n"
        "    (folder / 'part').rename(folder / name)\n"
        "def save(*_):\n"
        f"{told}"
        f"    os._exit({TRY_AGAIN})\n"
        "if (folder / 'saved').exists():\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "os.kill(os.getpid(), signal.SIGUSR2)\n"
        "write('started', f'{os.getppid()} {os.getpid()}')\n"
        "time.sleep(60)\n"
    )
    path.chmod(0o755)
    return [str(path)]


def _comes(path):
    due = time.monotonic() + 60
    while not path.exists() and time.monotonic() < due:
        time.sleep(0.05)
    return path.exists()


@pytest.mark.parametrize("on_cluster", [False, True])
def test_a_process_saves_though_the_one_that_waits_for_it_is_killed(tmp_path, on_cluster):
    """As submitit does it: Ctrl-C, and a second later no mercy. A cluster tells both itself."""
    told = (
        "    (folder / 'told').open('a').write('once ')\n"
        "    time.sleep(1.5)\n"
        "    write('saved', os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    waiting = (
        "import os\n"
        "from dgm_jax.sweep.jobs import Job\n"
        "os.environ['CUDA_VISIBLE_DEVICES'] = '0,1'\n"
        f"job = Job({_trainer(tmp_path, told)}, {on_cluster})\n"
        "os.environ['CUDA_VISIBLE_DEVICES'] = ''\n"
        "job()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", waiting], stderr=subprocess.DEVNULL)
    assert _comes(tmp_path / "started")
    process.send_signal(signal.SIGINT)
    if on_cluster:
        os.kill(int((tmp_path / "started").read_text().split()[1]), signal.SIGTERM)
    time.sleep(1.0)
    process.kill()
    process.wait()
    assert _comes(tmp_path / "saved")
    assert (tmp_path / "saved").read_text() == ("" if on_cluster else "0,1")
    assert (tmp_path / "told").read_text() == "once "


def test_a_job_at_its_time_limit_saves_and_goes_on(tmp_path):
    """By submitit's own signal, of which no trainer dies."""
    command = _trainer(tmp_path, "    write('saved', '')\n")
    executor, _ = jobs._executor("local", tmp_path / "jobs")
    job = executor.submit(jobs.Job(command, on_cluster=False))
    assert _comes(tmp_path / "started")
    os.kill(int((tmp_path / "started").read_text().split()[0]), signal.SIGUSR2)
    job.result()
    assert (tmp_path / "saved").exists()
    assert "Requeued job" in job.stdout()


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
