"""Variational autoencoders: one vector of latents; any prior, posterior, likelihood and objective.

    p(x, z) = p(z) p(x | z),   q(z | x) amortised

Reference: Kingma & Welling 2014, "Auto-Encoding Variational Bayes". Each choice is cited where it
is defined: `objectives`, `likelihoods`, `nn.priors`, `nn.posteriors`.
"""

import dataclasses

import flax.linen as nn
import jax

from dgm_jax import checks, labels, likelihoods, objectives
from dgm_jax.core import Batch, DataSpec, Model, Params, UserError
from dgm_jax.distributions import gaussian_kl_to_standard, gaussian_log_prob
from dgm_jax.draws import Draws
from dgm_jax.latent_variable import latent_variable_model
from dgm_jax.nn import networks, priors
from dgm_jax.nn.posteriors import POSTERIORS, Context
from dgm_jax.objectives import Options
from dgm_jax.rows import row_weight


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's fields. Real numbers may be traced.

    Attributes:
      latents: L, dimensions of z.
      network: `mlp`, or `conv`: residual stages that halve or double the sides of the image.
      encoder: widths of the encoder's hidden layers, or channels of its stages.
      decoder: the same of the decoder.
      activation: one of `nn.mlp.ACTIVATIONS`, or for an `mlp` also `gated`.
      window: odd side of the square through which each pixel sees those before it; 0: pixels
        are independent given z.
      likelihood: one of `likelihoods.LIKELIHOODS`.
      prior: one of `nn.priors.PRIORS`.
      components: of a mixture prior; pseudo-inputs of a VampPrior.
      posterior: one of `nn.posteriors.POSTERIORS`.
      flow_steps: of a flow prior or posterior.
      flow_width: of their hidden layers.
      objective: one of `objectives.OBJECTIVES`.
      num_samples: K, posterior draws per example in the objective.
      beta: weight of the rate (of the total correlation in `tcvae`); 1 gives a bound on log p(x).
      alpha: order of the Rényi bound.
      free_nats: λ of `free_bits`, nats per latent.
      mmd_weight: of `infovae`: of the divergence, beside the rate (see `objectives.infovae`).
      conditional: encoder and decoder are told the label: a model of p(x | label).
    """

    latents: int = 50
    network: str = "mlp"
    encoder: tuple[int, ...] = (200, 200)
    decoder: tuple[int, ...] = (200, 200)
    activation: str = "silu"
    window: int = 0
    likelihood: str = "bernoulli"
    prior: str = "standard"
    components: int = 500
    posterior: str = "diagonal"
    flow_steps: int = 4
    flow_width: int = 128
    objective: str = "elbo"
    num_samples: int = 1
    beta: float = 1.0
    alpha: float = 0.0
    free_nats: float = 0.5
    mmd_weight: float = 10.0
    conditional: bool = False

    @property
    def options(self) -> Options:
        """The numbers of the objective."""
        return Options(
            beta=self.beta,
            alpha=self.alpha,
            free_nats=self.free_nats,
            mmd_weight=self.mmd_weight,
        )


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values, and pairs of choices, that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    checks.at_least(config, latents=1)
    checks.widths(config, "encoder", "decoder")
    networks.check(config.network, config.activation, spec, config.window)
    checks.one_of(config, posterior=POSTERIORS)
    priors.check(config.prior, _prior_sizes(config, spec), spec.support)
    likelihoods.check(config.likelihood, spec)
    prior, posterior = config.prior, config.posterior
    of = f"a vae with posterior {posterior!r} and prior {prior!r}"
    objectives.check(config.objective, config.num_samples, config.options, _provided(config), of)
    if prior == "vamp" and posterior != "diagonal":
        raise UserError(
            f"model.prior='vamp' is a mixture of posteriors of the 'diagonal' kind, "
            f"and model.posterior={posterior!r}"
        )
    if prior == "vamp" and config.conditional:
        raise UserError("model.prior='vamp' has pseudo-inputs without labels: not conditional")
    labels.check(config.conditional, spec)


def _provided(config: Config) -> list[str]:
    """What the draws have that objectives may need."""
    is_diagonal = config.posterior == "diagonal"
    found = {
        "reparameterised": True,
        # No gradient would tell which component of a mixture is drawn.
        "draw_prior": config.prior != "mixture",
        "log_posterior_at": POSTERIORS[config.posterior].evaluable,
        "log_posterior_pairs": is_diagonal,
        "rate": is_diagonal and config.prior == "standard",
    }
    return [name for name, is_there in found.items() if is_there]


def _prior_sizes(config: Config, spec: DataSpec) -> priors.Sizes:
    flow = (config.flow_steps, config.flow_width)
    return priors.Sizes(config.latents, config.components, *flow, spec.unit_mean)


class Net(nn.Module):
    """All networks of one VAE, and the densities that they parametrise."""

    config: Config
    spec: DataSpec

    def setup(self) -> None:
        """Encoder, posterior, prior, decoder."""
        config, spec = self.config, self.spec
        self.encoder = networks.Encoder(config.network, config.encoder, config.activation)
        layers = (config.network, config.decoder, config.activation, config.likelihood, spec)
        if config.window:
            self.decoder = networks.WindowDecoder(*layers, config.window)
        else:
            self.decoder = networks.Decoder(*layers)
        self.prior = priors.PRIORS[config.prior](_prior_sizes(config, spec))
        flow = (config.flow_steps, config.flow_width)
        self.posterior = POSTERIORS[config.posterior](
            config.latents, *(flow if config.posterior == "iaf" else ())
        )

    def __call__(self, x: jax.Array, label: jax.Array | None, rng: jax.Array) -> None:
        """Touch every parameter, for initialisation."""
        z, _ = self.posterior.draw(self.context(x, label), rng, 1)
        self.outputs(z, label, x)
        self.log_prior(z)

    def context(self, x: jax.Array, label: jax.Array | None) -> Context:
        """Parameters of q(z | x) for x `[B, *event]` as the data hold it."""
        return self._context_of_unit(x / self.spec.scale, label)

    def outputs(
        self, z: jax.Array, label: jax.Array | None, x: jax.Array | None = None
    ) -> jax.Array:
        """The likelihood's parameters `[..., D, P]` given z `[..., L]`.

        A decoder with a window wants the x `[B, *event]` whose earlier pixels it may see.
        """
        if self.config.window:
            return self.decoder(z, self._one_hot(label), x / self.spec.scale)
        return self.decoder(z, self._one_hot(label))

    def draw_in_turn(self, rng: jax.Array, z: jax.Array, label: jax.Array | None) -> jax.Array:
        """x `[B, *event]` drawn from p(x | z) pixel by pixel, each told those before it."""
        likelihood = likelihoods.LIKELIHOODS[self.config.likelihood]()
        features = self.decoder.features(z, self._one_hot(label))

        def outputs_at(x: jax.Array, pixel: jax.Array) -> jax.Array:
            return self.decoder.at(features, x / self.spec.scale, pixel)

        shape = (len(z), *self.spec.event_shape)
        return likelihoods.draw_in_turn(likelihood, rng, outputs_at, shape)

    def log_prior(self, z: jax.Array) -> jax.Array:
        """log p(z) `[...]`, nats."""
        return self.prior.log_prob(z, lambda u: self._context_of_unit(u, None))

    def draw_prior(self, rng: jax.Array, num: int) -> jax.Array:
        """z `[num, L]` from p(z)."""
        return self.prior.draw(rng, num, lambda u: self._context_of_unit(u, None))

    def _context_of_unit(self, x: jax.Array, label: jax.Array | None) -> Context:
        return self.posterior(self.encoder(x, self._one_hot(label)))

    def _one_hot(self, label: jax.Array | None) -> jax.Array | None:
        return labels.one_hot(label, self.config.conditional, self.spec)


def build(config: Config, spec: DataSpec) -> Model:
    """The VAE as pure functions; see `core.Model` for their contracts."""
    net = Net(config, spec)
    likelihood = likelihoods.LIKELIHOODS[config.likelihood]()
    closed = config.posterior == "diagonal" and config.prior == "standard"

    def bind(params: Params) -> Net:
        return net.bind({"params": params["vae"]})

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        label = batch["label"][:1] if config.conditional else None
        return {"vae": net.init(rng, batch["x"][:1], label, rng)["params"]}

    def draw(params: Params, batch: Batch, rng: jax.Array, k: int) -> Draws:
        """K posterior draws and all that objectives may ask about them."""
        vae, x, label = bind(params), batch["x"], batch.get("label")
        flat = x.reshape(1, len(x), -1)
        posterior_rng, prior_rng = jax.random.split(rng)
        context = vae.context(x, label)
        z, log_posterior = vae.posterior.draw(context, posterior_rng, k)

        def log_joint_at(z: jax.Array) -> tuple[jax.Array, jax.Array]:
            return likelihood.log_prob(vae.outputs(z, label, x), flat), vae.log_prior(z)

        def log_posterior_at(z: jax.Array, detached: bool) -> jax.Array:
            held = jax.lax.stop_gradient(context) if detached else context
            return vae.posterior.log_prob(held, z)

        def log_posterior_pairs(z: jax.Array) -> jax.Array:
            mu, log_sigma = context
            return gaussian_log_prob(z[:, None], mu[None], log_sigma[None])

        log_likelihood, log_prior = log_joint_at(z)
        return Draws(
            z=z,
            log_likelihood=log_likelihood,
            log_prior=log_prior,
            log_posterior=log_posterior,
            log_joint_at=log_joint_at,
            log_posterior_at=log_posterior_at if vae.posterior.evaluable else None,
            rate=gaussian_kl_to_standard(*context) if closed else None,
            log_posterior_pairs=log_posterior_pairs,
            draw_prior=lambda: vae.draw_prior(prior_rng, len(x)),
            weight=row_weight(batch),
            num_examples=spec.num_examples,
        )

    def encode(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        del rng
        vae = bind(params)
        return vae.posterior.mean(vae.context(batch["x"], batch.get("label")))

    def decode(params: Params, z: jax.Array) -> jax.Array:
        return likelihoods.picture(likelihood, bind(params).outputs(z, None), spec)

    def reconstruct(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        vae, label = bind(params), batch.get("label")
        z, _ = vae.posterior.draw(vae.context(batch["x"], label), rng, 1)
        if config.window:
            return vae.draw_in_turn(jax.random.fold_in(rng, 1), z[0], label) / spec.scale
        return likelihoods.picture(likelihood, vae.outputs(z[0], label), spec)

    def draw_joint(
        params: Params, rng: jax.Array, num: int, label: jax.Array | None = None
    ) -> tuple[jax.Array, dict]:
        vae = bind(params)
        z_rng, x_rng = jax.random.split(rng)
        told = labels.of_samples(num, label, config.conditional, spec)
        label = told.get("label")
        z = vae.draw_prior(z_rng, num)
        if config.window:
            samples = {"x": vae.draw_in_turn(x_rng, z, label)}
        else:
            samples = likelihoods.draw(likelihood, x_rng, vae.outputs(z, label), spec)
        return z, samples | told

    return latent_variable_model(
        player="vae",
        draw=draw,
        draw_joint=draw_joint,
        samples_are_exact=likelihood.draws_what_it_scores,
        objective=config.objective,
        num_samples=config.num_samples,
        options=config.options,
        posterior_is_evaluable=POSTERIORS[config.posterior].evaluable,
        has_latent_rates=closed,
        init=init,
        samples_have_label=config.conditional,
        encode=encode,
        encoder_is_told=config.conditional,
        decode=None if config.conditional or config.window else decode,
        reconstruct=reconstruct,
    )
