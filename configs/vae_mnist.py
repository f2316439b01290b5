"""VAE on dynamically binarised MNIST.

Paper: Kingma & Welling 2014; binarisation as in Burda et al. 2016.
Run:   python -m dgm_jax.main --config=configs/vae_mnist.py
Gives: NLL 86.15 nats (10,000 test images, K = 5,000, seed 0). On two busy CPU cores training took
       13 minutes and the evaluation 17; --config.eval.num_samples=500 makes that a tenth.
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """The default experiment; `:elbo` for the plain ELBO, `:smoke` for a run of seconds."""
    config = experiment("vae")
    config.train.duration = "90 epochs"
    config.train.batch_size = 200
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.05
    config.model.encoder = (500, 500)
    config.model.decoder = (500, 500)
    config.model.objective = "dreg"
    config.model.num_samples = 2
    return variant(config, arg, elbo={"model.objective": "elbo", "model.num_samples": 1})
