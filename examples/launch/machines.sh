#!/bin/bash
# Several machines without a scheduler: run the same line on each of them.
#   MACHINES=2 FIRST=10.0.0.1 examples/launch/machines.sh experiment=NAME key=value
# The machine whose address or host name FIRST is keeps the list of the others; order does not matter.
# A machine that was lost joins again with the same line, and the run goes on from its last checkpoint; where
# torchrun shares its store with the ranks (its default, seen in torch 2.13), those that stayed and it wait in vain.
# A run that is asked to end (SIGTERM) saves, for which torchrun alone would leave 30 seconds.
set -euo pipefail
: "${MACHINES:?number of machines}" "${FIRST:?address of the first machine, as the others reach it}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
place=()
if [[ "$FIRST" =~ ^[0-9.]+$ ]]; then  # alone, torchrun knows a machine by what its host name leads to
  way='import socket as s, sys; u = s.socket(s.AF_INET, s.SOCK_DGRAM); u.connect((sys.argv[1], 29500))'
  own="$(python3 -c "$way; print(u.getsockname()[0])" "$FIRST")"  # as the others reach this machine
  place=(--local_addr="$own" --rdzv_conf="is_host=$([[ "$own" == "$FIRST" ]] && echo 1 || echo 0)")
fi
exec torchrun --nnodes="$MACHINES" --nproc_per_node="${GPUS:-8}" --max-restarts=3 \
  --rdzv_backend=c10d --rdzv_id="${RUN:-rcm}" --rdzv_endpoint="$FIRST:29500" "${place[@]}" \
  -m rcm train "$@"
