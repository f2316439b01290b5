"""From the members of a sweep to their work directories, a table and plots."""

import functools
import itertools
import re
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
from ml_collections import ConfigDict

from dgm_jax import config as configs
from dgm_jax import files, models, results, sharding
from dgm_jax.checkpoint import Checkpoints
from dgm_jax.core import UserError
from dgm_jax.data import dataset as data
from dgm_jax.evaluators import likelihood
from dgm_jax.progress import Progress, say
from dgm_jax.run import load_data
from dgm_jax.sweep import axes, jobs, program, report
from dgm_jax.sweep.axes import Member
from dgm_jax.trained_model import Trained
from dgm_jax.workdir import Workdir, check_writable, is_new, write_json


def run_sweep(
    folder: Path,
    config: ConfigDict,
    members: Sequence[Member],
    launcher: str | None = None,
    only: int | None = None,
) -> None:
    """Train and measure given members; write `sweep.csv`, `sweep.md` and plots to `folder`.

    See `mode.sweep_mode`.
    """
    results.git_revision()  # of the code that runs, not of what is there hours later
    members = _agreed(folder, config, axes.complete(config, members))
    each = [configs.override(config, member) for member in members]
    workdirs = workdirs_of(folder, members)
    groups = program.group(each)
    if only is not None and not 0 <= only < len(groups):
        raise UserError(f"--program={only}: this sweep has the programs 0 to {len(groups) - 1}")
    wanted = range(len(groups)) if only is None else [only]

    def left() -> list[int]:
        return [i for i in wanted if not all(workdirs[j].finished for j in groups[i])]

    members_left = [each[j] for i in left() for j in groups[i]]
    sharding.share_cores(max((len(groups[i]) for i in left()), default=1))
    by_data = {repr(member.data): member for member in members_left}
    dataset_of = functools.lru_cache(maxsize=1)(lambda section: load_data(by_data[section]))
    # All of them, before the first trains for hours; of several data sets memory holds one.
    for member in sorted(members_left, key=lambda member: repr(member.data)):
        program.check(member, dataset_of(repr(member.data)))
    _claim(folder, config, members)
    sizes = ", ".join(str(len(chosen)) for chosen in groups)
    say(f"sweep       {len(each)} members, {sizes} to a program, {jax.device_count()} devices")
    if launcher is not None:
        dataset_of.cache_clear()  # the jobs load their own
        jobs.run(folder, left, launcher)
    else:
        for i in left():
            _run_program(
                [each[j] for j in groups[i]],
                dataset_of(repr(each[groups[i][0]].data)),
                [workdirs[j] for j in groups[i]],
                folder / "programs" / str(i),
                f"program {i + 1} of {len(groups)}",
            )
    if only is None:
        # Each member has a checkpoint of its own now.
        shutil.rmtree(folder / "programs", ignore_errors=True)
        report.write(folder, members, [w.path for w in workdirs], config)


def workdirs_of(folder: Path, members: Sequence[Member]) -> list[Workdir]:
    """`members/003-beta=0.5-seed=0`: in order, no character that a shell or a file system minds."""
    short = axes.labels(list(members[0]))
    digits = len(str(len(members) - 1))
    names = [re.sub(r"[^A-Za-z0-9=_.+-]+", "-", axes.name(m, short))[:100] for m in members]
    return [Workdir(folder / "members" / f"{i:0{digits}d}-{n}") for i, n in enumerate(names)]


def _agreed(folder: Path, config: ConfigDict, members: Sequence[Member]) -> list[Member]:
    """The members, with their fields in the order of the sweep that is in `folder`, if it is.

    Raises:
      UserError: what is in the folder is something else.
    """
    check_writable(folder)
    if _about(folder).exists():
        differs = configs.differences(config, (there := read_about(folder))[0])
        if differs or list(members) != there[1]:
            what = "; ".join(differs) or f"its members are {len(there[1])} others"
            raise UserError(f"{folder} is of another sweep ({what}): choose another --workdir")
        return there[1]
    if folder.exists() and not is_new(folder):
        raise UserError(f"{folder} is not empty and is no sweep: choose another --workdir")
    return list(members)


def _claim(folder: Path, config: ConfigDict, members: Sequence[Member]) -> None:
    """Make the folder, and say in it what it is about."""
    if not _about(folder).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(_about(folder), {"config": config.to_dict(), "members": list(members)})


def _about(folder: Path) -> Path:
    """Where a sweep says what it is about."""
    return folder / "sweep.json"


def read_about(folder: Path) -> tuple[ConfigDict, list[Member]]:
    """The config and the members of the sweep in `folder`.

    Raises:
      UserError: there is none, or what says so is damaged.
    """
    path = _about(folder)
    if not path.exists():
        raise UserError(f"{folder} is no sweep (it has no {path.name}): give --config")
    with files.reading(path, "choose another --workdir"):
        about = files.read_json(path)
        config, members = configs.from_dict(about["config"]), about["members"]
        return config, axes.complete(config, [configs.tuples(m) for m in members])


def _run_program(
    members: Sequence[ConfigDict],
    dataset: data.Dataset,
    workdirs: Sequence[Workdir],
    folder: Path,
    title: str,
) -> None:
    """Train the members of one program together, and measure them one after another."""
    _allow_open_files(3 * len(members))  # of each its lock, its rows and its events
    for config, workdir in zip(members, workdirs, strict=True):
        workdir.check_config(config)
    with ExitStack() as stack:
        for config, workdir in zip(members, workdirs, strict=True):
            stack.enter_context(workdir.claimed(config, dataset.card, dataset.spec.mean))
        outcomes = program.train(members, dataset, workdirs, folder, title)
        _finish_all(members, dataset, workdirs, outcomes)


def _allow_open_files(num: int) -> None:
    """Let this process hold so many files open, beside some hundred of its own.

    Raises:
      UserError: the system does not allow it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num += 200
    if num <= soft or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and num > hard:
        raise UserError(
            f"a program of this sweep holds {num:,} files open, and the system allows {hard:,} "
            "(ulimit -Hn): make several sweeps of it"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (num, hard))


def _finish_all(
    members: Sequence[ConfigDict],
    dataset: data.Dataset,
    workdirs: Sequence[Workdir],
    outcomes: Sequence[program.Outcome],
) -> None:
    def measured_as(i: int) -> str:
        return repr((members[i].model, members[i].eval))

    left = [i for i, workdir in enumerate(workdirs) if not workdir.results.exists()]
    with Progress("measuring", len(left)) as progress:
        # Members that differ in the seed or the optimizer alone are evaluated by one program; of
        # several one at a time is kept, since each has its copies of the data.
        for _, alike in itertools.groupby(sorted(left, key=measured_as), measured_as):
            first, *_ = same = list(alike)
            evaluate = _compile_evaluation(members[first], dataset)
            for i in same:
                _finish(members[i], workdirs[i], dataset, outcomes[i], evaluate)
                progress.advance(1, workdirs[i].path.name)


def _compile_evaluation(
    config: ConfigDict, dataset: data.Dataset
) -> Callable[..., likelihood.Measured]:
    model, section = models.build(config.model, dataset.spec), configs.section(config, "eval")
    mesh = sharding.make_mesh()
    return likelihood.compile_evaluation(model, dataset, section, mesh, show=False)


def _finish(
    config: ConfigDict,
    workdir: Workdir,
    dataset: data.Dataset,
    outcome: program.Outcome,
    evaluate: Callable,
) -> None:
    """Save a member's checkpoint; write its `results.json`, or why there is none."""
    state = outcome.state
    checkpoints = Checkpoints(workdir.checkpoints)
    checkpoints.save(state)
    checkpoints.close()
    failure, began = outcome.failure, time.monotonic()
    if failure is None:
        # Once, not for every batch.
        params = jax.device_put(state.eval_params, sharding.replicated(sharding.make_mesh()))
        try:
            found = evaluate(params, config.seed)
        except UserError as error:
            failure = f"{config.eval.split} split: {error}"
    if failure is not None:
        say(f"{workdir.path.name}: {failure}")
        write_json(workdir.failure, {"failure": failure, "step": int(outcome.state.step)})
        return
    seconds = {**outcome.seconds, "evaluation": time.monotonic() - began}
    model = models.build(config.model, dataset.spec)
    trained = Trained(config, model, state.eval_params, dataset.spec, int(state.step))
    about = {"seconds": seconds, "written": workdir.files()}
    results.write_measured(workdir.results, trained, dataset, found, **about)
