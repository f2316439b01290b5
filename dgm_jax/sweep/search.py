"""A search instead of a grid: Optuna chooses the members of each round (the extra `sweep`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from dgm_jax import models, run, sharding, writers
from dgm_jax.core import UserError
from dgm_jax.progress import say
from dgm_jax.sweep import axes, report
from dgm_jax.sweep.axes import Distribution, Member
from dgm_jax.sweep.run import read_about, run_sweep, workdirs_of
from dgm_jax.workdir import Workdir, is_new

if TYPE_CHECKING:
    import optuna


def search(
    folder: Path,
    config: ConfigDict,
    over: Mapping[str, Distribution],
    trials: str,
    launcher: str | None = None,
) -> None:
    """Look for the highest validation ELBO; write a table and plots of all trials to `folder`.

    Of a model that knows log p(x) it is this instead.

    Each round is a sweep in `folder`, its members of one shape trained as one program; what it
    found tells Optuna's sampler (a tree-structured Parzen estimator; Bergstra et al. 2011) what to
    try next. Test images play no part in the choice. An interrupted search goes on.

    Args:
      folder: of the search.
      config: what the trials vary.
      over: the range of each field.
      trials: rounds and members of each, `"4x8"`.
      launcher: as in `jobs.run`.

    Raises:
      UserError: Optuna is not installed, the model has no likelihood, the folder is of something
        else, or a value makes no sense.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("a search needs Optuna: pip install 'dgm_jax[sweep]'") from error
    num_rounds, num_members = _numbers(trials)
    if config.data.validation < 1:
        raise UserError(
            "data.validation=0: a search chooses by the validation split; hold some out"
        )
    if folder.exists() and not is_new(folder) and not (folder / "round-0").exists():
        raise UserError(f"{folder} is not empty and is no search: choose another --workdir")
    # Once for all rounds: JAX starts with it.
    sharding.share_cores(num_members)
    model = models.build(config.model, run.load_data(config).spec)
    if not model.log_likelihood_fns:
        raise UserError(
            f"a search looks for the highest likelihood, and model.name={config.model.name!r} has "
            "none: run a sweep, without --trials"
        )
    metric = f"validation/{next(iter(model.log_likelihood_fns))}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=config.seed, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    members: list[Member] = []
    paths: list[Path] = []
    for i in range(num_rounds):
        part = folder / f"round-{i}"
        asked = [study.ask() for _ in range(num_members)]
        proposed = [{p: range_.suggest(trial, p) for p, range_ in over.items()} for trial in asked]
        # Of a few values the sampler may propose the same again: it is trained once.
        new: list[Member] = []
        for member in proposed:
            if member not in members + new:
                new.append(member)
        places = [(members + new).index(member) for member in proposed]
        if (part / "sweep.json").exists():  # of an earlier call; the sampler hears of it the same
            earlier = read_about(part)[1]
            if len(earlier) != len(new) or not all(_lies_in(member, over) for member in earlier):
                raise UserError(f"{part} is of another search: choose another --workdir")
            new = earlier
        if new:
            run_sweep(part, config, new, launcher)
            paths += [w.path for w in workdirs_of(part, axes.complete(config, new))]
        members += new
        for trial, place in zip(asked, places, strict=True):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            if (value := _last(metric, paths[place])) is not None:
                study.add_trial(_finished(members[place], over, value))
    report.write(folder, members, paths, config)
    values = {path: _last(metric, path) for path in paths}
    reached = {path: value for path, value in values.items() if value is not None}
    if not reached:
        raise UserError("every trial has failed (see sweep.md): lower the ranges")
    best = max(reached, key=reached.get)
    say(f"best        {best}: {metric} {reached[best]:.3f} nats")


def _numbers(trials: str) -> tuple[int, int]:
    rounds, _, members = trials.partition("x")
    if not (rounds.isdigit() and members.isdigit() and int(rounds) and int(members)):
        raise UserError(f"--trials={trials!r}: write rounds and members of each, such as 4x8")
    return int(rounds), int(members)


def _lies_in(member: Member, over: Mapping[str, Distribution]) -> bool:
    """Whether a search over these ranges may have proposed a member."""
    return member.keys() == over.keys() and all(over[p].contains(v) for p, v in member.items())


def _finished(
    member: Member, over: Mapping[str, Distribution], value: float
) -> "optuna.trial.FrozenTrial":
    """A trial as if the sampler had asked for this member."""
    import optuna

    fixed = optuna.trial.FixedTrial({p: over[p].key(v) for p, v in member.items()})
    for path, range_ in over.items():
        range_.suggest(fixed, path)
    return optuna.trial.create_trial(
        params=fixed.params, distributions=fixed.distributions, value=value
    )


def _last(metric: str, path: Path) -> float | None:
    """The last value that a member has logged, or None where it has failed."""
    workdir = Workdir(path)
    if not workdir.results.exists():
        return None
    rows = [row for row in writers.read(workdir.metrics) if metric in row]
    return rows[-1][metric] if rows else None
