"""Train the same network in several programs, in turn, and write how fast each is.

    pip install -r requirements-benchmark.txt
    python scripts/benchmark.py                 # all of it: about a quarter of an hour
    python scripts/benchmark.py --rounds=1 --seconds=1 --cases='MLP VAE, batch 100'

Each measurement is a process of its own; they take turns, A B A B, and medians are compared. What
was measured goes to docs/results/benchmark.json, and from there to docs/performance.md.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from contestants import CASES, TopDownCase

REPO = Path(__file__).resolve().parent.parent
RECORD = REPO / "docs" / "results" / "benchmark.json"
PAGE = REPO / "docs" / "performance.md"
PYTHAE, LIMIT, OURS = "pythae", "matrix products alone", "dgm_jax"


def contestants_of(case: str) -> list[str]:
    """Who can run a case: pythae its own network only."""
    if case.startswith(PYTHAE):
        return [OURS, PYTHAE, LIMIT]
    programs = [OURS, "dgm_jax, a dispatch per step", "PyTorch eager", "torch.compile"]
    return programs if isinstance(CASES[case], TopDownCase) else [*programs, LIMIT]


def one_process(contestant: str, case: str, seconds: float) -> dict[str, float]:
    """`measure` in a process of its own."""
    code = f"from contestants import measure; import json; print(json.dumps(measure({contestant!r},"
    code += f" {case!r}, {seconds})))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{contestant}, {case}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(cases: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    """Every contestant of every case, `rounds` times in turn."""
    found: dict[str, Any] = {}
    for case in cases:
        each: dict[str, list[dict]] = {name: [] for name in contestants_of(case)}
        for turn in range(rounds):
            for name, taken in each.items():
                taken.append(one_process(name, case, seconds))
                speed = taken[-1]["images_per_second"]
                print(f"{case}, round {turn + 1}: {name} {speed:,.0f} images/s", flush=True)
        found[case] = each
    return found


def machine() -> dict[str, Any]:
    """What it was measured on and with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    packages = ("jax", "jaxlib", "torch", "pythae")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def table(record: dict[str, Any]) -> str:
    """Markdown: medians of images/s, and ratios to this project within the run."""
    about = record["machine"]
    lines = [
        "| case | program | images/s | dgm_jax is faster by | loss | parameters |",
        "|---|---|---|---|---|---|",
    ]
    for case, each in record["cases"].items():
        speeds = {n: statistics.median(m["images_per_second"] for m in t) for n, t in each.items()}
        for name, taken in each.items():
            ratio = speeds[OURS] / speeds[name]
            loss = taken[0]["loss"]
            cells = [case, name, f"{speeds[name]:,.0f}", f"{ratio:.2f} ×"]
            cells += ["" if loss is None else f"{loss:.1f}"]
            cells += [f"{taken[0]['num_parameters']:,}" if taken[0]["num_parameters"] else ""]
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Medians of {record['rounds']} rounds of {record['seconds']} s each. {about['processor']},"
        f" {about['cores']} cores; Python {about['python']}, jax {about['jax']}, torch"
        f" {about['torch']}, pythae {about['pythae']}; {about['date']}.",
    ]
    return "\n".join(lines)


def write_page(record: dict[str, Any]) -> None:
    """Put the table between the marks in docs/performance.md."""
    start, end = "<!-- benchmark: start -->\n", "<!-- benchmark: end -->"
    text = PAGE.read_text()
    before, _, rest = text.partition(start)
    after = rest.partition(end)[2]
    PAGE.write_text(f"{before}{start}{table(record)}\n{end}{after}")


def main() -> None:
    """Measure, keep, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timed steps each time")
    parser.add_argument("--cases", nargs="*", default=list(CASES), help=f"of: {'; '.join(CASES)}")
    parser.add_argument("--keep", action="store_true", help="write the record and the page")
    chosen = parser.parse_args()
    if unknown := [case for case in chosen.cases if case not in CASES]:
        parser.error(f"no case {unknown[0]!r}; there are: {'; '.join(CASES)}")
    cases = run(chosen.cases, chosen.rounds, chosen.seconds)
    record = {
        "machine": machine(),
        "rounds": chosen.rounds,
        "seconds": chosen.seconds,
        "cases": cases,
    }
    print("\n" + table(record))
    if chosen.keep:
        RECORD.write_text(json.dumps(record, indent=2) + "\n")
        write_page(record)


if __name__ == "__main__":
    main()
