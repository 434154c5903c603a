#!/usr/bin/env bash
# AntiBERTy, a BERT of 26 M parameters for antibodies (8 layers x 512; Ruffolo et al., 2021) -> 4 of its layers, 13 M. A real
# teacher that two CPU cores can distil in minutes; nobody has published such a student.
#
#   TEXT=antibodies.txt bash scripts/recipes/antiberty-4-layers.sh [STAGE ..]
#
# TEXT: one heavy or light chain a line, its residues separated by blanks (E V Q L ..); lines without a blank are separated
# here. The stage `study`, run only where it is named, compares objectives and layers with seeds (docs/study.md). Settings:
#   HELD_OUT_TEXT  sequences to evaluate on, such as another study's; default: one of HELD_OUT (40) lines of TEXT, see common.sh
#   TEACHER        folder of the teacher; default: made from the package antiberty 0.1.3 (MIT licence, 97 MB), which is fetched
#                  with pip and unpacked, not installed
#   PACKAGE        that package's wheel, where it is at hand
#   STUDY_FLAGS    more flags for study.py (--variants, --own, --seeds, --max_steps, --processes ..)
#
# Of 5,345 chains (616,000 residues):
#   disk    0.2 GB of package and teacher, 0.1 GB of the first student, 0.84 GB of the run (13 M parameters)
#   hours   120 updates of 16 chains (STEPS=120) took 4 minutes without teacher, 6 with the triple, 8 with relations, on one of
#           two busy cores (bf16); the study makes 105 such trainings
#   memory  not measured
# PLAN=1 tells hours, memory and disk of the training, measured here. common.sh explains all settings.
set -euo pipefail
STUDENT_NAME="${STUDENT_NAME:-antiberty-4-layers}"
OUT="${OUT:-serialization_dir/$STUDENT_NAME}"
GIVEN_TEACHER="${TEACHER:-}"
TEACHER="${TEACHER:-$OUT/antiberty}"
PACKAGE="${PACKAGE:-}"
TEXT="${TEXT:-data/antibodies.txt}"
HELD_OUT_TEXT="${HELD_OUT_TEXT:-}"
HELD_OUT="${HELD_OUT:-40}"
TASKS="${TASKS-}"
NUM_LAYERS="${NUM_LAYERS:-4}"
MAX_TOKENS="${MAX_TOKENS:-2048}"
MICRO_BATCHES="${MICRO_BATCHES:-1}"
EVAL_INTERVAL="${EVAL_INTERVAL:-100}"
TOKENIZER_TYPE=bert
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read -ra STUDY_FLAGS <<< "${STUDY_FLAGS:-}"
CHECKS+=(check_inputs)
VARIANTS=(triple no_teacher ce_alone ce_rel without_ce without_mlm without_cos random_start ce_hid ce_att jsd_alone
    measured_layers)
NEAREST="--alpha_mlm 0 --alpha_cos 0 --alpha_hid 1 --student_dropout 0" # see benchmarks/DISTILLATION.md
OWN=("ce_hid_dropout_0=$NEAREST" "triple_dropout_0=--student_dropout 0"
    "no_teacher_dropout_0=--alpha_ce 0 --alpha_cos 0 --alpha_mlm 1 --student_dropout 0")
if [ $# -gt 0 ]; then
    STAGES+=(study)
fi

check_inputs() {
    require_numbers NUM_LAYERS
    if [ -d "$TEXT" ]; then
        problem "TEXT=$TEXT: is a folder; expected a file, one sequence a line"
    fi
    if [ -n "$HELD_OUT_TEXT" ] && [ ! -s "$HELD_OUT_TEXT" ]; then
        problem "HELD_OUT_TEXT=$HELD_OUT_TEXT: no such file, or an empty one; expected one sequence a line, or nothing"
    fi
    if [ -n "$PACKAGE" ] && [ ! -f "$PACKAGE" ]; then
        problem "PACKAGE=$PACKAGE: no such file; expected the wheel of antiberty 0.1.3, or nothing to fetch it"
    fi
}

make_teacher() {
    if [ -z "$GIVEN_TEACHER" ]; then
        step "$TEACHER" unpack_teacher
    fi
}

unpack_teacher() { # the vocabulary lies a folder above the weights: one folder of both
    local wheel="$PACKAGE" part="$TEACHER.part" unpacked="$OUT/unpacked"
    local models="$unpacked/antiberty/trained_models"
    if [ -z "$wheel" ]; then
        run "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$OUT/package" antiberty==0.1.3
        wheel="$(echo "$OUT"/package/antiberty-0.1.3-*.whl)"
    fi
    rm -rf "$part" "$unpacked"
    run "$PYTHON" -m zipfile -e "$wheel" "$unpacked"
    mkdir "$part"
    mv "$models/vocab.txt" "$models/AntiBERTy_md_smooth/config.json" "$models/AntiBERTy_md_smooth/pytorch_model.bin" "$part"
    rm -r "$unpacked"
    mv "$part" "$TEACHER"
}

separated() { # file: its lines, without those that are blank
    LC_ALL=C awk '{ sub(/\r$/, "") } NF == 1 { gsub(/./, "& ") } NF { $1 = $1; print }' "$1"
}

split_sequences() { # in place of common.sh's: a line is a sequence already
    separated "$TEXT" > "$OUT/sequences.txt"
    if [ -n "$HELD_OUT_TEXT" ]; then
        separated "$HELD_OUT_TEXT" > "$OUT/held_out.part"
        leave_out
    else
        hold_out
    fi
}

stage_student() {
    make_teacher
    whole_student --num_layers "$NUM_LAYERS"
}

stage_data() {
    make_teacher
    make_sequences
    make_token_files
}

stage_train() {
    train --student "$FIRST_STUDENT" "${MASKED[@]}"
}

stage_study() {
    stage_data
    program scripts/study.py --teacher "$TEACHER" --data_file "$CORPUS" --held_out "$HELD_OUT_FILE" \
        --title "AntiBERTy (8 to $NUM_LAYERS layers)" --output "$OUT/study" --variants "${VARIANTS[@]}" --own "${OWN[@]}" \
        --learning_rates 1.25e-4 2.5e-4 5e-4 --seeds 56 57 58 59 60 --max_steps 120 --processes 2 \
        --train_flags "--batch_size 16 --gradient_accumulation_steps 1 --bf16 --relation_heads 8" \
        ${STUDY_FLAGS[@]+"${STUDY_FLAGS[@]}"}
}

run_stages "$@"
