#!/usr/bin/env bash
# Submits GRPO to a running Ray cluster with 8 GPUs: ./ray-job.sh [more flags of tandem grpo]
#
# SHARED       a folder on a disk that every machine of the cluster mounts: the run is written there
# RAY_ADDRESS  of the cluster's dashboard (default: this machine's)
#
# The folder recipes/ (configs, check.py, prompts.jsonl) travels with the job. Tandem must be installed on the machines.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${SHARED:?set SHARED to a folder that every machine of the cluster mounts}"

# --resume starts from the beginning where there is no checkpoint yet, so the same line also goes on with a run.
exec ray job submit --address "${RAY_ADDRESS:-http://127.0.0.1:8265}" --working-dir . -- \
  tandem grpo --config cluster/grpo-7b-shared.yaml --cluster.address auto --out "$SHARED/runs/grpo-7b-shared" --resume "$@"
