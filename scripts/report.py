"""Report a distilled model's quality, size and speed next to its teacher's.

The last step of the workflow. What the 2019 README and the paper (Sanh et al., 2019, Tables 1 to 3)
report of DistilBERT, for any teacher and student: scores on the chosen tasks and the share of the
teacher's that the student keeps, parameters, bytes, latency. Reads the scores that runs left
(scores/MODEL/TASK/scores.json), and runs the programs of tasks without. Keeps sizes and latencies,
too (measurements.json): tables are made again without a run. --write_card also writes the model
card of the Hugging Face hub into the student's folder (distil/reporting/model_card.py).
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

import argparse
import logging
from pathlib import Path

from distil.reporting.plan import add_plan_flags, plan_of
from distil.system.files import atomic_path, write_json
from distil.system.signals import exit_on_sigterm
from distil.tasks.tasks import TASKS
from utils import OneLineParser, logger, run_program, setup_logging

ROLES = ("teacher", "student", "baseline")


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--teacher", required=True, help="hub name or folder")
    parser.add_argument("--student", required=True, help="the distilled model's folder")
    parser.add_argument(
        "--baseline",
        help="hub name or folder of a third model: the student trained without a teacher, ..",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        help="folder for report.md, .json, .png, and what they are made of",
    )
    add_quality_flags(parser.add_argument_group("quality"))
    group = parser.add_argument_group("speed")
    add_plan_flags(group)
    group.add_argument("--no_speed", action="store_true", help="leave latency and throughput out")
    group.add_argument(
        "--measure", action="store_true", help="measure sizes and speed again though they are kept"
    )
    add_card_flags(parser.add_argument_group("model card"))
    return parser.parse_args(argv)


def add_quality_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of tasks, their data and their runs."""
    group.add_argument(
        "--tasks", nargs="+", help=f"of {', '.join(TASKS)} (default: those with scores)"
    )
    group.add_argument(
        "--data_dir", help="the tasks' data, a folder each: DATA/sst2, .., DATA/squad"
    )
    group.add_argument(
        "--lm_data_file", help="for the task lm: held-out token file made by binarized_data.py"
    )
    group.add_argument(
        "--lm_text_file", help="for the task lm: held-out text instead, a sequence a line"
    )
    group.add_argument(
        "--scores", nargs="+", default=[], help="scores.json files of runs made elsewhere"
    )
    group.add_argument(
        "--seeds", type=int, nargs="+", help="of the fine-tuning runs (default: the task program's)"
    )
    group.add_argument(
        "--task_flags",
        default="",
        help='more flags for the fine-tuning programs, as in "--num_train_epochs 2"',
    )
    group.add_argument(
        "--no_run",
        action="store_true",
        help="run and measure nothing: make the tables of what is kept",
    )


def add_card_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the model card; most say what no file does."""
    group.add_argument(
        "--write_card", action="store_true", help="write README.md into the student's folder"
    )
    group.add_argument(
        "--force",
        action="store_true",
        help="also over a README.md that was written by another hand",
    )
    group.add_argument(
        "--license", help="the model's license, an identifier of the hub (apache-2.0, mit, ..)"
    )
    group.add_argument(
        "--language",
        nargs="+",
        help="ISO 639 codes of the training text (en, de, ..), or multilingual",
    )
    group.add_argument(
        "--datasets", nargs="+", help="data sets of the hub that the student was trained on"
    )
    group.add_argument(
        "--base_model",
        help="the teacher's name on the hub (default: --teacher, where it is no folder)",
    )
    group.add_argument(
        "--model_id", help="the student's name on the hub (default: the folder's name)"
    )


# --------------------------------------------------------------------------------------------------
# All of it
# --------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Gather the scores, measure, write the report and the card."""
    args = parse(argv)
    setup_logging(logging.INFO)
    exit_on_sigterm()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from distil.reporting import model_card
    from distil.reporting.comparison import compose
    from distil.reporting.measurements import measurements
    from distil.reporting.report_checks import check_arguments
    from distil.reporting.report_plot import draw
    from distil.reporting.report_tables import as_markdown, quality_table, size_table, speed_text
    from distil.reporting.scores import keep_given
    from distil.reporting.task_runs import RunSettings, run_missing

    models = {role: getattr(args, role) for role in ROLES if getattr(args, role) is not None}
    tasks, found = check_arguments(args, models)
    keep_given(found, args.output_dir, models)
    if not args.no_run:
        run_missing(RunSettings.from_flags(args, models), tasks, args.output_dir, found)
    folder = Path(args.output_dir)
    measured = measurements(
        folder / "measurements.json",
        models,
        None if args.no_speed else plan_of(args),
        args.data,
        no_run=args.no_run,
        again=args.measure,
    )
    report = compose(models, tasks, found, measured)
    text = as_markdown(report)
    with atomic_path(folder / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_json(folder / "report.json", report)
    draw(report, folder / "report.png")
    if args.write_card:
        tables = {
            "quality": quality_table(report),
            "size": size_table(report),
            "speed": speed_text(report),
        }
        model_card.write_card(args, report, tables)
    print(text)
    logger.info("Wrote report.md, report.json and report.png to %s.", folder)


if __name__ == "__main__":
    run_program(main)
