#!/bin/sh
echo "error: nothing is fetched here; run vbench2_beta_i2v/download_data.sh in a clone of github.com/Vchitect/VBench, then rcm vbench sample --suite i2v --vbench_repo CLONE" >&2
exit 2
