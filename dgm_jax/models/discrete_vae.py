"""A VAE whose latents are N categorical variables of C classes; with C = 2, Bernoulli latents.

    p(x, c) = p(c) p(x | c),   q(c | x) = Π_n q(c_n | x)

Trained on exact draws with VIMCO, or on relaxed ones with the Gumbel-softmax. Whatever it is
trained on, every bound and term that is reported is of the discrete model.

References: Mnih & Rezende 2016 (VIMCO); Jang et al. 2017, Maddison et al. 2017 (the relaxation).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax import likelihoods, objectives
from dgm_jax.core import Aux, Batch, DataSpec, Model, Params, Player, UserError, masked_mean
from dgm_jax.nn import networks
from dgm_jax.nn.quantise import PRIORS
from dgm_jax.objectives import Draws, Options


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's fields. Real numbers may be traced.

    Attributes:
      latents: N.
      classes: C of each.
      network: `mlp` or `conv`.
      encoder: widths of the encoder's hidden layers, or channels of its stages.
      decoder: the same of the decoder.
      activation: one of `nn.mlp.ACTIVATIONS`, or for an `mlp` also `gated`.
      likelihood: one of `likelihoods.LIKELIHOODS`.
      prior: `uniform` or `autoregressive`.
      objective: `gumbel_softmax` or `vimco`.
      temperature: of the relaxation; towards 0 its draws become discrete and its gradients noisy.
      num_samples: K, posterior draws per example in the objective.
      beta: weight of the rate; 1 gives a bound on log p(x).
    """

    latents: int = 30
    classes: int = 10
    network: str = "mlp"
    encoder: tuple[int, ...] = (200, 200)
    decoder: tuple[int, ...] = (200, 200)
    activation: str = "silu"
    likelihood: str = "bernoulli"
    prior: str = "autoregressive"
    objective: str = "gumbel_softmax"
    temperature: float = 0.5
    num_samples: int = 1
    beta: float = 1.0


OBJECTIVES = ("gumbel_softmax", "vimco")


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    for field, least in (("latents", 1), ("classes", 2), ("num_samples", 1)):
        if getattr(config, field) < least:
            raise UserError(f"model.{field}={getattr(config, field)}: must be at least {least}")
    for field in ("encoder", "decoder"):
        networks.check_widths(field, getattr(config, field))
    networks.check(config.network, config.activation, spec)
    likelihoods.check(config.likelihood, spec)
    for field, allowed in (("prior", PRIORS), ("objective", OBJECTIVES)):
        if getattr(config, field) not in allowed:
            raise UserError(
                f"model.{field}={getattr(config, field)!r}: choose one of {', '.join(allowed)}"
            )
    if not config.temperature > 0:
        raise UserError(f"model.temperature={config.temperature}: must be above 0")
    # The relaxed objective is an ELBO.
    name = "vimco" if config.objective == "vimco" else "elbo"
    objectives.check(name, config.num_samples, Options(beta=config.beta))


class Net(nn.Module):
    """q(c | x), p(c) and p(x | c), with codes as one-hots `[..., N, C]`."""

    config: Config
    spec: DataSpec

    def setup(self) -> None:
        """Encoder, prior, decoder."""
        config, spec = self.config, self.spec
        self.encoder = networks.Encoder(config.network, config.encoder, config.activation)
        self.logits = nn.Dense(config.latents * config.classes)
        self.prior = PRIORS[config.prior](config.latents, config.classes)
        self.decoder = networks.Decoder(
            config.network, config.decoder, config.activation, config.likelihood, spec
        )

    def __call__(self, x: jax.Array) -> None:
        """Touch every parameter, for initialisation."""
        z = jnp.exp(self.log_posterior(x))
        self.outputs(z)
        self.log_prior(z)

    def log_posterior(self, x: jax.Array) -> jax.Array:
        """log q(c_n = · | x) `[B, N, C]` for x as the data hold it."""
        logits = self.logits(self.encoder(x / self.spec.scale))
        return nn.log_softmax(logits.reshape(len(x), self.config.latents, self.config.classes))

    def log_prior(self, z: jax.Array) -> jax.Array:
        """log p(c) `[...]`."""
        return self.prior.log_prob(z)

    def draw_prior(self, rng: jax.Array, num: int) -> jax.Array:
        """`num` draws from p(c)."""
        return self.prior.draw(rng, num)

    def outputs(self, z: jax.Array) -> jax.Array:
        """The likelihood's parameters `[..., D, P]`."""
        return self.decoder(z.reshape(*z.shape[:-2], -1))


def build(config: Config, spec: DataSpec) -> Model:
    """The model as pure functions; see `core.Model` for their contracts."""
    net = Net(config, spec)
    likelihood = likelihoods.LIKELIHOODS[config.likelihood]()
    options = Options(beta=config.beta)

    def bind(params: Params) -> Net:
        return net.bind({"params": params["discrete_vae"]})

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        return {"discrete_vae": net.init(rng, batch["x"][:1])["params"]}

    def one_hots(rng: jax.Array, log_q: jax.Array, k: int) -> jax.Array:
        """K exact draws `[K, B, N, C]`."""
        index = jax.random.categorical(rng, log_q, shape=(k, *log_q.shape[:-1]))
        return jax.nn.one_hot(index, config.classes)

    def draw(params: Params, batch: Batch, rng: jax.Array, k: int) -> Draws:
        """K exact posterior draws; their gradient is that of their densities alone."""
        bound, flat = bind(params), batch["x"].reshape(1, len(batch["x"]), -1)
        log_q = bound.log_posterior(batch["x"])

        def log_joint_at(z: jax.Array) -> tuple[jax.Array, jax.Array]:
            return likelihood.log_prob(bound.outputs(z), flat), bound.log_prior(z)

        def log_posterior_at(z: jax.Array, detached: bool) -> jax.Array:
            known = jax.lax.stop_gradient(log_q) if detached else log_q
            return jnp.sum(z * known[None], axis=(-2, -1))

        z = one_hots(rng, log_q, k)
        log_likelihood, log_prior = log_joint_at(z)
        return Draws(
            z=z,
            log_likelihood=log_likelihood,
            log_prior=log_prior,
            log_posterior=log_posterior_at(z, False),
            log_joint_at=log_joint_at,
            log_posterior_at=log_posterior_at,
        )

    def relaxed_cost(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        """Minus the ELBO at relaxed codes `[B]`: a surrogate, and no bound.

        The entropy of q(c | x) is exact; the decoder and the prior see softmax((log q + g) / τ)
        with Gumbel noise g (Jang et al. 2017, eq. 2).
        """
        bound, flat = bind(params), batch["x"].reshape(1, len(batch["x"]), -1)
        log_q = bound.log_posterior(batch["x"])
        noise = jax.random.gumbel(rng, (config.num_samples, *log_q.shape))
        z = nn.softmax((log_q[None] + noise) / config.temperature)
        distortion = -likelihood.log_prob(bound.outputs(z), flat)
        minus_entropy = jnp.sum(jnp.exp(log_q) * log_q, axis=(-2, -1))
        rate = minus_entropy[None] - bound.log_prior(z)
        return jnp.mean(distortion + config.beta * rate, axis=0)

    def loss_fn(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        draw_rng, relaxed_rng = jax.random.split(rng)
        draws = draw(params, batch, draw_rng, config.num_samples)
        if config.objective == "vimco":
            cost = objectives.vimco(draws, options)
        else:
            cost = relaxed_cost(params, batch, relaxed_rng)
        terms = {"distortion": draws.distortion, "rate": draws.total_rate}
        return masked_mean(cost, batch), Aux(terms=terms)

    def log_weight(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        return draw(params, batch, rng, 1).log_weights()[0]

    def encode(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        """The posterior probabilities."""
        del rng
        return jnp.exp(bind(params).log_posterior(batch["x"])).reshape(len(batch["x"]), -1)

    def decode(params: Params, codes: jax.Array) -> jax.Array:
        z = codes.reshape(len(codes), config.latents, config.classes)
        return likelihoods.picture(likelihood, bind(params).outputs(z), spec)

    def reconstruct(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        bound = bind(params)
        z = one_hots(rng, bound.log_posterior(batch["x"]), 1)
        return likelihoods.picture(likelihood, bound.outputs(z[0]), spec)

    def sample(params: Params, rng: jax.Array, num: int) -> dict[str, jax.Array]:
        bound, (z_rng, x_rng) = bind(params), jax.random.split(rng)
        return likelihoods.draw(
            likelihood, x_rng, bound.outputs(bound.draw_prior(z_rng, num)), spec
        )

    return Model(
        init=init,
        players=(Player("discrete_vae", loss_fn),),
        log_likelihood_fns={"elbo": log_weight},
        log_weight=log_weight,
        sample=sample,
        encode=encode,
        decode=decode,
        reconstruct=reconstruct,
    )
