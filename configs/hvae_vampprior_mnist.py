"""Two levels of latents and a VampPrior, the paper's dense networks, dynamically binarised MNIST.

Paper: Tomczak & Welling 2018, "VAE with a VampPrior".
Run:   python -m dgm_jax.main --config=configs/hvae_vampprior_mnist.py
Gives: NLL 81.06 ± 0.21 nats (K = 5,000, seed 0), published 81.24, after 2,159 s of processor time;
       on a GPU 81.05 (docs/variational.md)
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """The default; `:standard` with a Gaussian prior; `:smoke` for a run of seconds."""
    config = experiment("two_level")
    config.train.duration = "120 epochs"
    config.train.batch_size = 1000
    config.train.steps_per_dispatch = 100
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 6e-3
    config.optimizer.weight_decay = 0.15
    smoke = {"model.width": 64, "model.components": 50}
    return variant(config, arg, standard={"model.prior": "standard"}, smoke=smoke)
