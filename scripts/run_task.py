"""Fine-tune a model for a task and score it as in the published tables; optionally with a teacher.

    python scripts/run_task.py --task mrpc --model_name_or_path M --data_dir glue/MRPC --output_dir
    out --seeds 42 43 44 45 46

The task is a row of TASKS (distil/tasks/tasks.py): files, columns, labels, metrics, settings. The
model's folder comes from train.py or the hub; report.py makes tables of the scores.json written
here. Settings are those of the 2019 run_*.py scripts, behind the numbers of Sanh et al., 2019
(sections 3 and 4). Every example of the scored set counts exactly once, on any number of processes.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from distil.system.rank_zero import reporting_on_rank_0
from distil.tasks.metrics import score
from distil.tasks.predictions import read_predictions
from distil.tasks.readers import read_scored_set
from distil.tasks.task_options import add_flags, check_arguments, with_settings
from distil.tasks.tasks import TASKS
from utils import OneLineParser, run_program


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; flags left out get the task's settings."""
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add_flags(parser)
    return with_settings(parser.parse_args(argv))


def table(metrics: Sequence[Mapping[str, float]], seeds: Sequence[int | str]) -> str:
    """Format metrics as a table: the median over the seeds, then one column per seed."""
    header = (
        ["metric", "median", *(f"{seed}" for seed in seeds)]
        if len(seeds) > 1
        else ["metric", f"{seeds[0]}"]
    )
    rows = [header]
    for name in metrics[0]:
        values = [found[name] for found in metrics]
        shown = [statistics.median(values), *values] if len(seeds) > 1 else values
        rows.append([name, *(f"{value:.2f}" for value in shown)])
    width = max(len(row[0]) for row in rows)
    return "\n".join(
        "  ".join([row[0].ljust(width), *(cell.rjust(10) for cell in row[1:])]) for row in rows
    )


def score_file(args: argparse.Namespace) -> dict[str, float]:
    """Compute and print a task's metrics for a file of predictions."""
    task = TASKS[args.task]
    examples = read_scored_set(args, task)
    metrics = score(task, examples, read_predictions(args.score_predictions, task, examples))
    print(f"{args.task} ({args.split}, {len(examples)} examples)\n{table([metrics], ['value'])}")
    return metrics


def run_all(args: argparse.Namespace) -> None:
    """Run every seed and rewrite scores.json after each, so that an interrupted series keeps it."""
    from distil.tasks.label_order import check_teacher
    from distil.tasks.plan import make_plan
    from distil.tasks.scores import write_scores
    from distil.tasks.seed_runs import keep_median_model, run_seed

    plan, runs = make_plan(args), []
    check_teacher(plan)
    is_first = os.environ.get("RANK", "0") == "0"
    flags = {name: value for name, value in vars(args).items() if name != "is_length_given"}
    for seed in args.seeds:
        entry = run_seed(plan, seed)
        if entry is None:
            continue
        runs.append(entry)
        if is_first:
            write_scores(
                Path(args.output_dir) / "scores.json",
                task=args.task,
                model=args.model_name_or_path,
                runs=runs,
                teacher=args.teacher_name_or_path,
                flags=flags,
            )
    if not runs or not is_first:
        return
    if args.do_train and args.save_models == "median":
        keep_median_model(args, runs)
    counts = ", ".join(f"{number} {name}" for name, number in runs[0]["num_examples"].items())
    names = [f"seed {run['seed']}" for run in runs]
    print(f"{args.task} ({counts})\n{table([run['metrics'] for run in runs], names)}")


def main(argv: list[str] | None = None) -> None:
    """Run the program."""
    with reporting_on_rank_0():
        args = parse(argv)
        check_arguments(args)
        if args.score_predictions:
            score_file(args)
        else:
            run_all(args)


if __name__ == "__main__":
    run_program(main)
