"""docs/results.md says what the kept results.json files say."""

import json
import subprocess

import pytest
import report
from conftest import REPO

from dgm_jax import config as configs
from dgm_jax import results

RESULTS = sorted((REPO / "docs" / "results").glob("*.json"))
EXAMPLE = REPO / "docs" / "results" / "iwae_mnist-l1-vae-k1-seed0.json"


def test_the_table_is_the_one_that_the_kept_results_give():
    assert (REPO / "docs" / "results.md").read_text() == report.table()


def test_the_list_of_configs_is_what_they_say():
    assert (REPO / "docs" / "configs.md").read_text() == report.configs_page()


def test_the_list_of_fields_is_what_their_docstrings_say():
    assert (REPO / "docs" / "fields.md").read_text() == report.fields_page()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_kept_result_is_of_committed_code_and_named_after_its_seed(path):
    result = json.loads(path.read_text())
    assert path.stem.endswith(f"-seed{result['config']['seed']}")
    assert len(result["git_revision"]) == 40  # no "-dirty"
    assert result["split"] == "test"


def test_seeds_of_one_experiment_make_one_row(tmp_path, monkeypatch):
    """Mean over seeds, and s/√n; runs of other K or devices stand apart, not of another source."""
    (tmp_path / "results").mkdir()
    for seed, nll, k in ((0, 84.0, 10), (1, 86.0, 10), (2, 50.0, 20), (3, 90.0, 10)):
        result = json.loads(EXAMPLE.read_text())
        result["config"]["seed"] = seed
        result["metrics"]["importance_weighted_bound"] |= {"value": -nll, "num_samples": k}
        result["metrics"]["bits_per_dim"]["value"] = nll / 1000
        result["data"]["source"] = ("tfds", "download", "tfds", "tfds")[seed]
        result["devices"] = "1 x cpu" if seed < 3 else "1 x H100"
        result["seconds"] |= {"training": 120.0, "training_cpu": 60.0}
        path = tmp_path / "results" / f"iwae_mnist-l1-vae-k1-seed{seed}.json"
        path.write_text(json.dumps(result))
    monkeypatch.setattr(report, "DOCS", tmp_path)
    best, other, on_gpu = report.table().splitlines()[-3:]
    assert "| cpu | 2.0 | 0.5 |" in other and "| H100 | 2.0 |  |" in on_gpu
    assert "| 0, 1 |" in other and "| 85.00 ± 1.00 | bound: K = 10 |" in other
    assert "| 0.0850 bits/dim |" in other
    assert "86.76" in other and "| -1.76 |" in other
    assert "| 2 |" in best and "| 50.00 ± " in best


def test_a_row_says_where_the_config_was_another():
    kept = configs.load(str(REPO / "configs" / "iwae_mnist.py:l1-iwae-k5"))
    other_values = lambda kept: report._other_values("iwae_mnist-l1-iwae-k5", kept)  # noqa: E731
    assert other_values(kept.to_dict()) == []
    changed = {"seed": 3, "train.duration": "7 epochs", "eval.num_samples": 9, "data.seed": 2}
    changed = configs.override(kept, {**changed, "train.validate_every": "3 steps"}).to_dict()
    assert other_values(changed) == ["`data.seed=2`", "`train.duration='7 epochs'`"]
    del changed["train"]["init_from"], changed["train"]["num_parts"], changed["data"]["seed"]
    assert other_values(changed) == ["`train.duration='7 epochs'`", "train.init_from absent"]


def test_runs_of_other_values_are_another_row(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    for seed, duration in enumerate(("1 epochs", "2 epochs", "1 epochs")):
        result = json.loads(EXAMPLE.read_text())
        result["config"]["seed"], result["config"]["train"]["duration"] = seed, duration
        path = tmp_path / "results" / f"a-seed{seed}.json"
        path.write_text(json.dumps(result))
    monkeypatch.setattr(report, "DOCS", tmp_path)
    monkeypatch.setattr(report, "_other_values", lambda _, kept: [kept["train"]["duration"]])
    rows = [line for line in report.table().splitlines() if line.startswith("| a |")]
    assert ["| 0, 2 |" in row for row in rows] == ["1 epochs" in row for row in rows]
    assert len(rows) == 2


def test_families_are_ranked_by_the_tightest_that_each_knows(tmp_path, monkeypatch):
    """Those with no likelihood are not there; other data have a table of their own."""
    (tmp_path / "results").mkdir()

    def keep(name, metrics, **card):
        result = json.loads(EXAMPLE.read_text())
        unit = {"unit": "nats", "standard_error": 0.1, "num_samples": 10}
        result["metrics"] = {metric: {"value": v} | unit for metric, v in metrics.items()}
        result["data"] |= card
        (tmp_path / "results" / f"{name}-seed0.json").write_text(json.dumps(result))

    keep("bounded", {"elbo": -90.0, "importance_weighted_bound": -81.0})
    keep("exact", {"log_prob": -80.0, "elbo": -95.0})
    keep("loose", {"elbo": -82.0})
    keep("adversarial", {"discrimination": 0.7})
    keep("written", {"log_prob": -70.0}, dataset="shakespeare", support="tokens", alphabet="ab")
    monkeypatch.setattr(report, "DOCS", tmp_path)
    lines = report.table().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    found = [(row[0], row[4], row[5]) for row in rows if "±" in row[4]]
    assert found == [
        ("| exact", "80.00 ± 0.10", "exact"),
        ("| bounded", "81.00 ± 0.10", "bound: K = 10"),
        ("| loose", "82.00 ± 0.10", "bound: ELBO"),
        ("| written", "70.00 ± 0.10", "exact"),
    ]
    titles = [line for line in lines if line.startswith("### ")]
    assert "dynamic binarisation" in titles[0] and "shakespeare, characters" in titles[1]


def test_a_revision_is_of_this_checkout_and_says_what_is_new(tmp_path, monkeypatch):
    """Not of a checkout in which it happens to be installed."""
    package, git = tmp_path / "dgm_jax", ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    package.mkdir()
    (package / "results.py").touch()
    run = lambda *words: subprocess.run([*git, *words], cwd=tmp_path, check=True)  # noqa: E731
    monkeypatch.setattr(results, "__file__", str(package / "results.py"))
    revision = results.git_revision.__wrapped__
    assert revision() is None
    run("init", "-q")
    run("commit", "-q", "--allow-empty", "-m", "theirs")
    assert revision() is None
    run("add", ".")
    run("commit", "-q", "-m", "ours")
    assert len(revision()) == 40
    (package / "mine.py").touch()
    assert revision().endswith("-dirty")
