"""How the cost of a step grows: measured points beside the law they should follow.

    python scripts/scaling.py    # some 6 minutes; docs/pictures/scaling.png, docs/benchmark.json

The law is that a step costs what its matrix products cost: its operations (2 · M · N · K of each
product, forward and backward), at the speed of the fastest point. Each point is a process.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REPO = Path(__file__).resolve().parent.parent

NETWORK = {"model.encoder": (200, 200), "model.decoder": (200, 200), "model.latents": 50}
SECONDS = 1.5


class Axis(NamedTuple):
    """What is varied.

    Attributes:
      title: of the panel's horizontal axis.
      values: along it.
      model: its name in the config.
      overrides: value -> fields of the config.
      law: value -> the cost, as a multiple of the operations of one member on one device.
    """

    title: str
    values: tuple[int, ...]
    model: str
    overrides: Callable[[int], dict[str, Any]]
    law: Callable[[int], float] = lambda value: 1.0


AXES = {
    "batch": Axis("batch size", (20, 50, 100, 200, 500, 1000, 2000), "vae", lambda n: {}),
    "width": Axis(
        "width of the hidden layers",
        (50, 100, 200, 400, 800, 1600),
        "vae",
        lambda n: {"model.encoder": (n, n), "model.decoder": (n, n)},
    ),
    "samples": Axis(
        "samples K of IWAE, batch 20",
        (2, 5, 10, 20, 50),
        "vae",
        lambda n: {"model.objective": "iwae", "model.num_samples": n},
    ),
    "layers": Axis(
        "stochastic layers of 50",
        (1, 2, 3, 4),
        "hvae",
        lambda n: {"model.latents": (50,) * n, "model.width": (200,) * n},
    ),
    "members": Axis(
        "members of a sweep", (1, 2, 4, 8, 16), "vae", lambda n: {}, lambda n: float(n)
    ),
    "devices": Axis("simulated devices, batch 512", (1, 2, 4, 8), "vae", lambda n: {}),
}
BATCH = {"samples": 20, "devices": 512}  # 100 elsewhere, but along its own axis


def measure_point(name: str, value: int) -> dict[str, float]:
    """Seconds of one step, and the operations of its products, at one point of an axis."""
    import jax

    jax.config.update("jax_num_cpu_devices", value if name == "devices" else 1)
    from contestants import dataset

    from dgm_jax import config as configs
    from dgm_jax import limit
    from dgm_jax.experiment import (
        compile_steps,
        initial_state,
        prepare,
        step_products,
        training_arrays,
    )
    from dgm_jax.sweep import program

    axis = AXES[name]
    shape = NETWORK if axis.model == "vae" else {}
    config = configs.override(
        configs.experiment(axis.model),
        {
            **shape,
            "train.batch_size": value if name == "batch" else BATCH.get(name, 100),
            "train.duration": "1000000 steps",
            "train.steps_per_dispatch": 20,
            "optimizer.ema": 0.0,
            **axis.overrides(value),
        },
    )
    experiment = prepare(config, dataset())
    if name == "members":
        members = [configs.override(config, {"seed": i}) for i in range(value)]
        state, run, arrays = program.compile_members(experiment, members)
    else:
        state, run = initial_state(experiment), compile_steps(experiment)
        arrays = training_arrays(experiment)
    state, *_ = jax.block_until_ready(run(state, arrays))
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        state, *_ = jax.block_until_ready(run(state, arrays))
        steps += experiment.steps_per_dispatch
    seconds = (time.perf_counter() - began) / steps
    operations = limit.num_operations(step_products(experiment)) * experiment.mesh.size
    return {"value": value, "seconds": seconds, "operations": operations * axis.law(value)}


def measure_program(members: int) -> dict[str, float]:
    """What the compiled program of one step of a sweep holds, without running it.

    Returns:
      `kernels`: instructions that run as a kernel of their own; `flops` and `bytes_accessed` by
      XLA's own count.
    """
    import jax

    jax.config.update("jax_num_cpu_devices", 1)
    from contestants import MLPCase, config_of, dataset

    from dgm_jax import config as configs
    from dgm_jax.experiment import prepare
    from dgm_jax.sweep.program import compile_members

    config = configs.override(config_of(MLPCase(batch_size=100)), {"train.steps_per_dispatch": 1})
    several = [configs.override(config, {"seed": i}) for i in range(members)]
    state, run, arrays = compile_members(prepare(config, dataset()), several)
    compiled = run.lower(state, arrays).compile()
    cost = compiled.cost_analysis()
    kinds = (" fusion(", " dot(", " custom-call(", " convolution(", " reduce(", " sort(")
    entry = compiled.as_text().partition("ENTRY")[2]
    kernels = sum(any(kind in line for kind in kinds) for line in entry.splitlines())
    return {"kernels": kernels, "flops": cost["flops"], "bytes_accessed": cost["bytes accessed"]}


def seconds_to_first_step(programs: str) -> float:
    """From the command to the first update that is done, one update a dispatch.

    Args:
      programs: folder of compiled programs; empty for a cold start.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dgm_jax.main", "--config=configs/vae_mnist.py"]
        command += ["--config.train.steps_per_dispatch=1", f"--workdir={folder}/run"]
        rows, began = Path(folder) / "run" / "metrics.jsonl", time.perf_counter()
        env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": programs}
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"  # as dgm_jax.cache sets it
        process = subprocess.Popen(command, env=env, cwd=REPO, stdout=subprocess.DEVNULL)
        while not (rows.exists() and rows.stat().st_size):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended before its first step")
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        process.terminate()
        process.wait()
    return seconds


def draw(found: dict[str, list[dict[str, float]]], path: Any) -> None:
    """A panel for each axis."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(11, 6.4), dpi=150, layout="constrained")
    panels = figure.subplots(2, math.ceil(len(found) / 2)).ravel()
    for (name, points), panel in zip(found.items(), panels, strict=True):
        values = np.array([point["value"] for point in points])
        measured = np.array([point["seconds"] for point in points]) * 1e3
        operations = np.array([point["operations"] for point in points])
        law = operations * (measured / operations).min()
        panel.loglog(values, law, color="0.6", label="as its matrix products")
        panel.loglog(values, measured, "o", color="C0", label="measured")
        panel.set(xlabel=AXES[name].title, ylabel="ms a step", xticks=values)
        panel.set_xticklabels([f"{value:,}" for value in values], fontsize=7)
        panel.set_ylim(law.min() / 1.6, measured.max() * 1.6)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(path)


def measure() -> None:
    """Measure every point and keep the record."""
    import records
    from benchmark import RECORD, in_a_process, machine

    starts: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(3):
        with tempfile.TemporaryDirectory() as programs:
            for kind, taken in starts.items():  # the second finds what the first compiled
                taken.append(seconds_to_first_step(programs))
                print(f"first step, {kind}: {taken[-1]:.1f} s", flush=True)
    first = {kind: statistics.median(taken) for kind, taken in starts.items()}
    found: dict[str, list[dict[str, float]]] = {}
    for name, axis in AXES.items():
        found[name] = []
        for value in axis.values:
            found[name].append(in_a_process("scaling.measure_point", name, value))
            point = found[name][-1]
            speed = point["operations"] / point["seconds"] / 1e9
            ms = 1e3 * point["seconds"]
            print(f"{axis.title} {value:,}: {ms:.2f} ms, {speed:.0f} GFLOP/s", flush=True)
    programs = {n: in_a_process("scaling.measure_program", n) for n in (1, 16)}
    for num, cost in programs.items():
        print(f"{num} members: " + ", ".join(f"{k} {v:,.0f}" for k, v in cost.items()))
    record = {"first_step": first, "axes": found, "sweep_programs": programs}
    records.write(RECORD, "scaling", {"machine": machine(), **record})


def main() -> None:
    """Measure every point and keep the record, unless told not to; draw the picture."""
    import records
    from benchmark import RECORD

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draw", action="store_true", help="the picture alone, from the record")
    if not parser.parse_args().draw:
        measure()
    found = records.read(RECORD, "scaling")["axes"]
    draw(found, REPO / "docs" / "pictures" / "scaling.png")


if __name__ == "__main__":
    main()
