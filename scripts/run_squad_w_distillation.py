"""Fine-tune a student on SQuAD v1.1 or v2.0, optionally with a teacher, and score its answers.

The second step of distillation (Sanh et al., 2019, section 3, "DistilBERT (D)", table 2): a student
made by train.py learns to answer from SQuAD's labels and, at the same time, from the start and end
logits of a teacher that was fine-tuned on SQuAD before:

    loss = alpha_squad x mean of start's and end's cross-entropy
         + alpha_ce x mean of start's and end's T^2 KL(teacher, student)

squad.py reads and scores, squad_spans.py makes windows and chooses answers, fine_tuning.py holds
loss and Trainer (all in distil/tasks/). On several processes: torchrun --nproc_per_node N
scripts/run_squad_w_distillation.py ..; each question is scored exactly once.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from distil.system.rank_zero import reporting_on_rank_0
from distil.tasks.squad_options import (
    add_flags,
    check_arguments,
    checkpoints_in,
    step_of,
    warn_of_flags_without_effect,
)
from utils import OneLineParser, run_program

if TYPE_CHECKING:
    from distil.tasks.squad_evaluation import Evaluation


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add_flags(parser)
    args = parser.parse_args(argv)
    warn_of_flags_without_effect(args, parser)
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the program: score a file, or read, train, answer, score."""
    with reporting_on_rank_0():
        args = parse(argv)
        if not args.score_predictions:
            check_arguments(args)
        import transformers

        from distil.tasks.squad_evaluation import score_file

        if not sys.stderr.isatty():
            transformers.logging.disable_progress_bar()
        if args.score_predictions:
            score_file(args)
        else:
            run(args)


def run(args: argparse.Namespace) -> None:
    """Read everything, so that errors are raised before training; then train and evaluate."""
    import transformers

    from distil.tasks import squad_training
    from distil.tasks.fine_tuning import require_an_update
    from distil.tasks.squad_evaluation import evaluate, prepare_evaluation

    tokenizer = squad_training.load_tokenizers(args)
    transformers.set_seed(args.seed)
    student = squad_training.load_student(
        args, args.model_name_or_path, is_fine_tuned=not args.do_train
    )
    teacher = squad_training.load_teacher(args)
    squad_training.require_sizes(args, tokenizer, {"student": student, "teacher": teacher})
    windows = squad_training.read_train_windows(args, tokenizer) if args.do_train else []
    is_scored = args.do_eval or args.evaluate_during_training
    evaluation = prepare_evaluation(args, tokenizer) if is_scored else None
    arguments = squad_training.trainer_arguments(args)
    if args.do_train:
        require_an_update(len(windows), arguments)
    trainer = squad_training.make_trainer(
        args, arguments, tokenizer, student, teacher, windows, evaluation
    )
    num_train = len({window.question for window in windows})
    if args.do_train:
        squad_training.check_teacher(args, trainer)
        squad_training.train(args, trainer)
    if args.do_eval:
        evaluate_checkpoints(args, arguments, tokenizer, evaluation, num_train)
        evaluate(args, trainer, evaluation, num_train)


def evaluate_checkpoints(
    args: argparse.Namespace, arguments, tokenizer, evaluation: "Evaluation", num_train: int
) -> None:
    """Answer and score by each checkpoint of the run, with --eval_all_checkpoints."""
    from distil.tasks.squad_evaluation import evaluate
    from distil.tasks.squad_training import load_student, make_trainer

    folder = Path(args.output_dir if args.do_train else args.model_name_or_path)
    for checkpoint in checkpoints_in(folder) if args.eval_all_checkpoints else []:
        student = load_student(args, checkpoint, is_fine_tuned=True)
        trainer = make_trainer(args, arguments, tokenizer, student, evaluation=evaluation)
        evaluate(args, trainer, evaluation, num_train, step_of(checkpoint))


if __name__ == "__main__":
    run_program(main)
