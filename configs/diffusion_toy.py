"""Variational diffusion on points in the plane: its bound beside the data's own log-density.

Papers: Kingma et al. 2021, "Variational diffusion models".
Run:   python -m dgm_jax.main --config=configs/diffusion_toy.py
Gives: docs/results.md
"""

from dgm_jax.config import TOYS, ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """Two moons; `:eight-gaussians`, `:checkerboard`, `:grid`; `:smoke`."""
    config = experiment("diffusion")
    config.data.dataset = "two_moons"
    config.data.binarisation = "none"
    config.model.network = "mlp"
    config.model.depth = 3
    config.model.gamma_min = -8.0
    config.model.sigma_data = 0.8
    config.train.duration = "50 epochs"
    config.train.batch_size = 500
    config.eval.elbo_samples = 200  # of a point it varies by some nats from draw to draw
    config.optimizer.learning_rate = 2e-3
    config.optimizer.b2 = 0.99
    config.optimizer.warmup = 0.02
    smoke = {"model.width": 32, "model.depth": 1, "train.batch_size": 100}
    return variant(config, arg, smoke=smoke, **TOYS)
