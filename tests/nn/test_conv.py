"""Convolutions as matrix products of patches, against XLA's own; squares of pixels as one."""

import functools

import jax
import numpy as np
import pytest

from dgm_jax.nn.conv import Conv, convolve, convolve_patches, from_patches, to_patches


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("sides", [(6, 5), (7, 8), (1, 2)], ids=str)
def test_patches_are_the_convolution(sides, stride):
    """Values and both gradients, for even and odd sides."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, *sides, 3))
    kernel = jax.random.normal(keys[1], (3, 3, 3, 4))

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(fn):
        y, pull = jax.vjp(lambda x, w: fn(x, w, stride), x, kernel)
        return y, pull(jax.random.normal(keys[2], y.shape))

    expected, gradients = value_and_gradients(convolve)
    found, gradients_found = value_and_gradients(convolve_patches)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for a, b in zip(gradients_found, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_the_pixels_of_a_square_become_channels_row_by_row_and_pixels_again(side):
    x = np.arange(2 * 6 * 12 * 3.0).reshape(2, 6, 12, 3)
    patches = to_patches(x, side)
    assert patches.shape == (2, 6 // side, 12 // side, side**2 * 3)
    corners = [x[:, i::side, j::side] for i in range(side) for j in range(side)]
    np.testing.assert_array_equal(patches, np.concatenate(corners, axis=-1))
    np.testing.assert_array_equal(from_patches(patches, side), x)


def test_leading_axes_are_images_of_their_own():
    module, x = Conv(4, stride=2), jax.random.normal(jax.random.key(0), (3, 2, 5, 6, 3))
    params, apply = module.init(jax.random.key(1), x), jax.jit(module.apply)
    together = apply(params, x)
    assert together.shape == (3, 2, 3, 3, 4)
    np.testing.assert_allclose(together[1], apply(params, x[1]), atol=1e-6)
