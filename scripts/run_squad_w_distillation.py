"""Fine-tune a student on SQuAD v1.1 or v2.0, with or without a fine-tuned teacher, and score its
answers.

The second step of distillation (Sanh et al., 2019, section 3, "DistilBERT (D)", table 2): after
train.py has made the student, it learns to answer from SQuAD's labels and, at the same time, from
the start and end logits of a teacher that was fine-tuned on SQuAD before:

    loss = alpha_squad x mean of start's and end's cross-entropy + alpha_ce x mean of start's and
    end's T^2 KL(teacher, student)

squad.py reads and scores, squad_spans.py makes windows and chooses answers, fine_tuning.py holds
loss and Trainer. On several
processes: torchrun --nproc_per_node N scripts/run_squad_w_distillation.py ..; each question is
scored exactly once.
"""

import argparse
import dataclasses
import functools
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distil.models.hub import load_config
from distil.models.language_model import max_input_length
from distil.models.tokenizers import load_tokenizer
from distil.system.files import file_problem, output_problem, write_json
from distil.system.rank_zero import reporting_on_rank_0
from distil.tasks.fine_tuning import (
    Trainer,
    require_an_update,
    training_arguments,
)
from distil.tasks.loading import load_for_task, require_same_vocabulary
from distil.tasks.options import second_step_problems
from distil.tasks.scores import write_scores
from distil.tasks.squad import Question, read_predictions, read_questions, score_predictions
from distil.tasks.squad_spans import (
    Answers,
    Limits,
    Rules,
    Window,
    WindowDataset,
    decode,
    make_windows,
)
from utils import InputError, OneLineParser, logger, one_line, run_program

# Differs from the original: no XLNet, XLM. They have other heads, and no student of theirs can be
# made here.
STUDENT_TYPES = ("bert", "distilbert", "roberta")
TEACHER_TYPES = ("bert", "roberta")
NUM_SPECIAL_TOKENS = {"bert": 3, "distilbert": 3, "roberta": 4}
DATA_FILES = {"train_file": "train-v{}.json", "predict_file": "dev-v{}.json"}
WITHOUT_MEANING = {
    "overwrite_cache": "windows are made anew each time, none are kept",
    "threads": "the tokenizer takes the cores there are",
    "cache_dir": "set HF_HOME in the environment instead",
    "verbose_logging": "what is left out of training is always said",
    "local_rank": "the launcher tells each process by the environment",
    "fp16_opt_level": "--fp16 is torch's own mixed precision",
}
RANGES = {
    "max_seq_length": (8, 1e6),
    "doc_stride": (1, 1e6),
    "max_query_length": (1, 1e6),
    "per_gpu_train_batch_size": (1, 1e6),
    "per_gpu_eval_batch_size": (1, 1e6),
    "learning_rate": (1e-12, 1),
    "gradient_accumulation_steps": (1, 1e6),
    "weight_decay": (0, 1),
    "adam_epsilon": (1e-16, 1),
    "max_grad_norm": (0, 1e30),
    "num_train_epochs": (1e-6, 1e6),
    "warmup_steps": (0, 1e9),
    "n_best_size": (1, 1e4),
    "max_answer_length": (1, 1e6),
    "null_score_diff_threshold": (-1e30, 1e30),
    "logging_steps": (1, 1e9),
    "save_steps": (1, 1e9),
    "seed": (0, 2**32 - 1),
}

# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Flags and defaults are those of 2019, but for --score_predictions and
    --skip_misplaced_answers.
    """
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    _add_text_flags(parser)
    _add_number_flags(parser)
    _add_switches(parser)
    ignored = parser.add_argument_group("accepted for old command lines, without effect")
    for name in ("overwrite_cache", "verbose_logging"):
        ignored.add_argument(f"--{name}", action="store_true", help=WITHOUT_MEANING[name])
    for name, default in {"threads": "1", "cache_dir": "", "fp16_opt_level": "O1"}.items():
        ignored.add_argument(f"--{name}", default=default, help=WITHOUT_MEANING[name])
    ignored.add_argument(
        "--local_rank", "--local-rank", default="-1", help=WITHOUT_MEANING["local_rank"]
    )
    args = parser.parse_args(argv)
    for name, reason in WITHOUT_MEANING.items():
        if str(getattr(args, name)) != str(parser.get_default(name)):
            logger.warning("--%s has no effect any more: %s.", name, reason)
    return args


def _add_text_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model_type", choices=STUDENT_TYPES, help="the student's type")
    add(
        "--model_name_or_path",
        help=(
            "student: hub name or folder; a folder checkpoint-N with its optimizer: the run goes on"
        ),
    )
    add(
        "--output_dir", help="folder for checkpoints, model, tokenizer, predictions and scores.json"
    )
    add("--teacher_type", choices=TEACHER_TYPES, help="the teacher's type")
    add(
        "--teacher_name_or_path",
        help="teacher, fine-tuned on SQuAD: hub name or folder; none: plain fine-tuning",
    )
    add("--data_dir", default="", help="folder of the files, when they are named without one")
    add(
        "--train_file",
        help="SQuAD's JSON to train on (default: train-v1.1.json, or -v2.0, in data_dir)",
    )
    add(
        "--predict_file",
        help="SQuAD's JSON to answer (default: dev-v1.1.json, or -v2.0, in data_dir)",
    )
    add("--config_name", help="configuration, where not that of model_name_or_path")
    add("--tokenizer_name", help="tokenizer, where not that of model_name_or_path")
    add(
        "--score_predictions",
        metavar="FILE",
        help="score this file of predictions against --predict_file; nothing else",
    )


def _add_number_flags(parser: argparse.ArgumentParser) -> None:
    numbers = {
        "alpha_ce": (0.5, "weight of the distance from the teacher"),
        "alpha_squad": (0.5, "weight of the labels' loss, with a teacher"),
        "temperature": (2.0, "temperature of both softmaxes"),
        "max_seq_length": (
            384,
            "tokens a window, with question and special tokens; shorter ones are padded",
        ),
        "doc_stride": (128, "tokens between the beginnings of two windows"),
        "max_query_length": (64, "tokens a question is cut to"),
        "per_gpu_train_batch_size": (8, "windows a process (or GPU) and micro-batch"),
        "per_gpu_eval_batch_size": (8, "windows a process (or GPU) in prediction"),
        "learning_rate": (5e-5, "at the beginning"),
        "gradient_accumulation_steps": (1, "micro-batches an update"),
        "weight_decay": (0.0, "biases and layer norms excepted"),
        "adam_epsilon": (1e-8, "epsilon of AdamW"),
        "max_grad_norm": (1.0, "the gradient's norm is clipped to this"),
        "num_train_epochs": (3.0, "passes over the windows"),
        "max_steps": (-1, "updates, in place of num_train_epochs where above 0"),
        "warmup_steps": (0, "updates over which the learning rate rises"),
        "n_best_size": (20, "starts, ends and answers looked at"),
        "max_answer_length": (30, "tokens of an answer"),
        "null_score_diff_threshold": (
            0.0,
            "v2.0: how much the null's score must be above the best answer's",
        ),
        "logging_steps": (50, "updates between two lines of the log"),
        "save_steps": (50, "updates between two checkpoints"),
        "seed": (42, "seed of the head's first weights, of order and dropout"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"{text} (default: %(default)s)"
        )


def _add_switches(parser: argparse.ArgumentParser) -> None:
    switches = {
        "version_2_with_negative": "SQuAD v2.0: some questions have no answer",
        "do_train": "train",
        "do_eval": (
            "answer and score predict_file: by the trained model, or by model_name_or_path without"
            " --do_train"
        ),
        "do_lower_case": "lower-case the text (default: what the tokenizer's folder says)",
        "evaluate_during_training": "score predict_file at each line of the log",
        "eval_all_checkpoints": "answer and score by each checkpoint, too",
        "overwrite_output_dir": "replace the results of an earlier run in output_dir",
        "no_cuda": "run on the CPU",
        "fp16": "mixed precision in float16 (needs a GPU)",
        "skip_misplaced_answers": (
            "leave questions out of training whose answer is not at its place in the context"
        ),
    }
    for name, text in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)


def data_path(args: argparse.Namespace, name: str) -> str:
    """Find the file of a flag, train_file or predict_file, by data_dir and SQuAD's own names."""
    version = "2.0" if args.version_2_with_negative else "1.1"
    return os.path.join(args.data_dir, getattr(args, name) or DATA_FILES[name].format(version))


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError that names every argument that is missing, out of its range or in
    contradiction with another.
    """
    problems = [
        f"--{name}: is required"
        for name in ("model_type", "model_name_or_path", "output_dir")
        if not getattr(args, name)
    ]
    problems += [
        f"--{name} {getattr(args, name):g}: expected {low:g} to {high:g}"
        for name, (low, high) in RANGES.items()
        if not low <= getattr(args, name) <= high
    ]
    if args.max_steps == 0:
        problems.append("--max_steps 0: expected at least 1, or -1 for --num_train_epochs")
    if args.fp16 and (args.no_cuda or not torch.cuda.is_available()):
        problems.append("--fp16: needs a GPU; leave it out")
    problems += [
        *_what_to_do_problems(args),
        *_teacher_problems(args),
        *_length_problems(args),
        *_file_problems(args),
    ]
    if problems:
        raise InputError("\n".join(problems))


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
            f"--teacher_{there}: comes with --teacher_{absent}; give both, or none for plain"
            " fine-tuning"
        )
    if has_teacher and not args.do_train:
        problems.append(
            "--teacher_name_or_path: a teacher takes part in training only; add --do_train, or"
            " leave it out"
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
            f"--doc_stride {args.doc_stride}: beside a question of --max_query_length"
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
    """Say in one line what output_dir holds that would be lost; None where nothing would."""
    folder = Path(args.output_dir)
    if not folder.is_dir():
        return None
    found = checkpoints_in(folder)
    if args.overwrite_output_dir:
        return _read_and_written_problem(args, [folder, *found])
    if args.do_train:
        if not any(folder.iterdir()) or checkpoint_to_go_on_from(args) in found:
            return None
        go_on = f"go on with --model_name_or_path {found[-1]}, " if found else ""
        return (
            f"--output_dir {folder}: is not empty; {go_on}choose another, or replace its results"
            " with --overwrite_output_dir"
        )
    if (folder / "predictions_.json").exists():
        return (
            f"--output_dir {folder}: holds predictions already; choose another, or replace them"
            " with --overwrite_output_dir"
        )
    return None


def _read_and_written_problem(args: argparse.Namespace, replaced: Sequence[Path]) -> str | None:
    """Say in one line which model is read from a folder that training replaces; None where none
    is.
    """
    flags = (
        ["teacher_name_or_path"]
        if checkpoint_to_go_on_from(args)
        else ["model_name_or_path", "teacher_name_or_path"]
    )
    for flag in flags if args.do_train else []:
        name = getattr(args, flag)
        if name and os.path.isdir(name) and any(path.samefile(name) for path in replaced):
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
        if path.is_dir()
    }
    return sorted((path for path, match in found.items() if match), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Read a checkpoint's step out of its folder's name."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoint_to_go_on_from(args: argparse.Namespace) -> Path | None:
    """Return model_name_or_path where it is a checkpoint with all that a run goes on from, else
    None.
    """
    folder = Path(args.model_name_or_path or "")
    is_whole = all(
        (folder / name).is_file() for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt")
    )
    if not (args.do_train and is_whole):
        return None
    return next(
        (path for path in checkpoints_in(Path(args.output_dir)) if path.samefile(folder)), folder
    )


# --------------------------------------------------------------------------------------------------
# Models, training
# --------------------------------------------------------------------------------------------------


class SpanTrainer(Trainer):
    """The Trainer with SQuAD's evaluation, which takes all windows of a question together. judge:
    logits -> scores.
    """

    def __init__(self, *, judge=None, **options):
        super().__init__(distance="spans", **options)
        self.judge = judge

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer the whole set, in order, once; return and log the scores."""
        scores = self.judge(self.predict(self.eval_dataset).predictions)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def load_student(
    args: argparse.Namespace, path: str | os.PathLike, *, is_fine_tuned: bool
) -> torch.nn.Module:
    """Load a student of the given type, from model_name_or_path or a checkpoint."""
    config = load_config(args.model_type, path, "--model_name_or_path")
    if args.config_name:
        config = load_config(args.model_type, args.config_name, "--config_name")
    return _load(str(path), "--model_name_or_path", config, is_fine_tuned)


def load_teacher(args: argparse.Namespace) -> torch.nn.Module | None:
    """Load the teacher with its head for answering; None where none is asked for. Raises
    InputError.
    """
    name, flag = args.teacher_name_or_path, "--teacher_name_or_path"
    return (
        _load(name, flag, load_config(args.teacher_type, name, flag), is_fine_tuned=True)
        if name
        else None
    )


def _load(name: str, flag: str, config, is_fine_tuned: bool) -> torch.nn.Module:
    # What another run's configuration says about outputs is put aside: start and end logits alone
    # are gathered.
    config.update({"return_dict": True, "output_hidden_states": False, "output_attentions": False})
    model_class = transformers.AutoModelForQuestionAnswering
    return load_for_task(model_class, name, flag, is_fine_tuned=is_fine_tuned, config=config)


def load_tokenizers(args: argparse.Namespace):
    """Load the student's tokenizer; check that the teacher reads the same tokens. Raises
    InputError.
    """
    flag = "tokenizer_name" if args.tokenizer_name else "model_name_or_path"
    name, teacher = getattr(args, flag), args.teacher_name_or_path
    # Differs from the original: without --do_lower_case the tokenizer's own folder decides. 2019
    # took it for cased then.
    lower_case = True if args.do_lower_case else None
    tokenizer = load_tokenizer(args.model_type, name, f"--{flag}", lower_case)
    if teacher:
        teacher_tokenizer = load_tokenizer(
            args.teacher_type, teacher, "--teacher_name_or_path", lower_case
        )
        require_same_vocabulary(tokenizer, teacher_tokenizer, name, teacher)
    return tokenizer


def require_sizes(
    args: argparse.Namespace, tokenizer, models: Mapping[str, torch.nn.Module | None]
) -> None:
    """Raise InputError where a model has fewer positions than a window, or fewer embeddings than
    the tokenizer has tokens.
    """
    largest = max(tokenizer.get_vocab().values())
    for role, model in models.items():
        if model is None:
            continue
        longest, vocab_size = (
            max_input_length(model.config.model_type, tokenizer, model.config),
            model.config.vocab_size,
        )
        if args.max_seq_length > longest:
            raise InputError(
                f"--max_seq_length {args.max_seq_length}: the {role} reads {longest} tokens at"
                " most; lower it"
            )
        if largest >= vocab_size:
            raise InputError(
                f"the {role} has {vocab_size} embeddings, the tokenizer ids up to {largest}; take"
                " its own tokenizer"
            )


def make_trainer(
    args: argparse.Namespace,
    arguments,
    tokenizer,
    student,
    teacher=None,
    train_windows: Sequence[Window] = (),
    evaluation: "Evaluation | None" = None,
) -> SpanTrainer:
    """Put models, windows and the Trainer together; without a teacher the loss is that of the
    labels alone.
    """
    length, pad_id = args.max_seq_length, tokenizer.pad_token_id
    return SpanTrainer(
        model=student,
        teacher=teacher,
        args=arguments,
        processing_class=tokenizer,
        alpha_task=args.alpha_squad if teacher else 1.0,
        alpha_ce=args.alpha_ce if teacher else 0.0,
        temperature=args.temperature,
        judge=evaluation.judge if evaluation else None,
        train_dataset=(
            WindowDataset(train_windows, length, pad_id, with_spans=True) if train_windows else None
        ),
        eval_dataset=(
            WindowDataset(evaluation.windows, length, pad_id, with_spans=False)
            if evaluation
            else None
        ),
    )


def trainer_arguments(args: argparse.Namespace):
    """Make the Trainer's arguments out of the flags. Joins the other processes where there are
    some.
    """
    same = {
        name: getattr(args, name)
        for name in (
            "learning_rate",
            "gradient_accumulation_steps",
            "weight_decay",
            "adam_epsilon",
            "max_grad_norm",
            "num_train_epochs",
            "max_steps",
            "warmup_steps",
            "logging_steps",
            "save_steps",
            "fp16",
        )
    }
    evaluation = (
        {"eval_strategy": "steps", "eval_steps": args.logging_steps}
        if args.evaluate_during_training
        else {}
    )
    return training_arguments(
        args.output_dir,
        seed=args.seed,
        batch_size=args.per_gpu_train_batch_size,
        eval_batch_size=args.per_gpu_eval_batch_size,
        save_strategy="steps",
        use_cpu=args.no_cuda,
        **same,
        **evaluation,
    )


def require_readable(checkpoint: Path) -> None:
    """Raise InputError where a file that the Trainer goes on from is damaged: it would end with a
    traceback.
    """
    read = functools.partial(torch.load, map_location="cpu", weights_only=True)
    readers = {
        "trainer_state.json": transformers.TrainerState.load_from_json,
        "optimizer.pt": read,
        "scheduler.pt": read,
    }
    for name, reader in readers.items():
        try:
            reader(str(checkpoint / name))
        except Exception as error:  # what a damaged file can raise has no end
            raise InputError(
                f"--model_name_or_path {checkpoint}: its {name} can't be read ({one_line(error)});"
                " take an earlier checkpoint"
            ) from error


def train(args: argparse.Namespace, trainer: SpanTrainer) -> None:
    """Train, from a checkpoint on where one is named; write the model and its tokenizer."""
    start = checkpoint_to_go_on_from(args)
    if start:
        require_readable(start)
        logger.info("Going on from %s.", start)
    elif trainer.is_world_process_zero():
        for checkpoint in checkpoints_in(Path(args.output_dir)):  # --overwrite_output_dir was given
            logger.warning("Removing %s, of an earlier run.", checkpoint)
            shutil.rmtree(checkpoint)
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    trainer.save_model(args.output_dir)
    # Else another process could list the checkpoints before the last is written
    trainer.accelerator.wait_for_everyone()


# --------------------------------------------------------------------------------------------------
# Answering
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The questions to be answered, their windows, and how answers are chosen."""

    questions: Sequence[Question]
    windows: Sequence[Window]
    rules: Rules

    def answers(self, logits: tuple[np.ndarray, np.ndarray]) -> Answers:
        """Choose the answers out of (start logits, end logits) of all windows."""
        return decode(self.questions, self.windows, *logits, self.rules)

    def score(self, answers: Answers) -> dict[str, float]:
        """Score answers."""
        return score_predictions(
            self.questions, answers.predictions, with_impossible=self.rules.with_null
        )

    def judge(self, logits: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        """Score the answers chosen out of the logits."""
        return self.score(self.answers(logits))


def read_predict_file(args: argparse.Namespace) -> list[Question]:
    """Read --predict_file."""
    path, flag = data_path(args, "predict_file"), "--predict_file"
    return read_questions(
        path, flag, with_impossible=args.version_2_with_negative, for_training=False
    )


def prepare_evaluation(args: argparse.Namespace, tokenizer) -> Evaluation:
    """Read --predict_file and make its windows."""
    questions = read_predict_file(args)
    rules = Rules(
        args.n_best_size,
        args.max_answer_length,
        args.version_2_with_negative,
        args.null_score_diff_threshold,
    )
    return Evaluation(questions, make_windows(questions, tokenizer, limits_of(args)), rules)


def limits_of(args: argparse.Namespace) -> Limits:
    """Take the lengths out of the flags."""
    return Limits(args.max_seq_length, args.doc_stride, args.max_query_length)


def evaluate(
    args: argparse.Namespace,
    trainer: SpanTrainer,
    evaluation: Evaluation,
    num_train: int,
    step: int | str = "",
) -> None:
    """Answer and score all questions; one process writes predictions, n best, null odds and scores,
    `step` in their names.
    """
    logits = trainer.predict(trainer.eval_dataset).predictions
    if not trainer.is_world_process_zero():
        return
    folder, answers = Path(args.output_dir), evaluation.answers(logits)
    scores = evaluation.score(answers)
    write_json(folder / f"predictions_{step}.json", answers.predictions)
    write_json(folder / f"nbest_predictions_{step}.json", answers.nbest)
    if args.version_2_with_negative:
        write_json(folder / f"null_odds_{step}.json", answers.null_odds)
    write_scores(
        folder / (f"scores_{step}.json" if step else "scores.json"),
        task="squad_v2" if args.version_2_with_negative else "squad",
        model=args.model_name_or_path,
        teacher=args.teacher_name_or_path,
        runs=[
            {
                "seed": args.seed,
                "metrics": _metrics(scores),
                "num_examples": {"train": num_train, "dev": scores["total"]},
            }
        ],
        flags=vars(args),
    )
    print(f"{f'step {step}: ' if step else ''}{describe(scores)}", flush=True)


def _metrics(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if not name.endswith("total")}


def describe(scores: Mapping[str, float]) -> str:
    """Put scores on one line."""
    parts = {"": "", "HasAns_": "; with an answer: ", "NoAns_": "; without: "}
    return "".join(
        f"{text}exact match {scores[f'{kind}exact']:.2f}, F1 {scores[f'{kind}f1']:.2f}"
        f" ({scores[f'{kind}total']:,} questions)"
        for kind, text in parts.items()
        if f"{kind}exact" in scores
    )


def score_file(args: argparse.Namespace) -> None:
    """Score a file of predictions; print exact match and F1."""
    files = {
        "--score_predictions": args.score_predictions,
        "--predict_file": data_path(args, "predict_file"),
    }
    if problems := [
        problem for flag, path in files.items() if (problem := file_problem(path, flag))
    ]:
        raise InputError("\n".join(problems))
    predictions = read_predictions(args.score_predictions, "--score_predictions")
    what = f"--score_predictions {args.score_predictions}"
    scores = score_predictions(
        read_predict_file(args), predictions, what, with_impossible=args.version_2_with_negative
    )
    print(describe(scores), flush=True)


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Run the program: score a file, or read, train, answer, score."""
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    with reporting_on_rank_0():
        args = parse(argv)
        if args.score_predictions:
            score_file(args)
        else:
            check_arguments(args)
            run(args)


def run(args: argparse.Namespace) -> None:
    """Read everything, so that what is wrong is said before training; then train and evaluate."""
    tokenizer = load_tokenizers(args)
    transformers.set_seed(args.seed)
    student = load_student(args, args.model_name_or_path, is_fine_tuned=not args.do_train)
    teacher = load_teacher(args)
    require_sizes(args, tokenizer, {"student": student, "teacher": teacher})
    train_windows = read_train_windows(args, tokenizer) if args.do_train else []
    evaluation = (
        prepare_evaluation(args, tokenizer)
        if args.do_eval or args.evaluate_during_training
        else None
    )
    arguments = trainer_arguments(args)
    if args.do_train:
        require_an_update(len(train_windows), arguments)
    trainer = make_trainer(args, arguments, tokenizer, student, teacher, train_windows, evaluation)
    num_train = len({window.question for window in train_windows})
    if args.do_train:
        train(args, trainer)
    if args.do_eval:
        evaluate_checkpoints(args, arguments, tokenizer, evaluation, num_train)
        evaluate(args, trainer, evaluation, num_train)


def evaluate_checkpoints(
    args: argparse.Namespace, arguments, tokenizer, evaluation: Evaluation, num_train: int
) -> None:
    """Answer and score by each checkpoint of the run, where that is asked for."""
    folder = Path(args.output_dir if args.do_train else args.model_name_or_path)
    for checkpoint in checkpoints_in(folder) if args.eval_all_checkpoints else []:
        student = load_student(args, checkpoint, is_fine_tuned=True)
        trainer = make_trainer(args, arguments, tokenizer, student, evaluation=evaluation)
        evaluate(args, trainer, evaluation, num_train, step_of(checkpoint))


def read_train_windows(args: argparse.Namespace, tokenizer) -> list[Window]:
    """Read --train_file and make its windows."""
    questions = read_questions(
        data_path(args, "train_file"),
        "--train_file",
        with_impossible=args.version_2_with_negative,
        for_training=True,
        skip_misplaced=args.skip_misplaced_answers,
    )
    windows = make_windows(questions, tokenizer, limits_of(args))
    logger.info(
        "Training on %d questions in %d windows.",
        len({window.question for window in windows}),
        len(windows),
    )
    return windows


if __name__ == "__main__":
    run_program(main)
