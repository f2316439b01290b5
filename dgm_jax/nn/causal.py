"""Convolutions that see an image row by row: all of it at once, one row, or one pixel.

Two streams run side by side: the vertical one sees the rows above, the horizontal one what is to
the left, and what the vertical one has to say. So no pixel before is out of sight that lies within
reach, the sum of the layers' own, unless a dilation leaves gaps: one of more than the reach of all
layers of smaller ones. Drawing evaluates each pixel once.

Reference: van den Oord et al. 2016, "Conditional image generation with PixelCNN decoders".
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax.nn.precision import Dense

Offsets = tuple[tuple[int, int], ...]


class OffsetConv(nn.Module):
    """out[i, j] = b + Σ_o W_o x[i + o_1, j + o_2], zeros outside the image.

    Attributes:
      features: F, channels of the result.
      offsets: pairs (rows, columns); no row is below.
    """

    features: int
    offsets: Offsets

    def setup(self) -> None:
        """One product of what is seen."""
        self.dense = Dense(self.features)

    def __call__(self, x: jax.Array) -> jax.Array:
        """At every pixel: `[B, H, W, C]` -> `[B, H, W, F]`."""
        height, width = x.shape[1:3]
        above, aside = (max(abs(o[axis]) for o in self.offsets) for axis in (0, 1))
        x = jnp.pad(x, ((0, 0), (above, 0), (aside, aside), (0, 0)))
        seen = [
            x[:, above + i : above + i + height, aside + j : aside + j + width]
            for i, j in self.offsets
        ]
        return self.dense(jnp.concatenate(seen, axis=-1))

    def at_row(self, x: jax.Array, row: jax.Array) -> jax.Array:
        """At the pixels of one row: `[B, H, W, C]` -> `[B, W, F]`."""
        width, aside = x.shape[2], max(abs(j) for _, j in self.offsets)
        rows = {i: _entry(x, row + i) for i in {i for i, _ in self.offsets}}
        rows = {i: jnp.pad(r, ((0, 0), (aside, aside), (0, 0))) for i, r in rows.items()}
        seen = [rows[i][:, aside + j : aside + j + width] for i, j in self.offsets]
        return self.dense(jnp.concatenate(seen, axis=-1))

    def at_pixel(self, row: jax.Array, column: jax.Array) -> jax.Array:
        """At one pixel, where all offsets are in its row: `[B, W, C]` -> `[B, F]`."""
        seen = [_entry(row, column + j) for _, j in self.offsets]
        return self.dense(jnp.concatenate(seen, axis=-1))


def _entry(x: jax.Array, i: jax.Array) -> jax.Array:
    """`x[:, i]`, zeros before the first."""
    found = jax.lax.dynamic_index_in_dim(x, jnp.maximum(i, 0), axis=1, keepdims=False)
    return jnp.where(i >= 0, found, 0.0)


def _gate(h: jax.Array) -> jax.Array:
    """tanh(a) ⊙ sigmoid(b) of the two halves (van den Oord et al. 2016, eq. 2)."""
    a, b = jnp.split(h, 2, axis=-1)
    return jnp.tanh(a) * nn.sigmoid(b)


class GatedLayer(nn.Module):
    """A layer of both streams; `first` reads the image and sees no pixel itself.

    Attributes:
      channels: C, of either stream.
      reach: of the first layer: rows above and columns aside; of others: their dilation.
      first: of its kind.
    """

    channels: int
    reach: int
    first: bool = False

    def setup(self) -> None:
        """The convolutions, and what joins them."""
        reach = self.reach
        aside = range(-reach, reach + 1)
        if self.first:
            vertical = tuple((-i, j) for i in range(1, reach + 1) for j in aside)
            horizontal = tuple((0, -j) for j in range(1, reach + 1))
        else:
            vertical = tuple((i, j) for i in (0, -reach) for j in (-reach, 0, reach))
            horizontal = ((0, 0), (0, -reach))
        self.vertical = OffsetConv(2 * self.channels, vertical)
        self.horizontal = OffsetConv(2 * self.channels, horizontal)
        self.joint = Dense(2 * self.channels, use_bias=False)
        self.out = Dense(self.channels)

    def down(self, v: jax.Array, seen: jax.Array, told: jax.Array) -> tuple:
        """The vertical stream and what it says to the other, after `seen` by its convolution."""
        new = _gate(seen + told)
        return (new if self.first else v + new), self.joint(seen)

    def right(self, h: jax.Array, seen: jax.Array, said: jax.Array, told: jax.Array) -> jax.Array:
        """The horizontal stream, after `seen` by its convolution."""
        new = self.out(_gate(seen + said + told))
        return new if self.first else h + new
