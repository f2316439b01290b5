"""Train every family on several numbers of devices and processes, and compare what comes out.

    python scripts/devices.py --keep                     # all families; docs/reliability.md
    python scripts/devices.py --families vae gan         # to look at

Devices are simulated on the CPU; processes are real, joined on loopback. Each run is 100 steps of
the family's default model on tiny data, and the terms of its loss on the test split. Programs are
compiled without optimisation, as in the tests: compiling them is what takes time.
"""

# ruff: noqa: E402 - what is imported comes from beside this folder

import argparse
import importlib.metadata
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # before JAX

import jax
import numpy as np

REPO = Path(__file__).resolve().parent.parent
sys.path += [str(REPO), str(REPO / "tests")]

import tiny
from records import DOCS, Section, markdown

from dgm_jax import config as configs
from dgm_jax import metrics, models, processes, sharding
from dgm_jax.data import dataset as data
from dgm_jax.evaluators import likelihood, passes
from dgm_jax.experiment import Experiment, compile_steps, initial_state, prepare, training_arrays
from dgm_jax.train_step import inputs_of

STEPS = 100
COUNTS = (1, 2, 4, 8)
JOINED = (2, 4)  # real processes
FAMILIES_PLAIN = ("vae", "masked_diffusion")
# Steps in proportion to gradients, where Adam's are in proportion to their signs.
PLAIN = {"optimizer.eps": 1.0, "optimizer.learning_rate": 0.03}
VALUES = {
    "train.batch_size": 16,
    "train.duration": f"{STEPS} steps",
    "train.steps_per_dispatch": 1,  # to see the first
    "train.validate_every": f"{STEPS} steps",
    "train.checkpoint_every": f"{STEPS} steps",
    "eval.batch_size": 24,
}

Outcome = dict[str, list[np.ndarray]]  # the leaves of what a run came to, by what they are


class Difference(NamedTuple):
    """Largest differences between two outcomes, each relative to the largest entry of its array.

    Attributes:
      batch: of ids and `x` of the first batch.
      first_loss: of the first step's losses and terms.
      gradient: of the first step, which Adam's moments hold.
      losses: of all steps.
      params: after the last step, averages included.
      printed: 0 where the evaluation prints the same.
    """

    batch: float
    first_loss: float
    gradient: float
    losses: float
    params: float
    printed: float


def measure(family: str, mesh: jax.sharding.Mesh, num_steps: int = STEPS, **values: Any) -> Outcome:
    """Train a family for `num_steps` on the devices of `mesh`; `values` override its config."""
    config = configs.override(configs.experiment(family), {**VALUES, **values})
    dataset = tiny.accepted_by(config.model)
    experiment = prepare(config, dataset, mesh)
    state, update = initial_state(experiment), compile_steps(experiment)
    arrays, rows = training_arrays(experiment), []
    for _ in range(num_steps):
        state, measured = update(state, arrays)
        rows.append(jax.device_get(measured))
        if len(rows) == 1:
            gradient = _leaves(state.opt_states)
    losses = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    terms = likelihood.elbo_terms(experiment.model, num_samples=1)
    evaluate = passes.compile_pass(terms, dataset, "test", config.eval.batch_size, mesh)
    found = passes.summarise(evaluate(state.eval_params, config.seed), num_samples=1)
    return {
        "batch": _leaves(_first_batch(experiment, arrays)),
        "first_loss": [values[:1] for values in losses.values()],
        "gradient": gradient,
        "losses": list(losses.values()),
        "params": _leaves((state.params, state.ema)),
        "printed": [np.frombuffer(metrics.table(found).encode(), np.uint8)] if found else [],
    }


def _leaves(tree: Any) -> list[np.ndarray]:
    return [processes.on_host(leaf) for leaf in jax.tree.leaves(tree)]


def _first_batch(experiment: Experiment, arrays: Any) -> Any:
    """Ids and `x` as the training step makes them, divided over the devices."""
    mesh, config, dataset = experiment.mesh, experiment.config, experiment.dataset

    def make(arrays: Any) -> Any:
        x, labels = arrays["x"], arrays["labels"]
        ids, rng, _ = inputs_of(dataset, config.train.batch_size, (), config.seed, 0)
        return data.train_batch(dataset, x, labels, ids, rng)

    return jax.jit(make, out_shardings=sharding.split_batch(mesh))(arrays)


def compare(one: Outcome, other: Outcome) -> Difference:
    """How far apart two runs are."""
    return Difference(*(_apart(one[of], other[of]) for of in Difference._fields))


def _apart(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.shape != b.shape:
            return np.inf
        if not np.array_equal(a, b):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            apart = float(np.max(np.abs(a - b)) / np.max(np.abs(a)))
            worst = max(worst, apart if np.isfinite(apart) else np.inf)
    return worst


def in_processes(family: str, num: int) -> Outcome:
    """A run of `num` real processes, each with one device."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "outcome.npz")
        command = [sys.executable, __file__, f"--into={path}", "--families", family]
        each = [
            subprocess.Popen([*command, f"--distributed={address},{num},{i}"]) for i in range(num)
        ]
        statuses = [process.wait() for process in each]
        if any(statuses):
            sys.exit(f"{num} processes ended with {statuses}")
        return _read(path)


def _write(path: Path, outcome: Outcome) -> None:
    np.savez(
        path, **{f"{of}/{i:04}": a for of, each in outcome.items() for i, a in enumerate(each)}
    )


def _read(path: Path) -> Outcome:
    with np.load(path, allow_pickle=False) as stored:
        names = sorted(stored)
        return {
            of: [stored[name] for name in names if name.partition("/")[0] == of]
            for of in Difference._fields
        }


def rows(families: Sequence[str]) -> Iterator[tuple[str, str, Difference]]:
    """Family, on what, and the largest differences; as they are measured."""
    for family in families:
        one, *others = (measure(family, sharding.make_mesh(num)) for num in COUNTS)
        each = [compare(one, other) for other in others]
        worst = Difference(*map(max, zip(*each, strict=True)))
        yield family, f"{', '.join(map(str, COUNTS[1:]))} devices", worst
        if family in FAMILIES_PLAIN:
            plain = [measure(family, sharding.make_mesh(num), **PLAIN) for num in (1, 8)]
            yield family, "8 devices, Adam's ε = 1", compare(*plain)
        for num in JOINED:
            joined = in_processes(family, num)
            yield family, f"{num} processes", compare(one, joined)
            alike = compare(measure(family, sharding.make_mesh(num)), joined)
            yield family, f"{num} processes, from {num} devices of one", alike
        jax.clear_caches()


def table(found: dict[str, Any]) -> str:
    """The differences of each family, by what it ran on; 0 is bit for bit the same."""
    lines = [
        [f"`{family}`", on, *("0" if value == 0 else f"{value:.0e}" for value in values)]
        for family, of in sorted(found.items())
        for on, values in of["differences"].items()
    ]
    head = ("family", "on", "ids and `x`", "loss, step 1", "gradient, step 1")
    head += (f"losses of {STEPS} steps", f"parameters after {STEPS}", "as printed")
    made_with = "; ".join(sorted({of["with"] for of in found.values()}))
    return f"{markdown(head, lines)}\n{made_with}."


def main() -> None:
    """Measure, show, and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", default=models.names(), metavar="FAMILY")
    parser.add_argument("--keep", action="store_true", help="write the record and the page")
    parser.add_argument("--distributed", help=argparse.SUPPRESS)  # for `in_processes`
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.distributed:
        processes.join(chosen.distributed, lost_after=60)
        (family,) = chosen.families
        outcome = measure(family, sharding.make_mesh())
        if processes.is_first():
            _write(chosen.into, outcome)
        return
    section = Section("devices", DOCS / "reliability.json", DOCS / "reliability.md", table)
    if chosen.keep:
        section.check()
    jax.config.update("jax_num_cpu_devices", max(COUNTS))
    found: dict[str, Any] = {}
    for family, on, difference in rows(chosen.families):
        of = found.setdefault(
            family, {"with": f"jax {importlib.metadata.version('jax')}, CPU", "differences": {}}
        )
        of["differences"][on] = list(difference)
        print(family, on, " ".join(f"{value:.0e}" for value in difference), flush=True)
        if chosen.keep:  # after each, so that nothing measured is lost
            section.keep({**section.read(), family: of})
    print("\n" + table(found))


if __name__ == "__main__":
    main()
