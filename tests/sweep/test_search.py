"""A search: Optuna's rounds are sweeps, it learns from them, and it resumes."""

import csv

import pytest
from conftest import REPO, on_one_device

from dgm_jax import config as configs
from dgm_jax.core import UserError
from dgm_jax.sweep import axes, mode, search
from dgm_jax.sweep import run as sweep
from dgm_jax.workdir import write_json

pytest.importorskip("optuna", reason="Optuna is not installed")
pytestmark = pytest.mark.usefixtures("programs_kept")
TINY = {
    "train.duration": "10 steps",
    "train.steps_per_dispatch": 10,
    "train.batch_size": 16,
    "eval.num_samples": 2,
    "eval.elbo_samples": 1,
    "eval.batch_size": 96,
    "eval.aggregate_examples": 0,
    "model.latents": 2,
    "model.encoder": (8,),
    "model.decoder": (8,),
    "model.prior": "standard",
    "model.objective": "elbo",
}
OVER = {"optimizer.learning_rate": axes.log_uniform(1e-9, 1e-2)}


def _config():
    return configs.load(str(REPO / "configs/vae_mnist.py:smoke"), TINY)


def test_rounds_are_sweeps_and_an_interrupted_search_goes_on(tmp_path, monkeypatch, capsys):
    calls = []

    def counted(folder, *rest):
        calls.append(folder.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_sweep(folder, *rest)

    run_sweep = search.run_sweep
    monkeypatch.setattr(search, "run_sweep", counted)
    # Twelve pictures would take as long as the training; test_sweep.py looks at them.
    monkeypatch.setattr(search.report.Figure, "savefig", lambda self, path: None)
    with on_one_device():
        with pytest.raises(KeyboardInterrupt):
            search.search(tmp_path / "search", _config(), OVER, "2x2")
        search.search(tmp_path / "search", _config(), OVER, "2x2")
    assert calls == ["round-0", "round-1", "round-0", "round-1"]
    assert capsys.readouterr().out.count("program 1 of 1 10/10") == 2  # each was trained once
    with (tmp_path / "search/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    rates = [float(row["optimizer.learning_rate"]) for row in rows]
    assert len(set(rates)) == 4 and min(rates) >= 1e-9 and max(rates) <= 1e-2
    for over, trials in ((OVER, "2x3"), ({path: axes.uniform(0.5, 1.0) for path in OVER}, "2x2")):
        with pytest.raises(UserError, match="another search"):
            search.search(tmp_path / "search", _config(), over, trials)
    assert len(calls) == 4


def test_it_learns_where_the_elbo_is_high(tmp_path, monkeypatch):
    """With 60 trials of a known function of one number, later ones crowd around its maximum."""
    found = {}

    def pretend(folder, config, members, launcher):
        complete = axes.complete(config, members)
        for workdir, member in zip(sweep.workdirs_of(folder, complete), members, strict=True):
            found[workdir.path] = -((member["model.beta"] - 0.3) ** 2)

    monkeypatch.setattr(search, "run_sweep", pretend)
    monkeypatch.setattr(search, "_last", lambda metric, path: found[path])
    monkeypatch.setattr(search.report, "write", lambda *args: None)
    search.search(tmp_path, _config(), {"model.beta": axes.uniform(0.0, 10.0)}, "12x5")
    away = [(-value) ** 0.5 for value in found.values()]
    assert len(away) == 60
    first, last = sorted(away[:10])[5], sorted(away[-20:])[10]
    assert min(away) < 0.2 and last < first / 3


def test_a_member_that_is_proposed_again_is_trained_once(tmp_path, monkeypatch):
    """Three rounds of three trials, five values; interrupted in the second and called again."""
    trained, heard, finished = [], [], search._finished

    def pretend(folder, config, members, launcher):
        sweep._claim(folder, config, axes.complete(config, members))
        trained.append([member["model.latents"] for member in members])
        if len(trained) == 2:
            raise KeyboardInterrupt

    def hear(member, over, value):
        heard.append((member["model.latents"], value))
        return finished(member, over, value)

    monkeypatch.setattr(search, "run_sweep", pretend)
    monkeypatch.setattr(search, "_finished", hear)
    monkeypatch.setattr(search, "_last", lambda metric, path: float(path.name.rpartition("=")[2]))
    monkeypatch.setattr(search.report, "write", lambda *args: None)
    over = {"model.latents": axes.choice(2, 3, 4, 5, 6)}
    with pytest.raises(KeyboardInterrupt):
        search.search(tmp_path, _config(), over, "3x3")
    search.search(tmp_path, _config(), over, "3x3")
    before, after = trained[:2], trained[2:]
    assert after[:2] == before
    once = [latents for members in after for latents in members]
    assert len(set(once)) == len(once) <= 5
    # Each of the three trials of each of four rounds is told the value of its member.
    assert len(heard) == 12 and heard[:3] == heard[3:6]
    assert all(value == latents for latents, value in heard)


@pytest.mark.parametrize(
    ("name", "metric"),
    [("vae_mnist", "validation/elbo"), ("made_toy", "validation/log_prob"), ("gan_grid", None)],
)
def test_it_looks_at_what_the_model_knows_of_its_likelihood(name, metric, tmp_path, monkeypatch):
    asked = []

    def last(metric, path):
        asked.append(metric)
        return 0.0

    monkeypatch.setattr(search, "run_sweep", lambda *args: None)
    monkeypatch.setattr(search, "_last", last)
    monkeypatch.setattr(search.report, "write", lambda *args: None)
    config = configs.load(str(REPO / f"configs/{name}.py:smoke"))
    over = {"optimizer.learning_rate": axes.uniform(0.001, 0.01)}
    if metric is None:
        with pytest.raises(UserError, match=r"model.name='gan' has none"):
            search.search(tmp_path, config, over, "1x1")
    else:
        search.search(tmp_path, config, over, "1x1")
        assert set(asked) == {metric}


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    sweep._claim(tmp_path, _config(), [{"model.beta": 1.0}])
    with pytest.raises(UserError, match="not empty and is no search"):
        search.search(tmp_path, _config(), OVER, "1x1")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


def test_a_search_in_which_every_trial_fails_says_so(tmp_path, monkeypatch):
    def pretend(folder, config, members, launcher):
        for workdir in sweep.workdirs_of(folder, axes.complete(config, members)):
            workdir.path.mkdir(parents=True)
            write_json(workdir.failure, {"failure": "vae/loss is not finite at step 1"})

    monkeypatch.setattr(search, "run_sweep", pretend)
    with pytest.raises(UserError, match="every trial has failed"):
        search.search(tmp_path, _config(), OVER, "1x2")
    assert "vae/loss is not finite" in (tmp_path / "sweep.md").read_text()


@pytest.mark.parametrize("trials", ["8", "0x3", "ax2", "2x"])
def test_trials_that_make_no_sense_are_refused(trials, tmp_path):
    with pytest.raises(UserError, match=f"--trials='{trials}'"):
        search.search(tmp_path, _config(), OVER, trials)


def test_a_search_wants_a_validation_split(tmp_path):
    config = configs.override(_config(), {"data.validation": 0})
    with pytest.raises(UserError, match=r"data\.validation=0"):
        search.search(tmp_path, config, OVER, "1x1")


def test_ranges_and_a_config_are_needed(tmp_path):
    with pytest.raises(UserError, match="--trials needs --config"):
        mode.sweep_mode(tmp_path, _config(), None, None, trials="1x2")
