"""Measure latency and throughput of several models next to each other, in one process.

The paper's Table 3 (Sanh et al., 2019) times a pass over STS-B's development set on a CPU, at batch
size 1. distil/reporting/latency.py says what is timed here; report.py times with it, too.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

import argparse
import logging

from distil.reporting.plan import add_plan_flags, plan_of, plan_problems
from distil.reporting.problems import collecting
from distil.system.files import output_problem, write_json
from distil.system.outputs import add_force_flag, json_of
from utils import OneLineParser, raise_problems, run_program, setup_logging


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--models", nargs="+", required=True, help="hub names or folders; ratios are to the first"
    )
    add_plan_flags(parser)
    parser.add_argument("--json", help="file for the figures")
    add_force_flag(parser)
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError with a line for each problem of the flags."""
    from distil.models.names import short_name
    from distil.reporting.latency import text_config

    problems = plan_problems(args)
    names = [short_name(name) for name in args.models]
    problems += [
        f"--models: two are named {name}; rename a folder"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    for name in args.models:
        with collecting(problems):
            text_config(name, "--models")
    if args.json is not None:
        options = {"is_own": json_of("rows", "inputs", "passes"), "force": args.force}
        problem = output_problem(args.json, "--json", [args.data or ""], **options)
        problems += [problem] if problem else []
    raise_problems(problems)


def main(argv: list[str] | None = None) -> None:
    """Time the models, print the table, write the figures."""
    args = parse(argv)
    from distil.models.names import short_name
    from distil.reporting.latency import measure, read_sentences, table

    setup_logging(logging.INFO)
    check_arguments(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    plan = plan_of(args)
    sentences = read_sentences(args.data)[: plan.num_sentences] if args.data else None
    found = measure({short_name(name): name for name in args.models}, plan, sentences)
    print(table(found))
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    run_program(main)
