"""The programs of a sweep as jobs of a cluster, by submitit (the extra `sweep`)."""

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dgm_jax.core import UserError
from dgm_jax.interruption import TRY_AGAIN
from dgm_jax.progress import Progress, say

# Seconds; clusters kill what is left of a job they take away after KillWait, 30 s by default.
_KILL_WAIT = 600


class Job:
    """Runs one program of a sweep; a preempted job is queued again and goes on."""

    def __init__(self, folder: Path, program: int) -> None:
        """The program of that number of the sweep in `folder`."""
        self._folder, self._program = folder, program

    def __call__(self) -> None:
        """Run it in a process of its own: submitit keeps the signals of this one."""
        command = [sys.executable, "-m", "dgm_jax.main", "--mode=sweep"]
        command += [f"--workdir={self._folder}", f"--program={self._program}"]
        status = subprocess.run(command, check=False).returncode
        if status in (TRY_AGAIN, -signal.SIGTERM):
            # The cluster takes the job away: it will kill this process as well and queue the job
            # again. To return now would say that the job has failed.
            time.sleep(_KILL_WAIT)
        if status:
            raise RuntimeError(f"exit status {status}: {' '.join(command)}")

    def checkpoint(self) -> Any:
        """What to queue when the job is preempted: the same, which resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run(folder: Path, programs: Sequence[int], launcher: str) -> None:
    """Submit a job for each program and wait until all have ended.

    Args:
      folder: of the sweep; logs go to `jobs` in it.
      programs: their numbers.
      launcher: `local`, processes of this machine side by side, or `slurm`, an array of jobs;
        with submitit's parameters behind it: `slurm;slurm_partition=gpu;gpus_per_node=1`.

    Raises:
      UserError: submitit is not installed, an option is none of its, or jobs have failed; says
        where their logs are.
    """
    if not programs:
        return
    try:
        import submitit
    except ImportError as error:
        raise UserError("--launcher needs submitit: pip install 'dgm_jax[sweep]'") from error
    logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns wherever there is no sacct
    cluster, _, options = launcher.partition(";")
    if cluster not in ("local", "slurm"):
        raise UserError(f"--launcher={launcher!r}: choose local or slurm")
    logs = folder.absolute() / "jobs"
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
        # submitit's own limit would be five minutes.
        executor.update_parameters(**{"timeout_min": 24 * 60, **_parse(options)})
    except (NameError, TypeError, RuntimeError) as error:
        raise UserError(f"--launcher={launcher!r}: {error}") from error
    with executor.batch():
        submitted = [executor.submit(Job(folder.absolute(), i)) for i in programs]
    say(f"submitted   {len(submitted)} jobs, first {submitted[0].job_id}, logs in {logs}")
    with Progress("jobs", len(submitted)) as progress:
        done = 0
        while done < len(submitted):
            time.sleep(2.0)
            now = sum(job.done() for job in submitted)
            progress.advance(now - done)
            done = now
    if failed := [job for job in submitted if job.exception() is not None]:
        names = ", ".join(str(job.job_id) for job in failed)
        raise UserError(f"{len(failed)} of {len(submitted)} jobs failed ({names}): see {logs}")


def _parse(options: str) -> dict[str, Any]:
    """`"a=1;b=text"` -> `{"a": 1, "b": "text"}`."""
    pairs = [part.partition("=") for part in options.split(";") if part.strip()]
    return {name.strip(): int(v) if v.isdigit() else v for name, _, v in pairs}
