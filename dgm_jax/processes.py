"""Several processes that make one run: joined by JAX, and told apart where only one may act.

Every process computes its devices' share of the same program, reads the same data and comes to the
same numbers; the first alone writes, but for checkpoints, and speaks.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dgm_jax.core import UserError

_LOST_AFTER = 60  # seconds without a sign of life


def join(how: str) -> None:
    """Become one of the processes of a run, before anything else is asked of JAX.

    Args:
      how: `auto`, where JAX knows the cluster: within SLURM's `srun`, on TPU pods, under Open MPI's
        `mpirun`; or `address:port,number of processes,number of this one`, from 0.

    Raises:
      UserError: `how` is neither, or nobody answers.
    """
    where: dict[str, Any] = {}
    if how != "auto":
        try:
            address, number, own = how.split(",")
            where = {"coordinator_address": address, "num_processes": int(number)}
            where["process_id"] = int(own)
        except ValueError:
            raise UserError(
                f"--distributed={how!r}: write auto, or address:port,number of processes,number of "
                "this one, such as 10.0.0.1:1234,4,0"
            ) from None
        if not 0 <= where["process_id"] < where["num_processes"]:
            raise UserError(f"--distributed={how!r}: processes are numbered from 0")
    jax.config.update("jax_enable_preemption_service", False)  # `interruption` sees to signals
    try:
        jax.distributed.initialize(**where, heartbeat_timeout_seconds=_LOST_AFTER)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--distributed={how!r}: the processes do not meet ({reason})") from error


def several() -> bool:
    """Whether there are others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return not several() or jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Return when every process has come here; `what` names the place."""
    if several():
        multihost_utils.sync_global_devices(what)


def largest(number: int) -> int:
    """Of the numbers that the processes give, each one."""
    if not several():
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def on_host(leaf: jax.Array) -> np.ndarray:
    """The whole of an array, wherever its parts are; every process must ask for it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = leaf if leaf.is_fully_replicated else _whole(leaf)
    return np.asarray(leaf)


def on_every_device(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process has, on all devices of all processes."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    if not several():
        return jax.device_put(tree, everywhere)
    # `device_put` would first send all of it round, to see whether it is the same.
    return jax.tree.map(
        lambda a: jax.make_array_from_callback(np.shape(a), everywhere, lambda at: a[at]), tree
    )


def _whole(leaf: jax.Array) -> np.ndarray:
    return multihost_utils.process_allgather(leaf, tiled=True)
