"""The same training step in several programs: what `benchmark.py` times, a process for each.

All train one network on the same images, binarised anew for each batch, with Adam. This project
also clips and logs the gradient's norm; the others do neither.
"""

import itertools
import math
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    """What is trained: 784-hidden-latents-hidden-784.

    Attributes:
      batch_size: B.
      num_steps: updates before the losses are compared.
      hidden: widths of the encoder; the decoder's are the reverse.
      latents: L.
      num_samples: K; above 1 the objective is IWAE's.
      activation: between the layers.
    """

    batch_size: int
    num_steps: int = 1000
    hidden: tuple[int, ...] = (200, 200)
    latents: int = 50
    num_samples: int = 1
    activation: str = "silu"


LEARNING_RATE = 1e-3
CASES = {
    "MLP VAE, batch 20": Case(20),
    "MLP VAE, batch 100": Case(100),
    "MLP VAE, batch 512": Case(512, 600),
    "IWAE, K = 50, batch 20": Case(20, 300, num_samples=50),
    "pythae's MLP, batch 100": Case(100, hidden=(512,), activation="relu"),
}

# What a contestant gives: (parameters, mean loss of the last fifth of case.num_steps steps,
# a function that makes some more steps and returns how many).
Ready = tuple[int, float, Callable[[], int]]


def measure(contestant: str, case: str, seconds: float) -> dict[str, float]:
    """Train as the case says, then time more steps for some seconds.

    Returns:
      `images_per_second`, `loss` (nats per image, of training), `num_parameters`.
    """
    num_parameters, loss, more = CONTESTANTS[contestant](CASES[case])
    more()
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        steps += more()
    speed = steps * CASES[case].batch_size / (time.perf_counter() - began)
    return {"images_per_second": speed, "loss": loss, "num_parameters": num_parameters}


def _images() -> Any:
    """The data set of all contestants."""
    from dgm_jax.data import dataset

    return dataset.load(dataset.Config(), announce=lambda line: None)


def _dgm_jax(case: Case, steps_per_dispatch: int = 100) -> Ready:
    """This project's compiled steps."""
    import jax

    from dgm_jax import config as configs
    from dgm_jax import sharding
    from dgm_jax.train import initial_state, prepare
    from dgm_jax.train_state import num_parameters
    from dgm_jax.train_step import compile_train_steps

    config = configs.override(
        configs.experiment("vae"),
        {
            "train.batch_size": case.batch_size,
            "train.duration": "1000000 steps",  # the learning rate is all but constant
            "optimizer.learning_rate": LEARNING_RATE,
            "optimizer.warmup": 0.0,
            "optimizer.ema": 0.0,
            "model.encoder": case.hidden,
            "model.decoder": case.hidden[::-1],
            "model.latents": case.latents,
            "model.activation": case.activation,
            "model.num_samples": case.num_samples,
            "model.objective": "elbo" if case.num_samples == 1 else "iwae",
        },
    )
    experiment = prepare(config, _images())
    split, mesh = experiment.dataset.splits["train"], experiment.mesh
    arrays = {"images": split.images, "labels": split.labels}
    arrays = jax.device_put(arrays, sharding.replicated(mesh))
    run = compile_train_steps(
        experiment.model_at,
        experiment.optimizer,
        experiment.ema_decay,
        experiment.dataset,
        case.batch_size,
        steps_per_dispatch,
        mesh,
    )
    state = initial_state(experiment)
    size, losses = num_parameters(state.params), []
    for _ in range(case.num_steps // steps_per_dispatch):
        state, measured = run(state, arrays)
        losses.append(measured["vae/loss"])
    losses = np.concatenate(jax.device_get(losses))

    def more() -> int:
        nonlocal state
        for _ in range(max(1, 100 // steps_per_dispatch)):
            state, measured = run(state, arrays)
        jax.block_until_ready(measured)
        return max(100, steps_per_dispatch)

    return size, float(losses[-case.num_steps // 5 :].mean()), more


def _dgm_jax_by_step(case: Case) -> Ready:
    """The same step, dispatched one at a time."""
    return _dgm_jax(case, steps_per_dispatch=1)


def _torch(case: Case, compiled: bool) -> Ready:
    """The network in PyTorch, its data in memory, fused Adam; no value leaves it in the loop."""
    import torch
    from torch import nn
    from torch.nn import functional

    dataset = _images()
    images = dataset.splits["train"].images.reshape(-1, 784)
    images = torch.tensor(images, dtype=torch.float32) / 255
    activation = {"silu": nn.SiLU, "relu": nn.ReLU}[case.activation]
    torch.manual_seed(0)

    def mlp(sizes: tuple[int, ...]) -> list[nn.Module]:
        return [
            layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), activation())
        ]

    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            last, first = case.hidden[-1], case.hidden[0]
            self.encoder = nn.Sequential(*mlp((784, *case.hidden)))
            self.posterior = nn.Linear(last, 2 * case.latents)
            self.decoder = nn.Sequential(*mlp((case.latents, *case.hidden[::-1])))
            self.head = nn.Linear(first, 784)
            mean = images.mean(0).clamp(1e-3, 1 - 1e-3)
            for module in self.modules():  # as Flax starts its layers
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
                    nn.init.zeros_(module.bias)
            self.head.bias.data = torch.logit(mean)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mu, raw = self.posterior(self.encoder(2 * x - 1)).chunk(2, -1)
            sigma = functional.softplus(raw) + 1e-4
            shape = (case.num_samples, *mu.shape) if case.num_samples > 1 else mu.shape
            noise = torch.randn(shape)
            z = mu + sigma * noise
            logits = self.head(self.decoder(z))
            cost = functional.binary_cross_entropy_with_logits(
                logits, x.expand_as(logits), reduction="none"
            ).sum(-1)
            if case.num_samples == 1:
                rate = 0.5 * (sigma**2 + mu**2 - 1) - sigma.log()
                return (cost + rate.sum(-1)).mean()
            log_ratio = (0.5 * (noise**2 - z**2) + sigma.log()).sum(-1)
            return -(torch.logsumexp(log_ratio - cost, 0) - math.log(case.num_samples)).mean()

    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    loss_of = torch.compile(model) if compiled else model

    def batches() -> Any:
        while True:
            yield from torch.randperm(len(images)).split(case.batch_size)

    order = batches()

    def step() -> torch.Tensor:
        ids = next(order)
        while len(ids) < case.batch_size:
            ids = next(order)
        loss = loss_of(torch.bernoulli(images[ids]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses = [step() for _ in range(case.num_steps)][-case.num_steps // 5 :]

    def more() -> int:
        for _ in range(100):
            step()
        return 100

    size = sum(p.numel() for p in model.parameters())
    return size, float(torch.stack(losses).mean()), more


def _torch_eager(case: Case) -> Ready:
    return _torch(case, compiled=False)


def _torch_compile(case: Case) -> Ready:
    return _torch(case, compiled=True)


def _pythae(case: Case) -> Ready:
    """pythae's own trainer with its default network; an epoch at a time, its own loss."""
    import logging
    import os

    from pythae.models import VAE, VAEConfig
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    logging.disable(logging.CRITICAL)
    os.environ["TQDM_DISABLE"] = "1"
    images = _images().splits["train"].images.transpose(0, 3, 1, 2) / np.float32(255)
    sizes = {"input_dim": (1, 28, 28), "latent_dim": case.latents}
    model = VAE(VAEConfig(**sizes, reconstruction_loss="bce"))
    config = BaseTrainerConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=case.batch_size,
        learning_rate=LEARNING_RATE,
    )
    trainer = BaseTrainer(model, _dataset(images), training_config=config)
    trainer.prepare_training()
    epochs = itertools.count(1)

    def more() -> int:
        trainer.train_step(next(epochs))
        return -(-len(images) // case.batch_size)

    return sum(p.numel() for p in model.parameters()), float("nan"), more


def _dataset(images: np.ndarray) -> Any:
    import torch
    from pythae.data.datasets import BaseDataset

    return BaseDataset(torch.tensor(images), torch.zeros(len(images)))


def _products(case: Case) -> Ready:
    """The matrix products of a step, forward and backward, in one scan with nothing else.

    Each takes what the one before gave, and the gradients take the place of the weights: no
    product can be left out or made once for all steps. The numbers overflow after a few steps;
    how long a product takes does not depend on them.
    """
    import jax
    import jax.numpy as jnp

    encoder = (784, *case.hidden, 2 * case.latents)
    decoder = (case.latents, *case.hidden[::-1], 784)
    x = jnp.ones((case.batch_size, 784))
    weights = [jnp.ones(pair) for s in (encoder, decoder) for pair in itertools.pairwise(s)]
    bottleneck = len(encoder) - 1

    def step(weights: list[jax.Array], _: None) -> tuple[list[jax.Array], None]:
        inputs, h = [], x
        for i, w in enumerate(weights):
            if i == bottleneck:
                h = jnp.tile(h[:, : case.latents], (case.num_samples, 1))
            inputs.append(h)
            h = h @ w
        gradients, g = [], h
        for i in reversed(range(len(weights))):
            gradients.append(inputs[i].T @ g)
            if i:  # nobody asks for the gradient at the images
                g = g @ weights[i].T
            if i == bottleneck:
                g = jnp.tile(g[: case.batch_size], (1, 2))
        return gradients[::-1], None

    run = jax.jit(lambda weights: jax.lax.scan(step, weights, None, length=100)[0])

    def more() -> int:
        jax.block_until_ready(run(weights))
        return 100

    return 0, float("nan"), more


CONTESTANTS: dict[str, Callable[[Case], Ready]] = {
    "dgm_jax": _dgm_jax,
    "dgm_jax, a dispatch per step": _dgm_jax_by_step,
    "PyTorch eager": _torch_eager,
    "torch.compile": _torch_compile,
    "pythae": _pythae,
    "matrix products alone": _products,
}
