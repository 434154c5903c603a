"""Make a teacher of fewer vocabulary entries: those that a text needs, with their embeddings."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

import argparse
import dataclasses
import logging
from pathlib import Path

import numpy as np

from distil.data.text_flags import add_record_flags
from distil.data.token_files import token_file_problem
from distil.system.files import atomic_folder, file_problem, require_output, write_json
from distil.system.json_files import read_json
from distil.system.outputs import add_force_flag
from distil.system.signals import exit_on_sigterm
from utils import InputError, OneLineParser, logger, raise_problems, run_program, setup_logging

RECORD = "trimming.json"  # in the output folder: what --remap needs


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--teacher", required=True, help="any masked or causal model: hub name or folder")
    add("--output", required=True, help="folder that receives the trimmed teacher")
    add("--token_counts", help="counts of the teacher's ids, made by token_counts.py")
    add("--data_file", help="token file to count instead: a pickle, or a store by its prefix")
    add("--keep", type=int, metavar="N", help="entries to keep, the obligatory ones among them")
    add(
        "--coverage",
        type=float,
        metavar="SHARE",
        help="in place of --keep: as few entries as cover this share of the counted ids, in (0, 1]",
    )
    add("--held_out", metavar="TEXT", help="text on which losses are counted, one sequence a line")
    add_record_flags(parser)
    add(
        "--remap",
        nargs="+",
        default=[],
        metavar="FILE",
        help=(
            "also convert token files and counts of the teacher's vocabulary, to FILE.OUTPUT's"
            " name; without --keep and --coverage, for an OUTPUT that is there"
        ),
    )
    add(
        "--trust_remote_code",
        action="store_true",
        help="run Python files that come with the teacher, where it needs them",
    )
    add_force_flag(parser)
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Raise InputError, a line for each problem of the flags."""
    problems = []
    if args.keep is None and args.coverage is None and not args.remap:
        problems.append("--keep, --coverage: expected one of them")
    if args.keep is not None and args.coverage is not None:
        problems.append("--keep and --coverage: give one of them")
    if args.coverage is not None and not 0 < args.coverage <= 1:
        problems.append(f"--coverage {args.coverage}: expected a share above 0, at most 1")
    if args.keep is not None and args.keep < 1:
        problems.append(f"--keep {args.keep}: expected at least 1")
    if args.keep is not None or args.coverage is not None:
        if (args.token_counts is None) == (args.data_file is None):
            problems.append("--token_counts, --data_file: expected one of them")
        if os.path.lexists(args.output):
            problems.append(f"--output {args.output}: exists already; name a new folder")
    if args.token_counts is not None:
        problems.append(file_problem(args.token_counts, "--token_counts"))
    if args.data_file is not None:
        problems.append(token_file_problem(args.data_file, "--data_file"))
    if args.held_out is not None and args.held_out != "-" and not os.path.exists(args.held_out):
        problems.append(f"--held_out {args.held_out}: no such file or folder")
    problems += [token_file_problem(file, "--remap") for file in args.remap]
    raise_problems(filter(None, problems))
    if args.keep is not None or args.coverage is not None:
        require_output(args.output, "--output", [args.teacher], is_folder=True)


def load_teacher_parts(args: argparse.Namespace) -> tuple:
    """Load what is needed before the weights: (architecture, configuration, tokenizer)."""
    from distil.models.hub import load_config
    from distil.models.language_model import is_masked_config, resolve_architecture
    from distil.models.tokenizers import load_tokenizer

    source = f"--teacher {args.teacher}"
    config = load_config(None, args.teacher, "--teacher", args.trust_remote_code)
    is_masked = is_masked_config(config, source)
    architecture = resolve_architecture(config, is_masked, source, args.trust_remote_code)
    return architecture, config, load_tokenizer(architecture, args.teacher, "--teacher")


def counts_of(args: argparse.Namespace, architecture, config, tokenizer) -> np.ndarray:
    """Read the counts, or count the token file: int64 (entries of the tokenizer,)."""
    from distil.data.cards import check_tokenizer
    from distil.data.token_files import open_token_file
    from distil.models.conventions import skeleton
    from distil.models.language_model import LanguageModel
    from lm_seqs_dataset import read_token_counts
    from token_counts import count_ids

    source = f"--teacher {args.teacher}"
    network = skeleton(config, architecture.is_masked, source, args.trust_remote_code)
    model = LanguageModel(architecture, network, tokenizer, source)
    if args.token_counts is not None:
        return read_token_counts(args.token_counts, model)
    tokens = open_token_file(args.data_file)
    check_tokenizer(tokens.card, model.tokenizer_facts, f"--data_file {args.data_file}", source)
    return count_ids(tokens, model.num_entries, f"--data_file {args.data_file}", source)


def choose_entries(args: argparse.Namespace, architecture, config, tokenizer):
    """Choose the entries that are kept: (their pieces, Choice)."""
    from distil.vocabulary.choice import choose, pieces_of, special_numbers
    from distil.vocabulary.network import config_numbers

    backend, source = tokenizer.backend_tokenizer, f"--teacher {args.teacher}"
    pieces = pieces_of(backend, source)
    counts_V = counts_of(args, architecture, config, tokenizer)
    special = special_numbers(backend) | set(tokenizer.all_special_ids)
    special |= {number for number in config_numbers(config) if number < len(counts_V)}
    if architecture.reserved_positions:  # positions begin after the id of the padding
        special |= set(range((tokenizer.pad_token_id or 0) + 1))
    special &= set(tokenizer.get_vocab().values())
    return pieces, choose(pieces, special, counts_V, args.keep, args.coverage)


def trim(args: argparse.Namespace, architecture, config, tokenizer) -> None:
    """Choose, cut, compare, write the folder, print what was saved and lost."""
    from distil.models.export import save_folder, tokenizer_for
    from distil.models.language_model import load_network, save_used_bias_twice
    from distil.vocabulary import report
    from distil.vocabulary.choice import trimmed_tokenizer
    from distil.vocabulary.folder import renumbered_tokenizer
    from distil.vocabulary.network import trim_network

    pieces, choice = choose_entries(args, architecture, config, tokenizer)
    full = tokenizer.backend_tokenizer
    backend = trimmed_tokenizer(full, pieces, choice.new_of)
    held_out = None
    if args.held_out is not None:
        lines = report.lines_of(args.held_out, args.text_field, args.errors)
        unknown = tokenizer.unk_token
        held_out = report.compare_on_text(lines, full, backend, choice, unknown)
    source = f"--teacher {args.teacher}"
    network = load_network(architecture, args.teacher, "--teacher")
    trimmed = trim_network(network, choice.kept_K, choice.new_of, source)
    save_used_bias_twice(trimmed)
    before, after = report.sizes_of(network), report.sizes_of(trimmed)
    own = renumbered_tokenizer(tokenizer, backend, choice.new_of, architecture, trimmed.config)
    record = {
        "teacher": Path(args.teacher).name,
        "kept": choice.kept_K.tolist(),
        "coverage": choice.coverage,
        "before": before,
        "after": after,
        "held_out": held_out and {**dataclasses.asdict(held_out), **held_out.shares()},
    }
    with atomic_folder(args.output) as folder:
        save_folder(trimmed, tokenizer_for(trimmed, own), folder)
        write_json(folder / RECORD, record)
        facts = {"teacher": record["teacher"], "kept entries": len(choice.kept_K)}
        report.draw_coverage(folder / "coverage.png", choice, facts)
    print(report.table(before, after, choice, held_out), flush=True)
    logger.info("Wrote %s: a teacher for train.py --teacher_name.", args.output)


def check_remap(args: argparse.Namespace, architecture, tokenizer) -> None:
    """Raise InputError for files of --remap that can't be converted, before anything is written."""
    from distil.models.tokenizers import describe_tokenizer
    from distil.vocabulary.remap_files import require_outputs, require_tokenizer

    require_outputs(args.remap, Path(args.output).name, force=args.force)
    require_tokenizer(args.remap, describe_tokenizer(architecture, args.teacher, tokenizer))


def remap(args: argparse.Namespace, architecture, tokenizer) -> None:
    """Convert the files of --remap to the ids of --output."""
    from distil.models.tokenizers import describe_tokenizer, load_tokenizer
    from distil.vocabulary.choice import pieces_of, special_numbers
    from distil.vocabulary.remap import Converter
    from distil.vocabulary.remap_files import remap_file

    name = Path(args.output).name
    where, remedy = f"--output {args.output}: {RECORD}", "trim that teacher again"
    kept = read_json(os.path.join(args.output, RECORD), where, remedy, {"kept": [int]})["kept"]
    own = load_tokenizer(architecture, args.output, "--output")
    full, trimmed = (one.backend_tokenizer for one in (tokenizer, own))
    names = {number: piece for piece, number in tokenizer.get_vocab().items()}
    own_names = {number: piece for piece, number in own.get_vocab().items()}
    if [names.get(k) for k in kept] != [own_names.get(k) for k in range(len(kept))]:
        raise InputError(
            f"--output {args.output}: is not trimmed from --teacher {args.teacher} ({RECORD}); name"
            " that teacher"
        )
    new_V = np.full(max(names) + 1, -1, np.int64)
    new_V[kept] = np.arange(len(kept))
    pieces = pieces_of(full, f"--teacher {args.teacher}")
    facts = [
        describe_tokenizer(architecture, path, one)
        for path, one in ((args.teacher, tokenizer), (args.output, own))
    ]
    special = frozenset(special_numbers(full))
    for path in args.remap:
        converter = Converter(full, trimmed, pieces, new_V, special)
        logger.info("Wrote %s.", remap_file(path, name, converter, *facts))


def main(argv: list[str] | None = None) -> None:
    """Run the program."""
    args = parse(argv)
    setup_logging(logging.INFO)
    check_flags(args)
    architecture, config, tokenizer = load_teacher_parts(args)
    if args.remap:
        check_remap(args, architecture, tokenizer)
    if args.keep is not None or args.coverage is not None:
        trim(args, architecture, config, tokenizer)
    if args.remap:
        remap(args, architecture, tokenizer)


if __name__ == "__main__":
    exit_on_sigterm()
    run_program(main)
