"""Variational autoencoder with a diagonal Gaussian posterior and a Bernoulli decoder.

    p(z) = N(0, I),  p(x | z) = Bernoulli(sigmoid(f(z))),  q(z | x) = N(mu(x), diag sigma(x)²)

Reference: Kingma & Welling 2014, "Auto-Encoding Variational Bayes"; the weight β on the rate is
Higgins et al. 2017, "beta-VAE".
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax.core import Aux, Batch, DataSpec, Model, Params, Player, UserError, masked_mean
from dgm_jax.distributions import (
    bernoulli_log_prob,
    gaussian_kl_to_standard,
    gaussian_log_prob,
    standard_gaussian_log_prob,
)
from dgm_jax.nn.mlp import MLP

ACTIVATIONS = {"silu": nn.silu, "relu": nn.relu, "tanh": nn.tanh, "gelu": nn.gelu}


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's fields.

    Attributes:
      latents: dimensions of z.
      encoder: widths of the encoder's hidden layers.
      decoder: widths of the decoder's hidden layers.
      activation: one of `ACTIVATIONS`.
      beta: weight of the rate in the loss; 1 is the ELBO. May be traced.
    """

    latents: int = 50
    encoder: tuple[int, ...] = (200, 200)
    decoder: tuple[int, ...] = (200, 200)
    activation: str = "silu"
    beta: float = 1.0


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    if config.latents < 1:
        raise UserError(f"model.latents={config.latents}: a VAE needs at least one latent")
    for field in ("encoder", "decoder"):
        widths = getattr(config, field)
        if not widths or not all(isinstance(width, int) and width > 0 for width in widths):
            raise UserError(
                f"model.{field}={widths}: give one or more widths, whole numbers, each at least 1"
            )
    if config.activation not in ACTIVATIONS:
        raise UserError(
            f"model.activation={config.activation!r}: choose one of {', '.join(ACTIVATIONS)}"
        )
    if not config.beta >= 0:
        raise UserError(f"model.beta={config.beta}: the weight of the rate must be at least 0")
    if spec.support != "binary":
        raise UserError(
            f"a Bernoulli decoder needs binary data, and data.binarisation='none' gives "
            f"{spec.support}: set it to 'dynamic' or 'fixed'"
        )


class Encoder(nn.Module):
    """q(z | x): x `[B, *event]` -> (mu, log_sigma), each `[B, latents]`."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Parameters of the posterior of `x`."""
        config = self.config
        # Pixels to ±1, so that the first layer starts with centred inputs.
        h = 2 * x.reshape(len(x), -1).astype(jnp.float32) - 1
        h = MLP(config.encoder, ACTIVATIONS[config.activation])(h)
        mu, raw = jnp.split(nn.Dense(2 * config.latents)(h), 2, axis=-1)
        # sigma = softplus grows linearly in its input where exp would explode and end training in
        # a spike; the floor keeps log_sigma finite however far the input falls.
        return mu, jnp.log(nn.softplus(raw) + 1e-4)


class Decoder(nn.Module):
    """p(x | z): z `[B, latents]` -> Bernoulli logits `[B, D]`, D = prod(event).

    Flat, because a sum over one axis runs three times as fast as one over (H, W, C) on a CPU.
    """

    config: Config
    spec: DataSpec

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Logits of the pixels given `z`."""
        h = MLP(self.config.decoder, ACTIVATIONS[self.config.activation])(z)
        return nn.Dense(self.spec.num_dims, bias_init=self._mean_logits)(h)

    def _mean_logits(self, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        """Start at the best constant model: the logit of the training mean (Burda et al. 2016)."""
        del key
        mean = np.clip(self.spec.mean, 1e-3, 1 - 1e-3).reshape(shape)
        return jnp.asarray(np.log(mean / (1 - mean)), dtype)


def build(config: Config, spec: DataSpec) -> Model:
    """The VAE as pure functions; see `core.Model` for their contracts."""
    encoder, decoder = Encoder(config), Decoder(config, spec)

    def init(rng: jax.Array, batch: Batch) -> Params:
        _refuse_grey(batch["x"])
        encoder_rng, decoder_rng = jax.random.split(rng)
        z = jnp.zeros((1, config.latents))
        return {
            "vae": {
                "encoder": encoder.init(encoder_rng, batch["x"][:1]),
                "decoder": decoder.init(decoder_rng, z),
            }
        }

    def posterior(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return encoder.apply(params["vae"]["encoder"], x)

    def logits(params: Params, z: jax.Array) -> jax.Array:
        return decoder.apply(params["vae"]["decoder"], z)

    def log_likelihood(params: Params, x: jax.Array, z: jax.Array) -> jax.Array:
        """log p(x | z) `[B]`, nats."""
        return jnp.sum(bernoulli_log_prob(logits(params, z), x.reshape(len(x), -1)), axis=-1)

    def terms(params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """The two costs whose sum is the negative ELBO (Kingma & Welling 2014, eq. 10)."""
        mu, log_sigma = posterior(params, batch["x"])
        z = mu + jnp.exp(log_sigma) * jax.random.normal(rng, mu.shape)
        return {
            "distortion": -log_likelihood(params, batch["x"], z),
            "rate": jnp.sum(gaussian_kl_to_standard(mu, log_sigma), axis=-1),
        }

    def loss_fn(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        costs = terms(params, batch, rng)
        loss = masked_mean(costs["distortion"] + config.beta * costs["rate"], batch)
        return loss, Aux(terms=costs)

    def elbo(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        costs = terms(params, batch, rng)
        return -(costs["distortion"] + costs["rate"])

    def log_weight(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        mu, log_sigma = posterior(params, batch["x"])
        z = mu + jnp.exp(log_sigma) * jax.random.normal(rng, mu.shape)
        log_ratio = standard_gaussian_log_prob(z) - gaussian_log_prob(z, mu, log_sigma)
        return log_likelihood(params, batch["x"], z) + jnp.sum(log_ratio, axis=-1)

    def encode(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        del rng
        mu, _ = posterior(params, batch["x"])
        return mu

    def decode(params: Params, z: jax.Array) -> jax.Array:
        return nn.sigmoid(logits(params, z)).reshape(len(z), *spec.event_shape)

    def reconstruct(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        mu, log_sigma = posterior(params, batch["x"])
        return decode(params, mu + jnp.exp(log_sigma) * jax.random.normal(rng, mu.shape))

    def sample(params: Params, rng: jax.Array, num: int) -> dict[str, jax.Array]:
        z_rng, x_rng = jax.random.split(rng)
        mean = decode(params, jax.random.normal(z_rng, (num, config.latents)))
        return {"x": jax.random.bernoulli(x_rng, mean).astype(jnp.float32), "mean": mean}

    return Model(
        init=init,
        players=(Player("vae", loss_fn),),
        log_likelihood_fns={"elbo": elbo},
        log_weight=log_weight,
        sample=sample,
        encode=encode,
        decode=decode,
        reconstruct=reconstruct,
    )


def _refuse_grey(x: jax.Array) -> None:
    """A Bernoulli density of grey values is not one; checkable wherever x is not being traced."""
    if not isinstance(x, jax.core.Tracer) and not np.isin(np.asarray(x), (0, 1)).all():
        raise UserError("a Bernoulli decoder needs x in {0, 1}, and this batch has other values")
