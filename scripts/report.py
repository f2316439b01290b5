"""Write docs/results.md from the runs' own results.json files, docs/configs.md and docs/fields.md.

    python scripts/report.py

Each file in docs/results/ is the results.json of one run, named `<experiment>-seed<seed>.json`;
seeds of one experiment, measured with the same K on the same data, make one row. Files in
docs/results/features/ are the features.json of the same, and in docs/results/quality/ the
quality.json. Nothing in the tables is typed in but the published values. docs/configs.md lists what
the docstrings of configs/ say, and docs/fields.md those of the fields of a config.
"""

import ast
import dataclasses
import inspect
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict
from records import DOCS, markdown

from dgm_jax import config as configs
from dgm_jax import models, results
from dgm_jax.metrics import LIKELIHOODS

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

PUBLISHED |= {
    f"{name}_mnist": (value, "Hotaj, pytorch-generative")
    for name, value in (("made", 84.87), ("pixelcnn", 81.45))
}
PUBLISHED["pixelcnn_mnist-further"] = PUBLISHED["pixelcnn_mnist"]

LIKELIHOOD = """# Results

Written by `python scripts/report.py` from the `results.json` of each run, kept in
[results](results); its `config` and `git_revision` say what was run. Experiments are named after
their config and variant: `iwae_mnist-l1-vae-k1` is
`python -m dgm_jax.main --config=configs/iwae_mnist.py:l1-vae-k1 --config.seed=<seed>
--workdir=runs/<experiment>-seed<seed>`, with the values of the last column where the run had others
than the config has today; "absent" is what the code did not have yet.

## Likelihood

NLL is -log p(x) in nats where the model knows it (exact), else minus the tightest bound on it that
there is: the importance-weighted one with the K given, or the ELBO. It is the mean over the whole
test split; ± is its standard error over the examples for one seed, or with several seeds that of
the mean over seeds. The best stands first. Minutes are the mean over seeds, by the clock and
beside other jobs. `cpu` is two cores, and *half of its CPU* is the processor time divided by two,
the least that two idle cores would need; the cores of `hvae_vampprior_mnist`, `m2_mnist` and
`vae_shapes` are about three times as fast at matrix products (160 GFLOP/s each) as those of the
other runs; `iwae_mnist-l2-dreg-k50`, seed 1, made 9,400 of its 29,800 steps on a GPU, and
`iwae_mnist-l2-iwae-k50`, seed 1, 9,700; the clocks of `iwae_mnist-l1-vae-k5` and of
`iwae_mnist-l2-vae-k1`, seed 2, ran on while the runs were paused. Hotaj's published values are of
models picked on the test set.
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

QUALITY = """
## Sample quality

`--mode=quality` ([results/quality](results/quality)) of the same runs, and of variants whose other
numbers were not kept (`gan_grid-...`, `mean_flow_mnist-four`): samples against as many test
examples, and below them as many other test examples against the same, to compare with. The features
are of the judge named in the last column, and never Inception's: no number here is an FID.
[quality.md](quality.md) says what each is. `made_mnist`, `pixelcnn_mnist` and `vae_mnist` were
trained again for it, on a GPU, and ended at 83.37, 81.46 and 82.43 nats.

"""

_QUALITY = {
    "frechet_distance": ("Fréchet distance", "{:.3f}"),
    "kernel_distance": ("kernel distance", "{:.4f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "density": ("density", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
    "copying": ("copying (0.5 of fresh draws)", "{:.3f}"),
    "label_accuracy": ("label accuracy", "{:.3f}"),
    "modes": ("modes", "{:.0f}"),
    "in_a_mode": ("in a mode", "{:.3f}"),
}

_PROBES = {
    "linear_probe": "linear probe",
    **{f"linear_probe_{n}_labels": f"{n} per class" for n in (1, 5, 10, 100)},
    "nearest_neighbours": "neighbours",
}
_SCORES = {
    "mig": "MIG",
    "dci_disentanglement": "DCI disentanglement",
    "dci_completeness": "completeness",
    "dci_informativeness": "informativeness",
    "factor_vae_score": "FactorVAE score",
}


_HEAD = ("experiment", "model", "seeds", "epochs", "NLL", "what it is", "per dimension", "−ELBO")
_HEAD += ("active units", "on", "training, min", "half of its CPU, min", "evaluation, min")
_HEAD += ("published NLL", "difference", "with other values than today's config")

# On what is learned.
_WITHOUT_EFFECT = {"data.source"} | {
    f"train.{field}"
    for field in ("steps_per_dispatch", "validate_every", "checkpoint_every", "checkpoint_minutes")
}

_POINTS = "points"  # what data in the plane are called; they come last


def table() -> str:
    """The text of docs/results.md."""
    text = LIKELIHOOD
    for title, experiments in _by_data().items():
        ranked = sorted(experiments, key=lambda of: _mean(of[1], _likelihood(of[1][0]), -1))
        text += f"\n### {title}\n\n" + markdown(_HEAD, [_row(*of) for of in ranked])
    for title, columns, sign, unit in (
        (FEATURES, _PROBES, 100, "{:.1f}"),
        (DISENTANGLEMENT, _SCORES, 1, "{:.3f}"),
    ):
        if rows := list(_feature_rows(columns, sign, unit)):
            text += title + markdown(("experiment", "features", *columns.values()), rows)
    if rows := list(_quality_rows()):
        names = [name for name, _ in _QUALITY.values()]
        text += QUALITY + markdown(("experiment", "of", *names, "judge"), rows)
    return text


def _by_data() -> dict[str, list[tuple[str, list[dict]]]]:
    """Experiments and their runs, by the data that they were measured on.

    Runs of the same values, card, K and devices make one experiment: only like numbers have a mean.
    """
    found: dict[str, dict[tuple, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted((DOCS / "results").glob("*.json")):
        run = results.load(path)
        if _likelihood(run) and run["split"] == "test":
            same = {name: value for name, value in run["data"].items() if name != "source"}
            card, num_samples = json.dumps(same, sort_keys=True), _num_samples(run)
            name = path.stem.rpartition("-seed")[0]
            values = tuple(_other_values(name, run["config"]))
            found[_data(run["data"])][name, values, card, num_samples, run["devices"]].append(run)
    return {
        title: [(name, runs) for (name, *_), runs in experiments.items()]
        for title, experiments in sorted(
            found.items(), key=lambda item: (_POINTS in item[0], item[0])
        )
    }


def _data(card: dict) -> str:
    """What a card's numbers are about, in a few words."""
    grey, drawn = "grey values", f"{card['binarisation']['train']} binarisation"
    kind = {"uint8": grey, "binary": drawn, "tokens": "characters", "real": _POINTS}
    held_out = f"{card['counts']['test']:,} test examples"
    return f"{card['dataset']}, {kind[card['support']]}, {held_out}"


def _likelihood(run: dict) -> str | None:
    """The name of the tightest thing known of log p(x)."""
    return next((name for name in LIKELIHOODS if name in run["metrics"]), None)


def _num_samples(run: dict) -> int:
    return run["metrics"].get("importance_weighted_bound", {"num_samples": 0})["num_samples"]


def _row(name: str, runs: list[dict]) -> list[str]:
    first, card, config = runs[0]["metrics"], runs[0]["data"], runs[0]["config"]
    epochs = runs[0]["step"] * config["train"]["batch_size"] / card["counts"]["train"]
    origin = config["train"].get("init_from")  # which the oldest runs do not have
    published, source = PUBLISHED.get(name, (None, ""))
    what = _likelihood(runs[0])
    nll = _mean(runs, what, -1)
    nats = "{:.3f} ± {:.3f}" if card["support"] == "real" else "{:.2f} ± {:.2f}"
    kind = "exact" if what == "log_prob" else "bound: ELBO"
    if (num_samples := _num_samples(runs[0])) > 1:
        kind = f"bound: K = {num_samples:,}"
    if "data_log_prob" in first:
        kind += "; of the data's own density {:.3f}".format(*_mean(runs, "data_log_prob", -1))
    per_dim = next((n for n in ("nats_per_token", "bits_per_dim") if n in first), None)
    device = runs[0]["devices"].removeprefix("1 x ")
    active = [run["metrics"]["active_units"] for run in runs if "active_units" in run["metrics"]]
    return [
        name,
        config["model"]["name"],
        ", ".join(sorted(str(run["config"]["seed"]) for run in runs)),
        f"{epochs:.3g}" + (f" more of {Path(origin).name}" if origin else ""),
        nats.format(*nll),
        kind,
        f"{_mean(runs, per_dim, 1)[0]:.4f} {first[per_dim]['unit']}" if per_dim else "",
        nats.format(*_mean(runs, "elbo", -1)) if "elbo" in first else "",
        ", ".join(f"{metric['value']:.0f}" for metric in active),
        device,
        _minutes(runs, "training"),
        _minutes(runs, "training_cpu", 0.5) if device == "cpu" else "",
        _minutes(runs, "evaluation"),
        f"{published:.2f} ({source})" if published else "",
        f"{nll[0] - published:+.2f}" if published else "",
        ", ".join(_other_values(name, config)),
    ]


def _other_values(name: str, kept: dict) -> list[str]:
    """In what that matters to training the config of an experiment was another than it is today."""
    stems = [path.stem for path in (DOCS.parent / "configs").glob("*.py")]
    stems = [stem for stem in stems if f"{name}-".startswith(f"{stem}-")]
    if not stems:
        return []
    stem = max(stems, key=len)
    variant = name.removeprefix(stem).removeprefix("-")
    today = configs.load(str(DOCS.parent / "configs" / f"{stem}.py:{variant}"))
    usual = configs.fields(configs.experiment(today.model.name))
    then = configs.fields(ConfigDict(configs.tuples(kept)))
    return [
        f"`{field}={then[field]!r}`" if field in then else f"{field} absent"
        for field, value in configs.fields(today).items()
        if field.partition(".")[0] in ("data", "model", "optimizer", "train")
        and field not in _WITHOUT_EFFECT
        # The default of a field that came later is what was done before.
        and then.get(field, usual[field]) != value
    ]


def _feature_rows(columns: dict[str, str], sign: int, unit: str) -> Iterator[list[str]]:
    """A row for each run and representation that has all of the columns."""
    for path in sorted((DOCS / "results" / "features").glob("*.json")):
        metrics = results.load(path)["metrics"]
        for kind in dict.fromkeys(name.partition("/")[0] for name in metrics):
            names = [f"{kind}/{column}" for column in columns]
            if all(name in metrics for name in names):
                cells = (unit.format(sign * metrics[name]["value"]) for name in names)
                yield [path.stem, kind.replace("_", " "), *cells]


def _quality_rows() -> Iterator[list[str]]:
    """Two rows for each run: of its samples, and of the test examples."""
    for path in sorted((DOCS / "results" / "quality").glob("*.json")):
        run = results.load(path)
        metrics = run["metrics"]
        for of in ("samples", "test"):
            num = metrics[f"{of}/recall"]["num_examples"]
            cells = []
            for name, (_, unit) in _QUALITY.items():
                metric = metrics.get(f"{of}/{name}")
                error = metric and metric["standard_error"]
                cells.append(unit.format(metric["value"]) if metric else "")
                cells[-1] += " ± " + unit.format(error) if error else ""
            yield [path.stem, f"{num:,} {of}", *cells, run["judge"]]


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


CONFIGS = """# Configs

Written by `python scripts/report.py` from the docstrings of [configs](../configs), which also name
the papers. `python -m dgm_jax.main --config=configs/<config>.py` runs one, `...py:<variant>` a
variant of it; `:smoke` is there for all, and takes seconds.

"""


def configs_page() -> str:
    """The text of docs/configs.md."""
    rows = []
    for path in sorted((DOCS.parent / "configs").glob("*.py")):
        module = ast.parse(path.read_text())
        functions = {f.name: f for f in module.body if isinstance(f, ast.FunctionDef)}
        title, _, rest = ast.get_docstring(module).partition("\n\n")
        gives = rest.partition("Gives:")[2]
        variants = ast.get_docstring(functions["get_config"])
        link = f"[{path.stem}](../configs/{path.name})"
        rows.append([link, *(" ".join(text.split()) for text in (title, variants, gives))])
    return CONFIGS + markdown(("config", "what it is", "variants", "what it gives"), rows)


FIELDS = """# Fields

Written by `python scripts/report.py` from the docstrings of the code: every field of a config, its
default and its meaning. `--config.train.duration='20 epochs'` sets one on the command line. `seed`,
of the run, is in no section. The [configs](configs.md) have values of their own, and the `model`
section has the fields of the model that it names.
"""


def fields_page() -> str:
    """The text of docs/fields.md."""
    sections = {f"`{name}`": section for name, section in configs.SECTIONS.items()}
    sections |= {f"`model`, of `{name}`": models.get(name).Config for name in models.names()}
    text = FIELDS
    for title, section in sections.items():
        meanings = _meanings(section)
        rows = [
            [f"`{field}`", f"`{value!r}`", meanings.get(field, "").replace("|", r"\|")]
            for field, value in dataclasses.asdict(section()).items()
        ]
        text += f"\n## {title}\n\n" + markdown(("field", "default", "meaning"), rows)
    return text


def _meanings(section: type) -> dict[str, str]:
    """What the docstring of a section, and of what it inherits from, says of each field."""
    found = {}
    for part in reversed(section.__mro__[:-1]):
        attributes = inspect.cleandoc(part.__doc__).partition("Attributes:\n")[2]
        entries = re.findall(r"^  (\w[\w, ]*): (.*(?:\n    .*)*)", attributes, re.MULTILINE)
        for names, text in entries:
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


if __name__ == "__main__":
    pages = {"results.md": table(), "configs.md": configs_page(), "fields.md": fields_page()}
    for page, text in pages.items():
        (DOCS / page).write_text(text)
        print(f"written: {DOCS / page}")
