"""A profile of one compiled step: the time of its kernels by what they are for.

    python scripts/where_time_goes.py 'MLP VAE, batch 100'

Written to docs/benchmark.json, and as a table between its marks in docs/performance.md.
"""

import argparse
import collections
import gzip
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark import RECORD, machine
from contestants import CASES, Case, config_of, dataset_of
from records import DOCS, Section, markdown

# The first that is found in what XLA says of a kernel's origin names its kind.
PRODUCTS, RANDOM = "matrix products", "random numbers"
KINDS = (
    (PRODUCTS, ("dot_general",)),
    (RANDOM, ("threefry", "_uniform", "_normal", "random_bits")),
    ("reading images", ("gather",)),
    ("activations, densities and their derivatives", ("jvp(", "transpose(")),
)
OPTIMIZER = "gradient's norm, optimizer and metrics"


def kind_of(instruction: str) -> str:
    """Which of `KINDS` an instruction of the compiled program is."""
    if " dot(" in instruction:
        return PRODUCTS
    if re.match(r"\(?u32\[", instruction):  # nothing else is made of unsigned words
        return RANDOM
    found = re.search(r'op_name="([^"]*)"', instruction)
    origin = found[1] if found else ""
    return next((kind for kind, marks in KINDS if any(m in origin for m in marks)), OPTIMIZER)


def measure(case: Case) -> dict[str, Any]:
    """Milliseconds of a step by kind, each kernel's from its start to its end, and by the clock.

    Kernels of one step may overlap; a matrix product, and what else is large, has all threads.
    """
    import jax

    from dgm_jax import config as configs
    from dgm_jax.experiment import compile_steps, initial_state, prepare, training_arrays

    steps = case.steps_per_call
    config = configs.override(config_of(case), {"train.steps_per_dispatch": steps})
    experiment = prepare(config, dataset_of(case))
    state, arrays = initial_state(experiment), training_arrays(experiment)
    run = compile_steps(experiment)
    text = run.lower(state, arrays).compile().as_text()
    kinds = dict(re.findall(r"^ *(?:ROOT )?%(\S+) = (.*)$", text, re.MULTILINE))
    state, _ = jax.block_until_ready(run(state, arrays))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            began = time.perf_counter()
            state, _ = jax.block_until_ready(run(state, arrays))
            clock = time.perf_counter() - began
        (file,) = Path(folder).rglob("perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    spent: dict[str, float] = collections.Counter()
    for event in events:
        name = event.get("args", {}).get("hlo_op", "")
        # A loop's time is that of the kernels in it, which are events of their own.
        if event.get("ph") == "X" and name in kinds and " while(" not in kinds[name]:
            spent[kind_of(kinds[name])] += event["dur"] / 1e3 / steps
    return {"clock": clock / steps * 1e3, "spent": dict(spent)}


def table(record: dict[str, Any]) -> str:
    """Each kind's share of the time of all kernels."""
    whole = sum(record["spent"].values())
    rows = sorted(record["spent"].items(), key=lambda pair: -pair[1])
    cells = [(name, f"{ms:.2f}", f"{ms / whole:.0%}") for name, ms in rows]
    clock = f"{record['case']}: {record['clock']:.2f} ms a step by the clock, the profiler running."
    return f"{markdown(('what for', 'ms a step', 'share'), cells)}\n{clock}"


def main() -> None:
    """Measure, show and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", nargs="?", default="MLP VAE, batch 100", choices=list(CASES))
    case = parser.parse_args().case
    section = Section("profile", RECORD, DOCS / "performance.md", table)
    section.check()
    record = {"machine": machine(), "case": case, **measure(CASES[case])}
    print(table(record))
    section.keep(record)


if __name__ == "__main__":
    main()
