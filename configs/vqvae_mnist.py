"""VQ-VAE with an autoregressive prior over its codes, on dynamically binarised MNIST.

Papers: van den Oord et al. 2017, "Neural Discrete Representation Learning"; Mentzer et al. 2023,
        "Finite Scalar Quantization".
Run:   python -m dgm_jax.main --config=configs/vqvae_mnist.py
Gives: docs/results.md
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """A codebook by gradient; `:ema` by moving average; `:fsq` a fixed grid; `:smoke`."""
    config = experiment("vqvae")
    config.train.duration = "40 epochs"
    config.train.batch_size = 200
    config.optimizer.learning_rate = 2e-3
    return variant(config, arg, ema={"model.quantiser": "ema"}, fsq={"model.quantiser": "fsq"})
