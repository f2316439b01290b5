"""Write docs/results.md from the runs' own results.json files.

    python scripts/report.py

Each file in docs/results/ is the results.json of one run, named `<experiment>-seed<seed>.json`;
seeds of one experiment, measured with the same K on the same data, make one row. Nothing in the
table is typed in but the published values.
"""

import json
import math
from collections import defaultdict
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"

# Test NLL in nats, dynamic MNIST, by experiment.
PUBLISHED = {
    f"iwae_mnist-{cell}": (value, "Burda et al. 2016, Table 1")
    for value, cells in (
        (86.76, ("l1-vae-k1",)),
        (86.47, ("l1-vae-k5",)),
        (86.35, ("l1-vae-k50",)),
        (85.54, ("l1-iwae-k5", "l1-dreg-k5")),
        (84.78, ("l1-iwae-k50", "l1-dreg-k50")),
        (85.33, ("l2-vae-k1",)),
        (83.89, ("l2-iwae-k5", "l2-dreg-k5")),
        (82.90, ("l2-iwae-k50", "l2-dreg-k50")),
    )
    for cell in cells
}

HEADER = """# Results

Written by `python scripts/report.py` from the `results.json` of each run, kept in
[results](results). NLL is minus the importance-weighted bound on log p(x) in nats, with the K in
its column, over the whole test split; ± is the standard error over test images of one seed, or
with several seeds that of the mean over seeds. Minutes are the mean over seeds.

"""


def table() -> str:
    """The text of docs/results.md."""
    rows = [_row(name, runs) for (name, *_), runs in sorted(_experiments().items())]
    head = "| experiment | data | seeds | −ELBO | NLL | K | active units | training, min | "
    head += "evaluation, min | published NLL | difference |\n"
    return HEADER + head + "|" + "---|" * 11 + "\n" + "".join(rows)


def _experiments() -> dict[tuple, list[dict]]:
    """The runs by experiment, data card and K: only like numbers make a mean."""
    found = defaultdict(list)
    for path in sorted((DOCS / "results").glob("*.json")):
        run = json.loads(path.read_text())
        card = json.dumps(run["data"], sort_keys=True)
        found[path.stem.rpartition("-seed")[0], card, _num_samples(run)].append(run)
    return found


def _num_samples(run: dict) -> int:
    return run["metrics"]["importance_weighted_bound"]["num_samples"]


def _row(name: str, runs: list[dict]) -> str:
    card = runs[0]["data"]
    data = f"{card['dataset']}, {card['binarisation']['train']}, {card['counts']['test']:,} test"
    nll = _mean(runs, "importance_weighted_bound", -1)
    published, source = PUBLISHED.get(name, (None, ""))
    cells = [
        name,
        data,
        ", ".join(sorted(str(run["config"]["seed"]) for run in runs)),
        "{:.2f} ± {:.2f}".format(*_mean(runs, "elbo", -1)),
        "{:.2f} ± {:.2f}".format(*nll),
        f"{_num_samples(runs[0]):,}",
        ", ".join(f"{run['metrics']['active_units']['value']:.0f}" for run in runs),
        f"{_minutes(runs, 'training'):.1f}",
        f"{_minutes(runs, 'evaluation'):.1f}",
        f"{published:.2f} ({source})" if published else "",
        f"{nll[0] - published:+.2f}" if published else "",
    ]
    return "| " + " | ".join(cells) + " |\n"


def _mean(runs: list[dict], metric: str, sign: int) -> tuple[float, float]:
    values = [sign * run["metrics"][metric]["value"] for run in runs]
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, runs[0]["metrics"][metric]["standard_error"]
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _minutes(runs: list[dict], part: str) -> float:
    return sum(run["seconds"][part] for run in runs) / len(runs) / 60


if __name__ == "__main__":
    (DOCS / "results.md").write_text(table())
    print(f"written: {DOCS / 'results.md'}")
