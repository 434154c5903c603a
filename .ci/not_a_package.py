"""A build backend (PEP 517) for `pip install .`: it says how to install Distil, and stops."""

from typing import NoReturn

SENTENCE = (
    "Distil is not a pip package but runs from its checkout: install its dependencies with"
    " `pip install -r requirements.txt`, then run `python train.py` there (see README.md)."
)


def refuse(*_) -> NoReturn:
    """End the build with the sentence."""
    raise SystemExit(SENTENCE)


get_requires_for_build_wheel = get_requires_for_build_editable = refuse
get_requires_for_build_sdist = build_wheel = build_editable = build_sdist = refuse
