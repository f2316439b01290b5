"""Flow matching in the plane, where its exact density can be held against that of the data.

Papers: Lipman et al. 2023; Chen et al. 2018, "Neural ordinary differential equations" (the
        density); Tong et al. 2024 (the coupling by optimal transport).
Run:   python -m dgm_jax.main --config=configs/flow_matching_toy.py
Gives: `log_prob` beside `data_log_prob`, which no model exceeds but by chance.
"""

from dgm_jax.config import TOYS, ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """Two moons; `:eight-gaussians`, `:checkerboard`, `:grid`, `:independent`, `:smoke`."""
    config = experiment("flow_matching")
    config.data.dataset = "two_moons"
    config.data.binarisation = "none"
    config.model.width = 128
    config.model.depth = 3
    config.model.sigma_data = 0.8
    config.model.coupling = "optimal_transport"
    config.model.divergence = "exact"
    config.train.duration = "20 epochs"
    config.train.batch_size = 100
    config.optimizer.learning_rate = 2e-3
    config.optimizer.b2 = 0.99
    config.eval.elbo_samples = 1
    config.eval.batch_size = 500
    return variant(
        config,
        arg,
        independent={"model.coupling": "independent"},
        smoke={"model.width": 32, "model.depth": 1, "model.tolerance": 1e-3},
        **TOYS,
    )
