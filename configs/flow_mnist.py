"""Multi-scale flow of spline couplings on the grey values of MNIST, with learned noise.

Papers: Durkan et al. 2019, "Neural Spline Flows"; Dinh et al. 2017 (scales); Ho et al. 2019 (the
        noise); see `models/flow.py` for the others.
Run:   python -m dgm_jax.main --config=configs/flow_mnist.py
Gives: `bits_per_dim`, an upper bound; no number is claimed. `:binary`, trained on a GPU, has a NLL
       of at most 87.69 ± 0.21 nats (10,000 test images, K = 10)
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """The default; `:binary` digits; `:uniform` noise; `:glow`; `:maf`; `:smoke`."""
    config = experiment("flow")
    config.data.binarisation = "none"
    config.train.duration = "10 epochs"
    config.train.batch_size = 32
    config.train.steps_per_dispatch = 50
    config.train.validate_every = "1 epochs"
    config.train.checkpoint_every = "1 epochs"
    config.optimizer.learning_rate = 2e-3
    config.model.network = "conv"
    config.model.hidden = (32, 32)
    config.model.steps = (2, 6)
    config.model.dequantisation = "variational"
    config.eval.num_samples = 10
    config.eval.elbo_samples = 1
    maf = {"model.transform": "affine", "model.structure": "autoregressive"}
    maf |= {"model.network": "mlp", "model.hidden": (512, 512), "model.steps": (5,)}
    glow = {"model.transform": "affine", "model.dequantisation": "uniform"}
    return variant(
        config,
        arg,
        binary={"data.binarisation": "dynamic"},
        uniform={"model.dequantisation": "uniform"},
        glow={**glow, "model.steps": (4, 8)},
        maf={**maf, "model.dequantisation": "uniform"},
        smoke={"model.hidden": (8,), "model.steps": (1, 1), "model.transform": "affine"},
    )
