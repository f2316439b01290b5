"""What a sweep found: a tidy table, means with confidence intervals, plots."""

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from scipy import stats

from dgm_jax import config as configs
from dgm_jax import results, writers
from dgm_jax.metrics import LIKELIHOODS
from dgm_jax.progress import say
from dgm_jax.sweep import axes
from dgm_jax.sweep.axes import Member
from dgm_jax.workdir import Workdir, write_text


class Row(NamedTuple):
    """One member.

    Attributes:
      member: its fields and values.
      setting: the same without the seed: members that differ in nothing else are repeats.
      path: its work directory.
      metrics: name -> value; empty where it failed.
      failure: why it was stopped, or None.
      step: updates made.
      seconds: of training.
    """

    member: Member
    setting: tuple[tuple[str, Any], ...]
    path: Path
    metrics: dict[str, float]
    failure: str | None
    step: int | None
    seconds: float | None


class Estimate(NamedTuple):
    """A mean over seeds with half the width of its 95 % confidence interval (nan for one seed)."""

    mean: float
    half_width: float


def write(
    folder: Path, members: Sequence[Member], paths: Sequence[Path], config: ConfigDict
) -> None:
    """Write `sweep.csv`, `sweep.md`, and the plots; say the table.

    Args:
      folder: of the sweep.
      members: fields and values of each; all have the same fields.
      paths: their work directories, finished.
      config: what they vary.
    """
    rows = [_read(member, path) for member, path in zip(members, paths, strict=True)]
    short = axes.labels(list(members[0]))
    _write_csv(folder / "sweep.csv", rows, short)
    text = table(rows, short, baseline(rows, config))
    write_text(folder / "sweep.md", text)
    say("\n" + text)
    pictures = [_learning_curves(folder / "learning_curves.png", rows, short)]
    names = _shown(rows)
    if {"rate", "distortion"} <= set(names):
        title = f"{config.eval.split} split"
        pictures.append(_rate_distortion(folder / "rate_distortion.png", rows, short, title))
    pictures += [
        _against(folder / f"by_{short[path]}.png", rows, path, names)
        for path in short
        if names and path != "seed" and len({row.member[path] for row in rows}) > 1
    ]
    places = dict.fromkeys(f"{path.relative_to(folder).parts[0]}/" for path in paths)
    say(
        f"in {folder}: {', '.join(['sweep.csv', 'sweep.md', *(p.name for p in pictures), *places])}"
    )


def _read(member: Member, path: Path) -> Row:
    workdir = Workdir(path)
    setting = tuple((name, value) for name, value in member.items() if name != "seed")
    if not workdir.results.exists():
        return Row(member, setting, path, {}, workdir.load_failure(), None, None)
    result = results.load(workdir.results)
    found = {name: metric["value"] for name, metric in result["metrics"].items()}
    return Row(member, setting, path, found, None, result["step"], result["seconds"]["training"])


def _shown(rows: Iterable[Row]) -> list[str]:
    """Metrics that every finished member has, without the single points of a curve."""
    found = [row.metrics for row in rows if row.metrics]
    names = [name for name in (found[0] if found else {}) if all(name in f for f in found)]
    return [n for n in names if not re.fullmatch(r"importance_weighted_bound_\d+", n)]


def _write_csv(path: Path, rows: Sequence[Row], short: Mapping[str, str]) -> None:
    """A row for each member: what it was, what became of it, everything measured."""
    measured = list(dict.fromkeys(name for row in rows for name in row.metrics))
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["member", *short, "status", "step", "training_seconds", *measured])
    for row in rows:
        status = "finished" if row.failure is None else row.failure
        table.writerow(
            [_named(row.path, path.parent), *(row.member[p] for p in short), status]
            + ["" if v is None else v for v in (row.step, row.seconds)]
            + [row.metrics.get(name, "") for name in measured]
        )
    write_text(path, text.getvalue())


def _named(path: Path, folder: Path) -> str:
    """`3-beta=1`; of a search, where the rounds are sweeps, `round-0/3-beta=1`."""
    return "/".join(part for part in path.relative_to(folder).parts if part != "members")


def baseline(rows: Sequence[Row], config: ConfigDict) -> tuple:
    """The setting whose values are the config's own, or else the first."""
    known = configs.fields(config)
    settings = list(dict.fromkeys(row.setting for row in rows))
    same = [s for s in settings if all(known[path] == value for path, value in s)]
    return (same or settings)[0]


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """The mean with its 95 % interval by Student's t, of independent repeats."""
    half = math.nan
    if len(values) > 1:
        error = np.std(values, ddof=1) / math.sqrt(len(values))
        half = float(stats.t.ppf(0.975, len(values) - 1) * error)
    return Estimate(float(np.mean(values)), half)


def difference(rows: Sequence[Row], setting: tuple, base: tuple, name: str) -> Estimate | None:
    """Mean of (setting - baseline) over the seeds that both have, seed by seed.

    What a seed does to both alike, data order and noise, is not in the interval.
    """
    of = {
        chosen: {row.member.get("seed"): row.metrics[name] for row in rows if row.metrics
                 and row.setting == chosen}
        for chosen in (setting, base)
    }  # fmt: skip
    both = [seed for seed in of[setting] if seed in of[base]]
    if setting == base or not both:
        return None
    return mean_over_seeds([of[setting][seed] - of[base][seed] for seed in both])


def table(rows: Sequence[Row], short: Mapping[str, str], base: tuple) -> str:
    """Markdown: mean ± 95 % interval over seeds for each setting, and its paired difference."""
    names = _shown(rows)
    paths = [path for path in short if path != "seed"]
    lines = ["# " + ", ".join(short[path] for path in paths or short), ""]
    lines += [
        "Mean over seeds ± half of its 95 % confidence interval (Student's t). In brackets the "
        "difference from the baseline, seed by seed, with its own interval."
    ]
    lines += ["", "| " + " | ".join([*(short[p] for p in paths), "seeds", *names]) + " |"]
    lines += ["|" + "---|" * (len(paths) + 1 + len(names))]
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [row for row in rows if row.setting == setting]
        done = [row for row in own if row.metrics]
        cells = [axes.shown(dict(setting)[path]) for path in paths]
        cells += [f"{len(done)} of {len(own)}" if len(done) < len(own) else str(len(own))]
        for name in names:
            if not done:
                cells.append("failed")
                continue
            # Two decimals say enough of nats, and nothing of bits/dim.
            decimals = 2 if max(abs(row.metrics.get(name, 0)) for row in rows) >= 1 else 4
            cell = _text(mean_over_seeds([row.metrics[name] for row in done]), decimals)
            against = difference(rows, setting, base, name)
            cells.append(cell + (f" ({_text(against, decimals, '+')})" if against else ""))
        lines.append("| " + " | ".join(cells) + " |")
    if base:
        chosen = ", ".join(f"{short[path]} = {axes.shown(value)}" for path, value in base)
        lines += ["", f"Baseline: {chosen}."]
    failed = [f"* `{row.path.name}`: {row.failure}" for row in rows if row.failure]
    return "\n".join(lines + (["", "Stopped:", "", *failed] if failed else [])) + "\n"


def _text(estimate: Estimate, decimals: int, sign: str = "") -> str:
    half = estimate.half_width
    interval = "" if math.isnan(half) else f" ± {half:.{decimals}f}"
    return f"{estimate.mean:{sign}.{decimals}f}{interval}"


def _colours(rows: Sequence[Row]) -> dict[tuple, Any]:
    """A colour for each setting, in their order."""
    from matplotlib import colormaps

    settings = list(dict.fromkeys(row.setting for row in rows))
    return {s: colormaps["viridis"](i / max(len(settings) - 1, 1)) for i, s in enumerate(settings)}


def _label(setting: tuple, short: Mapping[str, str]) -> str:
    return axes.name(dict(setting), short) or "all"


def _learning_curves(path: Path, rows: Sequence[Row], short: Mapping[str, str]) -> Path:
    """log p(x) of held-out data by step, or its bound; the training loss where neither is known."""
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    panel, colours, labelled, ends = figure.subplots(), _colours(rows), set(), []
    logs = [writers.read(Workdir(row.path).metrics) for row in rows]
    names = dict.fromkeys(name for logged in logs for entry in logged for name in entry)
    held_out = (f"validation/{name}" for name in LIKELIHOODS)
    name = next((n for n in held_out if n in names), None)
    name = name or next((n for n in names if n.endswith("/loss")), None)
    for row, logged in zip(rows, logs, strict=True):
        points = [(entry["step"], entry[name]) for entry in logged if name in entry]
        if points:
            label = None if row.setting in labelled else _label(row.setting, short)
            labelled.add(row.setting)
            panel.plot(*zip(*points, strict=True), lw=1, color=colours[row.setting], label=label)
            panel.set_ylabel(f"{name} (nats)")
            ends += [value for _, value in points[len(points) // 10 :]]
    if ends:
        low, high = np.percentile(ends, [2, 98])
        margin = 0.1 * (high - low) or 1.0
        panel.set_ylim(low - margin, high + margin)
        panel.legend(fontsize=7)
    panel.set(xlabel="step")
    panel.grid(alpha=0.3)
    figure.savefig(path)
    return path


def _rate_distortion(path: Path, rows: Sequence[Row], short: Mapping[str, str], title: str) -> Path:
    """Distortion against rate; along a dotted line the ELBO is what it says (Alemi et al. 2018)."""
    figure = Figure(figsize=(5, 4.2), dpi=150, layout="constrained")
    panel, colours = figure.subplots(), _colours(rows)
    for setting, colour in colours.items():
        own = [row.metrics for row in rows if row.setting == setting and row.metrics]
        points = [(found["rate"], found["distortion"]) for found in own]
        if points:
            label = _label(setting, short)
            panel.plot(*zip(*points, strict=True), "o", ms=5, color=colour, label=label)
    low, high = panel.get_xlim()
    bottom, top = panel.get_ylim()
    for level in np.linspace(low + bottom, high + top, 9)[1:-1]:
        panel.plot([low, high], [level - low, level - high], ":", lw=0.6, color="grey")
        left = max(low, level - top)
        panel.text(left, level - left, f" {-level:.4g}", fontsize=6, color="grey", va="top")
    panel.set(xlim=(low, high), ylim=(bottom, top))
    panel.set(xlabel="rate (nats)", ylabel="distortion (nats)", title=title)
    panel.legend(fontsize=7)
    figure.savefig(path)
    return path


def _against(path: Path, rows: Sequence[Row], field: str, names: Sequence[str]) -> Path:
    """Each metric against one swept field, a point for each member."""
    columns = min(len(names), 4)
    height = -(-len(names) // columns)
    figure = Figure(figsize=(3 * columns, 2.6 * height), dpi=150, layout="constrained")
    values = [row.member[field] for row in rows]
    real = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    places = sorted(set(values)) if real else list(dict.fromkeys(values))
    wide = real and min(places) > 0 and max(places) / min(places) >= 10
    for panel, name in zip(np.ravel(figure.subplots(height, columns)), names, strict=False):
        for row in rows:
            if row.metrics:
                value = row.member[field]
                x = value if real else places.index(value)
                panel.plot(x, row.metrics[name], "o", ms=4, color="tab:blue", alpha=0.6)
        panel.set_title(name, fontsize=8)
        panel.set_xlabel(field, fontsize=8)
        panel.grid(alpha=0.3)
        if wide:
            panel.set_xscale("log")
        elif not real:
            panel.set_xticks(range(len(places)), [axes.shown(place) for place in places])
    figure.savefig(path)
    return path
