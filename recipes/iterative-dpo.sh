#!/usr/bin/env bash
# Iterative DPO (arXiv:2312.11456): each round the newest model's best answer to a prompt is preferred to its worst, and
# DPO learns that, held to the model that the round began with. In the folder recipes/, with a reward model:
#   MODEL=runs/sft/model REWARD_MODEL=runs/rm/model ROUNDS=3 OUT=runs/iterative ./iterative-dpo.sh
# SAMPLE and TRAIN hold more flags. Started again after a kill, it goes on where it was.
set -euo pipefail
MODEL=${MODEL:-runs/sft/model} REWARD_MODEL=${REWARD_MODEL:-runs/rm/model} ROUNDS=${ROUNDS:-3} OUT=${OUT:-runs/iterative}

for round in $(seq "$ROUNDS"); do
    tandem sample --model "$MODEL" --data prompts.jsonl --reward-model "$REWARD_MODEL" --keep pairs \
        --seed "$round" --out "$OUT/$round/samples" --resume ${SAMPLE:-}
    tandem dpo --model "$MODEL" --data "$OUT/$round/samples/pairs.jsonl" --epochs 1 \
        --out "$OUT/$round/dpo" --resume ${TRAIN:-}
    MODEL=$OUT/$round/dpo/model
done
