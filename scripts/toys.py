"""Draw docs/pictures/toys.png: what each family of models makes of points in the plane.

    python scripts/toys.py runs

Takes the finished work directories of the toy configs in the given folder: a row for each data set,
a column for each model. Behind the samples of models that know their exact density, this is shown.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from dgm_jax import trained_model
from dgm_jax.data import toys
from dgm_jax.metrics import LIKELIHOODS
from dgm_jax.progress import Progress

PICTURE = Path(__file__).resolve().parent.parent / "docs/pictures/toys.png"
# The data sets, each with half the side of the square that is shown.
ROWS = {"two_moons": 2.0, "eight_gaussians": 2.9, "checkerboard": 2.3}
POINTS = 2000
DENSITY = LinearSegmentedColormap.from_list("density", ["white", "tab:blue"])


def found(folder: Path) -> dict[str, dict[str, Path]]:
    """Work directories of finished runs by model and data set; of several the best likelihood."""
    best: dict[str, dict[str, tuple[float, Path]]] = {}
    for path in sorted(folder.glob("*/results.json")):
        result = json.loads(path.read_text())
        model, data = result["config"]["model"]["name"], result["data"]["dataset"]
        metrics = result["metrics"]
        known = [metrics[name]["value"] for name in LIKELIHOODS if name in metrics]
        if data in ROWS and known:
            here = best.setdefault(model, {})
            here[data] = max(here.get(data, (-np.inf, path.parent)), (known[0], path.parent))
    return {m: {data: path for data, (_, path) in of.items()} for m, of in sorted(best.items())}


def show(axes: Axes, points: np.ndarray, reach: float) -> None:
    """Points `[N, 2]`, in a square that is the same for all of a row."""
    axes.plot(*points.T, ".", markersize=1.0, alpha=0.35, color="black", markeredgewidth=0)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])


def main() -> None:
    """Restore, draw and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder of work directories")
    rows = found(parser.parse_args().runs)
    figure = Figure(figsize=(2 * (1 + len(rows)), 6.6), dpi=110, layout="constrained")
    panels = figure.subplots(len(ROWS), 1 + len(rows), squeeze=False)
    for row, (data, reach) in zip(panels, ROWS.items(), strict=True):
        show(row[0], toys.generate(data, 0).test_x[:POINTS], reach)
        row[0].set_ylabel(data.replace("_", " "))
    panels[0][0].set_title("data", fontsize=10)
    with Progress("drawing", len(rows) * len(ROWS)) as progress:
        for column, (model, paths) in enumerate(rows.items(), start=1):
            panels[0][column].set_title(model.replace("_", " "), fontsize=10)
            for row, (data, reach) in zip(panels, ROWS.items(), strict=True):
                axes = row[column]
                if data not in paths:
                    axes.set_axis_off()
                    continue
                trained = trained_model.restore(paths[data])
                density = trained_model.density(trained)
                if density is not None:
                    steps = np.linspace(-reach, reach, 100, dtype=np.float32)
                    x, y = np.meshgrid(steps, steps)
                    log_p = density(np.stack([x, y], axis=-1).reshape(-1, 2)).reshape(x.shape)
                    axes.pcolormesh(x, y, np.exp(log_p), cmap=DENSITY, rasterized=True)
                show(axes, trained_model.draw(trained, POINTS, 0)["x"], reach)
                progress.advance(1, f"{model}, {data}")
    figure.savefig(PICTURE)
    print(f"written: {PICTURE}")


if __name__ == "__main__":
    main()
