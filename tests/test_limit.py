"""Counting the products of a function, and timing them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax import limit


def _counts(fn, *args):
    return [times for _, times in limit.products_of(fn, *args)]


def test_the_products_of_a_layer_and_its_gradients():
    """One forward; backward one for the weights and one for the input: 2 · 3 · B · I · O in all."""
    x, w = jnp.ones((5, 7)), jnp.ones((7, 3))

    def layer(x, w):
        return jnp.sum(jnp.tanh(x @ w))

    forward = limit.products_of(layer, x, w)
    assert limit.num_operations(forward) == 2 * 5 * 7 * 3
    both = limit.products_of(jax.grad(layer, (0, 1)), x, w)
    assert limit.num_operations(both) == 3 * 2 * 5 * 7 * 3
    # nobody asks for the gradient at the input
    assert limit.num_operations(limit.products_of(jax.grad(layer, 1), x, w)) == 2 * 2 * 5 * 7 * 3


def test_batches_of_products():
    x = jnp.ones((4, 5, 6))
    products = limit.products_of(lambda x: jnp.einsum("bij,bkj->bik", x, x), x)
    assert limit.num_operations(products) == 4 * (2 * 5 * 5 * 6)


def test_a_convolution_is_its_kernel_at_each_position():
    x, w = jnp.ones((2, 8, 8, 3)), jnp.ones((5, 5, 3, 7))
    products = limit.products_of(
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        x,
        w,
    )
    assert limit.num_operations(products) == 2 * (2 * 4 * 4 * 7) * (5 * 5 * 3)


def test_rounds_of_scans_multiply_and_calls_are_looked_into():
    w = jnp.ones((3, 3))

    def inner(h, _):
        return jax.jit(jnp.matmul)(h, w), None

    def outer(h, _):
        return jax.checkpoint(lambda h: jax.lax.scan(inner, h, None, length=4)[0])(h), None

    assert _counts(lambda h: jax.lax.scan(outer, h @ w, None, length=5)[0], w) == [1, 20]


def test_of_alternatives_the_first_is_counted():
    w = jnp.ones((3, 3))
    branches = (lambda: w @ w, lambda: w @ w @ w)
    assert _counts(lambda i: jax.lax.switch(i, branches), jnp.int32(1)) == [1]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("num", [1, 3])
def test_they_all_run_however_often_each_is_made(num, dtype):
    """Many times the operations take longer: none is left out or made once for all."""

    def made(size):
        w = jnp.ones((size, size), dtype)
        step = lambda h, _: (h @ w, None)  # noqa: E731
        return limit.products_of(lambda h: jax.lax.scan(step, h, None, length=num)[0], w)

    seconds = [limit.seconds_alone(made(size), seconds=0.2) for size in (64, 512)]
    assert np.isfinite(seconds).all()
    assert 0 < seconds[0] < seconds[1]
