#!/usr/bin/env bash
# Rejection sampling (RAFT, arXiv:2304.06767): sample each prompt a few times, keep its best right answer, train on
# those, and go round again with the better model. In the folder recipes/:
#   MODEL=runs/sft/model ROUNDS=3 OUT=runs/rejection ./rejection-sampling.sh
# SAMPLE and TRAIN hold more flags. Started again after a kill, it goes on where it was.
set -euo pipefail
MODEL=${MODEL:-Qwen/Qwen3-0.6B} ROUNDS=${ROUNDS:-3} OUT=${OUT:-runs/rejection}

for round in $(seq "$ROUNDS"); do
    tandem sample --model "$MODEL" --data prompts.jsonl --reward check.py:right --keep best --min-reward 1 \
        --seed "$round" --out "$OUT/$round/samples" --resume ${SAMPLE:-}
    tandem sft --model "$MODEL" --data "$OUT/$round/samples/best.jsonl" --epochs 1 \
        --out "$OUT/$round/sft" --resume ${TRAIN:-}
    MODEL=$OUT/$round/sft/model
done
