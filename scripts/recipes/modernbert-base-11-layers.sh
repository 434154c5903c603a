#!/usr/bin/env bash
# ModernBERT-base -> a ModernBERT of every second layer, 11 of 22: nobody has published such a student; no result is known.
#
#   TEXT=data/documents TASK_DATA=data/glue bash scripts/recipes/modernbert-base-11-layers.sh [STAGE ..]
#
# Layers keep their attention, local or global, wherever they come to stand. The objectives and their weights are those of
# DistilBERT; nothing here was tuned for this teacher. For G GB of text:
#   disk    G GB beside TEXT (2 G while it is split), 0.9 G of scratch files at the peak, 0.55 G of token files (2 bytes an id,
#           50,368 entries); 6.0 GB of the run (94 M parameters of 150)
#   hours   data 0.03 to 0.05 G on two cores, where tokenizing goes as for GPT-2 (its own vocabulary was not measured); training
#           ids x 3 / R / 3600 at R tokens/s over all GPUs (not measured); GLUE: not measured
#   memory  data 225 MB; training 35 bytes a sequence for each process, and the models. On the GPU: not measured
# PLAN=1 tells hours, memory and disk of the training, measured here. common.sh explains all settings, and these figures.
set -euo pipefail
STUDENT_NAME="${STUDENT_NAME:-modernbert-base-11-layers}"
TEACHER="${TEACHER:-answerdotai/ModernBERT-base}"
TEXT="${TEXT:-data/documents}"
TASKS="${TASKS-cola mnli mrpc qnli qqp rte sst2 stsb wnli}"
NUM_LAYERS="${NUM_LAYERS:-11}"
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stage_student() {
    whole_student --num_layers "$NUM_LAYERS"
}

stage_train() {
    train --student "$FIRST_STUDENT" "${MASKED[@]}"
}

run_stages "$@"
