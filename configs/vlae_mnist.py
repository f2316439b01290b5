"""VAE whose pixels also see their neighbours before them, dynamically binarised MNIST.

Papers: Chen et al. 2017, "Variational lossy autoencoder" (a decoder with a window); Dinh et al.
        2017 (the prior); Roeder et al. 2017 (the gradient); Jordan et al. 2024 (the optimizer).
Run:   python -m dgm_jax.main --config=configs/vlae_mnist.py
Gives: NLL 79.75 nats (10,000 test images, K = 500, seed 0) after 7,015 s of processor time,
       about an hour of two CPU cores
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """The default; `:smoke` for a run of seconds."""
    config = experiment("vae")
    config.train.duration = "80 epochs"
    config.train.batch_size = 500
    config.train.steps_per_dispatch = 20
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 6e-3
    config.optimizer.weight_decay = 0.05
    config.eval.num_samples = 500
    config.model.encoder = (500, 500)
    config.model.decoder = (500, 500)
    config.model.window = 7
    config.model.prior = "realnvp"
    config.model.objective = "stl"
    smaller = {
        "model.encoder": (64,),
        "model.decoder": (64,),
        "model.flow_steps": 2,
        "train.batch_size": 50,
    }
    return variant(config, arg, smoke=smaller)
