"""Tokenize text, a sequence per line, into {dump_file}.{tokenizer name}.pickle, a shuffled list.

With --format store: {dump_file}.{tokenizer name}.bin and .idx, which training maps into memory.
Either has a card, .json. The corpus only has to fit on the disk: text is read as a stream,
tokenized on all cores, spooled, and shuffled from the disk, in constant memory. The same text,
tokenizer and seed give the same bytes.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

    from distil.data.binarize_options import parse
    from utils import read_flags_first

    read_flags_first(parse)

import argparse
import dataclasses
import logging
import time
from pathlib import Path

from distil.data.binarize_options import FILE_PATH, parse
from distil.data.encoding import Encoding
from distil.data.partial import Partial, partial_folder
from distil.data.sharding import parse_shard, part_of
from distil.data.shuffle import Spool
from distil.data.spooling import spool_ids
from distil.data.tally import log_summary
from distil.data.text_flags import (
    dataset_of,
    find_text,
    flag_of,
)
from distil.data.text_sources import DATASET, Source
from distil.data.token_files import writing_tokens
from distil.data.token_outputs import (
    Outputs,
    check_covers,
    check_extra_flags,
    check_no_extras,
    plan_outputs,
    write_extras,
    write_shuffled,
)
from distil.models.architectures import AUTO
from distil.models.casing import casing_of_flags
from distil.models.names import short_name
from distil.models.tokenizers import (
    describe_tokenizer,
    load_tokenizer,
    load_tokenizer_of_2019,
    resolve_tokenizer,
)
from distil.system.signals import exit_on_sigterm
from utils import InputError, logger, run_program, setup_logging

# --------------------------------------------------------------------------------------------------
# Checks and the program
# --------------------------------------------------------------------------------------------------


def stem_of(args: argparse.Namespace) -> str:
    """Return the output's path without its format's suffix. Raises InputError."""
    if not os.path.basename(args.dump_file):
        raise InputError(
            f"--dump_file {args.dump_file}: ends with a slash; expected a prefix such as"
            f" {args.dump_file}dump"
        )
    # Differs from the original: a folder or owner/name gives its last component to the file name,
    # where 2019 put the whole path.
    return f"{args.dump_file}.{short_name(args.tokenizer_name)}"


def check_numbers(args: argparse.Namespace) -> int:
    """Return the number of worker processes; raise InputError for numbers out of range."""
    if args.num_workers is not None and not 1 <= args.num_workers <= 1024:
        raise InputError(f"--num_workers {args.num_workers}: expected 1 to 1024")
    check_extra_flags(args)
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
    check_covers(args.vocab_size, largest_id)
    ids = special["start"], special["end"], largest_id, special["unknown"]
    how = args.text_field, args.errors, flag_of(dataset_of(args))
    return Encoding(tokenizer.backend_tokenizer, *ids, *how), description


def make_card(
    args: argparse.Namespace, encoding: Encoding, description: dict, sources: list[Source]
) -> dict:
    """Make the card without its counts; it depends on nothing but the inputs."""
    dataset = dataset_of(args)
    if dataset is None:
        read = [{"path": s.path, "bytes": None if s.is_pipe else s.num_bytes} for s in sources]
    else:
        read = [{"dataset": dataset.name, "config": dataset.config, "split": dataset.split}]
    return {
        "tokenizer": description,
        "dtype": str(encoding.dtype),
        "seed": args.seed,
        "errors": args.errors,
        "text_field": args.text_field,
        "sources": read,
    }


def identity_of(card: dict, args: argparse.Namespace, sources: list[Source]) -> dict | None:
    """Say what a run that may continue an interrupted one has in common with it; None if none may.

    Files are read fast: they are read again.
    """
    if not sources or any(source.kind != DATASET for source in sources):
        return None
    facts = {"shard": args.shard, "streaming": args.streaming, "content": sources[0].tag}
    return {**card, "seed": None, "facts": facts}


def shard_facts(args: argparse.Namespace, sources: list[Source]) -> dict | None:
    """Describe a shard for its card: what all shards must have in common, and its number."""
    if args.shard is None:
        return None
    # Copies of a folder have other times on other machines; on the hub the content is a commit.
    is_on_hub = args.dataset_name is not None and not os.path.exists(args.dataset_name)
    content = sources[0].tag if is_on_hub else None
    facts = {"format": args.format, "streaming": args.streaming, "content": content}
    return dataclasses.asdict(parse_shard(args.shard)) | facts


def write_tokens(
    outputs: Outputs,
    file_format: str,
    card: dict,
    shard: dict | None,
    partial: Partial,
    spool: Spool,
) -> None:
    """Write the token file, or a shard in reading order, with its card."""
    if shard is None:
        keeps = partial.can_continue
        write_shuffled(spool, outputs.path, file_format, card, keeps_spool=keeps)
        return
    with writing_tokens(outputs.path, "store", spool.dtype) as (writer, written_card):
        for ids_M, lengths_N in spool.chunks():
            writer.append(ids_M, lengths_N)
        written_card |= {**card, "shard": shard}


def binarize(
    args: argparse.Namespace, sources: list[Source], outputs: Outputs, num_cores: int
) -> None:
    """Tokenize the sources, shuffle and write; log the speeds. Raises InputError."""
    started = time.perf_counter()
    encoding, description = make_encoding(args)
    card = make_card(args, encoding, description, sources)
    part = sources if args.shard is None else part_of(sources, parse_shard(args.shard))
    folder = Path(outputs.path).parent
    folder.mkdir(parents=True, exist_ok=True)
    with partial_folder(Path(outputs.path), identity_of(card, args, sources)) as partial:
        spool, tally = spool_ids(part, encoding, num_cores, partial)
        if not spool.num_sequences and args.shard is None:
            num_lines = tally.num_blank + tally.num_bad
            kind = "blank or unreadable" if tally.num_bad else "blank"
            raise InputError(
                f"{encoding.flag} {args.dataset_name or args.file_path}: has {num_lines} lines, all"
                f" {kind}; expected one sequence a line"
            )
        num_bytes = tally.num_bytes - partial.state.get("num_bytes", 0)  # without an earlier run's
        tokenized_s = time.perf_counter() - started
        card["counts"] = tally.counts()
        write_tokens(outputs, args.format, card, shard_facts(args, sources), partial, spool)
    write_extras(outputs, args.vocab_size, description, tally)
    if not spool.num_sequences:
        logger.warning("--shard %s: no text is in this part; it joins as the others.", args.shard)
    log_summary(tally)
    seconds = time.perf_counter() - started
    logger.info(
        "Wrote %s in %.1f s: tokenized at %.1f MB/s on %d core(s), shuffled and written in %.1f s.",
        " ".join(outputs.files),
        seconds,
        num_bytes / 1e6 / tokenized_s,
        num_cores,
        seconds - tokenized_s,
    )


def main(argv: list[str] | None = None) -> None:
    """Run the program: tokenize, shuffle, write, log a summary."""
    args = parse(argv)
    setup_logging(logging.INFO)
    num_cores = check_numbers(args)
    dataset = dataset_of(args)
    if dataset is None and args.file_path is None:
        args.file_path = FILE_PATH
    stem, file_format = stem_of(args), args.format
    if args.shard is not None:
        stem, file_format = parse_shard(args.shard).path(stem), "store"
        check_no_extras(args)
    sources = find_text([args.file_path], dataset, args)
    inputs = [args.dataset_name or "", *(source.path for source in sources)]
    outputs = plan_outputs(stem, file_format, args, inputs, "--dump_file")
    binarize(args, sources, outputs, num_cores)


if __name__ == "__main__":
    exit_on_sigterm()
    run_program(main)
