"""Networks that are given a noisy example and a time, and answer with something of its shape.

Shared by diffusion, flow matching and mean flows, which differ in what the answer means.

References: Ho et al. 2020, "Denoising diffusion probabilistic models" (the U-Net, told the time);
Peebles & Xie 2023, "Scalable diffusion models with Transformers" (DiT); Ho & Salimans 2022,
"Classifier-free diffusion guidance".
"""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import checks, labels
from dgm_jax.core import DataSpec, UserError
from dgm_jax.nn import attention
from dgm_jax.nn.attention import Block, Modulated, grid_positions, rotary_angles
from dgm_jax.nn.conv import Conv, from_patches, to_patches
from dgm_jax.nn.precision import Dense
from dgm_jax.nn.unet import UNet

NETWORKS = ("mlp", "unet", "dit")

_FREQUENCIES = 16  # of the time: 1 to 30 radians for each unit of it
_WAVES = (1.0, 2.0, 4.0, 8.0)  # of vectors: radians for each unit


@dataclasses.dataclass(frozen=True)
class Config:
    """The network's fields, and those of a model that is told the class. May be traced: guidance.

    Attributes:
      network: `mlp`: residual dense layers; of images also `unet`, or `dit`, a Transformer.
      patch: of images: side of the squares of pixels that are one position of the network.
      width: of an `mlp` or a `dit`: of its blocks.
      channels: of a `unet`: of its stages, the finest first.
      blocks: of the same: residual blocks of a stage, each way.
      depth: number of an `mlp`'s or a Transformer's blocks; of a `unet`, over its coarsest grid.
      heads: of each Transformer block's attention.
      conditional: the network is told the label: a model of p(x | label).
      label_dropout: how often in training it is not, so that it also models p(x).
      guidance: w: a sampler follows (1 - w) · the answer without the label + w · that with it.
    """

    network: str = "mlp"
    patch: int = 1
    width: int = 128
    channels: tuple[int, ...] = (32, 64)
    blocks: int = 1
    depth: int = 2
    heads: int = 4
    conditional: bool = False
    label_dropout: float = 0.1
    guidance: float = 1.0


def check(config: Config, spec: DataSpec) -> None:
    """Refuse layers that are none, or that do not fit the data.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    if spec.support == "tokens":
        raise UserError(
            "noise is added to images or real vectors, and these are tokens: "
            "model.name='masked_diffusion' hides tokens instead"
        )
    checks.one_of(config, network=NETWORKS)
    checks.at_least(config, patch=1, width=1, blocks=0, depth=0, heads=1)
    checks.widths(config, "channels")
    if config.network != "mlp":
        if len(spec.event_shape) != 3:
            raise UserError(
                f"model.network={config.network!r} needs images, and these are "
                f"{spec.event_shape}: choose 'mlp'"
            )
        if any(side % config.patch for side in spec.event_shape[:2]):
            raise UserError(
                f"model.patch={config.patch}: must divide the sides of an image, "
                f"and these are {spec.event_shape[:2]}"
            )
    if config.network == "unet" and config.depth:
        attention.check(config.channels[-1], config.heads, 2, ("channels[-1]", "heads"))
    if config.network == "dit":
        attention.check(config.width, config.heads, 2)
    labels.check(config.conditional, spec)
    if not 0 <= config.label_dropout < 1:
        raise UserError(
            f"model.label_dropout={config.label_dropout}: must be at least 0 and below 1"
        )
    checks.finite(config, "guidance")
    if config.guidance != 1 and not (config.conditional and config.label_dropout):
        raise UserError(
            f"model.guidance={config.guidance} is between answers with and without the label: it "
            "needs model.conditional=True and a model.label_dropout above 0"
        )


class Denoiser(nn.Module):
    """`(x [B, *event], time, label) -> [B, *event]`; a fresh one answers 0."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, label: jax.Array | None = None) -> jax.Array:
        """The answer.

        Args:
          x: float `[B, *event]`, of about unit variance.
          time: float `[B]` of about unit size, or `[B, 2]`, the ends of an interval.
          label: one-hot `[B, C]`, zeros where it is not told; None of a model without labels.
        """
        config, zeros = self.config, nn.initializers.zeros
        width = config.channels[-1] if config.network == "unet" else config.width
        condition = nn.silu(Dense(width)(time_features(time.reshape(len(x), -1))))
        condition = Dense(width)(condition)
        if label is not None:
            condition += Dense(width, use_bias=False)(label)
        if config.network == "mlp":
            h = Dense(width)(x.reshape(len(x), -1) if x.ndim > 2 else place_features(x))
            for _ in range(config.depth):
                h = ResidualDense(4 * width)(h, condition)
            out = Dense(math.prod(x.shape[1:]), kernel_init=zeros)(Modulated()(h, condition))
            return out.reshape(x.shape)
        seen = to_patches(x, config.patch)
        if config.network == "unet":
            h = self._placed(Conv(config.channels[0])(seen))
            h = UNet(config.channels, config.blocks, config.depth, config.heads)(h, condition)
        else:
            h = self._placed(Dense(width)(seen)).reshape(len(x), -1, width)
            angles = rotary_angles(grid_positions(*seen.shape[1:3]), width // config.heads)
            for _ in range(config.depth):
                block = Block(width, config.heads, 8 * width // 3, conditional=True)
                h = block(h, angles, condition)
            h = Modulated()(h, condition).reshape(*seen.shape[:3], width)
        return from_patches(Dense(seen.shape[-1], kernel_init=zeros)(h), config.patch)

    def _placed(self, h: jax.Array) -> jax.Array:
        """A vector for each position is added."""
        return h + self.param("place", nn.initializers.normal(0.02), h.shape[1:])[None]


class ResidualDense(nn.Module):
    """h + W silu(V h'), h' what `Modulated` makes of h: `[B, F]` -> the same; starts as h.

    Attributes:
      hidden: width between.
    """

    hidden: int

    @nn.compact
    def __call__(self, h: jax.Array, condition: jax.Array) -> jax.Array:
        """Apply the block."""
        inner = nn.silu(Dense(self.hidden)(Modulated()(h, condition)))
        return h + Dense(h.shape[-1], kernel_init=nn.initializers.zeros)(inner)


def time_features(time: jax.Array) -> jax.Array:
    """Sines and cosines of times `[B, K]` at several frequencies: `[B, 32 K]`."""
    frequencies = jnp.geomspace(1.0, 30.0, _FREQUENCIES)
    angles = (time[..., None] * frequencies[None, None]).reshape(len(time), -1)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def place_features(x: jax.Array) -> jax.Array:
    """Vectors `[B, D]` beside sines and cosines of them at several frequencies: `[B, 9 D]`.

    Without them dense layers learn what varies along x much later than what does not: of modes on a
    ring, the ring (Tancik et al. 2020, "Fourier features let networks learn high frequency
    functions in low dimensional domains").
    """
    angles = (x[..., None] * jnp.array(_WAVES)[None, None]).reshape(len(x), -1)
    return jnp.concatenate([x, jnp.cos(angles), jnp.sin(angles)], axis=-1)


def scaled(x: jax.Array, spec: DataSpec) -> jax.Array:
    """What noise is added to: x less its mean over the data, of images in units of half the range.

    Args:
      x: as the data hold it, `[B, *event]`.
      spec: of the data.
    """
    return (x - spec.mean[None]) / unit(spec)


def with_one_mean(spec: DataSpec) -> DataSpec:
    """Of images with one mean for all pixels, so that a grey value is the same number at each.

    Less a mean of its own, the background of a pixel is a number that depends on where it is, and
    with noise on the time as well: convolutions, which are the same everywhere, cannot tell it.
    """
    if len(spec.event_shape) < 3:
        return spec
    return spec._replace(mean=np.full_like(spec.mean, np.mean(spec.mean)))


def unscaled(x: jax.Array, spec: DataSpec) -> jax.Array:
    """The inverse of `scaled`."""
    return x * unit(spec) + spec.mean[None]


def unit(spec: DataSpec) -> float:
    """By how much x as the data hold it changes where scaled x changes by 1."""
    return 1.0 if spec.support == "real" else spec.scale / 2


def whole(x: jax.Array, spec: DataSpec) -> jax.Array:
    """Unscaled `x` `[B, *event]` as the data hold it: the nearest of their values, or as it is."""
    return x if spec.support == "real" else jnp.clip(jnp.round(x), 0, spec.num_values - 1)


def spread_times(rng: jax.Array, num: int) -> jax.Array:
    """Times of a batch, each uniform on [0, 1), evenly apart (Kingma et al. 2021): `[num]`."""
    return (jax.random.uniform(rng) + jnp.arange(num) / num) % 1


def spread_normal(rng: jax.Array, num: int) -> jax.Array:
    """The same of N(0, 1): quantiles of evenly spread probabilities, `[num]`."""
    return jax.scipy.special.ndtri(jnp.clip(spread_times(rng, num), 1e-6, 1 - 1e-6))


def dropped(label: jax.Array | None, rng: jax.Array, rate: float) -> jax.Array | None:
    """One-hot labels `[B, C]`, each with probability `rate` zeros."""
    if label is None:
        return None
    return label * jax.random.bernoulli(rng, 1 - rate, (len(label), 1))


# (x [B, *event], time [B], label one-hot or None) -> like x
Answer = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]


def is_guided(label: jax.Array | None, weight: float) -> bool:
    """Whether an answer without the label is needed as well: not where the weight is known as 1."""
    return label is not None and not (isinstance(weight, float) and weight == 1)


def guided(answer: Answer, label: jax.Array | None, weight: float) -> Callable:
    """`(x, time) -> like x`: the answer followed by a sampler (Ho & Salimans 2022, eq. 6).

    The weight is the paper's w plus 1: with 0 the label is not seen, with 1 it is the model of
    p(x | label), and more exaggerates what the label says. Where the answer is the logits of bits,
    these are what is mixed, and not E[x] as in the paper.
    """
    if not is_guided(label, weight):
        return lambda x, time: answer(x, time, label)

    def mixed(x: jax.Array, time: jax.Array) -> jax.Array:
        both = jnp.concatenate([label, jnp.zeros_like(label)])
        twice = (jnp.concatenate([a, a]) for a in (x, time))
        with_label, without = jnp.split(answer(*twice, both), 2)
        return without + weight * (with_label - without)

    return mixed
