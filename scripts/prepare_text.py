"""Turn documents into sequences: lines of several whole sentences, for binarized_data.py.

A line holds sentences of one document only. Several languages (--by_language) can be sampled so
that the small ones come more often: with probability p_l = n_l^s / sum_k n_k^s for n_l lines of
language l (Conneau and Lample 2019, section 3.1; multilingual BERT: s = 0.7). The output holds one
language after the other: binarized_data.py shuffles.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

import argparse
import dataclasses
import logging
import random
import tempfile
import time
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from distil.data.documents import DOCUMENTS, Corpus
from distil.data.languages import find_languages, sample, targets
from distil.data.preparation import prepare, write_dataset
from distil.data.sentences import DENSE_CHARS
from distil.data.text_flags import (
    TEXT_PATHS,
    add_dataset_flags,
    add_record_flags,
    check_split,
    dataset_of,
    find_text,
)
from distil.data.text_sources import DATASET, Source
from distil.system.files import atomic_path, require_output
from distil.system.outputs import add_force_flag
from distil.system.signals import exit_on_sigterm
from utils import (
    InputError,
    OneLineParser,
    bar_options,
    keyed_seed,
    logger,
    raise_problems,
    run_program,
    setup_logging,
)

SMALLEST_MAX_CHARS = 20


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    add_file_flags(parser)
    add_line_flags(parser)
    add_sampling_flags(parser)
    return parser.parse_args(argv)


def add_file_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the files that are read and written."""
    add = parser.add_argument
    add("--file_path", nargs="+", metavar="PATH", help=TEXT_PATHS)
    add(
        "--output",
        default="data/dump.txt",
        help="one sequence a line, UTF-8 (default: %(default)s)",
    )
    add_force_flag(parser)
    add_dataset_flags(parser)
    add_record_flags(parser)


def add_line_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what a document and a line are."""
    add = parser.add_argument
    add(
        "--documents",
        choices=DOCUMENTS,
        default="auto",
        help=(
            "a document of a text file: a line; the lines between blank lines (joined by spaces);"
            " the whole file; auto: blank_lines if a blank line is between others in the first MiB,"
            " else line. A record is always one. Headings such as '== Title ==' end a document and"
            " are left out (default: %(default)s)"
        ),
    )
    add(
        "--max_chars",
        type=int,
        default=1000,
        help=(
            "longest line; a Chinese, Japanese, Korean, Thai, Lao, Khmer or Burmese character"
            f" counts as {DENSE_CHARS}. With multilingual BERT's vocabulary 1000 are 220 (English)"
            " to 430 (Bengali) tokens (default: %(default)s)"
        ),
    )
    add(
        "--min_chars",
        type=int,
        default=20,
        help="a shorter remainder at a document's end is dropped (default: %(default)s)",
    )


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how many lines of each language are written."""
    add = parser.add_argument
    add(
        "--by_language",
        action="store_true",
        help=(
            "each PATH, or each entry of the one folder given, is a language, named up to the"
            " first dot"
        ),
    )
    add(
        "--sampling_exponent",
        type=float,
        default=1.0,
        help=(
            "s of n^s, with --by_language: 1 natural sizes, 0.7 multilingual BERT, 0 equal shares;"
            " other than 1 it takes twice the text's size on --output's disk (default: %(default)s)"
        ),
    )
    add(
        "--num_lines",
        type=int,
        help=(
            "lines to write, small languages repeated, large ones thinned (default: as many as"
            " there are)"
        ),
    )
    add("--seed", type=int, default=56, help="seed of the sampling (default: %(default)s)")


def check(args: argparse.Namespace) -> None:
    """Raise InputError for numbers out of range."""
    problems = []
    if dataset_of(args) is None and not args.file_path:
        problems.append("--file_path or --dataset_name: expected one of them")
    if args.dataset_name is not None and args.by_language:
        problems.append("--by_language: is for --file_path, whose entries are languages")
    if args.max_chars < SMALLEST_MAX_CHARS:
        problems.append(
            f"--max_chars {args.max_chars}: expected at least {SMALLEST_MAX_CHARS}, such as 1000"
        )
    elif not 0 <= args.min_chars <= args.max_chars:
        problems.append(
            f"--min_chars {args.min_chars}: expected 0 to --max_chars, which is {args.max_chars}"
        )
    if not 0 <= args.sampling_exponent <= 1:
        problems.append(
            f"--sampling_exponent {args.sampling_exponent}: expected 0 (equal shares) to 1 (natural"
            " sizes)"
        )
    elif args.sampling_exponent != 1 and not args.by_language:
        problems.append(
            f"--sampling_exponent {args.sampling_exponent}: samples languages; add --by_language"
        )
    if args.num_lines is not None and args.num_lines < 1:
        problems.append(f"--num_lines {args.num_lines}: expected at least 1")
    raise_problems(problems)


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def write_all(
    corpora: list[Corpus], args: argparse.Namespace, output: TextIO, bar: tqdm
) -> list[int]:
    """Write every line once; return the lines of each language."""
    for corpus in corpora:
        prepare(corpus, args, output, bar)
        _require_lines(corpus, args)
    return [corpus.lines for corpus in corpora]


def write_sample(
    corpora: list[Corpus], args: argparse.Namespace, output: TextIO, bar: tqdm
) -> list[int]:
    """Write each language's lines to a temporary file, then sample them; return lines written."""
    with tempfile.TemporaryDirectory(
        prefix=".", suffix=".tmp", dir=Path(args.output).parent
    ) as folder:
        files = [Path(folder) / str(number) for number in range(len(corpora))]
        for corpus, path in zip(corpora, files, strict=True):
            with open(path, "w", encoding="utf-8", newline="\n") as file:
                prepare(corpus, args, file, bar)
            _require_lines(corpus, args)
        num_lines = [corpus.lines for corpus in corpora]
        counts = targets(num_lines, args.sampling_exponent, args.num_lines or sum(num_lines))
        logger.info("Sampling %d of %d lines.", sum(counts), sum(num_lines))
        for corpus, path, count in zip(corpora, files, counts, strict=True):
            rng = random.Random(keyed_seed(args.seed, corpus.name))
            sample(path, corpus.lines, count, rng, output)
            path.unlink()
    return counts


def _require_lines(corpus: Corpus, args: argparse.Namespace) -> None:
    if not corpus.lines:
        where = (
            f"--file_path: language {corpus.name!r}"
            if args.by_language
            else f"--file_path {' '.join(args.file_path)}"
            if args.file_path
            else f"--dataset_name {args.dataset_name}"
        )
        short = (
            f"{corpus.dropped} shorter than --min_chars {args.min_chars}"
            if corpus.dropped
            else "the text is blank"
        )
        raise InputError(
            f"{where}: no line is left of {corpus.documents} documents ({short}); expected text"
        )


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------


def report(
    corpora: list[Corpus], counts: list[int], args: argparse.Namespace, elapsed_s: float
) -> None:
    """Log what was read, dropped and written."""
    total = Corpus("total", [])
    for corpus in corpora:
        for name in [field.name for field in dataclasses.fields(Corpus)][2:]:
            setattr(total, name, getattr(total, name) + getattr(corpus, name))
    if args.by_language:
        print(table(corpora, counts))
    if total.forms:
        forms = ", ".join(
            f"{form} for {count} files" for form, count in sorted(total.forms.items())
        )
        logger.info("--documents auto: took %s.", forms)
    logger.info(
        "Read %d documents of %d sentences: %d lines of %.0f characters on average (%d in all).",
        total.documents,
        total.sentences,
        total.lines,
        total.characters / total.lines,
        total.characters,
    )
    percent = 100 * total.dropped_characters / (total.characters + total.dropped_characters)
    logger.info(
        "Left out %d headings, and %d remainders shorter than %d (%.2f%% of the characters).",
        total.headings,
        total.dropped,
        args.min_chars,
        percent,
    )
    if total.bad:
        logger.warning(
            "%d lines were not valid text: %s.",
            total.bad,
            {"skip": "skipped"}.get(args.errors, "repaired"),
        )
    logger.info("Wrote %s: %d lines in %.1f s.", args.output, sum(counts), elapsed_s)


def table(corpora: list[Corpus], counts: list[int]) -> str:
    """Format what was found and written, a language per row; times = lines written / found."""
    head = f"{'language':12} {'documents':>10} {'lines':>10} {'characters':>12} {'share':>7}"
    head += f" {'written':>10} {'share':>7} {'times':>7}"
    found, written = sum(corpus.lines for corpus in corpora), sum(counts)
    rows = [
        f"{corpus.name:12} {corpus.documents:10} {corpus.lines:10} {corpus.characters:12}"
        f" {corpus.lines / found:7.2%} {count:10} {count / written:7.2%}"
        f" {count / corpus.lines:7.2f}"
        for corpus, count in zip(corpora, counts, strict=True)
    ]
    return "\n".join([head, *rows])


def identity_of(args: argparse.Namespace, sources: list[Source]) -> dict:
    """Say what a run that continues an interrupted one has in common with it."""
    flags = {name: value for name, value in vars(args).items() if name != "force"}
    return {**flags, "content": sources[0].tag}


def main(argv: list[str] | None = None) -> None:
    """Run the program: read documents, pack sentences into lines, sample, write."""
    args = parse(argv)
    setup_logging(logging.INFO)
    check(args)
    dataset = dataset_of(args)
    if args.by_language:
        check_split(args.file_path, args.split)
        corpora = find_languages(args.file_path, args.split)
    else:
        corpora = [Corpus("all", find_text(args.file_path, dataset, args))]
    sources = [source for corpus in corpora for source in corpus.sources]
    paths = args.file_path or [args.dataset_name]
    inputs = [*paths, *(source.path for source in sources)]
    require_output(args.output, "--output", inputs, force=args.force)
    started = time.perf_counter()
    write_in_full = args.sampling_exponent == 1 and args.num_lines is None
    bar = tqdm(
        total=sum(source.num_bytes for source in sources) or None,
        unit="B",
        unit_scale=True,
        desc="prepare",
        **bar_options(),
    )
    with bar:
        if write_in_full and all(source.kind == DATASET for source in sources):
            write_dataset(corpora[0], args, identity_of(args, sources), bar)
            _require_lines(corpora[0], args)
            counts = [corpora[0].lines]
        else:
            write = write_all if write_in_full else write_sample
            with (
                atomic_path(args.output) as temporary,
                open(temporary, "w", encoding="utf-8", newline="\n") as output,
            ):
                counts = write(corpora, args, output, bar)
    report(corpora, counts, args, time.perf_counter() - started)


if __name__ == "__main__":
    exit_on_sigterm()
    run_program(main)
