"""Points in the plane whose density is known: what a model learns can be held against the truth.

Each is an equal mixture of simple parts, and a point's label is the number of its part.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from dgm_jax.data.sources import LabelledArrays, fingerprint

NUM_TRAIN, NUM_TEST = 50_000, 10_000


class Toy(NamedTuple):
    """A mixture of parts of one shape around given centres.

    Attributes:
      centres: float `[M, 2]`.
      labels: int `[M]`, the class of each.
      sigma: of the Gaussian around each centre; None where each is a square of side 1.
    """

    centres: np.ndarray
    labels: np.ndarray
    sigma: float | None

    @property
    def num_labels(self) -> int:
        """How many modes there are: Gaussians, moons or squares."""
        return int(self.labels.max()) + 1

    def draw(self, rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
        """`num` points, float32 `[num, 2]`, and their labels, int32 `[num]`."""
        which = rng.integers(len(self.centres), size=num)
        if self.sigma is None:
            noise = rng.uniform(-0.5, 0.5, (num, 2))
        else:
            noise = self.sigma * rng.standard_normal((num, 2))
        return (self.centres[which] + noise).astype(np.float32), self.labels[which].astype(np.int32)

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """log p(x) of points `[N, 2]`: float64 `[N]`, nats; -inf where there are none."""
        if self.sigma is None:
            inside = (cdist(x, self.centres, "chebyshev") <= 0.5).any(axis=1)
            return np.where(inside, -math.log(len(self.centres)), -np.inf)
        exponents = -cdist(x, self.centres, "sqeuclidean") / (2 * self.sigma**2)
        return logsumexp(exponents, axis=1) - math.log(
            len(self.centres) * 2 * math.pi * self.sigma**2
        )


def _two_moons() -> Toy:
    """Two interleaving half circles of radius 1, each a hundred Gaussians along its arc."""
    angle = math.pi * (np.arange(100) + 0.5) / 100
    upper = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], axis=1)
    return Toy(np.concatenate([upper, -upper]), np.repeat([0, 1], 100), 0.1)


def _eight_gaussians() -> Toy:
    angle = 2 * math.pi * np.arange(8) / 8
    return Toy(2 * np.stack([np.cos(angle), np.sin(angle)], axis=1), np.arange(8), 0.2)


def _checkerboard() -> Toy:
    """The eight black squares of a board of 4 x 4."""
    row, column = np.divmod(np.arange(16), 4)
    black = (row + column) % 2 == 0
    return Toy(np.stack([column, row], axis=1)[black] - 1.5, np.arange(8), None)


def _grid() -> Toy:
    """25 narrow Gaussians, 40 deviations apart."""
    row, column = np.divmod(np.arange(25), 5)
    return Toy(2.0 * (np.stack([column, row], axis=1) - 2), np.arange(25), 0.05)


_MAKE: dict[str, Callable[[], Toy]] = {
    "two_moons": _two_moons,
    "eight_gaussians": _eight_gaussians,
    "checkerboard": _checkerboard,
    "grid": _grid,
}
NAMES = tuple(_MAKE)


def get(name: str) -> Toy | None:
    """The toy of that name; None of other data."""
    return _MAKE[name]() if name in _MAKE else None


def generate(name: str, seed: int) -> LabelledArrays:
    """Both splits of the toy of that name, drawn with `seed`."""
    rng, toy = np.random.default_rng(seed), _MAKE[name]()
    arrays = *toy.draw(rng, NUM_TRAIN), *toy.draw(rng, NUM_TEST)
    return LabelledArrays(*arrays, "generator", fingerprint(arrays))
