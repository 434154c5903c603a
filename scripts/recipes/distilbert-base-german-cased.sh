#!/usr/bin/env bash
# bert-base-german-dbmdz-cased -> distilbert-base-german-cased: six of twelve layers, German.
#
#   TEXT=data/german TASK_DATA=data/german_tasks bash scripts/recipes/distilbert-base-german-cased.sh [STAGE ..]
#
# TASK_DATA/ner holds GermEval 2014 (train, dev and test in the name of its files). CoNLL-2003 is scored by run_task.py, see
# docs/evaluating.md. For G GB of text:
#   disk    G GB beside TEXT (2 G while it is split), 0.9 G of scratch files at the peak, 0.55 G of token files; 4.3 GB of the
#           run (67 M parameters)
#   hours   data 0.02 to 0.04 G on two cores; training 191,000 G / R at R tokens/s over all GPUs (not measured; German was
#           measured with the multilingual vocabulary only, 0.23 ids a byte); NER: not measured
#   memory  data 225 MB; training 35 bytes a sequence for each process, and the models. On the GPU: not measured
# PLAN=1 tells hours, memory and disk of the training, measured here. common.sh explains all settings, and these figures.
set -euo pipefail
STUDENT_NAME="${STUDENT_NAME:-distilbert-base-german-cased}"
TEACHER="${TEACHER:-bert-base-german-dbmdz-cased}"
TEXT="${TEXT:-data/german}"
TASKS="${TASKS-ner}"
CONFIG=distilbert-base-german-cased
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_stages "$@"
