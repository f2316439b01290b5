"""Multi-layer perceptron blocks."""

from collections.abc import Callable

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Dense hidden layers with one activation: `[..., D]` -> `[..., hidden[-1]]`."""

    hidden: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array] = nn.silu

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """Apply the layers to `h` float `[..., D]`."""
        for width in self.hidden:
            h = self.activation(nn.Dense(width)(h))
        return h
