"""Invertible maps with their log-determinants: the parts of normalising flows.

Every map is a Linen module, called as

    y, log_det = bijection(x [B, ...], context=None, inverse=False)

where `log_det` `[B]` is log |det dy/dx| of the map that was applied, in nats: with `inverse` that
of the inverse. In a flow the forward direction is from data to noise. A context `[B, ...]` is seen
by the networks and not changed. Parameters are made by a forward call.

References: Dinh et al. 2017, "Density estimation using Real NVP"; Kingma & Dhariwal 2018, "Glow";
Papamakarios et al. 2017, "Masked autoregressive flow for density estimation"; Durkan et al. 2019,
"Neural spline flows".
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax.nn.conv import Conv, ResidualBlock
from dgm_jax.nn.mlp import ACTIVATIONS, MLP, MaskedMLP
from dgm_jax.nn.precision import Dense

Mapped = tuple[jax.Array, jax.Array]  # where x goes, and the log-determinant or log-slope


class Transform(NamedTuple):
    """A family of increasing functions of one number.

    Attributes:
      num_outputs: P, parameters of one function; all 0 is the identity.
      apply: `(x [...], parameters [..., P], inverse) -> (y [...], log dy/dx [...])`.
    """

    num_outputs: int
    apply: Callable[[jax.Array, jax.Array, bool], Mapped]


def affine() -> Transform:
    """y = x exp(s) + t (Dinh et al. 2017, eq. 8); P = 2: t, and the raw value of s."""

    def apply(x: jax.Array, parameters: jax.Array, inverse: bool) -> Mapped:
        shift, raw = jnp.moveaxis(parameters, -1, 0)
        log_scale = jnp.tanh(raw)  # bounded: no step can blow up
        if inverse:
            return (x - shift) * jnp.exp(-log_scale), -log_scale
        return x * jnp.exp(log_scale) + shift, log_scale

    return Transform(2, apply)


# Smallest width and height of a spline's bin, of 1 in all, and smallest slope at a knot.
_LEAST_BIN, _LEAST_SLOPE = 1e-3, 1e-3


def spline(bins: int, bound: float | jax.Array) -> Transform:
    """A monotonic rational-quadratic spline on [-bound, bound], the identity beyond.

    P = 3 K - 1 for K bins: raw widths, heights, and slopes at the inner knots; at the outer ones
    the slope is 1. Durkan et al. 2019, eqs. 4 to 8.
    """

    def apply(x: jax.Array, parameters: jax.Array, inverse: bool) -> Mapped:
        widths, heights, raw = jnp.split(parameters, [bins, 2 * bins], axis=-1)
        left, width = _bins(widths, bound)
        low, height = _bins(heights, bound)
        slopes = nn.softplus(raw + math.log(math.expm1(1 - _LEAST_SLOPE))) + _LEAST_SLOPE
        one = jnp.ones_like(slopes[..., :1])
        before = jnp.concatenate([one, slopes], axis=-1)
        after = jnp.concatenate([slopes, one], axis=-1)

        # Beyond the ends the formulas are evaluated at an end, and their result left unused.
        inside = jnp.clip(x, -bound, bound)
        starts = low if inverse else left
        number = jnp.sum(inside[..., None] >= starts[..., 1:], axis=-1)
        chosen = jax.nn.one_hot(number, bins, dtype=bool)
        # A sum of one term: gathering is slow, above all backwards.
        pick = lambda a: jnp.sum(jnp.where(chosen, a, 0), axis=-1)  # noqa: E731
        left, width, low, height = map(pick, (left, width, low, height))
        before, after = pick(before), pick(after)
        y, log_slope = _in_bin(inside, inverse, left, width, low, height, before, after)
        beyond = jnp.abs(x) >= bound
        return jnp.where(beyond, x, y), jnp.where(beyond, 0, log_slope)

    return Transform(3 * bins - 1, apply)


def _bins(raw: jax.Array, bound: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where each bin starts and how wide it is, `[..., K]`, all together 2 · bound."""
    bins = raw.shape[-1]
    share = _LEAST_BIN + (1 - _LEAST_BIN * bins) * nn.softmax(raw, axis=-1)
    ends = (2 * jnp.cumsum(share[..., :-1], axis=-1) - 1) * bound
    first = jnp.full_like(ends[..., :1], -1) * bound
    starts = jnp.concatenate([first, ends], axis=-1)
    # From the knots: rounding leaves no gap between a bin's end and the next one's start.
    return starts, jnp.concatenate([ends, -first], axis=-1) - starts


def _in_bin(
    x: jax.Array,
    inverse: bool,
    left: jax.Array,
    width: jax.Array,
    low: jax.Array,
    height: jax.Array,
    before: jax.Array,
    after: jax.Array,
) -> Mapped:
    """The rational-quadratic function of one bin (Durkan et al. 2019, eqs. 4, 5 and 8)."""
    mean = height / width
    bend = before + after - 2 * mean
    if inverse:
        up = x - low
        a = height * (mean - before) + up * bend
        b = height * before - up * bend
        c = -mean * up
        root = jnp.sqrt(jnp.maximum(b**2 - 4 * a * c, 1e-30))  # rounding may take it below 0
        t = jnp.clip(-2 * c / (b + root), 0, 1)
    else:
        t = (x - left) / width
    both = t * (1 - t)
    divisor = mean + bend * both
    slope = mean**2 * (after * t**2 + 2 * mean * both + before * (1 - t) ** 2) / divisor**2
    log_slope = jnp.log(slope)
    if inverse:
        return left + width * t, -log_slope
    return low + height * (mean * t**2 + before * both) / divisor, log_slope


def inverted(transform: Transform) -> Transform:
    """The same functions, the other way round."""
    num_outputs, apply = transform
    return Transform(num_outputs, lambda x, parameters, inverse: apply(x, parameters, not inverse))


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
        return y, _sum_event(log_slope)


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
                contexts[i] = context = squeeze(context)
        return self._to_image(x, contexts) if inverse else self._to_vector(x, contexts)

    def _to_vector(self, x: jax.Array, contexts: list[jax.Array | None]) -> Mapped:
        total, done = jnp.zeros(len(x), x.dtype), []
        for i, (level, context) in enumerate(zip(self.levels, contexts, strict=True)):
            x, log_det = level(squeeze(x), context)
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
            x, total = unsqueeze(x), total + log_det
        return x, total


def squeeze(x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` -> `[B, H / 2, W / 2, 4 C]`: each 2 x 2 pixels as channels."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return jnp.moveaxis(x, 2, 3).reshape(batch, height // 2, width // 2, 4 * channels)


def unsqueeze(x: jax.Array) -> jax.Array:
    """The inverse of `squeeze`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, 2, 2, channels // 4)
    return jnp.moveaxis(x, 3, 2).reshape(batch, 2 * height, 2 * width, channels // 4)


def _sum_event(values: jax.Array) -> jax.Array:
    """`[B, ...]` -> `[B]`."""
    return jnp.sum(values.reshape(len(values), -1), axis=1)
