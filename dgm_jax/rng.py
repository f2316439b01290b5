"""Random keys derived from (seed, purpose, ids): never stored, never carried, never reused.

Every source of noise has a named stream, so adding one leaves the others as they were, and a
resumed run draws what the undisturbed run would have drawn.
"""

import zlib

import jax


def stream(seed: int | jax.Array, purpose: str, *ids: int | jax.Array) -> jax.Array:
    """The key of one noise source.

    Args:
      seed: int or int32 `[]`; the run's seed, possibly traced.
      purpose: the stream's name, e.g. `"train/vae"`.
      *ids: ints or int32 `[]` folded in from left to right, e.g. step or example id.

    Returns:
      A typed key `[]`.
    """
    # crc32, not hash(): the same in every process and every Python.
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    for i in ids:
        key = jax.random.fold_in(key, i)
    return key


def per_example(key: jax.Array, ids: jax.Array) -> jax.Array:
    """One key per example: `ids` int32 `[B]` -> keys `[B]`.

    What an example draws then depends on its id alone, not on its batch or its device.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids)
