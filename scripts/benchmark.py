"""Train the same network in several programs, in turn, and write how fast each is.

    pip install -r requirements-benchmark.txt
    python scripts/benchmark.py --keep              # images/s of every case
    python scripts/benchmark.py --quality --keep    # seconds until a VAE is good
    python scripts/benchmark.py --rounds=1 --seconds=1 --cases 'MLP VAE, batch 100'

Each measurement is a process of its own; they take turns, A B A B, and medians are compared. With
--keep, what was measured goes to its section of docs/benchmark.json, and as a table between
that section's marks in docs/performance.md; other cases and the other section stay as they were.
"""

import argparse
import collections
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contestants import BY_STEP, CASES, NUM_DRAWS, PYTHAE, WHOLE
from quality import RECIPES, TARGETS, seconds_to
from records import DOCS, Section, markdown

REPO = DOCS.parent
RECORD = DOCS / "benchmark.json"
LIMIT, OURS = "matrix products alone", "dgm_jax"
FLOW = "dgm_jax, flow prior"

Measured = dict[str, Any]  # what one process found


def contestants_of(case: str) -> list[str]:
    """Who trains a case, in turn."""
    whole = [WHOLE] if CASES[case].num_parts > 1 else []
    return [OURS, *whole, BY_STEP, *CASES[case].peers, LIMIT]


def in_a_process(function: str, *args: Any) -> Measured:
    """The result of `module.function(*args)` in a process of its own, compiled from nothing."""
    module = function.partition(".")[0]
    quiet = {"TQDM_DISABLE": "1"}  # pythae's progress bar
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", f"import json, {module}; print(json.dumps({function}{args}))"],
            cwd=Path(__file__).parent,
            env={**os.environ, **quiet, "PYTHONPATH": str(REPO), "TORCHINDUCTOR_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        sys.exit(f"{function}{args}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_speed(case: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Every contestant of a case, `rounds` times in turn."""
    each: dict[str, list[Measured]] = {name: [] for name in contestants_of(case)}
    for turn in range(rounds):
        for name, taken in each.items():
            if name == LIMIT:
                taken.append(in_a_process("contestants.measure_limit", case, seconds))
            else:
                taken.append(in_a_process("contestants.measure", name, case, seconds))
            speed = taken[-1]["images_per_second"]
            print(f"{case}, round {turn + 1}: {name} {speed:,.0f} images/s", flush=True)
        trained = {name: taken[-1] for name, taken in each.items() if name != LIMIT}
        refuse_unlike(case, trained, CASES[case].tolerance)
    return {"machine": machine(), "rounds": rounds, "seconds": seconds, "programs": each}


def measure_time_to_quality(rounds: int, limit: float) -> Iterator[dict[str, Any]]:
    """Every program's own recipe, `rounds` times in turn, each round with another seed.

    Yields:
      The record, after each round.
    """
    each: dict[str, list[Measured]] = {name: [] for name in RECIPES}
    for seed in range(rounds):
        for name, taken in each.items():
            taken.append(in_a_process("quality.measure_quality", name, limit, seed))
            cells = ", ".join(_time_to(target, taken[-1:], limit) for target in TARGETS)
            print(f"quality, round {seed + 1}: {name} {cells}", flush=True)
        same = {name: taken[-1] for name, taken in each.items() if name != FLOW}
        refuse_unlike("quality", same)
        about = {"machine": machine(), "rounds": seed + 1, "limit_seconds": limit}
        yield {**about, "programs": each}


def refuse_unlike(case: str, each: dict[str, Measured], tolerance: float = 0.0) -> None:
    """End the run where the contestants did not train the same network.

    Numbers of parameters must be equal, and losses, where there are some, within `tolerance`,
    relative; pythae's need not: it starts its layers in its own way.
    """
    sizes = {name: measured["num_parameters"] for name, measured in each.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        sys.exit(f"{case}: the networks differ in their number of parameters: {listed}")
    losses = {name: m["loss"] for name, m in each.items() if name != PYTHAE and "loss" in m}
    if not all(abs(loss / losses[OURS] - 1) <= tolerance for loss in losses.values()):
        listed = ", ".join(f"{name} {loss:.4g}" for name, loss in losses.items())
        sys.exit(f"{case}: the losses differ by more than {tolerance:.0%}: {listed}")


# Whose versions are said beside what was measured with them.
PACKAGES = ("jax", "torch", "pythae")


def machine() -> dict[str, Any]:
    """What it was measured on and with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    installed = {
        d.name: d.version for d in importlib.metadata.distributions() if d.name in PACKAGES
    }
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **installed,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def speed_table(record: dict[str, Any]) -> str:
    """Of each case the medians of images/s, and ratios to this project within its run."""
    head = ("case", "program", "images/s", "dgm_jax's speed ÷ this one's", "loss", "parameters")
    rows, measured = [], collections.defaultdict(list)
    for case in (case for case in CASES if case in record):
        of = record[case]
        about = f"medians of {of['rounds']} round(s) of {of['seconds']} s each"
        measured[f"{about}. {_describe(of['machine'])}"].append(case)
        each = of["programs"]
        speeds = {n: statistics.median(m["images_per_second"] for m in t) for n, t in each.items()}
        for name, taken in each.items():
            cells = [case, name, f"{speeds[name]:,.0f}", f"{speeds[OURS] / speeds[name]:.2f} ×"]
            if name == LIMIT:
                cells += ["", ""]
            else:
                loss = statistics.median(m["loss"] for m in taken)
                cells += [f"{loss:#.4g}", f"{taken[0]['num_parameters']:,}"]
            rows.append([*cells, _memory(taken)])
    below = "\n".join(f"* {'; '.join(cases)}: {about}" for about, cases in measured.items())
    return f"{markdown((*head, 'memory, MiB'), rows)}\n{below}"


def quality_table(record: dict[str, Any]) -> str:
    """Medians of seconds until each target, and ratios to this project within the run."""
    limit, programs = record["limit_seconds"], record["programs"]
    head = ["program", "to ELBO −{negative_elbo:.0f}", "to NLL {nll:.0f}", "of it compilation"]
    head = [title.format(**TARGETS) for title in head]
    rows = []
    for name, taken in programs.items():
        cells = [_time_to(target, taken, limit, programs[OURS]) for target in TARGETS]
        compilation = statistics.median(m["compilation_seconds"] for m in taken)
        cells += [f"{max(0, compilation):.1f} s", f"{taken[0]['num_parameters']:,}", _memory(taken)]
        rows.append([name, *cells])
    below = (
        "Time of training, compilation of the step included, but not that of the first parameters; "
        f"in brackets how many times as long as {OURS}. "
        f"Medians of {record['rounds']} runs of at most {limit:.0f} s. ELBO and NLL are by "
        f"{NUM_DRAWS} draws for each validation image. {_describe(record['machine'])}"
    )
    return f"{markdown((*head, 'parameters', 'memory, MiB'), rows)}\n{below}"


def _time_to(
    target: str, taken: list[Measured], limit: float, ours: list[Measured] | None = None
) -> str:
    """`41.3 s`, with `ours` given also the ratio to them; or how near it came."""

    def median(runs: list[Measured]) -> float:
        return statistics.median(seconds_to(target, run["history"]) for run in runs)

    if math.isinf(seconds := median(taken)):
        best = min(at[target] for run in taken for at in run["history"])
        return f"not within {limit:.0f} s, best {best:.1f}"
    if ours is None or math.isinf(median(ours)):
        return f"{seconds:.1f} s"
    return f"{seconds:.1f} s ({seconds / median(ours):.2f} ×)"


def _memory(taken: list[Measured]) -> str:
    """Resident memory before and after, the run that grew most."""
    before, after = max((m["memory_mib"] for m in taken), key=lambda pair: pair[1] - pair[0])
    return f"{before:,} → {after:,}"


def _describe(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {about[name]}" for name in PACKAGES if name in about)
    return (
        f"{about['processor']}, {about['cores']} cores; Python {about['python']}, {versions}; "
        f"{about['date']}."
    )


SECTIONS = {
    name: Section(name, RECORD, DOCS / "performance.md", table)
    for name, table in (("benchmark", speed_table), ("quality", quality_table))
}


def main() -> None:
    """Measure, show, and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, help="measurements of each (3; with --quality 1)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timed steps each time (5)")
    parser.add_argument(
        "--cases", nargs="+", default=list(CASES), metavar="CASE", help=f"of: {'; '.join(CASES)}"
    )
    parser.add_argument(
        "--quality", action="store_true", help="time to quality in place of images/s"
    )
    parser.add_argument(
        "--quality_limit", type=float, default=600.0, help="seconds of training at most (600)"
    )
    parser.add_argument("--keep", action="store_true", help="write the record and the page")
    chosen = parser.parse_args()
    if unknown := [case for case in chosen.cases if case not in CASES]:
        parser.error(f"no case {unknown[0]!r}; there are: {'; '.join(CASES)}")
    section = SECTIONS["quality" if chosen.quality else "benchmark"]
    if chosen.keep:
        section.check()
    record: dict[str, Any] = {}
    # Kept after each round or case, so that nothing measured is lost.
    if chosen.quality:
        for record in measure_time_to_quality(chosen.rounds or 1, chosen.quality_limit):
            if chosen.keep:
                section.keep(record)
    else:
        for case in chosen.cases:
            record[case] = measure_speed(case, chosen.rounds or 3, chosen.seconds)
            if chosen.keep:
                section.keep({**section.read(), case: record[case]})
    print("\n" + section.show(record))


if __name__ == "__main__":
    main()
