#!/usr/bin/env bash
# Run the tests: makes .venv, installs what they need, calls pytest with your flags.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
make_environment requirements.txt requirements-dev.txt requirements-eval.txt
cd "$ROOT"
exec "$PYTHON" -m pytest "$@"
