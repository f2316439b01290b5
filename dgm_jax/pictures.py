"""Pictures of what a model has learned, from whatever the model can do."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dgm_jax.core import Batch, Model, Params
from dgm_jax.evaluators.quality import Nearest


def save_grid(path: Path, rows: np.ndarray, title: str) -> None:
    """Write images as a grid.

    Args:
      path: the .png.
      rows: float `[R, C, H, W, 1 or 3]` in [0, 1].
      title: stands above.
    """
    num_rows, num_columns, height, width, channels = rows.shape
    # One white pixel between images, so that a reader can tell where each ends.
    padded = np.pad(rows, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=1.0)
    sheet = padded.transpose(0, 2, 1, 3, 4).reshape(
        num_rows * (height + 1), num_columns * (width + 1), channels
    )[:-1, :-1]
    inches = 7.0
    figure = Figure(figsize=(inches, inches * sheet.shape[0] / sheet.shape[1] + 0.5), dpi=150)
    axes = figure.subplots()
    axes.imshow(sheet.squeeze(-1) if channels == 1 else sheet, cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()
    figure.savefig(path, bbox_inches="tight", pad_inches=0.05)


def save_samples(
    path: Path, samples: dict[str, np.ndarray], title: str, scale: float, most: int = 100
) -> None:
    """A square grid of samples; of the decoder's means where the model gives them.

    Of vectors, all of them, by their first two entries. Where there are few classes, which samples
    have in turn, no column has two of them.

    Args:
      path: the .png.
      samples: as `Model.sample` gives them.
      title: stands above.
      scale: of x, as in `DataSpec`.
      most: images of the grid.
    """
    if samples["x"].ndim == 2:
        (num, dims), (figure, axes) = samples["x"].shape, _panels(1)
        which = f", 2 of {dims} entries" if dims > 2 else ""
        _scatter(axes[0], samples["x"], f"{title}: {num:,} samples x{which}")
        figure.savefig(path)
        return
    images = np.asarray(samples.get("mean", samples["x"] / scale))[:most]
    columns = int(np.ceil(np.sqrt(len(images))))
    num_classes = len(np.unique(samples.get("label", [])[: len(images)]))
    if 0 < num_classes <= min(2 * columns, len(images) // 2):  # each column is of one class
        columns = num_classes * max(1, round(columns / num_classes))
    missing = -len(images) % columns
    images = np.concatenate([images, np.ones((missing, *images.shape[1:]), images.dtype)])
    what = "means E[x | z]" if "mean" in samples else "samples x"
    save_grid(path, images.reshape(-1, columns, *images.shape[1:]), f"{title}: {what}")


def save_nearest(
    path: Path, samples: np.ndarray, train: np.ndarray, near: Nearest, scale: float
) -> None:
    """The samples that come nearest to training images, each above the image that it is near to.

    Args:
      path: the .png.
      samples: x as the model drew it, `[N, *event]`.
      train: x of the training split, `[M, *event]`.
      near: the nearest training image of each sample.
      scale: of x, as in `DataSpec`.
    """
    closest = np.argsort(near.distance)[:40]
    closest = closest[: len(closest) // 10 * 10].reshape(-1, 10)
    pairs = np.stack([samples[closest], train[near.row[closest]]], axis=1) / scale
    title = "the samples nearest to training images, each above that image"
    save_grid(path, pairs.reshape(-1, *pairs.shape[2:]), title)


def save_plane(
    path: Path,
    data: np.ndarray,
    samples: np.ndarray,
    log_density: Callable[[np.ndarray], np.ndarray] | None,
    side: int = 100,
) -> None:
    """Data and samples `[N, 2]` side by side, and the density that the model gives to the plane.

    Args:
      path: the .png.
      data: held-out points.
      samples: of the model.
      log_density: `[M, 2] -> [M]`, nats; None where the model has none.
      side: points of the density's grid along each axis.
    """
    figure, axes = _panels(2 if log_density is None else 3)
    centre, reach = data.mean(axis=0), 1.15 * np.abs(data - data.mean(axis=0)).max()
    for panel, points, title in zip(axes, (data, samples), ("data", "samples"), strict=False):
        _scatter(panel, points, title)
        panel.set(xlim=centre[0] + reach * np.array([-1, 1]))
        panel.set(ylim=centre[1] + reach * np.array([-1, 1]))
    if log_density is not None:
        steps = np.linspace(-reach, reach, side, dtype=np.float32)
        x, y = np.meshgrid(centre[0] + steps, centre[1] + steps)
        density = np.exp(log_density(np.stack([x, y], axis=-1).reshape(-1, 2)))
        axes[2].pcolormesh(x, y, density.reshape(side, side), rasterized=True)
        axes[2].set(aspect="equal")
        axes[2].set_title("density p(x)", fontsize=10)
    figure.savefig(path)


def _panels(num: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(3.5 * num, 3.6), dpi=150, layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, num))


def _scatter(axes: Axes, points: np.ndarray, title: str) -> None:
    if points.shape[1] == 1:
        axes.hist(points[:, 0], bins=100)
    else:
        axes.plot(points[:, 0], points[:, 1], ".", markersize=1.5, alpha=0.5)
        axes.set(aspect="equal")
    axes.set_title(title, fontsize=10)


def save_reconstructions(
    path: Path,
    model: Model,
    params: Params,
    batch: Batch,
    rng: jax.Array,
    scale: float,
    columns: int = 10,
) -> None:
    """Originals, and below each its reconstruction.

    Only whole rows are shown; `scale` is what takes the images of `batch` to [0, 1].
    """
    means = np.asarray(jax.jit(model.reconstruct)(params, batch, rng))
    columns = min(columns, len(means))
    shown = len(means) // columns * columns
    means, originals = means[:shown], np.asarray(batch["x"])[:shown] / scale
    event = originals.shape[1:]
    both = np.stack(
        [originals.reshape(-1, columns, *event), means.reshape(-1, columns, *event)], axis=1
    ).reshape(-1, columns, *event)
    save_grid(path, both, "test images (odd rows) and their reconstructions E[x | z] (even rows)")


def save_interpolation(
    path: Path, model: Model, params: Params, batch: Batch, rng: jax.Array, columns: int = 10
) -> None:
    """Straight lines in latent space between the codes of successive pairs of images."""
    codes = jax.jit(model.encode)(params, batch, rng)
    start, end = codes[: len(codes) - 1 : 2, None], codes[1::2, None]
    weight = jnp.linspace(0.0, 1.0, columns)[None, :, None]
    path_codes = (1 - weight) * start + weight * end
    means = jax.jit(model.decode)(params, path_codes.reshape(-1, codes.shape[-1]))
    rows = np.asarray(means).reshape(len(start), columns, *means.shape[1:])
    save_grid(path, rows, "latent interpolation between two test images, left to right")


def save_traversals(
    path: Path,
    model: Model,
    params: Params,
    batch: Batch,
    rng: jax.Array,
    columns: int = 11,
    most: int = 10,
) -> None:
    """One latent a row, moved over its mean ± 2 standard deviations over the batch.

    The others stay as they are in the code of the first example. Shown are the `most` latents
    that change the picture most, the first of them on top: those that a model leaves unused, and
    those that its decoder does not look at, come last. Of many latents the hundred that vary most
    are tried.
    """
    codes = jax.jit(model.encode)(params, batch, rng)
    num_latents, decode = codes.shape[1], jax.jit(model.decode)
    mean, deviation = jnp.mean(codes, axis=0), jnp.std(codes, axis=0)
    tried = jnp.argsort(-deviation)[:100]
    steps = jnp.linspace(-2.0, 2.0, columns)[None]
    values = mean[tried, None] + deviation[tried, None] * steps
    moved = (tried[:, None] == jnp.arange(num_latents)[None])[:, None]
    paths = jnp.where(moved, values[..., None], codes[0][None, None])  # [tried, columns, L]
    low, high = decode(params, paths[:, 0]), decode(params, paths[:, -1])
    change = jnp.sum(jnp.abs(high - low).reshape(len(tried), -1), axis=1)
    shown = jnp.argsort(-change)[:most]
    means = np.asarray(decode(params, paths[shown].reshape(-1, num_latents)))
    rows = means.reshape(len(shown), columns, *means.shape[1:])
    names = ", ".join(map(str, tried[shown].tolist()))
    title = f"latents {names} (top to bottom), from -2 to +2 standard deviations"
    save_grid(path, rows, title)


def save_learning_curve(path: Path, rows: list[dict]) -> None:
    """A panel for the loss, in whatever unit it has, and for each term of validation, in nats."""
    held_out = {name.partition("/")[2] for row in rows for name in row if "validation/" in name}
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        for name, value in row.items():
            who, _, what = name.partition("/")
            if what in {"loss", *held_out}:
                curves.setdefault(what, {}).setdefault(who, []).append((row["step"], value))
    figure, panels = _panels(len(curves))
    for axes, (what, by_who) in zip(panels, curves.items(), strict=True):
        shown = []
        for who, points in by_who.items():
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, ".-" if who == "validation" else "-", lw=1.2, label=who)
            shown += values[len(values) // 20 :]  # the first moments would flatten the rest
        low, high = np.percentile(shown, [0, 99])
        margin = 0.05 * (high - low) + 1e-3
        axes.set_ylim(low - margin, high + margin)
        axes.set(xlabel="step", ylabel="" if what == "loss" else "nats per example", title=what)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path)
