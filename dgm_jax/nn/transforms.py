"""Increasing functions of one number, of which bijections are made.

References: Dinh et al. 2017, "Density estimation using Real NVP"; Durkan et al. 2019, "Neural
spline flows".
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

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
    """y = x exp(s) + t (Dinh et al. 2017, eq. 5); P = 2: t, and the raw value of s."""

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
