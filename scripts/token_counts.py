"""Count each token id in token files: a pickled list of vocab_size ints, for masking by rarity.

A file is read in constant memory, if it is a store; several files of one vocabulary are counted
together.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

import argparse
import logging

import numpy as np
from tqdm import tqdm

from distil.data.cards import check_tokenizer, check_vocab_size, write_token_counts
from distil.data.token_files import (
    CHUNK_IDS,
    TokenFile,
    check_ids_below,
    files_of,
    open_token_file,
    require_counts_output,
)
from distil.system.outputs import add_force_flag
from distil.system.signals import exit_on_sigterm
from utils import OneLineParser, bar_options, logger, run_program, setup_logging


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--data_file",
        nargs="+",
        default=["data/dump.bert-base-uncased.pickle"],
        help="token file, or several: pickles, or stores by their prefix (default: %(default)s)",
    )
    parser.add_argument(
        "--token_counts_dump",
        default="data/token_counts.bert-base-uncased.pickle",
        help="output (default: %(default)s)",
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=30522,
        help="entries of the vocabulary (default: %(default)s)",
    )
    add_force_flag(parser)
    return parser.parse_args(argv)


def count_ids(tokens: TokenFile, vocab_size: int, source: str, output: str) -> np.ndarray:
    """Count each id of a token file, (V,); raise InputError for invalid ids and damaged blocks."""
    counts_V = np.zeros(vocab_size, np.int64)
    with tqdm(
        total=len(tokens.ids_M), unit="id", unit_scale=True, desc="count", **bar_options()
    ) as bar:
        for start in range(0, len(tokens.ids_M), CHUNK_IDS):
            chunk = tokens.ids_M[start : start + CHUNK_IDS]
            tokens.check(np.array([start]), np.array([start + len(chunk)]))
            check_ids_below(chunk, vocab_size, source, output)
            counts_V += np.bincount(chunk, minlength=vocab_size)
            bar.update(len(chunk))
    return counts_V


def main(argv: list[str] | None = None) -> None:
    """Run the program: read, count, write."""
    args = parse(argv)
    setup_logging(logging.INFO)
    check_vocab_size(args.vocab_size)
    inputs = [name for file in args.data_file for name in files_of(file)]
    counts, flag = args.token_counts_dump, "--token_counts_dump"
    require_counts_output(counts, flag, inputs, force=args.force)
    output = f"--vocab_size {args.vocab_size} (for --token_counts_dump {args.token_counts_dump})"
    counts_V, tokenizer, num_sequences = np.zeros(args.vocab_size, np.int64), None, 0
    for path in args.data_file:
        tokens = open_token_file(path)
        check_tokenizer(tokens.card, tokenizer, f"--data_file {path}", args.data_file[0])
        tokenizer = tokenizer or tokens.card.get("tokenizer")
        counts_V += count_ids(tokens, args.vocab_size, f"--data_file {path}", output)
        num_sequences += len(tokens.lengths_N)
    card = {"tokenizer": tokenizer} if tokenizer else {}
    write_token_counts(
        args.token_counts_dump,
        counts_V,
        {**card, "sources": [{"path": path} for path in args.data_file]},
    )
    logger.info(
        "Wrote %s: %d ids of %d sequences, %d of %d vocabulary entries occur.",
        args.token_counts_dump,
        counts_V.sum(),
        num_sequences,
        np.count_nonzero(counts_V),
        args.vocab_size,
    )


if __name__ == "__main__":
    exit_on_sigterm()
    run_program(main)
