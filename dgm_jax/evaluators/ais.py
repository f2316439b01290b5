"""Annealed importance sampling: log p(x) of latent-variable models, with a bracket.

Chains go from the prior to the posterior through p_t(z) ∝ p(z) p(x | z)^β_t, 0 = β_0 < ... < β_T =
1, with one Hamiltonian Monte Carlo transition at each. Their weight w is an unbiased estimate of
p(x), so E[log w] is a lower bound on log p(x). Run backwards from an exact posterior sample, which
one has for data drawn from the model itself, E[-log w] is an upper bound (bidirectional Monte
Carlo), and the gap between the two says how far to trust either.

References: Neal 2001; Grosse et al. 2015, "Sandwiching the marginal likelihood using bidirectional
Monte Carlo"; Wu et al. 2017, "On the quantitative analysis of decoder-based generative models".
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from dgm_jax import mcmc
from dgm_jax.core import Batch, Model, Params
from dgm_jax.distributions import log_mean_exp
from dgm_jax.evaluators import passes
from dgm_jax.metrics import Metric
from dgm_jax.progress import Progress
from dgm_jax.rng import stream

_ROWS = 10  # examples annealed at once


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
      says how far the first can be trusted; not of draws that are not exact, for which the upper
      bound would be none. In nats.

    Raises:
      UserError: the model has no latents.
    """
    num = len(batch["x"])
    z, simulated = model.require("latents").draw_joint(params, stream(seed, "ais/simulate"), num)
    _, unravel = ravel_pytree(jax.tree.map(lambda a: a[0], z))
    flat = jax.vmap(lambda one: ravel_pytree(one)[0])(z)
    betas = mcmc.temperatures(num_temperatures)

    def target(params: Params, batch: Batch) -> mcmc.Target:
        def log_joint(z: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = model.latents.log_joint(params, batch, jax.vmap(jax.vmap(unravel))(z[None]))
            return jax.tree.map(lambda a: a[0], found)

        return mcmc.Target(lambda z: log_joint(z)[1], lambda z: log_joint(z)[0])

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
        return mcmc.tune(target(params, chains), z, betas, rng)

    @jax.jit
    def lower(params: Params, batch: Batch, step_sizes: jax.Array, rng: jax.Array) -> jax.Array:
        prior_rng, rng = jax.random.split(rng)
        chains = repeated(batch)
        z = prior(params, prior_rng, len(chains["x"]))
        log_w = mcmc.forward(target(params, chains), z, betas, step_sizes, rng)
        return log_mean_exp(log_w.reshape(-1, num_chains), axis=1)

    @jax.jit
    def upper(
        params: Params, batch: Batch, z: jax.Array, step_sizes: jax.Array, rng: jax.Array
    ) -> jax.Array:
        chains = repeated(batch)
        log_w = mcmc.backward(target(params, chains), repeated(z), betas, step_sizes, rng)
        # 1 / w is an unbiased estimate of 1 / p(x): its average too is an upper bound.
        return -log_mean_exp(-log_w.reshape(-1, num_chains), axis=1)

    simulated = {name: simulated[name] for name in ("x", "label") if name in simulated}
    blocks = [np.arange(start, start + _ROWS) % num for start in range(0, num, _ROWS)]
    found: dict[str, list[np.ndarray]] = {}
    with Progress("annealed importance sampling", num) as progress:
        for i, rows in enumerate(blocks):
            real, own = (jax.tree.map(lambda a: a[rows], each) for each in (batch, simulated))  # noqa: B023
            keys = jax.random.split(stream(seed, "ais", i), 4)
            if i == 0:
                step_sizes = tuned(params, real, keys[0])
            parts = {"ais_bound": lower(params, real, step_sizes, keys[1])}
            if model.latents.samples_are_exact:
                parts |= {
                    "simulated_lower_bound": lower(params, own, step_sizes, keys[2]),
                    "simulated_upper_bound": upper(params, own, flat[rows], step_sizes, keys[3]),
                }
            for name, values in parts.items():
                found.setdefault(name, []).append(np.asarray(values))
            progress.advance(min(_ROWS, num - i * _ROWS))
    whole = {name: np.concatenate(values)[:num] for name, values in found.items()}
    if model.latents.samples_are_exact:
        whole["simulated_gap"] = whole["simulated_upper_bound"] - whole["simulated_lower_bound"]
    return passes.summarise(whole, num_chains)
