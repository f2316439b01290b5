"""Runs of a tiny VAE by several processes, for tests/test_processes.py.

python joined.py ADDRESS,HOW_MANY,WHICH '[{"path": ..., ...}, ...]' [start]
"""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from dgm_jax import cache, metrics, processes, sharding, train
from dgm_jax import config as configs
from dgm_jax.core import UserError
from dgm_jax.evaluators import likelihood, passes
from dgm_jax.experiment import Experiment, initial_state, prepare
from dgm_jax.interruption import Interrupted
from dgm_jax.workdir import Workdir

TINY = {
    "model.encoder": (8,),
    "model.decoder": (8,),
    "model.latents": 4,
    "train.batch_size": 16,
    "train.duration": "24 steps",
    "train.steps_per_dispatch": 4,
    "train.validate_every": "8 steps",
    "train.checkpoint_every": "24 steps",
    "train.checkpoint_minutes": 0.0,
    "eval.batch_size": 24,
}


def experiment_on(mesh: jax.sharding.Mesh, fsdp: bool = False) -> Experiment:
    """The tiny VAE on some devices."""
    config = configs.override(configs.experiment("vae"), {**TINY, "mesh.fsdp": fsdp})
    return prepare(config, tiny.images(), mesh)


def run(
    mesh: jax.sharding.Mesh, path: str | Path, fsdp: bool = False, told_at: int | None = None
) -> dict[str, Any]:
    """Train in a work directory from where it is; the last process gets a SIGTERM at a step.

    Returns:
      `state`, the leaves on the host, and `evaluation`, as it is printed; or the step it `stopped`
      after.
    """
    experiment, workdir = experiment_on(mesh, fsdp), Workdir(Path(path))
    write, is_last = train._Log.dispatch, jax.process_index() == jax.process_count() - 1

    def dispatch(self, step, measured):
        write(self, step, measured)
        if step == told_at and is_last:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train._Log, "dispatch", dispatch)
        with workdir.claimed(experiment.config, {}, np.zeros(1)):
            try:
                state, _ = train.train(experiment, workdir)
            except Interrupted as interrupted:
                return {"stopped": str(interrupted)}
    terms = likelihood.elbo_terms(experiment.model, num_samples=1)
    evaluate = passes.compile_pass(terms, experiment.dataset, "test", 24, mesh)
    found = passes.summarise(evaluate(state.eval_params, 0), num_samples=1)
    leaves = [processes.on_host(leaf).tolist() for leaf in jax.tree.leaves(state)]
    return {"state": leaves, "evaluation": metrics.table(found)}


def start(fsdp: bool) -> list[Any]:
    """Parameters given to a run to start from, and what it starts from."""
    experiment = experiment_on(sharding.make_mesh(), fsdp)
    given = initial_state(experiment_on(sharding.make_mesh())).params
    given = jax.tree.map(lambda leaf: leaf + 1, given)
    started = train.start_from(initial_state(experiment), given)
    return [
        [processes.on_host(leaf).tolist() for leaf in jax.tree.leaves(tree)]
        for tree in (given, started.params, started.ema)
    ]


def unlike() -> str:
    """What is said where each was told something else; nothing, where all were told the same."""
    processes.refuse_unlike("the same")
    try:
        processes.refuse_unlike(str(jax.process_index()))
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    cache.keep_compiled_programs()  # the second run of a kind need not compile
    processes.join(sys.argv[1], lost_after=60)
    found = [run(sharding.make_mesh(), **task) for task in json.loads(sys.argv[2])]
    started = start(fsdp=True) if "start" in sys.argv[3:] else None
    print(json.dumps({"runs": found, "start": started, "unlike": unlike()}))
