"""Invertible maps with their log-determinants: the parts of normalising flows.

Every map is a Linen module, called as

    y, log_det = bijection(x [B, ...], context=None, inverse=False)

where `log_det` `[B]` is log |det dy/dx| of the map that was applied, in nats: with `inverse` that
of the inverse. In a flow the forward direction is from data to noise. A context `[B, ...]` is seen
by the networks and not changed. Parameters are made by a forward call.

References: Dinh et al. 2017, "Density estimation using Real NVP"; Kingma & Dhariwal 2018, "Glow";
Papamakarios et al. 2017, "Masked autoregressive flow for density estimation". What they do to one
number is in `nn.transforms`.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax.nn.conv import Conv, ResidualBlock, from_patches, to_patches
from dgm_jax.nn.mlp import ACTIVATIONS, MLP, MaskedMLP
from dgm_jax.nn.precision import Dense
from dgm_jax.nn.transforms import Mapped, Transform
from dgm_jax.rows import sum_event


def couple(
    x: jax.Array,
    num_kept: int,
    transform: Transform,
    parameters_of: Callable[[jax.Array], jax.Array],
    inverse: bool = False,
) -> Mapped:
    """A coupling: what is kept decides what becomes of the rest (Dinh et al. 2017, eqs. 4 to 8).

    Args:
      x: float `[..., D]`.
      num_kept: how many of the D, the first, are kept.
      transform: of each of the others.
      parameters_of: `[..., num_kept] -> [..., D - num_kept, P]`.
      inverse: see above.

    Returns:
      y `[..., D]`, and its log-slopes summed over the last axis, `[...]`.
    """
    kept, rest = jnp.split(x, [num_kept], axis=-1)
    rest, log_slope = transform.apply(rest, parameters_of(kept), inverse)
    return jnp.concatenate([kept, rest], axis=-1), jnp.sum(log_slope, axis=-1)


def autoregress(
    x: jax.Array,
    transform: Transform,
    parameters_of: Callable[[jax.Array], jax.Array],
    inverse: bool = False,
) -> Mapped:
    """y_j is a function of x_j that x_1, ..., x_{j-1} decide (Papamakarios et al. 2017, eq. 3).

    One pass of the network forward, D + 1 for the inverse, one variable after the other.

    Args:
      x: float `[..., D]`.
      transform: of each.
      parameters_of: `[..., D] -> [..., D, P]`, those of variable j from the ones before it.
      inverse: see above.

    Returns:
      As `couple`.
    """
    if not inverse:
        y, log_slope = transform.apply(x, parameters_of(x), False)
        return y, jnp.sum(log_slope, axis=-1)

    def find(j: jax.Array, y: jax.Array) -> jax.Array:
        found, _ = transform.apply(x, parameters_of(y), True)
        return y.at[..., j].set(found[..., j])

    y = jax.lax.fori_loop(0, x.shape[-1], find, jnp.zeros_like(x))
    _, log_slope = transform.apply(x, parameters_of(y), True)
    return y, jnp.sum(log_slope, axis=-1)


class ActNorm(nn.Module):
    """y = (x - m) / s for each entry of the last axis (Kingma & Dhariwal 2018, section 3.1).

    m and s start as mean and deviation of what the first call sees.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, inverse: bool = False
    ) -> Mapped:
        """Apply the map."""
        del context
        flat = x.reshape(-1, x.shape[-1])
        mean = self.param("mean", lambda key: jnp.mean(flat, axis=0))
        log_scale = self.param("log_scale", lambda key: _log_deviation(flat))
        mean, log_scale = (jnp.expand_dims(a, range(x.ndim - 1)) for a in (mean, log_scale))
        log_det = jnp.full(len(x), jnp.sum(log_scale) * (flat.shape[0] // len(x)))
        if inverse:
            return x * jnp.exp(log_scale) + mean, log_det
        return (x - mean) * jnp.exp(-log_scale), -log_det


def _log_deviation(x: jax.Array) -> jax.Array:
    """log of the deviation of each column of `[N, D]`; 0 where it does not vary."""
    deviation = jnp.std(x, axis=0)
    return jnp.log(jnp.where(deviation > 0, deviation, 1))


class Linear(nn.Module):
    """y = U L P x over the last axis: on images an invertible 1 x 1 convolution.

    P reverses the order, so that what one coupling kept the next one changes; L and U, triangular
    with 1 and with positive numbers on the diagonal, start as the identity. Kingma & Dhariwal 2018,
    section 3.2 (there P is drawn).
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, inverse: bool = False
    ) -> Mapped:
        """Apply the map."""
        del context
        size = x.shape[-1]
        # One array: L below the diagonal, U above it, and on it the logarithms of U's own.
        raw = self.param("lower_upper", nn.initializers.zeros, (size, size))
        log_diagonal = jnp.diagonal(raw)
        lower = jnp.tril(raw, -1) + jnp.eye(size)
        upper = jnp.triu(raw, 1) + jnp.diag(jnp.exp(log_diagonal))
        flat = x.reshape(-1, size)
        log_det = jnp.full(len(x), jnp.sum(log_diagonal) * (len(flat) // len(x)))
        # In full precision always: a map that is rounded does not have this determinant.
        multiply = lambda a, b: jnp.matmul(a, b, precision="highest")  # noqa: E731
        if inverse:
            solve = jax.scipy.linalg.solve_triangular
            flat = solve(lower, solve(upper, flat.T), lower=True, unit_diagonal=True).T
            return flat[:, ::-1].reshape(x.shape), -log_det
        flat = multiply(multiply(flat[:, ::-1], lower.T), upper.T)
        return flat.reshape(x.shape), log_det


class Conditioner(nn.Module):
    """The network of a coupling: `[B, ..., F]` -> `[B, ..., num]`, zeros at the start.

    Attributes:
      kind: `mlp`, or `conv`: a 3 x 3 convolution, a residual block for each further width, and a
        last convolution.
      widths: of dense layers, or channels.
      activation: one of `ACTIVATIONS`, or for an `mlp` also `gated`.
    """

    kind: str
    widths: tuple[int, ...]
    activation: str

    @nn.compact
    def __call__(self, h: jax.Array, context: jax.Array | None, num: int) -> jax.Array:
        """What `num` numbers are to be, at each position of an image."""
        h = h if context is None else jnp.concatenate([h, context], axis=-1)
        zeros = nn.initializers.zeros
        if self.kind == "mlp":
            return Dense(num, kernel_init=zeros)(MLP(self.widths, self.activation)(h))
        h = Conv(self.widths[0])(h)
        for width in self.widths[1:]:
            h = ResidualBlock(width, self.activation)(h)
        return Conv(num, kernel_init=zeros)(ACTIVATIONS[self.activation](h))


class Coupling(nn.Module):
    """`couple`, where the first half of the last axis is kept.

    Attributes:
      transform: of each entry of the other half.
      net: decides its parameters.
    """

    transform: Transform
    net: Conditioner

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, inverse: bool = False
    ) -> Mapped:
        """Apply the map."""
        num_kept = x.shape[-1] // 2
        shape = (x.shape[-1] - num_kept, self.transform.num_outputs)

        def parameters_of(kept: jax.Array) -> jax.Array:
            return self.net(kept, context, math.prod(shape)).reshape(*x.shape[:-1], *shape)

        y, log_slope = couple(x, num_kept, self.transform, parameters_of, inverse)
        return y, sum_event(log_slope)


class Autoregressive(nn.Module):
    """`autoregress` of vectors, by one masked network.

    Attributes:
      transform: of each variable.
      net: decides its parameters.
    """

    transform: Transform
    net: MaskedMLP

    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, inverse: bool = False
    ) -> Mapped:
        """Apply the map."""
        return autoregress(x, self.transform, lambda x: self.net(x, context), inverse)


class Chain(nn.Module):
    """One map after the other.

    Attributes:
      parts: the first is next to the data.
    """

    parts: tuple[nn.Module, ...]

    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, inverse: bool = False
    ) -> Mapped:
        """Apply all."""
        total = jnp.zeros(len(x), x.dtype)
        for part in reversed(self.parts) if inverse else self.parts:
            x, log_det = part(x, context, inverse)
            total += log_det
        return x, total


class MultiScale(nn.Module):
    """Images `[B, H, W, C]` to vectors `[B, H · W · C]`: each level works at half the sides.

    Before a level each 2 x 2 pixels become four times the channels, and after it, but for the
    last, half of the channels are done with (Dinh et al. 2017, section 3.6). A context is an image.

    Attributes:
      levels: a map of images each; H and W are divisible by 2 to the power of their number.
      shape: (H, W, C) of the image.
    """

    levels: tuple[nn.Module, ...]
    shape: tuple[int, int, int]

    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, inverse: bool = False
    ) -> Mapped:
        """Apply the levels."""
        contexts = [context] * len(self.levels)
        if context is not None:
            for i in range(len(contexts)):
                contexts[i] = context = to_patches(context, 2)
        return self._to_image(x, contexts) if inverse else self._to_vector(x, contexts)

    def _to_vector(self, x: jax.Array, contexts: list[jax.Array | None]) -> Mapped:
        total, done = jnp.zeros(len(x), x.dtype), []
        for i, (level, context) in enumerate(zip(self.levels, contexts, strict=True)):
            x, log_det = level(to_patches(x, 2), context)
            total += log_det
            if i < len(self.levels) - 1:
                x, half = jnp.split(x, 2, axis=-1)
                done.append(half)
        return jnp.concatenate([part.reshape(len(x), -1) for part in (*done, x)], axis=-1), total

    def _to_image(self, z: jax.Array, contexts: list[jax.Array | None]) -> Mapped:
        total, x, last = jnp.zeros(len(z), z.dtype), None, len(self.levels) - 1
        height, width, channels = self.shape
        for i in reversed(range(len(self.levels))):
            # What left after this level is as large as all that went on.
            sides = height >> (i + 1), width >> (i + 1)
            shape = (len(z), *sides, channels << (i + 1 if i < last else i + 2))
            z, part = jnp.split(z, [z.shape[1] - math.prod(shape[1:])], axis=1)
            part = part.reshape(shape)
            x = part if x is None else jnp.concatenate([x, part], axis=-1)
            x, log_det = self.levels[i](x, contexts[i], inverse=True)
            x, total = from_patches(x, 2), total + log_det
        return x, total
