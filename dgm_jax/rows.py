"""Arrays with a row for each example."""

import jax
import jax.numpy as jnp

from dgm_jax.core import Batch


def row_weight(batch: Batch) -> jax.Array:
    """1 for the real rows of `batch`, 0 for padding: float32 `[B]`."""
    num = len(batch["x"])
    return jnp.where(batch["mask"], 1.0, 0.0) if "mask" in batch else jnp.ones(num)


def beside(values: jax.Array, x: jax.Array) -> jax.Array:
    """`values` `[B]` with axes of length 1 behind, to be multiplied with `x` `[B, *event]`."""
    return jnp.expand_dims(values, range(1, x.ndim))


def sum_event(values: jax.Array) -> jax.Array:
    """The sum over all axes but the first: `[B, ...]` -> `[B]`."""
    return jnp.sum(values.reshape(len(values), -1), axis=1)
