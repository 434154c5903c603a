"""The flags of quickstart.py. Imports no torch: a mistyped flag is found at once."""

import argparse

from utils import OneLineParser

DESCRIPTION = (
    "Text -> ids -> counts -> teacher -> first weights -> distillation -> table, in one command."
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "--text",
        help=(
            "your own text: whatever binarized_data.py reads, one sequence a line or record"
            " (default: the installed packages' prose)"
        ),
    )
    parser.add_argument(
        "--text_field",
        default="text",
        help="the text's field or column in .jsonl, .parquet, .. (default: %(default)s)",
    )
    parser.add_argument(
        "--teacher",
        help=(
            "your own masked or causal language model, hub name or folder (default: a BERT is"
            " trained)"
        ),
    )
    parser.add_argument(
        "--output",
        default="quickstart",
        help="folder for everything that is made (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=56, help="seed of everything (default: %(default)s)"
    )
    parser.add_argument(
        "--max_length", type=int, default=64, help="longest sequence, in ids (default: %(default)s)"
    )
    parser.add_argument(
        "--student_steps", type=int, help="updates of the student (default: 300, with --short 60)"
    )
    parser.add_argument(
        "--short", action="store_true", help="a version of two minutes, to see that it works"
    )
    return parser.parse_args(argv)
