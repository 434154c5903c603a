"""The flags of binarized_data.py. Imports no transformers: a mistyped flag is found at once."""

import argparse

from distil.data.text_flags import TEXT_PATHS, add_dataset_flags, add_record_flags
from distil.data.token_files import FORMATS
from distil.data.token_outputs import add_extra_flags
from distil.models.architectures import AUTO
from distil.models.casing import add_casing_flags
from utils import OneLineParser

DESCRIPTION = (
    "Tokenize text, a sequence per line, into {dump_file}.{tokenizer name}.pickle, a shuffled list."
)
FILE_PATH = "data/dump.txt"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=DESCRIPTION, allow_abbrev=False)
    add_text_flags(parser)
    add_tokenizer_flags(parser)
    add_output_flags(parser)
    return parser.parse_args(argv)


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the text that is read."""
    parser.add_argument("--file_path", help=f"{TEXT_PATHS} (default: {FILE_PATH})")
    add_dataset_flags(parser)
    add_record_flags(parser)
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help=(
            "tokenize part I of N of the text only, on one of N machines; scripts/join_tokens.py"
            " joins the parts"
        ),
    )


def add_tokenizer_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the tokenizer."""
    add = parser.add_argument
    add(
        "--tokenizer_type",
        default="bert",
        choices=["bert", "roberta", "gpt2", AUTO],
        help=(
            "auto: the folder's tokenizer.json, else the class that its configuration names; others"
            " give the ids of 2019, and refuse a tokenizer.json of other ids (default: %(default)s)"
        ),
    )
    add(
        "--tokenizer_name",
        default="bert-base-uncased",
        help="hub name or local folder (default: %(default)s)",
    )
    add_casing_flags(parser)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the files that are written, and of the work."""
    add = parser.add_argument
    add("--dump_file", default="data/dump", help="prefix of the output (default: %(default)s)")
    formats = "; ".join(f"{name}: {FORMATS[name].description}" for name in sorted(FORMATS))
    add(
        "--format",
        default="pickle",
        choices=sorted(FORMATS),
        help=f"{formats} (default: %(default)s)",
    )
    add("--seed", type=int, default=56, help="seed of the shuffle (default: %(default)s)")
    add(
        "--num_workers",
        type=int,
        default=None,
        help="processes that tokenize (default: one a core)",
    )
    add_extra_flags(parser)
