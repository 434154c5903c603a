"""Answer SQuAD's questions from a model's logits, and score the answers."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from distil.system.files import file_problem, write_json
from distil.tasks.fine_tuning import Trainer
from distil.tasks.scores import write_scores
from distil.tasks.squad import (
    Question,
    check_ids,
    read_predictions,
    read_questions,
    score_predictions,
)
from distil.tasks.squad_options import data_path, task_name
from distil.tasks.squad_spans import Answers, Limits, Rules, Window, decode, make_windows
from utils import raise_problems


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The questions to answer, their windows, and the rules by which answers are chosen."""

    questions: Sequence[Question]
    windows: Sequence[Window]
    rules: Rules

    def answers(self, logits: tuple[np.ndarray, np.ndarray]) -> Answers:
        """Choose the answers from (start logits, end logits) of all windows."""
        return decode(self.questions, self.windows, *logits, self.rules)

    def score(self, answers: Answers) -> dict[str, float]:
        """Score answers."""
        return score_predictions(
            self.questions, answers.predictions, with_impossible=self.rules.with_null
        )

    def judge(self, logits: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        """Score the answers chosen from the logits."""
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
    """Return the limits that the flags set."""
    return Limits(args.max_seq_length, args.doc_stride, args.max_query_length)


def evaluate(
    args: argparse.Namespace,
    trainer: Trainer,
    evaluation: Evaluation,
    num_train: int,
    step: int | str = "",
) -> None:
    """Answer and score all questions; rank 0 writes the files, with `step` in their names.

    The files are predictions, n best, null odds (v2.0) and scores.
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
        task=task_name(args),
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
    """Format scores as one line."""
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
    raise_problems(file_problem(path, flag) for flag, path in files.items())
    predictions = read_predictions(args.score_predictions, "--score_predictions")
    questions = read_predict_file(args)
    check_ids(questions, predictions, f"--score_predictions {args.score_predictions}")
    scores = score_predictions(questions, predictions, with_impossible=args.version_2_with_negative)
    print(describe(scores), flush=True)
