"""Flow matching on the grey values of MNIST: a velocity field carries noise to digits.

Papers: Lipman et al. 2023, "Flow matching for generative modeling"; Liu et al. 2023 (rectified
        flow); Esser et al. 2024 (logit-normal times); Ho & Salimans 2022 (`:conditional`); Tong et
        al. 2024 (`:ot`).
Run:   python -m dgm_jax.main --config=configs/flow_matching_mnist.py
Gives: digits in `prior_samples.png`. By `:conditional` kernel distance 0.002 ± 0.004 (of test
       images 0.003 ± 0.005), Fréchet distance 0.38 (0.18), recall 0.76 (0.86), precision 0.89
       (0.87), after 5,285 s of processor time; by the default 0.008 ± 0.004, 1.04, 0.92 and 0.68,
       after 5,528 s (5,000 samples, seed 0); docs/results.md
"""

from dgm_jax.config import ConfigDict, experiment, variant


def get_config(arg: str | None = None) -> ConfigDict:
    """The default; `:conditional`, `:ot`, `:dit`, `:likelihood`, `:smoke`."""
    config = experiment("flow_matching")
    config.data.binarisation = "none"
    config.model.network = "unet"
    config.model.patch = 2
    config.model.channels = (32, 96)
    config.model.depth = 4
    config.model.sigma_data = 0.6
    # Which digit it will be is decided late in t, mostly between 0.65 and 0.9.
    config.model.times = "logit_normal"
    config.model.logit_mean = 0.7
    config.model.logit_std = 1.2
    config.model.divergence = "none"
    config.model.sample_steps = 25
    config.train.duration = "10 epochs"
    config.train.batch_size = 100
    config.train.steps_per_dispatch = 50
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.b2 = 0.99
    config.optimizer.warmup = 0.02
    config.eval.elbo_samples = 1
    return variant(
        config,
        arg,
        conditional={"model.conditional": True, "model.guidance": 1.5},
        ot={"model.coupling": "optimal_transport"},
        dit={"model.network": "dit", "model.width": 96, "model.depth": 6},
        likelihood={"model.divergence": "hutchinson", "train.validate_every": "10 epochs"},
        smoke={
            "model.channels": (16, 32),
            "model.depth": 1,
            "model.patch": 4,
            "model.sample_steps": 10,
            "train.batch_size": 50,
        },
    )
