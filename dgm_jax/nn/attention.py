"""Attention and the blocks of a Transformer, causal or not, for sequences and for grids.

Blocks have no biases and the normalisation has no gain: the layer behind it has one. Each starts as
the identity.

References: Vaswani et al. 2017, "Attention is all you need"; Zhang & Sennrich 2019, "Root mean
square layer normalization"; Su et al. 2021, "RoFormer" (rotary positions); Shazeer 2020, "GLU
variants improve Transformer" (SwiGLU); Peebles & Xie 2023, "Scalable diffusion models with
Transformers" (adaLN-zero).
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax.core import UserError
from dgm_jax.nn.precision import Dense, product


def check(
    width: int, heads: int, axes: int = 1, fields: tuple[str, str] = ("width", "heads")
) -> None:
    """Refuse heads that do not share out the width, or whose numbers are not pairs for each axis.

    Args:
      width: of the blocks.
      heads: of their attention.
      axes: of the positions; see `rotary_angles`.
      fields: of the model's config that say both.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    of_width, of_heads = (f"model.{field}" for field in fields)
    if heads < 1:
        raise UserError(f"{of_heads}={heads}: must be at least 1")
    if width < 1 or width % (2 * axes * heads):
        raise UserError(
            f"{of_width}={width}: must be a multiple of {2 * axes * heads}, so that each of "
            f"{of_heads}={heads} rotates pairs of numbers"
        )


def grid_positions(*sides: int) -> jax.Array:
    """Positions of a grid in raster order: `[prod(sides), len(sides)]`; of a sequence `[T, 1]`."""
    axes = jnp.meshgrid(*(jnp.arange(side) for side in sides), indexing="ij")
    return jnp.stack(axes, axis=-1).reshape(-1, len(sides)).astype(float)


def rotary_angles(positions: jax.Array, dim: int) -> jax.Array:
    """By how much to turn each pair of numbers of a head: `[T, dim / 2]` (Su et al. 2021, eq. 15).

    Args:
      positions: float `[T, A]`; each of the A axes turns its share of the pairs.
      dim: C, numbers of a head, a multiple of 2 A.
    """
    pairs = dim // (2 * positions.shape[1])
    frequencies = 10_000.0 ** (-jnp.arange(pairs) / pairs)
    return (positions[..., None] * frequencies[None, None]).reshape(len(positions), -1)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """`x` `[B, T, H, C]` turned by `angles` `[T, C / 2]`: number i and i + C / 2 are a pair.

    The product of a turned query and a turned key depends on the difference of their positions.
    """
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = (f(angles)[None, :, None] for f in (jnp.cos, jnp.sin))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rms_norm(h: jax.Array) -> jax.Array:
    """`h` `[..., F]` with a mean square of 1."""
    return h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)


class Cache(NamedTuple):
    """Keys, turned, and values of the positions so far; each `[B, T, H, C]`, zeros beyond."""

    keys: jax.Array
    values: jax.Array


class Attention(nn.Module):
    """Multi-head attention: `[B, T, F]` -> the same shape.

    Attributes:
      width: F.
      heads: H, which divides it.
      causal: a position sees itself and those before it, no other.
      out_init: of the last matrix.
    """

    width: int
    heads: int
    causal: bool = False
    out_init: nn.initializers.Initializer = nn.initializers.zeros

    def setup(self) -> None:
        """One matrix for each of query, key and value, of all heads."""
        self.query, self.key, self.value = (Dense(self.width, use_bias=False) for _ in range(3))
        self.out = Dense(self.width, use_bias=False, kernel_init=self.out_init)

    def __call__(self, h: jax.Array, angles: jax.Array) -> jax.Array:
        """Attend from every position to all; `angles` `[T, C / 2]` of `rotary_angles`."""
        query, new = self._project(h, angles)
        seen = jnp.tri(h.shape[1], dtype=bool) if self.causal else None
        return self._attend(query, new, seen)

    def step(
        self, h: jax.Array, angles: jax.Array, cache: Cache, index: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Attend from position `index` alone, `h` `[B, 1, F]`, `angles` `[1, C / 2]`."""
        query, new = self._project(h, angles)
        put = jax.lax.dynamic_update_slice_in_dim
        cache = Cache(*(put(old, one, index, 1) for old, one in zip(cache, new, strict=True)))
        seen = jnp.arange(cache.keys.shape[1])[None] <= index
        return self._attend(query, cache, seen), cache

    def _project(self, h: jax.Array, angles: jax.Array) -> tuple[jax.Array, Cache]:
        """Turned queries, and turned keys with their values."""
        shape = (*h.shape[:2], self.heads, -1)
        query, key, value = (f(h).reshape(shape) for f in (self.query, self.key, self.value))
        return rotate(query, angles), Cache(rotate(key, angles), value)

    def _attend(self, query: jax.Array, cache: Cache, seen: jax.Array | None) -> jax.Array:
        """`seen` bool `[T of the queries, T of the keys]`, or None for all."""
        scores = product(lambda q, k: jnp.einsum("bqhc,bkhc->bhqk", q, k), query, cache.keys)
        scores = scores / math.sqrt(query.shape[-1])
        if seen is not None:
            scores = jnp.where(seen[None, None], scores, -jnp.inf)
        weights = nn.softmax(scores)
        mixed = product(lambda w, v: jnp.einsum("bhqk,bkhc->bqhc", w, v), weights, cache.values)
        return self.out(mixed.reshape(*mixed.shape[:2], -1))


class FeedForward(nn.Module):
    """SwiGLU, silu(W h) ⊙ (V h) through a last matrix (Shazeer 2020, eq. 6): `[..., F]` -> same.

    Attributes:
      hidden: width between; 8/3 of F has the cost of a plain layer of 4 F.
      out_init: of the last matrix.
    """

    hidden: int
    out_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """Apply the layers."""
        gate, value = (Dense(self.hidden, use_bias=False, name=n)(h) for n in ("gate", "value"))
        out = Dense(h.shape[-1], use_bias=False, kernel_init=self.out_init, name="out")
        return out(nn.silu(gate) * value)


class Block(nn.Module):
    """Attention and a feed-forward layer, each added to what it is given normalised.

    Where `conditional` it is told a condition `[B, E]`, say of a diffusion time: shift, scale and
    gate of either are linear in its silu and start at zero (adaLN-zero; Peebles & Xie 2023, section
    3.2).

    Attributes:
      width: F.
      heads: of the attention.
      hidden: of the feed-forward layer.
      causal: see `Attention`.
      conditional: a condition is given.
    """

    width: int
    heads: int
    hidden: int
    causal: bool = False
    conditional: bool = False

    def setup(self) -> None:
        """A block starts as the identity by its gates or its last matrices: by both, it stays."""
        zeros = nn.initializers.zeros
        out_init = nn.linear.default_kernel_init if self.conditional else zeros
        self.attention = Attention(self.width, self.heads, self.causal, out_init)
        self.feed_forward = FeedForward(self.hidden, out_init)
        if self.conditional:
            self.modulation = Dense(6 * self.width, kernel_init=zeros)

    def __call__(
        self, h: jax.Array, angles: jax.Array, condition: jax.Array | None = None
    ) -> jax.Array:
        """Apply the block to `h` `[B, T, F]`; `angles` `[T, C / 2]` of `rotary_angles`."""
        if not self.conditional:
            h = h + self.attention(rms_norm(h), angles)
            return h + self.feed_forward(rms_norm(h))
        said = jnp.split(self.modulation(nn.silu(condition))[:, None], 6, axis=-1)
        shift, scale, gate = said[:3]
        h = h + gate * self.attention(modulate(h, shift, scale), angles)
        shift, scale, gate = said[3:]
        return h + gate * self.feed_forward(modulate(h, shift, scale))

    def step(
        self, h: jax.Array, angles: jax.Array, cache: Cache, index: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """The same at position `index` alone, unconditional; see `Attention.step`."""
        mixed, cache = self.attention.step(rms_norm(h), angles, cache, index)
        h = h + mixed
        return h + self.feed_forward(rms_norm(h)), cache

    def empty_cache(self, batch: int, length: int) -> Cache:
        """For `length` positions of `batch` sequences."""
        shape = (batch, length, self.heads, self.width // self.heads)
        return Cache(jnp.zeros(shape), jnp.zeros(shape))


def modulate(h: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """`h` `[B, ..., F]` normalised, then scaled by 1 + `scale` and shifted, each `[B, 1.., F]`."""
    return rms_norm(h) * (1 + scale) + shift


class Modulated(nn.Module):
    """`h` `[B, ..., F]` normalised, shifted and scaled as the condition `[B, E]` says."""

    @nn.compact
    def __call__(self, h: jax.Array, condition: jax.Array) -> jax.Array:
        """Apply the layer."""
        said = Dense(2 * h.shape[-1], kernel_init=nn.initializers.zeros)(nn.silu(condition))
        said = jnp.expand_dims(said, range(1, h.ndim - 1))
        return modulate(h, *jnp.split(said, 2, axis=-1))
