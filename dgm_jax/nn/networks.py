"""From data to features and from latents to the parameters of p(x | z), whatever the layers."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax import likelihoods
from dgm_jax.core import DataSpec, UserError
from dgm_jax.nn.conv import ConvDecoder, ConvEncoder
from dgm_jax.nn.mlp import ACTIVATIONS, MLP
from dgm_jax.nn.precision import Dense

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
      likelihood: one of `likelihoods.LIKELIHOODS`, or None, as in `Head`.
      spec: of the data.
      grid: of `conv`: the latents are a vector for each position, as in `ConvDecoder`.
    """

    kind: str
    widths: tuple[int, ...]
    activation: str
    likelihood: str | None
    spec: DataSpec
    grid: bool = False

    @nn.compact
    def __call__(self, z: jax.Array, side: jax.Array | None = None) -> jax.Array:
        """Parameters of p(x | z), or p(x | z, side) with `side` float `[B, E]`."""
        z = _beside(z, side)
        if self.kind == "mlp":
            h = MLP(self.widths, self.activation)(z)
            return Head(self.likelihood, self.spec)(h)
        h = ConvDecoder(self.widths, self.spec.event_shape[:2], self.activation, self.grid)(z)
        h = h.reshape(*z.shape[:-1], -1, h.shape[-1])
        return Head(self.likelihood, self.spec, per_pixel=True)(h)


def _beside(z: jax.Array, side: jax.Array | None) -> jax.Array:
    """`z` float `[..., B, L]` with `side` float `[B, E]`, if any, behind it."""
    if side is None:
        return z
    side = jnp.expand_dims(side, range(z.ndim - 2))
    return jnp.concatenate([z, jnp.broadcast_to(side, (*z.shape[:-1], side.shape[-1]))], axis=-1)


class WindowDecoder(nn.Module):
    """A decoder whose pixels also see the few before them, row by row, in a window.

    The window keeps it from modelling the whole image without the latents (Chen et al. 2017,
    "Variational lossy autoencoder", section 3.1).

    Attributes:
      kind, widths, activation, likelihood, spec: as in `Decoder`.
      window: side of the square, odd: side² // 2 pixels, those above and to the left.
      width: hidden units for each pixel.
    """

    kind: str
    widths: tuple[int, ...]
    activation: str
    likelihood: str
    spec: DataSpec
    window: int
    width: int = 32

    def setup(self) -> None:
        """From latents to each pixel, and from there, with its neighbours, to its parameters."""
        sides = self.spec.event_shape[:2]
        if self.kind == "mlp":
            self.body = MLP(self.widths, self.activation)
            self.spread = Dense(math.prod(sides) * _FEATURES)
        else:
            self.body = ConvDecoder(self.widths, sides, self.activation)
        self.said = Dense(self.width, use_bias=False)
        self.seen = Dense(self.width)
        self.hidden = Dense(self.width)
        self.head = Head(self.likelihood, self.spec, per_pixel=True)

    def __call__(self, z: jax.Array, side: jax.Array | None, x: jax.Array) -> jax.Array:
        """Parameters `[..., D, P]` of each p(x_i | x_<i, z), for x `[B, *event]` in [0, 1].

        `side` float `[B, E]` or None as in `Decoder`.
        """
        return self._outputs(self.features(z, side), causal_patches(centred(x), self.window))

    def features(self, z: jax.Array, side: jax.Array | None = None) -> jax.Array:
        """What z, and `side` as in `Decoder`, say of each pixel: `[..., H · W, width]`."""
        z = _beside(z, side)
        h = self.body(z)
        if self.kind == "mlp":
            h = self.spread(h)
        pixels = math.prod(self.spec.event_shape[:2])
        return self.said(h.reshape(*z.shape[:-1], pixels, -1))

    def at(self, features: jax.Array, x: jax.Array, pixel: jax.Array) -> jax.Array:
        """Parameters `[B, C, P]` of one pixel's channels, `pixel` int32 `[]` counting row by row.

        For drawing in turn: of x in [0, 1] `[B, H, W, C]` only the window is looked at.
        """
        row, column = pixel // x.shape[2], pixel % x.shape[2]
        half = self.window // 2
        x = _padded(centred(x), half)
        shape = (len(x), half + 1, self.window, x.shape[-1])
        zero = jnp.zeros_like(row)
        near = jax.lax.dynamic_slice(x, (zero, row, column, zero), shape).reshape(len(x), -1)
        seen = near[:, : self.window**2 // 2 * x.shape[-1]]
        return self._outputs(features[:, pixel], seen, pixel)

    def _outputs(
        self, said: jax.Array, seen: jax.Array, pixel: jax.Array | None = None
    ) -> jax.Array:
        seen = self.seen(seen)
        h = nn.silu(said + jnp.expand_dims(seen, range(said.ndim - seen.ndim)))
        return self.head(nn.silu(self.hidden(h)), pixel)


def causal_patches(x: jax.Array, side: int) -> jax.Array:
    """The pixels before each one in its window: `[B, H, W, C]` -> `[B, H · W, side² // 2 · C]`.

    Zeros stand outside the image.
    """
    batch, height, width, _ = x.shape
    x = _padded(x, side // 2)
    corners = [divmod(i, side) for i in range(side * side // 2)]
    seen = [x[:, i : i + height, j : j + width] for i, j in corners]
    return jnp.concatenate(seen, axis=-1).reshape(batch, height * width, -1)


def _padded(x: jax.Array, half: int) -> jax.Array:
    """`x` with `half` rows of zeros above and as many columns on either side."""
    return jnp.pad(x, ((0, 0), (half, 0), (half, half), (0, 0)))


class Head(nn.Module):
    """The last layer of a decoder, its bias from the data's mean (Burda et al. 2016).

    Features `[..., F]` of the whole, or `[..., H · W, F]` of each pixel where `per_pixel`, -> the
    likelihood's parameters `[..., D, P]`; without a likelihood x / scale itself, `[..., D, 1]`.
    """

    likelihood: str | None
    spec: DataSpec
    per_pixel: bool = False

    @nn.compact
    def __call__(self, h: jax.Array, pixel: jax.Array | None = None) -> jax.Array:
        """Parameters of p(x | z); of one `pixel` alone, with its features, `[..., C, P]`."""
        if self.likelihood is None:
            initial = self.spec.unit_mean.reshape(-1, 1)
        else:
            initial = likelihoods.LIKELIHOODS[self.likelihood]().initial(self.spec.mean.ravel())
        # Flat, as biases are: the optimizer does not decay arrays of one dimension.
        bias = self.param("bias", lambda key: jnp.asarray(initial.ravel(), jnp.float32))
        lead = h.shape[: -2 if self.per_pixel and pixel is None else -1]
        pixels = math.prod(self.spec.event_shape[:2]) if self.per_pixel else 1
        out = Dense(initial.size // pixels, use_bias=False)(h)
        if pixel is not None:
            own = jnp.asarray(bias).reshape(pixels, -1)[pixel]
            out = out + jnp.expand_dims(own, range(len(lead)))
            return out.reshape(*lead, -1, initial.shape[-1])
        out = out.reshape(*lead, initial.size)
        return (out + jnp.expand_dims(bias, range(len(lead)))).reshape(*lead, *initial.shape)
