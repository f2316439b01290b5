"""VAE with categorical latents and an autoregressive prior, on dynamically binarised MNIST.

Papers: Jang et al. 2017 and Maddison et al. 2017 (the default); Mnih & Rezende 2016 (`:vimco`).
Run:   python -m dgm_jax.main --config=configs/discrete_vae_mnist.py
Gives: docs/results.md
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """Gumbel-softmax; `:vimco` with 200 Bernoulli latents and K = 5; `:smoke` in seconds."""
    config = experiment("discrete_vae")
    config.train.duration = "40 epochs"
    config.train.batch_size = 200
    config.optimizer.learning_rate = 2e-3
    config.eval.num_samples = 500
    bernoulli = {
        "model.objective": "vimco",
        "model.num_samples": 5,
        "model.latents": 200,
        "model.classes": 2,
    }
    return variant(config, arg, vimco=bernoulli)
