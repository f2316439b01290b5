"""Gated PixelCNN on dynamically binarised MNIST.

Papers: van den Oord et al. 2016, "Conditional image generation with PixelCNN decoders"; Salimans et
        al. 2017, "PixelCNN++" (`:grey`).
Run:   python -m dgm_jax.main --config=configs/pixelcnn_mnist.py
Gives: log p(x) -81.46 nats (10,000 test images, exact, seed 0), with `:further` behind it -81.41;
       published -81.45; both with `--config.train.num_parts=25`, which is faster on a CPU;
       docs/results.md
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """The default; `:further` from its end; `:conditional`; `:grey` of grey values; `:smoke`."""
    config = experiment("pixelcnn")
    config.model.dilations = (1, 2, 4, 1, 2)
    config.train.duration = "11 epochs"
    config.train.batch_size = 50
    config.train.steps_per_dispatch = 50
    config.train.validate_every = "1 epoch"
    config.train.checkpoint_every = "1 epoch"
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.eval.elbo_samples = 1  # the likelihood is exact: every draw is the same
    further = {"train.init_from": "runs/pixelcnn_mnist", "train.duration": "3 epochs"}
    further |= {"optimizer.learning_rate": 1e-3}
    grey = {"data.binarisation": "none", "model.likelihood": "discretised_logistic_mixture"}
    return variant(
        config,
        arg,
        conditional={"model.conditional": True},
        further=further,
        grey=grey,
        smoke={"model.channels": 8, "model.dilations": (1, 2)},
    )
