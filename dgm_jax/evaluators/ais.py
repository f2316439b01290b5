"""Annealed importance sampling: log p(x) of latent-variable models, with a bracket.

Chains go from the prior to the posterior through p_t(z) ∝ p(z) p(x | z)^β_t, 0 = β_0 < ... < β_T =
1, with one Hamiltonian Monte Carlo transition at each. Their weight w is an unbiased estimate of
p(x), so E[log w] is a lower bound on log p(x). Run backwards from an exact posterior sample, which
one has for data drawn from the model itself, E[-log w] is an upper bound (bidirectional Monte
Carlo), and the gap between the two says how far to trust either.

References: Neal 2001; Grosse et al. 2015, "Sandwiching the marginal likelihood using bidirectional
Monte Carlo"; Wu et al. 2017, "On the quantitative analysis of decoder-based generative models".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

LogDensity = Callable[[jax.Array], jax.Array]  # z [C, L] -> [C], nats

_LEAPFROG_STEPS = 10
_TARGET_ACCEPTANCE = 0.65


class Target(NamedTuple):
    """What is annealed: C chains side by side, each with its own x.

    Attributes:
      log_prior: `z [C, L] -> log p(z) [C]`.
      log_likelihood: `z [C, L] -> log p(x | z) [C]`, each chain its own x.
    """

    log_prior: LogDensity
    log_likelihood: LogDensity


def temperatures(num: int) -> jax.Array:
    """β `[num + 1]` from 0 to 1, a sigmoid: dense at both ends, where p_t changes most.

    Reference: Grosse et al. 2015, section 5.
    """
    position = jax.nn.sigmoid(jnp.linspace(-4.0, 4.0, num + 1))
    return (position - position[0]) / (position[-1] - position[0])


def tune(target: Target, z: jax.Array, betas: jax.Array, rng: jax.Array) -> jax.Array:
    """Step sizes `[T]` for the transitions at β_1, ..., β_T, from a pilot run.

    Kept apart from the measuring runs: a step size that depended on a chain's own past would make
    its weight biased. The pilot raises its step size when more than 65 % of its chains accept, and
    lowers it when fewer do.

    Args:
      target: what is annealed.
      z: float `[C, L]`, draws from the prior.
      betas: float `[T + 1]`.
      rng: a key.
    """

    def transition(carry: tuple, inputs: tuple) -> tuple[tuple, jax.Array]:
        z, step_size = carry
        beta, key = inputs
        z, accepted = _hmc(target, z, beta, step_size, key)
        rate = jnp.mean(accepted)
        step_size *= jnp.where(rate > _TARGET_ACCEPTANCE, 1.05, 1 / 1.05)
        return (z, step_size), step_size

    keys = jax.random.split(rng, len(betas) - 1)
    _, step_sizes = jax.lax.scan(transition, (z, jnp.asarray(0.1, z.dtype)), (betas[1:], keys))
    return step_sizes


def forward(
    target: Target, z: jax.Array, betas: jax.Array, step_sizes: jax.Array, rng: jax.Array
) -> jax.Array:
    """log w `[C]`, nats; E[w] = p(x), so E[log w] ≤ log p(x) (Neal 2001, eq. 11).

    Args:
      target: what is annealed.
      z: float `[C, L]`, exact draws from the prior.
      betas: float `[T + 1]`, rising from 0 to 1.
      step_sizes: float `[T]`, from `tune`.
      rng: a key.
    """

    def transition(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
        z, log_w = carry
        before, beta, step_size, key = inputs
        log_w += (beta - before) * target.log_likelihood(z)
        z, _ = _hmc(target, z, beta, step_size, key)
        return (z, log_w), None

    keys = jax.random.split(rng, len(step_sizes))
    inputs = (betas[:-1], betas[1:], step_sizes, keys)
    (_, log_w), _ = jax.lax.scan(transition, (z, jnp.zeros(len(z), z.dtype)), inputs)
    return log_w


def backward(
    target: Target, z: jax.Array, betas: jax.Array, step_sizes: jax.Array, rng: jax.Array
) -> jax.Array:
    """-log w `[C]` of the reversed chain, nats; its mean is an upper bound on log p(x).

    Arguments as for `forward`, but z are exact draws from the posterior p(z | x).

    Reference: Grosse et al. 2015, eq. 9.
    """

    def transition(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
        z, log_w = carry
        before, beta, step_size, key = inputs
        z, _ = _hmc(target, z, beta, step_size, key)
        log_w += (beta - before) * target.log_likelihood(z)
        return (z, log_w), None

    keys = jax.random.split(rng, len(step_sizes))
    inputs = (betas[:-1], betas[1:], step_sizes, keys)
    start = (z, jnp.zeros(len(z), z.dtype))
    (_, log_w), _ = jax.lax.scan(transition, start, inputs, reverse=True)
    return log_w


def _hmc(
    target: Target, z: jax.Array, beta: jax.Array, step_size: jax.Array, rng: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One Hamiltonian Monte Carlo transition that leaves p_t alone; `[C]` says who accepted."""

    def log_density(z: jax.Array) -> jax.Array:
        return target.log_prior(z) + beta * target.log_likelihood(z)

    gradient = jax.grad(lambda z: jnp.sum(log_density(z)))
    momentum_rng, accept_rng = jax.random.split(rng)
    momentum = jax.random.normal(momentum_rng, z.shape, z.dtype)

    def leapfrog(_: int, state: tuple) -> tuple:
        position, velocity, slope = state
        velocity = velocity + 0.5 * step_size * slope
        position = position + step_size * velocity
        slope = gradient(position)
        return position, velocity + 0.5 * step_size * slope, slope

    proposal, velocity, _ = jax.lax.fori_loop(
        0, _LEAPFROG_STEPS, leapfrog, (z, momentum, gradient(z))
    )
    energy = jnp.sum(momentum**2, axis=-1) / 2 - log_density(z)
    proposed = jnp.sum(velocity**2, axis=-1) / 2 - log_density(proposal)
    # A proposal that left the finite numbers has energy NaN or infinity: the comparison refuses it.
    uniform = jax.random.uniform(accept_rng, energy.shape, energy.dtype)
    accepted = jnp.log(uniform) < energy - proposed
    return jnp.where(accepted[:, None], proposal, z), accepted
