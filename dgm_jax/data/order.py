"""Which examples a step sees: a pure function of (seed, step).

Each epoch visits the examples in an order of its own and leaves out the remainder that does not
fill a batch, other examples each time. The order is a keyed bijection, computed at the positions
asked for in O(batch): no sort, no iterator to save, nothing to restore.
"""

import math

import jax
import jax.numpy as jnp

from dgm_jax.rng import stream

_ROUNDS = 8


def batch_ids(
    seed: jax.Array,
    step: jax.Array,
    batch_size: int,
    num_examples: int,
    name: str = "data/order",
) -> jax.Array:
    """Ids of the examples in one batch.

    Args:
      seed: int32 `[]`.
      step: int32 `[]`, from 0.
      batch_size: B, at most `num_examples`.
      num_examples: N, size of the split.
      name: of the stream of keys; another name gives another order.

    Returns:
      int32 `[B]` in [0, N), distinct; distinct also from every other batch of the epoch.
    """
    steps_per_epoch = num_examples // batch_size
    round_keys = jax.random.bits(
        stream(seed, name, step // steps_per_epoch), (_ROUNDS,), jnp.uint32
    )
    position = (step % steps_per_epoch) * batch_size + jnp.arange(batch_size)
    return jax.vmap(permute, in_axes=(0, None, None))(position, round_keys, num_examples)


def permute(position: jax.Array, round_keys: jax.Array, n: int) -> jax.Array:
    """A keyed bijection of {0, ..., n-1}, evaluated at one position.

    A generalised Feistel network on Z_a x Z_b with a·b just above n; the few values that fall
    outside are sent round again until they do not (cycle walking). Black & Rogaway 2002, "Ciphers
    with Arbitrary Finite Domains", sections 4 and 5.

    Args:
      position: int32 `[]` in [0, n).
      round_keys: uint32 `[rounds]`.
      n: size of the domain, below 2^31.

    Returns:
      int32 `[]` in [0, n).
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)

    def network(value: jax.Array) -> jax.Array:
        left, right = value // b, value % b
        for i in range(_ROUNDS):
            if i % 2 == 0:
                left = (left + _below(right ^ round_keys[i], a)) % a
            else:
                right = (right + _below(left ^ round_keys[i], b)) % b
        return left * b + right

    walked = jax.lax.while_loop(lambda v: v >= n, network, network(position.astype(jnp.uint32)))
    return walked.astype(jnp.int32)


def _below(x: jax.Array, n: int) -> jax.Array:
    """Hash uint32 `x` to [0, n), n ≤ 2^16: a 32-bit finaliser, then the high bits scaled."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return ((x >> 16) * jnp.uint32(n)) >> 16
