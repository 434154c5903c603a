"""Tokenize text, a sequence per line, into {dump_file}.{tokenizer name}.pickle, a shuffled list.

With --format store: {dump_file}.{tokenizer name}.bin and .idx, which training maps into memory.
Either has a card, .json. The corpus only has to fit on the disk: text is read as a stream,
tokenized on all cores, spooled, and shuffled from the disk, in constant memory. The same text,
tokenizer and seed give the same bytes.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distil.data.cards import check_vocab_size, require_card_output, write_token_counts
from distil.data.decoding import ERRORS
from distil.data.encoding import Encoding, WorkerPool, divide_work
from distil.data.shuffle import Spool, shuffled
from distil.data.tally import ManyUnknown, Tally, draw_lengths, log_summary
from distil.data.text_sources import Block, Source, find_sources, read_blocks
from distil.data.token_files import FORMATS, require_counts_output, writing_tokens
from distil.models.architectures import AUTO
from distil.models.casing import add_casing_flags, casing_of_flags
from distil.models.hub import short_name
from distil.models.tokenizers import (
    describe_tokenizer,
    load_tokenizer,
    load_tokenizer_of_2019,
    resolve_tokenizer,
)
from distil.system.files import naming, require_output
from distil.system.signals import exit_on_sigterm
from utils import InputError, OneLineParser, bar_options, logger, run_program, setup_logging


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add_text_flags(parser)
    add_tokenizer_flags(parser)
    add_output_flags(parser)
    return parser.parse_args(argv)


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the text that is read."""
    add = parser.add_argument
    add(
        "--file_path",
        default="data/dump.txt",
        help=(
            "UTF-8 text, one sequence a line: a file, a folder, or a quoted glob; .txt, .jsonl,"
            " both also as .gz; any file of the datasets library (.parquet, .csv, ..) (default:"
            " %(default)s)"
        ),
    )
    add(
        "--text_field",
        default="text",
        help="the text's field or column in .jsonl, .parquet, .. (default: %(default)s)",
    )
    add(
        "--errors",
        default="strict",
        choices=ERRORS,
        help=(
            "text that is not UTF-8: stop, skip the line, or replace the bytes; counted (default:"
            " %(default)s)"
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


# --------------------------------------------------------------------------------------------------
# Tokenizing and writing
# --------------------------------------------------------------------------------------------------


def spool_ids(
    sources: list[Source], encoding: Encoding, num_cores: int, folder: Path
) -> tuple[Spool, Tally]:
    """Tokenize all sources into a spool on the disk, in reading order, and count them."""
    tally = Tally(encoding)
    spool = Spool(folder / "spool", encoding.dtype)
    total = sum(source.num_bytes for source in sources)
    num_workers, block_bytes = divide_work(total, num_cores)
    with (
        naming(folder),
        contextlib.closing(spool),
        WorkerPool(encoding, num_workers) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", **bar_options()) as bar,
    ):
        for block in pool.map(all_blocks(sources, encoding.text_field, block_bytes)):
            spool.append(block.ids_M, block.lengths_N)
            tally.add(block)
            bar.update(block.num_bytes)
    return spool, tally


def all_blocks(sources: list[Source], text_field: str, block_bytes: int) -> Iterator[Block]:
    """Yield the blocks of all sources, one source after the other."""
    for source in sources:
        yield from read_blocks(source, text_field, block_bytes=block_bytes)


def write_shuffled(
    spool: Spool, path: str, file_format: str, seed: int, card: dict, unknown_id: int | None
) -> None:
    """Write a spool's sequences in shuffled order as a token file with its card."""
    many_unknown = ManyUnknown(unknown_id)
    bar = tqdm(
        total=spool.num_ids, unit="id", unit_scale=True, desc="shuffle and write", **bar_options()
    )
    with bar, writing_tokens(path, file_format, spool.dtype) as (writer, written_card):
        for ids_M, lengths_N in shuffled(spool, seed, "shuffle"):
            writer.append(ids_M, lengths_N)
            many_unknown.add(ids_M, lengths_N)
            bar.update(len(ids_M))
        written_card |= {**card, "many_unknown": many_unknown.numbers}


# --------------------------------------------------------------------------------------------------
# Checks and the program
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Output paths: the token file (or prefix), its files, the counts and the picture or None."""

    path: str
    files: list[str]
    counts: str | None
    report: str | None


def plan_outputs(args: argparse.Namespace, sources: list[Source]) -> Outputs:
    """Name the outputs and check them before any work; raise InputError."""
    if not os.path.basename(args.dump_file):
        raise InputError(
            f"--dump_file {args.dump_file}: ends with a slash; expected a prefix such as"
            f" {args.dump_file}dump"
        )
    # Differs from the original: a folder or owner/name gives its last component to the file name,
    # where 2019 put the whole path.
    stem = f"{args.dump_file}.{short_name(args.tokenizer_name)}"
    path = f"{stem}{FORMATS[args.format].suffix}"
    files = FORMATS[args.format].files(path)
    report = args.report if args.report != "" else f"{stem}.lengths.png"
    inputs = [source.path for source in sources]
    for file in files[:-1]:
        require_output(file, "--dump_file", inputs)
    require_card_output(files[-1], "--dump_file", inputs)
    others = []
    if args.token_counts_dump is not None:
        require_counts_output(args.token_counts_dump, "--token_counts_dump", inputs)
        others += [args.token_counts_dump, f"{args.token_counts_dump}.json"]
    if report is not None:
        require_output(report, "--report", inputs)
        others.append(report)
    names = [os.path.realpath(file) for file in files + others]
    if len(set(names)) < len(names):
        raise InputError(
            f"--token_counts_dump, --report: two outputs have one name, next to {path}; name"
            " another file"
        )
    return Outputs(path, files, args.token_counts_dump, report)


def check_numbers(args: argparse.Namespace) -> int:
    """Return the number of worker processes; raise InputError for numbers out of range."""
    if args.num_workers is not None and not 1 <= args.num_workers <= 1024:
        raise InputError(f"--num_workers {args.num_workers}: expected 1 to 1024")
    if args.vocab_size is not None and args.token_counts_dump is None:
        raise InputError(
            f"--vocab_size {args.vocab_size}: is for --token_counts_dump only; add that flag, or"
            " omit this one"
        )
    if args.vocab_size is not None:
        check_vocab_size(args.vocab_size)
    return args.num_workers or len(
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )


def make_encoding(args: argparse.Namespace) -> tuple[Encoding, dict]:
    """Load the tokenizer: (how lines become ids, the tokenizer's part of the card)."""
    name, flag = args.tokenizer_name, "--tokenizer_name"
    kind = resolve_tokenizer(args.tokenizer_type, name, flag)
    load = load_tokenizer if args.tokenizer_type == AUTO else load_tokenizer_of_2019
    tokenizer = load(kind, name, flag, casing_of_flags(args))
    description = describe_tokenizer(kind, name, tokenizer)
    special = description["special_ids"]
    largest_id = description["vocab_size"] - 1
    if args.vocab_size is not None and args.vocab_size <= largest_id:
        raise InputError(
            f"--vocab_size {args.vocab_size}: the tokenizer has ids up to {largest_id}; expected"
            " more than that"
        )
    ids = special["start"], special["end"], largest_id, special["unknown"]
    return Encoding(tokenizer.backend_tokenizer, *ids, args.text_field, args.errors), description


def make_card(
    args: argparse.Namespace, description: dict, sources: list[Source], tally: Tally
) -> dict:
    """Make the card, which depends on nothing but the inputs."""
    return {
        "tokenizer": description,
        "dtype": str(tally.encoding.dtype),
        "seed": args.seed,
        "errors": args.errors,
        "text_field": args.text_field,
        "sources": [{"path": s.path, "bytes": s.num_bytes} for s in sources],
        "counts": tally.counts(),
    }


def write_extras(
    args: argparse.Namespace, outputs: Outputs, description: dict, tally: Tally
) -> None:
    """Write the token counts and the picture, if asked for."""
    if outputs.counts is not None:
        num_more = (args.vocab_size or len(tally.counts_V)) - len(tally.counts_V)
        card = {"tokenizer": description, "counts": tally.counts()}
        write_token_counts(outputs.counts, np.pad(tally.counts_V, (0, num_more)), card)
        logger.info("Wrote %s.", outputs.counts)
    if outputs.report is not None:
        title = f"{tally.counts()['sequences']:,} sequences of {outputs.path}"
        draw_lengths(tally.num_of_length, outputs.report, title)
        logger.info("Drew %s.", outputs.report)


def main(argv: list[str] | None = None) -> None:
    """Run the program: tokenize, shuffle, write, log a summary."""
    args = parse(argv)
    setup_logging(logging.INFO)
    num_cores = check_numbers(args)
    sources = find_sources(args.file_path)
    outputs = plan_outputs(args, sources)
    encoding, description = make_encoding(args)
    started = time.perf_counter()
    folder = Path(outputs.path).parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{Path(outputs.path).name}.", suffix=".tmp", dir=folder
    ) as scratch:
        spool, tally = spool_ids(sources, encoding, num_cores, Path(scratch))
        if not spool.num_sequences:
            num_lines = tally.num_blank + tally.num_bad
            kind = "blank or unreadable" if tally.num_bad else "blank"
            raise InputError(
                f"--file_path {args.file_path}: has {num_lines} lines, all {kind}; expected one"
                " sequence a line"
            )
        tokenized_s = time.perf_counter() - started
        card = make_card(args, description, sources, tally)
        write_shuffled(spool, outputs.path, args.format, args.seed, card, encoding.unknown_id)
    write_extras(args, outputs, description, tally)
    log_summary(tally)
    seconds = time.perf_counter() - started
    logger.info(
        "Wrote %s in %.1f s: tokenized at %.1f MB/s on %d core(s), shuffled and written in %.1f s.",
        " ".join(outputs.files),
        seconds,
        tally.num_bytes / 1e6 / tokenized_s,
        num_cores,
        seconds - tokenized_s,
    )


if __name__ == "__main__":
    exit_on_sigterm()
    run_program(main)
