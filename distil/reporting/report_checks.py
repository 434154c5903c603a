"""Check report.py's arguments before anything slow, and raise all problems at once."""

import argparse
import difflib
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from distil.models.names import short_name
from distil.reporting import latency, model_card
from distil.reporting.comparison import FORMAT
from distil.reporting.plan import plan_problems
from distil.reporting.problems import collecting
from distil.reporting.scores import read_all_scores
from distil.reporting.task_runs import RunSettings, run_problems
from distil.system.files import file_problem, output_problem
from distil.system.json_files import load_json
from distil.tasks.tasks import TASKS
from utils import one_line, raise_problems

OURS = {"scores", "report.md", "report.json", "report.png", "measurements.json"}
ROLES = ("teacher", "student")


def check_arguments(
    args: argparse.Namespace, models: Mapping[str, str]
) -> tuple[list[str], dict[tuple[str, str], dict]]:
    """Return (tasks of the report, {(role, task): scores that are there}).

    models: {role: hub name or folder}. Raises InputError with a line for each problem.
    """
    problems = model_problems(models, args.no_run) + task_problems(args)
    problems += [] if args.no_run or args.no_speed else plan_problems(args)
    problems += output_problems(args.output_dir, models)
    problems += model_card.card_problems(args) if args.write_card else []
    tasks, found = list(dict.fromkeys(args.tasks or [])), {}
    if not problems:
        found = read_all_scores(args.scores, args.output_dir, models, tasks, problems)
        tasks = tasks or [task for task in TASKS if any(task == t for _, t in found)]
        settings = RunSettings.from_flags(args, models)
        problems += [] if args.no_run else run_problems(settings, tasks, found)
    raise_problems(problems)
    return tasks, found


def model_problems(models: Mapping[str, str], no_run: bool) -> list[str]:
    """List the models that cannot be read, or cannot be told apart, a line each."""
    problems: list[str] = []
    if not os.path.isdir(models["student"]):
        problems.append(
            f"--student {models['student']}: no such folder; expected the folder that train.py"
            " wrote"
        )
    for role, name in models.items():
        if (role == "student" and problems) or (no_run and role != "student"):
            continue
        with collecting(problems):
            latency.text_config(name, f"--{role}")
    places = {role: os.path.realpath(name) for role, name in models.items()}
    for k, role in enumerate(list(models)[1:], 1):
        for other in list(models)[:k]:
            if places[role] == places[other]:
                problems.append(
                    f"--{role} {models[role]}: is the {other}, too; expected another model"
                )
            elif short_name(models[role]) == short_name(models[other]):
                problems.append(
                    f"--{role} {models[role]}: has the {other}'s name, {short_name(models[role])},"
                    " by which scores are kept; rename one folder"
                )
    return problems


def task_problems(args: argparse.Namespace) -> list[str]:
    """List unknown tasks and the other problems of the flags of quality, a line each."""
    problems = []
    for task in dict.fromkeys(args.tasks or []):
        if task not in TASKS:
            near = difflib.get_close_matches(task, TASKS, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"expected {', '.join(TASKS)}"
            problems.append(f"--tasks {task}: unknown; {remedy}")
    problems += [
        f"--seeds {seed}: expected 0 to 4294967295"
        for seed in args.seeds or []
        if not 0 <= seed < 2**32
    ]
    problems += filter(None, [file_problem(path, "--scores") for path in args.scores])
    try:
        shlex.split(args.task_flags)
    except ValueError as error:
        problems.append(f"--task_flags {args.task_flags}: {one_line(error)}; close the quotation")
    return problems


def output_problems(output_dir: str, models: Mapping[str, str]) -> list[str]:
    """List why the folder cannot be used: not writable, or holds no report of these models."""
    folder = Path(output_dir)
    problem = output_problem(output_dir, "--output_dir", list(models.values()), is_folder=True)
    if problem or not folder.is_dir():
        return [problem] if problem else []
    foreign = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.name not in OURS and not entry.name.startswith(".")
    )
    if foreign:
        return [
            f"--output_dir {folder}: holds {foreign[0]}, which is no part of a report; choose an"
            " empty or new folder"
        ]
    return [line for line in [foreign_report(folder / "report.json", models)] if line]


def foreign_report(path: Path, models: Mapping[str, str]) -> str | None:
    """Word the problem of a report.json of another teacher or student; None without a problem."""
    if not path.exists():
        return None
    try:
        before = load_json(path, {"format": str, "models": dict.fromkeys(ROLES, {"name": str})})
    except ValueError:
        before = {}
    if before.get("format") != FORMAT:
        return (
            f"--output_dir {path.parent}: its report.json is no report of ours; choose another"
            " folder"
        )
    kept = {role: before["models"][role]["name"] for role in ROLES}
    if any(short_name(models[role]) != name for role, name in kept.items()):
        return (
            f"--output_dir {path.parent}: holds the report of teacher {kept['teacher']} and student"
            f" {kept['student']}; choose another folder"
        )
    return None
