"""The flags of benchmark_data.py. Imports no transformers: a mistyped flag is found at once."""

import argparse

from distil.system.outputs import add_force_flag
from utils import InputError, OneLineParser

DESCRIPTION = (
    "Measure rates, memory and times from text to batches; print them as a table, write them as"
    " JSON."
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--text", help="text to tokenize, a file or folder (default: the installed packages' prose)"
    )
    add(
        "--tokenizer_type",
        default="bert",
        choices=["bert", "roberta", "gpt2"],
        help="(default: %(default)s)",
    )
    add(
        "--tokenizer_name",
        help="hub name or folder (default: a WordPiece vocabulary is trained on the text)",
    )
    add(
        "--languages",
        help=("folder of texts on which the ids of cached chunks are compared with the library's"),
    )
    add(
        "--small_mb",
        type=int,
        default=60,
        help="text for rates and for the smaller memory figure, MB (default: %(default)s)",
    )
    add(
        "--large_mb",
        type=int,
        default=1000,
        help="text for the larger memory figure, MB (default: %(default)s)",
    )
    add(
        "--num_sequences",
        type=int,
        default=10**7,
        help="of the synthetic store (default: %(default)s)",
    )
    add("--folder", help="folder of the working files, several GB (default: a temporary folder)")
    add("--json", default="benchmark_data.json", help="output (default: %(default)s)")
    add_force_flag(parser)
    add("--stage", help=argparse.SUPPRESS)
    add("--arguments", nargs="*", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in ("small_mb", "large_mb", "num_sequences"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: expected at least 1")
    return args
