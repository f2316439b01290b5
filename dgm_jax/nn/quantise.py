"""Discrete codes: vector quantisation, finite scalar quantisation, and densities of codes.

References: van den Oord et al. 2017, "Neural Discrete Representation Learning" (VQ); Mentzer et al.
2023, "Finite Scalar Quantization" (FSQ); Germain et al. 2015 (the autoregressive density).
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax.nn.mlp import MaskedMLP

_EMBEDDING = 8  # numbers that a code is to the autoregressive network


def straight_through(z: jax.Array, quantised: jax.Array) -> jax.Array:
    """`quantised`, with the gradient of `z`; the same shape."""
    return z + jax.lax.stop_gradient(quantised - z)


def nearest(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Index of the nearest entry of `codebook` `[C, E]` for each vector `[..., E]` -> `[...]`."""
    products = z.reshape(-1, z.shape[-1]) @ codebook.T
    distance = jnp.sum(codebook**2, axis=-1)[None] - 2 * products  # but for |z|², the same for all
    return jnp.argmin(distance, axis=-1).reshape(z.shape[:-1])


class Usage(NamedTuple):
    """What an EMA codebook remembers: each entry is the mean of the vectors sent to it.

    Attributes:
      count: `[C]`, decayed number of vectors of each entry.
      total: `[C, E]`, their decayed sum.
    """

    count: jax.Array
    total: jax.Array

    @property
    def codebook(self) -> jax.Array:
        """`[C, E]`; counts are smoothed so that an unused entry stays finite."""
        num = jnp.sum(self.count)
        smoothed = (self.count + 1e-5) / (num + len(self.count) * 1e-5) * num
        return self.total / smoothed[:, None]


def updated_usage(
    usage: Usage, z: jax.Array, index: jax.Array, weight: jax.Array, decay: float
) -> Usage:
    """The usage after one batch (van den Oord et al. 2017, appendix A.1).

    Args:
      usage: before it.
      z: float `[M, E]`.
      index: int `[M]`, the entry of each.
      weight: float `[M]`, 0 for what does not count.
      decay: γ.
    """
    one_hot = jax.nn.one_hot(index, len(usage.count)) * weight[:, None]
    count = decay * usage.count + (1 - decay) * jnp.sum(one_hot, axis=0)
    return Usage(count, decay * usage.total + (1 - decay) * one_hot.T @ z)


def perplexity(index: jax.Array, num: int, weight: jax.Array) -> jax.Array:
    """exp of the entropy of the usage of `num` codes by `index` `[M]`; `num` if uniform, `[]`."""
    share = weight @ jax.nn.one_hot(index, num) / jnp.sum(weight)
    return jnp.exp(-jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1.0))))


def finite_scalars(z: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """Each number to one of its few values in [-1, 1] (Mentzer et al. 2023, section 3.1).

    Args:
      z: float `[..., E]`.
      levels: of each of the E numbers, at least 2.

    Returns:
      Float `[..., E]`, with the gradient of the bounding function, straight through the rounding.
    """
    most = np.asarray(levels)
    half, offset = (most - 1) * (1 + 1e-3) / 2, np.where(most % 2 == 0, 0.5, 0.0)
    shift, lead = np.arctanh(offset / half), (1,) * (z.ndim - 1)

    def row(values: np.ndarray) -> jax.Array:
        return jnp.asarray(values, z.dtype).reshape(*lead, -1)

    bounded = jnp.tanh(z + row(shift)) * row(half) - row(offset)
    return straight_through(bounded, jnp.round(bounded)) / row(most // 2)


def scalars_to_index(values: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """The number of a code of `finite_scalars`, from 0 to Π levels - 1: `[..., E]` -> `[...]`."""
    most = jnp.asarray(levels)
    basis = jnp.asarray(np.cumprod([1, *levels[:-1]]))
    lead = (1,) * (values.ndim - 1)
    digits = jnp.round((values + 1) * (most // 2).reshape(*lead, -1)).astype(jnp.int32)
    return jnp.sum(digits * basis.reshape(*lead, -1), axis=-1)


def index_to_scalars(index: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """The inverse of `scalars_to_index`: `[...]` -> `[..., E]`."""
    most, basis = np.asarray(levels), np.cumprod([1, *levels[:-1]])
    parts = [index // b % m / (m // 2) - 1 for m, b in zip(most, basis, strict=True)]
    return jnp.stack(parts, axis=-1)


class UniformCodes(nn.Module):
    """p(c) = C^-N over N codes of C classes, as one-hots `[..., N, C]`."""

    num: int
    classes: int

    def log_prob(self, z: jax.Array) -> jax.Array:
        """log p(c) `[...]`, nats."""
        return jnp.full(z.shape[:-2], -self.num * math.log(self.classes))

    def draw(self, rng: jax.Array, num: int) -> jax.Array:
        """`num` draws, one-hots `[num, N, C]`."""
        index = jax.random.randint(rng, (num, self.num), 0, self.classes)
        return jax.nn.one_hot(index, self.classes)


class AutoregressiveCodes(nn.Module):
    """p(c) = Π_n p(c_n | c_<n) by a masked network, for one-hots `[..., N, C]`.

    A relaxed code, a row of C weights that sum to 1, is taken for the mean of its classes.
    """

    num: int
    classes: int
    width: int = 128

    def setup(self) -> None:
        """An embedding shared by all codes, and the masked network."""
        self.embedding = nn.Dense(_EMBEDDING, use_bias=False)
        self.net = MaskedMLP(self.num, (self.width, self.width), self.classes, inputs=_EMBEDDING)

    def log_prob(self, z: jax.Array) -> jax.Array:
        """log p(c) `[...]`, nats."""
        return jnp.sum(z * self.log_probs(z), axis=(-2, -1))

    def log_probs(self, z: jax.Array) -> jax.Array:
        """log p(c_n = · | c_<n) `[..., N, C]`."""
        h = self.embedding(z)
        return nn.log_softmax(self.net(h.reshape(*h.shape[:-2], -1)))

    def draw(self, rng: jax.Array, num: int) -> jax.Array:
        """`num` draws, one code after the other, one-hots `[num, N, C]`."""

        def next_code(n: jax.Array, z: jax.Array) -> jax.Array:
            index = jax.random.categorical(jax.random.fold_in(rng, n), self.log_probs(z)[:, n])
            return z.at[:, n].set(jax.nn.one_hot(index, self.classes, dtype=z.dtype))

        start = jnp.zeros((num, self.num, self.classes))
        return jax.lax.fori_loop(0, self.num, next_code, start)


PRIORS = {"uniform": UniformCodes, "autoregressive": AutoregressiveCodes}
