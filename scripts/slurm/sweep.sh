#!/bin/bash
# Submit a sweep as an array of jobs, one for each of its programs; waits, and writes the table.
#
#     scripts/slurm/sweep.sh configs/vae_mnist.py gpu 'model.prior=standard,realnvp;seed=0:3'
#
# The arguments are the config, a partition, in place of the config's own perhaps a grid, and any
# flags of dgm_jax.main. In the environment: GPUS of a job (1), its time limit in MINUTES (1440), and
# PYTHON (.venv/bin/python). A preempted job is queued again. Given again after an interruption, the same
# command submits what is left.

set -euo pipefail
config=${1:?give a config, a partition and perhaps a grid}
partition=${2:?give a partition}
shift 2
if [[ $# -gt 0 && $1 != --* ]]; then
    set -- --sweep="$1" "${@:2}"
fi
PYTHON=${PYTHON:-.venv/bin/python}

exec "$PYTHON" -m dgm_jax.main --mode=sweep --config="$config" "$@" \
    --launcher="slurm;slurm_partition=$partition;gpus_per_node=${GPUS:-1};timeout_min=${MINUTES:-1440}"
