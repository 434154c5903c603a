"""Outputs of programs: the flag that replaces a file, and how a program knows files of its own."""

import argparse
import os
from collections.abc import Callable

from distil.system.files import is_regular

HEAD_BYTES = 2**16
SOFTWARE = "Distil"  # in the metadata of pictures


def add_force_flag(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add --force."""
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace an output file that another program or hand wrote",
    )


def json_of(first: str, *others: str) -> Callable[[str | os.PathLike], bool]:
    """Recognize what write_json wrote of an object with these keys, `first` before all others."""
    start = f'{{\n  "{first}": '.encode()
    keys = [f'\n  "{key}": '.encode() for key in others]

    def is_own(path: str | os.PathLike) -> bool:
        head = _head(path)
        return head.startswith(start) and all(key in head for key in keys)

    return is_own


def is_picture(path: str | os.PathLike) -> bool:
    """Recognize a picture that distil/reporting/plots.py drew."""
    head = _head(path)[:400]
    return head.startswith(b"\x89PNG") and f"Software\0{SOFTWARE}".encode() in head


def is_beside_card(path: str | os.PathLike) -> bool:
    """Recognize a token file, or counts, by the card (distil/data/cards.py) beside it."""
    stem, suffix = os.path.splitext(path)
    card = f"{stem}.json" if suffix in (".bin", ".idx") else f"{path}.json"
    return b'"format": "distil-tokens"' in _head(card)[:100]


def _head(path: str | os.PathLike) -> bytes:
    if not is_regular(path):
        return b""
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)
