"""A variational diffusion model on dynamically binarised MNIST, or one for samples of grey digits.

Papers: Kingma et al. 2021, "Variational diffusion models"; Karras et al. 2022 (`:edm`); Ho &
        Salimans 2022 (`:conditional`); Peebles & Xie 2023 (`:dit`); Hang et al. 2023 (`:min-snr`).
Run:   python -m dgm_jax.main --config=configs/diffusion_mnist.py
Gives: ELBO -81.95 ± 0.24 nats (0.1508 bits/dim; 10,000 test images, seed 0) after 9,237 s of
       processor time, 85 minutes of two CPU cores by the clock, with
       `--config.train.num_parts=4`; the variants claim no number
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """The default; `:edm`, `:conditional`, `:min-snr`, `:dit`, `:smoke`."""
    config = experiment("diffusion")
    config.model.network = "unet"
    config.model.patch = 2
    config.model.channels = (48, 96)
    config.model.depth = 2
    config.model.sample_steps = 200
    config.model.gamma_min = -5.0  # where no bit is in doubt
    config.train.duration = "18 epochs"
    config.train.batch_size = 100
    config.train.steps_per_dispatch = 50
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.b2 = 0.99
    config.optimizer.warmup = 0.02
    edm = {
        "data.binarisation": "none",
        "model.objective": "edm",
        "model.schedule": "karras",
        "model.gamma_min": -12.0,
        "model.gamma_max": 8.8,
        "model.sampler": "heun",
        "model.sample_steps": 40,  # 20 spread samples of a Gaussian by 4 % too widely
    }
    return variant(
        config,
        arg,
        edm=edm,
        conditional={**edm, "model.conditional": True, "model.guidance": 1.5},
        **{"min-snr": {**edm, "model.objective": "min_snr", "model.schedule": "cosine"}},
        dit={"model.network": "dit", "model.width": 128, "model.depth": 6},
        smoke={
            "model.channels": (16, 32),
            "model.depth": 1,
            "model.patch": 4,
            "model.sample_steps": 20,
            "train.batch_size": 50,
            "eval.elbo_samples": 2,
        },
    )
