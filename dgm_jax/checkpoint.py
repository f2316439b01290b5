"""Orbax checkpoints of a run, verified when they are read back."""

import functools
import hashlib
import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dgm_jax import files, processes
from dgm_jax.core import UserError
from dgm_jax.files import reason
from dgm_jax.train_state import TrainState

# Its import takes as long as JAX's: at run time only where there is something to read or save.
if TYPE_CHECKING:
    import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints in one directory; saves asynchronously, keeps the newest few.

    A checkpoint is the train state and the SHA-256 of its values: Orbax does not notice a flipped
    bit in a data file.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        """Open `directory`, which is made when the first checkpoint is saved.

        Args:
          directory: where the checkpoints are.
          keep: how many to keep, the newest ones; at least 2, so that there is one to fall back
            to.
        """
        self._directory, self._keep = directory.absolute(), keep

    @functools.cached_property
    def _manager(self) -> "ocp.CheckpointManager":
        import orbax.checkpoint as ocp

        return ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=False),
            item_names=("state", "digest"),
        )

    def save(self, state: TrainState) -> None:
        """Start saving `state` and return; a save still running is waited for first."""
        import orbax.checkpoint as ocp

        self._directory.mkdir(parents=True, exist_ok=True)
        self._manager.save(
            int(np.max(state.step)),  # of a sweep's members, some may have stopped
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                digest=ocp.args.JsonSave({"sha256": _digest(state)}),
            ),
            force=True,
        )

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints that there are, ascending."""
        return sorted(self._manager.all_steps()) if self._directory.exists() else []

    def restore(
        self, abstract_state: TrainState, announce: Callable[[str], None]
    ) -> TrainState | None:
        """The newest checkpoint that is whole, or None where there is none at all.

        Args:
          abstract_state: shapes, dtypes and shardings to restore to.
          announce: told of each damaged checkpoint that was passed over.

        Raises:
          UserError: there are checkpoints, and every one is damaged.
        """
        steps = self.steps[::-1]
        for step in steps:
            state, why = self._read(step, abstract_state)
            if not processes.any_of(bool(why)):
                return state
            announce(
                f"WARNING: the checkpoint of step {step:,} is damaged "
                f"({why or 'so another process finds'}); falling back to the one before"
            )
        if steps:
            raise UserError(
                f"every checkpoint in {self._directory} is damaged (steps {steps}): "
                "move the directory away to start again"
            )
        return None

    def set_aside_after(self, step: int) -> None:
        """Move checkpoints newer than `step`, which are damaged, out of the way of new ones."""
        for newer in self._manager.all_steps():
            if newer > step and processes.is_first():
                folder = self._directory.parent / "damaged_checkpoints"
                folder.mkdir(exist_ok=True)
                names = itertools.chain([f"{newer}"], (f"{newer}-{i}" for i in itertools.count(2)))
                free = next(name for name in names if not (folder / name).exists())
                shutil.move(self._directory / str(newer), folder / free)
        processes.wait_for_all("damaged checkpoints are set aside")
        self._manager.reload()

    def close(self) -> None:
        """Wait until everything is on disk."""
        if "_manager" in vars(self):
            self._manager.wait_until_finished()
            self._manager.close()

    def _read(self, step: int, abstract_state: TrainState) -> tuple[TrainState | None, str]:
        """The state of a checkpoint, or why this process cannot read it; all must ask."""
        import orbax.checkpoint as ocp

        like = {"state": ocp.args.StandardRestore(abstract_state), "digest": ocp.args.JsonRestore()}
        item, why = None, ""
        try:
            _refuse_large_parts(self._directory / str(step) / "state", abstract_state)
            item = self._manager.restore(step, args=ocp.args.Composite(**like))
        except Exception as error:  # Orbax raises many kinds for a damaged file.
            why = reason(error.__cause__ or error)
        # To digest a state that is divided takes all processes.
        if not processes.any_of(item is None) and _digest(item.state) != item.digest["sha256"]:
            why = "its values do not match their SHA-256"
        return item and item.state, why


def abstract(state: TrainState, shardings: Any) -> TrainState:
    """Shapes and dtypes of `state` (itself possibly abstract), to be put under `shardings`.

    These are a pytree like `state`, or one sharding for all of it.
    """
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        jax.tree.broadcast(shardings, state),
    )


def _refuse_large_parts(folder: Path, abstract_state: TrainState) -> None:
    """Refuse arrays that are stored in parts larger than they are: each is unpacked whole.

    A part of zeros takes a ten-thousandth of its size on disk.
    """
    import tensorstore

    if files.read_json(folder / "_METADATA").get("use_zarr3"):
        raise ValueError("it is in a format that this project does not write")
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not (text := store.read(f"{name}/.zarray").result().value):
            raise ValueError(f"it has no {name}")
        about = files.parse_json(text)
        part = math.prod(about["chunks"]) * np.dtype(about["dtype"]).itemsize
        if part > max(leaf.size, 1) * leaf.dtype.itemsize:
            raise ValueError(f"{name} is stored in parts of {part:,} bytes")


def _digest(state: TrainState) -> str:
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        sha.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        sha.update(np.ascontiguousarray(processes.on_host(leaf)).data)
    return sha.hexdigest()
