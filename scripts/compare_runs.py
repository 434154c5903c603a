"""Compare runs of train.py: a table of the flags that differ, their last figures, and the curves.

Reads parameters.json and metrics.jsonl of each run folder, also while the run is being trained.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

import argparse
import logging

from distil.system.files import require_output
from distil.system.outputs import add_force_flag, is_picture
from utils import OneLineParser, logger, run_program, setup_logging


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders (--dump_path)")
    parser.add_argument(
        "--output",
        default="comparison.png",
        metavar="PNG",
        help="picture of the curves (default: %(default)s)",
    )
    parser.add_argument(
        "--x",
        default="update",
        choices=["update", "micro_batches", "epoch"],
        help="what the curves are drawn over (default: %(default)s)",
    )
    add_force_flag(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the program: read the runs, print the tables, draw the curves."""
    args = parse(argv)
    setup_logging(logging.INFO)
    require_output(args.output, "--output", args.runs, is_own=is_picture, force=args.force)
    from distil.reporting.run_comparison import draw, figure_table, flag_table, read_runs

    runs = read_runs(args.runs)
    print(f"{flag_table(runs)}\n\n{figure_table(runs)}")
    draw(runs, args.output, args.x)
    logger.info("Drew %s.", args.output)


if __name__ == "__main__":
    run_program(main)
