"""Two levels of latents, the upper inferred first, with any prior on top.

    q(z | x) = q(z_2 | x) q(z_1 | x, z_2),   p(x, z) = p(z_2) p(z_1 | z_2) p(x | z_1, z_2)

with diagonal Gaussians but for p(z_2). With a VampPrior there, whose components are q(z_2 | u) at
learned pseudo-inputs u, it is the hierarchical model of Tomczak & Welling 2018, "VAE with a
VampPrior", section 4.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax import checks, likelihoods, objectives
from dgm_jax.core import Batch, DataSpec, Model, Params, UserError
from dgm_jax.distributions import gaussian_log_prob
from dgm_jax.draws import Draws, layered_draws
from dgm_jax.latent_variable import latent_variable_model
from dgm_jax.nn import networks, priors
from dgm_jax.nn.mlp import MLP
from dgm_jax.nn.posteriors import Conditional, draw_gaussian

Pair = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config(objectives.Config):
    """The model's fields; those of the objective are in `objectives.Config`. Reals may be traced.

    Attributes:
      latents: dimensions of z_1 and z_2.
      width: of every hidden layer.
      activation: `gated`, or one of `nn.mlp.ACTIVATIONS`.
      likelihood: one of `likelihoods.LIKELIHOODS`.
      prior: of z_2, one of `nn.priors.PRIORS`.
      components: of a mixture prior; pseudo-inputs of a VampPrior.
      flow_steps: of a flow prior.
      flow_width: of its hidden layers.
    """

    latents: tuple[int, int] = (40, 40)
    width: int = 300
    activation: str = "gated"
    likelihood: str = "bernoulli"
    prior: str = "vamp"
    components: int = 500
    flow_steps: int = 4
    flow_width: int = 128
    objective: str = "stl"


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    checks.widths(config, "latents")
    if len(config.latents) != 2:
        raise UserError(f"model.latents={config.latents}: give one number for each of two levels")
    checks.at_least(config, width=1)
    networks.check("mlp", config.activation, spec)
    priors.check(config.prior, _prior_sizes(config, spec), spec.support)
    likelihoods.check(config.likelihood, spec)
    has = objectives.LAYERED
    objectives.check(config.objective, config.num_samples, config.options, has, "a hierarchy")


def _prior_sizes(config: Config, spec: DataSpec) -> priors.Sizes:
    flow = (config.flow_steps, config.flow_width)
    return priors.Sizes(config.latents[1], config.components, *flow, spec.unit_mean)


class Joined(nn.Module):
    """Two inputs, a hidden layer for each, side by side: `[..., E]`, `[..., F]` -> `[..., 2 W]`."""

    width: int
    activation: str

    @nn.compact
    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Both layers' outputs; leading dimensions broadcast."""
        hidden = [MLP((self.width,), self.activation)(h) for h in (a, b)]
        lead = jnp.broadcast_shapes(*(h.shape[:-1] for h in hidden))
        return jnp.concatenate([jnp.broadcast_to(h, (*lead, self.width)) for h in hidden], axis=-1)


class Net(nn.Module):
    """All networks of one model."""

    config: Config
    spec: DataSpec

    def setup(self) -> None:
        """`infer_l` and `generate_l` give the Gaussian of z_l."""
        config, spec = self.config, self.spec
        bottom, top = config.latents
        one, two = (config.width,), (config.width, config.width)
        self.infer_2 = Conditional(top, two, config.activation)
        self.infer_1_inputs = Joined(config.width, config.activation)
        self.infer_1_head = Conditional(bottom, one, config.activation)
        self.generate_1 = Conditional(bottom, two, config.activation)
        self.decoder_inputs = Joined(config.width, config.activation)
        self.decoder = networks.Decoder("mlp", one, config.activation, config.likelihood, spec)
        self.prior = priors.PRIORS[config.prior](_prior_sizes(config, spec))

    def __call__(self, x: jax.Array) -> None:
        """Touch every parameter, for initialisation."""
        pixels = self.pixels(x / self.spec.scale)
        z_2, _ = self.infer_2(pixels)
        self.infer_1(pixels, z_2)
        z_1, _ = self.generate_1(z_2)
        self.outputs((z_1, z_2))
        self.log_prior_2(z_2)

    def pixels(self, x: jax.Array) -> jax.Array:
        """x in [0, 1] `[B, *event]` as the networks see it, `[B, D]`."""
        return networks.centred(x).reshape(len(x), -1)

    def infer_1(self, pixels: jax.Array, z_2: jax.Array) -> Pair:
        """(mu, log_sigma) of q(z_1 | x, z_2)."""
        return self.infer_1_head(self.infer_1_inputs(pixels, z_2))

    def outputs(self, z: Pair) -> jax.Array:
        """The likelihood's parameters `[..., D, P]`."""
        return self.decoder(self.decoder_inputs(*z))

    def log_prior_2(self, z_2: jax.Array) -> jax.Array:
        """log p(z_2) `[...]`."""
        return self.prior.log_prob(z_2, self._posterior_of)

    def draw_prior_2(self, rng: jax.Array, num: int) -> jax.Array:
        """z_2 `[num, L_2]` from p(z_2)."""
        return self.prior.draw(rng, num, self._posterior_of)

    def _posterior_of(self, x: jax.Array) -> Pair:
        return self.infer_2(self.pixels(x))


def build(config: Config, spec: DataSpec) -> Model:
    """The model as pure functions; see `core.Model` for their contracts."""
    net = Net(config, spec)
    likelihood = likelihoods.LIKELIHOODS[config.likelihood]()

    def bind(params: Params) -> Net:
        return net.bind({"params": params["two_level"]})

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        return {"two_level": net.init(rng, batch["x"][:1])["params"]}

    def pixels(bound: Net, batch: Batch) -> jax.Array:
        return bound.pixels(batch["x"] / spec.scale)

    def posterior_draw(
        bound: Net, batch: Batch, rng: jax.Array, k: int
    ) -> tuple[Pair, list[jax.Array]]:
        """z, and log q of each layer, `[K, B]`."""
        h, (rng_1, rng_2) = pixels(bound, batch)[None], jax.random.split(rng)
        upper = bound.infer_2(h)
        z_2 = draw_gaussian(rng_2, upper, k)
        lower = bound.infer_1(h, z_2)
        z_1 = draw_gaussian(rng_1, lower, k)
        log_q = [gaussian_log_prob(z_1, *lower), gaussian_log_prob(z_2, *upper)]
        return (z_1, z_2), [jnp.sum(each, axis=-1) for each in log_q]

    def draw(params: Params, batch: Batch, rng: jax.Array, k: int) -> Draws:
        """K posterior draws and all that objectives may ask about them."""
        bound, held = bind(params), bind(jax.lax.stop_gradient(params))
        flat = batch["x"].reshape(1, len(batch["x"]), -1)

        def log_posteriors(z: Pair, detached: bool) -> list[jax.Array]:
            known = held if detached else bound
            h = pixels(known, batch)[None]
            return [
                jnp.sum(gaussian_log_prob(z[0], *known.infer_1(h, z[1])), axis=-1),
                jnp.sum(gaussian_log_prob(z[1], *known.infer_2(h)), axis=-1),
            ]

        def log_priors(z: Pair) -> list[jax.Array]:
            lower = jnp.sum(gaussian_log_prob(z[0], *bound.generate_1(z[1])), axis=-1)
            return [lower, bound.log_prior_2(z[1])]

        return layered_draws(
            *posterior_draw(bound, batch, rng, k),
            lambda z: likelihood.log_prob(bound.outputs(z), flat),
            log_priors,
            log_posteriors,
        )

    def draw_joint(params: Params, rng: jax.Array, num: int) -> tuple[Pair, dict]:
        bound = bind(params)
        rng_1, rng_2, x_rng = jax.random.split(rng, 3)
        z_2 = bound.draw_prior_2(rng_2, num)
        z = draw_gaussian(rng_1, bound.generate_1(z_2[None]), 1)[0], z_2
        return z, likelihoods.draw(likelihood, x_rng, bound.outputs(z), spec)

    def encode(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        """The mean of q(z_2 | x), and below it that of q(z_1 | x, z_2) there."""
        del rng
        bound = bind(params)
        h = pixels(bound, batch)
        z_2, _ = bound.infer_2(h)
        return jnp.concatenate([bound.infer_1(h, z_2)[0], z_2], axis=-1)

    def decode(params: Params, codes: jax.Array) -> jax.Array:
        outputs = bind(params).outputs(tuple(jnp.split(codes, [config.latents[0]], axis=-1)))
        return likelihoods.picture(likelihood, outputs, spec)

    def reconstruct(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        bound = bind(params)
        z = jax.tree.map(lambda a: a[0], posterior_draw(bound, batch, rng, 1)[0])
        return likelihoods.picture(likelihood, bound.outputs(z), spec)

    return latent_variable_model(
        player="two_level",
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
