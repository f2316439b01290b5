"""Semi-supervised M2 on dynamically binarised MNIST: ten labels of each class, or 100 of each.

Paper: Kingma et al. 2014, "Semi-supervised Learning with Deep Generative Models".
Run:   python -m dgm_jax.main --config=configs/m2_mnist.py
Gives: accuracy 0.911 ± 0.003 on the test images with ten labels of each class (published 0.880),
       NLL 94.41 ± 0.27 nats (K = 500); seed 0, 1,034 s of processor time; `:labels-1000` claims
       nothing
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """The default; `:labels-1000` for ten times the labels; `:smoke` for a run of seconds."""
    config = experiment("m2")
    config.data.labelled = 100
    config.data.labelled_share = 0.1
    # First the labels, then whatever makes the images likely: as long as the rate is dear, z says
    # little of the class, and y has to.
    config.model.alpha = 200.0
    config.train.ramp = "model.beta from 5 over 40 epochs"
    config.train.duration = "60 epochs"
    config.train.batch_size = 200
    config.train.steps_per_dispatch = 100
    config.optimizer.learning_rate = 1e-3
    config.eval.num_samples = 500
    return variant(config, arg, **{"labels-1000": {"data.labelled": 1000}})
