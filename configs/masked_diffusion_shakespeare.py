"""Masked diffusion on the characters of tiny Shakespeare, its last tenth held out.

Papers: Sahoo et al. 2024, "Simple and effective masked diffusion language models"; Shi et al. 2024.
Run:   python -m dgm_jax.main --config=configs/masked_diffusion_shakespeare.py
Gives: no number is claimed yet; `nats_per_token` is nats a character, at most.
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """The default; `:smoke` for a run of seconds."""
    config = experiment("masked_diffusion")
    config.data.dataset = "shakespeare"
    config.data.binarisation = "none"
    config.data.context = 64
    config.data.validation = 128
    config.train.duration = "4000 steps"
    config.train.batch_size = 32
    config.train.steps_per_dispatch = 50
    config.train.validate_every = "1000 steps"
    config.train.checkpoint_every = "2000 steps"
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup = 0.05
    config.optimizer.b2 = 0.99
    config.optimizer.clip_norm = 1.0
    return variant(
        config,
        arg,
        smoke={"model.width": 32, "model.depth": 2, "model.hidden": 64, "eval.elbo_samples": 2},
    )
