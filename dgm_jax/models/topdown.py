"""A convolutional hierarchy of any depth, inferred and generated from the top down.

    q(z | x) = Π_l q(z_l | x, z_>l),   p(x, z) = Π_l p(z_l | z_>l) p(x | z)

A deterministic pass up the image's resolutions gives features; a residual state comes down through
them from a learned constant, and each layer's Gaussians are read off the state, the posterior's
with the features beside it.

References: Sønderby et al. 2016, "Ladder Variational Autoencoders"; Kingma et al. 2016, section 5
(the residual top-down form); Vahdat & Kautz 2020, section 3.2 (posteriors relative to the prior);
Child 2021, "Very Deep VAEs".
"""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax import checks, likelihoods, objectives
from dgm_jax.core import Batch, DataSpec, Model, Params, UserError
from dgm_jax.distributions import gaussian_kl, gaussian_log_prob
from dgm_jax.draws import Draws
from dgm_jax.latent_variable import latent_variable_model
from dgm_jax.nn import networks
from dgm_jax.nn.conv import Conv, ResidualBlock, Upsample, halvings
from dgm_jax.nn.mlp import ACTIVATIONS
from dgm_jax.nn.posteriors import UNIT_RAW, draw_gaussian, positive
from dgm_jax.nn.precision import Dense
from dgm_jax.objectives import Options
from dgm_jax.rows import row_weight

Gaussian = tuple[jax.Array, jax.Array]  # mu and log_sigma, each [K, B, H, W, latents]
Latents = tuple[jax.Array, ...]  # z_1, ..., z_L, each [K, B, H, W, latents]


@dataclasses.dataclass(frozen=True)
class Config(objectives.Config):
    """The model's fields; those of the objective are in `objectives.Config`. Reals may be traced.

    Attributes:
      layers: stochastic layers at each resolution, the image's own first, each next one half as
        wide and high; 0 where there are none.
      latents: channels of each z.
      channels: of the state and of the features.
      width: channels inside a block.
      activation: one of `nn.mlp.ACTIVATIONS`.
      likelihood: one of `likelihoods.LIKELIHOODS`.
      objective: also `free_bits`, of which each layer has its own.
      free_nats: λ of `free_bits`, nats per layer.
    """

    layers: tuple[int, ...] = (0, 1, 1)
    latents: int = 4
    channels: int = 16
    width: int = 16
    activation: str = "silu"
    likelihood: str = "bernoulli"
    free_nats: float = 0.5

    @property
    def options(self) -> Options:
        """The numbers of the objective."""
        return Options(beta=self.beta, alpha=self.alpha, free_nats=self.free_nats)


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    layers = config.layers
    if not all(isinstance(num, int) and num >= 0 for num in layers) or not sum(layers):
        raise UserError(
            f"model.layers={layers}: give the number of layers at each resolution, "
            "whole numbers of at least 0, and at least one layer in all"
        )
    checks.at_least(config, latents=1, channels=1, width=1)
    if len(spec.event_shape) != 3:
        raise UserError(
            f"model.name='topdown' needs images, and x is {spec.event_shape}: choose another "
            "data.dataset"
        )
    networks.check("conv", config.activation, spec)
    likelihoods.check(config.likelihood, spec)
    has = (*objectives.LAYERED, "rate")  # of a layer in place of a latent
    objectives.check(config.objective, config.num_samples, config.options, has, "a hierarchy")


class Layer(nn.Module):
    """One stochastic layer: two Gaussians read off the state, and z written back to it."""

    config: Config

    def setup(self) -> None:
        """The heads start at zero: p is a standard Gaussian, and q is p."""
        config = self.config
        self.prior_hidden = Conv(config.width)
        self.prior_head = Dense(
            2 * config.latents + config.channels, kernel_init=nn.initializers.zeros
        )
        self.posterior_hidden = Conv(config.width)
        self.posterior_head = Dense(2 * config.latents, kernel_init=nn.initializers.zeros)
        # Each layer adds its part: together they start at the size of one (Child 2021, section 3).
        variance = 1 / sum(config.layers)
        self.from_z = Dense(
            config.channels,
            kernel_init=nn.initializers.variance_scaling(variance, "fan_in", "truncated_normal"),
        )
        self.block = ResidualBlock(config.width, config.activation)

    def prior(self, state: jax.Array) -> tuple[Gaussian, jax.Array]:
        """p(z_l | z_>l), and what the state gains whatever z is."""
        act = ACTIVATIONS[self.config.activation]
        out = self.prior_head(act(self.prior_hidden(act(state))))
        num = self.config.latents
        mu, raw, change = jnp.split(out, [num, 2 * num], axis=-1)
        return (mu, _log_scale(raw)), change

    def posterior(self, state: jax.Array, features: jax.Array, prior: Gaussian) -> Gaussian:
        """q(z_l | x, z_>l), as a shift and a factor of p."""
        act = ACTIVATIONS[self.config.activation]
        both = jnp.concatenate([state, jnp.broadcast_to(features, state.shape)], axis=-1)
        out = self.posterior_head(act(self.posterior_hidden(act(both))))
        shift, raw = jnp.split(out, 2, axis=-1)
        mu, log_sigma = prior
        return mu + jnp.exp(log_sigma) * shift, log_sigma + _log_scale(raw)

    def updated(self, state: jax.Array, change: jax.Array, z: jax.Array) -> jax.Array:
        """The state with z in it."""
        return self.block(state + change + self.from_z(z))


def _log_scale(raw: jax.Array) -> jax.Array:
    """log sigma from a network's output, 0 where that is 0."""
    return positive(raw + UNIT_RAW)


class Net(nn.Module):
    """The way up, the way down, and the decoder's head."""

    config: Config
    spec: DataSpec

    def setup(self) -> None:
        """Blocks by resolution, the image's own first."""
        config, num = self.config, len(self.config.layers)
        self.stem = Conv(config.channels)
        self.up_blocks = [
            [ResidualBlock(config.width, config.activation) for _ in range(layers)]
            for layers in config.layers
        ]
        self.down_sampling = [Conv(config.channels, stride=2) for _ in range(num - 1)]
        coarsest = halvings(self.spec.event_shape[:2], num - 1)[-1]
        shape = (*coarsest, config.channels)
        self.constant = self.param("constant", nn.initializers.normal(1.0), shape)
        # From the data up.
        self.layers = [[Layer(config) for _ in range(layers)] for layers in config.layers]
        self.up_sampling = [Upsample(config.channels) for _ in range(num - 1)]
        self.head = networks.Head(config.likelihood, self.spec, per_pixel=True)

    def __call__(self, x: jax.Array) -> None:
        """Touch every parameter, for initialisation."""
        self.down(self.features(x), (1, len(x)), lambda layer, q, p: q()[0])

    def features(self, x: jax.Array) -> list[jax.Array]:
        """Of each resolution, `[B, H, W, channels]`, for x as the data hold it."""
        h, found = self.stem(networks.centred(x / self.spec.scale)), []
        for i, blocks in enumerate(self.up_blocks):
            h = self.down_sampling[i - 1](h) if i else h
            for block in blocks:
                h = block(h)
            found.append(h)
        return found

    def down(
        self,
        features: list[jax.Array] | None,
        lead: tuple[int, int],
        choose: Callable[[int, Callable[[], Gaussian], Gaussian], jax.Array],
    ) -> tuple[Latents, jax.Array]:
        """The pass from the top: z of every layer, and the likelihood's parameters.

        Args:
          features: of `features`, or None where no posterior is asked for.
          lead: (K, B).
          choose: `(l, q, p) -> z_l`, with l counted from the data from 0, p the prior given all
            above and q a function that gives the posterior.
        """
        config, sides = self.config, halvings(self.spec.event_shape[:2], len(self.layers) - 1)
        state = jnp.broadcast_to(self.constant, (*lead, *self.constant.shape))
        number, z = sum(config.layers), []
        for i in reversed(range(len(self.layers))):
            for layer in reversed(self.layers[i]):
                number -= 1
                prior, change = layer.prior(state)

                def posterior(layer: Layer = layer, state: jax.Array = state, i: int = i) -> ...:
                    return layer.posterior(state, features[i][None], prior)  # noqa: B023

                z.append(choose(number, posterior, prior))
                state = layer.updated(state, change, z[-1])
            if i:
                state = self.up_sampling[i - 1](state, sides[i - 1])
        h = ACTIVATIONS[config.activation](state)
        return tuple(reversed(z)), self.head(h.reshape(*lead, -1, config.channels))


def build(config: Config, spec: DataSpec) -> Model:
    """The hierarchy as pure functions; see `core.Model` for their contracts."""
    net, num_layers = Net(config, spec), sum(config.layers)
    likelihood = likelihoods.LIKELIHOODS[config.likelihood]()
    sides = halvings(spec.event_shape[:2], len(config.layers) - 1)
    shapes = [
        (*side, config.latents)
        for side, num in zip(sides, config.layers, strict=True)
        for _ in range(num)
    ]
    sizes = tuple(math.prod(shape) for shape in shapes)

    def bind(params: Params) -> Net:
        return net.bind({"params": params["topdown"]})

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        return {"topdown": net.init(rng, batch["x"][:1])["params"]}

    def given(bound: Net, x: jax.Array, z: Latents) -> tuple[jax.Array, jax.Array, jax.Array]:
        """log p(x | z), log p(z) and log q(z | x), each `[K, B]`."""
        log_p, log_q = [], []

        def choose(layer: int, q: Callable[[], Gaussian], p: Gaussian) -> jax.Array:
            log_p.append(_total(gaussian_log_prob(z[layer], *p)))
            log_q.append(_total(gaussian_log_prob(z[layer], *q())))
            return z[layer]

        _, outputs = bound.down(bound.features(x), z[0].shape[:2], choose)
        flat = x.reshape(1, len(x), -1)
        return likelihood.log_prob(outputs, flat), sum(log_p), sum(log_q)

    def draw(params: Params, batch: Batch, rng: jax.Array, k: int) -> Draws:
        """K posterior draws and all that objectives may ask about them."""
        bound, held, x = bind(params), bind(jax.lax.stop_gradient(params)), batch["x"]
        keys = jax.random.split(rng, num_layers)
        rates, log_p, log_q = [], [], []

        def choose(layer: int, q: Callable[[], Gaussian], p: Gaussian) -> jax.Array:
            posterior = q()
            z = draw_gaussian(keys[layer], posterior, k)
            rates.append(jnp.mean(_total(gaussian_kl(*posterior, *p)), axis=0))
            log_p.append(_total(gaussian_log_prob(z, *p)))
            log_q.append(_total(gaussian_log_prob(z, *posterior)))
            return z

        z, outputs = bound.down(bound.features(x), (k, len(x)), choose)
        rate = jnp.stack(rates[::-1], axis=-1)
        return Draws(
            z=z,
            log_likelihood=likelihood.log_prob(outputs, x.reshape(1, len(x), -1)),
            log_prior=sum(log_p),
            log_posterior=sum(log_q),
            log_joint_at=lambda z: given(bound, x, z)[:2],
            log_posterior_at=lambda z, detached: given(held if detached else bound, x, z)[2],
            rate=rate,  # of each layer, given the draws above it
            layer_rates={f"rate_{i + 1}": rate[:, i] for i in range(num_layers)},
            weight=row_weight(batch),
        )

    def draw_joint(params: Params, rng: jax.Array, num: int) -> tuple[Latents, dict]:
        x_rng, *keys = jax.random.split(rng, num_layers + 1)
        z, outputs = bind(params).down(
            None, (1, num), lambda layer, q, p: draw_gaussian(keys[layer], p, 1)
        )
        samples = likelihoods.draw(likelihood, x_rng, outputs[0], spec)
        return tuple(a[0] for a in z), samples

    def encode(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        """The posterior mean of each layer, given those of the layers above."""
        del rng
        bound, num = bind(params), len(batch["x"])
        z, _ = bound.down(bound.features(batch["x"]), (1, num), lambda layer, q, p: q()[0])
        return jnp.concatenate([a.reshape(num, -1) for a in z], axis=-1)

    def decode(params: Params, codes: jax.Array) -> jax.Array:
        parts = jnp.split(codes, [sum(sizes[: i + 1]) for i in range(num_layers - 1)], axis=-1)
        z = [a.reshape(1, len(codes), *shape) for a, shape in zip(parts, shapes, strict=True)]
        _, outputs = bind(params).down(None, (1, len(codes)), lambda layer, q, p: z[layer])
        return likelihoods.picture(likelihood, outputs[0], spec)

    def reconstruct(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        bound, keys = bind(params), jax.random.split(rng, num_layers)
        _, outputs = bound.down(
            bound.features(batch["x"]),
            (1, len(batch["x"])),
            lambda layer, q, p: draw_gaussian(keys[layer], q(), 1),
        )
        return likelihoods.picture(likelihood, outputs[0], spec)

    return latent_variable_model(
        player="topdown",
        draw=draw,
        draw_joint=draw_joint,
        samples_are_exact=likelihood.draws_what_it_scores,
        objective=config.objective,
        num_samples=config.num_samples,
        options=config.options,
        init=init,
        encode=encode,
        layer_sizes=sizes,
        decode=decode,
        reconstruct=reconstruct,
    )


def _total(values: jax.Array) -> jax.Array:
    """`[K, B, H, W, C]` summed -> `[K, B]`."""
    return jnp.sum(values, axis=(2, 3, 4))
