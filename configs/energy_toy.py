"""Energy-based model of points in the plane, trained by persistent chains.

Papers: Tieleman 2008 (persistent contrastive divergence); Vincent 2011, Song & Ermon 2019 (`:dsm`);
        Song et al. 2019 (`:ssm`).
Run:   python -m dgm_jax.main --config=configs/energy_toy.py
Gives: log p(x) with Z by quadrature, beside that of the distribution that made the data.
"""

from dgm_jax.config import TOYS, ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """Eight Gaussians; `:two-moons`, `:checkerboard`, `:grid`; by `:dsm`, `:ssm`; `:smoke`."""
    config = experiment("energy")
    config.data.dataset = "eight_gaussians"
    config.data.binarisation = "none"
    config.train.duration = "5000 steps"
    config.train.batch_size = 500
    config.train.validate_every = "20 epochs"
    config.optimizer.learning_rate = 1e-3
    config.model.objective = "contrastive_divergence"
    config.model.sigma_min = 0.0
    config.model.num_chains = 500
    config.model.step_size = 0.01
    config.model.langevin_steps = 10
    config.model.metropolis = True
    config.model.restart = 1.0
    config.model.rounds = 100
    config.eval.batch_size = 2000  # Z is computed once for each
    config.eval.elbo_samples = 1
    dsm = {
        "model.objective": "denoising_score_matching",
        "model.sigma_min": 0.05,
        "model.step_size": 0.05,
    }
    return variant(
        config,
        arg,
        dsm=dsm,
        ssm={"model.objective": "sliced_score_matching"},
        smoke={"model.hidden": (32, 32), "model.num_chains": 100, "model.rounds": 10},
        **TOYS,
    )
