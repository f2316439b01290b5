"""Means, standard errors and bits per dimension against NumPy and entropies."""

import math

import numpy as np
import pytest

from dgm_jax.metrics import Metric, bits_per_dim, mean_over_examples, table


def test_mean_and_standard_error_equal_numpy():
    values = np.random.default_rng(0).normal(-80, 7, 1000)
    metric = mean_over_examples(values, "nats", num_samples=5)
    assert metric.value == pytest.approx(np.mean(values), rel=1e-14)
    assert metric.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(1000))
    assert metric[3:5] == (1000, 5) and metric.unit == "nats"


def test_standard_error_by_hand():
    """Of 1, 2, 3, 4: s² = 5/3, over √4."""
    metric = mean_over_examples(np.array([1.0, 2.0, 3.0, 4.0]), "nats")
    assert metric.standard_error == pytest.approx(math.sqrt(5 / 3) / 2, rel=1e-14)
    assert mean_over_examples(np.ones(1), "nats").standard_error is None


def test_standard_error_falls_with_the_root_of_n():
    """Every value four times: s/√N is halved, but for s having N - 1."""
    values = np.random.default_rng(1).normal(size=250)
    one, four = (mean_over_examples(np.tile(values, n), "nats") for n in (1, 4))
    ratio = math.sqrt(249 / 999)
    assert four.standard_error == pytest.approx(ratio * one.standard_error, rel=1e-12)


def test_standard_error_covers_the_truth():
    """|mean - truth| < 2 SE in 95.4 % of 2,000 experiments, within four standard errors."""
    experiments = np.random.default_rng(2).normal(3.0, 2.0, (2000, 200))
    covered = 0
    for values in experiments:
        metric = mean_over_examples(values, "nats")
        covered += abs(metric.value - 3.0) < 2 * metric.standard_error
    assert abs(covered / 2000 - 0.954) < 4 * math.sqrt(0.954 * 0.046 / 2000) + 0.002


def test_float32_values_are_summed_in_float64():
    """A float32 sum of 3 million values near 1e4 would lose the digit asserted here."""
    values = np.full(3_000_000, 1e4, np.float32)
    values[::2] += 0.0625
    assert mean_over_examples(values, "nats").value == 1e4 + 0.03125


@pytest.mark.parametrize("num_dims", [1, 784, 3072])
def test_the_uniform_model_of_bytes_has_eight_bits_per_dim(num_dims):
    log_likelihood = mean_over_examples(np.full(10, -num_dims * math.log(256)), "nats", 5)
    found = bits_per_dim(log_likelihood, num_dims)
    assert found.value == pytest.approx(8, rel=1e-14) and found.unit == "bits/dim"
    assert found.num_examples == 10 and found.num_samples == 5


def test_bits_per_dim_scales_the_errors():
    metric = Metric(-10.0, "nats", 2 * math.log(2), 7, repeat_error=4 * math.log(2))
    found = bits_per_dim(metric, 4)
    assert found.standard_error == pytest.approx(0.5, rel=1e-14)
    assert found.repeat_error == pytest.approx(1, rel=1e-14)
    assert bits_per_dim(Metric(-10.0, "nats"), 4).standard_error is None


def test_table_prints_every_metric_with_all_it_knows():
    lines = table(
        {
            "elbo": Metric(-98.7654, "nats", 0.1234, 10_000, 5000),
            "bits_per_dim": Metric(0.17654, "bits/dim", 0.0012, 10_000),
            "active_units": Metric(23.0, "of 50 units"),
        }
    ).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "elbo -98.765 ± 0.123 nats 10,000 examples, K = 5,000",
        "bits_per_dim 0.1765 ± 0.0012 bits/dim 10,000 examples",
        "active_units 23.000 of 50 units",
    ]
    # The units begin in one column.
    units = zip(lines, ("nats", "bits/", "of 50"), strict=True)
    assert len({line.index(unit) for line, unit in units}) == 1
