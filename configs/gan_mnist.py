"""Relativistic GAN with R1 and R2 on the grey values of MNIST.

Papers: Huang et al. 2024, "The GAN is dead; long live the GAN!"; see `models/gan.py` for the other
        objectives.
Run:   python -m dgm_jax.main --config=configs/gan_mnist.py
Gives: digits in `prior_samples.png`; kernel distance 0.005 ± 0.004 (of test images 0.003 ± 0.005),
       recall 0.85 (0.86), precision 0.83 (0.87), 5,000 samples, seed 0, after 6,785 s of processor
       time; docs/results.md
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """The default; `:nonsaturating`, `:hinge`, `:wgan-gp`, `:conditional`, `:smoke`."""
    config = experiment("gan")
    config.data.binarisation = "none"
    config.train.duration = "20 epochs"
    config.train.batch_size = 64
    config.train.steps_per_dispatch = 50
    config.optimizer.learning_rate = 1e-3
    config.optimizer.b1 = 0.0
    config.optimizer.b2 = 0.99
    config.model.generator = (64, 32, 16)
    config.model.discriminator = (16, 32, 64)
    config.eval.elbo_samples = 1
    wasserstein = {"model.objective": "wasserstein", "model.penalty": "gradient_penalty"}
    return variant(
        config,
        arg,
        nonsaturating={"model.objective": "non_saturating", "model.penalty": "r1"},
        hinge={"model.objective": "hinge", "model.penalty": "r1"},
        conditional={"model.conditional": True},
        smoke={"model.generator": (16, 8), "model.discriminator": (8, 16)},
        **{"wgan-gp": {**wasserstein, "model.penalty_weight": 10.0}},
    )
