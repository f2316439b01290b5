"""The same training in several programs: what `benchmark.py` times, a process for each.

All train one network on the same images, binarised anew at every visit, with Adam. This project
also computes the gradient's norm, to log it and to clip by it, though at a norm never reached; the
others do neither.
"""

import functools
import itertools
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LEARNING_RATE = 1e-3
NUM_DRAWS = 100  # K, posterior draws for each validation image


class MLPCase(NamedTuple):
    """784-hidden-latents-hidden-784.

    Attributes:
      batch_size: B.
      num_steps: updates before the losses are compared.
      hidden: widths of the encoder; the decoder's are the reverse.
      latents: L.
      num_samples: K; above 1 the objective is IWAE's.
      activation: between the layers.
      steps_per_call: updates in one call of `Trainer.train`.
    """

    batch_size: int
    num_steps: int = 1000
    hidden: tuple[int, ...] = (200, 200)
    latents: int = 50
    num_samples: int = 1
    activation: str = "silu"
    steps_per_call: int = 100

    @property
    def model(self) -> dict[str, Any]:
        """The `model` section of this project's config."""
        return {
            "name": "vae",
            "encoder": self.hidden,
            "decoder": self.hidden[::-1],
            "latents": self.latents,
            "activation": self.activation,
            "num_samples": self.num_samples,
            "objective": "elbo" if self.num_samples == 1 else "iwae",
        }

    def torch_network(self, mean: Any) -> Any:
        """The same in PyTorch, for images of this `mean`."""
        from torch_networks import MLPVAE

        return MLPVAE(self.hidden, self.latents, self.num_samples, self.activation, mean)


class TopDownCase(NamedTuple):
    """The network of configs/topdown_mnist.py.

    Attributes:
      batch_size, num_steps, steps_per_call: as in `MLPCase`.
      layers, latents, channels, width: as in `dgm_jax.models.topdown.Config`.
    """

    batch_size: int
    num_steps: int
    layers: tuple[int, ...] = (0, 3, 3)
    latents: int = 4
    channels: int = 32
    width: int = 32
    steps_per_call: int = 10

    @property
    def model(self) -> dict[str, Any]:
        """The `model` section of this project's config."""
        fields = ("layers", "latents", "channels", "width")
        return {"name": "topdown", **{field: getattr(self, field) for field in fields}}

    def torch_network(self, mean: Any) -> Any:
        """The same in PyTorch, for images of this `mean`."""
        from torch_networks import TopDownVAE

        return TopDownVAE(self.layers, self.latents, self.channels, self.width, mean)


Case = MLPCase | TopDownCase
CASES: dict[str, Case] = {
    "MLP VAE, batch 20": MLPCase(20),
    "MLP VAE, batch 100": MLPCase(100),
    "MLP VAE, batch 512": MLPCase(512, 600),
    "IWAE, K = 50, batch 20": MLPCase(20, 300, num_samples=50),
    "top-down VAE, batch 32": TopDownCase(32, 200),
    "pythae's MLP, batch 100": MLPCase(100, hidden=(512,), activation="relu"),
}


class Trainer(NamedTuple):
    """A program that is ready to train.

    Attributes:
      num_parameters: of the network.
      train: makes some steps, waits for them, and gives the loss of each, float `[steps]`, nats per
        image.
      evaluate: `() -> (-ELBO, NLL)` of the validation split, nats per image, from the same
        `NUM_DRAWS` draws; None where nobody asks.
    """

    num_parameters: int
    train: Callable[[], np.ndarray]
    evaluate: Callable[[], tuple[float, float]] | None = None


def measure(contestant: str, case: str, seconds: float) -> dict[str, Any]:
    """Train as the case says, then time more steps for some seconds.

    Returns:
      `images_per_second`; `loss`, nats per image, of training, mean of the last fifth of the case's
      steps; `num_parameters`; `memory_mib`, resident before and after the timed steps.
    """
    batch_size, num_steps, *_ = CASES[case]
    trainer, losses = CONTESTANTS[contestant](CASES[case]), np.zeros(0)
    while len(losses) < num_steps:
        losses = np.append(losses, trainer.train())
    loss = float(losses[:num_steps][-num_steps // 5 :].mean())
    before, steps, began = resident_mib(), 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        steps += len(trainer.train())
    return {
        "images_per_second": steps * batch_size / (time.perf_counter() - began),
        "loss": loss,
        "num_parameters": trainer.num_parameters,
        "memory_mib": [before, resident_mib()],
    }


def resident_mib() -> int:
    """Memory of this process that is in RAM now, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("VmRSS:"))
    return int(kib) // 1024


@functools.cache
def dataset() -> Any:
    """The data of all contestants: `dgm_jax.data.dataset.Dataset`."""
    from dgm_jax.data.dataset import Config, load

    return load(Config(), announce=lambda line: None)


def train_x() -> Any:
    """The training split for PyTorch: float `[N, 784]` in [0, 1]."""
    import torch

    return torch.tensor(dataset().splits["train"].x).reshape(-1, 784) / 255


def _dgm_jax(case: Case, by_step: bool = False) -> Trainer:
    """This project, or its step dispatched `by_step`."""
    return compiled_run(config_of(case, by_step), case.steps_per_call)


def config_of(case: Case, by_step: bool = False) -> Any:
    """The case with the optimizer that all contestants have, for this project."""
    from dgm_jax import config as configs

    return configs.override(
        configs.experiment(case.model["name"]),
        {
            "train.batch_size": case.batch_size,
            "train.duration": "1000000 steps",  # the learning rate is all but constant
            "train.steps_per_dispatch": 1 if by_step else case.steps_per_call,
            "optimizer.learning_rate": LEARNING_RATE,
            "optimizer.warmup": 0.0,
            "optimizer.clip_norm": 1e9,
            "optimizer.ema": 0.0,
            **{f"model.{field}": value for field, value in case.model.items()},
        },
    )


def compiled_run(config: Any, steps_per_call: int) -> Trainer:
    """A run of this project."""
    import jax

    from dgm_jax.evaluators import likelihood, passes
    from dgm_jax.experiment import compile_steps, initial_state, prepare, training_arrays
    from dgm_jax.train_state import num_parameters

    experiment = prepare(config, dataset())
    arrays, run = training_arrays(experiment), compile_steps(experiment)
    state = initial_state(experiment)

    def train() -> np.ndarray:
        nonlocal state
        losses = []
        for _ in range(steps_per_call // experiment.steps_per_dispatch):
            state, measured = run(state, arrays)
            losses.append(measured[f"{config.model.name}/loss"])
        return np.concatenate(jax.device_get(losses))

    bound = likelihood.importance_weighted(experiment.model, NUM_DRAWS, config.eval.chunk)
    evaluation = (experiment.dataset, "validation", config.eval.batch_size, experiment.mesh)
    bounds = passes.compile_pass(bound, *evaluation)

    def evaluate() -> tuple[float, float]:
        found = bounds(state.eval_params, config.seed)
        elbo, many = (found[f"importance_weighted_bound{k}"].mean() for k in ("_1", ""))
        return -float(elbo), -float(many)

    return Trainer(num_parameters(state.params), train, evaluate)


def torch_trainer(case: Case, compiled: bool = False, seed: int = 0) -> Trainer:
    """The network in PyTorch, its data in memory, fused Adam; no value leaves it in the loop."""
    import torch

    torch.manual_seed(seed)
    images = train_x()
    network = case.torch_network(images.mean(0))
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
    loss_of = torch.compile(network) if compiled else network

    def batches() -> Iterator[torch.Tensor]:
        while True:
            epoch = torch.randperm(len(images)).split(case.batch_size)
            yield from epoch[: len(images) // case.batch_size]

    ids = batches()

    def step() -> torch.Tensor:
        loss = loss_of(torch.bernoulli(images[next(ids)]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def train() -> np.ndarray:
        return torch.stack([step() for _ in range(case.steps_per_call)]).numpy()

    return Trainer(_size(network), train, functools.partial(_evaluate_torch, network))


def _size(network: Any) -> int:
    return sum(p.numel() for p in network.parameters())


def _evaluate_torch(network: Any) -> tuple[float, float]:
    """`Trainer.evaluate` of an `MLPVAE`: the images and bits that this project is measured on."""
    import jax.numpy as jnp
    import torch

    from dgm_jax.data.dataset import held_out_batch

    split = dataset().splits["validation"]
    arrays = jnp.asarray(split.x), jnp.asarray(split.labels)
    x = held_out_batch(dataset(), "validation", *arrays, jnp.arange(len(split)))["x"]
    generator, log_w = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for part in torch.tensor(np.asarray(x)).reshape(-1, 784).split(50):
            shape = (NUM_DRAWS, len(part), network.latents)
            log_w.append(network.log_weights(part, torch.randn(shape, generator=generator)))
    log_w = torch.cat(log_w, 1)
    bound = torch.logsumexp(log_w, 0) - math.log(NUM_DRAWS)
    return -float(log_w.mean()), -float(bound.mean())


def pythae_trainer(
    case: MLPCase, network: Any = None, learning_rate: float = LEARNING_RATE, seed: int = 0
) -> Trainer:
    """pythae's own trainer, an epoch at a time, with its default network or that of an `MLPVAE`."""
    import torch
    from pythae.data.datasets import BaseDataset, DatasetOutput
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    logging.disable(logging.CRITICAL)

    class Binarised(BaseDataset):
        def __getitem__(self, index: int) -> DatasetOutput:
            return DatasetOutput(data=torch.bernoulli(self.data[index]), labels=self.labels[index])

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> ModelOutput:
            mu, sigma = self.network.posterior(x.flatten(1))
            return ModelOutput(embedding=mu, log_covariance=2 * sigma.log())

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = network.decoder

        def forward(self, z: torch.Tensor) -> ModelOutput:
            mean = torch.sigmoid(self.decoder(z))
            return ModelOutput(reconstruction=mean.reshape(-1, 1, 28, 28))

    images = train_x().reshape(-1, 1, 28, 28)
    config = VAEConfig((1, 28, 28), case.latents, reconstruction_loss="bce")
    model = VAE(config, Encoder(), Decoder()) if network else VAE(config)
    trainer = BaseTrainer(
        model,
        Binarised(images, torch.zeros(len(images))),
        training_config=BaseTrainerConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=case.batch_size,
            learning_rate=learning_rate,
            seed=seed,
        ),
    )
    trainer.prepare_training()
    losses: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, inputs, output: losses.append(output.loss.detach()))
    epochs = itertools.count(1)

    def train() -> np.ndarray:
        losses.clear()
        trainer.train_step(next(epochs))
        return torch.stack(losses).numpy()

    return Trainer(_size(model), train, functools.partial(_evaluate_torch, network))


def measure_limit(case: str, seconds: float) -> dict[str, Any]:
    """`measure` of nothing but the matrix products of this project's step, back to back."""
    from dgm_jax import limit
    from dgm_jax.experiment import prepare, step_products

    chosen = CASES[case]
    products = step_products(prepare(config_of(chosen), dataset()))
    before = resident_mib()
    alone = limit.seconds_alone(products, seconds)
    return {
        "images_per_second": chosen.batch_size / alone,
        "gflops": limit.num_operations(products) / alone / 1e9,
        "memory_mib": [before, resident_mib()],
    }


CONTESTANTS: dict[str, Callable[[Case], Trainer]] = {
    "dgm_jax": _dgm_jax,
    "dgm_jax, a dispatch per step": functools.partial(_dgm_jax, by_step=True),
    "PyTorch eager": torch_trainer,
    "torch.compile": functools.partial(torch_trainer, compiled=True),
    "pythae": pythae_trainer,
}
