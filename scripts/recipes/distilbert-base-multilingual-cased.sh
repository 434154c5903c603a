#!/usr/bin/env bash
# bert-base-multilingual-cased -> distilbert-base-multilingual-cased: six of twelve layers, as many languages as TEXT has.
#
#   TEXT=data/wikipedia TASK_DATA=data/xnli bash scripts/recipes/distilbert-base-multilingual-cased.sh [STAGE ..]
#
# TEXT is a folder with a file or folder a language (en.txt, de.jsonl.gz, sw/, ..). Languages are sampled by n^EXPONENT, 0.7 as
# for the teacher: small ones come more often than they are. TASK_DATA/xnli holds XNLI-MT-1.0 and XNLI-1.0. For G GB of text:
#   disk    G GB beside TEXT (3 G while it is sampled and split), 1.8 G of scratch files at the peak (4 bytes an id), G of
#           token files; 8.7 GB of the run (135 M parameters)
#   hours   data 0.04 G on two cores (tokenizing 10 MB/s; sampling not measured); training 185,000 G / R at R tokens/s over all
#           GPUs (not measured; 0.22 ids a byte over 18 languages); XNLI: not measured
#   memory  data 300 MB; training 35 bytes a sequence for each process, and the models. On the GPU: not measured
# PLAN=1 tells hours, memory and disk of the training, measured here. common.sh explains all settings, and these figures.
set -euo pipefail
STUDENT_NAME="${STUDENT_NAME:-distilbert-base-multilingual-cased}"
TEACHER="${TEACHER:-bert-base-multilingual-cased}"
TEXT="${TEXT:-data/wikipedia}"
TASKS="${TASKS-xnli}"
EXPONENT="${EXPONENT:-0.7}"
CONFIG=distilbert-base-multilingual-cased
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stage_data() {
    make_sequences --by_language --sampling_exponent "$EXPONENT"
    make_token_files
}

run_stages "$@"
