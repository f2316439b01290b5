"""The sweep as its user has it: work directories, table, plots; interrupted, and misdirected."""

import csv
import json
import math
import re
import resource
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from conftest import REPO, on_one_device
from scipy import stats

from dgm_jax import command_line, main, run, sharding
from dgm_jax import config as configs
from dgm_jax.core import UserError
from dgm_jax.sweep import axes, mode, program, report
from dgm_jax.sweep import run as sweep
from dgm_jax.workdir import Workdir

pytestmark = pytest.mark.usefixtures("programs_kept")
TINY = {
    "train.duration": "20 steps",
    "train.steps_per_dispatch": 10,
    "train.validate_every": "10 steps",
    "train.checkpoint_every": "10 steps",
    "train.batch_size": 16,
    "eval.num_samples": 4,
    "eval.elbo_samples": 1,
    "eval.batch_size": 96,
    "eval.aggregate_examples": 0,
    "model.latents": 3,
    "model.encoder": (8,),
    "model.decoder": (8,),
    "model.prior": "standard",
    "model.objective": "elbo",
}
MEMBERS = axes.grid({"model.beta": (1.0, 0.5), "model.latents": (3, 4), "seed": (0, 1)})


def _config():
    return configs.load(str(REPO / "configs/vae_mnist.py:smoke"), TINY)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Eight members in two programs, interrupted after the first program and called again."""
    folder = tmp_path_factory.mktemp("sweep") / "sweep"
    trained = []

    def counted(members, *rest):
        trained.append(len(members))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(members, *rest)

    train = program.train
    with on_one_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "train", counted)
        with pytest.raises(KeyboardInterrupt):
            sweep.run_sweep(folder, _config(), MEMBERS)
        sweep.run_sweep(folder, _config(), MEMBERS)
    assert trained == [4, 4, 4]  # the first program was not run again
    return folder


def test_each_member_is_a_work_directory_like_any_other(finished):
    names = sorted(path.name for path in (finished / "members").iterdir())
    assert len(names) == 8 and names[5] == "5-beta=0.5-latents=3-seed=1"
    path = finished / "members" / names[5]
    config = Workdir(path).load_config()
    assert (config.model.beta, config.model.latents, config.seed) == (0.5, 3, 1)
    result = json.loads((path / "results.json").read_text())
    assert result["step"] == 20 and result["config"]["seed"] == 1
    with on_one_device():
        run.evaluate_mode(Workdir(path))
        run.sample_mode(Workdir(path), 3, 0)
    again = json.loads((path / "evaluation.json").read_text())
    for name, metric in result["metrics"].items():
        assert again["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-5)
    assert (path / "samples.png").exists()
    assert not (finished / "programs").exists()


def test_the_csv_has_a_row_for_each_member_and_a_column_for_each_number(finished):
    with (finished / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for row, member in zip(rows, MEMBERS, strict=True):
        for path, value in member.items():
            assert float(row[path]) == value
        result = json.loads((finished / "members" / row["member"] / "results.json").read_text())
        assert float(row["elbo"]) == result["metrics"]["elbo"]["value"]
        assert row["status"] == "finished" and row["step"] == "20"


def test_there_are_a_table_and_pictures(finished):
    text = (finished / "sweep.md").read_text()
    assert text.count("\n| 1 | 3 | 2 |") == 1 and "Baseline: beta = 1, latents = 3." in text
    for name in ("learning_curves", "rate_distortion", "by_beta", "by_latents"):
        assert (finished / f"{name}.png").stat().st_size > 5000


def test_another_sweep_and_another_folder_are_refused(finished, tmp_path):
    with pytest.raises(UserError, match=r"another sweep .*members are 8 others"):
        sweep.run_sweep(finished, _config(), MEMBERS[:3])
    other = configs.override(_config(), {"optimizer.eps": 1e-3})
    with pytest.raises(UserError, match=r"another sweep .*optimizer.eps"):
        sweep.run_sweep(finished, other, MEMBERS)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="no sweep"):
        sweep.run_sweep(tmp_path, _config(), MEMBERS)


def test_a_bad_value_of_a_late_program_is_refused_before_the_first_trains(tmp_path, monkeypatch):
    """And costs nothing: with it put right the same folder will do."""
    trained = []
    monkeypatch.setattr(sweep, "_run_program", lambda members, *rest: trained.append(len(members)))
    monkeypatch.setattr(report, "write", lambda *args: None)
    folder, good = tmp_path / "sweep", [{"model.latents": 2}, {"model.latents": 3}]
    with pytest.raises(UserError, match=r"model\.latents=0"):
        sweep.run_sweep(folder, _config(), [*good, {"model.latents": 0}])
    assert not folder.exists()
    sweep.run_sweep(folder, _config(), good)
    assert trained == [1, 1]


def test_fields_in_another_order_are_the_same_sweep(finished, capsys):
    turned = [dict(reversed(member.items())) for member in MEMBERS]
    before = sorted(finished.rglob("*"))
    sweep.run_sweep(finished, _config(), turned)
    assert sorted(finished.rglob("*")) == before
    assert "measuring" not in capsys.readouterr().out


def test_as_many_files_may_be_open_as_there_are_members(monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        sweep._allow_open_files(3)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 256
        sweep._allow_open_files(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 500
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (100, 1000))
    with pytest.raises(UserError, match=r"holds 1,100 files open.*allows 1,000"):
        sweep._allow_open_files(900)


def test_curves_are_of_one_number_though_a_member_ends_before_it_has_it(tmp_path, monkeypatch):
    rows = []
    for i, own in enumerate(([{"validation/elbo": -120.0}], [{"vae/loss": 500.0}])):
        workdir = Workdir(tmp_path / str(i))
        workdir.path.mkdir()
        lines = [json.dumps({"step": 10, **row}) + "\n" for row in own]
        workdir.metrics.write_text("".join(lines))
        rows.append(report.Row({"seed": i}, (), workdir.path, {}, None, 1, 1.0))
    saved = []
    monkeypatch.setattr(report.Figure, "savefig", lambda figure, path: saved.append(figure))
    report._learning_curves(tmp_path / "curves.png", rows, {"seed": "seed"})
    (panel,) = saved[0].axes
    assert panel.get_ylabel() == "validation/elbo (nats)"
    assert [list(line.get_ydata()) for line in panel.lines] == [[-120.0]]


def test_members_that_fail_are_reported_and_left_alone(tmp_path, capsys, monkeypatch):
    """The first diverges, the second is not finite on the test split; the third goes on."""
    compile_evaluation = sweep._compile_evaluation

    def broken(config, dataset):
        evaluate = compile_evaluation(config, dataset)
        scale = {1: np.float32("nan")}
        return lambda params, seed: evaluate(
            jax.tree.map(lambda leaf: scale.get(seed, 1) * leaf, params), seed
        )

    monkeypatch.setattr(sweep, "_compile_evaluation", broken)
    members = [{"optimizer.learning_rate": 1e36}, {"seed": 1}, {"seed": 2}]
    with on_one_device():
        sweep.run_sweep(tmp_path / "sweep", _config(), members)
    failures = [
        Workdir(path).load_failure()
        for path in sorted((tmp_path / "sweep/members").iterdir())
        if not (path / "results.json").exists()
    ]
    assert len(failures) == 2
    assert "is not finite at step" in failures[0] and "replay" not in failures[0]
    assert re.match(r"test split: .* is not finite for \d+ of \d+ examples", failures[1])
    text = (tmp_path / "sweep/sweep.md").read_text()
    assert "0 of 1 | failed" in text and "`0-learning_rate=1e+36-seed=0`" in text
    with (tmp_path / "sweep/sweep.csv").open() as file:
        *bad, good = csv.DictReader(file)
    assert [row["status"] for row in bad] == failures and {row["elbo"] for row in bad} == {""}
    assert float(good["elbo"]) < 0
    # Called again, there is nothing left to do.
    sweep.run_sweep(tmp_path / "sweep", _config(), members)
    assert "measuring" not in capsys.readouterr().out.rpartition("sweep   ")[2]


def test_cores_are_shared_by_the_members_of_the_largest_program(tmp_path, monkeypatch):
    share = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(sharding, "share_cores", share)
    members = [{"train.batch_size": 15}, {}, {"seed": 1}]
    with pytest.raises(KeyboardInterrupt):
        sweep.run_sweep(tmp_path / "sweep", _config(), members)
    share.assert_called_once_with(2)


def test_beside_an_accelerator_the_cpu_is_there_too():
    """Where `JAX_PLATFORMS` names that alone; a sweep restores checkpoints in the CPU's memory."""
    before = jax.config.jax_platforms
    try:
        for chosen, expected in (("cuda", "cuda,cpu"), ("tpu,cpu", "tpu,cpu"), ("cpu", "cpu")):
            jax.config.update("jax_platforms", chosen)
            sharding.share_cores(1)
            assert jax.config.jax_platforms == expected
    finally:
        jax.config.update("jax_platforms", before)


SWEPT = f"""
from dgm_jax import config

def get_config(arg=None):
    fields = {{"model.generator": (8,), "model.discriminator": (8,), "eval.batch_size": 1000}}
    fields |= {{"train.duration": "20 steps", "train.steps_per_dispatch": 10}}
    return config.override(config.load("{REPO}/configs/gan_grid.py"), fields)

def sweep():
    yield {{"optimizer.learning_rate": 0.002}}
    yield {{"seed": 1}}
"""


def _command(*flags):
    """What the command line does, in this process."""
    argv = ["main", *flags]
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", argv)  # where ml_collections looks for fields
        main.main(command_line.parse(argv))


def _table(folder):
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections'
def test_the_command_sweeps_what_its_config_or_its_flag_says(tmp_path, monkeypatch):
    monkeypatch.setattr(main.precision, "multiply_in_full", lambda: None)
    monkeypatch.setattr(report.Figure, "savefig", lambda self, path: None)
    (tmp_path / "mine.py").write_text(SWEPT)
    own, given = tmp_path / "own", tmp_path / "given"
    flags = (f"--config={tmp_path / 'mine.py'}", "--mode=sweep", "--config.data.validation=0")
    with on_one_device():
        _command(*flags, f"--workdir={own}")
        _command(*flags, f"--workdir={given}", "--sweep=optimizer.learning_rate=0.002,1e-3")
    rows = {}
    for folder, seeds in ((own, ("0", "1")), (given, ("0", "0"))):
        with (folder / "sweep.csv").open() as file:
            rows[folder] = list(csv.DictReader(file))
        assert [row["optimizer.learning_rate"] for row in rows[folder]] == ["0.002", "0.001"]
        for row, seed in zip(rows[folder], seeds, strict=True):
            assert (row["status"], row["step"]) == ("finished", "20")
            result = json.loads((folder / "members" / row["member"] / "results.json").read_text())
            assert str(result["config"]["seed"]) == seed == row.get("seed", "0")
            assert result["config"]["data"]["validation"] == 0
            measured = {name: metric["value"] for name, metric in result["metrics"].items()}
            assert measured and measured == {name: float(row[name]) for name in measured}
    assert [row["member"] for row in rows[own]] == [
        "0-learning_rate=0.002-seed=0",
        "1-learning_rate=0.001-seed=1",
    ]
    # The first two are the same run, the others differ in the seed.
    costs = {folder: [row["discrimination"] for row in rows[folder]] for folder in rows}
    assert [a == b for a, b in zip(costs[own], costs[given], strict=True)] == [True, False]


def test_a_grid_without_a_config_is_refused(finished):
    with pytest.raises(UserError, match="--sweep needs --config"):
        mode.sweep_mode(finished, grid="model.beta=7")


def test_a_table_where_every_member_failed(tmp_path):
    members = axes.grid({"model.beta": (1.0, 2.0)})
    paths = [workdir.path for workdir in sweep.workdirs_of(tmp_path, members)]
    for path in paths:
        path.mkdir(parents=True)
        (path / "failure.json").write_text('{"failure": "it broke"}')
    report.write(tmp_path, members, paths, configs.experiment("vae"))
    assert (tmp_path / "sweep.md").read_text().count("it broke") == 2
    assert not (tmp_path / "by_beta.png").exists()


def test_layers_are_shown_and_points_of_a_curve_are_not():
    shown = ["rate", "rate_1", "rate_2", "importance_weighted_bound"]
    metrics = dict.fromkeys([*shown, "importance_weighted_bound_100"], 1.0)
    each = metrics, {}, {**metrics, "more": 2.0}
    rows = [report.Row({}, (), None, of, None, 1, 1) for of in each]
    assert report._shown(rows) == shown


def _rows(values):
    """Rows of a sweep over beta: `{beta: {seed: elbo}}`."""
    return [
        report.Row(
            {"model.beta": b, "seed": s}, (("model.beta", b),), None, {"elbo": v}, None, 1, 1
        )
        for b, of in values.items()
        for s, v in of.items()
    ]


def test_the_interval_is_students():
    values = np.array([3.0, 5.0, 10.0])
    found = report.mean_over_seeds(values)
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert found.mean == pytest.approx(6)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(
        (low, high)
    )
    assert math.isnan(report.mean_over_seeds([3.0]).half_width)


def test_the_difference_is_taken_seed_by_seed():
    """Seeds spread by 100, the effect is 1 ± 0.1; a seed that one side lacks does not count."""
    rows = _rows({1.0: {0: 0.0, 1: 100.0, 2: 50.0}, 2.0: {0: 0.9, 1: 101.1, 3: 7.0}})
    base = report.baseline(rows, configs.experiment("vae"))
    assert base == (("model.beta", 1.0),)
    found = report.difference(rows, (("model.beta", 2.0),), base, "elbo")
    half = stats.t.ppf(0.975, 1) * np.std([0.9, 1.1], ddof=1) / np.sqrt(2)
    assert found == pytest.approx((1.0, half))
    assert report.difference(rows, base, base, "elbo") is None


def _two_fields():
    """Two settings of two fields, the first the config's; two seeds of each."""
    found = {
        (1.0, 50): [{"elbo": -10.0, "rate": 0.25}, {"elbo": -12.0, "rate": 0.75}],
        (2.0, 20): [{"elbo": -11.0, "rate": 0.5}, {"elbo": -14.0, "rate": 0.5}],
    }
    return [
        report.Row(
            {"model.beta": beta, "model.latents": latents, "seed": seed},
            (("model.beta", beta), ("model.latents", latents)),
            Path(str(seed)),
            {**metrics, "distortion": -metrics["elbo"] - metrics["rate"]},
            None,
            1,
            1.0,
        )
        for (beta, latents), each in found.items()
        for seed, metrics in enumerate(each)
    ]


SHORT = {"model.beta": "beta", "model.latents": "latents", "seed": "seed"}


def test_the_table_of_known_numbers():
    """Of two values the half width is t / 2 of their distance, where t = 12.7062."""
    rows = _two_fields()
    lines = report.table(rows, SHORT, report.baseline(rows, configs.experiment("vae"))).splitlines()
    assert [line for line in lines if line.startswith("|")] == [
        "| beta | latents | seeds | elbo | rate | distortion |",
        "|---|---|---|---|---|---|",
        "| 1 | 50 | 2 | -11.00 ± 12.71 | 0.5000 ± 3.1766 | 10.50 ± 9.53 |",
        "| 2 | 20 | 2 | -12.50 ± 19.06 (-1.50 ± 6.35) | 0.5000 ± 0.0000 (+0.0000 ± 3.1766) "
        "| 12.00 ± 19.06 (+1.50 ± 9.53) |",
    ]
    assert lines[-1] == "Baseline: beta = 1, latents = 50."


def test_the_pictures_of_known_numbers(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(report.Figure, "savefig", lambda figure, path: saved.append(figure))
    report._rate_distortion(tmp_path / "plane.png", _two_fields(), SHORT, "test split")
    report._against(tmp_path / "by.png", _two_fields(), "model.latents", ["rate"])
    (plane,), (by,) = (figure.axes for figure in saved)
    points = [line.get_xydata().tolist() for line in plane.lines if line.get_linestyle() == "None"]
    assert points == [[[0.25, 9.75], [0.75, 11.25]], [[0.5, 10.5], [0.5, 13.5]]]
    assert (plane.get_xlabel(), plane.get_ylabel()) == ("rate (nats)", "distortion (nats)")
    points = [line.get_xydata().tolist() for line in by.lines]
    assert points == [[[50, 0.25]], [[50, 0.75]], [[20, 0.5]], [[20, 0.5]]]
    assert (by.get_xlabel(), by.get_title()) == ("model.latents", "rate")


def test_the_baseline_is_the_config_or_else_the_first():
    config = configs.experiment("vae")
    assert report.baseline(_rows({3.0: {0: 0.0}, 1.0: {0: 0.0}}), config) == (("model.beta", 1.0),)
    assert report.baseline(_rows({3.0: {0: 0.0}, 2.0: {0: 0.0}}), config) == (("model.beta", 3.0),)


def test_a_start_cut_short_is_no_obstacle_and_a_folder_not_writable_is(tmp_path, monkeypatch):
    config, members = configs.experiment("vae"), [{"seed": 0}, {"seed": 1}]
    (tmp_path / "sweep.json.tmp").write_text('{"conf')
    assert sweep._agreed(tmp_path, config, members) == members
    sweep._claim(tmp_path, config, members)
    assert sweep.read_about(tmp_path)[1] == members
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="is not writable: choose another --workdir"):
        sweep._agreed(tmp_path, config, members)
