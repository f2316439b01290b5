"""Multi-scale flow of spline couplings on the grey values of MNIST.

Papers: Durkan et al. 2019, "Neural Spline Flows"; Dinh et al. 2017 (scales); Ho et al. 2019 (the
        learned noise); see `models/flow.py` for the others.
Run:   python -m dgm_jax.main --config=configs/flow_mnist.py
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """The default; `:uniform` noise; `:glow`, affine; `:maf`; `:binary`; `:smoke`."""
    config = experiment("flow")
    config.data.binarisation = "none"
    config.train.duration = "10 epochs"
    config.train.batch_size = 64
    config.train.steps_per_dispatch = 50
    config.train.validate_every = "1 epochs"
    config.train.checkpoint_every = "1 epochs"
    config.optimizer.learning_rate = 1e-3
    config.model.network = "conv"
    config.model.hidden = (32, 32)
    config.model.steps = (2, 6)
    config.model.dequantisation = "variational"
    config.eval.num_samples = 50
    smoke = {"model.hidden": (8,), "model.steps": (1, 1), "train.batch_size": 32}
    return variant(config, arg, binary={"data.binarisation": "dynamic"}, smoke=smoke)
