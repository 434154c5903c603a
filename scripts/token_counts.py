"""Count how often each token id occurs in a token file: a pickled list of vocab_size ints, for masking by rarity."""

import argparse
import logging
import pickle
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lm_seqs_dataset import check_ids_below, read_token_file
from utils import InputError, OneLineParser, atomic_path, logger, require_output, run_program, setup_logging

MAX_VOCAB_SIZE = 2**27  # no vocabulary comes near; a larger number is a slip of the hand


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data_file", default="data/dump.bert-base-uncased.pickle", help="(default: %(default)s)")
    parser.add_argument(
        "--token_counts_dump", default="data/token_counts.bert-base-uncased.pickle", help="output (default: %(default)s)"
    )
    parser.add_argument("--vocab_size", type=int, default=30522, help="entries of the vocabulary (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the program: read, count, write."""
    args = parse(argv)
    setup_logging(logging.INFO)
    if not 1 <= args.vocab_size <= MAX_VOCAB_SIZE:
        raise InputError(f"--vocab_size {args.vocab_size}: expected 1 to {MAX_VOCAB_SIZE}")
    require_output(args.token_counts_dump, "--token_counts_dump", [args.data_file])
    ids_M, lengths_N = read_token_file(args.data_file)
    output = f"--vocab_size {args.vocab_size} (for --token_counts_dump {args.token_counts_dump})"
    check_ids_below(ids_M, args.vocab_size, f"--data_file {args.data_file}", output)
    counts_V = np.bincount(ids_M, minlength=args.vocab_size)
    with atomic_path(args.token_counts_dump) as temporary, open(temporary, "wb") as file:
        pickle.dump(counts_V.tolist(), file, protocol=pickle.HIGHEST_PROTOCOL)
    logger.info(
        "Wrote %s: %d ids of %d sequences, %d of %d vocabulary entries occur.",
        args.token_counts_dump, len(ids_M), len(lengths_N), np.count_nonzero(counts_V), args.vocab_size,
    )  # fmt: skip


if __name__ == "__main__":
    run_program(main)
