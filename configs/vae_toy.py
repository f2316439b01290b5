"""VAE on points in the plane whose density is known: a bound beside the data's own log-density.

Papers: Kingma & Welling 2014; Dinh et al. 2017 (the prior); Burda et al. 2016 (the bound).
Run:   python -m dgm_jax.main --config=configs/vae_toy.py
Gives: docs/results.md
"""

from dgm_jax.config import TOYS, ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """Two moons; `:eight-gaussians`, `:checkerboard`, `:grid`; `:smoke`."""
    config = experiment("vae")
    config.data.dataset = "two_moons"
    config.data.binarisation = "none"
    config.train.duration = "5000 steps"
    config.train.batch_size = 500
    config.optimizer.learning_rate = 2e-3
    config.model.latents = 2
    config.model.encoder = (128, 128)
    config.model.decoder = (128, 128)
    config.model.likelihood = "gaussian_mixture"
    config.model.prior = "realnvp"
    config.model.objective = "stl"
    config.eval.num_samples = 1000
    smoke = {"model.encoder": (32,), "model.decoder": (32,), "model.flow_steps": 2}
    return variant(config, arg, smoke=smoke, **TOYS)
