"""How likely a model finds held-out data: one evaluator for every model.

Noise is keyed by (seed, split, example id, draw), and sums are taken once over all examples, so
the result depends neither on the batch size nor on the number of devices.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dgm_jax import metrics, sharding
from dgm_jax.core import Batch, Model, Params, UserError
from dgm_jax.data import dataset as data
from dgm_jax.progress import Progress
from dgm_jax.rng import per_example, stream

# (params, batch, keys [B]) -> {name: float32 [B, ...]}
PerExample = Callable[[Params, Batch, jax.Array], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Config:
    """The `eval` section.

    Attributes:
      num_samples: K of the importance-weighted bound, per example.
      elbo_samples: draws that the ELBO and its terms are averaged over, per example.
      batch_size: examples evaluated at once; changes speed and memory, not results.
      chunk: draws per example evaluated at once; changes speed and memory, not results. About a
        thousand decoder outputs (batch_size * chunk) at once is fastest on a CPU.
    """

    num_samples: int = 5000
    elbo_samples: int = 10
    batch_size: int = 40
    chunk: int = 25


def check(config: Config, mesh: Mesh) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field and its value.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value < 1:
            raise UserError(f"eval.{field.name}={value}: must be at least 1")
    sharding.check_batch("eval.batch_size", config.batch_size, mesh)


def elbo_terms(model: Model, num_samples: int) -> PerExample:
    """Per-example costs of every player and every log-likelihood, averaged over draws.

    Args:
      model: any model.
      num_samples: draws per example.

    Returns:
      `(params, batch, keys [B]) -> {name: float32 [B]}`, nats; terms are costs (lower is better),
      log-likelihoods are higher-is-better.
    """

    def one_draw(params: Params, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = {}
        for player in model.players:
            _, aux = player.loss_fn(params, batch, key)
            found |= aux.terms
        for name, fn in model.log_likelihood_fns.items():
            found[name] = fn(params, batch, key)
        return found

    def per_example_means(params: Params, batch: Batch, keys: jax.Array) -> dict[str, jax.Array]:
        draws = jax.vmap(lambda s: _by_example(one_draw, params, batch, keys, s))
        return jax.tree.map(lambda a: jnp.mean(a, axis=0), draws(jnp.arange(num_samples)))

    return per_example_means


def importance_weighted(model: Model, num_samples: int, chunk: int) -> PerExample:
    """The importance-weighted bound log 1/K Σ_k p(x, z_k) / q(z_k | x), z_k ~ q(z | x).

    In expectation it rises with K from the ELBO (K = 1) to log p(x). Works through K in chunks
    with a running log-sum-exp: memory is that of one chunk.

    Args:
      model: one that has `log_weight`.
      num_samples: K.
      chunk: draws at once.

    Returns:
      `(params, batch, keys [B]) -> {"importance_weighted_bound": float32 [B]}`, nats.

    Reference: Burda et al. 2016, "Importance Weighted Autoencoders", eq. 8.
    """
    chunk = min(chunk, num_samples)
    num_chunks = -(-num_samples // chunk)

    def bound(params: Params, batch: Batch, keys: jax.Array) -> dict[str, jax.Array]:
        def add(total: jax.Array, draws: jax.Array) -> tuple[jax.Array, None]:
            one_draw = lambda s: _by_example(model.log_weight, params, batch, keys, s)  # noqa: E731
            log_w = jnp.where(draws[:, None] < num_samples, jax.vmap(one_draw)(draws), -jnp.inf)
            return jnp.logaddexp(total, jax.nn.logsumexp(log_w, axis=0)), None

        draws = jnp.arange(num_chunks * chunk).reshape(num_chunks, chunk)
        total, _ = jax.lax.scan(add, jnp.full(keys.shape, -jnp.inf), draws)
        return {"importance_weighted_bound": total - math.log(num_samples)}

    return bound


def posterior_means(model: Model) -> PerExample:
    """The model's features: `(params, batch, keys [B]) -> {"codes": float32 [B, F]}`."""

    def codes(params: Params, batch: Batch, keys: jax.Array) -> dict[str, jax.Array]:
        return {"codes": _by_example(model.encode, params, batch, keys, 0)}

    return codes


def compile_pass(
    fn: PerExample, dataset: data.Dataset, split: str, batch_size: int, mesh: Mesh
) -> Callable[..., dict[str, np.ndarray]]:
    """A pass of `fn` over a whole split, compiled once however often it is called.

    Args:
      fn: what to compute per example.
      dataset: where the split is.
      split: its name.
      batch_size: examples at once; the last batch is padded and its padding dropped.
      mesh: the devices.

    Returns:
      `(params, seed, title=None) -> {name: float32 [N, ...]}`, all examples in order; shows
      progress under `title`.
    """
    chosen = dataset.splits[split]
    arrays = jax.device_put((chosen.images, chosen.labels), sharding.replicated(mesh))

    @jax.jit
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
        return {
            name: np.concatenate([part[name] for part in parts])[: len(chosen)] for name in parts[0]
        }

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


def active_units(codes: np.ndarray, threshold: float = 0.01) -> metrics.Metric:
    """How many features vary with the data: Cov_x(E[z_u | x]) above `threshold`.

    Args:
      codes: float `[N, F]`, posterior means.
      threshold: on the variance.

    Reference: Burda et al. 2016, section 5.2.
    """
    active = int((np.asarray(codes, np.float64).var(axis=0) > threshold).sum())
    return metrics.Metric(float(active), f"of {codes.shape[1]} units", num_examples=len(codes))


def evaluate(
    model: Model,
    params: Params,
    dataset: data.Dataset,
    config: Config,
    mesh: Mesh,
    seed: int,
    split: str = "test",
) -> dict[str, metrics.Metric]:
    """Everything that can be said about a model's likelihood on a split.

    Args:
      model, params: what to evaluate.
      dataset: where the split is.
      config: the `eval` section.
      mesh: the devices.
      seed: of all draws.
      split: its name.

    Returns:
      Metrics by name: each term and each log-likelihood, the importance-weighted bound and its
      bits/dim, active units; those that the model has.
    """

    def run(fn: PerExample, title: str) -> dict[str, np.ndarray]:
        whole_split = compile_pass(fn, dataset, split, config.batch_size, mesh)
        return whole_split(params, seed, f"{split}: {title}")

    few, many = config.elbo_samples, config.num_samples
    found = summarise(run(elbo_terms(model, few), "terms"), few)
    if model.log_weight is not None:
        bound = importance_weighted(model, many, config.chunk)
        found |= summarise(run(bound, f"importance-weighted bound, K = {many:,}"), many)
    for name in ("log_prob", "importance_weighted_bound", *model.log_likelihood_fns):
        if name in found:  # the tightest that there is
            found["bits_per_dim"] = metrics.bits_per_dim(found[name], dataset.spec.num_dims)
            break
    if model.encode is not None:
        codes = run(posterior_means(model), "posterior means")["codes"]
        found["active_units"] = active_units(codes)
    return found


def _by_example(
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
