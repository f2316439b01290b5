"""The programs of a sweep as jobs of a cluster, by submitit (the extra `sweep`)."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dgm_jax import interruption
from dgm_jax.core import UserError
from dgm_jax.interruption import TRY_AGAIN, Interrupted
from dgm_jax.progress import Progress, say

# Seconds; clusters kill what is left of a job they take away after KillWait, 30 s by default.
_KILL_WAIT = 600
_VISIBLE = "CUDA_VISIBLE_DEVICES"
# Seconds between two looks at a cluster's queue: it answers everybody.
_PAUSE = 15.0


class Job:
    """Runs one program of a sweep; a preempted job is queued again and goes on."""

    def __init__(self, folder: Path, program: int, on_cluster: bool) -> None:
        """The program of that number of the sweep in `folder`."""
        self._folder, self._program, self._on_cluster = folder, program, on_cluster
        self._devices = os.environ.get(_VISIBLE)

    def __call__(self) -> None:
        """Run it in a process of its own: submitit keeps the signals of this one."""
        command = [sys.executable, "-m", "dgm_jax.main", "--mode=sweep"]
        command += [f"--workdir={self._folder}", f"--program={self._program}"]
        environment = dict(os.environ)
        if not self._on_cluster:  # where submitit would hide all devices
            environment.pop(_VISIBLE, None)
            environment |= {} if self._devices is None else {_VISIBLE: self._devices}
        # In a session of its own no Ctrl-C reaches it twice.
        process = subprocess.Popen(command, env=environment, start_new_session=not self._on_cluster)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # This process is killed in a second. The other saves what it has, and ends by itself.
            process.send_signal(signal.SIGINT)
            status = process.wait()
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


def run(folder: Path, unfinished: Callable[[], list[int]], launcher: str) -> None:
    """Submit a job for each program that is not finished and wait until all have ended.

    A cluster's jobs outlive the command that waits for them: those of an earlier one are waited for
    before any is submitted. Processes of this machine are stopped with it.

    Args:
      folder: of the sweep; logs go to `jobs` in it.
      unfinished: tells the numbers of the programs that are not finished.
      launcher: `local`, processes of this machine side by side, or `slurm`, an array of jobs;
        with submitit's parameters behind it: `slurm;slurm_partition=gpu;gpus_per_node=1`.

    Raises:
      UserError: submitit is not installed, an option is none of its, the jobs are refused, or have
        failed; says where their logs are.
      Interrupted: SIGTERM or Ctrl-C came; says what becomes of the jobs.
    """
    if not unfinished():
        return
    logs = folder.absolute() / "jobs"
    executor, on_cluster = _executor(launcher, logs), launcher.startswith("slurm")
    with interruption.noted() as asked_to_stop:
        left = _in_the_queue(_known(logs)) if on_cluster else set()
        if left:
            say(f"waiting     for {len(left)} jobs of an earlier command, logs in {logs}")
            left = _wait(left, _in_the_queue, asked_to_stop, _PAUSE)
        jobs, programs = [], [] if asked_to_stop() else unfinished()
        if programs:
            with _refused(launcher), executor.batch():
                own = [Job(folder.absolute(), i, on_cluster) for i in programs]
                jobs = [executor.submit(job) for job in own]
            say(f"submitted   {len(jobs)} jobs, first {jobs[0].job_id}, logs in {logs}")
            if on_cluster:
                left = _wait({job.job_id for job in jobs}, _in_the_queue, asked_to_stop, _PAUSE)
            else:
                left = _wait(set(jobs), _running, asked_to_stop)
        if signum := asked_to_stop():
            left = left if on_cluster else _stop(left, folder)
            raise Interrupted(signum, _what_goes_on(left, on_cluster, logs))
    if failed := unfinished():
        names = ", ".join(job.job_id for i, job in zip(programs, jobs, strict=True) if i in failed)
        raise UserError(f"{len(failed)} of {len(jobs)} jobs failed ({names}): see {logs}")


def _executor(launcher: str, logs: Path) -> Any:
    """What submits jobs."""
    try:
        import submitit
    except ImportError as error:
        raise UserError("--launcher needs submitit: pip install 'dgm_jax[sweep]'") from error
    logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns wherever there is no sacct
    cluster, _, options = launcher.partition(";")
    if cluster not in ("local", "slurm"):
        raise UserError(f"--launcher={launcher!r}: choose local or slurm")
    with _refused(launcher):
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
        # submitit's own limit would be five minutes.
        executor.update_parameters(**{"timeout_min": 24 * 60, **_parse(options)})
    return executor


@contextmanager
def _refused(launcher: str) -> Iterator[None]:
    """What submitit and sbatch have against a launcher, in one line."""
    try:
        yield
    except (NameError, TypeError, RuntimeError) as error:
        raise UserError(f"--launcher={launcher!r}: {' '.join(str(error).split())}") from error


def _wait(
    jobs: set, living: Callable[[set], set], stop: Callable[[], Any], pause: float = 1.0
) -> set:
    """Wait until none of `jobs` is living, or told to stop; look every `pause` seconds.

    Returns:
      Those that were living at the last look.
    """
    due = interruption.every(pause)
    with Progress("jobs", len(jobs)) as progress:
        while jobs and not stop():
            time.sleep(1.0)
            if due():
                before, jobs = len(jobs), living(jobs)
                progress.advance(before - len(jobs))
    return jobs


def _running(jobs: set) -> set:
    return {job for job in jobs if not job.done()}


def _known(logs: Path) -> set[str]:
    """Ids of all jobs that were ever submitted, of which submitit leaves files."""
    ending = "_submitted.pkl"
    return {path.name.removesuffix(ending) for path in logs.glob(f"*{ending}")}


def _in_the_queue(ids: set[str]) -> set[str]:
    """Those of the jobs that wait or run; all, while the cluster does not answer."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    return ids if answer.returncode else ids & set(answer.stdout.split())


def _stop(jobs: set, folder: Path) -> set:
    """Stop processes of this machine, and wait while they save what they have.

    Those are left that ignore Ctrl-C: a script's background.
    """
    for job in jobs:
        job.cancel()
    long_enough = interruption.every(60.0)
    while ((jobs := _running(jobs)) or _at_work(folder)) and not long_enough():
        time.sleep(0.1)
    return jobs


def _at_work(folder: Path) -> bool:
    """Whether a process is training a member of the sweep in `folder`."""
    import filelock

    for path in folder.glob("members/*/.lock"):
        try:
            with filelock.FileLock(path, blocking=False):
                pass
        except filelock.Timeout:
            return True
    return False


def _what_goes_on(left: set, on_cluster: bool, logs: Path) -> str:
    if not left:
        return "the same command goes on from the last checkpoint"
    text = f"{len(left)} jobs go on, with logs in {logs}"
    if not on_cluster:
        return text
    ids = " ".join(sorted({name.partition("_")[0] for name in left}))
    return f"{text}; the same command waits for them, and scancel {ids} ends them"


def _parse(options: str) -> dict[str, Any]:
    """`"a=1;b=text"` -> `{"a": 1, "b": "text"}`."""
    pairs = [part.partition("=") for part in options.split(";") if part.strip()]
    return {name.strip(): int(v) if v.isdigit() else v for name, _, v in pairs}
