#!/bin/bash
# Run the same command on every host of a TPU slice, and again while it ends with status 75.
#
#     TPU=my-slice ZONE=us-central2-b scripts/tpu/train.sh \
#         --config=configs/vae_mnist.py --workdir=/mnt/shared/mine   # a disk that all hosts see
#
# The slice has this project in ~/dgm_jax and its environment in ~/dgm_jax/.venv: setup.sh.

set -uo pipefail
: "${TPU:?name of the slice}" "${ZONE:?zone of the slice}"
MOST_RESTARTS=${MOST_RESTARTS:-100}

printf -v arguments ' %q' "$@" # quoted for the shell at the other end
for ((restart = 0; restart <= MOST_RESTARTS; restart++)); do
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
        --command="cd ~/dgm_jax && .venv/bin/python -m dgm_jax.main --distributed=auto$arguments"
    status=$?
    [[ $status == 75 ]] || exit "$status"
    echo "status 75: started again" >&2
    sleep 30
done
exit 75
