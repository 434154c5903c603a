"""Report on a token file: counts, lengths, frequent and unknown ids, some sequences decoded.

The file is read once, in constant memory. Ids are counted as they are, before training splits and
filters sequences.
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
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from distil.data.cards import tokenizer_problem
from distil.data.disk import BLOCK_BYTES
from distil.data.inspection import make_report, section, special_of
from distil.data.inspection_text import report_lines
from distil.data.survey import Survey
from distil.data.token_files import TokenFile, files_of, find_token_file, open_token_file
from distil.models.casing import Casing, add_casing_flags, casing_of_flags
from distil.system.files import require_output, write_json
from distil.system.outputs import add_force_flag, json_of
from utils import InputError, OneLineParser, bar_options, logger, run_program, setup_logging

MAX_SHOWN = 10_000  # sequences or ids; more is a typing error


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; raise InputError naming a flag out of range."""
    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "file", metavar="FILE", help="a pickle, or a store: its prefix, or any of its files"
    )
    parser.add_argument(
        "--tokenizer_type",
        choices=["bert", "roberta", "gpt2", "auto"],
        help="(default: what the file's card says)",
    )
    parser.add_argument(
        "--tokenizer_name", help="hub name or local folder (default: what the file's card says)"
    )
    add_casing_flags(parser)
    parser.add_argument(
        "--num_sequences",
        type=int,
        default=5,
        help="sequences shown, evenly spaced (default: %(default)s)",
    )
    parser.add_argument(
        "--top", type=int, default=20, help="most frequent ids shown (default: %(default)s)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare every checksum, and the card with the file; status 2 if they differ",
    )
    parser.add_argument("--json", metavar="PATH", help="also write the report as JSON")
    add_force_flag(parser)
    args = parser.parse_args(argv)
    for flag in ("num_sequences", "top"):
        if not 0 <= getattr(args, flag) <= MAX_SHOWN:
            raise InputError(f"--{flag} {getattr(args, flag)}: expected 0 to {MAX_SHOWN}")
    return args


# --------------------------------------------------------------------------------------------------
# Card and tokenizer
# --------------------------------------------------------------------------------------------------


def choose_tokenizer(args: argparse.Namespace, card: Mapping[str, Any]) -> tuple[Any, str]:
    """Load the tokenizer of the flags, else of the card: (it or None, a line for the report).

    Raises InputError if a tokenizer that a flag names can't be loaded.
    """
    of_card = section(card, "tokenizer")
    kind = args.tokenizer_type or of_card.get("type")
    name = args.tokenizer_name or of_card.get("name")
    is_named = bool(args.tokenizer_type or args.tokenizer_name)
    if not (kind and name):
        if is_named:
            given, missing = "tokenizer_type", "tokenizer_name"
            if not args.tokenizer_type:
                given, missing = missing, given
            raise InputError(
                f"--{given} {getattr(args, given)}: the file has no card with the rest; add"
                f" --{missing}"
            )
        text = "unknown, so ids are not decoded; name it with --tokenizer_type and --tokenizer_name"
        return None, text
    # Imported here: transformers takes half a second.
    from distil.models.architectures import architecture_named
    from distil.models.tokenizer_rules import tokenizer_facts
    from distil.models.tokenizers import load_tokenizer

    casing = casing_of_flags(args)
    if name == of_card.get("name"):  # as it was made, where no flag says otherwise
        casing = Casing(
            *(
                of_card.get(option) if given is None else given
                for option, given in dataclasses.asdict(casing).items()
            )
        )
    label = f"{name} ({kind})"
    try:
        tokenizer = load_tokenizer(architecture_named(kind), name, "--tokenizer_name", casing)
    except InputError as error:
        if is_named:
            raise
        reason = str(error).removeprefix(f"--tokenizer_name {name}: ")
        text = f"{label}, not loaded, so ids are not decoded: {reason}; give it as --tokenizer_name"
        return None, text
    if not tokenizer_problem(card, tokenizer_facts(tokenizer), f"FILE {args.file}", name):
        return tokenizer, label
    if is_named:
        text = f"{label}, which is not the card's: texts and tokens may be wrong"
        return tokenizer, text
    text = f"{label} differs now from the card's, so ids are not decoded; give --tokenizer_name"
    return None, text


def verify(tokens: TokenFile, paths: Sequence[str]) -> dict[str, int]:
    """Compare every checksum: {blocks, bytes}; raise InputError naming file and place.

    Opening has already checked the card, and a store's index or a whole pickle.
    """
    if not tokens.card:
        raise InputError(
            f"--verify {tokens.path}: has no card ({paths[-1]}), so there are no checksums to"
            " verify; make the file again with binarized_data.py, which writes one"
        )
    if tokens.blocks is not None:
        with tqdm(
            total=tokens.blocks.file.size, unit="B", unit_scale=True, desc="verify", **bar_options()
        ) as bar:
            for num_bytes in tokens.blocks.check_all():
                bar.update(num_bytes)
    sizes = [os.path.getsize(path) for path in paths[:-1]]
    return {
        "blocks": sum(-(-size // BLOCK_BYTES) for size in sizes) if tokens.blocks else 1,
        "bytes": sum(sizes),
    }


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


def check_output(path: str, inputs: Sequence[str], *, force: bool) -> None:
    """Raise InputError if --json can't be written, or takes the name of a token file or card."""
    own = json_of("tokenizer", "path", "dtype", "sequences")
    require_output(path, "--json", inputs, is_own=own, force=force)
    names_card = path.endswith(".json") and os.path.isfile(path.removesuffix(".json"))
    if names_card or find_token_file(path)[0] != "pickle":
        raise InputError(
            f"--json {path}: is the name of a token file's own file or card; choose another name"
        )


def main(argv: list[str] | None = None) -> None:
    """Run the program: open, verify, count, print, write; raise InputError if --verify fails."""
    args = parse(argv)
    setup_logging(logging.INFO)
    paths = files_of(args.file)
    if args.json is not None:
        check_output(args.json, paths, force=args.force)
    tokens = open_token_file(args.file, "FILE")
    tokenizer, tokenizer_line = choose_tokenizer(args, tokens.card)
    verified = {"verified": verify(tokens, paths)} if args.verify else {}
    special = special_of(
        tokens.card, args.tokenizer_type or section(tokens.card, "tokenizer").get("type"), tokenizer
    )
    num_shown = min(args.num_sequences, len(tokens.lengths_N))
    sampled = np.linspace(0, len(tokens.lengths_N) - 1, num_shown).round().astype(np.int64)
    survey = Survey(special, sampled).read(tokens)
    report = {
        "tokenizer": tokenizer_line,
        **make_report(survey, tokens, paths, tokenizer, args.top),
    }
    report |= {} if report["problems"] else verified
    print("\n".join(report_lines(report)), flush=True)
    if args.json is not None:
        write_json(args.json, report)
        logger.info("Wrote %s.", args.json)
    if args.verify and report["problems"]:
        raise InputError(
            "\n".join(
                f"--verify {tokens.path}: {problem}; make the file again"
                for problem in report["problems"]
            )
        )


if __name__ == "__main__":
    run_program(main)
