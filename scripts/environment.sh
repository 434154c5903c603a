# Sourced by the other scripts. Sets ROOT (the checkout) and PYTHON (the interpreter to run with), which is
#   PYTHON   where it is set: an interpreter that has the requirements; nothing is made or installed
#   VENV     otherwise: that of this virtual environment (default: .venv in the checkout), which is made if need be, and
#            receives the requirement files that make_environment is called with. Nothing is installed again while they stay.
# With either, the checkout may be read-only.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

absolute() { # scripts change the folder
    case "$1" in
    /*) echo "$1" ;;
    *) echo "$PWD/$1" ;;
    esac
}

VENV="$(absolute "${VENV:-$ROOT/.venv}")"
GIVEN_PYTHON="${PYTHON:-}"
if [[ "$GIVEN_PYTHON" = */* ]]; then
    GIVEN_PYTHON="$(absolute "$GIVEN_PYTHON")"
fi
PYTHON="${GIVEN_PYTHON:-$VENV/bin/python}"

refuse() {
    echo "$(basename "$0"): error: $1" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in python3 python3.11 python3.12 python3.13 python3.14 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    refuse "no Python 3.11 or newer on the PATH; install one"
}

require_interpreter() { # PYTHON is the user's: it must be there and have the libraries
    local missing
    command -v "$PYTHON" > /dev/null ||
        refuse "PYTHON=$PYTHON: no such program; expected an interpreter with requirements.txt installed, or nothing"
    missing="$("$PYTHON" -c 'import importlib.util as u; print(*(n for n in ("torch", "transformers") if not u.find_spec(n)))')" ||
        refuse "PYTHON=$PYTHON: does not run Python; expected an interpreter with requirements.txt installed, or nothing"
    [ -z "$missing" ] || refuse "PYTHON=$PYTHON: has no $missing; install requirements.txt there, or name another interpreter"
}

require_writable() {
    [ -w "$VENV" ] || refuse "VENV=$VENV: no folder with write permission; name another, or an interpreter in PYTHON"
}

make_environment() {
    local file stamp base
    if [ -n "$GIVEN_PYTHON" ]; then
        require_interpreter
        return
    fi
    if ! "$PYTHON" -c 'import pip' 2>/dev/null; then
        if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
            refuse "VENV=$VENV: holds files and is no virtual environment; name an empty folder, or one that is not there"
        fi
        mkdir -p "$VENV" 2>/dev/null || true
        require_writable
        base="$(find_python)"
        echo "Making $VENV"
        "$base" -m venv --clear "$VENV"
    fi
    for file in "$@"; do
        stamp="$VENV/installed-$(cksum < "$ROOT/$file" | tr ' ' -)"
        if [ ! -e "$stamp" ]; then
            require_writable
            echo "Installing $file"
            "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/$file"
            touch "$stamp"
        fi
    done
}
