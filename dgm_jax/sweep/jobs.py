"""The programs of a sweep as jobs of a cluster, by submitit (the extra `sweep`)."""

import ast
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dgm_jax import interruption
from dgm_jax.core import UserError
from dgm_jax.interruption import TRY_AGAIN, Interrupted
from dgm_jax.progress import Progress, say

# Seconds; clusters kill what is left of a job they take away after KillWait, 30 s by default.
_KILL_WAIT = 600
# Minutes that a job may take; submitit's own limit would be five, and it knows no "for ever".
_LIMITS = {"slurm": 24 * 60, "local": 100 * 365 * 24 * 60}
_VISIBLE = "CUDA_VISIBLE_DEVICES"
# Seconds between two looks at a cluster's queue: it answers everybody.
_PAUSE = 15.0


class Job:
    """Runs one program of a sweep; a preempted job is queued again and goes on."""

    def __init__(self, command: Sequence[str], on_cluster: bool) -> None:
        """`command` trains, ends with status 0 when it has, and saves when it gets SIGTERM."""
        self._command, self._on_cluster = command, on_cluster
        self._devices = os.environ.get(_VISIBLE)

    def __call__(self) -> None:
        """Run it in a process of its own: submitit keeps the signals of this one."""
        from submitit import JobEnvironment

        environment = dict(os.environ)
        if not self._on_cluster:  # where submitit would hide all devices
            environment.pop(_VISIBLE, None)
            environment |= {} if self._devices is None else {_VISIBLE: self._devices}
        # All processes of a job get the signal that its time is nearly over, which is for this one;
        # what is ignored stays so in the other.
        warning = signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]
        handler = signal.signal(warning, signal.SIG_IGN)
        # In a session of its own no Ctrl-C reaches it twice.
        process = subprocess.Popen(
            self._command, env=environment, start_new_session=not self._on_cluster
        )
        signal.signal(warning, handler)
        try:
            status = process.wait()
        except BaseException:  # Ctrl-C, or the end that submitit makes of a job queued again
            # It saves what it has, and ends by itself, though this process be killed in a second.
            # A cluster tells it too, and of two signals the second would end it at once.
            if not self._on_cluster:
                process.terminate()
            process.wait()
            raise
        if self._on_cluster and status in (TRY_AGAIN, -signal.SIGTERM):
            # The cluster takes the job away: it will kill this process as well and queue the job
            # again. To return now would say that the job has failed.
            time.sleep(_KILL_WAIT)
        if status:
            raise RuntimeError(f"exit status {status}: {' '.join(self._command)}")

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
      launcher: `local`, processes of this machine, one after another or, with `local;parallel=4`,
        as many side by side; or `slurm`, an array of jobs. Submitit's parameters may follow:
        `slurm;slurm_partition=gpu;gpus_per_node=1`.

    Raises:
      UserError: submitit is not installed, an option is none of its, the jobs are refused, or have
        failed; says where their logs are.
      Interrupted: SIGTERM or Ctrl-C came; says what becomes of the jobs.
    """
    if not unfinished():
        return
    logs = folder.absolute() / "jobs"
    executor, at_once = _executor(launcher, logs)
    on_cluster = launcher.startswith("slurm")
    with interruption.noted() as asked_to_stop:
        left = _in_the_queue(_known(logs)) if on_cluster else set()
        if left:
            say(f"waiting     for {len(left)} jobs of an earlier command, logs in {logs}")
            left = _wait(left, _in_the_queue, asked_to_stop, _PAUSE)
        jobs: dict[int, Any] = {}
        programs = [] if asked_to_stop() else unfinished()
        while programs and not asked_to_stop():
            some, programs = programs[:at_once], programs[at_once:]
            with _refused(launcher), executor.batch():
                new = {i: executor.submit(Job(_command(folder, i), on_cluster)) for i in some}
            jobs |= new
            say(f"submitted   {len(new)} jobs, first {new[some[0]].job_id}, logs in {logs}")
            if on_cluster:
                ids = {job.job_id for job in new.values()}
                left = _wait(ids, _in_the_queue, asked_to_stop, _PAUSE)
            else:
                left = _wait(set(new.values()), _running, asked_to_stop)
        if signum := asked_to_stop():
            left = left if on_cluster else _stop(left, folder)
            raise Interrupted(signum, _what_goes_on(left, on_cluster, logs))
    if failed := unfinished():
        names = ", ".join(job.job_id for i, job in jobs.items() if i in failed)
        raise UserError(f"{len(failed)} of {len(jobs)} jobs failed ({names}): see {logs}")


def _command(folder: Path, program: int) -> list[str]:
    """What trains the program of that number of the sweep in `folder`."""
    command = [sys.executable, "-m", "dgm_jax.main", "--mode=sweep"]
    return [*command, f"--workdir={folder.absolute()}", f"--program={program}"]


def _executor(launcher: str, logs: Path) -> tuple[Any, int]:
    """What submits jobs, and how many at once."""
    try:
        import submitit
    except ImportError as error:
        raise UserError("--launcher needs submitit: pip install 'dgm_jax[sweep]'") from error
    logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns wherever there is no sacct
    cluster, _, options = launcher.partition(";")
    if cluster not in ("local", "slurm"):
        raise UserError(f"--launcher={launcher!r}: choose local or slurm")
    given = {"timeout_min": _LIMITS[cluster], **_parse(options)}
    at_once = given.pop("parallel", 1) if cluster == "local" else sys.maxsize
    if type(at_once) is not int or at_once < 1:
        raise UserError(f"--launcher={launcher!r}: parallel={at_once!r} is no number of jobs")
    with _refused(launcher):
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
        executor.update_parameters(**given)
    return executor, at_once


@contextmanager
def _refused(launcher: str) -> Iterator[None]:
    """What submitit and sbatch have against a launcher, in one line."""
    try:
        yield
    except (AssertionError, NameError, TypeError, ValueError, RuntimeError) as error:
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
    # One that is still starting may not hear it; one that has heard it ends within seconds.
    unheard, long_enough = interruption.every(10.0), interruption.every(60.0)
    while ((jobs := _running(jobs)) or _at_work(folder)) and not long_enough():
        time.sleep(0.1)
        for job in jobs if unheard() else ():
            job.cancel()
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
    """`"a=1;b=7.5;c=text"` -> `{"a": 1, "b": 7.5, "c": "text"}`."""
    pairs = [part.partition("=") for part in options.split(";") if part.strip()]
    return {name.strip(): _value(text.strip()) for name, _, text in pairs}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
