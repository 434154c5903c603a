#!/usr/bin/env bash
# bert-base-multilingual-cased, its 119,547 entries trimmed to those of German text -> a German DistilBERT of about 66 M
# parameters (DistilmBERT: 135 M). Nobody has published such a student; no result is known.
#
#   TEXT=data/german TASK_DATA=data/german_tasks bash scripts/recipes/distilbert-base-german-from-mbert.sh [STAGE ..]
#
# Another language: its TEXT, KEEP entries by docs/vocabularies.md, its STUDENT_NAME. TASK_DATA/ner holds GermEval 2014 (train,
# dev and test in the name of its files). For G GB of text:
#   disk    G GB beside TEXT (2 G while it is split), 0.9 G of scratch files at the peak, 1.6 G of token files (4 bytes an id
#           of the whole vocabulary, 2 of the trimmed one); 0.4 GB of the trimmed teacher, 4.3 GB of the run (66 M parameters)
#   hours   data 0.03 to 0.05 G on two cores; training 191,000 G / R at R tokens/s over all GPUs (not measured); NER: not measured
#   memory  data 225 MB; training 35 bytes a sequence for each process, and the models. On the GPU: not measured
# PLAN=1 tells hours, memory and disk of the training, measured here. common.sh explains all settings, and these figures.
set -euo pipefail
STUDENT_NAME="${STUDENT_NAME:-distilbert-base-german-from-mbert}"
WHOLE_TEACHER="${TEACHER:-bert-base-multilingual-cased}"
KEEP="${KEEP:-30000}"
NUM_LAYERS="${NUM_LAYERS:-6}"
TEXT="${TEXT:-data/german}"
TASKS="${TASKS-ner}"
OUT="${OUT:-serialization_dir/$STUDENT_NAME}"
TEACHER="$OUT/teacher-$KEEP"
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
CHECKS+=(check_keep check_text_of_teacher)
WHOLE_CORPUS="$OUT/corpus.$(basename "$WHOLE_TEACHER")"
WHOLE_COUNTS="$OUT/whole_token_counts.pickle"
CORPUS="$WHOLE_CORPUS.teacher-$KEEP"

check_keep() {
    require_numbers KEEP NUM_LAYERS
}

check_text_of_teacher() { # stages
    if [[ "$1" = *" student "* ]] && [[ "$1" != *" data "* ]]; then
        check_text " data "
    fi
}

trim() { # flags of trim_vocabulary.py
    program scripts/trim_vocabulary.py --teacher "$WHOLE_TEACHER" --output "$TEACHER" "$@"
}

make_teacher() { # TEXT -> the entries that it needs -> TEACHER
    make_sequences
    step "$WHOLE_COUNTS" program scripts/binarized_data.py --file_path "$OUT/train.txt" --tokenizer_type auto \
        --tokenizer_name "$WHOLE_TEACHER" --dump_file "$OUT/corpus" --format store --token_counts_dump "$WHOLE_COUNTS"
    step "$TEACHER" trim --token_counts "$WHOLE_COUNTS" --keep "$KEEP" --held_out "$OUT/held_out.txt"
}

stage_student() {
    make_teacher
    whole_student --student_type distilbert --num_layers "$NUM_LAYERS"
}

stage_data() {
    make_teacher
    step "$CORPUS.json" trim --remap "$WHOLE_CORPUS"
    step "$COUNTS" program scripts/token_counts.py --data_file "$CORPUS" --vocab_size "$KEEP" --token_counts_dump "$COUNTS"
    step "$HELD_OUT_FILE" program scripts/binarized_data.py --file_path "$OUT/held_out.txt" --tokenizer_type auto \
        --tokenizer_name "$TEACHER" --dump_file "$OUT/held_out"
}

stage_train() {
    train --student "$FIRST_STUDENT" "${MASKED[@]}" --freeze_pos_embs
}

run_stages "$@"
