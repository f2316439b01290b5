"""VAE on dynamically binarised MNIST.

Paper: Kingma & Welling 2014; binarisation as in Burda et al. 2016.
Run:   python -m dgm_jax.main --config=configs/vae_mnist.py
Gives: NLL 86.15 nats (10,000 test images, K = 5,000, seed 0). On two busy CPU cores training took
       13 minutes and the evaluation 17; --config.eval.num_samples=500 makes that a tenth.
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
    return variant(config, arg, gaussian=gaussian)
