#!/usr/bin/env bash
# Qwen3-0.6B-Base -> a Qwen3 of every second layer, 14 of 28: nobody has published such a student; no result is known.
#
#   TEXT=data/documents TASK_DATA=data bash scripts/recipes/qwen3-0.6b-14-layers.sh [STAGE ..]
#
# The objectives and their weights are those of DistilGPT2, the learning rate is lower (LEARNING_RATE); nothing here was tuned
# for this teacher. TASK_DATA/wikitext holds wiki.train.raw and wiki.test.raw. For G GB of text:
#   disk    G GB beside TEXT (2 G while it is split), 1.8 G of scratch files at the peak (4 bytes an id, 151,936 entries), G of
#           token files; 24 GB of the run (376 M parameters of 596)
#   hours   data 0.03 to 0.05 G on two cores, where tokenizing goes as for GPT-2 (its own vocabulary was not measured); training
#           ids x 3 / R / 3600 at R tokens/s over all GPUs (not measured); WikiText: not measured
#   memory  data 225 MB; training 35 bytes a sequence for each process, and the models. On the GPU: not measured; weights,
#           gradients and moments alone take 8.4 GB in float32 (teacher 2.4, student 6.0)
# PLAN=1 tells hours, memory and disk of the training, measured here. common.sh explains all settings, and these figures.
set -euo pipefail
STUDENT_NAME="${STUDENT_NAME:-qwen3-0.6b-14-layers}"
TEACHER="${TEACHER:-Qwen/Qwen3-0.6B-Base}"
TEXT="${TEXT:-data/documents}"
TASKS="${TASKS-wikitext}"
NUM_LAYERS="${NUM_LAYERS:-14}"
MAX_CHARS="${MAX_CHARS:-4000}"
LEARNING_RATE="${LEARNING_RATE:-1e-4}"
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stage_student() {
    whole_student --num_layers "$NUM_LAYERS"
}

stage_train() {
    train --student "$FIRST_STUDENT" "${CAUSAL[@]}" --learning_rate "$LEARNING_RATE"
}

stage_evaluate() {
    evaluate
}

run_stages "$@"
