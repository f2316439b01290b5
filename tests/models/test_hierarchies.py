"""What holds for every hierarchy trained on its layered objectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax import models
from dgm_jax.core import DataSpec
from dgm_jax.nn.posteriors import UNIT_RAW

SPEC = DataSpec((4, 4, 1), "binary", np.full((4, 4, 1), 0.4, np.float32), 100)
BATCH = {"x": jax.random.bernoulli(jax.random.key(0), 0.4, (3, 4, 4, 1)).astype(jnp.float32)}
FIELDS = {
    "hvae": {"latents": (3, 2), "width": (5, 4)},
    "two_level": {"latents": (3, 2), "width": 5, "prior": "standard"},
    "topdown": {"layers": (0, 2), "latents": 2, "channels": 3, "width": 3},
}


def _at_the_exact_posterior(shapes):
    """Zero weights: no layer looks at x or at another layer, and all are N(0, 1)."""

    def value(path, leaf):
        is_gaussian = "Diagonal_0" in jax.tree_util.keystr(path)
        if not is_gaussian or path[-1].key != "bias":
            return jnp.zeros(leaf.shape)
        return jnp.repeat(jnp.array([0.0, UNIT_RAW]), leaf.shape[0] // 2)

    return jax.tree_util.tree_map_with_path(value, shapes)


@functools.cache
def _gradient(name, objective, k):
    """The largest entry of each gradient of the posterior."""
    fields = {"objective": objective, "num_samples": k, **FIELDS[name]}
    model = models.build(models.defaults(name) | fields, SPEC)
    params = _at_the_exact_posterior(jax.eval_shape(model.init, jax.random.key(0), BATCH))
    loss = lambda params: model.loss_fn(params, BATCH, jax.random.key(1))[0]  # noqa: E731
    found = {
        jax.tree_util.keystr(path): np.abs(leaf).max()
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params))
    }
    return {path: size for path, size in found.items() if _is_posterior(path)}


@pytest.mark.parametrize("objective", ["stl", "dreg"])
@pytest.mark.parametrize("name", FIELDS)
def test_at_the_exact_posterior_no_draw_moves_it(name, objective):
    """Roeder et al. 2017, section 3: there, every weight is p(x) and the gradient that is left is
    exactly the model's; the score term, which `iwae` keeps, would add noise of mean 0.
    """
    assert max(_gradient(name, objective, 1 if objective == "stl" else 3).values()) < 1e-5
    assert max(_gradient(name, "iwae", 3).values()) > 1e-2


def _is_posterior(path):
    return any(part in path for part in ("'up_", "'infer_", "posterior_head"))
