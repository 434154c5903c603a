"""Measure rates, memory and times from text to batches; print them as a table, write them as JSON.

The same run measures for comparison: tokenizing one line at a time, the tokenizers library alone on
the same batches, and the pickled list of 2019. Memory is measured from outside, in separate
processes. Linux only (/proc). By default the text is the prose of the installed packages, and the
vocabulary is trained on it.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

    from benchmarks.data_options import parse
    from utils import read_flags_first

    read_flags_first(parse)

import argparse
import logging
import platform
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from benchmarks.data_figures import (
    Table,
    make_encoding,
    measure_binarizing,
    measure_counting,
    measure_exactness,
    measure_opening,
    measure_pickle,
    measure_rates,
)
from benchmarks.data_options import parse
from benchmarks.data_stages import MB, STAGES
from distil.data import builtin_corpus
from distil.data.decoding import texts_of
from distil.data.text_sources import find_sources, read_blocks
from distil.models.names import short_name
from distil.models.tokenizers import train_word_pieces
from distil.system.files import require_output, write_json
from distil.system.outputs import json_of
from utils import logger, run_program, setup_logging

VOCAB_SIZE = 30_000


def make_text(args: argparse.Namespace, folder: Path) -> Path:
    """Write the text once, a sequence a line."""
    path = folder / "text.txt"
    if args.text:
        blocks = (
            block
            for source in find_sources(args.text, "--text")
            for block in read_blocks(source, "text", "--text")
        )
        lines: Iterable[str] = (
            line.strip() for block in blocks for line in texts_of(block, "text", flag="--text")[0]
        )
    else:
        lines = (
            line
            for document in builtin_corpus.documents()
            for line in builtin_corpus.lines(document)
        )
    path.write_text("".join(line + "\n" for line in lines if line), encoding="utf-8")
    return path


def repeat(path: Path, size_mb: int) -> Path:
    """Write a text repeatedly until the file has size_mb MB."""
    content, size = path.read_bytes(), int(size_mb * MB)
    target = path.with_name(f"text-{size_mb}.txt")
    with open(target, "wb") as file:
        while file.tell() < size:
            file.write(content)
    return target


def make_tokenizer(args: argparse.Namespace, text: Path, folder: Path) -> str:
    """Return the tokenizer's name; without one, train a WordPiece vocabulary."""
    if args.tokenizer_name:
        return args.tokenizer_name
    import transformers

    target = folder / "trained-bert"
    vocabulary = train_word_pieces(text, VOCAB_SIZE)
    transformers.BertTokenizer(vocab=vocabulary, do_lower_case=True).save_pretrained(target)
    return str(target)


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Measure everything and return the JSON's content."""
    table = Table()
    text = make_text(args, folder)
    name = make_tokenizer(args, text, folder)
    texts = {str(size): repeat(text, size) for size in (args.small_mb, args.large_mb)}
    table.add(
        "text, once",
        os.path.getsize(text) / MB,
        "MB",
        f"{args.text or 'prose of the installed packages'}; {short_name(name)}",
    )
    measure_rates(args, table, text, texts[str(args.small_mb)], name)
    if args.languages:
        measure_exactness(args, table, name)
    measure_binarizing(args, table, texts, name, folder)
    vocab_size = make_encoding(args, name)[0].largest_id + 1
    for label in texts:
        measure_counting(table, label, folder / f"out-{label}.{short_name(name)}", vocab_size)
    measure_opening(args, table, folder)
    measure_pickle(args, table, folder)
    versions = {
        module: sys.modules[module].__version__
        for module in ("numpy", "tokenizers", "transformers")
    }
    machine = (
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores,"
        f" {psutil.virtual_memory().total / 1e9:.0f} GB"
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "python": platform.python_version(),
        **versions,
        "flags": {k: v for k, v in vars(args).items() if k not in ("stage", "arguments")},
        "rows": table.rows,
    }


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, or one stage of it if started with --stage."""
    args = parse(argv)
    if args.stage:
        STAGES[args.stage](*args.arguments)
        return
    setup_logging(logging.WARNING)
    own = json_of("date", "machine", "python")
    require_output(args.json, "--json", is_own=own, force=args.force)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.folder) as folder:
        found = measure(args, Path(folder))
    write_json(args.json, found)
    logger.setLevel(logging.INFO)
    logger.info("Wrote %s.", args.json)


if __name__ == "__main__":
    run_program(main)
