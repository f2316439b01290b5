"""Time to quality: how long each program trains, by its own default recipe, until it is good.

The network is that of configs/vae_mnist.py. This project trains it as that file says; PyTorch by
the optimizer, rate and batch usual in its VAE examples, from memory instead of a `DataLoader`;
pythae by the defaults of its trainer. All are measured on the same validation images and bits.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from contestants import (
    MLPCase,
    Trainer,
    compiled_run,
    dataset,
    pythae_trainer,
    resident_mib,
    torch_trainer,
    train_x,
)

REPO = Path(__file__).resolve().parent.parent
TARGETS = {"negative_elbo": 100.0, "nll": 90.0}  # of validation, nats per image, lower is better
PLAIN = MLPCase(batch_size=100, hidden=(500, 500))


def measure_quality(program: str, limit: float, seed: int) -> dict[str, Any]:
    """Train until the validation split is modelled as well as `TARGETS` say, or time is up.

    The clock runs while the program trains, compilation included, and stands while it is evaluated:
    about every second at first, then after every twentieth of the time so far.

    Args:
      program: one of `RECIPES`.
      limit: of training, seconds.
      seed: of the run.

    Returns:
      `history`, of each evaluation its `seconds` of training, `negative_elbo` and `nll`;
      `compilation_seconds`, by how much the first call of `Trainer.train` exceeds the median call;
      `num_parameters`; `memory_mib`, resident at the first and at the last evaluation.
    """
    trainer = RECIPES[program](seed)
    calls: list[float] = []
    history: list[dict[str, float]] = []
    memory: list[int] = []
    due = 0.0
    while not history or (sum(calls) < limit and not all(reached(history))):
        began = time.perf_counter()
        trainer.train()
        calls.append(time.perf_counter() - began)
        seconds = sum(calls)
        if seconds >= min(due, limit):
            negative_elbo, nll = trainer.evaluate()
            history.append({"seconds": seconds, "negative_elbo": negative_elbo, "nll": nll})
            memory.append(resident_mib())
            due = seconds + max(1.0, seconds / 20)
    return {
        "history": history,
        "compilation_seconds": calls[0] - statistics.median(calls),
        "num_parameters": trainer.num_parameters,
        "memory_mib": [memory[0], memory[-1]],
    }


def seconds_to(target: str, history: list[dict[str, float]]) -> float:
    """Training until a target was first seen reached; infinite where it was not."""
    return next((at["seconds"] for at in history if at[target] <= TARGETS[target]), math.inf)


def reached(history: list[dict[str, float]]) -> list[bool]:
    """Whether each target was."""
    return [math.isfinite(seconds_to(target, history)) for target in TARGETS]


def _dgm_jax(seed: int, variant: str) -> Trainer:
    from dgm_jax import config as configs

    config = configs.load(f"{REPO}/configs/vae_mnist.py:{variant}", {"seed": seed})
    return compiled_run(config, config.train.steps_per_dispatch, dataset())


def _pythae(seed: int) -> Trainer:
    import torch

    torch.manual_seed(seed)
    network = PLAIN.torch_network(train_x(dataset()))
    return pythae_trainer(
        dataclasses.replace(PLAIN, batch_size=64), network, learning_rate=1e-4, seed=seed
    )


# By seed.
RECIPES: dict[str, Callable[[int], Trainer]] = {
    "dgm_jax": partial(_dgm_jax, variant="gaussian"),
    "dgm_jax, flow prior": partial(_dgm_jax, variant=""),
    "PyTorch eager": lambda seed: torch_trainer(PLAIN, seed=seed),
    "torch.compile": lambda seed: torch_trainer(PLAIN, compiled=True, seed=seed),
    "pythae": _pythae,
}
