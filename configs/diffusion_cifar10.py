"""Variational diffusion on CIFAR-10: its bound in bits/dim, or samples with `:edm`.

Papers: Kingma et al. 2021, "Variational diffusion models"; Karras et al. 2022 (`:edm`).
Run:   python -m dgm_jax.main --config=configs/diffusion_cifar10.py
Gives: no number is claimed. It needs an accelerator, and the data prepared by TFDS.
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """The default; `:edm`; `:smoke` for the first steps of a small one, on MNIST's grey values."""
    config = experiment("diffusion")
    config.data.dataset = "cifar10"
    config.data.binarisation = "none"
    config.data.validation = 1000
    config.train.duration = "500 epochs"
    config.train.batch_size = 128
    config.train.compute_dtype = "tensorfloat32"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.ema = 0.9999
    config.model.network = "unet"
    config.model.channels = (128, 256, 256)
    config.model.blocks = 2
    config.model.depth = 2
    config.model.gamma_min = -13.3
    config.model.gamma_max = 5.0
    config.model.sample_steps = 250
    edm = {
        "model.objective": "edm",
        "model.schedule": "karras",
        "model.gamma_min": -12.0,
        "model.gamma_max": 8.8,
        "model.sampler": "heun",
        "model.sample_steps": 18,
    }
    smaller = {"model.channels": (16, 32), "model.blocks": 1, "model.depth": 1, "model.patch": 4}
    smaller |= {"model.sample_steps": 20, "train.batch_size": 32, "eval.elbo_samples": 2}
    mnist = {"data.dataset": "mnist", "data.validation": 500}
    return variant(config, arg, edm=edm, smoke={**smaller, **mnist})
