#!/bin/bash
# Several machines without a scheduler: run the same line on each of them.
#   MACHINES=2 FIRST=10.0.0.1 examples/launch/machines.sh experiment=NAME key=value
# The first machine that arrives at FIRST:29500 keeps the list of the others; order does not matter.
# A run that is asked to end (SIGTERM) saves, for which torchrun alone would leave 30 seconds.
set -euo pipefail
: "${MACHINES:?number of machines}" "${FIRST:?address of the first machine, as the others reach it}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"
exec torchrun --nnodes="$MACHINES" --nproc_per_node="${GPUS:-8}" --max-restarts=3 \
  --rdzv_backend=c10d --rdzv_id="${RUN:-rcm}" --rdzv_endpoint="$FIRST:29500" \
  -m rcm train "$@"
