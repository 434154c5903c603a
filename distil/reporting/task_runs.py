"""Runs of the task programs, for the scores that a report lacks."""

import argparse
import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from distil.data.token_files import token_file_problem
from distil.models.hub import load_config
from distil.models.names import short_name
from distil.reporting.scores import kept_scores, of_model_and_task, read_scores
from distil.system.children import running
from distil.system.files import file_problem
from distil.tasks.scores import write_scores
from distil.tasks.tasks import TASKS
from utils import InputError, logger

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What the runs read.

    models: {role: hub name or folder}. data_dir: the tasks' data, a folder a task. lm_data_file,
    lm_text_file: held-out text. seeds: None for the programs' defaults. task_flags: further flags
    of the fine-tuning programs, as on a command line.
    """

    models: Mapping[str, str]
    data_dir: str | None
    lm_data_file: str | None
    lm_text_file: str | None
    seeds: Sequence[int] | None
    task_flags: str

    @classmethod
    def from_flags(cls, args: argparse.Namespace, models: Mapping[str, str]) -> "RunSettings":
        """Take the settings from report.py's flags of the same names."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "models"]
        return cls(models, **{name: getattr(args, name) for name in names})


# --------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------


def run_problems(settings: RunSettings, tasks: Sequence[str], found: Mapping) -> list[str]:
    """List the data that the runs still to be made lack, a line a task."""
    problems = []
    for task in tasks:
        if all((role, task) in found for role in settings.models):
            continue
        if task == "lm":
            problems += lm_problems(settings)
        elif not settings.data_dir:
            problems.append(
                f"--data_dir: needed for {task}, which is not scored for each model yet; or"
                " --no_run"
            )
        elif not data_folder(settings.data_dir, task).is_dir():
            problems.append(
                f"--data_dir {settings.data_dir}: has no folder {task} or {TASKS[task].title}; put"
                " the task's files there"
            )
        elif TASKS[task].head == "spans":
            problems += filter(
                None,
                [file_problem(path, "--data_dir") for path in squad_files(settings.data_dir, task)],
            )
    return problems


def lm_problems(settings: RunSettings) -> list[str]:
    """List the problems of the held-out text's flags; evaluate_lm.py checks the text itself."""
    if (settings.lm_data_file is None) == (settings.lm_text_file is None):
        return ["--lm_data_file, --lm_text_file: the task lm needs one of them"]
    if settings.lm_text_file is not None:
        return list(filter(None, [file_problem(settings.lm_text_file, "--lm_text_file")]))
    return list(filter(None, [token_file_problem(settings.lm_data_file, "--lm_data_file")]))


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


def data_folder(data_dir: str, task: str) -> Path:
    """Find a task's folder in the data: by the task's name, or by GLUE's."""
    folder = Path(data_dir, task)
    return folder if folder.is_dir() else Path(data_dir, TASKS[task].title)


def squad_files(data_dir: str, task: str) -> list[Path]:
    """Name SQuAD's two files in the data folder, which keep the names they come with."""
    train, (scored,) = TASKS[task].train, TASKS[task].scored["dev"]
    return [data_folder(data_dir, task) / part.patterns[0] for part in (train, scored)]


def into(folder: Path) -> list[str]:
    """List the flags of a run's folder; let it replace the rest of a run without a score."""
    return ["--output_dir", str(folder), *(["--overwrite_output_dir"] if folder.exists() else [])]


def run_squad(settings: RunSettings, role: str, task: str, path: Path) -> None:
    """Fine-tune and score a model on SQuAD, a folder a seed; merge the scores into `path`."""
    model, contents = settings.models[role], []
    train_file, predict_file = squad_files(settings.data_dir, task)
    flags = [
        "--model_type",
        load_config(None, model, f"--{role}").model_type,
        "--model_name_or_path",
        model,
        "--train_file",
        str(train_file),
        "--predict_file",
        str(predict_file),
        "--do_train",
        "--do_eval",
        *(["--version_2_with_negative"] if task == "squad_v2" else []),
        *shlex.split(settings.task_flags),
    ]
    for seed in settings.seeds or [42]:
        folder = path.parent / f"seed-{seed}"
        if not (folder / "scores.json").exists():
            call(
                ["run_squad_w_distillation.py", *flags, "--seed", str(seed), *into(folder)],
                f"{task} of {short_name(model)}",
            )
        contents.append(
            of_model_and_task(
                read_scores(folder / "scores.json"), short_name(model), task, folder / "scores.json"
            )
        )
    first = contents[0]
    write_scores(
        path,
        task=task,
        model=model,
        runs=[run for content in contents for run in content["runs"]],
        teacher=first["teacher"],
        flags=first["flags"],
    )


def run_lm(settings: RunSettings, role: str, task: str, path: Path) -> None:
    """Score a model on held-out text; a student or baseline against the teacher."""
    model = settings.models[role]
    teacher = [] if role == "teacher" else ["--teacher", settings.models["teacher"]]
    text = (
        ["--data_file", settings.lm_data_file]
        if settings.lm_data_file
        else ["--text_file", settings.lm_text_file]
    )
    call(
        ["evaluate_lm.py", "--model", model, *teacher, *text, "--output", str(path)],
        f"lm of {short_name(model)}",
    )


def run_task(settings: RunSettings, role: str, task: str, path: Path) -> None:
    """Fine-tune and score a model on a task."""
    model = settings.models[role]
    seeds = ["--seeds", *map(str, settings.seeds)] if settings.seeds else []
    flags = [
        "--task",
        task,
        "--model_name_or_path",
        model,
        "--data_dir",
        str(data_folder(settings.data_dir, task)),
    ]
    call(
        ["run_task.py", *flags, *into(path.parent), *seeds, *shlex.split(settings.task_flags)],
        f"{task} of {short_name(model)}",
    )


RUNNERS = {"squad": run_squad, "squad_v2": run_squad, "lm": run_lm}  # the others: run_task


def call(command: Sequence[str], what: str) -> None:
    """Run a program and show what it prints. Raises InputError with its error lines if it fails."""
    program, *flags = command
    print(f"\n$ python scripts/{program} {shlex.join(flags)}", flush=True)
    errors = []
    options = {"stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    with running(SCRIPTS / program, flags, **options) as child:
        for line in child.stderr:
            if line.startswith(f"{program}: error: "):  # raised once, below
                errors.append(f"{what}: {program}: {line.partition(': error: ')[2].strip()}")
            else:
                sys.stderr.write(line)
    if child.returncode:
        raise InputError(
            "\n".join(errors)
            or f"{what}: {program} ended with status {child.returncode}; see what it printed"
        )


def run_missing(
    settings: RunSettings,
    tasks: Sequence[str],
    output_dir: str,
    found: dict[tuple[str, str], dict],
) -> None:
    """Run the programs of the models and tasks without scores; add their scores to `found`."""
    for task in tasks:
        for role, model in settings.models.items():
            name = short_name(model)
            if (role, task) in found:
                logger.info("%s of %s: the score that is kept.", task, name)
                continue
            path = kept_scores(output_dir, model, task)
            path.parent.parent.mkdir(parents=True, exist_ok=True)
            RUNNERS.get(task, run_task)(settings, role, task, path)
            if not path.exists():
                raise InputError(
                    f"{task} of {name}: its program wrote no {path}; is --task_flags"
                    f" {settings.task_flags!r} to blame?"
                )
            found[role, task] = of_model_and_task(read_scores(path), name, task, path)
