"""Told to stop, a run saves what it has, and ends as if nobody had disturbed it."""

import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import REPO, on_one_device

from dgm_jax import config as configs
from dgm_jax import interruption, train, writers
from dgm_jax.checkpoint import Checkpoints
from dgm_jax.core import UserError
from dgm_jax.experiment import prepare
from dgm_jax.interruption import Interrupted
from dgm_jax.workdir import Workdir

pytestmark = pytest.mark.usefixtures("programs_kept")
TINY = {
    "model.encoder": (8,),
    "model.decoder": (8,),
    "model.latents": 3,
    "train.batch_size": 16,
    "train.duration": "40 steps",
    "train.steps_per_dispatch": 4,
    "train.validate_every": "8 steps",
    "train.checkpoint_every": "40 steps",
    "eval.batch_size": 24,
}


def _train(dataset, path, **fields):
    workdir = Workdir(path)
    config = configs.override(configs.experiment("vae"), {**TINY, **fields})
    with on_one_device(), workdir.claimed(config, {}, np.zeros(1)):
        return train.train(prepare(config, dataset), workdir)[0]


def _rows(path):
    timing = {"seconds", "cpu_seconds", "examples_per_second"}
    return [
        {name: value for name, value in row.items() if name not in timing}
        for row in writers.read(Workdir(path).metrics)
    ]


def test_a_clock_tells_once_each_time(monkeypatch):
    """Of ten seconds: not before, once when they are over, and again ten after that."""
    clock = iter((0, 3, 9, 12, 13, 21, 22.5))
    monkeypatch.setattr(interruption.time, "monotonic", lambda: next(clock))
    passed = interruption.every(10)
    told = [passed() for _ in range(6)]
    assert told == [False, False, True, False, False, True]


@pytest.mark.parametrize(("minutes", "steps"), [(0.0, [4, 8, 12]), (10.0, [])])
def test_a_checkpoint_is_due_by_the_clock_too(tiny_dataset, tmp_path, monkeypatch, minutes, steps):
    """Killed without a word, a run goes on from the last one, however far off the next was."""

    class Killed(BaseException):
        """Nothing of the loop catches it."""

    write = train._Log.dispatch

    def dispatch(self, step, measured):
        if step == 16:
            raise Killed
        write(self, step, measured)

    monkeypatch.setattr(train._Log, "dispatch", dispatch)
    with pytest.raises(Killed):
        _train(tiny_dataset, tmp_path, **{"train.checkpoint_minutes": minutes})
    assert Checkpoints(Workdir(tmp_path).checkpoints).steps == steps[-2:]


def test_a_stopped_run_ends_as_the_undisturbed_one(tiny_dataset, tmp_path, monkeypatch):
    """Bit for bit, each row once; stopped twice, between the checkpoints that it would save."""
    undisturbed = _train(tiny_dataset, tmp_path / "undisturbed")
    write, signals = train._Log.dispatch, {12: signal.SIGTERM, 24: signal.SIGINT}

    def dispatch(self, step, measured):
        write(self, step, measured)
        if step in signals:
            signal.raise_signal(signals.pop(step))

    monkeypatch.setattr(train._Log, "dispatch", dispatch)
    for signum, status in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        before = signal.getsignal(signum)
        with pytest.raises(Interrupted, match=signum.name) as stopped:
            _train(tiny_dataset, tmp_path / "stopped")
        assert stopped.value.status == status
        assert signal.getsignal(signum) is before
    monkeypatch.setattr(train, "initial_state", None)  # there may be no room for it as well
    resumed = _train(tiny_dataset, tmp_path / "stopped")
    assert int(resumed.step) == 40
    jax.tree.map(np.testing.assert_array_equal, resumed, undisturbed)
    assert _rows(tmp_path / "stopped") == _rows(tmp_path / "undisturbed")


def test_a_signal_in_the_last_dispatch_is_obeyed_too(tiny_dataset, tmp_path, monkeypatch):
    """What follows, the evaluation, may take longer than there is time."""
    write = train._Log.dispatch

    def dispatch(self, step, measured):
        write(self, step, measured)
        if step == 40:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train._Log, "dispatch", dispatch)
        with pytest.raises(Interrupted, match="after step 40"):
            _train(tiny_dataset, tmp_path / "run")
    assert int(_train(tiny_dataset, tmp_path / "run").step) == 40


def test_elsewhere_than_in_training_a_signal_ends_the_process_at_once():
    code = (
        "import signal, sys, time; from dgm_jax import interruption\n"
        "signal.signal(signal.SIGTERM, interruption.leave)\n"
        "signal.raise_signal(signal.SIGTERM); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == interruption.TRY_AGAIN == 75
    assert done.stderr == "SIGTERM: stopped; give the same command again\n"


def test_a_start_cut_short_is_no_obstacle(tmp_path):
    """Killed between the lock and the config, or within the writing of it."""
    workdir, config = Workdir(tmp_path / "run"), configs.experiment("vae")
    workdir.path.mkdir()
    (workdir.path / ".lock").touch()
    (workdir.path / "config.json.tmp").write_text('{"se')
    workdir.check_config(config)
    (workdir.path / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not empty"):
        workdir.check_config(config)


@pytest.mark.long
def test_random_moments(tmp_path):
    """The short form of `scripts/torture.py`: one disturbance of each kind."""
    command = [sys.executable, "scripts/torture.py", "--families=made", "--interruptions=10"]
    environment = {**os.environ, "DGM_JAX_CACHE": str(tmp_path)}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("| `made` |"))
    survived, tried = row.split("|")[-2].split("/")
    assert int(survived) == int(tried) >= 10


def test_the_second_signal_is_obeyed_at_once():
    with interruption.noted() as asked:
        assert asked() is None
        signal.raise_signal(signal.SIGINT)
        assert asked() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruption.noted() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked() is None


def test_what_another_process_has_begun_meanwhile_is_not_taken_over(tmp_path):
    """Its config was looked for before it came; it has come, trained and gone since."""
    workdir, config = Workdir(tmp_path / "run"), configs.experiment("vae")
    other = configs.override(config, {"seed": 1})
    with workdir.claimed(config, {}, np.zeros(1)):
        workdir.metrics.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"belongs to another config .seed was 0, is 1"):
        workdir.claimed(other, {}, np.zeros(1)).__enter__()
    with workdir.claimed(config, {}, np.zeros(1)):  # nobody holds it
        assert workdir.load_config().seed == 0


def test_where_the_data_are_and_when_it_saves_may_change(tmp_path):
    """What the data are is in the card."""
    fields = {"data.dataset": "arrays", "data.path": "a.npz"}
    workdir, config = Workdir(tmp_path), configs.override(configs.experiment("vae"), fields)
    with workdir.claimed(config, {}, np.zeros(1)):
        workdir.metrics.write_text('{"step": 1}\n')
    fields = {"data.path": "b.npz", "train.checkpoint_every": "1 epoch"}
    moved = configs.override(config, fields)
    workdir.check_config(moved)
    assert workdir.load_config(moved).data.path == "b.npz"
    assert workdir.load_config().data.path == "a.npz"
    other = configs.override(moved, {"data.binarisation": "none"})
    with pytest.raises(UserError, match=r"data\.binarisation was dynamic, is none\)"):
        workdir.check_config(other)


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    """Also after a death that released nothing by itself."""
    config = configs.experiment("vae")
    code = (
        "import numpy, sys, time; from pathlib import Path; from dgm_jax import config; "
        "from dgm_jax.workdir import Workdir\n"
        "with Workdir(Path(sys.argv[1])).claimed(config.experiment('vae'), {}, numpy.zeros(1)):\n"
        "    print('claimed', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "claimed\n"
        workdir = Workdir(tmp_path / "run")
        with pytest.raises(UserError, match="another process is at work"):
            workdir.claimed(config, {}, np.zeros(1)).__enter__()
        process.kill()
    with workdir.claimed(config, {}, np.zeros(1)):
        assert workdir.files() == ["config.json", "data_card.json", "data_mean.npz"]
