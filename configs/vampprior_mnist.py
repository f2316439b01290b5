"""VAE with a VampPrior, the paper's dense networks, on dynamically binarised MNIST.

Paper: Tomczak & Welling 2018, "VAE with a VampPrior".
Run:   python -m dgm_jax.main --config=configs/vampprior_mnist.py
Gives: NLL 82.18 nats (K = 5,000, seed 0), published 82.38; docs/results.md
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """The default; `:standard` with a Gaussian prior; `:smoke` for a run of seconds."""
    config = experiment("vae")
    config.train.duration = "160 epochs"
    config.train.batch_size = 1000
    config.train.steps_per_dispatch = 100
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 6e-3
    config.optimizer.weight_decay = 0.02
    config.model.latents = 40
    config.model.encoder = (300, 300)
    config.model.decoder = (300, 300)
    config.model.activation = "gated"
    config.model.prior = "vamp"
    config.model.objective = "stl"
    smoke = {"model.components": 50, "model.encoder": (64,), "model.decoder": (64,)}
    return variant(config, arg, standard={"model.prior": "standard"}, smoke=smoke)
