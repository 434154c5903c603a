#!/usr/bin/env bash
# Run the tests: makes .venv (VENV, PYTHON: see environment.sh), installs what they need, calls pytest with your flags, a
# file a core at a time.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
make_environment requirements.txt requirements-dev.txt requirements-eval.txt
cd "$ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the cores are taken by files
if [ ! -w . ]; then
    export HYPOTHESIS_STORAGE_DIRECTORY="${TMPDIR:-/tmp}/hypothesis-$UID"
    set -- -p no:cacheprovider "$@"
fi
exec "$PYTHON" -m pytest -n logical --dist loadfile --no-loadscope-reorder "$@"
