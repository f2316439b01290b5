"""Links of the pages lead somewhere; the README's model is one. Its other code: test_main.py."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPO

from dgm_jax.core import DataSpec

README = (REPO / "README.md").read_text()
PAGES = [REPO / "README.md", REPO / "CHANGELOG.md", *sorted((REPO / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = set(re.findall(r"\]\(([^)#: ]+)[^): ]*\)", page.read_text()))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_model_of_the_readme_is_a_distribution():
    _, code, config = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(config, made := {"__name__": "configs"})
    assert "--config=configs/mine.py" in made["__doc__"] and made["get_config"].__doc__
    exec(code, names := {"__name__": "mine"})
    assert all(names[public].__doc__ for public in ("Config", "check", "build"))  # or ruff objects
    spec = DataSpec((2, 2, 1), "binary", np.zeros((2, 2, 1), np.float32), 4)
    names["check"](names["Config"](), spec)
    model = names["build"](names["Config"](), spec)
    every = jnp.array(list(itertools.product((0.0, 1.0), repeat=4))).reshape(16, 2, 2, 1)
    params = {"mine": {"logit": jnp.linspace(-2.0, 2.0, 4).reshape(2, 2, 1)}}
    assert model.init(jax.random.key(0), {"x": every})["mine"]["logit"].shape == (2, 2, 1)
    log_prob = model.log_likelihood_fns["log_prob"](params, {"x": every}, None)
    np.testing.assert_allclose(jnp.exp(log_prob).sum(), 1, rtol=1e-6)
    # Samples are draws of it, at five standard deviations.
    x = model.sample(params, jax.random.key(0), 10_000)["x"]
    mean = (jnp.exp(log_prob)[:, None, None, None] * every).sum(axis=0)
    assert (jnp.abs(x.mean(axis=0) - mean) < 5 * jnp.sqrt(mean * (1 - mean) / 10_000)).all()
