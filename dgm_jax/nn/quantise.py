"""Quantisation: a vector becomes one of K codes, and gradients pass as if it had not.

Vector quantisation takes the nearest entry of a learned codebook (van den Oord et al. 2017, "Neural
Discrete Representation Learning"); finite scalar quantisation rounds each entry of a vector to one
of a few levels (Mentzer et al. 2023, "Finite Scalar Quantization").
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


def straight_through(v: jax.Array, code: jax.Array) -> jax.Array:
    """`code`, to the bit, with the gradient of `v`; both float of one shape."""
    return jax.lax.stop_gradient(code) + (v - jax.lax.stop_gradient(v))  # the bracket is 0


def nearest(v: jax.Array, codebook: jax.Array) -> jax.Array:
    """Index of the entry nearest to each vector (van den Oord et al. 2017, eq. 1).

    Args:
      v: float `[..., D]`.
      codebook: float `[K, D]`.

    Returns:
      int32 `[...]`, in {0, ..., K - 1}.
    """
    # |v - e|² without its |v|², which is the same for all entries: one matrix product.
    squares = jnp.expand_dims(jnp.sum(codebook**2, axis=-1), range(v.ndim - 1))
    return jnp.argmin(squares - 2 * v @ codebook.T, axis=-1).astype(jnp.int32)


def ema_state(codebook: jax.Array) -> dict[str, jax.Array]:
    """The variables of a codebook that follows its vectors, before the first update."""
    return {"codebook": codebook, "count": jnp.zeros(len(codebook))}


def ema_update(
    state: Mapping[str, jax.Array],
    v: jax.Array,
    index: jax.Array,
    weight: jax.Array,
    decay: float,
) -> dict[str, jax.Array]:
    """Each entry becomes the moving average of the vectors that were nearest to it.

    N_k ← γ N_k + (1 - γ) n_k, m_k ← γ m_k + (1 - γ) Σ v, e_k = m_k / N_k (van den Oord et al. 2017,
    appendix A.1), with n_k the number of vectors of entry k in the batch and Σ v their sum. N and m
    start from 0, so that their quotient is the weighted mean of the vectors seen, without bias
    towards the start.

    Args:
      state: `codebook` e `[K, D]` and `count` N `[K]`.
      v: float `[B, N, D]`, the encoder's vectors.
      index: int32 `[B, N]`, the entry of each.
      weight: float `[B]`, 1 for real rows and 0 for padding.
      decay: γ.
    """
    v, codebook = jax.lax.stop_gradient(v), state["codebook"]
    member = weight[:, None, None] * jax.nn.one_hot(index, len(codebook))
    num, total = jnp.sum(member, axis=(0, 1)), jnp.einsum("bnk,bnd->kd", member, v)
    count = decay * state["count"] + (1 - decay) * num
    # m / N as a step from e: an entry that nothing is near to stays where it is, where the quotient
    # would end as 0 / 0. One that something is near to has a count of at least 1 - γ.
    rate = (1 - decay) / jnp.where(num > 0, count, 1.0)
    step = rate[:, None] * (total - num[:, None] * codebook)
    return {"codebook": codebook + step, "count": count}


def perplexity(index: jax.Array, num: int, weight: jax.Array) -> jax.Array:
    """exp of the entropy of the codes' frequencies: K where all are used alike, 1 for one alone.

    Args:
      index: int32 `[B, N]`.
      num: K.
      weight: float `[B]`, 1 for real rows and 0 for padding.
    """
    count = weight @ jnp.sum(jax.nn.one_hot(index, num), axis=1)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(count / jnp.sum(count))))


def fsq_index(u: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """Index of the code that each vector is rounded to, entry by entry.

    Levels 0, ..., L - 1 of an entry lie evenly spread over [-1, 1]. With L even none is 0: this is
    the half-offset of Mentzer et al. (2023, section 3.1), without their shift of the input, which
    is infinite at L = 2.

    Args:
      u: float `[..., d]` in [-1, 1]: a hyperbolic tangent bounds what an encoder gives.
      levels: L of each entry.

    Returns:
      int32 `[...]`, in {0, ..., Π L - 1}, the first entry counting fastest.
    """
    highest = jnp.expand_dims(jnp.array(levels) - 1, range(u.ndim - 1))
    digits = jnp.round((u + 1) / 2 * highest).astype(jnp.int32)
    return jnp.sum(digits * jnp.expand_dims(_places(levels), range(u.ndim - 1)), axis=-1)


def fsq_codebook(levels: tuple[int, ...]) -> jax.Array:
    """The code of every index, float `[Π L, d]` in [-1, 1]: the inverse of `fsq_index`."""
    index = np.arange(math.prod(levels))[:, None]
    digits = index // _places(levels) % np.array(levels)
    return jnp.asarray(2 * digits / (np.array(levels) - 1) - 1)


def _places(levels: tuple[int, ...]) -> np.ndarray:
    """What a step of each entry's level adds to the index, int32 `[d]`."""
    return np.cumprod((1, *levels[:-1]), dtype=np.int32)
