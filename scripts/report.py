"""Write docs/results.md from the runs' own results.json files.

    python scripts/report.py

Each file in docs/results/ is the results.json of one run, named `<experiment>-seed<seed>.json`;
seeds of one experiment, measured with the same K on the same data, make one row. Files in
docs/results/features/ are the features.json of the same. Nothing in the tables is typed in but the
published values.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
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

PUBLISHED |= {
    f"{name}_mnist": (value, "Tomczak & Welling 2018")
    for name, value in (("vampprior", 82.38), ("hvae_vampprior", 81.24))
}

LIKELIHOOD = """# Results

Written by `python scripts/report.py` from the `results.json` of each run, kept in
[results](results); its `config` and `git_revision` say what was run. Experiments are named after
their config and variant: `iwae_mnist-l1-vae-k1` is
`python -m dgm_jax.main --config=configs/iwae_mnist.py:l1-vae-k1 --config.seed=<seed>`.

## Likelihood

NLL is minus the importance-weighted bound on log p(x) in nats, with the K in its column, over the
whole test split; ± is the standard error over test images of one seed, or with several seeds that
of the mean over seeds. Minutes are the mean over seeds, on two CPU cores: by the clock, with
whatever else the machine was doing, and half of the processor's time, without it.

"""

FEATURES = """
## Features

`--mode=features` of the same runs ([results/features](results/features)), test accuracy in percent:
a linear probe (10,000 labels), the same with n labels per class (mean of 5 draws), and 5 nearest
neighbours, on the model's features, on those of the untrained model, on as many principal
components, and on pixels.

"""

DISENTANGLEMENT = """
## Disentanglement

Scores of the features of generated shapes with known factors (`--mode=features`).

"""

_PROBES = {
    "linear_probe": "linear probe",
    **{f"linear_probe_{n}_labels": f"{n} labels" for n in (1, 5, 10, 100)},
    "nearest_neighbours": "neighbours",
}
_SCORES = {
    "mig": "MIG",
    "dci_disentanglement": "DCI disentanglement",
    "dci_completeness": "completeness",
    "dci_informativeness": "informativeness",
    "factor_vae_score": "FactorVAE score",
}


def table() -> str:
    """The text of docs/results.md."""
    head = ("experiment", "data", "seeds", "epochs", "−ELBO", "NLL", "K", "active units")
    head += ("training, min", "half of its CPU, min", "evaluation, min")
    head += ("published NLL", "difference")
    rows = [_row(name, runs) for (name, *_), runs in sorted(_experiments().items())]
    text = LIKELIHOOD + _markdown(head, rows)
    for title, columns, sign, unit in (
        (FEATURES, _PROBES, 100, "{:.1f}"),
        (DISENTANGLEMENT, _SCORES, 1, "{:.3f}"),
    ):
        if rows := list(_feature_rows(columns, sign, unit)):
            text += title + _markdown(("experiment", "features", *columns.values()), rows)
    return text


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _experiments() -> dict[tuple, list[dict]]:
    """The runs by experiment, data card and K: only like numbers make a mean."""
    found = defaultdict(list)
    for path in sorted((DOCS / "results").glob("*.json")):
        run = json.loads(path.read_text())
        card = json.dumps(run["data"], sort_keys=True)
        found[path.stem.rpartition("-seed")[0], card, _num_samples(run)].append(run)
    return found


def _num_samples(run: dict) -> int:
    return run["metrics"].get("importance_weighted_bound", {"num_samples": 0})["num_samples"]


def _row(name: str, runs: list[dict]) -> list[str]:
    card, config = runs[0]["data"], runs[0]["config"]
    data = f"{card['dataset']}, {card['binarisation']['train']}, {card['counts']['test']:,} test"
    epochs = runs[0]["step"] * config["train"]["batch_size"] / card["counts"]["train"]
    published, source = PUBLISHED.get(name, (None, ""))
    nll = _mean(runs, "importance_weighted_bound", -1) if _num_samples(runs[0]) else None
    return [
        name,
        data,
        ", ".join(sorted(str(run["config"]["seed"]) for run in runs)),
        f"{epochs:.0f}",
        "{:.2f} ± {:.2f}".format(*_mean(runs, "elbo", -1)),
        "{:.2f} ± {:.2f}".format(*nll) if nll else "",
        f"{_num_samples(runs[0]):,}" if nll else "",
        ", ".join(f"{run['metrics']['active_units']['value']:.0f}" for run in runs),
        _minutes(runs, "training"),
        _minutes(runs, "training_cpu", 0.5),
        _minutes(runs, "evaluation"),
        f"{published:.2f} ({source})" if published else "",
        f"{nll[0] - published:+.2f}" if published and nll else "",
    ]


def _feature_rows(columns: dict[str, str], sign: int, unit: str) -> Iterator[list[str]]:
    """A row for each run and representation that has all of the columns."""
    for path in sorted((DOCS / "results" / "features").glob("*.json")):
        metrics = json.loads(path.read_text())["metrics"]
        for kind in dict.fromkeys(name.partition("/")[0] for name in metrics):
            names = [f"{kind}/{column}" for column in columns]
            if all(name in metrics for name in names):
                cells = (unit.format(sign * metrics[name]["value"]) for name in names)
                yield [path.stem, kind.replace("_", " "), *cells]


def _mean(runs: list[dict], metric: str, sign: int) -> tuple[float, float]:
    values = [sign * run["metrics"][metric]["value"] for run in runs]
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, runs[0]["metrics"][metric]["standard_error"]
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _minutes(runs: list[dict], part: str, factor: float = 1.0) -> str:
    """Mean over the runs; empty where one was made before this was measured."""
    if not all(part in run["seconds"] for run in runs):
        return ""
    return f"{factor * sum(run['seconds'][part] for run in runs) / len(runs) / 60:.1f}"


if __name__ == "__main__":
    (DOCS / "results.md").write_text(table())
    print(f"written: {DOCS / 'results.md'}")
