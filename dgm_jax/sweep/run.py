"""`--mode=sweep`: from the members to their work directories, a table and plots."""

import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from dgm_jax import config as configs
from dgm_jax import models, sharding
from dgm_jax.checkpoint import Checkpoints
from dgm_jax.core import UserError
from dgm_jax.data import dataset as data
from dgm_jax.evaluators import likelihood
from dgm_jax.progress import Progress, say
from dgm_jax.run import Trained, load_data, write_result
from dgm_jax.sweep import axes, program, report
from dgm_jax.sweep.axes import Member
from dgm_jax.workdir import Workdir, write_json


def sweep_mode(config: ConfigDict, members: Sequence[Member], folder: Path) -> None:
    """Train and measure every member; write `sweep.csv`, `sweep.md` and plots to `folder`.

    Goes on with the members that are not finished where an earlier call was interrupted.

    Args:
      config: what the members vary.
      members: fields and values of each.
      folder: of the sweep; each member has a work directory of its own in it.

    Raises:
      UserError: a value that makes no sense, or the folder is of another sweep.
    """
    members = axes.complete(config, members)
    each = [configs.override(config, member) for member in members]
    workdirs = [Workdir(folder / "members" / name) for name in directory_names(members)]
    _claim(folder, config, members)
    groups = program.group(each)
    sizes = ", ".join(str(len(chosen)) for chosen in groups)
    say(f"sweep       {len(each)} members, {sizes} to a program, {jax.device_count()} devices")
    for i, chosen in enumerate(groups):
        left = [j for j in chosen if not workdirs[j].finished]
        if left:
            _run_program(
                [each[j] for j in chosen],
                [workdirs[j] for j in chosen],
                folder / "programs" / str(i),
                f"program {i + 1} of {len(groups)}",
            )
    # Each member has a checkpoint of its own now.
    shutil.rmtree(folder / "programs", ignore_errors=True)
    report.write(folder, members, [w.path for w in workdirs], config)


def directory_names(members: Sequence[Member]) -> list[str]:
    """`"003-beta=0.5-seed=0"`: in order, and no character that a shell or a file system minds."""
    short = axes.labels(list(members[0]))
    digits = len(str(len(members) - 1))
    return [
        f"{i:0{digits}d}-" + re.sub(r"[^A-Za-z0-9=_.+-]+", "-", axes.name(member, short))[:100]
        for i, member in enumerate(members)
    ]


def _claim(folder: Path, config: ConfigDict, members: Sequence[Member]) -> None:
    """Make the folder and say in it what it is about, or find that it is about the same."""
    path = folder / "sweep.json"
    # As JSON has it: tuples are lists there.
    about = json.loads(json.dumps({"config": config.to_dict(), "members": list(members)}))
    if path.exists():
        there = json.loads(path.read_text())
        if there != about:
            what = [name for name in about if there.get(name) != about[name]]
            raise UserError(
                f"{folder} is of another sweep (other {' and '.join(what)}): choose another "
                "--workdir"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and is no sweep: choose another --workdir")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, about)


def _run_program(
    members: Sequence[ConfigDict], workdirs: Sequence[Workdir], folder: Path, title: str
) -> None:
    """Train the members of one program together, and measure them one after another."""
    dataset = load_data(members[0])
    for config, workdir in zip(members, workdirs, strict=True):
        workdir.check_config(config)
        workdir.claim(config, dataset.card)
    outcomes = program.train(members, dataset, workdirs, folder, title)
    evaluations: dict[str, Callable] = {}
    with Progress("measuring", len(members)) as progress:
        for config, workdir, outcome in zip(members, workdirs, outcomes, strict=True):
            # Members that differ in the seed or the optimizer alone are evaluated by one program.
            key = repr(config.model)
            if key not in evaluations:
                evaluations[key] = _compile_evaluation(config, dataset)
            if not workdir.finished:
                _finish(config, workdir, dataset, outcome, evaluations[key])
            progress.advance(1, workdir.path.name)


def _compile_evaluation(config: ConfigDict, dataset: data.Dataset) -> Callable:
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
    if outcome.failure is not None:
        say(f"{workdir.path.name}: {outcome.failure}")
        write_json(workdir.failure, {"failure": outcome.failure})
        return
    began = time.monotonic()
    found = evaluate(state.eval_params, config.seed)
    seconds = {**outcome.seconds, "evaluation": time.monotonic() - began}
    model = models.build(config.model, dataset.spec)
    trained = Trained(config, model, state.eval_params, dataset.spec, int(state.step))
    files = [*sorted(p.name for p in workdir.path.iterdir()), workdir.results.name]
    write_result(workdir.results, trained, dataset, found, seconds, files)
