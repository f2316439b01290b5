"""Autoregressive distributions over categorical codes."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax.nn.attention import Block, grid_positions, rms_norm, rotary_angles
from dgm_jax.nn.mlp import MaskedMLP
from dgm_jax.nn.precision import product


class AutoregressiveCategorical(nn.Module):
    """p(c) = Π_i p(c_i | c_1, ..., c_{i-1}) over N codes of C classes, by one masked network.

    Codes are one-hot vectors. Of relaxed ones, points of the simplex, `log_prob` is the extension
    Σ_i Σ_c y_ic log p(c_i = c | y_1, ..., y_{i-1}): differentiable, equal to the log-probability at
    the corners, and no density in between.

    Reference: Germain et al. 2015, "MADE"; here over embedded categorical variables.

    Attributes:
      num: N.
      classes: C.
      hidden: widths of the masked network's hidden layers.
      embedding: E, numbers that the network sees of each code; C where that is fewer.
    """

    num: int
    classes: int
    hidden: tuple[int, ...]
    embedding: int = 16

    def setup(self) -> None:
        """Embeddings of unit variance for each position, and the network."""
        size = min(self.embedding, self.classes)
        self.table = self.param(
            "embedding", nn.initializers.normal(1.0), (self.num, self.classes, size)
        )
        self.net = MaskedMLP(self.num, self.hidden, self.classes, inputs=size)

    def logits(self, codes: jax.Array) -> jax.Array:
        """Logits `[..., N, C]` of each code given those before it, for codes `[..., N, C]`."""
        embedded = jnp.einsum("...nc,nce->...ne", codes, self.table)
        return self.net(embedded.reshape(*embedded.shape[:-2], -1))

    def log_prob(self, codes: jax.Array) -> jax.Array:
        """log p(c) `[...]`, nats, for codes float `[..., N, C]`."""
        return jnp.sum(codes * nn.log_softmax(self.logits(codes)), axis=(-2, -1))

    def draw(self, rng: jax.Array, num: int) -> jax.Array:
        """`num` draws, one code after the other: one-hot `[num, N, C]`."""

        def add(codes: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            i, key = step
            drawn = jax.random.categorical(key, self.logits(codes)[:, i])
            return codes.at[:, i].set(jax.nn.one_hot(drawn, self.classes)), None

        start = jnp.zeros((num, self.num, self.classes))
        steps = jnp.arange(self.num), jax.random.split(rng, self.num)
        return jax.lax.scan(add, start, steps)[0]


class AutoregressiveTransformer(nn.Module):
    """p(c | label) = Π_i p(c_i | c_1, ..., c_{i-1}, label), by a decoder-only Transformer.

    It reads a learned start and then the codes, and at each says what comes next, so that p(c) is
    normalised over all sequences of N codes. The matrix of the logits is that of the embedding
    (Press & Wolf 2017). Codes are one-hot; of relaxed ones, see `AutoregressiveCategorical`.

    Reference: Vaswani et al. 2017, as in Radford et al. 2019, of `nn.attention`'s blocks.

    Attributes:
      num: N.
      classes: C.
      width: F, of embeddings and blocks.
      depth: number of blocks.
      heads: of each block's attention.
      hidden: of each block's feed-forward layer.
      grid: sides (H, W) of the image that the codes make up in raster order, as many at each pixel
        as there are channels; empty where they are a line.
      absolute: each position has a vector of its own, beside where it is to the others.
      labels: number of labels, each with a start of its own; 0 where there are none.
    """

    num: int
    classes: int
    width: int
    depth: int
    heads: int
    hidden: int
    grid: tuple[int, ...] = ()
    absolute: bool = True
    labels: int = 0

    def setup(self) -> None:
        """Embeddings, small beside what the blocks add, and the blocks."""
        small = nn.initializers.normal(0.02)
        self.table = self.param("embedding", small, (self.classes, self.width))
        self.start = self.param("start", small, (max(1, self.labels), self.width))
        if self.absolute:
            self.place = self.param("place", small, (self.num, self.width))
        block = (self.width, self.heads, self.hidden, True)
        self.blocks = [Block(*block) for _ in range(self.depth)]

    def logits(self, codes: jax.Array, label: jax.Array | None = None) -> jax.Array:
        """Logits `[B, N, C]` of each code given those before it, for codes `[B, N, C]`.

        `label` int32 `[B]` where there are labels.
        """
        before = product(jnp.matmul, codes[:, :-1].reshape(-1, self.classes), self.table)
        before = before.reshape(len(codes), self.num - 1, self.width)
        h = jnp.concatenate([self._starts(len(codes), label), before], axis=1)
        if self.absolute:
            h = h + self.place[None]
        for block in self.blocks:
            h = block(h, self._angles())
        return self._head(h)

    def log_prob(self, codes: jax.Array, label: jax.Array | None = None) -> jax.Array:
        """log p(c | label) `[B]`, nats, for codes float `[B, N, C]`."""
        return jnp.sum(codes * nn.log_softmax(self.logits(codes, label)), axis=(-2, -1))

    def draw(
        self,
        rng: jax.Array,
        num: int,
        label: jax.Array | None = None,
        temperature: float | jax.Array = 1.0,
        top_p: float | jax.Array = 1.0,
    ) -> jax.Array:
        """`num` draws, one code after the other from cached keys and values: `[num, N, C]`.

        Args:
          rng: of the draws.
          num: how many.
          label: int32 `[num]` where there are labels.
          temperature: the logits are divided by it.
          top_p: of each code, the fewest values that have this probability between them are drawn.
        """
        angles = self._angles()

        def add(carry: tuple, step: tuple[jax.Array, jax.Array]) -> tuple[tuple, jax.Array]:
            h, caches = carry
            i, key = step
            if self.absolute:
                h = h + self.place[i][None, None]
            here, kept = jax.lax.dynamic_slice_in_dim(angles, i, 1), []
            for block, cache in zip(self.blocks, caches, strict=True):
                h, cache = block.step(h, here, cache, i)
                kept.append(cache)
            logits = nucleus(self._head(h)[:, 0] / temperature, top_p)
            drawn = jax.random.categorical(key, logits)
            return (self.table[drawn][:, None], kept), drawn

        caches = [block.empty_cache(num, self.num) for block in self.blocks]
        steps = jnp.arange(self.num), jax.random.split(rng, self.num)
        _, drawn = jax.lax.scan(add, (self._starts(num, label), caches), steps)
        return jax.nn.one_hot(drawn.T, self.classes)

    def _starts(self, batch: int, label: jax.Array | None) -> jax.Array:
        """What the first code is predicted from, `[B, 1, F]`."""
        if label is None:
            return jnp.broadcast_to(self.start[None, :1], (batch, 1, self.width))
        return self.start[label][:, None]

    def _angles(self) -> jax.Array:
        """Of the position that is predicted."""
        grid = self.grid or (self.num,)
        positions = jnp.repeat(grid_positions(*grid), self.num // math.prod(grid), axis=0)
        return rotary_angles(positions, self.width // self.heads)

    def _head(self, h: jax.Array) -> jax.Array:
        """Logits `[B, T, C]` from the last block's `[B, T, F]`."""
        flat = rms_norm(h).reshape(-1, self.width)
        return product(jnp.matmul, flat, self.table.T).reshape(*h.shape[:2], self.classes)


def nucleus(logits: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """`logits` `[..., C]` with -inf where the likelier values have the probability `top_p` already.

    At 1 all are kept (Holtzman et al. 2020, "The curious case of neural text degeneration").
    """
    order = jnp.argsort(-logits, axis=-1)
    probs = jnp.take_along_axis(nn.softmax(logits), order, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    keep = jnp.take_along_axis(before, jnp.argsort(order, axis=-1), axis=-1) < top_p
    return jnp.where(keep | (jnp.asarray(top_p) >= 1), logits, -jnp.inf)
