# Sourced by the other scripts: makes .venv in the checkout and installs the requirement files named as arguments.
# Sets ROOT (the checkout) and PYTHON (the environment's interpreter). Nothing is installed again while the files stay.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python"

find_python() {
    local candidate
    for candidate in python3 python3.11 python3.12 python3.13 python3.14 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer on the PATH; install one" >&2
    exit 2
}

make_environment() {
    local file stamp base
    if ! "$PYTHON" -c 'import pip' 2>/dev/null; then
        echo "Making $ROOT/.venv"
        base="$(find_python)"
        "$base" -m venv --clear "$ROOT/.venv"
    fi
    for file in "$@"; do
        stamp="$ROOT/.venv/installed-$(cksum < "$ROOT/$file" | tr ' ' -)"
        if [ ! -e "$stamp" ]; then
            echo "Installing $file"
            "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/$file"
            touch "$stamp"
        fi
    done
}
