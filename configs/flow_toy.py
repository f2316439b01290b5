"""Neural spline flow on points in the plane whose density is known.

Papers: Durkan et al. 2019, "Neural Spline Flows"; see `models/flow.py` for the others.
Run:   python -m dgm_jax.main --config=configs/flow_toy.py
Gives: log_prob -1.010 nats beside -1.004 of the density that the test points were drawn from, after
       11 s of training on two CPU cores (10,000 points, seed 0). More in docs/results.md.
"""

from dgm_jax.config import TOYS, ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """Two moons; `:eight-gaussians`, `:checkerboard`, `:grid`; `:affine`, `:maf`; `:smoke`."""
    config = experiment("flow")
    config.data.dataset = "two_moons"
    config.data.binarisation = "none"
    config.train.duration = "4000 steps"
    config.train.batch_size = 256
    config.train.validate_every = "1000 steps"
    config.train.checkpoint_every = "2000 steps"
    config.optimizer.learning_rate = 2e-3
    config.model.hidden = (64, 64)
    config.eval.batch_size = 1000
    config.eval.elbo_samples = 1
    maf = {"model.transform": "affine", "model.structure": "autoregressive", "model.steps": (8,)}
    checkerboard = {"checkerboard": {**TOYS["checkerboard"], "model.bins": 16}}
    return variant(
        config,
        arg,
        affine={"model.transform": "affine", "model.steps": (8,)},
        maf=maf,
        smoke={"model.hidden": (16,), "model.steps": (2,)},
        **{**TOYS, **checkerboard},
    )
