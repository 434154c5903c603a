#!/usr/bin/env bash
# Everything about speed on a GPU in one command: the GPU's tests; the step of each pair, over micro-batch sizes and
# precisions, as it is and compiled, next to the 2019 step in fp32 and under autocast; train.py end to end next to the
# bare step. Writes JSON, PNG and the printed tables.
#   scripts/benchmark_gpu.sh [--cpu] [FOLDER]      FOLDER: default benchmarks/gpu-DATE; --cpu: tiny sizes, to try the script
set -euo pipefail
. "$(dirname "$0")/environment.sh"

device=cuda
if [ "${1:-}" = --cpu ]; then
    device=cpu
    shift
fi
if [ $# -gt 1 ] || [[ "${1:-}" = -* ]]; then
    echo "error: expected [--cpu] [FOLDER], got: $*" >&2
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

benchmark() { # name, flags of scripts/benchmark.py
    local name="$1"
    shift
    echo "== $name"
    "$PYTHON" scripts/benchmark.py "$@" --json "$folder/$name.json" --plot "$folder/$name.png" | tee "$folder/$name.md" || status=$?
}

# What fails does not keep the other figures back; the status says so at the end.
status=0
"$PYTHON" -m pytest -m gpu -q 2>&1 | tee "$folder/tests.txt" || status=$?

reference=(--reference --reference_precision fp32 bf16)
compile=(--compile)
if ! said="$("$PYTHON" -c 'import sys, torch; from distil.system.launch import check_compiler; check_compiler(torch.device(sys.argv[1]))' "$device" 2>&1)"; then
    tail -n 1 <<< "$said" >&2
    compile=()
    status=2
fi

if [ "$device" = cpu ]; then
    tiny=(--device cpu --size tiny --updates 2 --warmup 1)
    benchmark bert "${tiny[@]}" --length 32 "${reference[@]}" "${compile[@]}" --sweep --batch_size 2 --precision fp32 bf16
    benchmark bert-as-typed "${tiny[@]}" --length 32 --mix --batch_size 5 --micro_batches 6 --tokens_per_pass 0 400
    benchmark bert-end-to-end "${tiny[@]}" --length 32 "${compile[@]}" --end_to_end
else
    for pair in bert mbert gpt2 roberta; do
        length=256
        if [ "$pair" = gpt2 ]; then
            length=512
        fi
        benchmark "$pair" --device cuda --pair "$pair" --length "$length" "${reference[@]}" "${compile[@]}" --sweep
    done
    benchmark bert-as-typed --device cuda --length 512 --mix --batch_size 5 --micro_batches 50 --precision fp32 bf16 \
        --tokens_per_pass 0 8192 16384 32768 65536 "${compile[@]}"
    benchmark bert-mix --device cuda --length 512 --mix --batch_size 64 --precision fp32 bf16 "${reference[@]}" "${compile[@]}"
    benchmark bert-end-to-end --device cuda --length 256 --batch_size 128 --precision fp32 bf16 "${compile[@]}" --end_to_end
fi
echo "Wrote $folder."
exit "$status"
