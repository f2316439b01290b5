"""Masked diffusion: tokens are hidden one by one, and a network is taught to bring them back.

A time t hides each of the D tokens with probability m(t), which rises from 0 to 1. In the limit of
ever more steps the bound on the likelihood is

    log p(x) ≥ E_t [m'(t) / m(t) Σ_{i hidden} log p(x_i | x_visible)],   t ~ U(0, 1)

(Sahoo et al. 2024; Shi et al. 2024). Of t only the number n of hidden tokens matters, and all sets
of n are equally likely: t can be integrated out, which leaves

    E_n [1 / p(n) · 1/n Σ_{i hidden} log p(x_i | x_visible)],   n = 1, ..., D with any p(n).

Its draws have a finite variance, and 1 / m(t) has none. It is also the bound of a model of all
orders (Uria et al. 2014; Hoogeboom et al. 2022; Ou et al. 2024), and no network needs to know t.

References: Austin et al. 2021, "Structured denoising diffusion models in discrete state-spaces";
Sahoo et al. 2024, "Simple and effective masked diffusion language models" (MDLM); Shi et al. 2024,
"Simplified and generalized masked diffusion for discrete data" (MD4); Uria et al. 2014, "A deep and
tractable density estimator"; Hoogeboom et al. 2022, "Autoregressive diffusion models"; Ou et al.
2024, "Your absorbing discrete diffusion secretly models the conditional distributions of clean
data".
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import checks, likelihoods
from dgm_jax.core import Aux, Batch, DataSpec, Model, Params, Player, UserError, masked_mean
from dgm_jax.likelihoods import Likelihood
from dgm_jax.nn import attention, networks
from dgm_jax.nn.attention import Block, grid_positions, rms_norm, rotary_angles
from dgm_jax.nn.conv import Conv, from_patches, to_patches
from dgm_jax.nn.denoisers import spread_times
from dgm_jax.nn.precision import Dense
from dgm_jax.nn.unet import UNet

NETWORKS = ("transformer", "unet")
SAMPLING = ("sample_steps",)


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's fields.

    Attributes:
      network: `transformer`, or of images `unet`.
      patch: side of the squares of pixels that are one position of the network; 1 for a text.
      width: of a `transformer`: of embeddings and blocks.
      hidden: of the same: width of each block's feed-forward layer.
      channels: of a `unet`: of its stages, the finest first.
      blocks: of the same: residual blocks of a stage, each way.
      depth: number of a Transformer's blocks; of a `unet`, over its coarsest grid.
      heads: of each block's attention.
      schedule: m(t), one of `SCHEDULES`: of the bound of the limit it decides the variance alone;
        with fewer steps also its mean, and what is drawn.
      steps: of the model whose bound it is: 0 for the limit, which is one for each token.
      sample_steps: of the sampler; 0 for one for each token.
    """

    network: str = "transformer"
    patch: int = 1
    width: int = 128
    hidden: int = 384
    channels: tuple[int, ...] = (16, 32, 128)
    blocks: int = 1
    depth: int = 4
    heads: int = 4
    schedule: str = "linear"
    steps: int = 0
    sample_steps: int = 0


class Schedule(NamedTuple):
    """m: t in [0, 1] -> the probability that a token is hidden, in [0, 1], rising."""

    hidden: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


SCHEDULES = {
    "linear": Schedule(lambda t: t, lambda m: m),
    # 1 - m = 1 - cos(π/2 (1 - t)), Shi et al. 2024.
    "cosine": Schedule(
        lambda t: np.sin(np.pi / 2 * t), lambda m: 2 / np.pi * np.arcsin(np.clip(m, 0, 1))
    ),
}


class Levels(NamedTuple):
    """The steps of a reverse process, from the last to the first.

    Attributes:
      hidden: int `[K]`, tokens hidden before the step, rising.
      revealed: int `[K]`, how many of them the step reveals.
      prob: float `[K]`, how often the bound looks at the step; sums to 1.
    """

    hidden: np.ndarray
    revealed: np.ndarray
    prob: np.ndarray


def levels(schedule: str, dims: int, steps: int) -> Levels:
    """The process of `steps` steps over `dims` tokens; 0 for one token a step.

    Steps are equally long in t, and one that reveals nothing is left out. Of one token a step the
    order of things is all that there is of t, and the schedule says how often each is looked at.
    """
    m, inverse = SCHEDULES[schedule]
    if not steps:
        edges = inverse(np.arange(dims + 1) / dims)
        return Levels(np.arange(1, dims + 1), np.ones(dims, int), np.diff(edges))
    counts = np.ceil(dims * m(np.arange(steps + 1) / steps) - 1e-9).astype(int)
    counts = np.unique(counts)
    return Levels(counts[1:], np.diff(counts), np.full(len(counts) - 1, 1 / (len(counts) - 1)))


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    if not spec.num_values:
        raise UserError(
            "model.name='masked_diffusion' needs tokens or images, and these are real vectors"
        )
    checks.one_of(config, network=NETWORKS, schedule=SCHEDULES)
    checks.at_least(config, depth=0, hidden=1, patch=1, blocks=0, heads=1)
    for field in ("steps", "sample_steps"):
        if not 0 <= getattr(config, field) <= spec.num_dims:
            raise UserError(
                f"model.{field}={getattr(config, field)}: give at most one for each of the "
                f"{spec.num_dims} tokens, or 0 for as many"
            )
    sides, is_image = _sides(spec), len(spec.event_shape) == 3
    checks.widths(config, "channels")
    if any(side % config.patch for side in sides) or (config.patch > 1 and not is_image):
        raise UserError(
            f"model.patch={config.patch}: must divide the sides of an image, and be 1 for a text; "
            f"these are {sides}"
        )
    if config.network == "unet":
        if not is_image:
            raise UserError(f"model.network='unet' needs images, and these are {spec.event_shape}")
        if config.depth:
            fields = ("channels[-1]", "heads")
            attention.check(config.channels[-1], config.heads, len(sides), fields)
    else:
        attention.check(config.width, config.heads, len(sides))


def _sides(spec: DataSpec) -> tuple[int, ...]:
    """(H, W) of an image, (T,) of a text."""
    return spec.event_shape[:2] if len(spec.event_shape) == 3 else (spec.num_dims,)


def likelihood_of(spec: DataSpec) -> Likelihood:
    """What the network's outputs `[..., P]` for a hidden token mean."""
    if spec.support == "binary":
        return likelihoods.bernoulli()
    if spec.support == "uint8":
        return likelihoods.discretised_logistic_mixture()
    return likelihoods.categorical(spec.vocabulary)


class Denoiser(nn.Module):
    """The visible tokens -> outputs for all, by a network that sees in all directions.

    A position of the network is a token, or a patch of pixels with all their channels.
    """

    config: Config
    spec: DataSpec

    @nn.compact
    def __call__(self, x: jax.Array, hidden: jax.Array) -> jax.Array:
        """Outputs `[B, D, P]`, where `x` `[B, D]` as the data hold it is `hidden` bool `[B, D]`."""
        config, spec = self.config, self.spec
        if spec.support == "tokens":
            values = nn.one_hot(x.astype(jnp.int32), spec.vocabulary)
        else:
            values = networks.centred(x / spec.scale)[..., None]
        visible = 1 - hidden[..., None].astype(jnp.float32)
        seen = self._patches(jnp.concatenate([values * visible, visible], axis=-1))
        sides = tuple(side // config.patch for side in _sides(spec))
        if config.network == "unet":
            h = self._placed(Conv(config.channels[0])(seen.reshape(len(x), *sides, -1)))
            h = UNet(config.channels, config.blocks, config.depth, config.heads)(h)
            h = h.reshape(len(x), math.prod(sides), -1)
        else:
            angles = rotary_angles(grid_positions(*sides), config.width // config.heads)
            h = self._placed(Dense(config.width)(seen))
            for _ in range(config.depth):
                h = Block(config.width, config.heads, config.hidden)(h, angles)
            h = rms_norm(h)
        initial = likelihood_of(spec).initial(spec.mean.ravel())
        head = Dense(initial.size // h.shape[1], False, kernel_init=nn.initializers.zeros)
        bias = self.param("bias", lambda key: jnp.asarray(initial, jnp.float32).ravel())
        return self._pixels(head(h), initial.shape[1]) + bias.reshape(1, *initial.shape)

    def _placed(self, h: jax.Array) -> jax.Array:
        """A vector for each position of an image is added; a text may be cut anywhere."""
        if self.spec.support == "tokens":
            return h
        return h + self.param("place", nn.initializers.normal(0.02), h.shape[1:])[None]

    def _patches(self, seen: jax.Array) -> jax.Array:
        """`[B, D, E]` -> `[B, positions, entries of a position · E]`."""
        if len(self.spec.event_shape) != 3:
            return seen
        seen = seen.reshape(len(seen), *_sides(self.spec), -1)
        seen = to_patches(seen, self.config.patch)
        return seen.reshape(len(seen), -1, seen.shape[-1])

    def _pixels(self, out: jax.Array, num_outputs: int) -> jax.Array:
        """`[B, positions, entries of a position · P]` -> `[B, D, P]`."""
        if len(self.spec.event_shape) == 3:
            sides = (side // self.config.patch for side in _sides(self.spec))
            out = from_patches(out.reshape(len(out), *sides, -1), self.config.patch)
        return out.reshape(len(out), self.spec.num_dims, num_outputs)


# (x [B, D], hidden bool [B, D]) -> outputs [B, D, P]
Denoise = Callable[[jax.Array, jax.Array], jax.Array]


def bound(
    denoise: Denoise,
    likelihood: Likelihood,
    levels: Levels,
    x: jax.Array,
    rng: jax.Array,
) -> jax.Array:
    """One draw of the bound on log p(x) `[B]`, nats.

    The times of the rows are spread evenly over all, whatever the first (Kingma et al. 2021).

    Args:
      denoise: the network.
      likelihood: what its outputs mean.
      levels: the steps of the process.
      x: `[B, D]` as the data hold it.
      rng: of the times and of what is hidden.
    """
    time_rng, place_rng = jax.random.split(rng)
    t = spread_times(time_rng, len(x))
    step = jnp.searchsorted(jnp.cumsum(jnp.asarray(levels.prob, jnp.float32))[:-1], t)
    num = jnp.asarray(levels.hidden)[step]
    hidden = random_order(place_rng, x.shape) < num[:, None]
    outputs = denoise(jnp.where(hidden, 0, x), hidden)
    log_prob = likelihood.log_prob(outputs[..., None, :], x[..., None])
    weight = jnp.asarray(levels.revealed / (levels.hidden * levels.prob), x.dtype)[step]
    return weight * jnp.sum(jnp.where(hidden, log_prob, 0), axis=1)


def random_order(rng: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A permutation of 0, ..., D - 1 in each row: int32 `[B, D]`."""
    return jnp.argsort(jnp.argsort(jax.random.bits(rng, shape), axis=1), axis=1)


def draw(
    denoise: Denoise, likelihood: Likelihood, levels: Levels, rng: jax.Array, shape: tuple[int, int]
) -> jax.Array:
    """Ancestral sampling: x `[B, D]`, all hidden at first, revealed in a random order.

    Arguments as in `bound`. With one token a step these are draws from the mean over all orders of
    Π p(x_i | x_before); with more, tokens of one step do not see each other.
    """
    order_rng, draw_rng = jax.random.split(rng)
    order = random_order(order_rng, shape)

    def reveal(x: jax.Array, step: tuple) -> tuple[jax.Array, None]:
        before, num, key = step
        drawn = likelihood.draw(key, denoise(x, order < before))
        now = (order < before) & (order >= before - num)
        return jnp.where(now, drawn, x), None

    steps = jnp.asarray(levels.hidden), jnp.asarray(levels.revealed)
    keys = jax.random.split(draw_rng, len(levels.hidden))
    start = jnp.zeros(shape)
    return jax.lax.scan(reveal, start, (*steps, keys), reverse=True)[0]


def build(config: Config, spec: DataSpec) -> Model:
    """Masked diffusion as pure functions; see `core.Model` for their contracts."""
    net, likelihood = Denoiser(config, spec), likelihood_of(spec)
    of_bound, of_sampler = (
        levels(config.schedule, spec.num_dims, steps)
        for steps in (config.steps, config.sample_steps)
    )

    def denoiser(params: Params) -> Denoise:
        return lambda x, hidden: net.apply({"params": params["denoiser"]}, x, hidden)

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        x = jnp.zeros((1, spec.num_dims))
        return {"denoiser": net.init(rng, x, x > 0)["params"]}

    def elbo(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        x = batch["x"].reshape(len(batch["x"]), -1).astype(jnp.float32)
        return bound(denoiser(params), likelihood, of_bound, x, rng)

    def loss_fn(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        return -masked_mean(elbo(params, batch, rng), batch), Aux({})

    def sample(params: Params, rng: jax.Array, num: int) -> dict[str, jax.Array]:
        x = draw(denoiser(params), likelihood, of_sampler, rng, (num, spec.num_dims))
        x = x.reshape(num, *spec.event_shape)
        return {"x": x.astype(jnp.int32) if spec.support == "tokens" else x}

    return Model(
        init=init,
        players=(Player("denoiser", loss_fn),),
        log_likelihood_fns={"elbo": elbo},
        sample=sample,
    )
