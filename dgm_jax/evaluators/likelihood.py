"""How likely a model finds held-out data: one evaluator for every model.

Results depend neither on the batch size nor on the number of devices; see `passes`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dgm_jax import metrics
from dgm_jax.core import Batch, DataSpec, Model, Params, UserError, disjoint
from dgm_jax.data import dataset as data
from dgm_jax.distributions import log_mean_exp
from dgm_jax.evaluators import aggregate, passes
from dgm_jax.evaluators.passes import PerExample, by_example


@dataclasses.dataclass(frozen=True)
class Config:
    """The `eval` section.

    Attributes:
      split: what the likelihood is measured on: `test`, or `validation` where models are chosen by
        the number. Features, quality and annealed importance sampling are of the test split.
      num_samples: K of the importance-weighted bound, per example.
      elbo_samples: draws that the ELBO and its terms are averaged over, per example.
      batch_size: examples evaluated at once, rounded up to what the devices can share equally;
        changes speed and memory, not results.
      chunk: draws per example, or codes of the aggregate posterior, evaluated at once; changes
        speed and memory, not results. About a thousand decoder outputs (batch_size * chunk) at once
        is fastest on a CPU.
      aggregate_examples: N images, spread over the split, of which the aggregate posterior is
        measured, at the cost of N² densities; 0 leaves it out.
      ais_temperatures: of annealed importance sampling (`--mode=ais`).
      ais_chains: of the same, for each example.
    """

    split: str = "test"
    num_samples: int = 5000
    elbo_samples: int = 10
    batch_size: int = 40
    chunk: int = 25
    aggregate_examples: int = 2000
    ais_temperatures: int = 1000
    ais_chains: int = 16


SPLITS = ("test", "validation")


class Measured(NamedTuple):
    """What was measured on a split.

    Attributes:
      metrics: by name.
      per_example: the terms, log-likelihoods and importance-weighted bounds among them, nats, of
        each example: float32 `[N]`, in the split's order.
    """

    metrics: dict[str, metrics.Metric]
    per_example: dict[str, np.ndarray]


def check(config: Config) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field and its value.
    """
    if config.split not in SPLITS:
        raise UserError(f"eval.split={config.split!r}: choose one of {', '.join(SPLITS)}")
    for name, value in dataclasses.asdict(config).items():
        least = int(name != "aggregate_examples")
        if name != "split" and value < least:
            raise UserError(f"eval.{name}={value}: must be at least {least}")


def check_split(config: Config, dataset: data.Dataset) -> None:
    """Refuse to measure on a split that these data do not have.

    Raises:
      UserError: the split has no examples.
    """
    if not len(dataset.splits[config.split]):
        raise UserError(f"eval.split={config.split!r} needs data.{config.split} above 0")


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
        log_likelihoods = {
            name: fn(params, batch, key) for name, fn in model.log_likelihood_fns.items()
        }
        terms = (player.terms(params, batch, key) for player in model.players)
        return disjoint(*terms, log_likelihoods)

    def per_example_means(params: Params, batch: Batch, keys: jax.Array) -> dict[str, jax.Array]:
        draws = jax.vmap(lambda s: by_example(one_draw, params, batch, keys, s))
        return jax.tree.map(lambda a: jnp.mean(a, axis=0), draws(jnp.arange(num_samples)))

    return per_example_means


def importance_weighted(model: Model, num_samples: int, chunk: int) -> PerExample:
    """The importance-weighted bound log 1/k Σ_j p(x, z_j) / q(z_j | x), z_j ~ q(z | x), as k grows.

    In expectation it rises with k from the ELBO (k = 1) to log p(x). One set of K draws serves
    every k: it holds ⌊K / k⌋ independent repeats of the bound with k, and their mean is returned
    beside the variance of that mean. The decoder works through K in chunks; of each draw only its
    weight is kept.

    Args:
      model: one that has `log_weight`.
      num_samples: K.
      chunk: draws at once.

    Returns:
      `(params, batch, keys [B]) -> {"importance_weighted_bound": float32 [B], ...}`, nats; and for
      each smaller k of `curve` its bound and `"variance_<k>"`, nats².

    Reference: Burda et al. 2016, "Importance Weighted Autoencoders", eq. 8.
    """
    chunk = min(chunk, num_samples)
    num_chunks = -(-num_samples // chunk)

    def bounds(params: Params, batch: Batch, keys: jax.Array) -> dict[str, jax.Array]:
        one_draw = lambda s: by_example(model.log_weight, params, batch, keys, s)  # noqa: E731
        draws = jnp.arange(num_chunks * chunk).reshape(num_chunks, chunk)
        log_w = jax.lax.map(jax.vmap(one_draw), draws).reshape(-1, len(keys))[:num_samples]
        found = {}
        for k, name in curve(num_samples).items():
            repeats = num_samples // k
            each = log_mean_exp(log_w[: repeats * k].reshape(repeats, k, -1), axis=1)
            found[name] = jnp.mean(each, axis=0)
            if k < num_samples:
                found[f"variance_{k}"] = jnp.var(each, axis=0, ddof=1) / repeats
        return found

    return bounds


def curve(num_samples: int) -> dict[int, str]:
    """The k at which the importance-weighted bound is measured, with their names.

    Powers of ten up to half of K, so that each has repeats, and K itself.
    """
    powers = [10**i for i in range(len(str(num_samples))) if 2 * 10**i <= num_samples]
    names = {k: f"importance_weighted_bound_{k}" for k in powers}
    return {**names, num_samples: "importance_weighted_bound"}


def latent_rates(model: Model) -> PerExample:
    """KL(q(z_l | x) ‖ p(z_l)) of each latent: `-> {"rates": float32 [B, L]}`, nats."""

    def rates(params: Params, batch: Batch, keys: jax.Array) -> dict[str, jax.Array]:
        del keys
        return {"rates": model.latent_rates(params, batch)}

    return rates


def features(model: Model) -> PerExample:
    """What `encode` gives: `(params, batch, keys [B]) -> {"codes": float32 [B, F]}`."""

    def codes(params: Params, batch: Batch, keys: jax.Array) -> dict[str, jax.Array]:
        return {"codes": by_example(model.encode, params, batch, keys, 0)}

    return codes


def correctly_classified(model: Model) -> PerExample:
    """1 where the most probable class is the label: `-> {"correct": float32 [B]}`."""

    def correct(params: Params, batch: Batch, keys: jax.Array) -> dict[str, jax.Array]:
        del keys
        found = jnp.argmax(model.classify(params, batch), axis=1) == batch["label"]
        return {"correct": found.astype(jnp.float32)}

    return correct


def active_units(codes: np.ndarray, threshold: float = 0.01) -> metrics.Metric:
    """How many latents vary with the data: Cov_x(E[z_u | x]) above `threshold`.

    Args:
      codes: float `[N, F]`, posterior means.
      threshold: on the variance.

    Reference: Burda et al. 2016, section 5.2.
    """
    active = int((np.asarray(codes, np.float64).var(axis=0) > threshold).sum())
    return metrics.Metric(float(active), f"of {codes.shape[1]} units", num_examples=len(codes))


def compile_evaluation(
    model: Model,
    dataset: data.Dataset,
    config: Config,
    mesh: Mesh,
    show: bool = True,
) -> Callable[[Params, int], Measured]:
    """Everything that can be said about a model's likelihood on the split `config.split`.

    Args:
      model: what to evaluate.
      dataset: where the split is.
      config: the `eval` section.
      mesh: the devices.
      show: whether progress is shown.

    Returns:
      `(params, seed of all draws) -> Measured`: each term and each log-likelihood, the
      importance-weighted bound and its bits/dim, active units; those that the model has. Compiled
      once however often it is called.

    Raises:
      UserError: the split has no examples.
    """
    check_split(config, dataset)
    split = config.split
    arrays = passes.place(dataset, split, mesh)  # once, for all passes

    def whole(fn: PerExample, title: str) -> Callable[[Params, int], dict[str, np.ndarray]]:
        run = passes.compile_pass(fn, dataset, split, config.batch_size, mesh, arrays)
        return lambda params, seed: run(params, seed, f"{split}: {title}" if show else None)

    few, many = config.elbo_samples, config.num_samples
    terms = whole(elbo_terms(model, few), "terms")
    rates = bounds = aggregated = correct = codes = None
    if model.latent_rates is not None:
        rates = whole(latent_rates(model), "rate of each latent")
    if model.log_weight is not None:
        title = f"importance-weighted bound, K = {many:,}"
        bounds = whole(importance_weighted(model, many, config.chunk), title)
    has_density = model.latents is not None and model.latents.log_posterior is not None
    if has_density and config.aggregate_examples:
        part = data.spread(dataset, split, config.aggregate_examples)
        sizes = (config.batch_size, config.chunk)
        aggregated = aggregate.compile_evaluation(model, part, *sizes, mesh, split, show)
    if model.classify is not None:
        correct = whole(correctly_classified(model), "classes")
    if model.latents is not None and model.encode is not None:  # which gives their means
        codes = whole(features(model), "posterior means")

    def evaluate(params: Params, seed: int) -> Measured:
        each = terms(params, seed)
        found = passes.summarise(each, few)
        if "log_prob" in found:  # exact, however few draws the others take
            found["log_prob"] = found["log_prob"]._replace(num_samples=None)
        if rates:
            parts = np.mean(rates(params, seed)["rates"], axis=0, dtype=np.float64).tolist()
            found["rate"] = found["rate"]._replace(parts=parts)
        if bounds:
            of_bounds = bounds(params, seed)
            found |= _bounds(of_bounds, many)
            each |= {name: of_bounds[name] for name in curve(many).values()}
        for name in ("log_prob", "importance_weighted_bound", *model.log_likelihood_fns):
            if name in found:  # the tightest that there is
                found |= _per_dim(found[name], dataset.spec)
                break
        if dataset.toy:  # of the very same points: what no model exceeds but by chance
            true = dataset.toy.log_density(dataset.splits[split].x)
            found["data_log_prob"] = metrics.mean_over_examples(true, "nats")
        if aggregated:
            found |= aggregated(params, seed)
        if correct:
            is_correct = correct(params, seed)["correct"]
            found["accuracy"] = metrics.mean_over_examples(is_correct, "of 1")
        if codes:
            found["active_units"] = active_units(codes(params, seed)["codes"])
        return Measured(found, each)

    return evaluate


def _per_dim(log_likelihood: metrics.Metric, spec: DataSpec) -> dict[str, metrics.Metric]:
    """The same for each pixel or token; a density of real vectors has no such thing."""
    if spec.support == "real":
        return {}
    if spec.support == "tokens":
        return {"nats_per_token": metrics.nats_per_token(log_likelihood, spec.num_dims)}
    return {"bits_per_dim": metrics.bits_per_dim(log_likelihood, spec.num_dims)}


def _bounds(per_example: dict[str, np.ndarray], num_samples: int) -> dict[str, metrics.Metric]:
    """The curve of the importance-weighted bound, with errors over examples and over repeats."""
    found = {}
    for k, name in curve(num_samples).items():
        found |= passes.summarise({name: per_example[name]}, k)
        if k < num_samples:
            variance = per_example[f"variance_{k}"].astype(np.float64)
            error = math.sqrt(variance.sum()) / len(variance)
            found[name] = found[name]._replace(repeat_error=error, num_repeats=num_samples // k)
    return found
