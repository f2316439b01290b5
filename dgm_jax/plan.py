"""`--mode=plan`: what a step costs on each of many devices, before anybody pays for them.

The real step is compiled for simulated devices; nothing is run. What it holds is counted from the
program, and the roofline says how fast named hardware could be at best.

Reference: Williams et al. 2009, "Roofline: an insightful visual performance model".
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dgm_jax import limit, sharding
from dgm_jax.core import UserError
from dgm_jax.experiment import compile_steps, prepare, step_products
from dgm_jax.progress import say
from dgm_jax.run import load_data


class Hardware(NamedTuple):
    """One accelerator, by its maker's public figures.

    Attributes:
      flops: dense bfloat16 products, operations/s.
      memory_bandwidth: bytes/s.
      memory: bytes.
      network: bytes/s in one direction to the other devices of a pod or node.
    """

    flops: float
    memory_bandwidth: float
    memory: float
    network: float


# Google's documentation of Cloud TPU, NVIDIA's data sheets (SXM); as of 2026.
HARDWARE = {
    "TPU v5e": Hardware(197e12, 819e9, 16e9, 100e9),
    "TPU v5p": Hardware(459e12, 2765e9, 95e9, 300e9),
    "TPU v6e": Hardware(918e12, 1640e9, 32e9, 224e9),
    "A100 80GB": Hardware(312e12, 2039e9, 80e9, 300e9),
    "H100": Hardware(989e12, 3350e9, 80e9, 450e9),
    "B200": Hardware(2250e12, 8000e9, 180e9, 900e9),
}


class Cost(NamedTuple):
    """What one step costs each of several devices.

    Attributes:
      devices: how many share the batch.
      operations: of its share of the matrix products.
      bytes_accessed: read and written, by XLA's count, which takes one round of each loop, such as
        that over `train.num_parts`.
      state_bytes: of parameters, optimizer and average, its part of those that are divided.
      data_bytes: of the training split, which is whole on each.
      temporary_bytes: most that is held at once beside these.
      exchanged_bytes: sent by the collectives, which pass around a ring; those of a loop, such as
        that over `train.num_parts`, once.
    """

    devices: int
    operations: float
    bytes_accessed: float
    state_bytes: float
    data_bytes: float
    temporary_bytes: float
    exchanged_bytes: float

    def seconds(self, hardware: Hardware) -> float:
        """Of one step at best: the slower of arithmetic and memory, then the exchange."""
        alone = max(
            self.operations / hardware.flops, self.bytes_accessed / hardware.memory_bandwidth
        )
        return alone + self.exchanged_bytes / hardware.network

    @property
    def memory(self) -> float:
        """Bytes that a device must have."""
        return self.state_bytes + self.data_bytes + self.temporary_bytes


def plan_mode(config: ConfigDict, devices: Sequence[str]) -> None:
    """Say what a step of `config` costs on each number of devices, and how fast it could be.

    Raises:
      UserError: a number of devices makes no sense, or they cannot share the batch.
    """
    if not devices or not all(text.isdigit() and int(text) for text in devices):
        raise UserError(f"--devices={','.join(devices)}: give whole numbers of at least 1")
    numbers = sorted({int(text) for text in devices})
    for num in numbers:  # before any takes minutes to compile
        sharding.check_batch(config.train.batch_size, num)
        sharding.check_parts(config.train.num_parts, config.train.batch_size, num)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", numbers[-1])
    dataset, costs = load_data(config), []
    for num in numbers:
        say(f"compiling the step for {num:,} device(s)")
        costs.append(cost_of(config, dataset, num))
    say(f"\n{table(costs)}\n\n{predictions(costs)}")


def cost_of(config: ConfigDict, dataset: object, num: int) -> Cost:
    """What one step costs each of `num` devices, which can share its batch."""
    mesh = sharding.make_mesh(num)
    one_step = config.copy_and_resolve_references()
    one_step.train.steps_per_dispatch = 1
    experiment = prepare(one_step, dataset, mesh)
    split, everywhere = dataset.splits["train"], sharding.replicated(mesh)
    arrays = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=everywhere)
        for name, array in (("x", split.x), ("labels", split.labels))
    }
    state = experiment.abstract_state
    compiled = compile_steps(experiment).lower(state, arrays).compile()
    return Cost(
        devices=num,
        operations=limit.num_operations(step_products(experiment)),
        bytes_accessed=compiled.cost_analysis()["bytes accessed"],
        state_bytes=_num_bytes(state),
        data_bytes=_num_bytes(arrays),
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        exchanged_bytes=exchanged(compiled.as_text(), num),
    )


def _num_bytes(tree: object) -> float:
    """Of arrays that are not there yet, on each of the devices where they will be."""
    sizes = (
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
    return float(sum(sizes))


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
# How often a device sends what it gets of a collective, of n devices in a ring.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "collective-permute": lambda n: 1,
}
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(_SENT)})(?:-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def exchanged(program: str, devices: int) -> float:
    """Bytes that each device sends, by the collectives in a compiled program's text."""
    total = 0.0
    for shapes, collective in _COLLECTIVE.findall(program):
        for kind, sides in _ARRAY.findall(shapes):
            size = _BYTES.get(kind, 4) * math.prod(int(side) for side in sides.split(",") if side)
            total += _SENT[collective](devices) * size
    return total


def table(costs: Sequence[Cost]) -> str:
    """What was counted, a line for each number of devices."""
    lines = ["each device, each step"]
    head = (
        "devices",
        "GFLOP",
        "MB accessed",
        "MB state",
        "MB data",
        "MB temporary",
        "MB exchanged",
    )
    rows = [
        (f"{c.devices:,}", f"{c.operations / 1e9:.3f}", *(f"{b / 1e6:,.2f}" for b in c[2:]))
        for c in costs
    ]
    return "\n".join([*lines, *_aligned([head, *rows])])


def predictions(costs: Sequence[Cost]) -> str:
    """Milliseconds of a step at best on each hardware, and the efficiency of more devices."""
    names = [f"{cost.devices:,} device(s)" for cost in costs]
    rows = [("ms a step at best (efficiency)", *names)]
    for name, hardware in HARDWARE.items():
        first, cells = costs[0], []
        for cost in costs:
            seconds = cost.seconds(hardware)
            work = first.seconds(hardware) * first.devices / (seconds * cost.devices)
            cells.append(f"{1e3 * seconds:.3f} ({work:.0%})")
            if cost.memory > hardware.memory:
                cells[-1] = f"needs {cost.memory / 1e9:,.0f} GB"
        rows.append((name, *cells))
    note = (
        "By bfloat16 products, memory and network at their makers' figures; real steps are\n"
        "slower, small ones by far, since each of their kernels takes some microseconds to start."
    )
    return "\n".join([*_aligned(rows), note])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
