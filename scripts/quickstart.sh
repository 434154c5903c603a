#!/usr/bin/env bash
# From nothing to a distilled model: makes .venv (VENV, PYTHON: see environment.sh), installs requirements.txt, runs
# scripts/quickstart.py with your flags.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
make_environment requirements.txt
exec "$PYTHON" "$ROOT/scripts/quickstart.py" "$@"
