"""Metrics over time: `metrics.jsonl` for programs, TensorBoard event files for people; a clock."""

import functools
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgm_jax import files, processes
from dgm_jax.core import UserError
from dgm_jax.workdir import write_text

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter


class Writer:
    """Appends rows of metrics; a resumed run continues after the step it restored.

    Of several processes the first alone writes.
    """

    def __init__(self, jsonl: Path, tensorboard: Path, step: int) -> None:
        """Open both, dropping rows after `step`: they are about to be written again."""
        if processes.is_first():
            rows = [row for row in read(jsonl) if row["step"] <= step]
            write_text(jsonl, "".join(json.dumps(row) + "\n" for row in rows))
            self._jsonl = jsonl.open("a")
        self._folder, self._step = tensorboard, step

    @functools.cached_property
    def _events(self) -> "EventsWriter":
        """Not by `SummaryWriter`: once its thread has died of a full disk, it waits forever."""
        # With the first row: importing it, and PyTorch with it where there is one, then takes its
        # time while the devices work.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._folder.mkdir(exist_ok=True)
        events = EventsWriter(str(self._folder / "events"))
        if self._step:  # what an earlier process wrote from here on is not shown
            log = SessionLog(status=SessionLog.START)
            events.write_event(Event(wall_time=time.time(), step=self._step + 1, session_log=log))
        return events

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one row of `values` measured after update number `step`."""
        if not processes.is_first():
            return
        self._jsonl.write(json.dumps({"step": step, **values}) + "\n")
        self._jsonl.flush()
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in values.items():
            event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
            self._events.write_event(event)
        self._events.flush()

    def close(self) -> None:
        """Flush everything to disk."""
        if "_jsonl" in vars(self):
            self._jsonl.close()
        if "_events" in vars(self):
            self._events.close()


class Clock:
    """How long training has taken, over all interruptions: goes on from the rows before it.

    Attributes:
      seconds: `training` by the clock, `training_cpu` summed over the processors.
    """

    def __init__(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Start it; `rows` as `read` gives them."""
        last = max(rows, key=lambda row: row.get("seconds", -1.0), default={})
        self.seconds = {
            "training": last.get("seconds", 0.0),
            "training_cpu": last.get("cpu_seconds", 0.0),
        }
        self._mark = self._now()

    def lap(self, num_runs: int = 1) -> float:
        """Seconds since the last lap; each of the runs side by side is given its equal share."""
        now = self._now()
        spent, self._mark = {name: now[name] - self._mark[name] for name in now}, now
        self.seconds = {name: self.seconds[name] + spent[name] / num_runs for name in now}
        return spent["training"]

    @property
    def columns(self) -> dict[str, float]:
        """What a row says of it."""
        return {"seconds": self.seconds["training"], "cpu_seconds": self.seconds["training_cpu"]}

    @staticmethod
    def _now() -> dict[str, float]:
        return {"training": time.monotonic(), "training_cpu": time.process_time()}


def read(jsonl: Path) -> list[dict]:
    """The rows of a `metrics.jsonl`, [] where there is none; a torn last line is left out.

    Raises:
      UserError: another line is damaged, or there is something else under this name.
    """
    if not jsonl.exists():
        return []
    with files.reading(jsonl, "mend it or move it away"):
        lines = files.read_bytes(jsonl, most_bytes=2**30).splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            with files.reading(jsonl, f"mend line {number} or take it out"):
                rows.append(_row(line))
        except UserError:
            if number < len(lines):
                raise
            # The last: the process died while writing it.
    return rows


def _row(line: bytes) -> dict[str, Any]:
    row = files.parse_json(line)
    if type(row["step"]) is not int or not 0 <= row["step"] < 2**31:
        raise ValueError("it has no step")
    for name, value in row.items():
        if type(value) not in (int, float):
            raise ValueError(f"{name} is no number")
        float(value)  # raises where it is too large for one
    if "seconds" in row and not {"cpu_seconds", "examples_per_second"} <= row.keys():
        raise ValueError("some of its times are missing")
    return row
