"""The flags of run_task.py and the checks of their values.

Imports neither torch nor transformers: the program parses first and imports the rest after.
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from distil.models.casing import add_casing_flags
from distil.system.files import (
    content_of,
    file_problem,
    is_folder,
    is_regular,
    output_problem,
)
from distil.tasks.options import (
    NumberFlag,
    add_number_flags,
    add_switches,
    lacks_gpu,
    number_problems,
    second_step_problems,
)
from distil.tasks.schema import Settings, Task
from distil.tasks.tasks import TASKS
from utils import raise_problems

MIN_LENGTH = 8  # the special tokens of a pair, and some text
TEXT_FLAGS = {
    "model_name_or_path": "hub name or local folder of the model to fine-tune, or to score",
    "tokenizer_name": "hub name or local folder (default: the model's)",
    "data_dir": "folder of the task's own files; without it the data comes from the hub",
    "dataset_name": "data set on the hub (default: the task's)",
    "output_dir": "folder for scores.json and one folder per seed",
    "split": (
        "which set is scored, where a task has several (default: the one that is published: dev or"
        " test)"
    ),
}
NUMBERS = {
    "alpha_ce": NumberFlag(0.5, "weight of the distance from the teacher"),
    "alpha_task": NumberFlag(0.5, "weight of the task's loss, with a teacher"),
    "temperature": NumberFlag(2.0, "of both softmaxes"),
    "max_seq_length": NumberFlag(
        None, "longest input, in tokens; size of WikiText's blocks", (MIN_LENGTH, 1e6), int
    ),
    "per_gpu_train_batch_size": NumberFlag(
        None, "examples per process and micro-batch", (1, 1e6), int
    ),
    "per_gpu_eval_batch_size": NumberFlag(None, "", (1, 1e6), int),
    "learning_rate": NumberFlag(None, "", (0, 1), float),
    "num_train_epochs": NumberFlag(None, "", (1e-6, 1e6), float),
    "max_steps": NumberFlag(-1, "updates, in place of epochs where above 0", (-1, 1e9)),
    "gradient_accumulation_steps": NumberFlag(1, "micro-batches per update", (1, 1e6)),
    "warmup_steps": NumberFlag(0, "updates of rising rate", (0, 1e9)),
    "weight_decay": NumberFlag(0.0, "", (0, 1)),
    "adam_epsilon": NumberFlag(1e-8, "", (0, 1)),
    "max_grad_norm": NumberFlag(1.0, "", (0, 1e9)),
    "logging_steps": NumberFlag(50, "updates between two lines of log", (1, 1e9)),
}
SWITCHES = {
    "no_cuda": "stay on the CPU",
    "fp16": "mixed precision, float16 (GPU)",
    "bf16": "mixed precision, bfloat16",
    "overwrite_output_dir": "replace the results of an earlier run in output_dir",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add run_task.py's flags."""
    add = parser.add_argument
    names = [name for name, task in TASKS.items() if task.read]
    add("--task", required=True, choices=names, help="what to fine-tune for")
    for name, text in TEXT_FLAGS.items():
        add(f"--{name}", help=text)
    add("--languages", nargs="+", help="XNLI: languages that are scored (default: all in the file)")
    add(
        "--encoding",
        default="utf-8",
        help="of the data files; German CoNLL-2003 is latin-1 (default: %(default)s)",
    )
    add("--do_train", action="store_true", help="fine-tune (default: both, where neither is named)")
    add("--do_eval", action="store_true", help="score")
    add(
        "--score_predictions", metavar="FILE", help="score a file of predictions, without any model"
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[42],
        help="one run per seed; scores are the median (default: 42)",
    )
    add(
        "--save_models",
        choices=("median", "all", "none"),
        default="median",
        help="whose model is kept (default: the median seed's)",
    )
    add("--teacher_name_or_path", help="model fine-tuned for this task, to learn from as well")
    add(
        "--label_order",
        nargs="+",
        metavar="NAME",
        help="the task's classes in the order of the teacher's outputs, or of those of the model"
        " that is scored (default: as the model's configuration names them)",
    )
    add_number_flags(parser, NUMBERS)
    add_switches(parser, SWITCHES)
    add_casing_flags(parser)


def with_settings(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the task's settings, and both --do_train and --do_eval where neither is given."""
    args.is_length_given = args.max_seq_length is not None
    for field in dataclasses.fields(Settings):
        if getattr(args, field.name) is None:
            setattr(args, field.name, getattr(TASKS[args.task].settings, field.name))
    if not (args.do_train or args.do_eval):
        args.do_train = args.do_eval = True
    args.split = args.split or next(iter(TASKS[args.task].scored))
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError naming all problems of the arguments, one line each."""
    problems = number_problems(args, NUMBERS) + _data_problems(args)
    problems += _scoring_problems(args) if args.score_predictions else _run_problems(args)
    raise_problems(problems)


def _data_problems(args: argparse.Namespace) -> list[str]:
    task, problems = TASKS[args.task], []
    if args.split not in task.scored:
        problems.append(f"--split {args.split}: {args.task} has {' and '.join(task.scored)}")
    if args.languages and args.task != "xnli":
        problems.append(f"--languages: {args.task} has one language; leave the flag out")
    if args.data_dir is not None and not os.path.isdir(args.data_dir):
        problems.append(f"--data_dir {args.data_dir}: no such folder; check the path")
    if args.data_dir is not None and args.dataset_name:
        problems.append(
            "--data_dir and --dataset_name: one source of data is expected; leave one out"
        )
    if args.data_dir is None and not (args.dataset_name or task.hub.name):
        problems.append(
            f"--data_dir: {args.task} has no default data set on the hub; name a folder, or a"
            " --dataset_name"
        )
    if args.label_order:
        problems += _label_order_problems(args, task)
    try:
        "a".encode(args.encoding)
    except (LookupError, ValueError):
        problems.append(
            f"--encoding {args.encoding}: no such encoding of text; utf-8 and latin-1 are usual"
        )
    return problems


def _label_order_problems(args: argparse.Namespace, task: Task) -> list[str]:
    flag = f"--label_order {' '.join(args.label_order)}"
    if args.score_predictions or (args.do_train and not args.teacher_name_or_path):
        return [f"{flag}: no fine-tuned model is read; leave it out, or name a teacher"]
    if task.head not in ("classes", "tokens"):
        return [f"{flag}: {args.task} has no classes; leave it out"]
    if task.head == "tokens":
        twice = len(set(args.label_order)) < len(args.label_order)
        return [f"{flag}: a name is there twice; name each class once"] if twice else []
    if task.labels_by_name(args.label_order):
        return []
    return [
        f"{flag}: expected {' '.join(task.labels)}, each once, in the order of the model's outputs"
    ]


def _scoring_problems(args: argparse.Namespace) -> list[str]:
    problems = [file_problem(args.score_predictions, "--score_predictions")]
    if TASKS[args.task].head == "next tokens":
        problems.append(
            f"--score_predictions: {args.task} has a perplexity, not predictions; run --do_eval"
        )
    return [problem for problem in problems if problem]


def _run_problems(args: argparse.Namespace) -> list[str]:
    problems = [
        f"--{name}: is missing; see --help"
        for name in ("model_name_or_path", "output_dir")
        if not getattr(args, name)
    ]
    if args.output_dir:
        problems += _output_problems(args)
    problems += second_step_problems(
        args.teacher_name_or_path is not None,
        args.alpha_ce,
        args.alpha_task,
        args.temperature,
        "alpha_task",
    )
    if args.teacher_name_or_path and not args.do_train:
        problems.append(
            "--teacher_name_or_path: teaches in training only; add --do_train, or leave the"
            " teacher out"
        )
    if len(set(args.seeds)) < len(args.seeds) or any(not 0 <= seed < 2**32 for seed in args.seeds):
        problems.append(
            f"--seeds {' '.join(map(str, args.seeds))}: expected different ones from 0 to 2^32 - 1"
        )
    if len(args.seeds) > 1 and not args.do_train:
        problems.append("--seeds: without --do_train nothing depends on the seed; name one")
    if lacks_gpu(args):
        problems.append("--fp16: needs a GPU; leave it out, or take --bf16")
    if args.fp16 and args.bf16:
        problems.append("--fp16 and --bf16: one precision is expected; leave one out")
    return problems


def _output_problems(args: argparse.Namespace) -> list[str]:
    if problem := output_problem(args.output_dir, "--output_dir", is_folder=True):
        return [problem]
    where = f"--output_dir {args.output_dir}"
    if os.path.isdir(args.output_dir) and content_of(args.output_dir):
        if not args.overwrite_output_dir:
            return [
                f"{where}: is not empty; name another, or replace its results with"
                " --overwrite_output_dir"
            ]
        if foreign := _foreign_in(args):
            return [f"{where}: its {foreign} is of no earlier run; choose another"]
    inputs = {
        f"--{name}": getattr(args, name)
        for name in ("model_name_or_path", "teacher_name_or_path", "tokenizer_name", "data_dir")
    }
    output = os.path.realpath(args.output_dir)
    written = [os.path.realpath(folder) for folder in seed_folders(args)]
    return [
        f"{where}: the folder of {flag}, which is read, would be written to; choose another"
        for flag, name in inputs.items()
        if name and os.path.exists(name) and _is_written(os.path.realpath(name), output, written)
    ]


def _is_written(place: str, output: str, folders: Sequence[str]) -> bool:
    return place == output or any(Path(place).is_relative_to(folder) for folder in folders)


def _foreign_in(args: argparse.Namespace) -> str | None:
    """Name what --overwrite_output_dir would replace though no run wrote it; None without any."""
    scores = Path(args.output_dir) / "scores.json"
    if os.path.lexists(scores) and not is_scores(scores):
        return scores.name
    for folder in (seed_folder(args, seed) for seed in args.seeds):
        is_free = is_folder(folder) and not any(folder.iterdir())
        if os.path.lexists(folder) and not (is_free or is_of_a_seed(folder)):
            return folder.name
    return None


def is_scores(path: Path) -> bool:
    """True for a scores.json (distil/tasks/scores.py), whole, damaged or empty."""
    if not is_regular(path):
        return False
    with open(path, "rb") as file:
        start = file.read(100)
    return not start or b'"task": ' in start


def seed_folder(args: argparse.Namespace, seed: int) -> Path:
    """Return the folder of a seed's model and predictions."""
    return Path(args.output_dir) / f"seed-{seed}"


FILES_OF_EVERY_SEED = ("predictions.tsv", "log.json")


def is_of_a_seed(folder: Path) -> bool:
    """True for a folder that the run of a seed wrote."""
    return is_folder(folder) and any(is_regular(folder / name) for name in FILES_OF_EVERY_SEED)


def seed_folders(args: argparse.Namespace) -> list[Path]:
    """List the seed folders present in output_dir, and those that the run will write."""
    present = Path(args.output_dir).glob("seed-*")
    numbered = [path for path in present if re.fullmatch(r"seed-\d+", path.name)]
    return list(dict.fromkeys([*numbered, *(seed_folder(args, seed) for seed in args.seeds)]))
