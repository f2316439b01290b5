"""MADE on points in the plane whose density is known: each coordinate is a mixture of Gaussians.

Papers: Germain et al. 2015; Uria et al. 2013, "RNADE" (mixtures of real variables).
Run:   python -m dgm_jax.main --config=configs/made_toy.py
Gives: docs/results.md
"""

from dgm_jax.config import TOYS, ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """Two moons; `:eight-gaussians`, `:checkerboard`, `:grid`; `:smoke`."""
    config = experiment("made")
    config.data.dataset = "two_moons"
    config.data.binarisation = "none"
    config.train.duration = "5000 steps"
    config.train.batch_size = 500
    config.optimizer.learning_rate = 2e-3
    config.model.hidden = (128, 128)
    config.model.likelihood = "gaussian_mixture"
    config.eval.elbo_samples = 1  # the likelihood is exact: every draw is the same
    return variant(config, arg, smoke={"model.hidden": (32,)}, **TOYS)
