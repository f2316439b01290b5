"""A work directory: everything about one run, under fixed names."""

import json
import math
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dgm_jax import config as configs
from dgm_jax import files, models, processes
from dgm_jax.core import UserError
from dgm_jax.data import dataset as data

# What a run does not depend on: how it is spread over devices, where its data are (what they are
# is in the card), and when it saves.
_FREE = (
    "data.path",
    "data.source",
    "mesh.fsdp",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
)


class Workdir(NamedTuple):
    """Where the files of a run are."""

    path: Path

    @property
    def config(self) -> Path:
        """The config that made the run, as JSON."""
        return self.path / "config.json"

    @property
    def data_card(self) -> Path:
        """Which data the run was trained on."""
        return self.path / "data_card.json"

    @property
    def data_mean(self) -> Path:
        """The training mean of that data: what a model knows of it is in the card and here."""
        return self.path / "data_mean.npz"

    @property
    def metrics(self) -> Path:
        """One JSON row per dispatch or validation."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Orbax checkpoints."""
        return self.path / "checkpoints"

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint that was best on the validation split, where one is kept."""
        return self.path / "best_checkpoint"

    @property
    def results(self) -> Path:
        """The final numbers; its presence means that the run is finished."""
        return self.path / "results.json"

    @property
    def replay(self) -> Path:
        """The step in which training came to a number that is not finite."""
        return self.path / "replay.json"

    def load_replay(self) -> dict[str, Any]:
        """`step`, and `what` was not finite in it.

        Raises:
          UserError: there is none, or it cannot be read.
        """
        if not self.replay.exists():
            self._expect(self.config)
            raise UserError(f"{self.path} has no {self.replay.name}: nothing was not finite there")
        with files.reading(self.replay, "train again"):
            about = files.read_json(self.replay)
            if not (type(about["step"]) is int and isinstance(about["what"], str)):
                raise ValueError("it names no step")
            return about

    @property
    def failure(self) -> Path:
        """Why a sweep's member was stopped."""
        return self.path / "failure.json"

    def load_failure(self, until: float = math.inf) -> str | None:
        """Why a sweep's member was stopped; None if it was not by update number `until`.

        Raises:
          UserError: it cannot be read.
        """
        if not self.failure.exists():
            return None
        with files.reading(self.failure, "choose another --workdir"):
            about = files.read_json(self.failure)
            why, step = about["failure"], about.get("step", 0)
            if not (isinstance(why, str) and type(step) is int):
                raise ValueError("it does not say what failed, and when")
            return why if step <= until else None

    @property
    def started(self) -> bool:
        """Whether training has left anything: before it, a wrong value has cost nobody anything."""
        there = self.checkpoints, self.results, self.failure
        has_rows = self.metrics.exists() and self.metrics.stat().st_size > 0
        return has_rows or any(path.exists() for path in there)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do.

        Why a sweep's member failed is written before its parameters have a checkpoint of their own,
        which has its name, a number, once it is whole.
        """
        kept = any(path.name.isdigit() for path in self.checkpoints.glob("*"))
        return self.results.exists() or (self.failure.exists() and kept)

    def files(self) -> list[str]:
        """Names of what is there to be looked at, sorted."""
        return sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))

    def _expect(self, path: Path) -> None:
        if not path.exists():
            raise UserError(
                f"{self.path} is not a work directory (it has no {path.name}): train first"
            )

    def load_config(self, given: ConfigDict | None = None) -> ConfigDict:
        """The config that made the run; of the one given what no training depends on.

        That is its `eval`, the fields of `_FREE`, and what `models.of_trained` names.

        Raises:
          UserError: there is none, it cannot be read, or it differs from `given` in more than that.
        """
        self._expect(self.config)
        with files.reading(self.config, "choose another --workdir"):
            config = configs.from_dict(files.read_json(self.config))
        if given is None:
            return config
        of_model = [f"model.{field}" for field in models.of_trained(config.model.name)]
        free, wanted = (*_FREE, *of_model), configs.fields(given)
        config = configs.override(config, {name: wanted[name] for name in free if name in wanted})
        config.eval.update(given.eval)
        self._refuse_another(
            given,
            config,
            "leave out --config, or set in it what that run had; free to differ: "
            f"{', '.join(['eval', *free])}",
        )
        return config

    def _refuse_another(self, config: ConfigDict, there: ConfigDict, advice: str) -> None:
        """Refuse a config that differs from the one `there` in what a run depends on."""
        there = configs.override(there, {field: configs.fields(config)[field] for field in _FREE})
        if differs := configs.differences(config, there):
            if all(field.startswith("train.duration ") for field in differs):
                advice += (
                    ". The learning rate follows the length of a run, which stays as it was; to "
                    "train its model further give another --workdir and "
                    f"--config.train.init_from={self.path}"
                )
            raise UserError(
                f"{self.path} belongs to another config ({'; '.join(differs)}): {advice}"
            )

    def load_card(self) -> dict[str, Any]:
        """The data card of the run.

        Raises:
          UserError: there is none, or it cannot be read.
        """
        self._expect(self.data_card)
        with files.reading(self.data_card, "choose another --workdir"):
            return data.checked_card(files.read_json(self.data_card))

    def load_mean(self) -> np.ndarray:
        """The training mean of the run's data.

        Raises:
          UserError: there is none, or it cannot be read.
        """
        if not self.data_mean.exists():
            raise UserError(f"{self.path} has no {self.data_mean.name}: train again")
        with files.reading(self.data_mean, "train again"):
            # Zipped, it has a checksum of its own.
            mean = files.read_arrays(self.data_mean, most_bytes=2**24)["mean"]
            if mean.dtype != np.float32 or not np.isfinite(mean).all():
                raise ValueError("it is no mean")
            return mean

    def check_config(self, config: ConfigDict) -> None:
        """Refuse a directory that is not writable or is about something else; change nothing.

        Raises:
          UserError: says what differs.
        """
        if self.config.exists():
            there = self.load_config()
            if self.started:
                self._refuse_another(config, there, "choose another --workdir")
        elif self.path.is_dir() and not is_new(self.path):
            raise UserError(
                f"{self.path} is not empty and is no work directory: choose another --workdir"
            )
        check_writable(self.path)

    def check_card(self, card: dict[str, Any]) -> None:
        """Refuse to mix data: numbers on other images would pass for numbers on these.

        Where the images came from may differ, what they are may not.

        Raises:
          UserError: names the fields that differ.
        """
        if not self.data_card.exists():
            return
        with files.reading(self.data_card, "choose another --workdir"):
            there = files.read_json(self.data_card)
            differs = [
                f"{name} was {there.get(name)}, is {card[name]}"
                for name in card
                if name != "source" and there.get(name) != card[name]
            ]
        if differs:
            raise UserError(
                f"{self.path} was trained on other data ({'; '.join(differs)}): make that data "
                "available again, or choose another --workdir"
            )

    @contextmanager
    def claimed(self, config: ConfigDict, card: dict[str, Any], mean: np.ndarray) -> Iterator[None]:
        """Make the directory, write what it is about, and keep other processes from it meanwhile.

        The lock ends with the process that holds it, however that ends. Of the processes of one
        run the first holds it for all.

        Raises:
          UserError: it is about another config or other data, or another process is at work there.
        """
        import filelock

        if not processes.is_first():
            processes.wait_for_all("the work directory is claimed")
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = files.reason(error)
            raise UserError(f"{self.path}: {why}: choose another --workdir") from error
        lock = filelock.FileLock(self.path / ".lock")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            raise UserError(
                f"another process is at work in {self.path}: wait for it, or choose another "
                "--workdir"
            ) from None
        try:
            # Now: while the data were read another process may have been here, and be gone.
            self.check_config(config)
            if self.started:
                self.check_card(card)
            # The config first: with it alone the directory is still known for what it is.
            write_text(self.config, configs.to_json(config))
            write_json(self.data_card, card)
            write(self.data_mean, lambda file: np.savez(file, mean=mean))
            processes.wait_for_all("the work directory is claimed")
            yield
        finally:
            lock.release()


def check_writable(path: Path) -> None:
    """Refuse a directory that cannot be written to, or not be made.

    Raises:
      UserError: names what stands in the way.
    """
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise UserError(f"{path} is a file: choose another --workdir")
    if not os.access(path, os.W_OK):
        raise UserError(f"{path} is not writable: choose another --workdir")


def is_new(path: Path) -> bool:
    """Whether a directory has nothing in it but what a start that was cut short may leave."""
    return path.is_dir() and all(p.name == ".lock" or p.suffix == ".tmp" for p in path.iterdir())


def default_path(config_file: str, mode: str) -> Path:
    """`configs/vae_mnist.py:smoke` -> `runs/vae_mnist-smoke`; a sweep or search says so behind."""
    file, _, variant = config_file.partition(":")
    parts = (Path(file).stem, variant, mode if mode in ("sweep", "search") else "")
    return Path("runs") / "-".join(filter(None, parts))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text`, whole or not at all."""
    write(path, lambda file: file.write(text.encode()))


def write(path: Path, put: Callable[[BinaryIO], object]) -> None:
    """Write what `put` puts into a file, whole or not at all."""
    if not processes.is_first():
        return
    # Under a name of its own: two evaluations of one run may be under way, on two machines.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            put(file)
            file.flush()
            os.fsync(file.fileno())  # or a machine that loses its power may keep the name alone
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
