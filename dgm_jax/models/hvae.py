"""A chain of stochastic layers, inferred from the data up and generated from the top down.

    q(z | x) = q(z_1 | x) Π_l q(z_l | z_{l-1}),   p(x, z) = p(z_L) Π_l p(z_l | z_{l+1}) p(x | z_1)

with diagonal Gaussians throughout. Two layers and K samples are the larger model of Burda et al.
2016, "Importance Weighted Autoencoders", section 5 and appendix B.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax import checks, likelihoods, objectives
from dgm_jax.core import Batch, DataSpec, Model, Params, UserError
from dgm_jax.distributions import gaussian_log_prob, standard_gaussian_log_prob
from dgm_jax.draws import Draws, layered_draws
from dgm_jax.latent_variable import latent_variable_model
from dgm_jax.nn import networks
from dgm_jax.nn.posteriors import Conditional, draw_gaussian


@dataclasses.dataclass(frozen=True)
class Config(objectives.Config):
    """The model's fields; those of the objective are in `objectives.Config`. Reals may be traced.

    Attributes:
      latents: dimensions of z_1, ..., z_L, from the data up.
      width: of the two hidden layers between a layer of latents and what lies below it, likewise.
      activation: `gated`, or one of `nn.mlp.ACTIVATIONS`.
      likelihood: one of `likelihoods.LIKELIHOODS`.
    """

    latents: tuple[int, ...] = (100, 50)
    width: tuple[int, ...] = (200, 100)
    activation: str = "tanh"
    likelihood: str = "bernoulli"


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    checks.widths(config, "latents", "width")
    if len(config.latents) != len(config.width):
        raise UserError(
            f"model.width={config.width}: give one for each of model.latents={config.latents}"
        )
    networks.check("mlp", config.activation, spec)
    likelihoods.check(config.likelihood, spec)
    has = objectives.LAYERED
    objectives.check(config.objective, config.num_samples, config.options, has, "a hierarchy")


class Net(nn.Module):
    """All networks of one hierarchy."""

    config: Config
    spec: DataSpec

    def setup(self) -> None:
        """`up[l]` infers z_l from below; `down[l]` generates z_l from above."""
        config = self.config
        layers = list(zip(config.latents, config.width, strict=True))
        self.up = [Conditional(size, (width, width), config.activation) for size, width in layers]
        # Between z_l and z_{l+1} the widths are those on the way up (Burda et al. 2016).
        self.down = [
            Conditional(size, (width, width), config.activation)
            for size, width in zip(config.latents[:-1], config.width[1:], strict=True)
        ]
        widths = 2 * config.width[:1]
        self.outputs = networks.Decoder(
            "mlp", widths, config.activation, config.likelihood, self.spec
        )

    def __call__(self, x: jax.Array) -> None:
        """Touch every parameter, for initialisation."""
        for conditional, size in zip(self.down, self.config.latents[1:], strict=True):
            conditional(jnp.zeros((1, size)))
        z = self.means(x)
        self.outputs(z[0])

    def pixels(self, x: jax.Array) -> jax.Array:
        """x `[B, *event]` as the networks see it, `[B, D]`."""
        return networks.centred(x / self.spec.scale).reshape(len(x), -1)

    def means(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """The posterior mean of each layer given that of the layer below, `[B, L_l]`."""
        found = [self.pixels(x)]
        for conditional in self.up:
            found.append(conditional(found[-1])[0])
        return tuple(found[1:])


def build(config: Config, spec: DataSpec) -> Model:
    """The hierarchy as pure functions; see `core.Model` for their contracts."""
    net, num_layers = Net(config, spec), len(config.latents)
    likelihood = likelihoods.LIKELIHOODS[config.likelihood]()

    def bind(params: Params) -> Net:
        return net.bind({"params": params["hvae"]})

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        return {"hvae": net.init(rng, batch["x"][:1])["params"]}

    def log_posteriors(bound: Net, x: jax.Array, z: tuple[jax.Array, ...]) -> list[jax.Array]:
        """log q of each layer given the one below, `[K, B]`."""
        below = (bound.pixels(x)[None], *z[:-1])
        return [
            jnp.sum(gaussian_log_prob(z_l, *conditional(h)), axis=-1)
            for conditional, h, z_l in zip(bound.up, below, z, strict=True)
        ]

    def log_priors(bound: Net, z: tuple[jax.Array, ...]) -> list[jax.Array]:
        """log p of each layer given the one above, `[K, B]`."""
        inner = [
            jnp.sum(gaussian_log_prob(z_l, *conditional(above)), axis=-1)
            for conditional, z_l, above in zip(bound.down, z[:-1], z[1:], strict=True)
        ]
        return [*inner, jnp.sum(standard_gaussian_log_prob(z[-1]), axis=-1)]

    def posterior_draw(bound: Net, x: jax.Array, rng: jax.Array, k: int) -> tuple:
        """z, and log q of each layer given the one below, `[K, B]`."""
        z, log_q, h = [], [], bound.pixels(x)[None]
        for conditional, key in zip(bound.up, jax.random.split(rng, num_layers), strict=True):
            posterior = conditional(h)
            h = draw_gaussian(key, posterior, k)
            z.append(h)
            log_q.append(jnp.sum(gaussian_log_prob(h, *posterior), axis=-1))
        return tuple(z), log_q

    def draw(params: Params, batch: Batch, rng: jax.Array, k: int) -> Draws:
        """K posterior draws and all that objectives may ask about them."""
        bound, held, x = bind(params), bind(jax.lax.stop_gradient(params)), batch["x"]
        flat = x.reshape(1, len(x), -1)

        def log_likelihood_at(z: tuple[jax.Array, ...]) -> jax.Array:
            return likelihood.log_prob(bound.outputs(z[0]), flat)

        return layered_draws(
            *posterior_draw(bound, x, rng, k),
            log_likelihood_at,
            lambda z: log_priors(bound, z),
            lambda z, detached: log_posteriors(held if detached else bound, x, z),
        )

    def encode(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        del rng
        return jnp.concatenate(bind(params).means(batch["x"]), axis=-1)

    def decode(params: Params, codes: jax.Array) -> jax.Array:
        """From the features of all layers; x depends on z_1 alone."""
        outputs = bind(params).outputs(codes[:, : config.latents[0]])
        return likelihoods.picture(likelihood, outputs, spec)

    def reconstruct(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        bound = bind(params)
        z, _ = posterior_draw(bound, batch["x"], rng, 1)
        return likelihoods.picture(likelihood, bound.outputs(z[0][0]), spec)

    def draw_joint(
        params: Params, rng: jax.Array, num: int
    ) -> tuple[tuple[jax.Array, ...], dict[str, jax.Array]]:
        bound = bind(params)
        x_rng, top_rng, *keys = jax.random.split(rng, num_layers + 1)
        z = [jax.random.normal(top_rng, (num, config.latents[-1]))]
        for conditional, key in zip(reversed(bound.down), keys, strict=True):
            z.append(draw_gaussian(key, conditional(z[-1][None]), 1)[0])
        samples = likelihoods.draw(likelihood, x_rng, bound.outputs(z[-1]), spec)
        return tuple(reversed(z)), samples

    return latent_variable_model(
        player="hvae",
        draw=draw,
        draw_joint=draw_joint,
        samples_are_exact=likelihood.draws_what_it_scores,
        objective=config.objective,
        num_samples=config.num_samples,
        options=config.options,
        init=init,
        encode=encode,
        layer_sizes=config.latents,
        decode=decode,
        reconstruct=reconstruct,
    )
