#!/usr/bin/env bash
# roberta-base -> distilroberta-base: six of twelve layers, English.
#
#   TEXT=data/openwebtext TASK_DATA=data/glue bash scripts/recipes/distilroberta-base.sh [STAGE ..]
#
# The model of 2019 was trained on OpenWebTextCorpus, about a quarter of the teacher's text. For G GB of text:
#   disk    G GB beside TEXT (2 G while it is split), 0.9 G of scratch files at the peak, 0.55 G of token files; 5.3 GB of the
#           run (82 M parameters)
#   hours   data 0.03 to 0.05 G on two cores (tokenizing 22 to 8 MB/s, measured with GPT-2's vocabulary, whose rules are the
#           same); training 186,000 G / R at R tokens/s over all GPUs (not measured); GLUE: not measured
#   memory  data 225 MB; training 35 bytes a sequence for each process, and the models. On the GPU: not measured
# PLAN=1 tells hours, memory and disk of the training, measured here. common.sh explains all settings, and these figures.
set -euo pipefail
STUDENT_NAME="${STUDENT_NAME:-distilroberta-base}"
TEACHER="${TEACHER:-roberta-base}"
TEXT="${TEXT:-data/documents}"
TASKS="${TASKS-cola mnli mrpc qnli qqp rte sst2 stsb wnli}"
CONFIG=distilroberta-base
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stage_student() {
    first_weights scripts/extract.py roberta --vocab_transform
}

stage_train() {
    train_first_weights roberta roberta "${MASKED[@]}" --freeze_pos_embs --freeze_token_type_embds
}

run_stages "$@"
