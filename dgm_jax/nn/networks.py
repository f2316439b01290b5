"""From data to features and from latents to the parameters of p(x | z), whatever the layers."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax import likelihoods
from dgm_jax.core import DataSpec, UserError
from dgm_jax.nn.conv import ConvDecoder, ConvEncoder
from dgm_jax.nn.mlp import ACTIVATIONS, MLP

KINDS = ("mlp", "conv")

# Numbers that dense layers say of each pixel to a `CausalWindow`.
_FEATURES = 4


def check(kind: str, activation: str, spec: DataSpec, window: int = 0) -> None:
    """Refuse layers that are none, or that do not fit the data.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    if kind not in KINDS:
        raise UserError(f"model.network={kind!r}: choose one of {', '.join(KINDS)}")
    allowed = ("gated", *ACTIVATIONS) if kind == "mlp" else tuple(ACTIVATIONS)
    if activation not in allowed:
        raise UserError(
            f"model.activation={activation!r}: for {kind!r} layers choose one of "
            + ", ".join(allowed)
        )
    if kind == "conv" and len(spec.event_shape) != 3:
        raise UserError(f"model.network='conv' needs images, and these are {spec.event_shape}")
    if window and (window < 3 or window % 2 == 0):
        raise UserError(f"model.window={window}: give an odd side of at least 3, or 0 for none")
    if window and len(spec.event_shape) != 3:
        raise UserError(f"model.window={window} needs images, and these are {spec.event_shape}")


def check_widths(field: str, widths: tuple[int, ...]) -> None:
    """Refuse widths of layers that are not whole numbers of at least 1.

    Raises:
      UserError: names the field and its value.
    """
    if not widths or not all(isinstance(width, int) and width > 0 for width in widths):
        raise UserError(
            f"model.{field}={widths}: give one or more widths, whole numbers, each at least 1"
        )


def centred(x: jax.Array) -> jax.Array:
    """x in [0, 1] to ±1, so that the first layer starts with centred inputs."""
    return 2 * x.astype(jnp.float32) - 1


class Encoder(nn.Module):
    """x in [0, 1], `[B, *event]` -> features `[B, F]`.

    Attributes:
      kind: one of `KINDS`.
      widths: of dense layers, or channels of convolutional stages.
      activation: see `check`.
    """

    kind: str
    widths: tuple[int, ...]
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array, side: jax.Array | None = None) -> jax.Array:
        """Features of `x`, told `side` float `[B, E]` where given."""
        h = centred(x)
        if self.kind == "mlp":
            h = h.reshape(len(x), -1)
            h = h if side is None else jnp.concatenate([h, side], axis=-1)
            return MLP(self.widths, self.activation)(h)
        if side is not None:  # a plane for each of its numbers
            planes = jnp.broadcast_to(side[:, None, None], (*h.shape[:-1], side.shape[-1]))
            h = jnp.concatenate([h, planes], axis=-1)
        return ConvEncoder(self.widths, self.activation)(h)


class Decoder(nn.Module):
    """Latents `[..., L]` -> the likelihood's parameters `[..., D, P]`.

    Attributes:
      kind: one of `KINDS`.
      widths: of dense layers, or channels of convolutional stages, the coarsest first.
      activation: see `check`.
      likelihood: one of `likelihoods.LIKELIHOODS`.
      spec: of the data.
      grid: of `conv`: the latents are a vector for each position, as in `ConvDecoder`.
      window: odd side of the square through which each pixel sees those before it, as in
        `CausalWindow`; 0: pixels are independent given z.
    """

    kind: str
    widths: tuple[int, ...]
    activation: str
    likelihood: str
    spec: DataSpec
    grid: bool = False
    window: int = 0

    @nn.compact
    def __call__(
        self, z: jax.Array, side: jax.Array | None = None, x: jax.Array | None = None
    ) -> jax.Array:
        """Parameters of p(x | z), or p(x | z, side) with `side` float `[B, E]`.

        With a window, of each p(x_i | x_1, ..., x_{i-1}, z) at `x` in [0, 1], `[B, *event]`.
        """
        if side is not None:
            side = jnp.expand_dims(side, range(z.ndim - 2))
            side = jnp.broadcast_to(side, (*z.shape[:-1], side.shape[-1]))
            z = jnp.concatenate([z, side], axis=-1)
        if self.kind == "mlp":
            h = MLP(self.widths, self.activation)(z)
            if not self.window:
                return Head(self.likelihood, self.spec)(h)
            pixels = math.prod(self.spec.event_shape[:2])
            h = nn.Dense(pixels * _FEATURES)(h).reshape(*z.shape[:-1], pixels, _FEATURES)
        else:
            h = ConvDecoder(self.widths, self.spec.event_shape[:2], self.activation, self.grid)(z)
            h = h.reshape(*z.shape[:-1], -1, h.shape[-1])
        if self.window:
            h = CausalWindow(self.window)(h, x)
        return Head(self.likelihood, self.spec, per_pixel=True)(h)


class CausalWindow(nn.Module):
    """Lets each pixel see the few before it, row by row, beside what the latents say of it.

    The window keeps the decoder from modelling the whole image without the latents (Chen et al.
    2017, "Variational lossy autoencoder", section 3.1).

    Attributes:
      side: of the window, odd: side² // 2 pixels, those above and to the left.
      width: hidden units for each pixel.
    """

    side: int
    width: int = 32

    @nn.compact
    def __call__(self, h: jax.Array, x: jax.Array) -> jax.Array:
        """Features `[..., B, H · W, width]` of features `[..., B, H · W, F]` and x in [0, 1]."""
        seen = nn.Dense(self.width)(causal_patches(centred(x), self.side))
        said = nn.Dense(self.width, use_bias=False)(h)
        h = nn.silu(said + jnp.expand_dims(seen, range(h.ndim - seen.ndim)))
        return nn.silu(nn.Dense(self.width)(h))


def causal_patches(x: jax.Array, side: int) -> jax.Array:
    """The pixels before each one in its window: `[B, H, W, C]` -> `[B, H · W, side² // 2 · C]`.

    Zeros stand outside the image.
    """
    batch, height, width, _ = x.shape
    half = side // 2
    x = jnp.pad(x, ((0, 0), (half, 0), (half, half), (0, 0)))
    corners = [divmod(i, side) for i in range(side * side // 2)]
    seen = [x[:, i : i + height, j : j + width] for i, j in corners]
    return jnp.concatenate(seen, axis=-1).reshape(batch, height * width, -1)


class Head(nn.Module):
    """The last layer of a decoder, its bias from the data's mean (Burda et al. 2016).

    Features `[..., F]` of the whole, or `[..., H · W, F]` of each pixel where `per_pixel`, -> the
    likelihood's parameters `[..., D, P]`.
    """

    likelihood: str
    spec: DataSpec
    per_pixel: bool = False

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """Parameters of p(x | z)."""
        initial = likelihoods.LIKELIHOODS[self.likelihood]().initial(self.spec.mean.ravel())
        # Flat, as biases are: the optimizer does not decay arrays of one dimension.
        bias = self.param("bias", lambda key: jnp.asarray(initial.ravel(), jnp.float32))
        lead = h.shape[: -2 if self.per_pixel else -1]
        size = initial.size // (h.shape[-2] if self.per_pixel else 1)
        out = nn.Dense(size, use_bias=False)(h).reshape(*lead, initial.size)
        return (out + jnp.expand_dims(bias, range(len(lead)))).reshape(*lead, *initial.shape)
