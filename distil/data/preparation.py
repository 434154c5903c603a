"""Sources of documents to lines of whole sentences in a file, for prepare_text.py.

A data set's lines are kept where the run is interrupted, and the next run continues after them.
"""

import argparse
import dataclasses
import io
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from distil.data.decoding import texts_of
from distil.data.documents import Corpus, document_lines, document_parts, guess_form
from distil.data.partial import Place, partial_folder, place_behind
from distil.data.text_flags import dataset_of, flag_of
from distil.data.text_sources import Block, read_blocks
from distil.system.files import atomic_path
from utils import logger

COUNTED = [field.name for field in dataclasses.fields(Corpus) if field.type is int]


def prepare(
    corpus: Corpus,
    args: argparse.Namespace,
    file: TextIO,
    bar: tqdm,
    start: Place | None = None,
    after_block: Callable[[Place], None] = lambda _: None,
) -> None:
    """Write a corpus's lines from `start` on, and count them in the corpus.

    after_block: called when the lines of a block were written, with the place behind it.
    """
    start = start or Place()
    for number, source in enumerate(corpus.sources):
        if number < start.source:
            continue
        if number == start.source and start.rows:
            source = dataclasses.replace(source, start=start.rows)
        flag = flag_of(dataset_of(args))
        blocks = read_blocks(source, args.text_field, flag)
        first = next(blocks, None)
        if first is None:
            continue
        blocks = itertools.chain([first], blocks)
        texts = _texts(number, blocks, args, corpus, bar, after_block)
        first_texts = next(texts, [])
        form = args.documents if first.kind == "lines" else "line"
        if form == "auto":
            form = guess_form(first_texts)
            corpus.forms[form] += 1
        parts = document_parts(
            itertools.chain(first_texts, itertools.chain.from_iterable(texts)), form, corpus
        )
        for line in document_lines(parts, args.max_chars, args.min_chars, corpus):
            file.write(line + "\n")
            corpus.lines += 1
            corpus.characters += len(line)


def _texts(
    number: int,
    blocks: Iterator[Block],
    args: argparse.Namespace,
    corpus: Corpus,
    bar: tqdm,
    after_block: Callable[[Place], None],
) -> Iterator[list[str]]:
    flag = flag_of(dataset_of(args))
    for block in blocks:
        texts, num_bad = texts_of(block, args.text_field, args.errors, flag)
        corpus.bad += num_bad
        yield texts
        bar.update(block.num_bytes)
        # Back here, all lines of the block's records are written.
        after_block(place_behind(number, block, is_record=block.kind == "texts"))


def write_dataset(corpus: Corpus, args: argparse.Namespace, identity: dict, bar: tqdm) -> None:
    """Write a data set's lines to --output; continue an interrupted run of the same identity."""
    with partial_folder(Path(args.output), identity) as partial:
        path, state = partial.folder / "lines", partial.state
        if state and path.is_file() and path.stat().st_size >= state["bytes"]:
            place, size = Place(state["source"], state["rows"]), state["bytes"]
            for name in COUNTED:
                setattr(corpus, name, state[name])
            logger.info(
                "Continuing an interrupted run: %d lines are there; shard %d, row %d is next.",
                *(corpus.lines, place.source + 1, place.rows + 1),
            )
        else:
            place, size = Place(), 0
        reached = place
        with open(path, "ab") as raw, io.TextIOWrapper(raw, "utf-8", newline="\n") as file:
            raw.truncate(size)

            def save(behind: Place) -> None:
                nonlocal reached
                if partial.is_due or behind.source > reached.source:
                    file.flush()
                    os.fsync(raw.fileno())
                    counts = {name: getattr(corpus, name) for name in COUNTED}
                    size = os.fstat(raw.fileno()).st_size
                    partial.save({**dataclasses.asdict(behind), "bytes": size, **counts})
                reached = behind

            prepare(corpus, args, file, bar, place, save)
        if corpus.lines:
            with atomic_path(args.output) as temporary:
                os.replace(path, temporary)
