"""The README's Python example and its links do what they say."""

import os
import re
import subprocess
import sys

import pytest
from conftest import COMPILING, REPO

README = (REPO / "README.md").read_text()


def test_python_example_runs(tmp_path):
    """In a process of its own, after the command that leaves the work directory it restores."""
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "configs").symlink_to(REPO / "configs")
    env = {**os.environ, "PYTHONPATH": str(REPO), "XLA_FLAGS": COMPILING}
    train = [
        *("-m", "dgm_jax.main", "--config=configs/vae_mnist.py:smoke"),
        *("--config.train.duration=2 steps", "--config.eval.num_samples=1"),
    ]
    check = example + "assert images.shape == (16, 28, 28, 1), images.shape\n"
    for words in (train, ["-c", check]):
        subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, check=True, timeout=300)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (REPO / link).exists()
