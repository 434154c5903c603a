#!/usr/bin/env bash
# gpt2 -> distilgpt2: six of twelve layers, English.
#
#   TEXT=data/openwebtext TASK_DATA=data bash scripts/recipes/distilgpt2.sh [STAGE ..]
#
# Sequences are longer than for the other models (MAX_CHARS: 4,000 characters are about 900 of GPT-2's tokens), as it is scored
# on blocks of 1,024. TASK_DATA/wikitext holds wiki.train.raw and wiki.test.raw of WikiText-103. For G GB of text:
#   disk    G GB beside TEXT (2 G while it is split), 0.9 G of scratch files at the peak, 0.55 G of token files; 5.2 GB of the
#           run (82 M parameters)
#   hours   data 0.03 to 0.05 G on two cores (tokenizing 22 to 8 MB/s); training 183,000 G / R at R tokens/s over all GPUs (not
#           measured); WikiText: not measured
#   memory  data 225 MB; training 35 bytes a sequence for each process, and the models. On the GPU: not measured
# PLAN=1 tells hours, memory and disk of the training, measured here. common.sh explains all settings, and these figures.
set -euo pipefail
STUDENT_NAME="${STUDENT_NAME:-distilgpt2}"
TEACHER="${TEACHER:-gpt2}"
TEXT="${TEXT:-data/documents}"
TASKS="${TASKS-wikitext}"
MAX_CHARS="${MAX_CHARS:-4000}"
CONFIG=distilgpt2
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stage_student() {
    first_weights scripts/extract.py gpt2
}

stage_train() {
    train_first_weights gpt2 gpt2 "${CAUSAL[@]}" --freeze_pos_embs
}

stage_evaluate() {
    evaluate
}

run_stages "$@"
