"""Several processes that make one run: joined by JAX, and told apart where only one may act.

Every process computes its devices' share of the same program, holds the same data and comes to the
same numbers; the first alone writes, but for checkpoints, and speaks.
"""

import ctypes
import functools
import hashlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from dgm_jax import sharding
from dgm_jax.core import UserError
from dgm_jax.interruption import TRY_AGAIN

_MEET_WITHIN = 300  # seconds that processes may start apart
_LEAVE_WITHIN = 10  # seconds that one which fails waits for the others to do so
_FAILED = 78  # EX_CONFIG: above `TRY_AGAIN`, since of several statuses SLURM tells the highest


def join(how: str, lost_after: int) -> None:
    """Become one of the processes of a run, before anything else is asked of JAX.

    From then on a process that misses another ends, with a line that says so and the status
    `TRY_AGAIN`.

    Args:
      how: `auto`, where JAX knows the cluster: within SLURM's `srun`, on TPU pods, under Open MPI's
        `mpirun`; or `address:port,number of processes,number of this one`, from 0.
      lost_after: seconds without a sign of life after which a process is missed.

    Raises:
      UserError: `how` is neither.
    """
    where: dict[str, Any] = {}
    if how != "auto":
        try:
            address, number, own = how.split(",")
            where = {"coordinator_address": address, "num_processes": int(number)}
            where["process_id"] = int(own)
            int(address.rpartition(":")[2])  # the port
        except ValueError:
            raise UserError(
                f"--distributed={how!r}: write auto, or address:port,number of processes,number of "
                "this one, such as 10.0.0.1:1234,4,0"
            ) from None
        if not 0 <= where["process_id"] < where["num_processes"]:
            raise UserError(f"--distributed={how!r}: processes are numbered from 0")
    jax.config.update("jax_enable_preemption_service", False)  # `interruption` sees to signals
    _when_jax_aborts(f"the processes of --distributed={how} do not meet in {_MEET_WITHIN} s")
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=_MEET_WITHIN,
            heartbeat_timeout_seconds=lost_after,
            # At the end the others wait for the first to draw its pictures.
            shutdown_timeout_seconds=24 * 60 * 60,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--distributed={how!r}: JAX finds no cluster here ({reason}): write "
            "address:port,number of processes,number of this one"
        ) from error
    _when_jax_aborts(
        "another process of this run is lost, and this one ends with it; started again, all go on "
        "from the last checkpoint"
    )


def _when_jax_aborts(line: str) -> None:
    """Say `line` and end with the status `TRY_AGAIN`.

    JAX ends a process that misses another by abort(), from a thread of its own, whatever the others
    are waiting for; that is the one thing that a hook can be put on.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def end(signum: int) -> None:
        print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(TRY_AGAIN)

    _hooks.append(end)  # for as long as C may call it
    ctypes.CDLL(None).signal(signal.SIGABRT, end)


_hooks: list[Any] = []


@contextmanager
def ending(lost_after: Callable[[], int]) -> Iterator[None]:
    """Within it, a process that fails ends, though others may wait for it and it for others.

    Where all fail alike they end together, each with its own status. An exception that nobody
    expected may be that another process is lost: JAX, which then ends this one too, knows by
    `lost_after`.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized() or _is_success(error):
            raise
        if isinstance(error, SystemExit):
            status = error.code
        else:
            time.sleep(lost_after() + _LEAVE_WITHIN)
            status = "".join(traceback.format_exception(error))
        if isinstance(status, str):
            print(status, file=sys.stderr, flush=True)
            status = _FAILED
        alone = threading.Timer(_LEAVE_WITHIN, os._exit, [status])
        alone.daemon = True
        alone.start()
        jax.distributed.shutdown()  # returns when all have come here
        os._exit(status)


def _is_success(error: BaseException) -> bool:
    return isinstance(error, SystemExit) and not error.code


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


def any_of(own: bool) -> bool:
    """Whether it is so for any process; all must ask."""
    return bool(_largest(own)) if several() else own


def refuse_unlike(what: str) -> None:
    """Refuse processes of one run that were not told the same; all must ask.

    Args:
      what: this process was told: its config and data.

    Raises:
      UserError: in all of them.
    """
    if not several():
        return
    own = np.frombuffer(hashlib.sha256(what.encode()).digest(), np.uint8)
    if any_of(bool((multihost_utils.broadcast_one_to_all(own) != own).any())):
        raise UserError(
            "the processes of this run have other configs or other data: give all the same "
            "flags, and the same files where they look for data"
        )


def heard() -> Callable[[int], int]:
    """What tells the largest number that any process has given it, 0 or more; all must ask alike.

    Of several processes it is the largest of those given the time before: what travels does so
    behind the work that the devices have, and nobody waits for it. One process knows at once.
    """
    if not several():
        return lambda own: own
    travelling = _largest(0)

    def exchange(own: int) -> int:
        nonlocal travelling
        arrived, travelling = travelling, _largest(own)
        return int(arrived)

    return exchange


def _largest(own: int) -> jax.Array:
    """int32 `[]`, on its way: of the numbers that the processes give."""
    place, largest = _exchange()
    given = jax.make_array_from_callback(
        (jax.device_count(),), place, lambda at: np.full(1, own, np.int32)
    )
    return largest(given)


@functools.cache
def _exchange() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    mesh = sharding.make_mesh()
    return sharding.split_batch(mesh), jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))


def on_host(leaf: jax.Array) -> np.ndarray:
    """The whole of an array, wherever its parts are; every process must ask for it."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def on_every_device(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process has, on all devices of all processes."""
    everywhere = sharding.replicated(mesh)
    if not several():
        return jax.device_put(tree, everywhere)
    # `device_put` would first send all of it round, to see whether it is the same.
    return jax.tree.map(
        lambda a: jax.make_array_from_callback(np.shape(a), everywhere, lambda at: a[at]), tree
    )
