"""How good samples are: near the data, as varied as the data, and not copied from it.

All is measured between sets of features `[N, F]`, whose origin the caller says: a number here means
nothing without the name of the network that gave the features, and none of them is "FID", which
stands for Inception's features alone.

References: Dowson & Landau 1982, "The Fréchet distance between multivariate normal distributions";
Bińkowski et al. 2018, "Demystifying MMD GANs"; Kynkäänniemi et al. 2019, "Improved precision and
recall metric for assessing generative models"; Naeem et al. 2020, "Reliable fidelity and diversity
metrics for generative models"; Meehan et al. 2020, "A non-parametric test to detect data-copying in
generative models".
"""

from typing import NamedTuple

import numpy as np
from scipy.spatial import KDTree
from scipy.stats import mannwhitneyu
from sklearn.metrics import pairwise_distances_chunked
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from dgm_jax.data.toys import Toy
from dgm_jax.metrics import Metric

_BLOCK = 250  # examples of one estimate of the kernel distance: few blocks know their error badly
_RECALL_NEIGHBOURS, _COVERAGE_NEIGHBOURS = 3, 5


class Moments(NamedTuple):
    """Of features, float64: `mean` `[F]` and `covariance` `[F, F]`, with N - 1."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Of features `[N, F]`, at least two rows, all at once."""
    features = np.asarray(features, np.float64)
    covariance = np.cov(features, rowvar=False, ddof=1)
    return Moments(features.mean(axis=0), np.atleast_2d(covariance))


def frechet_distance(first: Moments, second: Moments) -> float:
    """|μ₁ - μ₂|² + tr(C₁ + C₂ - 2 (C₁ C₂)^½): the squared 2-Wasserstein distance of Gaussians.

    At least 0; biased upwards, the more the fewer examples, so only distances from equally many
    examples compare (Dowson & Landau 1982, eq. 4).
    """
    root = _square_root(first.covariance)
    # C₁ C₂ has the eigenvalues of the symmetric C₁^½ C₂ C₁^½, whose root is stable when singular.
    values = np.linalg.eigvalsh(root @ second.covariance @ root)
    cross = np.sqrt(np.maximum(values, 0)).sum()
    spread = np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross
    return float(max(np.sum((first.mean - second.mean) ** 2) + spread, 0.0))


def kernel_distance(first: np.ndarray, second: np.ndarray) -> Metric:
    """The squared maximum mean discrepancy by the kernel (x·y / F + 1)³ (Bińkowski et al. 2018).

    Unbiased, so 0 on average for samples of one distribution, and sometimes below. Mean over
    disjoint blocks of 250 examples with its standard error; what does not fill a block is left
    out, unless there is less than one.

    Args:
      first: features `[N, F]`, in no order.
      second: features `[M, F]`.
    """
    size = min(_BLOCK, len(first), len(second))
    blocks = min(len(first), len(second)) // size
    values = [
        _unbiased_mmd(first[i * size : (i + 1) * size], second[i * size : (i + 1) * size])
        for i in range(blocks)
    ]
    error = float(np.std(values, ddof=1) / np.sqrt(blocks)) if blocks > 1 else None
    return Metric(float(np.mean(values)), "squared MMD", error, blocks * size)


class Neighbourhoods(NamedTuple):
    """Of both sets, each a share in [0, 1] but density.

    Attributes:
      precision: of the samples that lie within reach of some data (Kynkäänniemi et al. 2019).
      recall: of the data that lie within reach of some samples.
      density: data within whose reach a sample lies, over how many one would expect; not bounded by
        1 (Naeem et al. 2020).
      coverage: of the data that have a sample within reach.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbourhoods(samples: np.ndarray, data: np.ndarray) -> Neighbourhoods:
    """A point's reach is the distance of its k-th neighbour in its own set.

    k is 3 for precision and recall and 5 for density and coverage, as in the papers.

    Args:
      samples: features `[N, F]`.
      data: features `[M, F]`.
    """
    k = _COVERAGE_NEIGHBOURS
    sample_reach, data_reach = _distances_in_own_set(samples), _distances_in_own_set(data)
    narrow, wide = _RECALL_NEIGHBOURS - 1, k - 1
    near_sample = np.zeros(len(data), bool)
    covered = np.zeros(len(data), bool)
    precise, containing = [], 0
    for distances in pairwise_distances_chunked(samples, data, working_memory=128):
        start = len(precise)
        reach = sample_reach[start : start + len(distances), narrow, None]
        near_sample |= (distances <= reach).any(axis=0)
        precise.extend((distances <= data_reach[:, narrow]).any(axis=1))
        within = distances <= data_reach[:, wide]
        covered |= within.any(axis=0)
        containing += within.sum()
    return Neighbourhoods(
        float(np.mean(precise)),
        float(near_sample.mean()),
        float(containing / (k * len(samples))),
        float(covered.mean()),
    )


class Nearest(NamedTuple):
    """The nearest training example of each row: `distance` float and `row` int, each `[N]`."""

    distance: np.ndarray
    row: np.ndarray


def nearest(features: np.ndarray, train: np.ndarray) -> Nearest:
    """The nearest of `train` `[M, F]` to each row of `features` `[N, F]`."""
    distance, row = NearestNeighbors(n_neighbors=1).fit(train).kneighbors(features)
    return Nearest(distance[:, 0], row[:, 0])


def copying(samples: np.ndarray, held_out: np.ndarray) -> float:
    """How often a sample is nearer to the training data than a held-out example is.

    1/2 of fresh draws from the data's distribution, 1 of copies, and below 1/2 where samples lie
    further from all data (Meehan et al. 2020, the global test; ties count half).

    Args:
      samples: distances to the nearest training example, `[N]`.
      held_out: the same of held-out examples, `[M]`.
    """
    below = mannwhitneyu(held_out, samples).statistic
    return float(below / (len(samples) * len(held_out)))


def evaluate(found: np.ndarray, data: np.ndarray) -> dict[str, Metric]:
    """Distances and neighbourhoods of one set of features `[N, F]` against the data's `[M, F]`."""
    num = len(found)
    distance = frechet_distance(moments(found), moments(data))
    shares = neighbourhoods(found, data)._asdict()
    return {
        "frechet_distance": Metric(distance, "squared distance", num_examples=num),
        "kernel_distance": kernel_distance(found, data),
        **{name: Metric(value, "of 1", num_examples=num) for name, value in shares.items()},
    }


def modes(points: np.ndarray, toy: Toy) -> dict[str, Metric]:
    """Of points `[N, 2]`: the modes of a toy that they find, and the share of them in one.

    Its modes are what has a label of its own. A point is in one when it lies in one of its squares,
    or within three standard deviations of one of its Gaussians, as 98.9 % of the data do that come
    from single ones; a mode is found when a fifth of its fair share of the points is in it.
    """
    norm, reach = (np.inf, 0.5) if toy.sigma is None else (2, 3 * toy.sigma)
    distance, nearest = KDTree(toy.centres).query(points, p=norm)
    inside, num = distance <= reach, len(points)
    counts = np.bincount(toy.labels[nearest][inside], minlength=toy.num_labels)
    covered = int(np.sum(counts >= num / (5 * toy.num_labels)))
    return {
        "modes": Metric(float(covered), f"of {toy.num_labels}", num_examples=num),
        "in_a_mode": Metric(float(inside.mean()), "of 1", num_examples=num),
    }


def _square_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Without the pairs of a point with itself; `x` and `y` are `[N, F]`."""
    num = len(x)
    within = 0.0
    for of in (x, y):
        kernel = polynomial_kernel(of, degree=3, coef0=1)
        within += (kernel.sum() - np.trace(kernel)) / (num * (num - 1))
    return float(within - 2 * polynomial_kernel(x, y, degree=3, coef0=1).mean())


def _distances_in_own_set(features: np.ndarray) -> np.ndarray:
    """Of the nearest other rows, ascending: `[N, 5]`."""
    found = NearestNeighbors(n_neighbors=_COVERAGE_NEIGHBOURS).fit(features)
    return found.kneighbors()[0]  # without an argument a point is not its own neighbour
