"""Log-densities and divergences, in nats, straight from their definitions.

Every function keeps its event dimensions: reduce them once, where the per-example term is made.
"""

import math

import jax
import jax.numpy as jnp


def bernoulli_log_prob(logits: jax.Array, x: jax.Array) -> jax.Array:
    """log Bernoulli(x; sigmoid(logits)), elementwise, finite for any finite logit.

    Args:
      logits: float, any shape.
      x: targets in {0, 1}, same shape. On grey values this is not a log-likelihood.

    Returns:
      Nats, same shape: x·l - softplus(l).
    """
    # Written out: jax.nn.softplus also serves infinite logits, which costs three times as much.
    # min(l, -l) is -|l| with the right derivative at 0, where jnp.abs has 1.
    minus_abs = jnp.minimum(logits, -logits)
    softplus = jnp.maximum(logits, 0) + jnp.log1p(jnp.exp(minus_abs))
    return x * logits - softplus


def gaussian_log_prob(x: jax.Array, mu: jax.Array, log_sigma: jax.Array) -> jax.Array:
    """log N(x; mu, sigma²), elementwise in nats; all arguments broadcast to the result's shape."""
    standardised = (x - mu) * jnp.exp(-log_sigma)
    return -0.5 * (standardised**2 + math.log(2 * math.pi)) - log_sigma


def standard_gaussian_log_prob(x: jax.Array) -> jax.Array:
    """log N(x; 0, 1), elementwise in nats, same shape as `x`."""
    return -0.5 * (x**2 + math.log(2 * math.pi))


def gaussian_kl_to_standard(mu: jax.Array, log_sigma: jax.Array) -> jax.Array:
    """KL(N(mu, sigma²) ‖ N(0, 1)), elementwise, nats, ≥ 0.

    Reference: Kingma & Welling 2014, appendix B (there written as -KL and summed).
    """
    return 0.5 * (jnp.expm1(2 * log_sigma) + mu**2) - log_sigma
