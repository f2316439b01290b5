"""The README's Python example and its links do what they say."""

import re

import pytest
from conftest import REPO

from dgm_jax import config as configs
from dgm_jax import run
from dgm_jax.workdir import Workdir

README = (REPO / "README.md").read_text()


def test_python_example_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPO / "configs")
    # The example restores a finished work directory: leave one where it looks.
    config = configs.load(
        "configs/vae_mnist.py:smoke", {"eval.num_samples": 2, "train.duration": "50 steps"}
    )
    run.train_mode(config, Workdir(tmp_path / "runs" / "vae_mnist-smoke"))
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["images"].shape == (16, 28, 28, 1)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (REPO / link).exists()
