"""Convolutional residual blocks, and an encoder and a decoder made of them.

Reference: He et al. 2016, "Identity mappings in deep residual networks" (the order within a block);
Child 2021, "Very deep VAEs" (no normalisation, a small start instead).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax.nn.mlp import ACTIVATIONS


class ResidualBlock(nn.Module):
    """h + conv(act(conv(act(h)))): `[..., H, W, C]` -> the same shape; starts as the identity.

    Attributes:
      width: channels between the two convolutions.
      activation: one of `ACTIVATIONS`.
    """

    width: int
    activation: str = "silu"

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """Apply the block."""
        act = ACTIVATIONS[self.activation]
        inner = nn.Conv(self.width, (3, 3))(act(h))
        return h + nn.Conv(h.shape[-1], (3, 3), kernel_init=nn.initializers.zeros)(act(inner))


class ConvEncoder(nn.Module):
    """`[B, H, W, C]` -> features `[B, F]`: each stage halves the sides and has a residual block."""

    channels: tuple[int, ...]
    activation: str = "silu"

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """Apply the stages."""
        for channels in self.channels:
            h = nn.Conv(channels, (3, 3), strides=2)(h)
            h = ResidualBlock(channels, self.activation)(h)
        return ACTIVATIONS[self.activation](h).reshape(len(h), -1)


class ConvDecoder(nn.Module):
    """`[..., L]` -> features `[..., H, W, channels[-1]]`: the way back of a `ConvEncoder`.

    Attributes:
      channels: of each stage, the coarsest first.
      sides: (H, W) of the result.
      grid: z holds a vector for each position of the coarsest stage, row by row, which alone
        decides what stands there; else all of z decides all of it.
    """

    channels: tuple[int, ...]
    sides: tuple[int, int]
    activation: str = "silu"
    grid: bool = False

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Apply the stages."""
        all_sides = halvings(self.sides, len(self.channels))
        lead, positions = z.shape[:-1], math.prod(all_sides[-1])
        if self.grid:
            h = nn.Dense(self.channels[0])(z.reshape(*lead, positions, -1))
        else:
            h = nn.Dense(positions * self.channels[0])(z)
        h = h.reshape(*lead, *all_sides[-1], self.channels[0])
        for channels, sides in zip(self.channels, reversed(all_sides[:-1]), strict=True):
            h = ResidualBlock(channels, self.activation)(h)
            h = Upsample(channels)(h, sides)
        return ACTIVATIONS[self.activation](h)


def halvings(sides: tuple[int, int], num: int) -> list[tuple[int, int]]:
    """(H, W) and its `num` successive halves, rounded up."""
    found = [sides]
    for _ in range(num):
        found.append(tuple(-(-side // 2) for side in found[-1]))
    return found


class Upsample(nn.Module):
    """Each pixel becomes 2 x 2: `[..., H, W, C]` -> `[..., *sides, channels]`, cut where odd.

    The four are made by one dense layer at the coarse resolution (Shi et al. 2016).
    """

    channels: int

    @nn.compact
    def __call__(self, h: jax.Array, sides: tuple[int, int]) -> jax.Array:
        """Apply the layer."""
        *lead, height, width, _ = h.shape
        h = nn.Dense(4 * self.channels)(h).reshape(*lead, height, width, 2, 2, self.channels)
        h = jnp.moveaxis(h, -3, -4).reshape(*lead, 2 * height, 2 * width, self.channels)
        return h[..., : sides[0], : sides[1], :]
