"""β-TCVAE on generated shapes of known factors.

Paper: Chen et al. 2018.
Run:   python -m dgm_jax.main --config=configs/vae_shapes.py
       python -m dgm_jax.main --mode=features --workdir=runs/vae_shapes
Gives: ...
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """The default; `:vae` with a total correlation of weight 1; `:smoke` for a run of seconds."""
    config = experiment("vae")
    config.data.dataset = "shapes"
    config.train.duration = "100 epochs"
    config.train.batch_size = 200
    config.optimizer.learning_rate = 2e-3
    config.model.latents = 10
    config.model.encoder = (400, 400)
    config.model.decoder = (400, 400)
    config.model.objective = "tcvae"
    config.model.beta = 4.0
    config.eval.num_samples = 100
    generated = {"data.source": "auto"}
    return variant(config, arg, vae={"model.beta": 1.0}, smoke=generated)
