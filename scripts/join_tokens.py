"""Join the shards that binarized_data.py --shard I/N made on N machines into one token file.

The result has the bytes of one machine's run: order, card, counts. The shards are verified, and
stay; they may be deleted afterwards.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

import argparse
import contextlib
import glob
import logging
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from distil.data import store
from distil.data.cards import read_card
from distil.data.encoding import EncodedBlock, Encoding
from distil.data.sharding import Shard
from distil.data.shuffle import CHUNK_SEQUENCES, Spool, cuts
from distil.data.tally import Tally, log_summary
from distil.data.token_outputs import (
    add_extra_flags,
    check_covers,
    check_extra_flags,
    plan_outputs,
    write_extras,
    write_shuffled,
)
from distil.system.files import naming, require_file
from distil.system.json_files import Above, type_problem
from distil.system.signals import exit_on_sigterm
from utils import InputError, OneLineParser, logger, run_program, setup_logging

# What the cards of all shards have in common, and the joined card too.
SHARED = ("tokenizer", "dtype", "seed", "errors", "text_field", "sources")
SHARD_CARD = {
    "shard": {"format": str},
    "tokenizer": {"vocab_size": Above(0), "special_ids": {"end": int}},
    "counts": dict.fromkeys(("sequences", "words", "blank_lines", "bad_lines"), int),
    **{"dtype": str, "seed": int, "errors": str},
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--shards",
        required=True,
        metavar="PREFIX",
        help=(
            "what is before .shard-1-of-N: {dump_file}.{tokenizer name}; the joined file gets the"
            " name that one machine would have given"
        ),
    )
    add_extra_flags(parser)
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------
# The shards
# --------------------------------------------------------------------------------------------------


def find_shards(stem: str) -> list[str]:
    """List the prefixes of all shards of a text, in order. Raises InputError if one is missing."""
    found = {}
    for path in glob.glob(f"{glob.escape(stem)}.shard-*-of-*.json"):
        match = re.fullmatch(r"\.shard-(\d+)-of-(\d+)\.json", path[len(stem) :])
        if match:
            found.setdefault(int(match[2]), set()).add(int(match[1]))
    if len(found) != 1:
        what = f"shards of {' and of '.join(map(str, sorted(found)))} machines" if found else "none"
        raise InputError(
            f"--shards {stem}: expected files {stem}.shard-I-of-N.json of one N, found {what};"
            " check the prefix, or move the others away"
        )
    ((of, numbers),) = found.items()
    missing = [number for number in range(1, of + 1) if number not in numbers]
    if missing:
        raise InputError(
            f"--shards {stem}: {len(missing)} of {of} shards are missing, such as"
            f" {missing[0]}/{of}; make it with binarized_data.py --shard {missing[0]}/{of}"
        )
    return [Shard(number, of).path(stem) for number in range(1, of + 1)]


def read_cards(prefixes: list[str]) -> list[dict[str, Any]]:
    """Read the shards' cards. Raises InputError where they are of different texts or flags."""
    cards = [read_card(f"{prefix}.json", "--shards") for prefix in prefixes]
    for number, (prefix, card) in enumerate(zip(prefixes, cards, strict=True), start=1):
        shard = card.get("shard") or {}
        if (shard.get("number"), shard.get("of")) != (number, len(cards)):
            raise InputError(
                f"--shards {prefix}.json: is not the card of shard {number}/{len(cards)}; make the"
                " shard again"
            )
        if problem := type_problem(card, SHARD_CARD):
            raise InputError(f"--shards {prefix}.json: {problem}; make the shard again")
        facts, first = _shared(card), _shared(cards[0])
        different = [name for name in facts | first if facts.get(name) != first.get(name)]
        if different:
            values = [f"{one.get(different[0])!r:.80}" for one in (facts, first)]
            raise InputError(
                f"--shards {prefix}.json: its {different[0]} is {values[0]}, that of shard 1"
                f" {values[1]}; make one of them again"
            )
    return cards


def _shared(card: dict[str, Any]) -> dict[str, Any]:
    shard = {name: value for name, value in card["shard"].items() if name != "number"}
    return {name: card.get(name) for name in SHARED} | shard


def join(prefixes: list[str], cards: list[dict[str, Any]], folder: Path) -> tuple[Spool, Tally]:
    """Copy the shards into one spool, in order, and count them; every block is verified."""
    tokenizer = cards[0]["tokenizer"]
    special, largest_id = tokenizer["special_ids"], tokenizer["vocab_size"] - 1
    ids = special["start"], special["end"], largest_id, special["unknown"]
    tally = Tally(Encoding(None, *ids, errors=cards[0]["errors"]))
    spool = Spool(folder / "spool", np.dtype(cards[0]["dtype"]))
    with naming(folder), contextlib.closing(spool):
        for prefix, card in zip(prefixes, cards, strict=True):
            counts = card["counts"]
            if counts["sequences"]:
                _copy(prefix, spool, tally)
            tally.num_words += counts["words"]
            tally.num_blank += counts["blank_lines"]
            tally.num_bad += counts["bad_lines"]
    return spool, tally


def _copy(prefix: str, spool: Spool, tally: Tally) -> None:
    for file in store.files(prefix):
        require_file(file, "--shards")
    ids_M, lengths_N, _, blocks = store.read(prefix, "--shards")
    place = 0
    for start in range(0, len(lengths_N), CHUNK_SEQUENCES):
        chunk_N = lengths_N[start : start + CHUNK_SEQUENCES]
        for first, last in cuts(chunk_N):
            part_N = chunk_N[first:last]
            end = place + int(part_N.sum(dtype=np.int64))
            blocks.check(*(np.array([n * ids_M.itemsize]) for n in (place, end)))
            spool.append(ids_M[place:end], part_N)
            tally.add(EncodedBlock(ids_M[place:end], part_N, 0, 0, 0, 0))
            place = end


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Run the program: verify the shards, shuffle, write, log a summary."""
    args = parse(argv)
    setup_logging(logging.INFO)
    check_extra_flags(args)
    started = time.perf_counter()
    prefixes = find_shards(args.shards)
    cards = read_cards(prefixes)
    file_format = cards[0]["shard"]["format"]
    inputs = [file for prefix in prefixes for file in store.files(prefix)]
    outputs = plan_outputs(args.shards, file_format, args, inputs, "--shards")
    card = {name: cards[0][name] for name in SHARED}
    check_covers(args.vocab_size, card["tokenizer"]["vocab_size"] - 1)
    output = Path(outputs.path)
    with tempfile.TemporaryDirectory(
        prefix=f".{output.name}.", suffix=".tmp", dir=output.parent
    ) as scratch:
        spool, tally = join(prefixes, cards, Path(scratch))
        if not spool.num_sequences:
            raise InputError(
                f"--shards {args.shards}: all {len(cards)} shards are empty; expected text"
            )
        card["counts"] = tally.counts()
        write_shuffled(spool, outputs.path, file_format, card)
    write_extras(outputs, args.vocab_size, card["tokenizer"], tally)
    log_summary(tally)
    logger.info(
        "Joined %d shards into %s in %.1f s; they may be deleted.",
        len(cards),
        " ".join(outputs.files),
        time.perf_counter() - started,
    )


if __name__ == "__main__":
    exit_on_sigterm()
    run_program(main)
