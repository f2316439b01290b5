"""Measured numbers: what they are, how sure they are, and how they are written."""

import math
from typing import NamedTuple

import numpy as np

# What a result may hold of log p(x), the tightest first.
LIKELIHOODS = ("log_prob", "importance_weighted_bound", "elbo")


class Metric(NamedTuple):
    """One measured number.

    Attributes:
      value: the mean over examples.
      unit: `nats`, `bits/dim`, `units`, ...
      standard_error: of the mean over examples; None where that has no meaning.
      num_examples: how many examples it is the mean of.
      num_samples: K, latent draws per example; None where none are drawn.
      repeat_error: the standard error that is left, on the same examples, by the draws: that of the
        mean over `num_repeats` independent repeats; None without repeats.
      num_repeats: how often the K draws were repeated.
      parts: of a sum, its terms: the rate of each latent, in their order; None where not known.
    """

    value: float
    unit: str
    standard_error: float | None = None
    num_examples: int | None = None
    num_samples: int | None = None
    repeat_error: float | None = None
    num_repeats: int | None = None
    parts: list[float] | None = None


def mean_over_examples(values: np.ndarray, unit: str, num_samples: int | None = None) -> Metric:
    """The mean of `values` `[N]` with its standard error s/√N (s with N - 1).

    Summed in float64, once, over all examples: the result does not depend on how they were
    batched.
    """
    values = np.asarray(values, np.float64)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Metric(float(values.mean()), unit, error, len(values), num_samples)


def bits_per_dim(log_likelihood: Metric, num_dims: int) -> Metric:
    """-log2 p(x) / D from a log-likelihood in nats; the uniform model of bytes has 8 bits/dim."""
    return _cost_per(log_likelihood, num_dims * math.log(2), "bits/dim")


def nats_per_token(log_likelihood: Metric, num_tokens: int) -> Metric:
    """-log p(x) / T from the log-likelihood of a window of T tokens in nats."""
    return _cost_per(log_likelihood, num_tokens, "nats/token")


def _cost_per(log_likelihood: Metric, size: float, unit: str) -> Metric:
    def scaled(error: float | None) -> float | None:
        return None if error is None else error / size

    return log_likelihood._replace(
        value=-log_likelihood.value / size,
        unit=unit,
        standard_error=scaled(log_likelihood.standard_error),
        repeat_error=scaled(log_likelihood.repeat_error),
    )


def table(metrics: dict[str, Metric]) -> str:
    """The metrics as aligned lines of text."""
    rows = []
    for name, metric in metrics.items():
        decimals = 4 if "/" in metric.unit else 3
        error = "" if metric.standard_error is None else f"± {metric.standard_error:.{decimals}f}"
        details = [f"{metric.num_examples:,} examples"] if metric.num_examples else []
        details += [f"K = {metric.num_samples:,}"] if metric.num_samples else []
        if metric.repeat_error is not None:
            details += [f"± {metric.repeat_error:.{decimals}f} over {metric.num_repeats:,} repeats"]
        if metric.parts is not None:
            details += [f"{min(metric.parts):.2f} to {max(metric.parts):.2f} of each latent"]
        rows.append((name, f"{metric.value:.{decimals}f}", error, metric.unit, ", ".join(details)))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        f"  {n:<{widths[0]}}  {v:>{widths[1]}} {e:<{widths[2]}}  {u:<{widths[3]}}  {d}".rstrip()
        for n, v, e, u, d in rows
    )
