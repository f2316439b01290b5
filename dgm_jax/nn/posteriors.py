"""Posteriors q(z | x): from an encoder's features to draws and their log-densities.

Each is a module with

* `__call__(h [B, F]) -> context`, the parameters of q for each example, a pytree of `[B, ...]`;
* `draw(context, rng, k) -> (z [K, B, L], log q [K, B])`, reparameterised;
* `log_prob(context, z [K, B, L]) -> [K, B]`, nats, where `evaluable`;
* `mean(context) -> [B, L]`, its mean or the nearest to it, as features.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax.distributions import gaussian_log_prob, standard_gaussian_log_prob
from dgm_jax.nn.mlp import MLP, MaskedMLP
from dgm_jax.nn.precision import Dense

Context = tuple[jax.Array, ...]


_FLOOR = 1e-4  # of sigma
# The output at which `positive` is exactly 0, sigma 1.
UNIT_RAW = math.log(math.expm1(1 - _FLOOR))


def positive(raw: jax.Array) -> jax.Array:
    """log sigma from a network's output.

    sigma = softplus grows linearly in its input where exp would explode and end training in a
    spike; the floor keeps log sigma finite however far the input falls.
    """
    return jnp.log(nn.softplus(raw) + _FLOOR)


def draw_gaussian(rng: jax.Array, parameters: tuple[jax.Array, jax.Array], k: int) -> jax.Array:
    """K draws `[K, B, L]` from N(mu, diag sigma²), mu and log_sigma each `[1 or K, B, L]`."""
    mu, log_sigma = parameters
    return mu + jnp.exp(log_sigma) * jax.random.normal(rng, (k, *mu.shape[1:]))


class Diagonal(nn.Module):
    """N(mu, diag sigma²) (Kingma & Welling 2014, eq. 9)."""

    latents: int
    evaluable = True

    @nn.compact
    def __call__(self, h: jax.Array) -> Context:
        """`[B, F]` -> (mu, log_sigma), each `[B, L]`."""
        mu, raw = jnp.split(Dense(2 * self.latents)(h), 2, axis=-1)
        return mu, positive(raw)

    def draw(self, context: Context, rng: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """K draws and their log-densities."""
        z = draw_gaussian(rng, jax.tree.map(lambda a: a[None], context), k)
        return z, self.log_prob(context, z)

    def log_prob(self, context: Context, z: jax.Array) -> jax.Array:
        """log q(z | x)."""
        mu, log_sigma = context
        return jnp.sum(gaussian_log_prob(z, mu[None], log_sigma[None]), axis=-1)

    def mean(self, context: Context) -> jax.Array:
        """E[z | x]."""
        return context[0]


class Conditional(nn.Module):
    """N(mu(h), diag sigma(h)²) with hidden layers: `[..., F]` -> (mu, log_sigma) `[..., L]`.

    Attributes:
      latents: L.
      hidden: widths of the hidden layers.
      activation: see `nn.mlp.MLP`.
    """

    latents: int
    hidden: tuple[int, ...]
    activation: str

    @nn.compact
    def __call__(self, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Parameters given `h`."""
        return Diagonal(self.latents)(MLP(self.hidden, self.activation)(h))


class FullCovariance(nn.Module):
    """N(mu, C Cᵀ) with C lower triangular, its diagonal positive (Kingma & Welling 2019, 2.5.1)."""

    latents: int
    evaluable = True

    @nn.compact
    def __call__(self, h: jax.Array) -> Context:
        """`[B, F]` -> (mu `[B, L]`, log diag C `[B, L]`, C `[B, L, L]`)."""
        num = self.latents
        mu, raw = jnp.split(Dense(2 * num)(h), 2, axis=-1)
        # Off the diagonal C starts at zero: training sets out from the diagonal posterior.
        below = Dense(num * (num - 1) // 2, kernel_init=nn.initializers.zeros)(h)
        log_diagonal = positive(raw)
        rows, columns = jnp.tril_indices(num, -1)
        cholesky = jnp.zeros((len(h), num, num)).at[:, rows, columns].set(below)
        return mu, log_diagonal, cholesky + jax.vmap(jnp.diag)(jnp.exp(log_diagonal))

    def draw(self, context: Context, rng: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """K draws and their log-densities."""
        mu, _, cholesky = context
        epsilon = jax.random.normal(rng, (k, *mu.shape))
        z = mu[None] + jnp.einsum("bij,kbj->kbi", cholesky, epsilon)
        return z, self.log_prob(context, z)

    def log_prob(self, context: Context, z: jax.Array) -> jax.Array:
        """log q(z | x)."""
        mu, log_diagonal, cholesky = context
        # [B, L, K]: one triangular solve per example for all its draws.
        epsilon = jax.scipy.linalg.solve_triangular(
            cholesky, jnp.moveaxis(z - mu[None], 0, -1), lower=True
        )
        log_density = jnp.sum(standard_gaussian_log_prob(epsilon), axis=-2)  # [B, K]
        return log_density.T - jnp.sum(log_diagonal, axis=-1)[None]

    def mean(self, context: Context) -> jax.Array:
        """E[z | x]."""
        return context[0]


class InverseAutoregressive(nn.Module):
    """A diagonal Gaussian sent through inverse autoregressive flows (Kingma et al. 2016, eq. 10).

    Each step is z ← σ ⊙ z + (1 - σ) ⊙ m with (m, s) autoregressive in z and σ = sigmoid(s). Its
    density at a z that it did not draw takes L sequential steps and is not offered.
    """

    latents: int
    steps: int = 2
    width: int = 128
    evaluable = False

    def setup(self) -> None:
        """The base and one masked network a step, each sees the encoder's features."""
        self.base = Diagonal(self.latents)
        self.nets = [
            MaskedMLP(self.latents, (self.width, self.width), 2) for _ in range(self.steps)
        ]

    def __call__(self, h: jax.Array) -> Context:
        """`[B, F]` -> (mu, log_sigma, h)."""
        return (*self.base(h), h)

    def draw(self, context: Context, rng: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """K draws and their log-densities."""
        mu, log_sigma, h = context
        z, log_prob = self.base.draw((mu, log_sigma), rng, k)
        z, log_det = self._flow(z, h[None])
        return z, log_prob - log_det

    def mean(self, context: Context) -> jax.Array:
        """The flow has no closed-form mean: where it sends the mean of its base."""
        return self._flow(context[0], context[2])[0]

    def _flow(self, z: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[..., L]` -> where the steps send it, and their log-determinant `[...]`."""
        log_det = jnp.zeros(z.shape[:-1])
        for net in self.nets:
            m, s = jnp.moveaxis(net(z, h), -1, 0)
            s += 1.5  # starts near the identity, as the paper advises (section 4)
            sigma = nn.sigmoid(s)
            # The next step conditions in the opposite order.
            z = (sigma * z + (1 - sigma) * m)[..., ::-1]
            log_det += jnp.sum(nn.log_sigmoid(s), axis=-1)
        return z, log_det


POSTERIORS = {
    "diagonal": Diagonal,
    "full_covariance": FullCovariance,
    "iaf": InverseAutoregressive,
}
