"""The same training in several programs: what `benchmark.py` times, a process for each.

All train one network on the same data, images binarised anew at every visit where the model is of
bits, with Adam. This project also computes the gradient's norm, to log it and to clip by it, though
at a norm never reached; the others do neither.
"""

import dataclasses
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

REPO = Path(__file__).resolve().parent.parent
LEARNING_RATE = 1e-3
NUM_DRAWS = 100  # K, posterior draws for each validation image
WHOLE, BY_STEP = "dgm_jax, batch in one part", "dgm_jax, a dispatch per step"
EAGER, COMPILED, PYTHAE = "PyTorch eager", "torch.compile", "pythae"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and by whom.

    Attributes:
      batch_size: B.
      num_steps: updates before the losses are compared.
      steps_per_call: updates in one call of `Trainer.train`.
      num_parts: into which this project cuts a batch; the update is that of the whole.
      peers: programs that train it beside this project.
      tolerance: relative, of losses that count as equal. Other seeds change an MLP's by 1 %, the
        top-down VAE's after 200 steps by 7 %.
    """

    batch_size: int
    num_steps: int
    steps_per_call: int = 10
    num_parts: int = 1
    peers: tuple[str, ...] = (EAGER, COMPILED)
    tolerance: float = 0.1

    @property
    def config(self) -> Any:
        """What this project trains."""
        raise NotImplementedError

    def torch_network(self, x: Any) -> Any:
        """The same in PyTorch, for the training split `x` of `train_x`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPCase(Case):
    """784-hidden-latents-hidden-784.

    Attributes, further ones:
      hidden: widths of the encoder; the decoder's are the reverse.
      latents: L.
      num_samples: K; above 1 the objective is IWAE's.
      activation: between the layers.
    """

    num_steps: int = 1000
    steps_per_call: int = 100
    hidden: tuple[int, ...] = (200, 200)
    latents: int = 50
    num_samples: int = 1
    activation: str = "silu"

    @property
    def config(self) -> Any:
        """As in `Case`."""
        fields = {
            "encoder": self.hidden,
            "decoder": self.hidden[::-1],
            "latents": self.latents,
            "activation": self.activation,
            "num_samples": self.num_samples,
            "objective": "elbo" if self.num_samples == 1 else "iwae",
        }
        return _experiment("vae", fields)

    def torch_network(self, x: Any) -> Any:
        """As in `Case`."""
        from torch_networks import MLPVAE

        return MLPVAE(self.hidden, self.latents, self.num_samples, self.activation, x.mean(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopDownCase(Case):
    """The network of configs/topdown_mnist.py; further attributes as in `models.topdown.Config`."""

    layers: tuple[int, ...] = (0, 3, 3)
    latents: int = 4
    channels: int = 32
    width: int = 32

    @property
    def config(self) -> Any:
        """As in `Case`."""
        fields = ("layers", "latents", "channels", "width")
        return _experiment("topdown", {field: getattr(self, field) for field in fields})

    def torch_network(self, x: Any) -> Any:
        """As in `Case`."""
        from torch_networks import TopDownVAE

        return TopDownVAE(self.layers, self.latents, self.channels, self.width, x.mean(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileCase(Case):
    """What a config file says, but for its optimizer.

    Attributes, further ones:
      file: of configs/, without its ending.
      network: class of `torch_networks`, made from the config's `model` and the training split.
    """

    file: str
    network: str

    @property
    def config(self) -> Any:
        """As in `Case`."""
        from dgm_jax import config as configs

        return configs.load(str(REPO / "configs" / f"{self.file}.py"))

    def torch_network(self, x: Any) -> Any:
        """As in `Case`."""
        import torch_networks

        return getattr(torch_networks, self.network)(self.config.model, x)


def _experiment(model: str, fields: dict[str, Any]) -> Any:
    """A model of this project with some of its fields, on dynamically binarised MNIST."""
    from dgm_jax import config as configs

    named = {f"model.{field}": value for field, value in fields.items()}
    return configs.override(configs.experiment(model), named)


CASES: dict[str, Case] = {
    "MLP VAE, batch 20": MLPCase(batch_size=20),
    "MLP VAE, batch 100": MLPCase(batch_size=100),
    "MLP VAE, batch 512": MLPCase(batch_size=512, num_steps=600),
    "IWAE, K = 50, batch 20": MLPCase(batch_size=20, num_steps=300, num_samples=50),
    "top-down VAE, batch 32": TopDownCase(batch_size=32, num_steps=200, num_parts=2),
    "U-Net, batch 100": FileCase(
        file="flow_matching_mnist",
        network="FlowMatching",
        batch_size=100,
        num_steps=100,
        num_parts=4,
    ),
    "Transformer, batch 32": FileCase(
        file="transformer_shakespeare", network="Transformer", batch_size=32, num_steps=100
    ),
    "GAN, batch 64": FileCase(
        file="gan_mnist",
        network="GAN",
        batch_size=64,
        num_steps=400,
        num_parts=2,
        peers=(EAGER,),  # torch.compile has no gradient of a gradient, which the penalty is
        tolerance=0.3,  # PyTorch's own loss after these steps is 0.175 or 0.208 by the seed
    ),
    "pythae's MLP, batch 100": MLPCase(
        batch_size=100, hidden=(512,), activation="relu", peers=(PYTHAE,)
    ),
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
    batch_size, num_steps = CASES[case].batch_size, CASES[case].num_steps
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
def dataset(file: str = "vae_mnist") -> Any:
    """The data of a config file, the same for all contestants: `dgm_jax.data.dataset.Dataset`."""
    from dgm_jax import config as configs
    from dgm_jax.data.dataset import load

    config = configs.load(str(REPO / "configs" / f"{file}.py"))
    return load(configs.section(config, "data"), announce=lambda line: None)


def dataset_of(case: Case) -> Any:
    """The data of a case."""
    return dataset(case.file) if isinstance(case, FileCase) else dataset()


def train_x(data: Any) -> Any:
    """The training split for PyTorch: images float `[N, 784]` in [0, 1], tokens int64 `[N, T]`."""
    import torch

    x = torch.tensor(data.splits["train"].x)
    if data.spec.support == "tokens":
        return x.long()
    return x.reshape(len(x), -1) / 255


def _dgm_jax(case: Case, by_step: bool = False) -> Trainer:
    """This project, or its step dispatched `by_step`."""
    return compiled_run(config_of(case, by_step), case.steps_per_call, dataset_of(case))


def _whole(case: Case) -> Trainer:
    """This project, its batch in one part."""
    return _dgm_jax(dataclasses.replace(case, num_parts=1))


def config_of(case: Case, by_step: bool = False) -> Any:
    """The case with the optimizer that all contestants have, for this project."""
    from dgm_jax import config as configs

    config = case.config
    config.optimizer.update(configs.experiment(config.model.name).optimizer)
    return configs.override(
        config,
        {
            "train.batch_size": case.batch_size,
            "train.num_parts": case.num_parts,
            "train.duration": "100000 steps",  # more than are made
            "train.steps_per_dispatch": 1 if by_step else case.steps_per_call,
            "train.ramp": "",
            "optimizer.learning_rate": LEARNING_RATE,
            "optimizer.schedule": "constant",
            "optimizer.warmup": 0.0,
            "optimizer.clip_norm": 1e9,
            "optimizer.ema": 0.0,
        },
    )


def compiled_run(config: Any, steps_per_call: int, data: Any) -> Trainer:
    """A run of this project; `evaluate` is for what has an encoder."""
    import jax

    from dgm_jax.evaluators import likelihood, passes
    from dgm_jax.experiment import compile_steps, initial_state, prepare, training_arrays
    from dgm_jax.train_state import num_parameters

    experiment = prepare(config, data)
    arrays, run = training_arrays(experiment), compile_steps(experiment)
    state, (player, *_) = initial_state(experiment), experiment.model.players

    def train() -> np.ndarray:
        nonlocal state
        losses = []
        for _ in range(steps_per_call // experiment.steps_per_dispatch):
            state, measured = run(state, arrays)
            losses.append(measured[f"{player.name}/loss"])
        return np.concatenate(jax.device_get(losses))

    @functools.cache
    def bounds() -> Any:
        bound = likelihood.importance_weighted(experiment.model, NUM_DRAWS, config.eval.chunk)
        where = (experiment.dataset, "validation", config.eval.batch_size, experiment.mesh)
        return passes.compile_pass(bound, *where)

    def evaluate() -> tuple[float, float]:
        found = bounds()(state.eval_params, config.seed)
        elbo, many = (found[f"importance_weighted_bound{k}"].mean() for k in ("_1", ""))
        return -float(elbo), -float(many)

    return Trainer(num_parameters(state.params), train, evaluate)


def torch_trainer(case: Case, compiled: bool = False, seed: int = 0) -> Trainer:
    """The network in PyTorch, its data in memory, fused Adam; no value leaves it in the loop."""
    import torch

    torch.manual_seed(seed)
    data = dataset_of(case)
    examples, bits = train_x(data), data.spec.support == "binary"
    network = case.torch_network(examples)

    def player(own: Any) -> tuple[Callable, Any]:
        adam = torch.optim.Adam(own.parameters(), lr=LEARNING_RATE, fused=True)
        return torch.compile(own) if compiled else own, adam

    players = [player(own) for own in getattr(network, "players", [network])]

    def batches() -> Iterator[torch.Tensor]:
        while True:
            epoch = torch.randperm(len(examples)).split(case.batch_size)
            yield from epoch[: len(examples) // case.batch_size]

    ids = batches()

    def step() -> torch.Tensor:
        x = examples[next(ids)]
        x = torch.bernoulli(x) if bits else x
        losses = []
        for loss_of, optimizer in players:
            loss = loss_of(x)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses[0]

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

    images = train_x(dataset()).reshape(-1, 1, 28, 28)
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
    products = step_products(prepare(config_of(chosen), dataset_of(chosen)))
    before = resident_mib()
    alone = limit.seconds_alone(products, seconds)
    return {
        "images_per_second": chosen.batch_size / alone,
        "gflops": limit.num_operations(products) / alone / 1e9,
        "memory_mib": [before, resident_mib()],
    }


CONTESTANTS: dict[str, Callable[[Case], Trainer]] = {
    "dgm_jax": _dgm_jax,
    WHOLE: _whole,
    BY_STEP: functools.partial(_dgm_jax, by_step=True),
    EAGER: torch_trainer,
    COMPILED: functools.partial(torch_trainer, compiled=True),
    PYTHAE: pythae_trainer,
}
