"""Pictures of one shape whose five factors are known, made to order: nothing is read.

In the manner of dSprites (Matthey et al. 2017). The three shapes are longer than wide, so that
their rotations between 0 and 81 degrees cannot be mistaken for one another, and of one area at
each scale, so that neither area nor centre of mass tells the shape.
"""

from typing import NamedTuple

import numpy as np

from dgm_jax.data.sources import LabelledArrays, fingerprint

SIDE = 28  # of the image, pixels
NUM_TRAIN, NUM_TEST = 20_000, 5_000
# Factor -> number of values. 46,080 pictures: about a third of a test split is in a training one.
FACTORS = {"shape": 3, "scale": 6, "rotation": 10, "x": 16, "y": 16}

_SQRT_AREA = np.linspace(5.0, 8.0, FACTORS["scale"])  # pixels
_ROTATION = np.deg2rad(9.0 * np.arange(FACTORS["rotation"]))
_OFFSET = np.linspace(-4.5, 4.5, FACTORS["x"])  # of the centre of mass, pixels
_CHUNK = 1000


class Shapes(NamedTuple):
    """The data set with its factors, int32 `[N, 5]` and `[M, 5]`, columns as in `FACTORS`."""

    arrays: LabelledArrays
    train_factors: np.ndarray
    test_factors: np.ndarray


def generate(seed: int) -> Shapes:
    """Both splits, every factor drawn uniformly and independently of the others.

    The label is the shape: 0 rectangle, 1 ellipse, 2 triangle.
    """
    rng = np.random.default_rng(seed)
    factors = rng.integers(list(FACTORS.values()), size=(NUM_TRAIN + NUM_TEST, len(FACTORS)))
    factors = factors.astype(np.int32)
    train, test = factors[:NUM_TRAIN], factors[NUM_TRAIN:]
    arrays = render(train), train[:, 0], render(test), test[:, 0]
    return Shapes(LabelledArrays(*arrays, "generator", fingerprint(arrays)), train, test)


def render(factors: np.ndarray) -> np.ndarray:
    """White shapes on black, their edges grey: int `[N, 5]` -> uint8 `[N, 28, 28, 1]`.

    A pixel's value is the part of it that the shape covers, as if its edge were straight there.
    """
    # In parts, which keeps the memory small and the arrays in the processor's cache.
    parts = [_coverage(factors[i : i + _CHUNK]) for i in range(0, len(factors), _CHUNK)]
    return np.round(255 * np.concatenate(parts)).astype(np.uint8)[..., None]


def _coverage(factors: np.ndarray) -> np.ndarray:
    """The covered part of each pixel, `[N, 28, 28]` in [0, 1]."""
    shape, scale, rotation, x, y = (column[:, None, None] for column in factors.T)
    centre = SIDE / 2 - 0.5  # pixel 0 is centred on 0
    column = np.arange(SIDE, dtype=np.float32)[None, None, :] - (centre + _OFFSET[x])
    row = np.arange(SIDE, dtype=np.float32)[None, :, None] - (centre + _OFFSET[y])
    sine, cosine, size = np.sin(_ROTATION[rotation]), np.cos(_ROTATION[rotation]), _SQRT_AREA[scale]
    # In the shape's own frame, where its area is 1 and its long axis is u.
    u = ((cosine * column + sine * row) / size).astype(np.float32)
    v = ((cosine * row - sine * column) / size).astype(np.float32)
    distance = np.select(
        [shape == i for i in range(3)], [_rectangle(u, v), _ellipse(u, v), _triangle(u, v)]
    )
    return np.clip(0.5 - size * distance, 0, 1)


# Signed distances to the edge of a shape of area 1 centred on its centre of mass, negative inside.


def _rectangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Twice as long as wide."""
    return np.maximum(np.abs(u) - np.sqrt(1 / 2), np.abs(v) - np.sqrt(1 / 8))


def _ellipse(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Twice as long as wide; right to first order at its edge."""
    a, b = np.sqrt(2 / np.pi), np.sqrt(1 / (2 * np.pi))
    slope = 2 * np.hypot(u / a**2, v / b**2)
    return ((u / a) ** 2 + (v / b) ** 2 - 1) / (slope + 1e-6)  # no slope at the centre


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Isosceles, its height 1.5 times its base, its apex towards positive u."""
    base = np.sqrt(4 / 3)
    height = 1.5 * base
    sides = (height * np.abs(v) + base / 2 * (u - 2 / 3 * height)) / np.hypot(height, base / 2)
    return np.maximum(-u - height / 3, sides)
