"""Generative adversarial networks: a generator, and a discriminator that tells its work from data.

    x = G(z),  z ~ N(0, I);   D(x) a logit, higher where x looks real

Two players: first the discriminator learns to score data above what is generated, then the
generator to be scored as data. There is no density, so no likelihood and no encoder.

References: Goodfellow et al. 2014, "Generative adversarial nets"; Lim & Ye 2017, "Geometric GAN"
(hinge); Arjovsky et al. 2017, "Wasserstein GAN"; Gulrajani et al. 2017, "Improved training of
Wasserstein GANs"; Mescheder et al. 2018, "Which training methods for GANs do actually converge?"
(R1 and R2); Miyato & Koyama 2018, "cGANs with projection discriminator"; Jolicoeur-Martineau 2019,
"The relativistic discriminator"; Huang et al. 2024, "The GAN is dead; long live the GAN!" (R3GAN:
the relativistic pairing loss with R1 and R2).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax import checks, labels, likelihoods
from dgm_jax.core import Aux, Batch, DataSpec, Model, Params, Player, UserError, masked_mean
from dgm_jax.nn import networks
from dgm_jax.nn.precision import Dense

Critic = Callable[[jax.Array], jax.Array]  # x / scale, [B, *event] -> logits [B]


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's fields. Real numbers may be traced.

    Attributes:
      latents: L, dimensions of z.
      network: `mlp`, or `conv`: residual stages that double or halve the sides of the image.
      generator: widths of the generator's hidden layers, or channels of its stages.
      discriminator: the same of the discriminator.
      activation: one of `nn.mlp.ACTIVATIONS`, or for an `mlp` also `gated`.
      objective: one of `OBJECTIVES`.
      penalty: on the discriminator's slope, one of `PENALTIES`.
      penalty_weight: γ of R1 and R2, λ of the gradient penalty; slopes are by x / scale.
      conditional: both players are told the label: a model of p(x | label).
    """

    latents: int = 64
    network: str = "conv"
    generator: tuple[int, ...] = (32, 16)
    discriminator: tuple[int, ...] = (16, 32)
    activation: str = "relu"
    objective: str = "relativistic"
    penalty: str = "r1_r2"
    penalty_weight: float = 0.1
    conditional: bool = False


class Costs(NamedTuple):
    """What each player minimises, float `[B]`."""

    discriminator: jax.Array
    generator: jax.Array


def relativistic(real: jax.Array, fake: jax.Array) -> Costs:
    """Which of a pair is real? In nats; log 2 each where nobody can tell (Huang et al. 2024).

    Args:
      real: logits of data, float `[B]`.
      fake: logits of what was generated, float `[B]`, each paired with the real one beside it.
    """
    return Costs(nn.softplus(fake - real), nn.softplus(real - fake))


def non_saturating(real: jax.Array, fake: jax.Array) -> Costs:
    """-log D(x) - log(1 - D(G(z))) and -log D(G(z)), in nats (Goodfellow et al. 2014, section 3).

    Arguments as in `relativistic`, here without pairing.
    """
    return Costs(nn.softplus(-real) + nn.softplus(fake), nn.softplus(-fake))


def hinge(real: jax.Array, fake: jax.Array) -> Costs:
    """Logits beyond ±1 cost nothing (Lim & Ye 2017). Arguments as in `relativistic`."""
    return Costs(nn.relu(1 - real) + nn.relu(1 + fake), -fake)


def wasserstein(real: jax.Array, fake: jax.Array) -> Costs:
    """Minus the difference of the scores (Arjovsky et al. 2017). Arguments as in `relativistic`."""
    return Costs(fake - real, -fake)


OBJECTIVES: dict[str, Callable[[jax.Array, jax.Array], Costs]] = {
    "relativistic": relativistic,
    "non_saturating": non_saturating,
    "hinge": hinge,
    "wasserstein": wasserstein,
}


def squared_slope(critic: Critic, x: jax.Array) -> jax.Array:
    """‖∇D(x)‖² `[B]` of each row of `x` `[B, *event]`; no row's logit may depend on another's."""
    slope = jax.grad(lambda x: jnp.sum(critic(x)))(x)
    return jnp.sum(slope.reshape(len(x), -1) ** 2, axis=1)


def r1(critic: Critic, real: jax.Array, fake: jax.Array, rng: jax.Array) -> jax.Array:
    """½ ‖∇D‖² at the data, `[B]` (Mescheder et al. 2018).

    Args:
      critic: D.
      real: data, `[B, *event]`.
      fake: as many generated.
      rng: of penalties that draw.
    """
    del fake, rng
    return squared_slope(critic, real) / 2


def r1_r2(critic: Critic, real: jax.Array, fake: jax.Array, rng: jax.Array) -> jax.Array:
    """½ ‖∇D‖² at the data and at what is generated (Huang et al. 2024). Arguments as in `r1`."""
    del rng
    return (squared_slope(critic, real) + squared_slope(critic, fake)) / 2


def gradient_penalty(critic: Critic, real: jax.Array, fake: jax.Array, rng: jax.Array) -> jax.Array:
    """(‖∇D‖ - 1)² between them (Gulrajani et al. 2017, eq. 3). Arguments as in `r1`."""
    weight = jax.random.uniform(rng, (len(real),) + (1,) * (real.ndim - 1))
    squared = squared_slope(critic, weight * real + (1 - weight) * fake)
    return (jnp.sqrt(squared + 1e-12) - 1) ** 2  # a root has no gradient at 0


def no_penalty(critic: Critic, real: jax.Array, fake: jax.Array, rng: jax.Array) -> jax.Array:
    """0 for each example. Arguments as in `r1`."""
    del critic, fake, rng
    return jnp.zeros(len(real))


PENALTIES: dict[str, Callable[[Critic, jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "none": no_penalty,
    "r1": r1,
    "r1_r2": r1_r2,
    "gradient_penalty": gradient_penalty,
}


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    if spec.support not in ("uint8", "real"):
        raise UserError(
            "model.name='gan' generates grey values or real numbers, and these data are "
            f"{spec.support}: of images set data.binarisation='none'"
        )
    checks.at_least(config, latents=1)
    checks.widths(config, "generator", "discriminator")
    networks.check(config.network, config.activation, spec)
    checks.one_of(config, objective=OBJECTIVES, penalty=PENALTIES)
    checks.at_least(config, penalty_weight=0)
    labels.check(config.conditional, spec)


class Discriminator(nn.Module):
    """x / scale, `[B, *event]` -> logits `[B]`; with `label` one-hot `[B, C]`, of that class.

    The last layer has no bias: only differences of logits count in most objectives.
    """

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, label: jax.Array | None) -> jax.Array:
        """Logits, higher where x looks real."""
        config = self.config
        h = networks.Encoder(config.network, config.discriminator, config.activation)(x)
        if label is None:
            return Dense(1, use_bias=False)(h)[:, 0]
        # A row of weights for each class (Miyato & Koyama 2018).
        return jnp.sum(Dense(label.shape[1], use_bias=False)(h) * label, axis=1)


def build(config: Config, spec: DataSpec) -> Model:
    """The GAN as pure functions; see `core.Model` for their contracts."""
    layers = (config.network, config.generator, config.activation)
    generator = networks.Decoder(*layers, None, spec)
    discriminator = Discriminator(config)
    objective, penalty = OBJECTIVES[config.objective], PENALTIES[config.penalty]

    def one_hot(label: jax.Array | None) -> jax.Array | None:
        return labels.one_hot(label, config.conditional, spec)

    def generate(params: Params, rng: jax.Array, num: int, label: jax.Array | None) -> jax.Array:
        """x / scale, `[num, *event]`."""
        z = jax.random.normal(rng, (num, config.latents))
        outputs = generator.apply({"params": params["generator"]}, z, one_hot(label))
        return outputs.reshape(num, *spec.event_shape)

    def critic(params: Params, label: jax.Array | None) -> Critic:
        variables = {"params": params["discriminator"]}
        return lambda x: discriminator.apply(variables, x, one_hot(label))

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        rngs, label = jax.random.split(rng), one_hot(jnp.zeros(1, jnp.int32))
        z, x = jnp.zeros((1, config.latents)), batch["x"][:1]
        return {
            "discriminator": discriminator.init(rngs[0], x, label)["params"],
            "generator": generator.init(rngs[1], z, label)["params"],
        }

    def discriminator_loss(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        real, label = batch["x"] / spec.scale, batch.get("label")
        z_rng, penalty_rng = jax.random.split(rng)
        fake = jax.lax.stop_gradient(generate(params, z_rng, len(real), label))
        score = critic(params, label)
        logits = score(real), score(fake)
        slopes = penalty(score, real, fake, penalty_rng)
        cost = objective(*logits).discriminator + config.penalty_weight * slopes
        terms = {"discrimination": relativistic(*logits).discriminator}
        return masked_mean(cost, batch), Aux(terms, {"penalty": masked_mean(slopes, batch)})

    def generator_loss(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        real, label = batch["x"] / spec.scale, batch.get("label")
        score = critic(jax.lax.stop_gradient(params), label)
        cost = objective(score(real), score(generate(params, rng, len(real), label))).generator
        return masked_mean(cost, batch), Aux({})

    def sample(
        params: Params, rng: jax.Array, num: int, label: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        told = labels.of_samples(num, label, config.conditional, spec)
        x = generate(params, rng, num, told.get("label"))
        if spec.support == "uint8":
            x = jnp.round(spec.scale * jnp.clip(x, 0, 1))
        return {"x": x} | told

    return Model(
        init=init,
        players=(Player("discriminator", discriminator_loss), Player("generator", generator_loss)),
        log_likelihood_fns={},
        sample=sample,
        samples_have_label=config.conditional,
    )
