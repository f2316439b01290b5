"""Passes over a split: whatever is computed for each example, in order.

Noise is keyed by (seed, split, example id, draw), and sums are taken once over all examples, so
no result depends on the batch size or on the number of devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dgm_jax import metrics, processes, sharding
from dgm_jax.core import Batch, Params, UserError
from dgm_jax.data import dataset as data
from dgm_jax.progress import Progress
from dgm_jax.rng import per_example, stream

# (params, batch, keys [B]) -> a pytree of arrays [B, ...]
PerExample = Callable[[Params, Batch, jax.Array], dict[str, Any]]


def place(dataset: data.Dataset, split: str, mesh: Mesh) -> Any:
    """The arrays of a split, whole on every device: what several passes may share."""
    chosen = dataset.splits[split]
    return processes.on_every_device((chosen.x, chosen.labels), mesh)


def compile_pass(
    fn: PerExample,
    dataset: data.Dataset,
    split: str,
    batch_size: int,
    mesh: Mesh,
    arrays: Any = None,
) -> Callable[..., dict[str, np.ndarray]]:
    """A pass of `fn` over a whole split, compiled once however often it is called.

    Args:
      fn: what to compute per example.
      dataset: where the split is.
      split: its name.
      batch_size: examples at once, or as many more as the devices need to share them equally; the
        last batch is padded and its padding dropped.
      mesh: the devices.
      arrays: of the split, as from `place`, where they are there already.

    Returns:
      `(params, seed, title=None) -> {name: float32 [N, ...]}`, all examples in order; shows
      progress under `title`.
    """
    chosen = dataset.splits[split]
    arrays = place(dataset, split, mesh) if arrays is None else arrays
    batch_size = sharding.rounded_up(batch_size, mesh)

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def one_batch(params: Params, arrays: Any, seed: jax.Array, start: jax.Array) -> dict:
        ids = start + jnp.arange(batch_size)
        batch = data.held_out_batch(dataset, split, *arrays, ids)
        batch = jax.lax.with_sharding_constraint(batch, sharding.split_batch(mesh))
        return fn(params, batch, per_example(stream(seed, f"eval/{split}"), batch["id"]))

    def run(params: Params, seed: int, title: str | None = None) -> dict[str, np.ndarray]:
        parts = []
        with Progress(title, len(chosen)) as progress:
            for start in range(0, len(chosen), batch_size):
                parts.append(jax.device_get(one_batch(params, arrays, seed, start)))
                progress.advance(min(batch_size, len(chosen) - start))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(chosen)], *parts)

    return run


def summarise(per_example: dict[str, np.ndarray], num_samples: int) -> dict[str, metrics.Metric]:
    """Per-example terms and bounds, each float `[N]` in nats, as metrics.

    Raises:
      UserError: some example's value is not finite; says which and how many.
    """
    found = {}
    for name, values in per_example.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise UserError(
                f"{name} is not finite for {bad.size} of {len(values)} examples "
                f"(first: id {bad[0]}): the parameters are unusable, or the data is"
            )
        found[name] = metrics.mean_over_examples(values, "nats", num_samples)
    return found


def by_example(
    fn: Callable, params: Params, batch: Batch, keys: jax.Array, draw: jax.Array | int
) -> Any:
    """`fn(params, batch, key)` on each example alone, with its own key folded with `draw`.

    Under vmap this is one large computation again, and what an example draws depends on its key
    only.
    """

    def alone(example: Batch, key: jax.Array) -> Any:
        single = jax.tree.map(lambda a: a[None], example)
        return jax.tree.map(lambda a: a[0], fn(params, single, jax.random.fold_in(key, draw)))

    return jax.vmap(alone)(batch, keys)
