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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from dgm_jax.core import Batch, Model, Params, UserError
from dgm_jax.evaluators import passes
from dgm_jax.metrics import Metric
from dgm_jax.progress import Progress
from dgm_jax.rng import stream

LogDensity = Callable[[jax.Array], jax.Array]  # z [C, L] -> [C], nats

_LEAPFROG_STEPS = 10
_TARGET_ACCEPTANCE = 0.65
_ROWS = 10  # examples annealed at once


class Target(NamedTuple):
    """What is annealed: C chains side by side, each with its own x.

    Attributes:
      log_prior: `z [C, L] -> log p(z) [C]`.
      log_likelihood: `z [C, L] -> log p(x | z) [C]`, each chain its own x.
    """

    log_prior: LogDensity
    log_likelihood: LogDensity


def evaluate(
    model: Model,
    params: Params,
    batch: Batch,
    num_temperatures: int,
    num_chains: int,
    seed: int,
) -> dict[str, Metric]:
    """log p(x) of some examples, and a bracket around that of as many drawn from the model.

    Args:
      model: one with `latents`.
      params: its parameters.
      batch: the examples, N of them.
      num_temperatures: T.
      num_chains: C for each example; their weights are averaged.
      seed: of all draws.

    Returns:
      `ais_bound`, a lower bound in expectation, of the examples; and of the model's own draws
      `simulated_lower_bound`, `simulated_upper_bound` and their difference `simulated_gap`, which
      says how far the first can be trusted. In nats.

    Raises:
      UserError: the model has no continuous latents.
    """
    num = len(batch["x"])
    z, simulated = model.require("latents").draw_joint(params, stream(seed, "ais/simulate"), num)
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(z)):
        raise UserError("annealed importance sampling needs continuous latents")
    _, unravel = ravel_pytree(jax.tree.map(lambda a: a[0], z))
    flat = jax.vmap(lambda one: ravel_pytree(one)[0])(z)
    betas = temperatures(num_temperatures)

    def target(params: Params, batch: Batch) -> Target:
        def log_joint(z: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = model.latents.log_joint(params, batch, jax.vmap(jax.vmap(unravel))(z[None]))
            return jax.tree.map(lambda a: a[0], found)

        return Target(lambda z: log_joint(z)[1], lambda z: log_joint(z)[0])

    def prior(params: Params, key: jax.Array, num: int) -> jax.Array:
        return jax.vmap(lambda one: ravel_pytree(one)[0])(
            model.latents.draw_joint(params, key, num)[0]
        )

    def repeated(values: Any) -> Any:
        return jax.tree.map(lambda a: jnp.repeat(a, num_chains, axis=0), values)

    @jax.jit
    def tuned(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        prior_rng, rng = jax.random.split(rng)
        chains = repeated(batch)
        z = prior(params, prior_rng, len(chains["x"]))
        return tune(target(params, chains), z, betas, rng)

    @jax.jit
    def lower(params: Params, batch: Batch, step_sizes: jax.Array, rng: jax.Array) -> jax.Array:
        prior_rng, rng = jax.random.split(rng)
        chains = repeated(batch)
        z = prior(params, prior_rng, len(chains["x"]))
        log_w = forward(target(params, chains), z, betas, step_sizes, rng)
        return _log_mean_exp(log_w.reshape(-1, num_chains))

    @jax.jit
    def upper(
        params: Params, batch: Batch, z: jax.Array, step_sizes: jax.Array, rng: jax.Array
    ) -> jax.Array:
        chains = repeated(batch)
        log_w = backward(target(params, chains), repeated(z), betas, step_sizes, rng)
        # 1 / w is an unbiased estimate of 1 / p(x): its average too is an upper bound.
        return -_log_mean_exp(-log_w.reshape(-1, num_chains))

    simulated = {name: simulated[name] for name in ("x", "label") if name in simulated}
    blocks = [np.arange(start, start + _ROWS) % num for start in range(0, num, _ROWS)]
    found: dict[str, list[np.ndarray]] = {}
    with Progress("annealed importance sampling", num) as progress:
        for i, rows in enumerate(blocks):
            real, own = (jax.tree.map(lambda a: a[rows], each) for each in (batch, simulated))  # noqa: B023
            keys = jax.random.split(stream(seed, "ais", i), 4)
            if i == 0:
                step_sizes = tuned(params, real, keys[0])
            parts = {
                "ais_bound": lower(params, real, step_sizes, keys[1]),
                "simulated_lower_bound": lower(params, own, step_sizes, keys[2]),
                "simulated_upper_bound": upper(params, own, flat[rows], step_sizes, keys[3]),
            }
            for name, values in parts.items():
                found.setdefault(name, []).append(np.asarray(values))
            progress.advance(min(_ROWS, num - i * _ROWS))
    whole = {name: np.concatenate(values)[:num] for name, values in found.items()}
    whole["simulated_gap"] = whole["simulated_upper_bound"] - whole["simulated_lower_bound"]
    return passes.summarise(whole, num_chains)


def _log_mean_exp(log_w: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(log_w, axis=1) - jnp.log(log_w.shape[1])


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
        moved, _ = _hmc(target, z, beta, step_size, key)
        total += (beta - before) * target.log_likelihood(moved if reverse else z)
        return (moved, total), None

    keys = jax.random.split(rng, len(step_sizes))
    inputs = (betas[:-1], betas[1:], step_sizes, keys)
    start = (z, jnp.zeros(len(z), z.dtype))
    (_, total), _ = jax.lax.scan(transition, start, inputs, reverse=reverse)
    return total


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
