"""Gaussian noise levels: what they are called, how a schedule goes through them, what they do.

    z_t = α x + σ ε,  α² = sigmoid(-γ),  σ² = sigmoid(γ),  ε ~ N(0, I)

γ(t) is minus the logarithm of the signal-to-noise ratio and rises with the time t, from t = 0 where
z is nearly x to t = 1 where it is nearly noise.

References: Kingma et al. 2021, "Variational diffusion models"; Nichol & Dhariwal 2021, "Improved
denoising diffusion probabilistic models" (cosine); Karras et al. 2022, "Elucidating the design
space of diffusion-based generative models" (its schedule and preconditioning).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax.rows import beside

SCHEDULES = ("linear", "monotone", "cosine", "karras")

_BINS = 32  # of the monotone schedule
_RHO = 7.0  # of Karras et al. 2022, table 1


def alpha_sigma(gamma: jax.Array) -> tuple[jax.Array, jax.Array]:
    """α and σ, α² + σ² = 1, where log α²/σ² is -γ (Kingma et al. 2021, eq. 3)."""
    return jnp.sqrt(jax.nn.sigmoid(-gamma)), jnp.sqrt(jax.nn.sigmoid(gamma))


class Schedule(nn.Module):
    """t in [0, 1] -> γ(t), of the same shape, rising.

    A monotone schedule is piecewise linear: t is the distribution function of γ, and how much of t
    each of 32 equal intervals of γ gets is learned, so that the bound has little variance. Its mean
    is the same for every schedule with the same ends (Kingma et al. 2021, section 5.1).

    Attributes:
      kind: one of `SCHEDULES`.
      ends: γ(0) and γ(1). They are not learned: the bound gains where γ(1) rises, ever less, and
        Adam follows however small a gradient at full pace.
    """

    kind: str
    ends: tuple[float, float]

    def setup(self) -> None:
        """What is learned."""
        if self.kind == "monotone":
            self.logits = self.param("logits", nn.initializers.zeros, (_BINS,))

    def __call__(self, t: jax.Array) -> jax.Array:
        """γ(t)."""
        low, high = self.ends
        if self.kind == "linear":
            return low + (high - low) * t
        if self.kind == "cosine":  # α = cos of an angle, σ = its sine (Nichol & Dhariwal 2021)
            # The cosine as the complement's sine: near π / 2 the angle alone is lost to rounding.
            angle, complement = (
                (1 - t) * jnp.arctan(jnp.exp(sign * low / 2))
                + t * jnp.arctan(jnp.exp(sign * high / 2))
                for sign in (1, -1)
            )
            return 2 * (jnp.log(jnp.sin(angle)) - jnp.log(jnp.sin(complement)))
        if self.kind == "karras":  # σ/α to the power 1/ρ is linear (Karras et al. 2022, eq. 5)
            first, last = jnp.exp(low / 2 / _RHO), jnp.exp(high / 2 / _RHO)
            return 2 * _RHO * jnp.log(first + (last - first) * t)
        # Not by way of γ(t): see `log_share`.
        share = jnp.exp(jax.lax.stop_gradient(self._log_shares()))
        which, before = self._interval(share, t)
        return low + (high - low) * (which + (t - before) / share[which]) / _BINS

    def log_share(self, t: jax.Array) -> jax.Array:
        """log of the share of t that the interval around γ(t) gets; of a monotone schedule.

        By which its logits are learned: the bound's second moment is ∫ c(γ)² / p(γ) dγ with p the
        density of γ and c the cost at it. Its gradient is E[-(c/p)² ∇ log p], without any of the
        network's.
        """
        log_shares = self._log_shares()
        which, _ = self._interval(jax.lax.stop_gradient(jnp.exp(log_shares)), t)
        return log_shares[which]

    def _log_shares(self) -> jax.Array:
        """Logarithms of the intervals' shares; none gets less than a tenth of an equal one."""
        return jnp.log(0.9 * jax.nn.softmax(self.logits) + 0.1 / _BINS)

    @staticmethod
    def _interval(share: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """In which interval t lies, and the t at which it begins."""
        ends = jnp.cumsum(share)
        which = jnp.searchsorted(ends[:-1], t, side="right")
        return which, (ends - share)[which]


class Preconditioning(NamedTuple):
    """x̂ = skip · z + out · F(scale · z) (Karras et al. 2022, eq. 7, of z in place of z / α).

    The network F is given and asked for what has unit variance, and its error counts least.
    """

    skip: jax.Array
    out: jax.Array
    scale: jax.Array


def precondition(gamma: jax.Array, sigma_data: float | jax.Array) -> Preconditioning:
    """The factors, each of the shape of `gamma`, of data with this standard deviation."""
    alpha, sigma = alpha_sigma(gamma)
    scale = jax.lax.rsqrt(sigma**2 + (alpha * sigma_data) ** 2)
    return Preconditioning(alpha * (sigma_data * scale) ** 2, sigma * sigma_data * scale, scale)


def precondition_straight(t: jax.Array, sigma_data: float | jax.Array) -> Preconditioning:
    """The same of z_t = (1 - t) x + t ε and its velocity E[ε - x | z_t].

    Of Gaussian data with this deviation z_t has the variance (1 - t)² sigma_data² + t² and the
    velocity skip · z, and out is the deviation that ε - x then has left, as in Karras et al. 2022,
    appendix B.6. Each factor is of the shape of the times.
    """
    s = jnp.sqrt((1 - t) ** 2 * sigma_data**2 + t**2)
    return Preconditioning((t * (1 + sigma_data**2) - sigma_data**2) / s**2, sigma_data / s, 1 / s)


def noisy(x: jax.Array, gamma: jax.Array, noise: jax.Array) -> jax.Array:
    """z = α x + σ ε, for `gamma` `[B]`."""
    alpha, sigma = alpha_sigma(beside(gamma, x))
    return alpha * x + sigma * noise
