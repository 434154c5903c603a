#!/usr/bin/env bash
# bert-base-uncased -> distilbert-base-uncased: six of twelve layers, English (Sanh et al., 2019).
#
#   TEXT=data/documents TASK_DATA=data/glue bash scripts/recipes/distilbert-base-uncased.sh [STAGE ..]
#
# The paper's text is English Wikipedia and the Toronto Book Corpus: 3.3 billion words, about 20 GB, 4.4 billion token ids.
#   disk    20 GB beside TEXT (40 while it is split), 18 of scratch files at the peak, 11 of token files; 4.3 of the run (67 M
#           parameters)
#   hours   data 0.5 to 0.8 on two cores; training 3,700,000 / R at R tokens/s over all GPUs (R is not measured; the paper took
#           about 90 hours on 8 V100 of 16 GB); GLUE: not measured
#   memory  data 225 MB; training 0.7 to 3.5 GB a process for the plan (20 to 100 M sequences), and the models. On the GPU: not
#           measured
# PLAN=1 tells hours, memory and disk of the training, measured here. common.sh explains all settings, and these figures.
set -euo pipefail
STUDENT_NAME="${STUDENT_NAME:-distilbert-base-uncased}"
TEACHER="${TEACHER:-bert-base-uncased}"
TEXT="${TEXT:-data/documents}"
TASKS="${TASKS-cola mnli mrpc qnli qqp rte sst2 stsb wnli}"
CONFIG=distilbert-base-uncased
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_stages "$@"
