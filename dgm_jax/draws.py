"""Draws from a posterior, and all that an objective may ask about them.

What a latent-variable model gives and `objectives` take: log-densities only, so that any prior,
posterior and decoder goes with any objective that can use it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Z = Any  # a pytree of arrays [K, B, ...]


class Draws(NamedTuple):
    """K draws from q(z | x) for each of B examples, and what objectives need to know of them.

    All densities are in nats.

    Attributes:
      z: pytree of float `[K, B, ...]`; differentiable in the posterior's parameters where the
        posterior is reparameterised.
      log_likelihood: log p(x | z) `[K, B]`.
      log_prior: log p(z) `[K, B]`.
      log_posterior: log q(z | x) `[K, B]`.
      log_joint_at: `z -> (log p(x | z), log p(z))`, at other z.
      log_posterior_at: `(z, detached) -> log q(z | x)`; with `detached` the posterior's parameters
        are held constant, so that the only gradient is the one through `z`. None where the
        posterior can give the density only of its own draws.
      rate: KL(q(z | x) ‖ p(z)) `[B, L]` in closed form, a column for each latent, or None.
      layer_rates: of a hierarchy, each layer's part of the rate by the draws, `[B]` by name.
      log_posterior_pairs: `z [B, L] -> log q(z_i | x_j) [B, B, L]`, i first, or None.
      draw_prior: `() -> [B, L]`, draws from p(z).
      relaxed: of discrete z, one-hot: the same draws between the corners of the simplex, where
        they are differentiable in the posterior's parameters, or None.
      weight: float `[B]`, 1 for real rows and 0 for padding.
      num_examples: size of the training split.
    """

    z: Z
    log_likelihood: jax.Array
    log_prior: jax.Array
    log_posterior: jax.Array
    log_joint_at: Callable[[Z], tuple[jax.Array, jax.Array]]
    log_posterior_at: Callable[[Z, bool], jax.Array] | None = None
    rate: jax.Array | None = None
    layer_rates: Mapping[str, jax.Array] = {}
    log_posterior_pairs: Callable[[jax.Array], jax.Array] | None = None
    draw_prior: Callable[[], jax.Array] | None = None
    relaxed: jax.Array | None = None
    weight: jax.Array | None = None
    num_examples: int = 0

    def log_weights(self, beta: float = 1.0) -> jax.Array:
        """log w = log p(x | z) + β (log p(z) - log q(z | x)) `[K, B]`."""
        return self.log_likelihood + beta * (self.log_prior - self.log_posterior)

    def log_weights_at(self, z: Z, beta: float, detached: bool) -> jax.Array:
        """The same at another z."""
        log_likelihood, log_prior = self.log_joint_at(z)
        return log_likelihood + beta * (log_prior - self.log_posterior_at(z, detached))

    def at(self, z: Z) -> "Draws":
        """The same posterior, had it drawn another z."""
        log_likelihood, log_prior = self.log_joint_at(z)
        return self._replace(
            z=z,
            log_likelihood=log_likelihood,
            log_prior=log_prior,
            log_posterior=self.log_posterior_at(z, False),
        )

    @property
    def distortion(self) -> jax.Array:
        """-E[log p(x | z)] `[B]`, by the draws."""
        return -jnp.mean(self.log_likelihood, axis=0)

    @property
    def total_rate(self) -> jax.Array:
        """KL(q(z | x) ‖ p(z)) `[B]`: in closed form where there is one, else by the draws."""
        if self.rate is None:
            return jnp.mean(self.log_posterior - self.log_prior, axis=0)
        return jnp.sum(self.rate, axis=-1)


def layered_draws(
    z: Z,
    log_q: list[jax.Array],
    log_likelihood_at: Callable[[Z], jax.Array],
    log_priors_at: Callable[[Z], list[jax.Array]],
    log_posteriors_at: Callable[[Z, bool], list[jax.Array]],
) -> Draws:
    """The draws of a hierarchy.

    Args:
      z: K draws for each of B examples.
      log_q: log q of each layer of z given what it was drawn from, from the data up, `[K, B]`.
      log_likelihood_at: `z -> log p(x | z) [K, B]`.
      log_priors_at: `z ->` log p of each layer given those above it, from the data up, `[K, B]`.
      log_posteriors_at: `(z, detached) ->` the log_q of any z; `detached` as in
        `Draws.log_posterior_at`.
    """
    log_p = log_priors_at(z)
    return Draws(
        z=z,
        log_likelihood=log_likelihood_at(z),
        log_prior=sum(log_p),
        log_posterior=sum(log_q),
        log_joint_at=lambda z: (log_likelihood_at(z), sum(log_priors_at(z))),
        log_posterior_at=lambda z, detached: sum(log_posteriors_at(z, detached)),
        layer_rates={
            f"rate_{i + 1}": jnp.mean(q - p, axis=0)
            for i, (q, p) in enumerate(zip(log_q, log_p, strict=True))
        },
    )
