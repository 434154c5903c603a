"""Turn text into token ids: one sequence a line -> {dump_file}.{tokenizer name}.pickle, a shuffled list of id arrays."""

import argparse
import itertools
import logging
import os
import pickle
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from architectures import load_tokenizer, short_name, special_ids
from utils import (
    InputError,
    OneLineParser,
    atomic_path,
    bar_options,
    logger,
    require_file,
    require_output,
    run_program,
    setup_logging,
)

LINES_PER_BATCH = 2000


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--file_path", default="data/dump.txt", help="UTF-8 text, one sequence a line (default: %(default)s)")
    parser.add_argument("--tokenizer_type", default="bert", choices=["bert", "roberta", "gpt2"], help="(default: %(default)s)")
    parser.add_argument("--tokenizer_name", default="bert-base-uncased", help="hub name or local folder (default: %(default)s)")
    parser.add_argument("--dump_file", default="data/dump", help="prefix of the output (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=56, help="seed of the shuffle (default: %(default)s)")
    parser.add_argument(
        "--do_lower_case",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="bert only; default: what the tokenizer's configuration says, without one whether the vocabulary has no capitals",
    )
    return parser.parse_args(argv)


def read_lines(path: str) -> Iterator[tuple[str, int]]:
    """Yield (stripped line, its size in bytes). Raises InputError naming file and line where the text is not UTF-8."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                # Differs from the original: a byte-order mark in front of the file is no text.
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"--file_path {path}:{number}: byte {error.start + 1} of the line is not UTF-8 "
                    f"(0x{raw[error.start]:02x}); convert the file to UTF-8"
                ) from error
            yield text.strip(), len(raw)


def binarize(path: str, tokenizer, start_id: int, end_id: int) -> tuple[list[np.ndarray], int]:
    """Tokenize a file's lines: (one array a non-blank line, number of blank lines).

    ids = start id, the line's ids without special tokens of the tokenizer's own, end id.
    """
    dtype, largest_id = id_dtype(tokenizer)
    sequences: list[np.ndarray] = []
    num_blank = 0
    lines = read_lines(path)
    with tqdm(total=os.path.getsize(path), unit="B", unit_scale=True, desc="binarize", **bar_options()) as bar:
        while batch := list(itertools.islice(lines, LINES_PER_BATCH)):
            texts = [text for text, _ in batch if text]
            # Differs from the original: blank lines are no sequences of two boundary tokens.
            num_blank += len(batch) - len(texts)
            # The batch call runs on all cores; verbose=False: long lines are cut when the dataset is made.
            encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
            for ids in encoded:
                if max(ids, default=0) > largest_id:
                    raise InputError(f"--tokenizer_name: it gave id {max(ids)}, but its vocabulary ends at {largest_id}")
                sequences.append(np.array([start_id, *ids, end_id], dtype=dtype))
            bar.update(sum(size for _, size in batch))
    return sequences, num_blank


def id_dtype(tokenizer) -> tuple[type, int]:
    """Choose the ids' dtype: uint16 while the vocabulary, added tokens included, has fewer than 65536 entries."""
    # Differs from the original: added tokens count, and ids are checked; 2019 wrapped at 16 bits in silence.
    largest_id = max(tokenizer.get_vocab().values())
    return (np.uint16 if largest_id + 1 < 2**16 else np.int32), largest_id


def main(argv: list[str] | None = None) -> None:
    """Run the program: tokenize, shuffle, write."""
    args = parse(argv)
    setup_logging(logging.INFO)
    require_file(args.file_path, "--file_path")
    if not os.path.basename(args.dump_file):
        raise InputError(f"--dump_file {args.dump_file}: ends with a slash; expected a prefix such as {args.dump_file}dump")
    # Differs from the original: a folder or owner/name gives its last component to the file's name, not its whole path.
    path = f"{args.dump_file}.{short_name(args.tokenizer_name)}.pickle"
    require_output(path, "--dump_file", [args.file_path])
    tokenizer = load_tokenizer(args.tokenizer_type, args.tokenizer_name, "--tokenizer_name", args.do_lower_case)
    special = special_ids(args.tokenizer_type, tokenizer)
    started = time.perf_counter()
    sequences, num_blank = binarize(args.file_path, tokenizer, special["start"], special["end"])
    if not sequences:
        raise InputError(f"--file_path {args.file_path}: has {num_blank} lines, all blank; expected one sequence a line")
    random.Random(args.seed).shuffle(sequences)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        pickle.dump(sequences, file, protocol=pickle.HIGHEST_PROTOCOL)
    num_ids = sum(map(len, sequences))
    logger.info("Skipped %d blank lines.", num_blank)
    logger.info("Wrote %s: %d sequences, %d ids (%s) in %.1f s.", path, len(sequences), num_ids, sequences[0].dtype,
                time.perf_counter() - started)  # fmt: skip


if __name__ == "__main__":
    run_program(main)
