"""Markov chain Monte Carlo: Langevin dynamics, Hamiltonian dynamics, annealed importance sampling.

All chains of a call move side by side, in one compiled scan.

References: Roberts & Tweedie 1996, "Exponential convergence of Langevin distributions and their
discrete approximations"; Neal 2001, "Annealed importance sampling"; Neal 2011, "MCMC using
Hamiltonian dynamics"; Grosse et al. 2015, "Sandwiching the marginal likelihood using bidirectional
Monte Carlo".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dgm_jax.rows import beside, sum_event

LogDensity = Callable[[jax.Array], jax.Array]  # z [C, L] -> [C], nats
Energy = Callable[[jax.Array], jax.Array]  # x [C, *event] -> [C], nats; no row sees another

_LEAPFROG_STEPS = 10
_TARGET_ACCEPTANCE = 0.65


def langevin(
    energy: Energy,
    x: jax.Array,
    step_size: float | jax.Array,
    num_steps: int,
    rng: jax.Array,
    metropolis: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Langevin dynamics x' = x - ε ∇E(x) + √(2ε) ξ, ξ ~ N(0, I), towards p(x) ∝ exp(-E(x)).

    Each step is one evaluation of E and its slope. Uncorrected, the stationary distribution is off
    by O(ε): for E = k x² / 2 its variance is 1 / (k (1 - ε k / 2)). The Metropolis correction
    (MALA) makes it p whatever ε.

    Args:
      energy: E.
      x: float `[C, *event]`, where the chains start.
      step_size: ε, in units of x².
      num_steps: of each chain.
      rng: a key.
      metropolis: whether steps are accepted or refused.

    Returns:
      Where the chains end, `[C, *event]`, and the share of steps that each accepted, `[C]`.

    Reference: Roberts & Tweedie 1996, section 1.4.
    """

    def slope_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        energies, pull_back = jax.vjp(energy, x)
        return energies, pull_back(jnp.ones_like(energies))[0]

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        x, before, slope = carry
        noise_rng, accept_rng = jax.random.split(key)
        noise = jax.random.normal(noise_rng, x.shape, x.dtype)
        proposal = x - step_size * slope + jnp.sqrt(2 * step_size) * noise
        proposed = proposal, *slope_of(proposal)
        if not metropolis:
            return proposed, jnp.ones_like(before)
        # log q(x | x') - log q(x' | x): the noise that would lead back against that which led here.
        back = (x - proposal + step_size * proposed[2]) / jnp.sqrt(2 * step_size)
        log_q = sum_event(noise**2 - back**2) / 2
        accepted = _accept(accept_rng, before - proposed[1] + log_q)
        return _choose(accepted, proposed, carry), accepted.astype(before.dtype)

    (x, _, _), accepted = jax.lax.scan(step, (x, *slope_of(x)), jax.random.split(rng, num_steps))
    return x, jnp.mean(accepted, axis=0)


def jump(log_weight: LogDensity, x: jax.Array, proposal: jax.Array, rng: jax.Array) -> jax.Array:
    """One Metropolis step to draws that do not depend on where the chains are.

    Args:
      log_weight: log p - log q `[C]` up to a constant, q the density of the proposals.
      x: float `[C, *event]`.
      proposal: exact draws from q, of the same shape.
      rng: a key.

    Reference: Tierney 1994, "Markov chains for exploring posterior distributions" (independence).
    """
    accepted = _accept(rng, log_weight(proposal) - log_weight(x))
    return _choose(accepted, proposal, x)


def _accept(rng: jax.Array, log_ratio: jax.Array) -> jax.Array:
    """bool `[C]`; a proposal that left the finite numbers has the ratio NaN or -inf: refused."""
    return jnp.log(jax.random.uniform(rng, log_ratio.shape, log_ratio.dtype)) < log_ratio


def _choose(which: jax.Array, new: jax.Array | tuple, old: jax.Array | tuple) -> jax.Array | tuple:
    """`new` in the rows where `which` bool `[C]`, else `old`."""
    return jax.tree.map(lambda new, old: jnp.where(beside(which, new), new, old), new, old)


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
        z, accepted = hmc(target, z, beta, step_size, key)
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
    return _anneal(target, z, betas, step_sizes, rng, reverse=False)


def backward(
    target: Target, z: jax.Array, betas: jax.Array, step_sizes: jax.Array, rng: jax.Array
) -> jax.Array:
    """-log w `[C]` of the reversed chain, nats; its mean is an upper bound on log p(x).

    Arguments as for `forward`, but z are exact draws from the posterior p(z | x).

    Reference: Grosse et al. 2015, eq. 9.
    """
    return _anneal(target, z, betas, step_sizes, rng, reverse=True)


def _anneal(
    target: Target,
    z: jax.Array,
    betas: jax.Array,
    step_sizes: jax.Array,
    rng: jax.Array,
    reverse: bool,
) -> jax.Array:
    """Σ_t (β_t - β_{t-1}) log p(x | z_t) `[C]` along the chain.

    Forwards the sum takes z before the transition at β_t, backwards after it.
    """

    def transition(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
        z, total = carry
        before, beta, step_size, key = inputs
        moved, _ = hmc(target, z, beta, step_size, key)
        total += (beta - before) * target.log_likelihood(moved if reverse else z)
        return (moved, total), None

    keys = jax.random.split(rng, len(step_sizes))
    inputs = (betas[:-1], betas[1:], step_sizes, keys)
    start = (z, jnp.zeros(len(z), z.dtype))
    (_, total), _ = jax.lax.scan(transition, start, inputs, reverse=reverse)
    return total


def hmc(
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
    accepted = _accept(accept_rng, energy - proposed)
    return _choose(accepted, proposal, z), accepted
