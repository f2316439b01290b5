#!/bin/bash
# Put this project and its environment on every host of a TPU slice.
#
#     TPU=my-slice ZONE=us-central2-b scripts/tpu/setup.sh

set -euo pipefail
: "${TPU:?name of the slice}" "${ZONE:?zone of the slice}"
cd "$(dirname "$0")/../.."

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --prefix=dgm_jax/ --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU:dgm_jax.tar.gz" --zone="$ZONE" --worker=all
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
    set -e
    tar xzf dgm_jax.tar.gz
    python3 -m venv dgm_jax/.venv
    dgm_jax/.venv/bin/pip install -q -e dgm_jax 'jax[tpu]'"
