"""The flags of run_squad_w_distillation.py and the checks of their values.

Flags and defaults are those of 2019, but for --score_predictions and --skip_misplaced_answers.
Imports neither torch nor transformers: the program parses first and imports the rest after.
"""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from distil.models.casing import add_casing_flags
from distil.system.files import content_of, file_problem, is_folder, output_problem
from distil.tasks.options import (
    NumberFlag,
    add_number_flags,
    add_switches,
    lacks_gpu,
    number_problems,
    second_step_problems,
)
from distil.tasks.tasks import TASKS
from utils import logger, raise_problems

# Differs from the original: no XLNet, XLM. They have other heads, and no student of theirs can be
# made here.
STUDENT_TYPES = ("bert", "distilbert", "roberta")
TEACHER_TYPES = ("bert", "roberta")
NUM_SPECIAL_TOKENS = {"bert": 3, "distilbert": 3, "roberta": 4}
TEXT_FLAGS = {
    "model_type": {"choices": STUDENT_TYPES, "help": "the student's type"},
    "model_name_or_path": {
        "help": "student: hub name or folder; a folder checkpoint-N with its optimizer: resume it"
    },
    "output_dir": {"help": "folder for checkpoints, model, tokenizer, predictions and scores.json"},
    "teacher_type": {"choices": TEACHER_TYPES, "help": "the teacher's type"},
    "teacher_name_or_path": {
        "help": "teacher, fine-tuned on SQuAD: hub name or folder; none: plain fine-tuning"
    },
    "data_dir": {"default": "", "help": "folder of the files, when they are named without one"},
    "train_file": {
        "help": "SQuAD's JSON to train on (default: train-v1.1.json, or -v2.0, in data_dir)"
    },
    "predict_file": {
        "help": "SQuAD's JSON to answer (default: dev-v1.1.json, or -v2.0, in data_dir)"
    },
    "config_name": {"help": "configuration, where not that of model_name_or_path"},
    "tokenizer_name": {"help": "tokenizer, where not that of model_name_or_path"},
    "score_predictions": {
        "metavar": "FILE",
        "help": "score this file of predictions against --predict_file; nothing else",
    },
}
NUMBERS = {
    "alpha_ce": NumberFlag(0.5, "weight of the distance from the teacher"),
    "alpha_squad": NumberFlag(0.5, "weight of the labels' loss, with a teacher"),
    "temperature": NumberFlag(2.0, "temperature of both softmaxes"),
    "max_seq_length": NumberFlag(
        384,
        "tokens per window, with question and special tokens; shorter ones are padded",
        (8, 1e6),
    ),
    "doc_stride": NumberFlag(128, "tokens between the beginnings of two windows", (1, 1e6)),
    "max_query_length": NumberFlag(64, "tokens a question is cut to", (1, 1e6)),
    "per_gpu_train_batch_size": NumberFlag(
        8, "windows per process (or GPU) and micro-batch", (1, 1e6)
    ),
    "per_gpu_eval_batch_size": NumberFlag(
        8, "windows per process (or GPU) in prediction", (1, 1e6)
    ),
    "learning_rate": NumberFlag(5e-5, "at the beginning", (1e-12, 1)),
    "gradient_accumulation_steps": NumberFlag(1, "micro-batches per update", (1, 1e6)),
    "weight_decay": NumberFlag(0.0, "biases and layer norms excepted", (0, 1)),
    "adam_epsilon": NumberFlag(1e-8, "epsilon of AdamW", (1e-16, 1)),
    "max_grad_norm": NumberFlag(1.0, "the gradient's norm is clipped to this", (0, 1e30)),
    "num_train_epochs": NumberFlag(3.0, "passes over the windows", (1e-6, 1e6)),
    "max_steps": NumberFlag(-1, "updates, in place of num_train_epochs where above 0"),
    "warmup_steps": NumberFlag(0, "updates over which the learning rate rises", (0, 1e9)),
    "n_best_size": NumberFlag(20, "starts, ends and answers looked at", (1, 1e4)),
    "max_answer_length": NumberFlag(30, "tokens of an answer", (1, 1e6)),
    "null_score_diff_threshold": NumberFlag(
        0.0, "v2.0: how much the null's score must be above the best answer's", (-1e30, 1e30)
    ),
    "logging_steps": NumberFlag(50, "updates between two lines of the log", (1, 1e9)),
    "save_steps": NumberFlag(50, "updates between two checkpoints", (1, 1e9)),
    "seed": NumberFlag(
        42, "seed of the head's first weights, of order and dropout", (0, 2**32 - 1)
    ),
}
SWITCHES = {
    "version_2_with_negative": "SQuAD v2.0: some questions have no answer",
    "do_train": "train",
    "do_eval": (
        "answer and score predict_file: by the trained model, or by model_name_or_path without"
        " --do_train"
    ),
    "evaluate_during_training": "score predict_file at each line of the log",
    "eval_all_checkpoints": "answer and score by each checkpoint, too",
    "overwrite_output_dir": "replace the results of an earlier run in output_dir",
    "no_cuda": "run on the CPU",
    "fp16": "mixed precision in float16 (needs a GPU)",
    "skip_misplaced_answers": (
        "leave questions out of training whose answer is not at its place in the context"
    ),
}
WITHOUT_EFFECT = {
    "overwrite_cache": "windows are made anew each time, none are cached",
    "verbose_logging": "what training skips is always logged",
    "threads": "the tokenizer uses all cores",
    "cache_dir": "set HF_HOME in the environment instead",
    "fp16_opt_level": "--fp16 is torch's own mixed precision",
    "local_rank": "the launcher tells each process by the environment",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add run_squad_w_distillation.py's flags."""
    for name, options in TEXT_FLAGS.items():
        parser.add_argument(f"--{name}", **options)
    add_number_flags(parser, NUMBERS)
    add_switches(parser, SWITCHES)
    add_casing_flags(parser)
    ignored = parser.add_argument_group("accepted for old command lines, without effect")
    for name in ("overwrite_cache", "verbose_logging"):
        ignored.add_argument(f"--{name}", action="store_true", help=WITHOUT_EFFECT[name])
    for name, default in {"threads": "1", "cache_dir": "", "fp16_opt_level": "O1"}.items():
        ignored.add_argument(f"--{name}", default=default, help=WITHOUT_EFFECT[name])
    ignored.add_argument(
        "--local_rank", "--local-rank", default="-1", help=WITHOUT_EFFECT["local_rank"]
    )


def warn_of_flags_without_effect(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Warn of each flag given that has no effect any more."""
    for name, reason in WITHOUT_EFFECT.items():
        if str(getattr(args, name)) != str(parser.get_default(name)):
            logger.warning("--%s has no effect any more: %s.", name, reason)


def task_name(args: argparse.Namespace) -> str:
    """Return the name of SQuAD's version in TASKS."""
    return "squad_v2" if args.version_2_with_negative else "squad"


def data_path(args: argparse.Namespace, name: str) -> str:
    """Return the path of train_file or predict_file; by default SQuAD's own name in data_dir."""
    task = TASKS[task_name(args)]
    part = task.train if name == "train_file" else task.scored["dev"][0]
    return os.path.join(args.data_dir, getattr(args, name) or part.patterns[0])


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError naming all problems of the arguments, one line each."""
    problems = [
        f"--{name}: is required"
        for name in ("model_type", "model_name_or_path", "output_dir")
        if not getattr(args, name)
    ]
    problems += number_problems(args, NUMBERS)
    if lacks_gpu(args):
        problems.append("--fp16: needs a GPU; leave it out")
    problems += [
        *_what_to_do_problems(args),
        *_teacher_problems(args),
        *_length_problems(args),
        *_file_problems(args),
    ]
    raise_problems(problems)


def _what_to_do_problems(args: argparse.Namespace) -> list[str]:
    if not (args.do_train or args.do_eval):
        return ["nothing to do: give --do_train, --do_eval or both, or --score_predictions FILE"]
    needs = {"evaluate_during_training": "do_train", "eval_all_checkpoints": "do_eval"}
    return [
        f"--{flag}: has no effect without --{needed}; add it, or leave the first out"
        for flag, needed in needs.items()
        if getattr(args, flag) and not getattr(args, needed)
    ]


def _teacher_problems(args: argparse.Namespace) -> list[str]:
    has_teacher = bool(args.teacher_name_or_path)
    problems = second_step_problems(
        has_teacher, args.alpha_ce, args.alpha_squad, args.temperature, "alpha_squad"
    )
    if has_teacher != bool(args.teacher_type):
        there, absent = ("name_or_path", "type") if has_teacher else ("type", "name_or_path")
        problems.append(
            f"--teacher_{there}: needs --teacher_{absent}; give both, or none for plain fine-tuning"
        )
    if has_teacher and not args.do_train:
        problems.append(
            "--teacher_name_or_path: teaches in training only; add --do_train, or leave the teacher"
            " out"
        )
    return problems


def _length_problems(args: argparse.Namespace) -> list[str]:
    num_special = NUM_SPECIAL_TOKENS.get(args.model_type, 4)
    room = args.max_seq_length - args.max_query_length - num_special
    if room < 1:
        return [
            f"--max_seq_length {args.max_seq_length}: a question of --max_query_length"
            f" {args.max_query_length} and {num_special} special tokens leave no room for the"
            " context; raise the first or lower the second"
        ]
    if args.doc_stride > room:
        return [
            f"--doc_stride {args.doc_stride}: with a question of --max_query_length"
            f" {args.max_query_length} a window of --max_seq_length {args.max_seq_length} holds"
            f" {room} tokens of the context; expected at most that, so that windows overlap"
        ]
    return []


def _file_problems(args: argparse.Namespace) -> list[str]:
    wanted = {
        "train_file": args.do_train,
        "predict_file": args.do_eval or args.evaluate_during_training,
    }
    problems = [
        file_problem(data_path(args, name), f"--{name}")
        for name, is_wanted in wanted.items()
        if is_wanted
    ]
    if args.output_dir:
        inputs = [data_path(args, name) for name, is_wanted in wanted.items() if is_wanted]
        problems += [
            output_problem(args.output_dir, "--output_dir", inputs, is_folder=True),
            _occupied_problem(args),
        ]
    return [problem for problem in problems if problem]


def _occupied_problem(args: argparse.Namespace) -> str | None:
    """Name the content of output_dir that would be lost; None where there is none."""
    folder = Path(args.output_dir)
    if not folder.is_dir():
        return None
    found = checkpoints_in(folder)
    if args.overwrite_output_dir:
        return _read_and_written_problem(args, found)
    if args.do_train:
        if not content_of(folder) or checkpoint_to_resume(args) in found:
            return None
        resume = f"resume with --model_name_or_path {found[-1]}, " if found else ""
        return (
            f"--output_dir {folder}: is not empty; {resume}choose another, or replace its results"
            " with --overwrite_output_dir"
        )
    written = ("predictions_.json", "nbest_predictions_.json", "scores.json")
    there = [name for name in written if os.path.lexists(folder / name)]
    if there:
        return (
            f"--output_dir {folder}: holds {there[0]} already; choose another, or replace it with"
            " --overwrite_output_dir"
        )
    return None


def _read_and_written_problem(args: argparse.Namespace, removed: Sequence[Path]) -> str | None:
    """Name the input that training replaces, or that lies in what it removes; None without any."""
    if not args.do_train:
        return None
    models = ["teacher_name_or_path", "config_name", "tokenizer_name"]
    models += [] if checkpoint_to_resume(args) else ["model_name_or_path"]
    inputs = {name: getattr(args, name) for name in models}
    inputs |= {name: data_path(args, name) for name in ("train_file", "predict_file")}
    output = os.path.realpath(args.output_dir)
    folders = [os.path.realpath(path) for path in removed]
    for flag, name in inputs.items():
        place = Path(os.path.realpath(name)) if name and os.path.exists(name) else None
        if place and (str(place) == output or any(map(place.is_relative_to, folders))):
            return (
                f"--output_dir {args.output_dir}: --{flag} {name} is read, and would be replaced;"
                " choose another folder"
            )
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """List a run's checkpoint folders, the earliest first."""
    found = {
        path: re.fullmatch(r"checkpoint-(\d+)", path.name)
        for path in folder.glob("checkpoint-*")
        if is_folder(path)
    }
    return sorted((path for path, match in found.items() if match), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return a checkpoint's step, from its folder's name."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoint_to_resume(args: argparse.Namespace) -> Path | None:
    """Return model_name_or_path where --do_train can resume from it, else None."""
    folder = Path(args.model_name_or_path or "")
    is_whole = all(
        (folder / name).is_file() for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt")
    )
    if not (args.do_train and is_whole):
        return None
    return next(
        (path for path in checkpoints_in(Path(args.output_dir)) if path.samefile(folder)), folder
    )
