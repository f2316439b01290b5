"""The main line as its user runs it: processes of their own, with one device.

One run is trained here and shared by most tests; another is killed in the middle and must end
as the first did. For the suite's speed only, programs are compiled with few optimisations and
kept from one process to the next.
"""

import io
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from conftest import COMPILING
from PIL import Image

from dgm_jax import config as configs
from dgm_jax import run, trained_model
from dgm_jax.core import UserError
from dgm_jax.data import dataset as data
from dgm_jax.metrics import Metric
from dgm_jax.workdir import Workdir

REPO = Path(__file__).resolve().parent.parent
CONFIG = REPO / "configs" / "vae_mnist.py"
OVERRIDES = (
    "--config.model.encoder=32",
    "--config.model.decoder=32",
    "--config.eval.ais_temperatures=5",
    "--config.eval.ais_chains=2",
    "--config.model.latents=4",
    "--config.train.batch_size=100",
    "--config.train.duration=400 steps",
    "--config.train.steps_per_dispatch=20",
    "--config.train.checkpoint_every=40 steps",
    "--config.train.validate_every=80 steps",
    "--config.eval.elbo_samples=2",
    "--config.model.flow_width=8",
)
ENCODER, DECODER = (784 + 1) * 32 + (32 + 1) * 2 * 4, (4 + 1) * 32 + (32 + 1) * 784
FLOW = 2 * ((2 + 1) * 8 + (8 + 1) * 8 + (8 + 1) * 2 * 2)
NUM_PARAMETERS = ENCODER + DECODER + FLOW
PICTURES = (
    "prior_samples.png",
    "reconstructions.png",
    "interpolation.png",
    "traversals.png",
    "learning_curve.png",
)
FILES = {
    "config.json",
    "data_card.json",
    "data_mean.npz",
    "metrics.jsonl",
    "tensorboard",
    "checkpoints",
    "results.json",
    "results.npz",
    *PICTURES,
}
TIMING = {"seconds", "cpu_seconds", "examples_per_second"}


class Run(NamedTuple):
    path: Path
    stdout: str
    stderr: str
    results: dict
    contents: dict[str, tuple[bytes, int]]


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    """What a user's process sees: one device. And the compiler's settings."""
    return {
        **os.environ,
        "XLA_FLAGS": COMPILING,
        "PYTHONPATH": str(REPO),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(scope="module")
def finished(env, tmp_path_factory) -> Run:
    path = tmp_path_factory.mktemp("finished") / "run"
    done = _main(env, f"--config={CONFIG}:smoke", f"--workdir={path}", *OVERRIDES)
    results = json.loads((path / "results.json").read_text())
    return Run(path, done.stdout, done.stderr, results, _contents(path))


def _main(
    env: dict[str, str], *flags: str, cwd: Path = REPO, code: int = 0
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dgm_jax.main", *flags]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def _contents(path: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(file.relative_to(path)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in path.rglob("*")
        if file.is_file()
    }


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def _untimed(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def _table(stdout: str) -> list[str]:
    """The lines of the metrics, as printed."""
    _, _, after = stdout.partition("test split after 400 steps\n")
    lines = [line for line in after.splitlines() if re.search(r"\d examples", line)]
    assert lines, stdout
    return lines


def _scalars(path: Path) -> dict[str, list[int]]:
    """Tag -> steps in the TensorBoard files: records of length, crc, event, crc."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[int]] = {}
    for file in sorted((path / "tensorboard").iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
            at += 16 + size
    return found


# The finished run.


def test_it_says_what_it_will_do_before_the_first_step(finished):
    lines = finished.stdout.splitlines()
    progress = next(i for i, line in enumerate(lines) if re.match(r"training +[\d,]+/400", line))
    header = {line.split()[0]: line for line in lines[:progress]}
    assert {"model", "parameters", "data", "devices", "training", "output"} <= set(header)
    assert "latents=4" in header["model"]
    assert f"{NUM_PARAMETERS:,}" in header["parameters"]
    for words in ("embedded", "4,000 train", "500 test", "dynamic", "seed 0"):
        assert words in header["data"]
    assert header["devices"].split()[1] == "1"
    assert "400 steps" in header["training"] and "100 examples" in header["training"]
    assert str(finished.path) in header["output"]


def test_progress_is_plain_lines_where_there_is_no_terminal(finished):
    assert not set("\r\x1b\b") & set(finished.stdout + finished.stderr)
    (last,) = (line for line in finished.stdout.splitlines() if line.startswith("training 400/400"))
    for words in ("left", "steps/s", "examples/s", "distortion", "rate"):
        assert words in last


def test_the_table_prints_the_numbers_of_the_results(finished):
    printed = {line.split()[0]: line for line in _table(finished.stdout)}
    assert set(printed) == set(finished.results["metrics"])
    for name, metric in finished.results["metrics"].items():
        digits = 4 if metric["unit"] == "bits/dim" else 3
        assert f" {metric['value']:.{digits}f} " in printed[name]
        assert metric["unit"] in printed[name]
        if metric["standard_error"] is not None:
            assert f"± {metric['standard_error']:.{digits}f}" in printed[name]
    assert "K = 50" in printed["importance_weighted_bound"]
    assert re.search(r"training \d+\.\d s", finished.stdout)
    assert all(name in finished.stdout for name in FILES)


def test_the_work_directory_holds_everything(finished):
    assert {name.partition("/")[0] for name in finished.contents} == {".lock", *FILES}
    assert sorted(finished.results["files"]) == sorted(FILES)
    for name in PICTURES:
        with Image.open(finished.path / name) as image:
            assert image.format == "PNG"
            low, high = image.convert("L").getextrema()
        assert low < high, f"{name} is of one colour"
    steps = sorted(int(p.name) for p in (finished.path / "checkpoints").iterdir())
    assert steps == [360, 400]


def test_metrics_rows_are_complete_and_in_order(finished):
    rows = _rows(finished.path)
    training = [row for row in rows if "vae/loss" in row]
    validation = [row for row in rows if "validation/elbo" in row]
    assert len(training) + len(validation) == len(rows)
    assert [row["step"] for row in training] == list(range(20, 401, 20))
    assert [row["step"] for row in validation] == list(range(80, 401, 80))
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    for row in training:  # beta = 1
        assert row["vae/loss"] == pytest.approx(row["vae/distortion"] + row["vae/rate"], abs=1e-3)
    seconds = [row["seconds"] for row in training]
    assert seconds == sorted(seconds)


def test_tensorboard_has_the_same_rows(finished):
    expected: dict[str, list[int]] = {}
    for row in _rows(finished.path):
        for name in row.keys() - {"step"}:
            expected.setdefault(name, []).append(row["step"])
    assert _scalars(finished.path) == expected


def test_results_say_what_the_numbers_are_about(finished):
    results = finished.results
    assert results["schema"] == 1
    assert (results["split"], results["step"]) == ("test", 400)
    assert results["num_parameters"] == NUM_PARAMETERS
    for name, metric in results["metrics"].items():
        assert set(metric) == set(Metric._fields)
        aggregate = name in ("mutual_information", "marginal_kl")
        assert metric["num_examples"] == (100 if aggregate else 500)
        assert math.isfinite(metric["value"])
    assert results["metrics"]["elbo"]["num_samples"] == 2
    assert results["metrics"]["importance_weighted_bound"]["num_samples"] == 50
    card = results["data"]
    assert card == json.loads((finished.path / "data_card.json").read_text())
    assert card["counts"] == {"train": 4000, "validation": 500, "test": 500}
    assert (card["source"], card["seed"], card["event_shape"]) == ("embedded", 0, [28, 28, 1])
    assert card["binarisation"]["train"] == "dynamic"
    assert re.fullmatch("[0-9a-f]{64}", card["sha256"])
    assert results["config"] == json.loads((finished.path / "config.json").read_text())
    assert results["config"]["model"]["latents"] == 4
    assert results["versions"]["jax"] == jax.__version__
    assert results["versions"]["python"].startswith("3.")
    seconds = results["seconds"]
    assert 0 < seconds["training"] + seconds["evaluation"] <= seconds["this process"]
    assert results["git_revision"] is None or re.match("[0-9a-f]{40}", results["git_revision"])
    assert results["peak_memory_mib"] < 2048


def test_metrics_keep_their_identities(finished):
    value = {name: metric["value"] for name, metric in finished.results["metrics"].items()}
    assert value["elbo"] == pytest.approx(-(value["distortion"] + value["rate"]), abs=1e-4)
    assert value["importance_weighted_bound"] >= value["elbo"]
    bits = -value["importance_weighted_bound"] / (784 * math.log(2))
    assert value["bits_per_dim"] == pytest.approx(bits, rel=1e-6)
    assert value["rate"] > 0
    assert 0 <= value["active_units"] <= 4


def test_the_model_beats_independent_pixels(finished):
    """A closed form to beat: Bernoulli pixels at the training means, on grey test images.

    Its expected log-likelihood over binarisations is Σ v log m + (1 - v) log (1 - m).
    """
    config = Workdir(finished.path).load_config()
    dataset = data.load(configs.section(config, "data"))
    mean = np.clip(dataset.spec.mean.astype(np.float64), 1e-3, 1 - 1e-3)
    grey = dataset.splits["test"].x / 255.0
    independent = (grey * np.log(mean) + (1 - grey) * np.log1p(-mean)).sum(axis=(1, 2, 3)).mean()
    assert finished.results["metrics"]["elbo"]["value"] > independent + 10


# What can be done with it.


def test_training_again_says_finished_and_changes_nothing(finished, env):
    before = _contents(finished.path)
    again = _main(env, f"--config={CONFIG}:smoke", f"--workdir={finished.path}", *OVERRIDES)
    assert "finished" in again.stdout and "results.json" in again.stdout
    assert again.stderr == ""
    assert _contents(finished.path) == before


def test_the_python_example_of_the_readme_runs(finished, tmp_path, monkeypatch):
    """After the command that leaves the work directory it restores."""
    example, *_ = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/vae_mnist-smoke").symlink_to(finished.path)
    (tmp_path / "configs").symlink_to(REPO / "configs")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert names["losses"].shape == (jax.device_count(),) and np.isfinite(names["losses"]).all()
    assert names["images"].shape == (16, 28, 28, 1)
    assert len(names["codes"]) == 500 and names["elbo"].shape == (64,)


def test_evaluate_prints_the_very_numbers_that_training_printed(finished, env):
    before = _contents(finished.path)
    # A field of `eval` alone is enough: the rest is in the work directory.
    number = f"--config.eval.num_samples={finished.results['config']['eval']['num_samples']}"
    done = _main(env, "--mode=evaluate", f"--workdir={finished.path}", number)
    assert _table(done.stdout) == _table(finished.stdout)
    after = _contents(finished.path)
    evaluation = json.loads(after.pop("evaluation.json")[0])
    each, _ = after.pop("evaluation.npz")
    before = {name: content for name, content in before.items() if "evaluation." not in name}
    assert after == before
    with np.load(io.BytesIO(each)) as each, np.load(finished.path / "results.npz") as trained:
        assert "importance_weighted_bound" in each.files
        for name in each.files:
            np.testing.assert_array_equal(each[name], trained[name])
    for name in ("metrics", "data", "config", "step", "num_parameters", "schema"):
        assert evaluation[name] == finished.results[name]


def test_sample_writes_images_and_a_picture(finished, env):
    _main(env, "--mode=sample", "--num=7", f"--workdir={finished.path}")
    with np.load(finished.path / "samples.npz") as samples:
        x, mean = samples["x"], samples["mean"]
    assert x.shape == mean.shape == (7, 28, 28, 1)
    assert set(np.unique(x)) == {0.0, 1.0}
    assert ((mean >= 0) & (mean <= 1)).all()
    # x ~ Bernoulli(mean), at six standard deviations.
    assert abs((x - mean).sum()) < 6 * math.sqrt((mean * (1 - mean)).sum())
    assert len(np.unique(x, axis=0)) == 7
    with Image.open(finished.path / "samples.png") as image:
        assert image.format == "PNG"

    # The same in this process, which has eight devices.
    restored = trained_model.restore(finished.path)

    def draw(num: int, seed: int) -> dict[str, np.ndarray]:
        return trained_model.draw(restored, num, seed)

    three, many, other = draw(3, 0), draw(103, 0), draw(7, 1)
    np.testing.assert_allclose(many["mean"][:7], mean, atol=1e-5)
    for name in ("x", "mean"):
        np.testing.assert_array_equal(three[name], many[name][:3])
        assert len(many[name]) == 103
        assert not (other[name] == many[name][:7]).all()
        # The second batch is not the first again.
        assert not (many[name][100:] == many[name][:3]).all()


def test_ais_brackets_the_models_own_images(finished):
    """Five temperatures make a wide bracket."""
    before = _contents(finished.path)
    with pytest.raises(UserError, match=r"--num=501: there are 500 test images"):
        run.ais_mode(Workdir(finished.path), 501)
    run.ais_mode(Workdir(finished.path), 4)
    found = json.loads((finished.path / "ais.json").read_text())["metrics"]
    (finished.path / "ais.json").unlink()
    assert _contents(finished.path) == before
    assert {name: m["num_examples"] for name, m in found.items()} == dict.fromkeys(found, 4)
    value = {name: metric["value"] for name, metric in found.items()}
    gap = value["simulated_upper_bound"] - value["simulated_lower_bound"]
    assert value["simulated_gap"] == pytest.approx(gap, abs=1e-3)
    assert gap > 0
    assert value["ais_bound"] < finished.results["metrics"]["importance_weighted_bound"]["value"]


def test_a_killed_run_ends_as_the_undisturbed_one(finished, env, tmp_path):
    """Also: the default work directory is named after the config."""
    command = [sys.executable, "-m", "dgm_jax.main", f"--config={CONFIG}:smoke", *OVERRIDES]
    path = tmp_path / "runs" / "vae_mnist-smoke"
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 200
        while not (steps := _saved_steps(path)) and process.poll() is None:
            assert time.monotonic() < deadline, "no checkpoint was saved"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert steps and not (path / "results.json").exists()
    with (path / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 6')  # what the kernel may leave of the last line

    resumed = _main(env, f"--config={CONFIG}:smoke", *OVERRIDES, cwd=tmp_path)
    (step,) = re.findall(r"resumed +from the checkpoint of step (\d+)", resumed.stdout)
    assert 0 < int(step) < 400
    assert _untimed(_rows(path)) == _untimed(_rows(finished.path))
    seconds = [row["seconds"] for row in _rows(path) if "seconds" in row]
    assert seconds == sorted(seconds)
    results = json.loads((path / "results.json").read_text())
    assert results["metrics"] == finished.results["metrics"]
    assert results["seconds"]["training"] == pytest.approx(seconds[-1], abs=1e-3)
    assert _table(resumed.stdout) == _table(finished.stdout)
    assert _digest(path) == _digest(finished.path)


def _saved_steps(path: Path) -> list[int]:
    folder = path / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return [int(name) for name in names if name.isdigit() and int(name) > 0]


def _digest(path: Path) -> str:
    """The fingerprint of the whole final state: parameters, optimizer, average, step, seed."""
    return json.loads((path / "checkpoints" / "400" / "digest" / "metadata").read_text())["sha256"]


def test_help_names_the_modes_and_flags(env):
    command = [sys.executable, "-m", "dgm_jax.main", "--help"]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1)  # 1 is absl's custom
    assert "Traceback" not in done.stderr
    for words in ("train|evaluate|sample", "--config", "--workdir", "--num", "--sample_seed"):
        assert words in done.stdout
