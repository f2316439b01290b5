"""Top-down hierarchy with a discretised logistic mixture on CIFAR-10.

Papers: Child 2021, "Very Deep VAEs"; Salimans et al. 2017 (the likelihood).
Run:   python -m dgm_jax.main --config=configs/topdown_cifar10.py
Gives: no number is claimed. It needs an accelerator, and the data prepared by TFDS.
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """The default; `:smoke` for the first steps of a small one, on MNIST's grey values."""
    config = experiment("topdown")
    config.data.dataset = "cifar10"
    config.data.binarisation = "none"
    config.data.validation = 1000
    config.train.duration = "200 epochs"
    config.train.batch_size = 128
    config.optimizer.learning_rate = 1e-3
    config.model.layers = (0, 6, 6, 4, 2)
    config.model.latents = 16
    config.model.channels = 128
    config.model.width = 64
    config.model.likelihood = "discretised_logistic_mixture"
    config.eval.num_samples = 100
    config.eval.aggregate_examples = 0
    smaller = {"model.layers": (0, 1, 1), "model.channels": 8, "model.width": 8}
    smaller |= {"train.batch_size": 32, "eval.aggregate_examples": 0}
    mnist = {"data.dataset": "mnist", "data.validation": 500, "eval.num_samples": 10}
    return variant(config, arg, smoke={**smaller, **mnist})
