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


def log_mean_exp(values: jax.Array, axis: int = 0) -> jax.Array:
    """log of the mean of exp(values) over one axis, without overflow."""
    return jax.nn.logsumexp(values, axis=axis) - math.log(values.shape[axis])


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


def gaussian_kl(
    mu_q: jax.Array, log_sigma_q: jax.Array, mu_p: jax.Array, log_sigma_p: jax.Array
) -> jax.Array:
    """KL(N(mu_q, sigma_q²) ‖ N(mu_p, sigma_p²)), elementwise, nats, ≥ 0."""
    # In units of sigma_p, where it is the divergence from a standard Gaussian.
    return gaussian_kl_to_standard((mu_q - mu_p) * jnp.exp(-log_sigma_p), log_sigma_q - log_sigma_p)


def discretised_logistic_log_prob(
    x: jax.Array, location: jax.Array, log_scale: jax.Array
) -> jax.Array:
    """log of a logistic's mass in the bin of a grey value, elementwise, nats.

    Bins are 2/255 wide on the scale where 0 is -1 and 255 is 1; the first and the last are open to
    infinity, so that the 256 masses sum to 1.

    Args:
      x: float in {0, ..., 255}; broadcasts with the others.
      location, log_scale: of the logistic, on the scale from -1 to 1.

    Reference: Salimans et al. 2017, "PixelCNN++", eq. 2.
    """
    inverse_scale = jnp.exp(-log_scale)
    # Neighbouring bins round their common side alike, so that their masses still sum to 1.
    upper = ((x + 0.5) / 127.5 - 1 - location) * inverse_scale
    lower = ((x - 0.5) / 127.5 - 1 - location) * inverse_scale
    # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(a-b)): no cancellation in the tails.
    width = 2 / 255 * inverse_scale
    middle = jax.nn.log_sigmoid(upper) + jax.nn.log_sigmoid(-lower) + _log1mexp(width)
    edges = jnp.where(x < 0.5, jax.nn.log_sigmoid(upper), jax.nn.log_sigmoid(-lower))
    return jnp.where((x < 0.5) | (x > 254.5), edges, middle)


def draw_logistic(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws from the standard logistic distribution, float32 `shape`.

    JAX's own are logits of uniform draws on a grid of 2⁻²³, of which 0 is taken for the smallest
    float: -87.3 with a probability of 2⁻²³ in place of e⁻⁸⁷. Here it is the middle of its cell.
    """
    return jnp.maximum(jax.random.logistic(rng, shape), -24 * math.log(2))


def _log1mexp(a: jax.Array) -> jax.Array:
    """log(1 - e^-a) for a > 0, accurate at both ends (Mächler 2012)."""
    small = a < math.log(2)
    return jnp.where(
        small,
        jnp.log(-jnp.expm1(-jnp.where(small, a, 1.0))),
        jnp.log1p(-jnp.exp(-jnp.where(small, 1.0, a))),
    )
