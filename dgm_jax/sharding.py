"""Devices: one mesh axis, `data`. Batches are split along it; the state may be."""

import dataclasses
import os
from contextlib import suppress
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dgm_jax.core import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """The `mesh` section.

    Attributes:
      fsdp: divide parameters, their averages and the optimizer's state over the devices instead of
        keeping all of them on each ("fully sharded data parallel"): less memory, more exchange,
        the same results.
    """

    fsdp: bool = False


def share_cores(most: int) -> None:
    """Make each core of a CPU a device, where JAX has not started yet and nobody has said how many.

    Beside an accelerator the CPU is there too, even where `JAX_PLATFORMS` names that alone.

    Work that needs no exchange, as a sweep's members, then runs side by side, instead of dividing
    each small operation over all cores.

    Args:
      most: devices that there is work for.
    """
    # A sweep restores its checkpoints into the CPU's memory.
    if (platforms := jax.config.jax_platforms) and "cpu" not in platforms.split(","):
        jax.config.update("jax_platforms", f"{platforms},cpu")
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", min(most, os.cpu_count() or 1))


def make_mesh(num: int | None = None) -> Mesh:
    """The first `num` devices on the axis `data`; all that there are by default."""
    devices = jax.devices()[:num]
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


def rounded_up(size: int, mesh: Mesh) -> int:
    """`size`, or as many more as the devices need to share it equally."""
    return -(-size // mesh.size) * mesh.size


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The leading axis divided over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def split_second(mesh: Mesh) -> NamedSharding:
    """The second axis divided over the devices."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def of_state(state: Any, mesh: Mesh, config: Config) -> Any:
    """On which devices each leaf of a state is: a pytree of shardings like `state`.

    With `fsdp` the longest axis that the devices can share equally is divided over them; a leaf
    that has none is on every device, as all are without.
    """

    def of(leaf: Any) -> NamedSharding:
        shared = [i for i, size in enumerate(leaf.shape) if size and size % mesh.size == 0]
        if not (config.fsdp and shared):
            return replicated(mesh)
        longest = max(shared, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "data"))

    return jax.tree.map(of, state)


def check_parts(num_parts: int, batch_size: int, num_devices: int) -> None:
    """Refuse `train.num_parts` into which the devices' shares of a batch cannot be cut.

    Raises:
      UserError: names the two fields.
    """
    if num_parts < 1 or batch_size % (num_parts * num_devices):
        raise UserError(
            f"train.num_parts={num_parts}: train.batch_size={batch_size} on {num_devices} "
            "device(s) cannot be cut into so many equal parts"
        )


def check_batch(batch_size: int, num_devices: int) -> None:
    """Refuse a `train.batch_size` that so many devices cannot share equally.

    Raises:
      UserError: names the nearest sizes that can be.
    """
    n = num_devices
    if batch_size < 1 or batch_size % n:
        below = max(batch_size // n, 1) * n
        raise UserError(
            f"train.batch_size={batch_size} cannot be divided over {n} device(s); "
            f"nearest: {below} or {below + n}"
        )
