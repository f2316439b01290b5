"""Autoregressive distributions over categorical codes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax.nn.mlp import MaskedMLP


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
