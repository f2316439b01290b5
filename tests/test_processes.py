"""Several real processes on loopback make the run that one makes, and none outlives another."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import jax
import joined
import numpy as np
import pytest
from conftest import COMPILING, REPO, preempt

from dgm_jax import config as configs
from dgm_jax import processes, sharding, train, writers
from dgm_jax.checkpoint import Checkpoints, abstract
from dgm_jax.core import UserError
from dgm_jax.data import dataset as data
from dgm_jax.experiment import prepare
from dgm_jax.workdir import Workdir

ENV = {**os.environ, "XLA_FLAGS": COMPILING}  # one device each
CONFIG = "configs/vae_mnist.py:smoke"
MNIST = {
    **joined.TINY,
    "model.prior": "standard",
    "model.objective": "elbo",
    "eval.batch_size": 100,
    "eval.num_samples": 4,
    "eval.elbo_samples": 1,
    "eval.aggregate_examples": 0,
}
LOST = "error: another process of this run is lost"


def _address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def _in_processes(num, tasks, tmp_path, *further):
    """What each of them says of its runs."""
    address, env = _address(), {**ENV, "PYTHONPATH": f"{REPO}:{REPO / 'tests'}"}
    command = [sys.executable, str(REPO / "tests/joined.py")]
    outputs = [(tmp_path / f"{num}-{i}.json").open("w+") for i in range(num)]
    each = [
        subprocess.Popen(
            [*command, f"{address},{num},{i}", json.dumps(tasks), *further], stdout=out, env=env
        )
        for i, out in enumerate(outputs)
    ]
    assert [process.wait(timeout=600) for process in each] == [0] * num
    said = []
    for output in outputs:
        with output:
            output.seek(0)
            said.append(json.loads(output.readlines()[-1]))
    return said


def _rows(path):
    timing = {"seconds", "cpu_seconds", "examples_per_second"}
    rows = writers.read(Workdir(path).metrics)
    return [{name: value for name, value in row.items() if name not in timing} for row in rows]


def _assert_close(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process with two devices, undisturbed."""
    path = tmp_path_factory.mktemp("alone")
    return {"path": path, **joined.run(sharding.make_mesh(2), path)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Runs of two processes: undisturbed; divided and stopped; of a stopped run of four devices,
    whose newest checkpoint is damaged; told to stop at the very end."""
    path = tmp_path_factory.mktemp("pair")
    assert "step 16" in joined.run(sharding.make_mesh(4), path / "moved", told_at=12)["stopped"]
    for file in (path / "moved/checkpoints/16/state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    tasks = [
        {"path": str(path / "fresh")},
        {"path": str(path / "divided"), "fsdp": True, "told_at": 8},
        {"path": str(path / "moved")},
        {"path": str(path / "late"), "told_at": 24},
    ]
    said = _in_processes(2, tasks, path, "start")
    assert said[0] == said[1]
    fresh, divided, moved, late = said[0].pop("runs")
    runs = {"fresh": fresh, "divided": divided, "moved": moved, "late": late}
    return {"path": path, **runs, **said[0]}


def test_two_processes_make_the_run_of_two_devices_bit_for_bit(alone, pair):
    """State, evaluation, and the rows of the log, each once."""
    assert pair["fresh"]["state"] == alone["state"]
    assert pair["fresh"]["evaluation"] == alone["evaluation"]
    assert _rows(pair["path"] / "fresh") == _rows(alone["path"])


def test_all_stop_after_the_same_step_when_one_is_told(pair):
    """They hear of it a dispatch later."""
    assert "SIGTERM: stopped after step 16" in pair["divided"]["stopped"]


def test_told_to_stop_after_the_last_step_they_do_not_begin_to_evaluate(pair):
    assert "SIGTERM: stopped after step 24" in pair["late"]["stopped"]


def test_processes_that_were_told_different_things_are_refused(pair):
    assert "other configs or other data" in pair["unlike"]


def test_one_process_continues_what_two_saved(alone, pair, tmp_path):
    """Their state lay in halves."""
    shutil.copytree(pair["path"] / "divided", tmp_path / "run")
    _assert_close(joined.run(sharding.make_mesh(1), tmp_path / "run")["state"], alone["state"])


def test_two_processes_continue_what_one_saved(alone, pair):
    """Both pass over the newest checkpoint, which is damaged."""
    _assert_close(pair["moved"]["state"], alone["state"])
    assert (pair["path"] / "moved/damaged_checkpoints/16").is_dir()
    assert [row["step"] for row in _rows(pair["path"] / "moved")] == [
        row["step"] for row in _rows(alone["path"])
    ]


@pytest.mark.long
def test_four_processes_continue_what_two_saved(alone, pair, tmp_path):
    shutil.copytree(pair["path"] / "divided", tmp_path / "run")
    tasks = [{"path": str(tmp_path / "run"), "fsdp": True}]
    first, *others = _in_processes(4, tasks, tmp_path)
    assert others == [first] * 3
    _assert_close(first["runs"][0]["state"], alone["state"])
    assert first["runs"][0]["evaluation"] == alone["evaluation"]


def test_a_divided_run_starts_from_given_parameters(pair):
    given, params, averages = pair["start"]
    assert params == given and averages == given


def _flags(path, values):
    """Of the command line."""
    text = {
        n: "".join(f"{i}," for i in v) if isinstance(v, tuple) else v for n, v in values.items()
    }
    return [
        f"--workdir={path}",
        f"--config={CONFIG}",
        *(f"--config.{n}={v}" for n, v in text.items()),
    ]


def _lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_when_one_is_killed_the_other_ends_and_they_go_on_when_started_again(tmp_path):
    """Within the time given, in one line, with the status of what may be started again."""
    command = [sys.executable, "-m", "dgm_jax.main", "--lost_after=6"]
    longer = {"train.duration": "300000 steps", "data.validation": 0}
    command += _flags(tmp_path / "run", {**MNIST, **longer})
    for killed in (1, 0):
        address, files = _address(), [tmp_path / f"{killed}-{i}" for i in range(2)]
        before = max((row["step"] for row in _rows(tmp_path / "run")), default=0)
        pair = []
        for i, file in enumerate(files):
            with file.open("w") as out:
                how = f"--distributed={address},2,{i}"
                pair.append(
                    subprocess.Popen([*command, how], stdout=out, stderr=out, env=ENV, cwd=REPO)
                )
        try:
            while not any(row["step"] > before + 40 for row in _rows(tmp_path / "run")):
                assert [process.poll() for process in pair] == [None, None], _lines(files[0])
                time.sleep(0.1)
            pair[killed].kill()
            assert pair[1 - killed].wait(timeout=60) == 75
        finally:
            for process in pair:
                process.kill()
                process.wait()
        assert _lines(files[1 - killed])[-1].startswith(LOST)
    assert any(line.startswith("resumed     from") for line in _lines(files[0]))
    assert not any(line.startswith(("resumed", "model")) for line in _lines(files[1]))
    steps = [row["step"] for row in _rows(tmp_path / "run") if "vae/loss" in row]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("here", "write auto, or address:port,number of processes,number of this one"),
        ("localhost:1,two,0", "write auto"),
        ("localhost,1,0", "write auto, or address:port"),
        ("localhost:1,2,2", "numbered from 0"),
        ("auto", "JAX finds no cluster here"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(how, says):
    with pytest.raises(UserError, match=f"--distributed='{how}': .*{says}"):
        processes.join(how, lost_after=60)


def test_alone_there_is_nobody_to_wait_for():
    assert processes.is_first() and not processes.several()
    assert processes.heard()(15) == 15
    assert processes.any_of(True) and not processes.any_of(False)


def test_a_preempted_job_of_a_cluster_ends_as_the_undisturbed_run(slurm, tmp_path, monkeypatch):
    """A process on each of two nodes, by the script that users copy; bit for bit."""
    values = {**MNIST, "train.duration": "2000 steps", "train.steps_per_dispatch": 20}
    values |= {"train.validate_every": "500 steps", "train.checkpoint_every": "100 steps"}
    config = configs.load(str(REPO / CONFIG), values)
    experiment = prepare(config, data.load(configs.section(config, "data")), sharding.make_mesh(2))
    with Workdir(tmp_path / "alone").claimed(config, {}, np.zeros(1)):
        undisturbed, _ = train.train(experiment, Workdir(tmp_path / "alone"))

    monkeypatch.setenv("XLA_FLAGS", ENV["XLA_FLAGS"])
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", _address())  # nobody knows the name of the node
    path, log = tmp_path / "run", tmp_path / "job.log"
    command = ["sbatch", "--parsable", f"--output={log}", "scripts/slurm/train.sbatch"]
    submitted = subprocess.run(
        [*command, *_flags(path, values)], cwd=REPO, capture_output=True, text=True, check=True
    )
    job = submitted.stdout.strip()
    while not (path / "checkpoints/200").exists():
        assert _in_queue(job), log.read_text()
        time.sleep(0.1)
    threading.Thread(target=preempt, args=[job], daemon=True).start()
    while not (path / "results.json").exists():
        assert _in_queue(job), log.read_text()
        time.sleep(0.5)
    said = log.read_text()
    assert "SIGTERM: stopped after step" in said and "resumed     from the checkpoint" in said
    like = abstract(undisturbed, sharding.replicated(experiment.mesh))
    found = Checkpoints(path / "checkpoints").restore(like, print)
    jax.tree.map(np.testing.assert_array_equal, found, undisturbed)
    assert _rows(path) == _rows(tmp_path / "alone")


def _in_queue(job):
    """Of SLURM, waiting or running."""
    done = subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True)
    return bool(done.stdout.strip())
