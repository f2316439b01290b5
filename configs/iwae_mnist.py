"""IWAE's Table 1: its networks of one and two stochastic layers, dynamically binarised MNIST.

Papers: Burda et al. 2016 (networks and targets); Roeder et al. 2017 and Tucker et al. 2019 (the
        gradients of the `vae` and `dreg` variants); Jordan et al. 2024 (the optimizer).
Run:   python -m dgm_jax.main --config=configs/iwae_mnist.py:l2-vae-k1
       and from its end
       python -m dgm_jax.main --config=configs/iwae_mnist.py:l2-dreg-k50
Gives: NLL (10,000 test images, K = 5,000, seed 1) 83.47 nats by l2-vae-k1 (published 85.33) and
       82.49 by l2-dreg-k50 (82.90); of one layer 86.05 by l1-vae-k1 (86.76) and 84.62 by
       l1-dreg-k50 (84.78); all cells that were trained are in docs/results.md
"""

from dgm_jax.config import ConfigDict, experiment, variant

_LAYERS = {
    "l1": {"model.latents": (50,), "model.width": (200,)},
    "l2": {"model.latents": (100, 50), "model.width": (200, 100)},
}
_OBJECTIVES = {"vae": "stl", "iwae": "iwae", "dreg": "dreg"}
# K -> epochs, batch size and learning rate. K = 5 and 50 go on from the end of K = 1: 410
# epochs in all, meant for an hour of two cores.
_SCHEDULES = {
    1: ("360 epochs", 500, 6e-3),
    5: ("50 epochs", 500, 3e-3),
    50: ("50 epochs", 100, 1e-3),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """`:l1-vae-k1` (the default) to `:l2-dreg-k50`, those of K = 5 and 50 from the end of K = 1.

    `:smoke` for a run of seconds.
    """
    config = experiment("hvae")
    config.train.batch_size = 200
    config.optimizer.name = "muon"
    config.train.steps_per_dispatch = 100
    config.eval.chunk = 50
    cells = {
        f"{layers}-{name}-k{k}": {
            **networks,
            "model.objective": objective,
            "model.num_samples": k,
            "train.duration": duration,
            "train.batch_size": batch_size,
            "optimizer.learning_rate": learning_rate,
            "train.init_from": f"runs/iwae_mnist-{layers}-vae-k1" if k > 1 else "",
        }
        for layers, networks in _LAYERS.items()
        for name, objective in _OBJECTIVES.items()
        for k, (duration, batch_size, learning_rate) in _SCHEDULES.items()
    }
    smoke = {"model.latents": (10,), "model.width": (50,)}
    return variant(config, arg or "l1-vae-k1", **cells, smoke=smoke)
