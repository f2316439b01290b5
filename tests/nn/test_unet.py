"""A U-Net: its shapes, how far it sees, and that a fresh one still learns everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax.nn.unet import UNet


def _moved(module, h):
    """Parameters away from the start, where blocks are the identity."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(module.init, jax.random.key(0), h))
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, drawn)


@pytest.mark.parametrize("sides", [(5, 7), (8, 8)], ids=str)
def test_the_result_has_the_shape_of_what_is_given_odd_sides_too(sides):
    module, h = UNet((3, 4, 8), depth=1, heads=2), jnp.ones((2, *sides, 3))
    assert jax.eval_shape(module.init_with_output, jax.random.key(0), h)[0].shape == h.shape


@pytest.mark.parametrize("depth", [0, 1])
def test_attention_on_the_coarse_grid_lets_every_pixel_see_every_other(depth):
    """Without it a corner is out of sight of the corner across: convolutions see a few pixels."""
    module, h = UNet((2, 4), blocks=0, depth=depth, heads=1), jnp.zeros((1, 12, 12, 2)) + 0.1
    params = _moved(module, h)
    corner = jax.jit(jax.grad(lambda h: jnp.sum(module.apply(params, h)[0, 0, 0])))(h)
    assert (corner[0, -1, -1] != 0).any() == bool(depth)
    assert (corner[0, 0, 0] != 0).any()


def test_a_fine_stage_reaches_the_result_beside_the_coarse():
    """The checkerboard that halving cannot carry comes through the skip."""
    module, h = UNet((1, 4), blocks=0), jnp.zeros((1, 4, 4, 1))
    params = module.init(jax.random.key(0), h)
    sign = (-1.0) ** np.add.outer(np.arange(4), np.arange(4)).reshape(1, 4, 4, 1)
    zero = jax.tree.map(jnp.zeros_like, params)
    apply, expected = jax.jit(module.apply), jax.nn.silu(sign)
    np.testing.assert_allclose(apply(zero, sign), expected, rtol=1e-6)
    assert np.abs(apply(params, sign) - expected).max() > 1e-3
