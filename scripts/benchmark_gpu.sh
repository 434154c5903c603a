#!/usr/bin/env bash
# Everything about speed on a GPU in one command: the GPU's tests; the step of each pair, over micro-batch sizes and
# precisions, as it is and compiled, next to the 2019 step in fp32 and under autocast; train.py end to end next to the
# bare step. Writes JSON, PNG and the printed tables.
#   scripts/benchmark_gpu.sh [--cpu] [--stage N] [FOLDER]
#       FOLDER: default benchmarks/gpu-DATE; --cpu: tiny sizes, to try the script
#       --stage N: that part alone, meant to take minutes: 1 tests and README's command, as typed, in larger passes, packed;
#       2 to 5 the pairs bert, mbert, gpt2, roberta; 6 texts of all lengths; 7 train.py end to end
set -euo pipefail
. "$(dirname "$0")/environment.sh"

device=cuda
stage=
if [ "${1:-}" = --cpu ]; then
    device=cpu
    shift
fi
if [[ "${1:-}" = --stage && "${2:-}" = [1-7] ]]; then
    stage="$2"
    shift 2
fi
if [ $# -gt 1 ] || [[ "${1:-}" = -* ]]; then
    echo "error: expected [--cpu] [--stage 1..7] [FOLDER], got: $*" >&2
    exit 2
fi
folder="$(realpath -m "${1:-$ROOT/benchmarks/$([ "$device" = cpu ] && echo cpu || echo gpu)-$(date +%Y-%m-%d)}")"

make_environment requirements.txt requirements-dev.txt
cd "$ROOT"
if [ "$device" = cuda ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: torch finds no GPU here; start this where there is one, or with --cpu for a trial with tiny sizes" >&2
    exit 2
fi
mkdir -p "$folder"

is_wanted() { # number of a stage
    [ -z "$stage" ] || [ "$stage" = "$1" ]
}

benchmark() { # name, flags of scripts/benchmark.py
    local name="$1"
    shift
    echo "== $name"
    "$PYTHON" scripts/benchmark.py "$@" --json "$folder/$name.json" --plot "$folder/$name.png" | tee "$folder/$name.md" || status=$?
}

# What fails does not keep the other figures back; the status says so at the end.
status=0
if is_wanted 1; then
    "$PYTHON" -m pytest -m gpu -q 2>&1 | tee "$folder/tests.txt" || status=$?
fi

reference=(--reference --reference_precision fp32 bf16)
compile=(--compile)
if ! said="$("$PYTHON" -c 'import sys, torch; from distil.system.compiler import check_compiler; check_compiler(torch.device(sys.argv[1]))' "$device" 2>&1)"; then
    tail -n 1 <<< "$said" >&2
    compile=()
    status=2
fi

lengths=(bert 256 mbert 256 gpt2 512 roberta 256)
if [ "$device" = cpu ]; then
    sizes=(--device cpu --size tiny --updates 2 --warmup 1)
    lengths=(bert 32)
    typed=(--length 32 --mix --batch_size 5 --micro_batches 6 --tokens_per_pass 0 400)
    packed=("${typed[@]}" --pack_sequences)
    sweep=(--sweep --batch_size 2 --precision fp32 bf16)
    end_to_end=(--length 32)
else
    sizes=(--device cuda)
    typed=(--length 512 --mix --batch_size 5 --micro_batches 50 --precision fp32 bf16)
    packed=("${typed[@]}" --precision bf16 --tokens_per_pass 16384 65536 --pack_sequences "${compile[@]}")
    typed+=(--tokens_per_pass 0 8192 16384 32768 65536 131072 "${compile[@]}")
    sweep=(--sweep)
    end_to_end=(--length 256 --batch_size 128 --precision fp32 bf16)
fi
if is_wanted 1; then
    benchmark bert-as-typed "${sizes[@]}" "${typed[@]}"
    benchmark bert-packed "${sizes[@]}" "${packed[@]}"
fi
for ((k = 0; k < ${#lengths[@]}; k += 2)); do
    if is_wanted $((2 + k / 2)); then
        pair=("${sizes[@]}" --pair "${lengths[k]}" --length "${lengths[k + 1]}")
        benchmark "${lengths[k]}" "${pair[@]}" "${reference[@]}" "${compile[@]}" "${sweep[@]}"
    fi
done
if is_wanted 6 && [ "$device" = cuda ]; then
    mix=("${sizes[@]}" --length 512 --mix --batch_size 64 --precision fp32 bf16)
    benchmark bert-mix "${mix[@]}" "${reference[@]}" "${compile[@]}"
fi
if is_wanted 7; then
    benchmark bert-end-to-end "${sizes[@]}" "${end_to_end[@]}" "${compile[@]}" --end_to_end
fi
echo "Wrote $folder."
exit "$status"
