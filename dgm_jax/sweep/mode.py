"""`--mode=sweep`: whose members, and whether they are given or looked for."""

from pathlib import Path

from ml_collections import ConfigDict

from dgm_jax import config as configs
from dgm_jax.core import UserError
from dgm_jax.sweep import axes, run, search


def sweep_mode(
    folder: Path,
    config: ConfigDict | None = None,
    config_file: str | None = None,
    grid: str | None = None,
    launcher: str | None = None,
    only: int | None = None,
    trials: str | None = None,
) -> None:
    """Train and measure every member; write `sweep.csv`, `sweep.md` and plots to `folder`.

    Goes on with the members that are not finished where an earlier call was interrupted.

    Args:
      folder: of the sweep; each member has a work directory of its own in it.
      config: what the members vary; None for the sweep that is in `folder` already.
      config_file: where it came from; its `sweep()` gives the members where there is no grid.
      grid: as in `axes.parse`.
      launcher: as in `jobs.run`, each program a job of its own; None for this process.
      only: the number of the one program to run, without a table at the end.
      trials: makes it a search over the ranges in `grid`, as in `search.search`.

    Raises:
      UserError: a value that makes no sense, or the folder is of another sweep.
    """
    if trials is not None:
        if only is not None:
            raise UserError(f"--program={only}: a search is not run in parts; leave it out")
        if config is None or grid is None:
            raise UserError("--trials needs --config, and ranges in --sweep='field=uniform(0,1)'")
        search.search(folder, config, axes.parse_search(grid, config), trials, launcher)
        return
    if config is None:
        if grid is not None:
            raise UserError("--sweep needs --config; without both, the sweep in --workdir goes on")
        config, members = run.read_about(folder)
    else:
        members = configs.load_sweep(config_file) if grid is None else axes.parse(grid, config)
    run.run_sweep(folder, config, members, launcher, only)
