"""Orbax checkpoints of a run, verified when they are read back."""

import functools
import hashlib
import itertools
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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


class OtherLayoutError(ValueError):
    """A checkpoint whose arrays have other names or shapes than they should have here."""


class Checkpoints:
    """The checkpoints in one directory; saves asynchronously, keeps the newest few.

    A checkpoint is the train state and the SHA-256 of its values: Orbax does not notice a flipped
    bit in a data file.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        """Open `directory`, which is made when the first checkpoint is saved.

        Args:
          directory: where the checkpoints are.
          keep: how many to keep, the newest ones; with 2 there is one to fall back to.
        """
        self._directory, self._keep = directory.absolute(), keep

    @functools.cached_property
    def _manager(self) -> "ocp.CheckpointManager":
        import orbax.checkpoint as ocp

        return ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                create=False,
                # What each says of itself is read with it: where one is damaged, none were listed.
                lightweight_initialize=True,
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "digest": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, state: TrainState) -> None:
        """Start saving `state` and return; a save still running is waited for first.

        What was saved before an interruption is not saved again: it is the same.

        Raises:
          UserError: this one or the one before cannot be written, as on a full disk.
        """
        import orbax.checkpoint as ocp

        step = int(np.max(state.step))  # of a sweep's members, some may have stopped
        if step in self.steps:
            return
        digest = _digest(state)
        with self._writing():
            self._directory.mkdir(parents=True, exist_ok=True)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    digest=ocp.args.JsonSave({"sha256": digest}),
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
          announce: told of each checkpoint that was passed over, and why.

        Raises:
          UserError: there are checkpoints, and none can be read: each is damaged, or of another
            layout, of which the first field that differs is named; or this user may not.
        """
        self._refuse_unreadable()
        steps, other, why = self.steps[::-1], "", ""
        for step in steps:
            state, error = self._read(step, abstract_state)
            if not processes.any_of(error is not None):
                return state
            if isinstance(error, OtherLayoutError):
                what, other = f"has another layout ({error})", other or str(error)
            else:
                why = reason(error) if error else "so another process finds"
                what = f"is damaged ({why})"
            announce(
                f"WARNING: the checkpoint of step {step:,} {what}; falling back to the one before"
            )
        self._list_again()
        if self.steps[::-1] != steps:  # a run under way has replaced what was being read
            return self.restore(abstract_state, announce)
        if other:
            raise UserError(
                f"no checkpoint in {self._directory} (steps {steps}) fits this version of the "
                f"code: {other}; go on with the version that wrote it, or move the directory away "
                "to start again"
            )
        if steps:
            raise UserError(
                f"every checkpoint in {self._directory} is damaged (steps {steps}; {why}): move "
                "the directory away to start again"
            )
        return None

    def _refuse_unreadable(self) -> None:
        """Refuse what is somebody else's: nothing is wrong with it."""
        for folder, folders, names in os.walk(self._directory):
            for path in (Path(folder), *(Path(folder, name) for name in (*folders, *names))):
                if not os.access(path, os.R_OK) and path.exists():
                    raise UserError(f"{path} may not be read by this user: ask its owner")

    def _list_again(self) -> None:
        if "_manager" in vars(self):
            self._manager.close()
            del self._manager  # its `reload` reads what each says of itself

    def tidy(self, step: int) -> None:
        """Make room for what comes after `step`, from which training goes on.

        Newer checkpoints, which cannot be read, are moved to `damaged_checkpoints`; what is left of
        saves that never came to their end is removed.
        """
        if not self._directory.exists():
            return
        if processes.is_first():
            for newer in (there for there in self.steps if there > step):
                self._set_aside(newer)
            for unfinished in self._directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished)
        processes.wait_for_all("the checkpoints are tidied")
        self._list_again()

    def _set_aside(self, step: int) -> None:
        folder = self._directory.parent / "damaged_checkpoints"
        folder.mkdir(exist_ok=True)
        names = itertools.chain([f"{step}"], (f"{step}-{i}" for i in itertools.count(2)))
        free = next(name for name in names if not (folder / name).exists())
        shutil.move(self._directory / str(step), folder / free)

    def wait(self) -> None:
        """Return when what was saved is on disk.

        Raises:
          UserError: it cannot be written.
        """
        if "_manager" in vars(self):
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until everything is on disk.

        Raises:
          UserError: it cannot be written.
        """
        try:
            self.wait()
        finally:
            if "_manager" in vars(self):
                self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises many kinds for a disk that is full.
            why = reason(error.__cause__ or error)
            if code := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore's, at length
                why = os.strerror(int(code[1]))
            raise UserError(
                f"a checkpoint cannot be written to {self._directory} ({why}): see that the "
                "disk has room; the same command goes on from the last whole checkpoint"
            ) from error

    def _read(
        self, step: int, abstract_state: TrainState
    ) -> tuple[TrainState | None, BaseException | None]:
        """The state of a checkpoint, or why this process cannot read it; all must ask."""
        import orbax.checkpoint as ocp

        like = {"state": ocp.args.StandardRestore(abstract_state), "digest": ocp.args.JsonRestore()}
        state, digest, error = None, "", None
        try:
            about = self._manager.item_metadata(step)["state"]
            if about is None:
                raise ValueError("it does not say what it holds")
            _refuse_another_layout(about.tree, abstract_state)
            _refuse_large_parts(self._directory / str(step) / "state", abstract_state)
            item = self._manager.restore(step, args=ocp.args.Composite(**like))
            digest, state = item.digest["sha256"], item.state
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # there is no room for it here, whatever it holds
        except Exception as raised:  # Orbax raises many kinds for a damaged file.
            error = raised.__cause__ or raised
        # To digest a state that is divided takes all processes.
        if not processes.any_of(state is None) and _digest(state) != digest:
            error = ValueError("its values do not match their SHA-256")
        return state, error


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


def _refuse_another_layout(stored: Any, state: TrainState) -> None:
    """Raise where what is stored does not have the arrays of `state`; names the first."""
    there, here = _layout(stored), _layout(state)
    for name in {**here, **there}:
        if there.get(name) != here.get(name):
            found, wanted = there.get(name, "absent"), here.get(name, "absent")
            raise OtherLayoutError(f"{name} is {found} there and {wanted} here")


def _layout(tree: Any) -> Mapping[str, str]:
    """Array by array: `{"params.vae.params.Dense_0.kernel": "float32 (3, 4)"}`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path): f"{leaf.dtype} {tuple(leaf.shape)}" for path, leaf in leaves}


def _digest(state: TrainState) -> str:
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        sha.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        sha.update(np.ascontiguousarray(processes.on_host(leaf)).data)
    return sha.hexdigest()
