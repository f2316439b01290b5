"""docs/results.md says what the kept results.json files say."""

import importlib.util
import json

import pytest
from conftest import REPO

RESULTS = sorted((REPO / "docs" / "results").glob("*.json"))


def _report():
    spec = importlib.util.spec_from_file_location("report", REPO / "scripts" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_the_one_that_the_kept_results_give():
    assert (REPO / "docs" / "results.md").read_text() == _report().table()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_kept_result_is_of_committed_code_and_named_after_its_seed(path):
    result = json.loads(path.read_text())
    assert path.stem.endswith(f"-seed{result['config']['seed']}")
    assert len(result["git_revision"]) == 40  # no "-dirty"
    assert result["split"] == "test"


def test_seeds_of_one_experiment_make_one_row(tmp_path, monkeypatch):
    """Mean over seeds, and s/√n; a run with another K stands apart."""
    report = _report()
    (tmp_path / "results").mkdir()
    for seed, nll, k in ((0, 84.0, 10), (1, 86.0, 10), (2, 50.0, 20)):
        result = json.loads(RESULTS[0].read_text())
        result["config"]["seed"] = seed
        result["metrics"]["importance_weighted_bound"] |= {"value": -nll, "num_samples": k}
        path = tmp_path / "results" / f"iwae_mnist-l1-vae-k1-seed{seed}.json"
        path.write_text(json.dumps(result))
    monkeypatch.setattr(report, "DOCS", tmp_path)
    first, second = report.table().splitlines()[-2:]
    assert "| 0, 1 |" in first and "| 85.00 ± 1.00 |" in first
    assert "86.76" in first and "| -1.76 |" in first
    assert "| 2 |" in second and "| 50.00 ± " in second
