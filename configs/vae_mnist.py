"""VAE with a flow prior on dynamically binarised MNIST.

Papers: Kingma & Welling 2014; Roeder et al. 2017 (the gradient); Dinh et al. 2017 (the prior);
        binarisation as in Burda et al. 2016.
Run:   python -m dgm_jax.main --config=configs/vae_mnist.py
Gives: NLL 82.42 nats (10,000 test images, K = 5,000, seed 0) after 13 minutes of training on two
       CPU cores. The evaluation takes longer; --config.eval.num_samples=500 makes that an eighth.
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """The default; `:gaussian` for the textbook VAE; `:smoke` for a run of seconds."""
    config = experiment("vae")
    config.train.duration = "110 epochs"
    config.train.batch_size = 200
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.05
    config.model.encoder = (500, 500)
    config.model.decoder = (500, 500)
    config.model.prior = "realnvp"
    config.model.objective = "stl"
    gaussian = {"model.prior": "standard", "model.objective": "elbo"}
    smaller = {"model.encoder": (200, 200), "model.decoder": (200, 200), "model.flow_steps": 2}
    return variant(config, arg, gaussian=gaussian, smoke=smaller)
