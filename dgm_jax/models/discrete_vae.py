"""Variational autoencoders with categorical latents.

    p(x, z) = p(z) p(x | z),   q(z | x) = Π_l Categorical(z_l; π_l(x))

with z of L one-hot vectors of C classes; C = 2 are Bernoulli latents. Training may look between the
corners of the simplex (`objectives.gumbel_softmax`); every density and bound that is reported is of
the discrete model.

References: Jang et al. 2017, "Categorical Reparameterization with Gumbel-Softmax"; Maddison et al.
2017, "The Concrete Distribution"; Mnih & Rezende 2016 (VIMCO).
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax import checks, likelihoods, objectives
from dgm_jax.core import Batch, DataSpec, Model, Params
from dgm_jax.draws import Draws
from dgm_jax.latent_variable import latent_variable_model
from dgm_jax.nn import networks
from dgm_jax.nn.autoregressive import AutoregressiveCategorical
from dgm_jax.nn.precision import Dense
from dgm_jax.objectives import Options

PROVIDED = ("relaxed", "log_posterior_at")
PRIORS = ("uniform", "autoregressive")


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's fields. Real numbers may be traced.

    Attributes:
      latents: L.
      classes: C of each.
      network: `mlp`, or `conv`: residual stages that halve or double the sides of the image.
      encoder: widths of the encoder's hidden layers, or channels of its stages.
      decoder: the same of the decoder.
      activation: one of `nn.mlp.ACTIVATIONS`, or for an `mlp` also `gated`.
      likelihood: one of `likelihoods.LIKELIHOODS`.
      prior: one of `PRIORS`.
      prior_hidden: widths of the hidden layers of an autoregressive prior's masked network.
      objective: `gumbel_softmax`, `straight_through` or `vimco`.
      num_samples: K, posterior draws per example in the objective; VIMCO needs 2.
      temperature: τ of the relaxed draws; they are discrete in the limit of 0.
      beta: weight of the rate; 1 gives a bound on log p(x).
    """

    latents: int = 20
    classes: int = 10
    network: str = "mlp"
    encoder: tuple[int, ...] = (500, 500)
    decoder: tuple[int, ...] = (500, 500)
    activation: str = "silu"
    likelihood: str = "bernoulli"
    prior: str = "autoregressive"
    prior_hidden: tuple[int, ...] = (500,)
    objective: str = "gumbel_softmax"
    num_samples: int = 1
    temperature: float = 1.0
    beta: float = 1.0


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    checks.at_least(config, latents=1, classes=2)
    checks.widths(config, "encoder", "decoder", "prior_hidden")
    networks.check(config.network, config.activation, spec)
    likelihoods.check(config.likelihood, spec)
    checks.one_of(config, prior=PRIORS)
    given = (config.objective, config.num_samples, Options(beta=config.beta))
    objectives.check(*given, PROVIDED, "a discrete z")
    checks.positive(config, "temperature")


class Net(nn.Module):
    """All networks of one model, and the distributions that they parametrise."""

    config: Config
    spec: DataSpec

    def setup(self) -> None:
        """Encoder, prior, decoder."""
        config = self.config
        self.encoder = networks.Encoder(config.network, config.encoder, config.activation)
        self.head = Dense(config.latents * config.classes)
        self.decoder = networks.Decoder(
            config.network, config.decoder, config.activation, config.likelihood, self.spec
        )
        if config.prior == "autoregressive":
            self.prior = AutoregressiveCategorical(
                config.latents, config.classes, config.prior_hidden
            )

    def __call__(self, x: jax.Array) -> None:
        """Touch every parameter, for initialisation."""
        z = jnp.exp(self.log_posterior(x))
        self.outputs(z)
        self.log_prior(z)

    def log_posterior(self, x: jax.Array) -> jax.Array:
        """log π: log q(z_l = c | x), float `[B, L, C]`, for x `[B, *event]` as the data hold it."""
        logits = self.head(self.encoder(x / self.spec.scale))
        return nn.log_softmax(logits.reshape(len(x), self.config.latents, -1))

    def outputs(self, z: jax.Array) -> jax.Array:
        """The likelihood's parameters `[..., D, P]` given z `[..., L, C]`."""
        return self.decoder(z.reshape(*z.shape[:-2], -1))

    def log_prior(self, z: jax.Array) -> jax.Array:
        """log p(z) `[...]`, nats, for z `[..., L, C]`."""
        if self.config.prior == "autoregressive":
            return self.prior.log_prob(z)
        return jnp.full(z.shape[:-2], -self.config.latents * math.log(self.config.classes))

    def draw_prior(self, rng: jax.Array, num: int) -> jax.Array:
        """z `[num, L, C]` from p(z)."""
        if self.config.prior == "autoregressive":
            return self.prior.draw(rng, num)
        classes = jax.random.randint(rng, (num, self.config.latents), 0, self.config.classes)
        return jax.nn.one_hot(classes, self.config.classes)


def gumbel_draw(
    rng: jax.Array, log_probs: jax.Array, k: int, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """K draws of one-hot vectors, and the same draws relaxed.

    The class whose log-probability plus Gumbel noise is the largest has its own probability of
    being so; a softmax of the sums is the maximum in the limit of temperature 0 (Jang et al. 2017,
    eqs. 1 and 2).

    Args:
      rng: key.
      log_probs: float `[B, L, C]`.
      k: K.
      temperature: τ.

    Returns:
      One-hot and relaxed z, each `[K, B, L, C]`.
    """
    sums = log_probs[None] + jax.random.gumbel(rng, (k, *log_probs.shape))
    z = jax.nn.one_hot(jnp.argmax(sums, axis=-1), log_probs.shape[-1])
    return z, nn.softmax(sums / temperature)


def build(config: Config, spec: DataSpec) -> Model:
    """The model as pure functions; see `core.Model` for their contracts."""
    net = Net(config, spec)
    likelihood = likelihoods.LIKELIHOODS[config.likelihood]()

    def bind(params: Params) -> Net:
        return net.bind({"params": params["discrete_vae"]})

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        return {"discrete_vae": net.init(rng, batch["x"][:1])["params"]}

    def draw(params: Params, batch: Batch, rng: jax.Array, k: int) -> Draws:
        """K posterior draws, one-hot, and all that objectives may ask about them."""
        bound, x = bind(params), batch["x"]
        flat = x.reshape(1, len(x), -1)
        log_q = bound.log_posterior(x)
        z, relaxed = gumbel_draw(rng, log_q, k, config.temperature)

        def log_joint_at(z: jax.Array) -> tuple[jax.Array, jax.Array]:
            return likelihood.log_prob(bound.outputs(z), flat), bound.log_prior(z)

        def log_posterior_at(z: jax.Array, detached: bool) -> jax.Array:
            held = jax.lax.stop_gradient(log_q) if detached else log_q
            return jnp.sum(z * held[None], axis=(-2, -1))

        log_likelihood, log_prior = log_joint_at(z)
        # KL(q ‖ uniform) = log C - H(q), latent by latent.
        rate = math.log(config.classes) + jnp.sum(jnp.exp(log_q) * log_q, axis=-1)
        return Draws(
            z=z,
            log_likelihood=log_likelihood,
            log_prior=log_prior,
            log_posterior=log_posterior_at(z, False),
            log_joint_at=log_joint_at,
            log_posterior_at=log_posterior_at,
            rate=rate if config.prior == "uniform" else None,
            relaxed=relaxed,
        )

    def encode(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        """The classes' probabilities, which are the posterior's mean of the one-hot vectors."""
        del rng
        return jnp.exp(bind(params).log_posterior(batch["x"])).reshape(len(batch["x"]), -1)

    def reconstruct(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        bound = bind(params)
        z, _ = gumbel_draw(rng, bound.log_posterior(batch["x"]), 1, config.temperature)
        return likelihoods.picture(likelihood, bound.outputs(z[0]), spec)

    def sample(params: Params, rng: jax.Array, num: int) -> dict[str, jax.Array]:
        bound = bind(params)
        z_rng, x_rng = jax.random.split(rng)
        outputs = bound.outputs(bound.draw_prior(z_rng, num))
        return likelihoods.draw(likelihood, x_rng, outputs, spec)

    return latent_variable_model(
        player="discrete_vae",
        draw=draw,
        draw_joint=None,
        objective=config.objective,
        num_samples=config.num_samples,
        options=Options(beta=config.beta),
        has_latent_rates=config.prior == "uniform",
        init=init,
        sample=sample,
        encode=encode,
        reconstruct=reconstruct,
    )
