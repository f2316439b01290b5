"""Interrupt training at random moments, go on, and hold its end against the undisturbed run's.

    python scripts/torture.py --keep                    # 50 interruptions of every family
    python scripts/torture.py --families vae sweep --interruptions 8 --seed 1
    python scripts/torture.py --saving --keep           # the time of a dispatch during a save

Every family is trained tiny by the usual command, one process an attempt, and disturbed: killed,
told to stop, on a full disk, its newest checkpoint damaged, and so on (`KINDS`). The same command
goes on, until one attempt comes to the end: then each leaf of the last checkpoint must equal that
of the run nobody disturbed bit for bit, and the rows of metrics and the results must be the same.
With --keep each family's counts go to docs/reliability.json when it is done, and the table of all
that are there between the marks of its section of docs/reliability.md.

The processes are forked from this one, which has imported everything and has not started JAX. This
file is their config as well: `--config=scripts/torture.py:vae`.
"""

# ruff: noqa: E402 - what JAX is told comes before it is imported

import argparse
import ctypes
import faulthandler
import functools
import gc
import json
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

REPO = Path(__file__).resolve().parent.parent
sys.path += [str(REPO), str(REPO / "tests")]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
)

import jax
import jax.export
import numpy as np
import orbax.checkpoint as ocp
import tensorboardX  # noqa: F401 - what a child would import
import tiny
from ml_collections import ConfigDict, config_flags  # noqa: F401
from records import DOCS, Section, markdown

from dgm_jax import cache, models, results, run
from dgm_jax import config as configs
from dgm_jax.evaluators import likelihood, passes
from dgm_jax.progress import Progress, say
from dgm_jax.sweep import report
from dgm_jax.sweep import run as sweep
from dgm_jax.workdir import Workdir

GRACE = 30.0  # seconds in which a process that is told to stop has saved and gone
PATIENCE = 120.0  # seconds in which an attempt that nobody ends has ended
DISK = 48 * 2**20  # bytes of the small file system
TIMING = {"seconds", "cpu_seconds", "examples_per_second"}
SWEEP = "sweep"
GRID = "model.beta=0.5,2;seed=0:2"

NUM_STEPS, DISPATCHES = 16, 24
# Saved every second dispatch and validated as often: 8 dispatches, 4 checkpoints.
SHORT = {
    "train.batch_size": 16,
    "train.duration": f"{NUM_STEPS} steps",
    "train.steps_per_dispatch": 2,
    "train.validate_every": "4 steps",
    "train.checkpoint_every": "4 steps",
    "eval.batch_size": 24,
    "eval.elbo_samples": 1,
}
MORE = {
    "vae": {"train.ramp": "model.beta over 10 steps", "train.keep_best": "elbo"},
    "made": {"train.keep_best": "log_prob"},
    "masked_diffusion": {"model.heads": 2},  # of a width of 8
    "transformer": {"model.heads": 2},
}


def get_config(arg: str) -> ConfigDict:
    """The tiny config of a model: as by default, but no integer of it above 8."""

    def small(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(small(v) for v in value)
        return min(value, 8) if isinstance(value, int) else value

    fields = {f"model.{name}": small(value) for name, value in models.defaults(arg).items()}
    fields |= {"data.binarisation": tiny.accepted_by(models.defaults(arg)).config.binarisation}
    return configs.override(configs.experiment(arg), fields | SHORT | MORE.get(arg, {}))


class Attempt(NamedTuple):
    """A process that trains.

    Attributes:
      pid: its number.
      path: where it writes what it says, with `.out` and `.err` behind.
    """

    pid: int
    path: Path

    def wait(self, seconds: float) -> int | None:
        """Its exit status, or minus the signal that ended it; None where it is still at work."""
        end = time.monotonic() + seconds
        while True:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= end:
                return None
            time.sleep(0.002)

    def kill(self) -> int:
        """End it without a word; its status, which is 0 where it was quicker."""
        os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def abort(self) -> str:
        """End it, and return where it was."""
        os.kill(self.pid, signal.SIGABRT)
        if self.wait(GRACE) is None:
            self.kill()
        return self.complaint[:6000]

    @property
    def said(self) -> str:
        """What it has said so far."""
        return self.path.with_suffix(".out").read_text()

    @property
    def complaint(self) -> str:
        """What it has said of errors."""
        return self.path.with_suffix(".err").read_text()


def fork(words: Path, act: Callable[[], int]) -> Attempt:
    """A process that does `act`, ends with the status that it returns, and writes to `words`."""
    words.parent.mkdir(parents=True, exist_ok=True)
    for name in (".out", ".err"):
        words.with_suffix(name).write_text("")
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            for fd, name in ((1, ".out"), (2, ".err")):
                os.dup2(os.open(words.with_suffix(name), os.O_WRONLY), fd)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            faulthandler.enable()
            status = act()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return Attempt(pid, words)


class Fault(Exception):
    """Something that should not have happened."""


class Run:
    """Training of one family in one directory, attempt after attempt."""

    def __init__(self, family: str, folder: Path, times: tuple[float, float] = (0.0, 0.0)) -> None:
        """At `folder`; `times`: when the first row was there, and the end, of a whole run."""
        self.family, self.path, self.times, self._number = family, folder, times, 0

    def start(self, before: Callable[[], None] = lambda: None) -> Attempt:
        """Give the usual command, after `before` in the new process."""
        self._number += 1
        config, words = f"{__file__}:{self.family}", self.words / str(self._number)
        argv = [f"--config={config}", f"--workdir={self.path}"]
        if self.family == SWEEP:
            argv = [f"--config={__file__}:vae", f"--workdir={self.path}"]
            argv += ["--mode=sweep", f"--sweep={GRID}", "--config.train.keep_best="]

        def act() -> int:
            trace_once(self.words.parent / self.family)
            before()
            return _main(["dgm_jax/main.py", *argv])

        return fork(words, act)

    def moment(self, rng: random.Random) -> float:
        """Seconds after the start: at any time until the end, but more often soon after the first
        checkpoint, so that a run is interrupted several times before it ends.
        """
        first, end = self.times
        done = int(self.checkpoints[-1].name) / NUM_STEPS if self.checkpoints else 0
        left = (1 - done) * (end - first)
        if rng.random() < 0.5:
            return rng.uniform(0, first + left)
        return rng.uniform(0.8 * first, first + 0.6 * left)

    @property
    def words(self) -> Path:
        """Where attempts write what they say: not on the disk that is filled up."""
        return self.path.parent.parent / "words" / self.path.name

    @property
    def workdirs(self) -> list[Workdir]:
        """Of the run, or of the members of the sweep."""
        members = sorted(self.path.glob("members/*")) if self.family == SWEEP else [self.path]
        return [Workdir(path) for path in members]

    @property
    def checkpoints(self) -> list[Path]:
        """Oldest first, of what training would go on from."""
        folder = self.path / ("programs/0" if self.family == SWEEP else "checkpoints")
        found = [path for path in folder.glob("*") if path.name.isdigit()]
        return sorted(found, key=lambda path: int(path.name))


def trace_once(folder: Path) -> None:
    """Let `jax.jit` keep what it traces in `folder`: tracing is most of what a short run takes.

    A function is known by its name and by how many of this name came before it in its process.
    """
    jit, counts = jax.jit, Counter()

    def of_this_project(function: Callable | None = None, **options: Any) -> Callable:
        if function is None:
            return functools.partial(of_this_project, **options)
        if not function.__module__.startswith("dgm_jax"):
            return jit(function, **options)
        name = f"{function.__module__}.{function.__qualname__}"
        counts[name] += 1
        path = folder / f"{name}-{counts[name]}"

        def call(*args: Any) -> Any:
            if not path.exists():
                _export(function, args, path)
            if not kept:
                program, tree = pickle.loads(path.read_bytes())
                again = jax.export.deserialize(bytearray(program)).call
                num = len(jax.tree.leaves(args[0])) if options.get("donate_argnums") == 0 else 0
                kept.extend([jit(again, donate_argnums=range(num)), tree])
            return jax.tree.unflatten(kept[1], kept[0](*jax.tree.leaves(args)))

        kept: list[Any] = []
        return call

    jax.jit = of_this_project


def _export(function: Callable, args: tuple, path: Path) -> None:
    tree, shape = jax.tree.structure(args), []

    def flat(*leaves: jax.Array) -> list[jax.Array]:
        results, structure = jax.tree.flatten(function(*jax.tree.unflatten(tree, leaves)))
        shape.append(structure)
        return results

    program = jax.export.export(jax.jit(flat))(*jax.tree.leaves(args)).serialize()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps((bytes(program), shape[0])))


def _main(argv: list[str]) -> int:
    """Be the command line; its exit status, as the interpreter makes it of what is raised."""
    sys.argv = argv
    try:
        runpy.run_module("dgm_jax.main", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


# What is done to a run: each returns whether it was hit, or had come to its end before.


def _killed(
    run: Run,
    rng: random.Random,
    before: Callable[[], None] = lambda: None,
    wanted: frozenset[int] = frozenset({-signal.SIGKILL}),
) -> bool:
    attempt = run.start(before)
    status = attempt.wait(run.moment(rng))
    status = attempt.kill() if status is None else status
    return _expect(attempt, status, wanted)


def _told(signum: int, wanted: int) -> Callable[[Run, random.Random], bool]:
    def disturb(run: Run, rng: random.Random) -> bool:
        attempt = run.start()
        status = attempt.wait(run.moment(rng))
        if status is None:
            early = not attempt.said  # Python itself has the signal until the project has begun
            os.kill(attempt.pid, signum)
            status = attempt.wait(GRACE)
            if status is None:
                raise Fault(f"still there after {signal.Signals(signum).name}: {attempt.abort()}")
            if early and status in (-signum, 1):
                return True
        return _expect(attempt, status, {wanted})

    return disturb


def _disk_full(run: Run, rng: random.Random) -> bool:
    """Less room than what the attempt would write; of each file, where no disk can be mounted."""
    room = int(rng.uniform(0, 3) * _size_of_a_checkpoint(run))
    disk = run.path.parent
    ballast = disk / "ballast"
    if os.path.ismount(disk):
        at = os.statvfs(disk)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, at.f_bavail * at.f_bsize - room))
        attempt = run.start()
    else:
        most = (room // 10, resource.RLIM_INFINITY)
        attempt = run.start(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, most))
    status = attempt.wait(PATIENCE)
    ballast.unlink(missing_ok=True)
    if status is None:
        raise Fault(f"hangs on a full disk: {attempt.abort()}")
    return _expect(attempt, status, {1}, "error: ")


def _size_of_a_checkpoint(run: Run) -> int:
    found = run.checkpoints
    return sum(p.stat().st_size for p in found[-1].rglob("*") if p.is_file()) if found else 2**17


def _damaged(damage: Callable[[Path, random.Random], None]) -> Callable[[Run, random.Random], bool]:
    def disturb(run: Run, rng: random.Random) -> bool | None:
        if not _killed(run, rng):
            return False
        if len(run.checkpoints) < 2:
            return None
        damage(run.checkpoints[-1], rng)
        return True

    return disturb


def _truncate(checkpoint: Path, rng: random.Random) -> None:
    file = rng.choice(_files(checkpoint))
    os.truncate(file, rng.randrange(file.stat().st_size))


def _flip(checkpoint: Path, rng: random.Random) -> None:
    file = rng.choice(_files(checkpoint))
    content = bytearray(file.read_bytes())
    for _ in range(4):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _half_delete(checkpoint: Path, rng: random.Random) -> None:
    files = _files(checkpoint)
    for file in rng.sample(files, len(files) // 2):
        file.unlink()


def _files(checkpoint: Path) -> list[Path]:
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size)


def _clock_jumps(run: Run, rng: random.Random) -> bool:
    """Files from the future; and years forth and back within the process, which is then killed.

    Orbax gives a save up that takes too long by that clock; that ends the process as well.
    """
    for path in run.path.rglob("*"):
        later = time.time() + rng.uniform(0, 1e9)
        os.utime(path, (later, later))
    seed, now, now_ns, offset = rng.random(), time.time, time.time_ns, [0.0]

    def before() -> None:
        jumps = random.Random(seed)

        def jump() -> float:
            if jumps.random() < 0.1:
                offset[0] = jumps.uniform(-1e9, 1e9)
            return offset[0]

        time.time = lambda: now() + jump()
        time.time_ns = lambda: now_ns() + int(jump() * 1e9)

    return _killed(run, rng, before, frozenset({-signal.SIGKILL, 1}))


def _read_only(run: Run, rng: random.Random) -> bool:
    run.path.mkdir(exist_ok=True)
    before = _listing(run.path)
    subprocess.run(["mount", "--bind", run.path, run.path], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", run.path], check=True)
        attempt = run.start()
        status = attempt.wait(PATIENCE)
    finally:
        subprocess.run(["umount", run.path], check=True)
    if status is None:
        raise Fault(f"hangs in a directory that is not writable: {attempt.abort()}")
    if _listing(run.path) != before:
        raise Fault("changed a directory that is not writable")
    return _expect(attempt, status, {1}, "not writable")


def _listing(path: Path) -> list[tuple]:
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in path.rglob("*"))


def _two_processes(run: Run, rng: random.Random) -> bool:
    """The second is refused; then the first is killed, which leaves its lock behind."""
    first = run.start()
    status = first.wait(run.moment(rng) / 2)
    if status is not None:
        return _expect(first, status, set())
    left, end = [first, run.start()], time.monotonic() + PATIENCE
    while time.monotonic() < end:
        for attempt in left:
            if (status := attempt.wait(0)) is not None:
                left.remove(attempt)
                (other,) = left
                if status:
                    other.kill()
                else:  # it has come to the end, and the other one sees that it has
                    other.wait(PATIENCE)
                return _expect(attempt, status, {1}, "another process is at work")
    for attempt in left:
        attempt.kill()
    raise Fault("two processes at work in one directory")


def _expect(attempt: Attempt, status: int, wanted: set[int], words: str = "") -> bool:
    """Whether it ended as wanted, or False where it had finished before."""
    if status == 0:
        return False
    complaint = attempt.complaint
    *_, last = complaint.splitlines() or [""]
    if status not in wanted or (status == 1 and not (last.startswith("error: ") and words in last)):
        raise Fault(f"status {status}, wanted {wanted} {words!r}: {complaint[-3000:]}")
    return True


class Kind(NamedTuple):
    """A disturbance.

    Attributes:
      share: how often, of 50.
      disturb: `(run, rng)` -> whether it was hit; None where it cannot be done yet.
    """

    share: int
    disturb: Callable[[Run, random.Random], bool | None]


KINDS = {
    "SIGKILL": Kind(12, _killed),
    "SIGTERM": Kind(8, _told(signal.SIGTERM, 75)),
    "Ctrl-C": Kind(5, _told(signal.SIGINT, 130)),
    "disk full": Kind(8, _disk_full),
    "checkpoint truncated": Kind(3, _damaged(_truncate)),
    "checkpoint flipped": Kind(3, _damaged(_flip)),
    "checkpoint half deleted": Kind(3, _damaged(_half_delete)),
    "clock jumps": Kind(3, _clock_jumps),
    "directory read-only": Kind(2, _read_only),
    "two processes": Kind(3, _two_processes),
}


def torture(family: str, folder: Path, num: int, seed: int, kinds: list[str]) -> dict[str, Any]:
    """Interrupt a family at least `num` times, in each way at least once.

    Returns:
      `tried` and `survived` by kind, the number of `runs` that came to their end, and `faults`.
    """
    rng = random.Random(f"{seed} {family}")
    try:
        undisturbed = _undisturbed(family, folder)
    except Fault as fault:
        say(f"FAULT {family}: {fault}")
        return {"tried": {}, "survived": {}, "runs": 0, "faults": [f"{family}: {fault}"]}
    shares = [KINDS[kind].share for kind in kinds]
    todo = [kind for kind in kinds for _ in range(max(1, num * KINDS[kind].share // sum(shares)))]
    todo += rng.choices(kinds, shares, k=max(0, num - len(todo)))
    rng.shuffle(todo)
    tried, survived, faults, runs = Counter(), Counter(), [], 0
    with Progress(family, len(todo)) as progress:
        while todo:
            runs += 1
            run = Run(family, folder / str(runs), undisturbed.times)
            done: Counter[str] = Counter()
            try:
                _disturb_until_it_ends(run, todo, done, rng, progress)
                _compare(run, undisturbed)
                survived += done
            except Fault as fault:
                faults.append(f"{family}, seed {seed}, run {runs}, {dict(done)}: {fault}")
                say(f"FAULT {faults[-1]}")
            else:
                shutil.rmtree(run.path)
            tried += done
    return {"tried": dict(tried), "survived": dict(survived), "runs": runs, "faults": faults}


def _undisturbed(family: str, folder: Path) -> Run:
    """Two whole runs, the second timed, compared with each other."""
    first, second = Run(family, folder / "compiled"), Run(family, folder / "undisturbed")
    _finish(first)
    began, attempt, row = time.monotonic(), second.start(), None
    while (status := attempt.wait(0.005)) is None:
        if row is None and second.checkpoints:
            row = time.monotonic() - began
    if status:
        raise Fault(f"status {status}: {attempt.complaint[-3000:]}")
    second.times = row or 0.0, time.monotonic() - began
    _compare(second, first)
    return second


def _finish(run: Run) -> None:
    attempt = run.start()
    if (status := attempt.wait(5 * PATIENCE)) != 0:
        raise Fault(f"undisturbed, it ends with status {status}: {attempt.complaint[-3000:]}")


def _disturb_until_it_ends(
    run: Run, todo: list[str], done: Counter[str], rng: random.Random, progress: Progress
) -> None:
    later = []
    while todo:
        kind = todo.pop()
        try:
            hit = KINDS[kind].disturb(run, rng)
        except Fault:
            done[kind] += 1
            todo += later
            raise
        if hit:
            done[kind] += 1
            progress.advance(1, kind)
        else:
            later.append(kind)
            done["SIGKILL"] += hit is None  # and then there was no second checkpoint to damage
        if hit is False:
            break
    else:
        _finish(run)
    todo[:0] = later


def _compare(run: Run, other: Run) -> None:
    """Refuse whatever differs."""
    for here, there in zip(run.workdirs, other.workdirs, strict=True):
        if _rows(here) != _rows(there):
            raise Fault(f"other rows of metrics in {here.path}")
        if _result(here) != _result(there):
            raise Fault(f"another result in {here.path}")
    reader = fork(run.words / "compared", lambda: _differ(run, other))
    status = reader.wait(PATIENCE)
    if status is None:
        raise Fault(f"a checkpoint is not read: {reader.abort()}")
    if status:
        raise Fault(f"leaves of the state differ: {reader.said}{reader.complaint}")


def _differ(run: Run, other: Run) -> int:
    """1 where a leaf of a checkpoint differs in a bit."""
    for here, there in zip(run.workdirs, other.workdirs, strict=True):
        for folder in (there.checkpoints, there.best_checkpoint):
            if not folder.exists():
                continue
            path = max(folder.glob("*"), key=lambda p: int(p.name)) / "state"
            same = here.path / path.relative_to(there.path)
            with ocp.StandardCheckpointer() as reader:
                pair = [jax.tree.leaves_with_path(reader.restore(p)) for p in (path, same)]
            for (name, a), (other_name, b) in zip(*pair, strict=True):
                equal = np.asarray(a).tobytes() == np.asarray(b).tobytes()
                if name != other_name or a.dtype != b.dtype or not equal:
                    say(f"{same}: {jax.tree_util.keystr(name)}")
                    return 1
    return 0


def _rows(workdir: Workdir) -> list[dict]:
    rows = [json.loads(line) for line in workdir.metrics.read_text().splitlines()]
    return [{name: v for name, v in row.items() if name not in TIMING} for row in rows]


def _result(workdir: Workdir) -> dict:
    result = json.loads(workdir.results.read_text())
    return {name: result[name] for name in ("metrics", "step", "num_parameters", "config")}


@contextmanager
def small_disk() -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder on a small file system of its own where it can be had; and what cannot be done."""
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "disk"
        disk.mkdir()
        mounted = _mount("-t", "tmpfs", "-o", f"size={DISK}", "none", str(disk))
        reason = "needs root, and leave to mount"
        try:
            yield disk, {} if mounted else {"directory read-only": reason}
        finally:
            if mounted:
                subprocess.run(["umount", disk], check=True)


def _mount(*args: str) -> bool:
    """In a name space of our own: whatever happens here, nothing stays mounted."""
    new_namespace = 0x20000  # CLONE_NEWNS
    if os.geteuid() or ctypes.CDLL(None).unshare(new_namespace):
        return False
    commands = [["mount", "--make-rprivate", "/"], ["mount", *args]]
    return all(not subprocess.run(c, capture_output=True, check=False).returncode for c in commands)


def leave_out_what_takes_long() -> None:
    """Pictures, and all of the evaluation but the terms of the loss: nothing there is resumed."""
    run._draw_pictures = lambda *args: []
    run._say_header = lambda *args: say("training")
    report._learning_curves = report._rate_distortion = report._against = lambda path, *rest: path
    results.git_revision = lambda: None

    def compile_evaluation(model, dataset, config, mesh, show=True):
        terms = likelihood.elbo_terms(model, config.elbo_samples)
        measure = passes.compile_pass(terms, dataset, config.split, config.batch_size, mesh)

        def evaluate(params, seed):
            each = measure(params, seed)
            return likelihood.Measured(passes.summarise(each, config.elbo_samples), each)

        return evaluate

    likelihood.compile_evaluation = compile_evaluation


def table(found: dict[str, dict[str, Any]]) -> str:
    """'survived / tried' by family and kind."""

    def row(name: str, of: list[dict[str, Any]]) -> list[str]:
        each = [[sum(f[w].get(k, 0) for f in of) for w in ("survived", "tried")] for k in KINDS]
        each.append([sum(column) for column in zip(*each, strict=True)])
        return [name, *(f"{a} / {b}" if b else "–" for a, b in each)]

    lines = [row(f"`{family}`", [of]) for family, of in sorted(found.items())]
    lines.append(row("together", list(found.values())))
    cut = sum(of["seconds"] for of in found.values()), sum(of["runs"] for of in found.values())
    below = f"Survived / tried; {cut[1]} runs came to their end, in {cut[0] / 60:.0f} minutes."
    return f"{markdown(('', *KINDS, 'together'), lines)}\n{below}"


def measure_saving() -> dict[str, Any]:
    """Seconds of a dispatch of the default recipe, during a save and otherwise.

    A checkpoint is saved after every third: the one that follows starts when the save has copied
    the state, and runs beside the rest of it.
    """
    fields = {
        "train.duration": f"{DISPATCHES * 20} steps",
        "train.steps_per_dispatch": 20,
        "train.validate_every": f"{DISPATCHES * 20} steps",
        "train.checkpoint_every": "60 steps",
        "data.source": "embedded",
        "eval.num_samples": 2,
    }
    with tempfile.TemporaryDirectory() as folder:
        workdir = Workdir(Path(folder) / "run")
        run.train_mode(configs.load(str(REPO / "configs/vae_mnist.py"), fields), workdir)
        rows = [r for r in map(json.loads, workdir.metrics.open()) if "seconds" in r]
        size = _size_of_a_checkpoint(Run("vae", workdir.path))
    seconds = np.diff([row["seconds"] for row in rows])[2:]  # the first are slow to start
    after_a_save = np.array([row["step"] % 60 == 20 for row in rows[1:]])[2:]
    return {
        "dispatches": len(seconds),
        "bytes": size,
        "during": float(np.median(seconds[after_a_save])),
        "otherwise": float(np.median(seconds[~after_a_save])),
    }


def about_saving(found: dict[str, Any]) -> str:
    """What `measure_saving` has found, in words."""
    return (
        f"Of {found['dispatches']} dispatches of 20 steps of `configs/vae_mnist.py`, those during "
        f"which a checkpoint of {found['bytes'] / 1e6:.0f} MB was saved took "
        f"{1e3 * found['during']:.0f} ms (median), the others {1e3 * found['otherwise']:.0f} ms."
    )


INTERRUPTIONS, SAVING = (
    Section(name, DOCS / "reliability.json", DOCS / "reliability.md", show)
    for name, show in (("interruptions", table), ("saving", about_saving))
)


def main() -> None:
    """Interrupt, count, and keep."""
    families = [*models.names(), SWEEP]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", default=families, choices=families)
    parser.add_argument("--interruptions", type=int, default=50, help="of each family (50)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (0)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--saving", action="store_true", help="time dispatches during a save")
    parser.add_argument("--keep", action="store_true", help="write the record and the page")
    chosen = parser.parse_args()
    if chosen.saving:
        leave_out_what_takes_long()
        found = measure_saving()
        print(about_saving(found))
        if chosen.keep:
            SAVING.keep(found)
        return
    datasets = {name: tiny.accepted_by(models.defaults(name)) for name in models.names()}
    for module in (run, sweep):
        module.load_data = lambda config: datasets[config.model.name]
    leave_out_what_takes_long()
    jax.config.update("jax_compilation_cache_dir", str(cache.folder() / "torture"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if chosen.keep:
        INTERRUPTIONS.check()
    gc.freeze()  # a child that ends need not tidy up what it shares
    found: dict[str, Any] = {}
    with small_disk() as (folder, cannot):
        kinds = [kind for kind in chosen.kinds if kind not in cannot]
        for kind in set(chosen.kinds) - set(kinds):
            say(f"left out: {kind} ({cannot[kind]})")
        if not kinds:
            sys.exit("there is nothing left to do")
        for family in chosen.families:
            started = time.monotonic()
            of = torture(family, folder, chosen.interruptions, chosen.seed, kinds)
            of |= {"seed": chosen.seed, "seconds": round(time.monotonic() - started)}
            found[family] = of
            say(f"{family}: {sum(of['survived'].values())} of {sum(of['tried'].values())}")
            for path in folder.iterdir():
                shutil.rmtree(path)
            if chosen.keep:  # after each, so that what was measured outlives this process too
                INTERRUPTIONS.keep({**INTERRUPTIONS.read(), family: of})
    print("\n" + table(found))
    for fault in (fault for of in found.values() for fault in of["faults"]):
        print(fault)
    sys.exit(any(of["tried"] != of["survived"] or of["faults"] for of in found.values()))


if __name__ == "__main__":
    main()
