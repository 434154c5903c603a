"""The scores.json files of a report: those given with --scores, those kept in its folder."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from distil.models.names import short_name
from distil.reporting.problems import collecting
from distil.system.files import write_json
from distil.system.json_files import read_json, type_problem
from distil.tasks.metrics import HUB_METRICS
from distil.tasks.tasks import TASKS
from utils import InputError

KINDS_OF_LM = ("masked lm", "causal lm")  # as evaluate_lm.py calls its two tasks
# The types of what is read. What was made by hand may lack all but the figures.
SCORES = {
    **{"task": str, "model_name": str, "teacher": (str, None), "date": (str, None)},
    **{"commit": (str, None), "flags": (dict, None)},
}
FIGURES = {
    "score": {...: float},
    "runs": [{"metrics": {...: float}, "num_examples": ({...: int}, None)}],
}


def read_scores(path: str | os.PathLike) -> dict:
    """Read and check a scores.json (distil.tasks.scores). Raises InputError with file and remedy.

    Adds "kind", the task's name in the file: evaluate_lm.py has two names for the task lm.
    """
    remedy = "make it again with the task's program, or take it away"
    content = read_json(path, f"{path}", remedy, ...)
    missing = [
        key
        for key in ("task", "model_name", "score", "runs")
        if not isinstance(content, dict) or key not in content
    ]
    if missing:
        raise InputError(
            f"{path}: has no {missing[0]}; expected a scores.json as run_task.py writes it;"
            f" {remedy}"
        )
    if problem := type_problem(content, SCORES):
        raise InputError(f"{path}: {problem}; {remedy}")
    content["kind"] = content["task"]
    content["task"] = "lm" if content["task"] in KINDS_OF_LM else content["task"]
    if content["task"] not in TASKS:
        raise InputError(
            f"{path}: is of a task {content['task']!r:.40}; expected one of {', '.join(TASKS)};"
            f" {remedy}"
        )
    figures = {"score": content["score"], "runs": content["runs"]}
    problem = type_problem(figures, FIGURES)
    if problem or not content["runs"]:
        reason = f" ({problem})" if problem else ""
        raise InputError(
            f"{path}: holds no metrics, or some that are no finite numbers{reason}; {remedy}"
        )
    metrics = [content["score"], *(run["metrics"] for run in content["runs"])]
    for found in metrics:
        if TASKS[content["task"]].score_key not in found:
            raise InputError(
                f"{path}: has {', '.join(found) or 'none'}; expected"
                f" {TASKS[content['task']].score_key} for {content['task']}; {remedy}"
            )
    if problem := misfit(content):
        raise InputError(f"{path}: {problem}; {remedy}")
    return content


def misfit(content: Mapping) -> str | None:
    """Word which score is no rate x 100, or is outside of what its runs found; None if all fit."""
    row = TASKS[content["task"]]
    for name, score in content["score"].items():
        of_runs = [run["metrics"][name] for run in content["runs"] if name in run["metrics"]]
        is_rate = HUB_METRICS.get(name, "perplexity") != "perplexity"
        is_rate = is_rate or (name == row.score_key and not row.lower_is_better)
        beyond = next((value for value in (score, *of_runs) if is_rate and abs(value) > 100), None)
        if beyond is not None:
            return f"its {name} is {beyond:g}, expected at most 100"
        if not of_runs or not min(of_runs) <= score <= max(of_runs):
            found = f"{min(of_runs):g} to {max(of_runs):g}" if of_runs else "none"
            return f"its {name} is {score:g}, its runs found {found}"
    return None


def kept_scores(output_dir: str | os.PathLike, model: str, task: str) -> Path:
    """Return the path at which the score of a model and task is kept."""
    return Path(output_dir, "scores", short_name(model), task, "scores.json")


def read_all_scores(
    given: Sequence[str],
    output_dir: str,
    models: Mapping[str, str],
    tasks: Sequence[str],
    problems: list[str],
) -> dict[tuple[str, str], dict]:
    """Read the given and the kept scores: {(role, task): content}; append to `problems`.

    models: {role: hub name or folder}. tasks: those wanted; empty: all.
    """
    roles = {short_name(name): role for role, name in models.items()}
    found: dict[tuple[str, str], dict] = {}
    for path in given:
        with collecting(problems):
            content = read_scores(path)
            where = f"--scores {path}"
            if content["model_name"] not in roles:
                raise InputError(
                    f"{where}: is of {content['model_name']}; expected one of {', '.join(roles)};"
                    " leave it out"
                )
            if tasks and content["task"] not in tasks:
                raise InputError(
                    f"{where}: is of {content['task']}, which --tasks leaves out; add it there, or"
                    " leave it out"
                )
            key = roles[content["model_name"]], content["task"]
            if key in found:
                raise InputError(
                    f"{where}: a second file of {content['model_name']} and {key[1]}; leave one out"
                )
            require_same(content, kept_scores(output_dir, models[key[0]], key[1]), where)
            found[key] = content
    for name, role in roles.items():
        for task in tasks or TASKS:
            path = kept_scores(output_dir, models[role], task)
            if path.exists() and (role, task) not in found:
                with collecting(problems):
                    found[role, task] = of_model_and_task(read_scores(path), name, task, path)
    return found


def require_same(content: Mapping, kept: Path, where: str) -> None:
    """Raise InputError where the folder keeps another score of the model and task."""
    if kept.exists() and read_scores(kept) != content:
        raise InputError(f"{where}: {kept} holds another score; take one of the two away")


def keep_given(
    found: Mapping[tuple[str, str], Mapping], output_dir: str, models: Mapping[str, str]
) -> None:
    """Copy given scores into the folder, so that later reports need no --scores."""
    for (role, task), content in found.items():
        path = kept_scores(output_dir, models[role], task)
        if not path.exists():
            as_written = {key: value for key, value in content.items() if key != "kind"}
            write_json(path, {**as_written, "task": content["kind"]})


def of_model_and_task(content: dict, name: str, task: str, path: Path) -> dict:
    """Return the scores. Raises InputError where they are of another model or task."""
    if (content["model_name"], content["task"]) != (name, task):
        raise InputError(
            f"{path}: is of {content['model_name']} and {content['task']}; expected {name} and"
            f" {task}; move it to its folder"
        )
    return content
