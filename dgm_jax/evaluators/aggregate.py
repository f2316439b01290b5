"""The aggregate posterior q(z) = 1/N Σ_n q(z | x_n): how much of the rate tells examples apart.

The mean rate is the sum of two terms (Hoffman & Johnson 2016, "ELBO surgery", eq. 2),

    1/N Σ_n KL(q(z | x_n) ‖ p(z)) = I(n; z) + KL(q(z) ‖ p(z)).

I(n; z), the mutual information between the number of an example and its code, is at most log N;
KL(q(z) ‖ p(z)), the marginal KL, is what a better prior could save.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dgm_jax import processes, sharding
from dgm_jax.core import Batch, Model, Params
from dgm_jax.data import dataset as data
from dgm_jax.evaluators import passes
from dgm_jax.evaluators.passes import by_example
from dgm_jax.metrics import Metric
from dgm_jax.progress import Progress


def compile_evaluation(
    model: Model,
    dataset: data.Dataset,
    batch_size: int,
    chunk: int,
    mesh: Mesh,
    split: str,
    show: bool = True,
) -> Callable[[Params, int], dict[str, Metric]]:
    """Mutual information and marginal KL of a whole split, by one draw of z for each example.

    log q(z) takes the density of each z under the posterior of every example: N² densities.

    Args:
      model: one whose `latents` have a `log_posterior`.
      dataset: where the split is.
      batch_size: examples at once; changes speed and memory, not results.
      chunk: codes that a device compares with a batch of examples at once; the same.
      mesh: the devices.
      split: its name.
      show: whether progress is shown.

    Returns:
      `(params, seed) ->` `mutual_information` and `marginal_kl`, nats; compiled once.
    """
    latents = model.latents

    def own(params: Params, batch: Batch, key: jax.Array) -> dict[str, Any]:
        z = latents.draw_posterior(params, batch, key)
        drawn = jax.tree.map(lambda a: a[None], z)
        log_posterior = latents.log_posterior(params, batch, drawn)[0]
        log_prior = latents.log_joint(params, batch, drawn)[1][0]
        return {"z": z, "log_posterior": log_posterior, "log_prior": log_prior}

    def log_sum(params: Params, batch: Batch, z: Any) -> jax.Array:
        """log Σ_n q(z | x_n) over the rows of a batch, for z `[M, ...]` -> `[M]`."""
        num = len(batch["x"])
        pairs = jax.tree.map(lambda a: jnp.broadcast_to(a[:, None], (len(a), num, *a.shape[1:])), z)
        log_q = latents.log_posterior(params, batch, pairs)
        return jax.nn.logsumexp(jnp.where(batch["mask"][None], log_q, -jnp.inf), axis=1)

    def one_draw(params: Params, batch: Batch, keys: jax.Array) -> dict[str, Any]:
        return by_example(own, params, batch, keys, 0)

    chosen, arrays = dataset.splits[split], passes.place(dataset, split, mesh)
    draw = passes.compile_pass(one_draw, dataset, split, batch_size, mesh, arrays)

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def log_sum_of_batch(params: Params, arrays: Any, z: Any, start: jax.Array) -> jax.Array:
        """For all codes, in chunks `[K, M, ...]`: XLA encodes the batch once, before the loop.

        Each device has its part of every chunk and all of the batch, so that no sum is divided.
        """
        z = jax.lax.with_sharding_constraint(z, sharding.split_second(mesh))
        batch = data.held_out_batch(dataset, split, *arrays, start + jnp.arange(batch_size))
        return jax.lax.map(lambda some: log_sum(params, batch, some), z).reshape(-1)

    def evaluate(params: Params, seed: int) -> dict[str, Metric]:
        drawn, parts = draw(params, seed), []
        z = jax.tree.map(lambda a: _in_chunks(a, chunk * mesh.size), drawn["z"])
        z = processes.on_every_device(z, mesh)
        title = f"{split}: aggregate posterior" if show else None
        with Progress(title, len(chosen)) as progress:
            for start in range(0, len(chosen), batch_size):
                parts.append(np.asarray(log_sum_of_batch(params, arrays, z, start)))
                progress.advance(min(batch_size, len(chosen) - start))
        log_q = np.logaddexp.reduce(parts)[: len(chosen)] - math.log(len(chosen))
        return passes.summarise(
            {
                "mutual_information": drawn["log_posterior"] - log_q,
                "marginal_kl": log_q - drawn["log_prior"],
            },
            num_samples=1,
        )

    return evaluate


def _in_chunks(z: np.ndarray, size: int) -> np.ndarray:
    """`[N, ...]` as `[K, size, ...]`, filled up at the end."""
    filling = np.broadcast_to(z[:1], (-len(z) % size, *z.shape[1:]))
    return np.concatenate([z, filling]).reshape(-1, size, *z.shape[1:])
