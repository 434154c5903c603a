"""What binarized_data.py and join_tokens.py write: shuffled tokens, counts, a picture.

Shared, so that joined shards and one machine's run give the same bytes.
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from distil.data.cards import check_vocab_size, require_card_output, write_token_counts
from distil.data.shuffle import Spool, shuffled
from distil.data.tally import ManyUnknown, Tally, draw_lengths
from distil.data.token_files import FORMATS, require_counts_output, writing_tokens
from distil.reporting.plots import short_path
from distil.system.files import require_output
from distil.system.outputs import add_force_flag, is_beside_card, is_picture
from utils import InputError, bar_options, logger


def add_extra_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the counts, the picture, and files that are replaced."""
    add = parser.add_argument
    add_force_flag(parser)
    add(
        "--token_counts_dump",
        default=None,
        help="also count the ids, as token_counts.py does, into this file",
    )
    add(
        "--vocab_size",
        type=int,
        default=None,
        help="entries of the counts (default: the tokenizer's vocabulary)",
    )
    add(
        "--report",
        nargs="?",
        const="",
        default=None,
        metavar="PNG",
        help="draw the sequences' lengths (default file: the output's name and .lengths.png)",
    )


def check_extra_flags(args: argparse.Namespace) -> None:
    """Raise InputError for a --vocab_size without counts, or out of range."""
    if args.vocab_size is not None and args.token_counts_dump is None:
        raise InputError(
            f"--vocab_size {args.vocab_size}: is for --token_counts_dump only; add that flag, or"
            " omit this one"
        )
    if args.vocab_size is not None:
        check_vocab_size(args.vocab_size)


def check_no_extras(args: argparse.Namespace) -> None:
    """Raise InputError for outputs that only the joined shards have."""
    for flag in ("token_counts_dump", "report"):
        if getattr(args, flag) is not None:
            raise InputError(
                f"--shard {args.shard}: --{flag} is of the whole text; pass it to"
                " scripts/join_tokens.py"
            )


def check_covers(vocab_size: int | None, largest_id: int) -> None:
    """Raise InputError for a --vocab_size that the tokenizer's ids exceed."""
    if vocab_size is not None and vocab_size <= largest_id:
        raise InputError(
            f"--vocab_size {vocab_size}: the tokenizer has ids up to {largest_id}; expected"
            " more than that"
        )


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Output paths: the token file (or prefix), its files, the counts and the picture or None."""

    path: str
    files: list[str]
    counts: str | None
    report: str | None


def plan_outputs(
    stem: str, file_format: str, args: argparse.Namespace, inputs: Sequence[str], flag: str
) -> Outputs:
    """Name the outputs and check them before any work; raise InputError.

    stem: the token file's path without the format's suffix, given by `flag`.
    """
    path = f"{stem}{FORMATS[file_format].suffix}"
    files = FORMATS[file_format].files(path)
    report = args.report if args.report != "" else f"{stem}.lengths.png"
    for file in files[:-1]:
        require_output(file, flag, inputs, is_own=is_beside_card, force=args.force)
    require_card_output(files[-1], flag, inputs, force=args.force)
    others = []
    if args.token_counts_dump is not None:
        counts = args.token_counts_dump
        require_counts_output(counts, "--token_counts_dump", inputs, force=args.force)
        others += [args.token_counts_dump, f"{args.token_counts_dump}.json"]
    if report is not None:
        require_output(report, "--report", inputs, is_own=is_picture, force=args.force)
        others.append(report)
    names = [os.path.realpath(file) for file in files + others]
    if len(set(names)) < len(names):
        raise InputError(
            f"--token_counts_dump, --report: two outputs have one name, next to {path}; name"
            " another file"
        )
    return Outputs(path, files, args.token_counts_dump, report)


def write_shuffled(
    spool: Spool, path: str, file_format: str, card: dict[str, Any], *, keeps_spool: bool = False
) -> None:
    """Write a spool's sequences, shuffled by the card's seed, as a token file with its card.

    keeps_spool: leave the spool on the disk, for a run that may be continued.
    """
    many_unknown = ManyUnknown(card["tokenizer"]["special_ids"]["unknown"])
    bar = tqdm(
        total=spool.num_ids, unit="id", unit_scale=True, desc="shuffle and write", **bar_options()
    )
    with bar, writing_tokens(path, file_format, spool.dtype) as (writer, written_card):
        for ids_M, lengths_N in shuffled(spool, card["seed"], "shuffle", keeps=keeps_spool):
            writer.append(ids_M, lengths_N)
            many_unknown.add(ids_M, lengths_N)
            bar.update(len(ids_M))
        written_card |= {**card, "many_unknown": many_unknown.numbers}


def write_extras(outputs: Outputs, vocab_size: int | None, tokenizer: dict, tally: Tally) -> None:
    """Write the token counts and the picture, if asked for.

    tokenizer: its part of the card.
    """
    if outputs.counts is not None:
        num_more = (vocab_size or len(tally.counts_V)) - len(tally.counts_V)
        card = {"tokenizer": tokenizer, "counts": tally.counts()}
        write_token_counts(outputs.counts, np.pad(tally.counts_V, (0, num_more)), card)
        logger.info("Wrote %s.", outputs.counts)
    if outputs.report is not None:
        facts = {"tokenizer": short_path(tokenizer["name"]), "file": short_path(outputs.path)}
        draw_lengths(tally.num_of_length, outputs.report, facts)
        logger.info("Drew %s.", outputs.report)
