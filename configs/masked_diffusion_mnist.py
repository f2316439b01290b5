"""Masked diffusion on dynamically binarised MNIST: pixels are hidden and brought back in any order.

Papers: Austin et al. 2021; Sahoo et al. 2024; Shi et al. 2024, "Simplified and generalized masked
        diffusion for discrete data"; Uria et al. 2014 (the bound's other name: all orders at once).
Run:   python -m dgm_jax.main --config=configs/masked_diffusion_mnist.py
Gives: `elbo` of -81.42 ± 0.24 nats on the test images (0.1498 bits/dim), trained on a GPU
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """The default; `:smoke` for a run of seconds."""
    config = experiment("masked_diffusion")
    config.model.network = "unet"
    config.model.patch = 2
    config.model.channels = (48, 96)  # those of `diffusion_mnist`
    config.model.depth = 2
    config.model.sample_steps = 196
    config.train.duration = "18 epochs"
    config.train.batch_size = 100
    config.train.steps_per_dispatch = 50
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.b2 = 0.99
    config.optimizer.warmup = 0.02
    return variant(
        config,
        arg,
        smoke={
            "model.patch": 4,
            "model.channels": (16, 32),
            "train.batch_size": 50,
            "model.depth": 1,
            "model.sample_steps": 28,
            "eval.elbo_samples": 2,
        },
    )
