"""Two results side by side."""

import json

import compare
import numpy as np
import pytest
from conftest import REPO

from dgm_jax.core import UserError

KEPT = REPO / "docs" / "results" / "vae_mnist-seed1.json"


def _run(path, elbo, **changes):
    """A kept result as that of a run whose ELBO is given for each example."""
    result = json.loads(KEPT.read_text()) | changes
    result["metrics"]["elbo"]["value"] = float(np.mean(elbo))
    path.mkdir()
    (path / "results.json").write_text(json.dumps(result))
    np.savez(path / "results.npz", elbo=np.float32(elbo))
    return path / "results.json"


def test_the_difference_is_paired(tmp_path):
    """Of 1, 2, 3 on the same examples: 2 ± 1 / √3, however far the examples are apart."""
    elbo = np.array([-70.0, -90.0, -110.0])
    first = _run(tmp_path / "a", elbo)
    second = _run(tmp_path / "b", elbo + np.array([1, 2, 3]), step=7)
    text = compare.compare(first, second)
    (row,) = (line.split() for line in text.splitlines() if line.startswith("elbo "))
    assert row == ["elbo", "-90.0000", "-88.0000", "+2.0000", "±", "0.5774", "nats"]
    (row,) = (line.split() for line in text.splitlines() if line.startswith("rate "))
    assert row[3:] == ["+0.0000", "nats"]  # it has no such arrays
    assert "nothing" in text.splitlines()[1]


def test_it_says_what_the_configs_differ_in(tmp_path):
    config = json.loads(KEPT.read_text())["config"]
    config["model"]["latents"] = 7
    paths = _run(tmp_path / "a", [-1.0, -2.0]), _run(tmp_path / "b", [-1.0, -2.0], config=config)
    assert "model.latents was 50, is 7" in compare.compare(*paths)


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    first = _run(tmp_path / "a", [-1.0, -2.0])
    second = _run(tmp_path / "b", [-1.0, -2.0], split="validation")
    with pytest.raises(UserError, match="split is test, and validation"):
        compare.compare(first, second)
    with pytest.raises(SystemExit, match=r"error: there is no .*nowhere.*results"):
        compare.main([str(first.parent), str(tmp_path / "nowhere")])
