#!/usr/bin/env bash
# A DistilBERT, fine-tuned on SQuAD v1.1 with a teacher, bert-base-uncased, which is fine-tuned first (Sanh et al., 2019,
# Table 2: EM 79.1, F1 86.9; without the teacher 77.7, 85.8).
#
#   STUDENT_FOLDER=serialization_dir/distilbert-base-uncased/distilbert-base-uncased SQUAD=data/squad \
#       bash scripts/recipes/squad-second-step.sh [STAGE ..]
#
# Stages: teacher (fine-tuned as in 2019: rate 3e-5, 12 windows an update, 2 epochs), student (with the teacher), plain (the
# student without it), report. Settings:
#   TEACHER         hub name or folder (default: bert-base-uncased)
#   STUDENT_FOLDER  a distilled model, a local folder
#   SQUAD           folder of train-v1.1.json and dev-v1.1.json
#   OUT             folder that receives everything; SEED of the runs (default: 42)
#   GPUS, PRECISION (fp32 or fp16), PYTHON   see common.sh; the teacher's 12 windows an update are dealt to the GPUs
#   STUDENT_BATCH   windows an update of student and plain, over all GPUs (default: 8); STUDENT_EPOCHS (default: 3)
#   SQUAD_FLAGS     more flags for run_squad_w_distillation.py
#
# Disk: 4 bytes a parameter for each of the three models (0.44 GB BERT, 0.27 GB each DistilBERT), and three times that for each
# checkpoint, one every SAVE_STEPS updates (default: 5000). Hours and memory: not measured at this size. A stage that was
# interrupted begins anew.
set -euo pipefail
STUDENT_NAME=squad-second-step
TEACHER="${TEACHER:-bert-base-uncased}"
STUDENT_FOLDER="${STUDENT_FOLDER:-serialization_dir/distilbert-base-uncased/distilbert-base-uncased}"
SQUAD="${SQUAD:-data/squad}"
STUDENT_BATCH="${STUDENT_BATCH:-8}"
STUDENT_EPOCHS="${STUDENT_EPOCHS:-3}"
SAVE_STEPS="${SAVE_STEPS:-5000}"
SEED="${SEED:-42}"
PRECISION="${PRECISION:-fp32}"
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read -ra SQUAD_FLAGS <<< "${SQUAD_FLAGS:-}"
STAGES=(teacher student plain report)
CHECKS=(check_squad)

check_squad() { # stages
    local file
    require_numbers GPUS STUDENT_BATCH STUDENT_EPOCHS SAVE_STEPS
    if [[ "$GPUS" =~ ^[1-9][0-9]{0,3}$ && "$STUDENT_BATCH" =~ ^[1-9][0-9]{0,5}$ ]]; then
        if [ $((12 % GPUS)) != 0 ] || [ $((STUDENT_BATCH % GPUS)) != 0 ]; then
            problem "GPUS=$GPUS: 12 and STUDENT_BATCH=$STUDENT_BATCH windows can't be dealt to them evenly"
        fi
    fi
    [[ "$PRECISION" = fp32 || "$PRECISION" = fp16 ]] || problem "PRECISION=$PRECISION: expected fp32 or fp16"
    for file in train-v1.1.json dev-v1.1.json; do
        [ -f "$SQUAD/$file" ] || problem "SQUAD=$SQUAD: has no $file; expected the folder of SQuAD v1.1's two files"
    done
    [ -d "$STUDENT_FOLDER" ] || problem "STUDENT_FOLDER=$STUDENT_FOLDER: no such folder; expected a student that train.py wrote"
}

squad() { # stage, windows an update, flags of run_squad_w_distillation.py: -> OUT/STAGE
    local folder="$OUT/$1" batch=$(($2 / GPUS)) more=()
    shift 2
    if [ -e "$folder" ]; then
        more+=(--overwrite_output_dir)
    fi
    if [ "$PRECISION" = fp16 ]; then
        more+=(--fp16)
    fi
    step "$folder/scores.json" launch "$ROOT/scripts/run_squad_w_distillation.py" --output_dir "$folder" --data_dir "$SQUAD" \
        --do_train --do_eval --per_gpu_train_batch_size "$batch" --save_steps "$SAVE_STEPS" --seed "$SEED" "$@" \
        ${more[@]+"${more[@]}"} ${SQUAD_FLAGS[@]+"${SQUAD_FLAGS[@]}"}
}

squad_student() { # stage, flags: the distilled model
    local stage="$1"
    shift
    squad "$stage" "$STUDENT_BATCH" --model_type distilbert --model_name_or_path "$STUDENT_FOLDER" \
        --num_train_epochs "$STUDENT_EPOCHS" "$@"
}

stage_teacher() {
    squad teacher 12 --model_type bert --model_name_or_path "$TEACHER" --learning_rate 3e-5 --num_train_epochs 2
}

stage_student() {
    squad_student student --teacher_type bert --teacher_name_or_path "$OUT/teacher"
}

stage_plain() {
    squad_student plain
}

stage_report() { # what the teacher keeps of its help: a table each
    local run
    for run in student plain; do
        program scripts/report.py --teacher "$TEACHER" --student "$STUDENT_FOLDER" --tasks squad \
            --scores "$OUT/teacher/scores.json" "$OUT/$run/scores.json" --output_dir "$OUT/report.$run" \
            ${REPORT_FLAGS[@]+"${REPORT_FLAGS[@]}"}
    done
}

run_stages "$@"
