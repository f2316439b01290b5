"""Priors p(z) over latent vectors: densities with learned parameters, and how to draw from them.

Each is a module with

* `log_prob(z [..., L], posterior_of) -> [...]`, nats;
* `draw(rng, num, posterior_of) -> [num, L]`,

where `posterior_of(x [C, *event]) -> (mu, log_sigma)` is the encoder that a VampPrior looks
through and that the others leave alone.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax.core import UserError
from dgm_jax.distributions import gaussian_log_prob, standard_gaussian_log_prob
from dgm_jax.nn import bijections, transforms
from dgm_jax.nn.mlp import MLP, MaskedMLP
from dgm_jax.nn.precision import Dense

PosteriorOf = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


class Standard(nn.Module):
    """N(0, I)."""

    latents: int

    def log_prob(self, z: jax.Array, posterior_of: PosteriorOf) -> jax.Array:
        """log p(z)."""
        del posterior_of
        return jnp.sum(standard_gaussian_log_prob(z), axis=-1)

    def draw(self, rng: jax.Array, num: int, posterior_of: PosteriorOf) -> jax.Array:
        """`num` draws."""
        del posterior_of
        return jax.random.normal(rng, (num, self.latents))


class Mixture(nn.Module):
    """A mixture of C diagonal Gaussians with learned weights, means and scales."""

    latents: int
    components: int

    def setup(self) -> None:
        """Components start spread over the standard Gaussian."""
        shape = (self.components, self.latents)
        self.logits = self.param("logits", nn.initializers.zeros, shape[:1])
        self.mu = self.param("mu", nn.initializers.normal(1.0), shape)
        self.log_sigma = self.param("log_sigma", nn.initializers.zeros, shape)

    def log_prob(self, z: jax.Array, posterior_of: PosteriorOf) -> jax.Array:
        """log p(z)."""
        del posterior_of
        log_weights = nn.log_softmax(self.logits)
        return mixture_log_prob(z, log_weights, self.mu, self.log_sigma)

    def draw(self, rng: jax.Array, num: int, posterior_of: PosteriorOf) -> jax.Array:
        """`num` draws."""
        del posterior_of
        which_rng, rng = jax.random.split(rng)
        which = jax.random.categorical(which_rng, self.logits, shape=(num,))
        epsilon = jax.random.normal(rng, (num, self.latents))
        return self.mu[which] + jnp.exp(self.log_sigma[which]) * epsilon


class Vamp(nn.Module):
    """1/C Σ_c q(z | u_c) at learned pseudo-inputs u_c (Tomczak & Welling 2018, eq. 9).

    Attributes:
      latents: L.
      components: C.
      event_shape: of a pseudo-input.
      bias: logits that the pseudo-inputs start around, `[*event]`; they are kept in [0, 1].
    """

    latents: int
    components: int
    event_shape: tuple[int, ...]
    bias: np.ndarray

    def setup(self) -> None:
        """Pseudo-inputs start near the mean of the data."""
        self.raw = self.param(
            "pseudo_inputs",
            lambda key, shape: self.bias[None] + 0.5 * jax.random.normal(key, shape),
            (self.components, *self.event_shape),
        )

    def log_prob(self, z: jax.Array, posterior_of: PosteriorOf) -> jax.Array:
        """log p(z)."""
        log_weights = jnp.full(self.components, -math.log(self.components))
        return mixture_log_prob(z, log_weights, *posterior_of(nn.sigmoid(self.raw)))

    def draw(self, rng: jax.Array, num: int, posterior_of: PosteriorOf) -> jax.Array:
        """`num` draws."""
        which_rng, rng = jax.random.split(rng)
        which = jax.random.randint(which_rng, (num,), 0, self.components)
        mu, log_sigma = posterior_of(nn.sigmoid(self.raw[which]))
        return mu + jnp.exp(log_sigma) * jax.random.normal(rng, (num, self.latents))


class RealNVP(nn.Module):
    """Affine coupling layers, alternating which half is kept (Dinh et al. 2017, eqs. 4 to 8)."""

    latents: int
    steps: int = 4
    width: int = 128

    def setup(self) -> None:
        """One network a coupling, which starts as the identity."""
        self.bodies = [MLP((self.width, self.width)) for _ in range(self.steps)]
        self.heads = [
            Dense(2 * (self.latents - self._kept(i)), kernel_init=nn.initializers.zeros)
            for i in range(self.steps)
        ]

    def _kept(self, i: int) -> int:
        # In turn rounded down and up: with an odd L the middle latent is kept every other time.
        return (self.latents + i % 2) // 2

    def _couple(self, i: int, z: jax.Array, inverse: bool) -> transforms.Mapped:
        def parameters_of(kept: jax.Array) -> jax.Array:
            return jnp.stack(jnp.split(self.heads[i](self.bodies[i](kept)), 2, axis=-1), axis=-1)

        return bijections.couple(z, self._kept(i), transforms.affine(), parameters_of, inverse)

    def log_prob(self, z: jax.Array, posterior_of: PosteriorOf) -> jax.Array:
        """log p(z): noise is where the couplings send z, by the change of variables."""
        del posterior_of
        log_det = jnp.zeros(z.shape[:-1])
        for i in range(self.steps):
            z, own = self._couple(i, z, inverse=False)
            z, log_det = z[..., ::-1], log_det + own
        return jnp.sum(standard_gaussian_log_prob(z), axis=-1) + log_det

    def draw(self, rng: jax.Array, num: int, posterior_of: PosteriorOf) -> jax.Array:
        """`num` draws: the inverse couplings, applied to noise."""
        del posterior_of
        z = jax.random.normal(rng, (num, self.latents))
        for i in reversed(range(self.steps)):
            z, _ = self._couple(i, z[..., ::-1], inverse=True)
        return z


class Autoregressive(nn.Module):
    """A masked autoregressive flow (Papamakarios et al. 2017, eqs. 3 and 4).

    Densities take one pass a step; a draw takes L.
    """

    latents: int
    steps: int = 2
    width: int = 128

    def setup(self) -> None:
        """One masked network a step."""
        self._transform = transforms.inverted(transforms.affine())  # z is noise scaled and shifted
        self.nets = [
            MaskedMLP(self.latents, (self.width, self.width), 2) for _ in range(self.steps)
        ]

    def log_prob(self, z: jax.Array, posterior_of: PosteriorOf) -> jax.Array:
        """log p(z)."""
        del posterior_of
        log_det = jnp.zeros(z.shape[:-1])
        for net in self.nets:
            z, own = bijections.autoregress(z, self._transform, net)
            z, log_det = z[..., ::-1], log_det + own
        return jnp.sum(standard_gaussian_log_prob(z), axis=-1) + log_det

    def draw(self, rng: jax.Array, num: int, posterior_of: PosteriorOf) -> jax.Array:
        """`num` draws, one variable after the other."""
        del posterior_of
        z = jax.random.normal(rng, (num, self.latents))
        for net in reversed(self.nets):
            z, _ = bijections.autoregress(z[..., ::-1], self._transform, net, inverse=True)
        return z


def mixture_log_prob(
    z: jax.Array, log_weights: jax.Array, mu: jax.Array, log_sigma: jax.Array
) -> jax.Array:
    """log Σ_c w_c N(z; mu_c, diag sigma_c²).

    Args:
      z: float `[..., L]`.
      log_weights: float `[C]`, normalised.
      mu, log_sigma: float `[C, L]`.

    Returns:
      Nats, `[...]`.
    """
    # Not expanded into matrix products: in 32 bits the squares cancel where a sigma is small. One
    # latent after the other: an array [N, C, L] is memory that a CPU waits for.
    flat = z.reshape(-1, z.shape[-1])

    def add(total: jax.Array, latent: tuple) -> tuple[jax.Array, None]:
        z, mu, log_sigma = latent
        return total + gaussian_log_prob(z[:, None], mu[None], log_sigma[None]), None

    start = jnp.broadcast_to(log_weights[None], (len(flat), len(mu)))
    log_probs, _ = jax.lax.scan(add, start, (flat.T, mu.T, log_sigma.T))
    return jax.nn.logsumexp(log_probs, axis=-1).reshape(z.shape[:-1])


class Sizes(NamedTuple):
    """Of a prior; each uses those that it has.

    Attributes:
      latents: L.
      components: of a mixture; pseudo-inputs of a VampPrior.
      flow_steps, flow_width: of a flow.
      mean: of the data, scaled to [0, 1], `[*event]`: where pseudo-inputs start.
    """

    latents: int
    components: int
    flow_steps: int
    flow_width: int
    mean: np.ndarray


def _vamp(sizes: Sizes) -> Vamp:
    bias = np.log(sizes.mean + 0.01) - np.log(1.01 - sizes.mean)
    return Vamp(sizes.latents, sizes.components, sizes.mean.shape, bias)


PRIORS: dict[str, Callable[[Sizes], nn.Module]] = {
    "standard": lambda of: Standard(of.latents),
    "mixture": lambda of: Mixture(of.latents, of.components),
    "vamp": _vamp,
    "realnvp": lambda of: RealNVP(of.latents, of.flow_steps, of.flow_width),
    "autoregressive": lambda of: Autoregressive(of.latents, of.flow_steps, of.flow_width),
}


def check(name: str, sizes: Sizes, support: str) -> None:
    """Refuse a prior that is none, that has no parts, or that does not go with the data.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    if name not in PRIORS:
        raise UserError(f"model.prior={name!r}: choose one of {', '.join(PRIORS)}")
    for field in ("components", "flow_steps", "flow_width"):
        if (value := getattr(sizes, field)) < 1:
            raise UserError(f"model.{field}={value}: must be at least 1")
    if name in ("realnvp", "autoregressive") and sizes.latents < 2:
        raise UserError(f"model.prior={name!r} needs model.latents of at least 2")
    if name == "vamp" and support == "real":
        raise UserError(
            "model.prior='vamp' needs images: its pseudo-inputs lie between black and white"
        )
