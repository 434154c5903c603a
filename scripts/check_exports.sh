#!/usr/bin/env bash
# Compare exported folders on transformers 4.57 with the tested version: ids, logits, inputs that the models take.
# Installs 4.57 beside the environment, in FOLDER/transformers-4 (default: a temporary folder); CI does not call it.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
make_environment requirements.txt requirements-dev.txt requirements-eval.txt
cd "$ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
case "${1:-}" in -*) refuse "$1: expected the folder to work in, or nothing (a temporary one)" ;; esac
FOLDER="${1:-$(mktemp -d)}"
[ ! -e "$FOLDER/exports" ] || refuse "$FOLDER/exports: exists already; remove it, or name another folder"
PYTHONPATH=".:scripts:tests:tests/models" "$PYTHON" tests/exports.py make "$FOLDER/exports"
[ -d "$FOLDER/transformers-4/transformers" ] ||
    "$PYTHON" -m pip install -q --target "$FOLDER/transformers-4" transformers==4.57.3
PYTHONPATH="$FOLDER/transformers-4" "$PYTHON" tests/exports.py check "$FOLDER/exports"
