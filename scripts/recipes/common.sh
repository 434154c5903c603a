# Sourced by the recipes, after their own settings (CONFIG: the student's file in training_configs/): the settings they share,
# the checks, the commands of the stages, and the stages that several have.
#
# Every setting is an environment variable. Those at the head of each recipe, and
#   OUT            folder that receives everything (default: serialization_dir/STUDENT_NAME)
#   STUDENT_NAME   the name of the student, and of its folder in OUT
#   STUDENT_CONFIG configuration of the student, for the models of 2019 (default: of training_configs/)
#   EPOCHS         passes over the text (default: 3); STEPS: updates in their place
#   MAX_TOKENS     padded tokens a micro-batch (default: 16384); MICRO_BATCHES: of these an update, over all processes
#                  (default: 48: at 1,000 characters a sequence about the paper's 4,000 examples). Where 16,384 do not fit
#                  into a GPU's memory (not measured), halve the one and double the other
#   PRECISION      bf16 (default), fp16, fp32
#   GPUS           processes, one a GPU, on this machine (default: 1); NODES: machines (default: 1), then on each MASTER,
#                  one machine's name:port; all share OUT
#   HELD_OUT       one sequence of so many is kept for evaluation (default: 10000), 20 that follow each other at a time
#   EVAL_INTERVAL  updates between two evaluations while training (default: 500)
#   PSEUDO         sequences for the pseudo-perplexity of a masked model, a pass a token (default: 200)
#   TASK_DATA      folder of the tasks' data, a folder a task (default: data/tasks); TASKS= to do without; SEEDS of each task
#   PLAN           1: stop before training, and tell its updates, hours (a few micro-batches are measured), memory, disk and
#                  cost; PRICE: of an hour of all that it uses
#   PREPARE_FLAGS, TRAIN_FLAGS, TASK_FLAGS, REPORT_FLAGS   more flags for prepare_text.py, train.py, run_task.py, report.py
#   PYTHON         interpreter (default: of VENV, a virtual environment that is made if need be; default: .venv in the checkout)
#
# What to expect of G GB of text, from rates measured on two CPU cores (benchmarks/DATA.md, RESULTS.md):
#   prepare_text   50 s a GB (20 MB/s, one process), 60 MB of memory
#   split          4 s of processor time a GB (0.28 s for 70 MB), which keeps held-out text apart
#   tokenizing     33 to 90 s a GB (30 to 11.5 MB/s: words that came before, words all new), 225 MB of memory
#   token ids      0.22 to 0.23 a byte (Wikipedia; five of the vocabularies of 2019); 2 bytes each, or 4 where the
#                  vocabulary is above 65,535
#   disk           the text once more (twice while it is split), 0.9 bytes of scratch files and 0.55 of token files a byte of
#                  text (1.0 at 4 bytes an id); 64 bytes a parameter of the student for the run (3 checkpoints, 3 epochs); for
#                  each of TASKS 4 bytes a parameter of teacher and student, for the fine-tuned models
#   training       PLAN=1 tells it, measured on the device at hand. Not measured on a GPU by us. At R tokens/s over all GPUs: hours = ids x EPOCHS / R / 3600. Two CPU cores made
#                  797 tokens/s for BERT -> DistilBERT (bf16), which is for trials. The paper: about 90 hours on 8 V100 of
#                  16 GB for DistilBERT. Main memory: 35 bytes a sequence for each process, beside the models

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
OUT="${OUT:-serialization_dir/$STUDENT_NAME}"
EPOCHS="${EPOCHS:-3}"
STEPS="${STEPS:-}"
MAX_TOKENS="${MAX_TOKENS:-16384}"
MICRO_BATCHES="${MICRO_BATCHES:-48}"
PRECISION="${PRECISION:-bf16}"
GPUS="${GPUS:-1}"
NODES="${NODES:-1}"
MASTER="${MASTER:-}"
HELD_OUT="${HELD_OUT:-10000}"
EVAL_INTERVAL="${EVAL_INTERVAL:-500}"
PSEUDO="${PSEUDO:-200}"
PLAN="${PLAN:-}"
PRICE="${PRICE:-}"
TASK_DATA="${TASK_DATA:-data/tasks}"
SEEDS="${SEEDS:-42 43 44 45 46}"
MAX_CHARS="${MAX_CHARS:-1000}"
read -ra PREPARE_FLAGS <<< "${PREPARE_FLAGS:-}"
read -ra TRAIN_FLAGS <<< "${TRAIN_FLAGS:-}"
read -ra REPORT_FLAGS <<< "${REPORT_FLAGS:-}"
read -ra TASKS <<< "${TASKS:-}"
read -ra SEEDS <<< "$SEEDS"
TASK_FLAGS="${TASK_FLAGS:-}"

STUDENT="$OUT/$STUDENT_NAME"
FIRST_WEIGHTS="$OUT/first_weights.pth"
FIRST_STUDENT="$OUT/first_student"
CORPUS="$OUT/corpus.$(basename "$TEACHER")"
COUNTS="$OUT/token_counts.pickle"
HELD_OUT_FILE="$OUT/held_out.$(basename "$TEACHER").pickle"
# The weights of the objectives: the 2019 document's for masked models, ours for causal ones.
MASKED=(--alpha_ce 5.0 --alpha_mlm 2.0 --alpha_cos 1.0 --alpha_clm 0.0 --mlm --token_counts "$COUNTS")
CAUSAL=(--alpha_ce 5.0 --alpha_cos 1.0 --alpha_clm 0.5)
STAGES=(student data train evaluate)
CHECKS=(check_numbers check_processes check_text check_tasks)
PROBLEMS=()

# ---------------------------------------------------------------------------------------------------------------------
# Stages and checks
# ---------------------------------------------------------------------------------------------------------------------

run_stages() { # the stages named, or all: each is a function stage_NAME
    local stage check wanted=("$@")
    if [ $# = 0 ]; then
        wanted=("${STAGES[@]}")
    fi
    for stage in "${wanted[@]}"; do
        [[ " ${STAGES[*]} " = *" $stage "* ]] || problem "$stage: no such stage; expected some of ${STAGES[*]}, or none for all"
    done
    for check in "${CHECKS[@]}"; do
        "$check" " ${wanted[*]} "
    done
    if [ -n "${PYTHON:-}" ] && ! command -v "$PYTHON" > /dev/null; then
        problem "PYTHON=$PYTHON: no such program; expected an interpreter with requirements.txt installed, or nothing"
    fi
    stop_at_problems
    . "$ROOT/scripts/environment.sh"
    make_environment requirements.txt requirements-eval.txt
    mkdir -p "$OUT"
    for stage in "${wanted[@]}"; do
        echo "== $STUDENT_NAME: $stage"
        "stage_$stage"
    done
}

problem() {
    PROBLEMS+=("$1")
}

stop_at_problems() {
    if [ ${#PROBLEMS[@]} -gt 0 ]; then
        printf "$(basename "$0"): error: %s\n" "${PROBLEMS[@]}" >&2
        exit 2
    fi
}

require_numbers() { # names of settings
    local name
    for name in "$@"; do
        [[ "${!name}" =~ ^[1-9][0-9]{0,17}$ ]] || problem "$name=${!name}: expected a whole number above 0"
    done
}

check_numbers() {
    require_numbers EPOCHS MAX_TOKENS MICRO_BATCHES HELD_OUT EVAL_INTERVAL PSEUDO MAX_CHARS
    if [ -n "$STEPS" ]; then
        require_numbers STEPS
    fi
    if [ -n "$PLAN" ] && [ "$PLAN" != 1 ]; then
        problem "PLAN=$PLAN: expected 1, to tell the plan of the training, or nothing, to train"
    fi
    if [ "$HELD_OUT" = 1 ]; then
        problem "HELD_OUT=1: would hold out everything; expected one sequence of at least 2"
    fi
    case "$PRECISION" in
    bf16 | fp16 | fp32) ;;
    *) problem "PRECISION=$PRECISION: expected bf16, fp16 or fp32" ;;
    esac
}

check_processes() {
    local before=${#PROBLEMS[@]}
    require_numbers GPUS NODES
    if [ ${#PROBLEMS[@]} -gt "$before" ] || ! [[ "${MICRO_BATCHES}" =~ ^[1-9][0-9]{0,17}$ ]]; then
        return
    fi
    if [ $((MICRO_BATCHES % (GPUS * NODES))) != 0 ]; then
        problem "MICRO_BATCHES=$MICRO_BATCHES: can't be dealt evenly to $GPUS x $NODES processes; expected a multiple"
    fi
    if [ "$NODES" -gt 1 ] && [ -z "$MASTER" ]; then
        problem "MASTER: needed for NODES=$NODES; expected one machine's name:port, the same on all"
    fi
}

check_text() { # stages
    if [[ "$1" = *" data "* ]] && [ ! -e "$OUT/train.txt" ] && [ ! -e "$TEXT" ]; then
        problem "TEXT=$TEXT: no such file or folder; expected documents (text, .jsonl, .parquet ..) to distil on"
    fi
}

check_tasks() { # stages
    if [[ "$1" = *" evaluate "* ]] && [ ${#TASKS[@]} -gt 0 ] && [ ! -d "$TASK_DATA" ]; then
        problem "TASK_DATA=$TASK_DATA: no such folder; expected one with a folder for each of ${TASKS[*]}; or set TASKS="
    fi
}

# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------

run() { # a command, shown
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

program() { # a program of this project and its flags
    local path="$1"
    shift
    run "$PYTHON" "$ROOT/$path" "$@"
}

step() { # file or folder that a command makes, and writes last; the command
    local target="$1"
    shift
    if [ -e "$target" ]; then
        echo "$target is there already; take it away to have it made anew"
    else
        "$@"
    fi
}

first_weights() { # program, teacher's type, further flags: some of the teacher's layers, as in 2019
    local path="$1" model_type="$2"
    shift 2
    step "$FIRST_WEIGHTS" program "$path" --model_type "$model_type" --model_name "$TEACHER" \
        --dump_checkpoint "$FIRST_WEIGHTS" "$@"
}

whole_student() { # flags of extract.py: some of any teacher's layers
    step "$FIRST_STUDENT" program scripts/extract.py --teacher "$TEACHER" --output "$FIRST_STUDENT" "$@"
}

make_sequences() { # flags of prepare_text.py: TEXT -> OUT/train.txt and OUT/held_out.txt, a sequence a line
    step "$OUT/train.txt" split_sequences "$@"
}

split_sequences() {
    program scripts/prepare_text.py --file_path "$TEXT" --force --output "$OUT/sequences.txt" --max_chars "$MAX_CHARS" "$@" \
        ${PREPARE_FLAGS[@]+"${PREPARE_FLAGS[@]}"}
    hold_out
}

hold_out() { # OUT/sequences.txt -> OUT/train.txt and OUT/held_out.txt
    # Twenty at a time: few documents have a part on both sides.
    (cd "$OUT" && LC_ALL=C awk -v one_of="$HELD_OUT" 'int((NR - 1) / 20) % one_of == 0 && !($0 in held) { held[$0]; print }' \
        sequences.txt > held_out.part)
    leave_out
}

leave_out() { # OUT/sequences.txt without the lines of OUT/held_out.part: sampled languages repeat lines
    (cd "$OUT" && LC_ALL=C awk 'NR == FNR { held[$0]; next } !($0 in held)' held_out.part sequences.txt > train.part)
    if [ ! -s "$OUT/train.part" ]; then
        problem "TEXT=$TEXT: nothing is left beside the 20 sequences that are held out; expected more text"
        stop_at_problems
    fi
    mv "$OUT/held_out.part" "$OUT/held_out.txt"
    mv "$OUT/train.part" "$OUT/train.txt"
    rm "$OUT/sequences.txt"
}

make_token_files() { # both texts -> CORPUS (a store), COUNTS, HELD_OUT_FILE, by the tokenizer in the teacher's folder
    local tokenizer=(--tokenizer_type "${TOKENIZER_TYPE:-auto}" --tokenizer_name "$TEACHER")
    step "$COUNTS" program scripts/binarized_data.py --file_path "$OUT/train.txt" "${tokenizer[@]}" \
        --dump_file "$OUT/corpus" --format store --token_counts_dump "$COUNTS"
    step "$HELD_OUT_FILE" program scripts/binarized_data.py --file_path "$OUT/held_out.txt" "${tokenizer[@]}" \
        --dump_file "$OUT/held_out"
}

train() { # flags of train.py that tell student and objective
    local duration=(--n_epoch "$EPOCHS") precision=("--$PRECISION")
    if [ -n "$STEPS" ]; then
        duration=(--max_steps "$STEPS")
    fi
    if [ "$PRECISION" = fp32 ]; then
        precision=()
    fi
    set -- "$ROOT/train.py" --resume auto "$@" --teacher_name "$TEACHER" \
        --data_file "$CORPUS" --dump_path "$STUDENT" "${duration[@]}" ${precision[@]+"${precision[@]}"} \
        --max_tokens "$MAX_TOKENS" --gradient_accumulation_steps $((MICRO_BATCHES / (GPUS * NODES))) \
        --eval_data_file "$HELD_OUT_FILE" --eval_interval "$EVAL_INTERVAL" ${TRAIN_FLAGS[@]+"${TRAIN_FLAGS[@]}"}
    if [ -n "$PLAN" ]; then
        run "$PYTHON" "$@" --plan --n_gpu $((GPUS * NODES)) ${PRICE:+--price_per_hour "$PRICE"}
        exit
    fi
    step "$STUDENT/pytorch_model.bin" launch "$@"
}

train_first_weights() { # student's type, teacher's type, flags of train.py: with first_weights and STUDENT_CONFIG
    local student_type="$1" teacher_type="$2"
    shift 2
    train --student_type "$student_type" --student_config "${STUDENT_CONFIG:-$ROOT/training_configs/$CONFIG.json}" \
        --student_pretrained_weights "$FIRST_WEIGHTS" --teacher_type "$teacher_type" "$@"
}

launch() { # a program and its flags, on GPUS processes of each of NODES machines
    local torchrun=("$PYTHON" -m torch.distributed.run --nproc_per_node "$GPUS")
    if [ "$NODES" -gt 1 ]; then
        run "${torchrun[@]}" --nnodes "$NODES" --rdzv_backend c10d --rdzv_endpoint "$MASTER" "$@"
    elif [ "$GPUS" -gt 1 ]; then
        run "${torchrun[@]}" --standalone "$@"
    else
        run "$PYTHON" "$@"
    fi
}

evaluate() { # flags of evaluate_lm.py: both models on the held-out text, the tasks, the report and the model card
    step "$OUT/held_out.teacher.json" program scripts/evaluate_lm.py --model "$TEACHER" --data_file "$HELD_OUT_FILE" \
        --output "$OUT/held_out.teacher.json" "$@"
    step "$OUT/held_out.student.json" program scripts/evaluate_lm.py --model "$STUDENT" --teacher "$TEACHER" \
        --data_file "$HELD_OUT_FILE" --output "$OUT/held_out.student.json" "$@"
    program scripts/report.py --teacher "$TEACHER" --student "$STUDENT" \
        --tasks lm ${TASKS[@]+"${TASKS[@]}"} --data_dir "$TASK_DATA" --seeds "${SEEDS[@]}" --task_flags "$TASK_FLAGS" \
        --scores "$OUT/held_out.teacher.json" "$OUT/held_out.student.json" \
        --output_dir "$OUT/report" --write_card ${REPORT_FLAGS[@]+"${REPORT_FLAGS[@]}"}
}

# ---------------------------------------------------------------------------------------------------------------------
# The stages of BERT -> DistilBERT; a recipe writes those that it has otherwise
# ---------------------------------------------------------------------------------------------------------------------

stage_student() {
    first_weights scripts/extract_distilbert.py bert --vocab_transform
}

stage_data() {
    make_sequences
    make_token_files
}

stage_train() {
    train_first_weights distilbert bert "${MASKED[@]}" --freeze_pos_embs
}

stage_evaluate() {
    evaluate --pseudo_perplexity "$PSEUDO"
}
