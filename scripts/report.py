"""The card of a distilled model: its quality beside its teacher's, its size, its speed; as
Markdown, JSON and a picture.

The last step of the workflow. What the 2019 README and the paper (Sanh et al., 2019, Tables 1 to 3)
say of DistilBERT is said here of any teacher and student: scores on the chosen tasks and how much
of the teacher's the student keeps, parameters, bytes, latency. A score is read from the file that
its run left (scores/MODEL/TASK/scores.json); where there is none, the task's program is run. Sizes
and latencies are kept too (measurements.json), so that tables are made again without a run.
--write_card also writes the model card of the Hugging Face hub into the student's folder
(model_card.py).
"""

import argparse
import dataclasses
import datetime
import difflib
import json
import logging
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distil.data.token_files import token_file_problem
from distil.models.hub import load_config, quiet_transformers, short_name
from distil.models.tokenizers import vocabulary_fingerprint
from distil.reporting import latency, model_card
from distil.reporting.plan import add_plan_flags, plan_of, plan_problems
from distil.reporting.problems import collecting
from distil.reporting.tables import markdown
from distil.system.files import atomic_path, file_problem, output_problem, write_json
from distil.system.signals import exit_on_sigterm
from distil.tasks.loading import load_any_tokenizer, longest_input
from distil.tasks.scores import write_scores
from distil.tasks.tasks import GLUE_TASKS, TASKS, glue_macro
from utils import InputError, OneLineParser, git_facts, logger, one_line, run_program, setup_logging

SCRIPTS = Path(__file__).resolve().parent
ROLES = ("teacher", "student", "baseline")
OURS = {"scores", "report.md", "report.json", "report.png", "measurements.json"}
FORMAT = "distil report 1"


KINDS_OF_LM = ("masked lm", "causal lm")  # as evaluate_lm.py calls its two tasks


# --------------------------------------------------------------------------------------------------
# Arguments
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
    group = parser.add_argument_group("quality")
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
    group = parser.add_argument_group("speed")
    add_plan_flags(group)
    group.add_argument("--no_speed", action="store_true", help="leave latency and throughput out")
    group.add_argument(
        "--measure", action="store_true", help="measure sizes and speed again though they are kept"
    )
    group = parser.add_argument_group("model card")
    group.add_argument(
        "--write_card", action="store_true", help="write README.md into the student's folder"
    )
    group.add_argument(
        "--force",
        action="store_true",
        help="also over a README.md that was written by another hand",
    )
    model_card.add_card_flags(group)
    return parser.parse_args(argv)


def models_of(args: argparse.Namespace) -> dict[str, str]:
    """Return {role: hub name or folder} of the models that were named, the teacher first."""
    return {role: getattr(args, role) for role in ROLES if getattr(args, role) is not None}


def check_arguments(args: argparse.Namespace) -> dict:
    """Raise InputError with a line for each problem; return the scores that are there: {(role,
    task): content}.
    """
    problems = model_problems(args) + task_problems(args)
    problems += [] if args.no_run or args.no_speed else plan_problems(args)
    problems += output_problems(args)
    problems += model_card.card_problems(args) if args.write_card else []
    found = {}
    if not problems:
        found = read_all_scores(args, problems)
        args.tasks = args.tasks or [task for task in TASKS if any(task == t for _, t in found)]
        problems += [] if args.no_run else run_problems(args, found)
    if problems:
        raise InputError("\n".join(problems))
    return found


def model_problems(args: argparse.Namespace) -> list[str]:
    """Say, a line each, which models cannot be read, or cannot be told apart."""
    problems: list[str] = []
    models = models_of(args)
    if not os.path.isdir(args.student):
        problems.append(
            f"--student {args.student}: no such folder; expected the folder that train.py wrote"
        )
    for role, name in models.items():
        if (role == "student" and problems) or (args.no_run and role != "student"):
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
    """Say, a line each, which tasks are unknown, and what else of their flags is wrong."""
    problems = []
    for task in dict.fromkeys(args.tasks or []):
        if task not in TASKS:
            near = difflib.get_close_matches(task, TASKS, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"expected {', '.join(TASKS)}"
            problems.append(f"--tasks {task}: unknown; {remedy}")
    args.tasks = args.tasks and list(dict.fromkeys(args.tasks))
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


def output_problems(args: argparse.Namespace) -> list[str]:
    """Say why the output folder can't be used: not writable, or what is in it is no part of this
    pair's report.
    """
    folder = Path(args.output_dir)
    problem = output_problem(
        args.output_dir, "--output_dir", list(models_of(args).values()), is_folder=True
    )
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
    return [line for line in [foreign_report(folder / "report.json", args)] if line]


def foreign_report(path: Path, args: argparse.Namespace) -> str | None:
    """Say that a report.json that would be replaced is not of this teacher and student; None if it
    is, or there is none.
    """
    if not path.exists():
        return None
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        kept = {role: before["models"][role]["name"] for role in ("teacher", "student")}
        is_ours = before["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        is_ours, kept = False, {}
    if not is_ours:
        return (
            f"--output_dir {path.parent}: its report.json is no report of ours; choose another"
            " folder"
        )
    if any(short_name(getattr(args, role)) != name for role, name in kept.items()):
        return (
            f"--output_dir {path.parent}: holds the report of teacher {kept['teacher']} and student"
            f" {kept['student']}; choose another folder"
        )
    return None


def run_problems(args: argparse.Namespace, found: Mapping) -> list[str]:
    """Say, a line a task, what data is missing for the runs that are still to be made."""
    problems = []
    for task in args.tasks:
        if all((role, task) in found for role in models_of(args)):
            continue
        if task == "lm":
            problems += lm_problems(args)
        elif not args.data_dir:
            problems.append(
                f"--data_dir: needed for {task}, which is not scored for each model yet; or"
                " --no_run"
            )
        elif not data_folder(args.data_dir, task).is_dir():
            problems.append(
                f"--data_dir {args.data_dir}: has no folder {task} or {TASKS[task].title}; put the"
                " task's files there"
            )
        elif TASKS[task].head == "spans":
            problems += filter(
                None,
                [file_problem(path, "--data_dir") for path in squad_files(args.data_dir, task)],
            )
    return problems


def lm_problems(args: argparse.Namespace) -> list[str]:
    """Say what is wrong with the held-out text; what is in it is evaluate_lm.py's to check."""
    if (args.lm_data_file is None) == (args.lm_text_file is None):
        return ["--lm_data_file, --lm_text_file: the task lm needs one of them"]
    if args.lm_text_file is not None:
        return list(filter(None, [file_problem(args.lm_text_file, "--lm_text_file")]))
    return list(filter(None, [token_file_problem(args.lm_data_file, "--lm_data_file")]))


# --------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------


def read_scores(path: str | os.PathLike) -> dict:
    """Read and check a scores.json (fine_tuning.write_scores). Raises InputError that names file
    and remedy.
    """
    remedy = "make it again with the task's program, or take it away"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is no readable JSON ({one_line(error)}); {remedy}") from error
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
    content["kind"] = content["task"]
    content["task"] = "lm" if content["task"] in KINDS_OF_LM else content["task"]
    if content["task"] not in TASKS:
        raise InputError(
            f"{path}: is of a task {content['task']!r}; expected one of {', '.join(TASKS)};"
            f" {remedy}"
        )
    runs = content["runs"] if isinstance(content["runs"], list) else []
    metrics = [
        content["score"],
        *(run.get("metrics") if isinstance(run, dict) else None for run in runs),
    ]
    if not runs or not all(map(are_figures, metrics)):
        raise InputError(f"{path}: holds no metrics, or some that are no finite numbers; {remedy}")
    for found in metrics:
        if TASKS[content["task"]].score_key not in found:
            raise InputError(
                f"{path}: has {', '.join(found)}; expected {TASKS[content['task']].score_key} for"
                f" {content['task']}; {remedy}"
            )
    return content


def are_figures(metrics: object) -> bool:
    """True for a non-empty object of finite numbers."""
    return (
        isinstance(metrics, dict)
        and bool(metrics)
        and all(
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            for value in metrics.values()
        )
    )


def kept_scores(args: argparse.Namespace, role: str, task: str) -> Path:
    """Name the file in which the score of a model and task is kept."""
    return Path(args.output_dir, "scores", short_name(models_of(args)[role]), task, "scores.json")


def read_all_scores(args: argparse.Namespace, problems: list[str]) -> dict[tuple[str, str], dict]:
    """Read the scores given with --scores and those kept in the output folder; note what is wrong
    with them.
    """
    roles = {short_name(name): role for role, name in models_of(args).items()}
    found: dict[tuple[str, str], dict] = {}
    for path in args.scores:
        with collecting(problems):
            content = read_scores(path)
            where = f"--scores {path}"
            if content["model_name"] not in roles:
                raise InputError(
                    f"{where}: is of {content['model_name']}; expected one of {', '.join(roles)};"
                    " leave it out"
                )
            if args.tasks and content["task"] not in args.tasks:
                raise InputError(
                    f"{where}: is of {content['task']}, which --tasks leaves out; add it there, or"
                    " leave it out"
                )
            key = roles[content["model_name"]], content["task"]
            if key in found:
                raise InputError(
                    f"{where}: a second file of {content['model_name']} and {key[1]}; leave one out"
                )
            require_same(content, kept_scores(args, *key), where)
            found[key] = content
    for name, role in roles.items():
        for task in args.tasks or TASKS:
            path = kept_scores(args, role, task)
            if path.exists() and (role, task) not in found:
                with collecting(problems):
                    found[role, task] = of_model_and_task(read_scores(path), name, task, path)
    return found


def require_same(content: Mapping, kept: Path, where: str) -> None:
    """Raise InputError where another score is kept already for the model and task of a given
    one.
    """
    if kept.exists() and read_scores(kept) != content:
        raise InputError(f"{where}: {kept} holds another score; take one of the two away")


def keep_given(args: argparse.Namespace, found: Mapping[tuple[str, str], Mapping]) -> None:
    """Copy the scores that were given, so that a table is made again without them."""
    for (role, task), content in found.items():
        path = kept_scores(args, role, task)
        if not path.exists():
            write_json(
                path,
                {
                    **{key: value for key, value in content.items() if key != "kind"},
                    "task": content["kind"],
                },
            )


def of_model_and_task(content: dict, name: str, task: str, path: Path) -> dict:
    """Return scores after a check that they are of this model and task."""
    if (content["model_name"], content["task"]) != (name, task):
        raise InputError(
            f"{path}: is of {content['model_name']} and {content['task']}; expected {name} and"
            f" {task}; move it to its folder"
        )
    return content


def data_folder(data_dir: str, task: str) -> Path:
    """Find a task's folder in the data: by the task's name, or by GLUE's."""
    folder = Path(data_dir, task)
    return folder if folder.is_dir() else Path(data_dir, TASKS[task].title)


def squad_files(data_dir: str, task: str) -> list[Path]:
    """Name SQuAD's two files in the data folder, which keep the names they come with."""
    train, (scored,) = TASKS[task].train, TASKS[task].scored["dev"]
    return [data_folder(data_dir, task) / part.patterns[0] for part in (train, scored)]


def into(folder: Path) -> list[str]:
    """List the flags that name the folder of a run; what a run that came to no score left in it is
    replaced.
    """
    return ["--output_dir", str(folder), *(["--overwrite_output_dir"] if folder.exists() else [])]


def run_squad(args: argparse.Namespace, role: str, task: str, path: Path) -> None:
    """Fine-tune and score a model on SQuAD, a folder a seed, and bring the seeds' scores together
    in `path`.
    """
    model, contents = models_of(args)[role], []
    train_file, predict_file = squad_files(args.data_dir, task)
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
        *shlex.split(args.task_flags),
    ]
    for seed in args.seeds or [42]:
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


def run_lm(args: argparse.Namespace, role: str, task: str, path: Path) -> None:
    """Score a model on held-out text, beside the teacher where it is not the teacher."""
    model = models_of(args)[role]
    teacher = [] if role == "teacher" else ["--teacher", args.teacher]
    text = (
        ["--data_file", args.lm_data_file]
        if args.lm_data_file
        else ["--text_file", args.lm_text_file]
    )
    call(
        ["evaluate_lm.py", "--model", model, *teacher, *text, "--output", str(path)],
        f"lm of {short_name(model)}",
    )


def run_task(args: argparse.Namespace, role: str, task: str, path: Path) -> None:
    """Fine-tune and score a model on a task."""
    model = models_of(args)[role]
    seeds = ["--seeds", *map(str, args.seeds)] if args.seeds else []
    flags = [
        "--task",
        task,
        "--model_name_or_path",
        model,
        "--data_dir",
        str(data_folder(args.data_dir, task)),
    ]
    call(
        ["run_task.py", *flags, *into(path.parent), *seeds, *shlex.split(args.task_flags)],
        f"{task} of {short_name(model)}",
    )


RUNNERS = {"squad": run_squad, "squad_v2": run_squad, "lm": run_lm}  # the others: run_task


def call(command: Sequence[str], what: str) -> None:
    """Run one of the project's programs and show what it prints. Raises InputError with its error
    lines where it fails.
    """
    program, *flags = command
    print(f"\n$ python scripts/{program} {shlex.join(flags)}", flush=True)
    errors = []
    words = [sys.executable, str(SCRIPTS / program), *flags]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, errors="replace") as child:
        try:
            for line in child.stderr:
                if line.startswith(f"{program}: error: "):  # ours to say, once
                    errors.append(f"{what}: {program}: {line.partition(': error: ')[2].strip()}")
                else:
                    sys.stderr.write(line)
        except BaseException:
            child.terminate()
            raise
    if child.returncode:
        raise InputError(
            "\n".join(errors)
            or f"{what}: {program} ended with status {child.returncode}; see what it printed"
        )


def run_missing(args: argparse.Namespace, found: dict[tuple[str, str], dict]) -> None:
    """Run the programs of the models and tasks that have no scores yet, and add their scores."""
    for task in args.tasks:
        for role, model in models_of(args).items():
            if (role, task) in found:
                logger.info("%s of %s: the score that is kept.", task, short_name(model))
                continue
            path, name = kept_scores(args, role, task), short_name(model)
            path.parent.parent.mkdir(parents=True, exist_ok=True)
            RUNNERS.get(task, run_task)(args, role, task, path)
            if not path.exists():
                raise InputError(
                    f"{task} of {name}: its program wrote no {path}; is --task_flags"
                    f" {args.task_flags!r} to blame?"
                )
            found[role, task] = of_model_and_task(read_scores(path), name, task, path)


# --------------------------------------------------------------------------------------------------
# Sizes and speed
# --------------------------------------------------------------------------------------------------


def count_parameters(config) -> tuple[int, int, str]:
    """Count (parameters of the base model, with its head, the head's class); tied ones once.

    As for the 2019 figures the base model is AutoModel's: BERT's with its pooler, which its
    masked-LM class lacks.
    """
    kind = (config.architectures or ["AutoModel"])[0]
    with quiet_transformers(), torch.device("meta"):
        base = transformers.AutoModel.from_config(config)
        head_class = getattr(transformers, kind, None)
        has_head = isinstance(head_class, type) and issubclass(
            head_class, transformers.PreTrainedModel
        )
        whole = head_class(config) if has_head else base
    return tuple(sum(p.numel() for p in model.parameters()) for model in (base, whole)) + (kind,)


def weight_files(name: str) -> list[Path]:
    """List the files that hold a model's weights: one, or the shards that an index names."""
    for file in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        with quiet_transformers():
            path = transformers.utils.cached_file(
                name, file, _raise_exceptions_for_missing_entries=False
            )
        if path and file.endswith(".index.json"):
            shards = set(json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values())
            return [Path(transformers.utils.cached_file(name, shard)) for shard in sorted(shards)]
        if path:
            return [Path(path)]
    return []


def dtypes_of(files: Sequence[Path]) -> list[str]:
    """List the number formats in files of weights, by their names in torch; empty where the files
    don't say.
    """
    import safetensors

    found = set()
    for path in files:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                found |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    return sorted(found)


def measure_size(role: str, name: str) -> dict:
    """Measure a model's size, and describe what it reads. Raises InputError that names the flag
    `role`.
    """
    config = load_config(None, name, f"--{role}")
    tokenizer = load_any_tokenizer(name, f"--{role}")
    files = weight_files(name)
    if not files:
        raise InputError(
            f"--{role} {name}: has neither model.safetensors nor pytorch_model.bin; name a whole"
            " model"
        )
    try:
        dtypes = dtypes_of(files)
    except Exception as error:  # safetensors has errors of its own
        raise InputError(
            f"--{role} {name}: its weights could not be read ({one_line(error)}); take another copy"
        ) from error
    try:
        base, whole, kind = count_parameters(config)
    except Exception as error:  # sizes that contradict each other fail each in its own way
        raise InputError(
            f"--{role} {name}: no model can be made of its config.json ({one_line(error)});"
            " correct it"
        ) from error
    return {
        "name": short_name(name),
        "path": name,
        "model_type": config.model_type,
        "head": kind,
        "parameters_base": base,
        "parameters": whole,
        "weights_bytes": sum(path.stat().st_size for path in files),
        "weights_dtypes": dtypes,
        "float32_bytes": 4 * whole,
        "float16_bytes": 2 * whole,
        "longest_input": longest_input(config),
        "vocabulary_size": len(tokenizer),
        "vocabulary_sha256": vocabulary_fingerprint(tokenizer),
    }


def plan_facts(args: argparse.Namespace) -> dict | None:
    """Describe a timing plan, so that figures of another one are told apart; None without
    timing.
    """
    return None if args.no_speed else {**dataclasses.asdict(plan_of(args)), "data": args.data}


def read_measurements(args: argparse.Namespace) -> dict | None:
    """Read the kept sizes and speeds; None where there are none of these models (and, to be run, of
    this plan).
    """
    path = Path(args.output_dir, "measurements.json")
    if not path.exists() or (args.measure and not args.no_run):
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        paths = {role: size["path"] for role, size in kept["sizes"].items()}
        is_of_plan = (
            args.no_run or kept["plan"] == json.loads(json.dumps(plan_facts(args))) or args.no_speed
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: is no readable file of ours ({one_line(error)}); take it away"
        ) from error
    return kept if paths == models_of(args) and is_of_plan else None


def measurements(args: argparse.Namespace) -> dict:
    """Return sizes and speeds, kept or measured now: {"sizes": {role: ..}, "speed":
    latency.measure's, "plan", "date"}.
    """
    kept = read_measurements(args)
    if kept is not None:
        return {**kept, "speed": None} if args.no_speed else kept
    if args.no_run:
        return {"sizes": {}, "speed": None, "date": None}
    models = models_of(args)
    sizes = {role: measure_size(role, name) for role, name in models.items()}
    speed = None
    if not args.no_speed:
        plan = plan_of(args)
        sentences = latency.read_sentences(args.data)[: plan.num_sentences] if args.data else None
        speed = latency.measure(models, plan, sentences, "model")
    found = {
        "sizes": sizes,
        "speed": speed,
        "plan": plan_facts(args),
        "date": f"{datetime.date.today()}",
    }
    write_json(Path(args.output_dir, "measurements.json"), found)
    return found


# --------------------------------------------------------------------------------------------------
# Comparison
# --------------------------------------------------------------------------------------------------


def figure_of(task: str, content: Mapping) -> dict:
    """Draw a task's figure out of its scores: {"score", "least", "largest", "num_seeds", "metrics",
    ..}.
    """
    name = TASKS[task].score_key
    of_seeds = [run["metrics"][name] for run in content["runs"]]
    return {
        "score": content["score"][name],
        "least": min(of_seeds),
        "largest": max(of_seeds),
        "num_seeds": len(of_seeds),
        "metrics": content["score"],
        "fine_tuned_with_teacher": content.get("teacher"),
        "num_examples": content["runs"][0].get("num_examples"),
        "date": content.get("date"),
        "commit": content.get("commit"),
        "flags": content.get("flags"),
        "kind": content["kind"],
    }


def retention(score: float, teacher: float, lower_is_better: bool) -> float | None:
    """Return what a model keeps of its teacher's quality, in %; None where a ratio means nothing (a
    teacher at or below 0).

    100 x score / teacher; where lower is better 100 x teacher / score: twice the teacher's
    perplexity counts as 50.
    """
    part, whole = (teacher, score) if lower_is_better else (score, teacher)
    return 100 * part / whole if whole > 0 and teacher > 0 else None


def is_within_spread(figure: Mapping, teacher: Mapping) -> bool | None:
    """Say whether a difference is smaller than the wider of the two spreads over seeds; None where
    both have one seed.
    """
    if max(figure["num_seeds"], teacher["num_seeds"]) < 2:
        return None
    spread = max(row["largest"] - row["least"] for row in (figure, teacher))
    return abs(figure["score"] - teacher["score"]) < spread


def compare(task: str, figures: Mapping[str, Mapping]) -> dict:
    """Set the models' figures on a task beside each other."""
    row = TASKS[task]
    entry = {
        "title": row.title,
        "metric": row.metric_title,
        "lower_is_better": row.lower_is_better,
        "models": dict(figures),
    }
    others = (
        {role: figure for role, figure in figures.items() if role != "teacher"}
        if "teacher" in figures
        else {}
    )
    teacher = figures.get("teacher")
    entry["retention"] = {
        r: (
            retention(f["score"], teacher["score"], row.lower_is_better)
            if f["kind"] == teacher["kind"]
            else None
        )
        for r, f in others.items()
    }
    entry["within_spread"] = {r: is_within_spread(f, teacher) for r, f in others.items()}
    return entry


def macro_score(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Average GLUE's tasks: {"macro": over all nine, "macro_without_wnli": over eight}; None where
    one is missing.
    """
    if any(task not in scores for task in GLUE_TASKS if task != "wnli"):
        return {"macro": None, "macro_without_wnli": None}
    found = glue_macro({"wnli": math.nan, **scores})
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def compose(
    args: argparse.Namespace, found: Mapping[tuple[str, str], Mapping], measured: Mapping
) -> dict:
    """Make the report's content, as report.json holds it."""
    roles = list(models_of(args))
    quality = {
        task: compare(
            task,
            {role: figure_of(task, found[role, task]) for role in roles if (role, task) in found},
        )
        for task in args.tasks
    }
    macro = {
        r: macro_score({t: q["models"][r]["score"] for t, q in quality.items() if r in q["models"]})
        for r in roles
    }
    return {
        "format": FORMAT,
        "date": f"{datetime.date.today()}",
        "commit": git_facts(SCRIPTS).get("repo_sha"),
        "models": {
            role: {"name": short_name(name), "path": name} for role, name in models_of(args).items()
        },
        "quality": quality,
        "glue": {"scores": macro, "retention": macro_retention(macro)},
        "sizes": measured["sizes"],
        "speed": measured["speed"],
        "measured": measured["date"],
        "notes": notes(quality, measured["sizes"]),
    }


def macro_retention(
    macro: Mapping[str, Mapping[str, float | None]],
) -> dict[str, dict[str, float | None]]:
    """Return {role: {as macro_score: % of the teacher's macro score}}, None where either is
    missing.
    """
    teacher = macro["teacher"]
    return {
        role: {
            k: retention(v, teacher[k], False) if v is not None and teacher[k] is not None else None
            for k, v in own.items()
        }
        for role, own in macro.items()
        if role != "teacher"
    }


def notes(quality: Mapping[str, Mapping], sizes: Mapping[str, Mapping]) -> list[str]:
    """Say, a sentence each, what a reader must know to read the tables rightly."""
    lines = [
        "A score is the median over seeds unless its program says otherwise (least-largest in"
        " brackets); rates x 100."
    ]
    lines.append(
        "% of teacher: 100 x score / teacher's score; not given where the teacher's is not above 0."
    )
    if any(entry["lower_is_better"] for entry in quality.values()):
        lines.append(
            "↓ lower is better: % of teacher is 100 x teacher's / model's there, and no part of a"
            " macro score."
        )
    if any(
        is_within for entry in quality.values() for is_within in entry["within_spread"].values()
    ):
        lines.append(
            "≈ the difference from the teacher is smaller than the spread over seeds (the wider of"
            " the two)."
        )
    lines += [
        f"{entry['title']}: the models were scored on different examples; their scores can't be"
        " compared."
        for entry in quality.values()
        if not is_of_same_examples(entry)
    ]
    if any(
        is_of_one_seed(figure) for entry in quality.values() for figure in entry["models"].values()
    ):
        lines.append("¹ one seed: its spread is not known.")
    helped = {
        (q["title"], r): f["fine_tuned_with_teacher"]
        for q in quality.values()
        for r, f in q["models"].items()
    }
    lines += [
        f"{title}: the {role} was fine-tuned with a teacher for the task, {teacher}."
        for (title, role), teacher in helped.items()
        if teacher and title != TASKS["lm"].title
    ]
    if any(
        len({figure["kind"] for figure in entry["models"].values()}) > 1
        for entry in quality.values()
    ):
        lines.append(
            "A masked model's perplexity is no causal one's: no % of teacher is given for it."
        )
    if len({size["vocabulary_sha256"] for size in sizes.values()}) > 1:
        lines.append(
            "The models have different vocabularies: perplexities are a token's, and can't be"
            " compared; latency can."
        )
    return lines


def is_of_same_examples(entry: Mapping) -> bool:
    """Say whether as many examples of each set were scored for every model, by the same metrics; a
    text has no examples.
    """
    counts = [
        {k: n for k, n in (figure["num_examples"] or {}).items() if k != "train"}
        for figure in entry["models"].values()
    ]
    names = [set(figure["metrics"]) for figure in entry["models"].values()]
    return entry["lower_is_better"] or (counts[1:] == counts[:-1] and names[1:] == names[:-1])


# --------------------------------------------------------------------------------------------------
# Markdown and picture
# --------------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    """Write a percentage, - where there is none."""
    return "-" if value is None else f"{value:.1f} %"


def score_cell(figure: Mapping | None) -> str:
    """Write a score with its spread."""
    if figure is None:
        return "not run"
    spread = (
        f" ({figure['least']:.1f}-{figure['largest']:.1f})"
        if figure["num_seeds"] > 1
        else "¹" * is_of_one_seed(figure)
    )
    return f"{figure['score']:.2f}{spread}"


def is_of_one_seed(figure: Mapping) -> bool:
    """True for a score of a single fine-tuning run; held-out text is scored without one."""
    return figure["num_seeds"] < 2 and figure["kind"] not in KINDS_OF_LM


def quality_table(report: Mapping) -> str:
    """Lay the scores out: a row a task, then the macro scores."""
    roles = list(report["models"])
    others = roles[1:]
    lines = [
        [
            "task",
            "metric",
            *(f"{role} {report['models'][role]['name']}" for role in roles),
            *(f"{role}, % of teacher" for role in others),
        ]
    ]
    for entry in report["quality"].values():
        kept = [
            percent(entry["retention"].get(r)) + (" ≈" if entry["within_spread"].get(r) else "")
            for r in others
        ]
        arrow = " ↓" if entry["lower_is_better"] else ""
        cells = [score_cell(entry["models"].get(role)) for role in roles]
        lines.append([entry["title"], f"{entry['metric']}{arrow}", *cells, *kept])
    glue = report["glue"]
    for name, title in (("macro", "GLUE macro score"), ("macro_without_wnli", "GLUE without WNLI")):
        scores = [glue["scores"][role][name] for role in roles]
        if any(score is not None for score in scores):
            cells = ["-" if score is None else f"{score:.1f}" for score in scores]
            lines.append(
                [
                    title,
                    "mean of the tasks",
                    *cells,
                    *(percent(glue["retention"][r][name]) for r in others),
                ]
            )
    return markdown(lines) if len(lines) > 1 else "No scores: not run."


def metrics_table(report: Mapping) -> str:
    """Lay all metrics of all tasks out, for those of more than one: a row a metric."""
    roles = list(report["models"])
    lines = [["task", "metric", *roles]]
    for entry in report["quality"].values():
        found = dict.fromkeys(
            name for figure in entry["models"].values() for name in figure["metrics"]
        )
        # The one number has its own table; a teacher's figures beside a student's on held-out text
        # stand in its own column.
        names = [name for name in found if name != "score" and "teacher_" not in name]
        for name in names if len(names) > 1 else []:
            values = [
                entry["models"].get(role, {"metrics": {}})["metrics"].get(name) for role in roles
            ]
            lines.append(
                [
                    entry["title"],
                    name,
                    *("-" if value is None else f"{value:.4g}" for value in values),
                ]
            )
    return markdown(lines) if len(lines) > 1 else ""


SIZE_ROWS = {
    "parameters, base model (M)": ("parameters_base", 1e6),
    "parameters, with head (M)": ("parameters", 1e6),
    "weights on disk (MB)": ("weights_bytes", 1e6),
    "float32 weights, computed (MB)": ("float32_bytes", 1e6),
    "float16 weights, computed (MB)": ("float16_bytes", 1e6),
}


def size_table(report: Mapping) -> str:
    """Lay the sizes out: a row a measure, with student / teacher."""
    sizes = report["sizes"]
    if not sizes:
        return "Sizes: not measured."
    others = list(sizes)[1:]
    lines = [
        [
            "size",
            *(f"{role} {size['name']}" for role, size in sizes.items()),
            *(f"{r} / teacher" for r in others),
        ]
    ]
    for title, (key, unit) in SIZE_ROWS.items():
        ratios = [f"{sizes[role][key] / sizes['teacher'][key]:.3f}" for role in others]
        lines.append([title, *(megas(size[key] / unit) for size in sizes.values()), *ratios])
    formats = [
        ", ".join(size["weights_dtypes"]) or "not said by the file" for size in sizes.values()
    ]
    lines.append(["number format on disk", *formats, *("" for _ in others)])
    lines.append(
        ["class of the head", *(size["head"] for size in sizes.values()), *("" for _ in others)]
    )
    return markdown(lines)


def megas(value: float) -> str:
    """Write millions with two digits after the point, small ones with three significant digits."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def speed_text(report: Mapping) -> str:
    """Lay the timings out, and say what they were made on."""
    speed = report["speed"]
    if not speed:
        return "Latency: not measured."
    facts = {
        key: f"{value:.1f}" if isinstance(value, float) else value
        for key, value in speed["machine"].items()
    }
    machine = ", ".join(f"{key} {value}" for key, value in facts.items())
    return (
        f"{latency.table(speed)}\n\nForward passes of the model without its head, {speed['dtype']},"
        f" {speed['threads']} CPU thread(s); median of {speed['passes']} passes after warm-up, the"
        f" models in turns. Inputs: {speed['inputs']}. Speed-up: the teacher's time / the model's,"
        f" pass by pass. Measured on {report['measured']}.\n\nMachine: {machine}."
    )


def as_markdown(report: Mapping) -> str:
    """Write the report as Markdown."""
    models = report["models"]
    title = f"# {models['student']['name']}, distilled from {models['teacher']['name']}"
    listed = [f"* {role}: `{model['path']}`" for role, model in models.items()]
    parts = [
        title,
        "\n".join(listed),
        "## Quality",
        quality_table(report),
        "\n".join(f"* {line}" for line in report["notes"]),
    ]
    if more := metrics_table(report):
        parts += ["All metrics:", more]
    parts += ["## Size", size_table(report), "## Speed", speed_text(report)]
    parts += [
        "![Quality kept, and size and speed](report.png)",
        f"Made by scripts/report.py on {report['date']}.",
    ]
    return "\n\n".join(parts) + "\n"


COLORS = {"student": "tab:blue", "baseline": "tab:orange"}


def retention_bars(report: Mapping) -> dict[str, dict[str, float]]:
    """Collect the picture's left bars: {task: {role: % of the teacher}}, the macro score last."""
    bars = {}
    for entry in report["quality"].values():
        kept = {role: value for role, value in entry["retention"].items() if value is not None}
        bars |= {entry["title"] + (" ↓" if entry["lower_is_better"] else ""): kept} if kept else {}
    macro = {
        r: own["macro"]
        for r, own in report["glue"]["retention"].items()
        if own["macro"] is not None
    }
    return bars | ({"GLUE macro": macro} if macro else {})


def ratio_bars(report: Mapping) -> dict[str, dict[str, float]]:
    """Collect the picture's right bars: {measure: {role: times smaller or faster than the
    teacher}}.
    """
    sizes, bars = report["sizes"], {}
    for title, key in (("parameters", "parameters_base"), ("weights on disk", "weights_bytes")):
        if sizes:
            bars[title] = {
                role: sizes["teacher"][key] / sizes[role][key] for role in list(sizes)[1:]
            }
    for row in (report["speed"] or {"rows": []})["rows"]:
        title = f"speed, {row['device']}, batch {row['batch_size']},\n{row['padding']}"
        bars[title] = {r: row["models"][r]["speed_up"]["median"] for r in list(row["models"])[1:]}
    return bars


def draw(report: Mapping, path: Path) -> None:
    """Draw what the student keeps of the teacher's quality, and how much smaller and faster it
    is.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("Quality kept, % of the teacher", retention_bars(report), 100, "{:.1f}"),
        ("Times smaller, or faster, than the teacher", ratio_bars(report), 1, "{:.2f}×"),
    )
    roles = [role for role in report["models"] if role != "teacher"]
    rows = max(2, *(len(bars) for _, bars, _, _ in panels))
    height = 1.6 + 0.3 * rows * (len(roles) + 0.6)
    figure, axes = plt.subplots(1, 2, figsize=(13, height), layout="constrained")
    for axis, (title, bars, mark, style) in zip(axes, panels, strict=True):
        draw_bars(axis, bars, roles, mark, style)
        axis.set_title(title)
    names = " and ".join(f"{report['models'][role]['name']} ({role})" for role in roles)
    figure.suptitle(f"{names}; teacher {report['models']['teacher']['name']}", wrap=True)
    if len(roles) > 1:
        figure.legend(
            *next(a for a in axes if a.has_data()).get_legend_handles_labels(),
            loc="outside lower center",
            ncols=2,
        )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def draw_bars(
    axis, bars: Mapping[str, Mapping[str, float]], roles: Sequence[str], mark: float, style: str
) -> None:
    """Draw horizontal bars, one a role in each group, with their values and a line at the
    teacher's.
    """
    if not bars:
        axis.text(0.5, 0.5, "not run", ha="center", va="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    thickness = 0.8 / len(roles)
    for k, role in enumerate(roles):
        places = [
            n + thickness * (k - (len(roles) - 1) / 2)
            for n, kept in enumerate(bars.values())
            if role in kept
        ]
        values = [kept[role] for kept in bars.values() if role in kept]
        drawn = axis.barh(places, values, thickness, color=COLORS[role], label=role)
        labels = [style.format(value) for value in values]
        axis.bar_label(
            drawn, labels, padding=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}
        )
    axis.axvline(mark, color="black", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(bars)), list(bars))
    axis.set_ylim(len(bars) - 0.5, -0.5)  # the first on top
    axis.set_xlim(min(0, *axis.get_xlim()), max(axis.get_xlim()[1], mark) * 1.12)


# --------------------------------------------------------------------------------------------------
# All of it
# --------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Run the program: gather the scores, measure, write the report and the card."""
    args = parse(argv)
    setup_logging(logging.INFO)
    exit_on_sigterm()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    found = check_arguments(args)
    keep_given(args, found)
    if not args.no_run:
        run_missing(args, found)
    report = compose(args, found, measurements(args))
    folder = Path(args.output_dir)
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
