"""A U-Net: from fine to coarse and back, each stage beside what the one of its size has seen.

References: Ronneberger et al. 2015, "U-Net"; Ho et al. 2020, "Denoising diffusion probabilistic
models", appendix B (residual blocks, attention on coarse grids).
"""

import flax.linen as nn
import jax

from dgm_jax.nn.attention import Block, grid_positions, rotary_angles
from dgm_jax.nn.conv import Conv, ResidualBlock, Upsample


class UNet(nn.Module):
    """`[B, H, W, channels[0]]` -> the same shape.

    Attributes:
      channels: of each stage, the finest first; each halves the sides of the one before.
      blocks: residual blocks of a stage, on the way down and on the way up.
      depth: blocks of a Transformer over the coarsest grid.
      heads: of their attention.
    """

    channels: tuple[int, ...]
    blocks: int = 1
    depth: int = 0
    heads: int = 4

    @nn.compact
    def __call__(self, h: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        """Apply the stages; every block is told the condition `[B, E]`, if any."""
        seen = []
        for i, channels in enumerate(self.channels):
            h = Conv(channels, stride=2)(h) if i else h
            h = self._residual(h, condition)
            seen.append(h)
        h = self._attend(seen.pop(), condition)
        for channels, fine in zip(reversed(self.channels[:-1]), reversed(seen), strict=True):
            h = fine + Upsample(channels)(h, fine.shape[1:3])
            h = self._residual(h, condition)
        return nn.silu(h)

    def _residual(self, h: jax.Array, condition: jax.Array | None) -> jax.Array:
        for _ in range(self.blocks):
            h = ResidualBlock(h.shape[-1], "silu")(h, condition)
        return h

    def _attend(self, h: jax.Array, condition: jax.Array | None) -> jax.Array:
        batch, *sides, width = h.shape
        angles = rotary_angles(grid_positions(*sides), width // self.heads)
        flat = h.reshape(batch, -1, width)
        for _ in range(self.depth):
            block = Block(width, self.heads, 3 * width, conditional=condition is not None)
            flat = block(flat, angles, condition)
        return flat.reshape(h.shape)
