"""Train a model to find answers: SpanTrainer, and what it takes from the flags and files."""

import argparse
import functools
import math
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers

from distil.kernels.cpu import faster_for
from distil.models.architectures import ARCHITECTURES
from distil.models.casing import casing_of_flags
from distil.models.export import MODEL_FILES, tokenizer_for
from distil.models.hub import load_config
from distil.models.language_model import max_input_length
from distil.models.tokenizers import load_tokenizer
from distil.system.failures import naming_failures
from distil.system.files import is_regular, remove_files
from distil.tasks.agreement import deviations_of_luck
from distil.tasks.fine_tuning import Trainer, inputs_of, training_arguments
from distil.tasks.loading import load_for_task, require_same_vocabulary
from distil.tasks.squad import read_questions
from distil.tasks.squad_evaluation import Evaluation, limits_of
from distil.tasks.squad_options import checkpoint_to_resume, checkpoints_in, data_path
from distil.tasks.squad_spans import Window, WindowDataset, make_windows
from utils import InputError, logger

TRAINING_FLAGS = (
    *("learning_rate", "gradient_accumulation_steps", "weight_decay", "adam_epsilon"),
    *("max_grad_norm", "num_train_epochs", "max_steps", "warmup_steps", "logging_steps"),
    *("save_steps", "fp16"),
)

# Beside the model in the library's checkpoints.
TRAINER_FILES = (
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
    *("trainer_state.json", "training_args.bin"),
)
NUM_MEASURED = 64  # training windows on which a teacher is measured


class SpanTrainer(Trainer):
    """The Trainer with SQuAD's evaluation, over whole questions; judge: logits -> scores."""

    def __init__(self, *, judge=None, **options):
        super().__init__(distance="spans", **options)
        self.judge = judge

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer the whole set once, in order; return and log the scores."""
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
    """Load the teacher fine-tuned on SQuAD; None without one."""
    name, flag = args.teacher_name_or_path, "--teacher_name_or_path"
    return (
        _load(name, flag, load_config(args.teacher_type, name, flag), is_fine_tuned=True)
        if name
        else None
    )


def _load(name: str, flag: str, config, is_fine_tuned: bool) -> torch.nn.Module:
    # The Trainer gathers all outputs: ignore a configuration that asks for more than logits.
    config.update({"return_dict": True, "output_hidden_states": False, "output_attentions": False})
    model_class = transformers.AutoModelForQuestionAnswering
    return load_for_task(model_class, name, flag, is_fine_tuned=is_fine_tuned, config=config)


def load_tokenizers(args: argparse.Namespace):
    """Load the student's tokenizer; raise InputError where the teacher has another vocabulary."""
    flag = "tokenizer_name" if args.tokenizer_name else "model_name_or_path"
    name, teacher = getattr(args, flag), args.teacher_name_or_path
    # Differs from the original: without --do_lower_case the tokenizer's folder decides. 2019 took
    # the text as cased.
    casing = casing_of_flags(args)
    tokenizer = load_tokenizer(ARCHITECTURES[args.model_type], name, f"--{flag}", casing)
    if teacher:
        teacher_tokenizer = load_tokenizer(
            ARCHITECTURES[args.teacher_type], teacher, "--teacher_name_or_path", casing
        )
        require_same_vocabulary(tokenizer, teacher_tokenizer, name, teacher)
    roles = ("cls_token", "sep_token", "pad_token")
    missing = [role for role in roles if getattr(tokenizer, f"{role}_id") is None]
    if missing:
        raise InputError(
            f"--{flag} {name}: its tokenizer has no {', no '.join(missing)}, which windows of"
            " question and context need; add it to its tokenizer_config.json"
        )
    return tokenizer


def require_sizes(
    args: argparse.Namespace, tokenizer, models: Mapping[str, torch.nn.Module | None]
) -> None:
    """Raise InputError where a model has too few positions or embeddings; models: {role: model}."""
    largest = max(tokenizer.get_vocab().values())
    for role, model in models.items():
        if model is None:
            continue
        longest, vocab_size = (
            max_input_length(ARCHITECTURES[model.config.model_type], tokenizer, model.config),
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
    evaluation: Evaluation | None = None,
) -> SpanTrainer:
    """Make the Trainer; without a teacher the loss is that of the labels."""
    length, pad_id = args.max_seq_length, tokenizer.pad_token_id
    return SpanTrainer(
        model=student,
        teacher=teacher,
        args=arguments,
        processing_class=tokenizer_for(student, tokenizer) if train_windows else tokenizer,
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


def check_teacher(args: argparse.Namespace, trainer: SpanTrainer) -> None:
    """Measure the teacher on some of the training windows that have an answer; log the result.

    Raises InputError where its starts and ends are swapped, beyond luck.
    """
    windows = trainer.train_dataset
    answered = [number for number, window in enumerate(windows.windows) if any(window.span)]
    if trainer.teacher is None or not answered:
        return
    chosen = random.Random(0).sample(answered, min(NUM_MEASURED, len(answered)))
    found_N2, truth_N2 = spans_of_teacher(trainer, [windows[number] for number in chosen])
    straight_N, swapped_N = ((found_N2 == truth).sum(1) for truth in (truth_N2, truth_N2.flip(1)))
    votes = torch.sign(swapped_N - straight_N)
    name, num = f"--teacher_name_or_path {args.teacher_name_or_path}", len(chosen)
    starts, ends = (found_N2 == truth_N2).sum(0).tolist()
    found = f"finds the start in {starts} and the end in {ends} of {num} training windows"
    if votes.sum() > deviations_of_luck() * math.sqrt(max(votes.abs().sum(), 1)):
        swapped = int(swapped_N.sum())
        raise InputError(
            f"{name}: {found}, and {swapped} of the {2 * num} with start and end swapped; swap the"
            " rows of its qa_outputs, or name another teacher"
        )
    logger.info("The teacher %s.", found)
    guessed = sum(1 / len(windows.windows[number].ids) for number in chosen)
    if max(starts, ends) <= guessed + deviations_of_luck() * math.sqrt(guessed):
        logger.warning("%s: %s: no better than guessing.", name, found)


@torch.no_grad()
def spans_of_teacher(
    trainer: SpanTrainer, items: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most probable starts and ends of windows, and the true ones: (N, 2) each."""
    found, truth, size = [], [], trainer.args.per_device_eval_batch_size
    for first in range(0, len(items), size):
        batch = dict(trainer.data_collator(items[first : first + size]))
        truth.append(torch.stack([batch.pop(f"{end}_positions") for end in ("start", "end")], 1))
        batch = {key: tensor.to(trainer.args.device) for key, tensor in batch.items()}
        with faster_for(trainer.teacher):
            output = trainer.teacher(**inputs_of(trainer.teacher, batch))
        best = [logits.argmax(-1).cpu() for logits in (output.start_logits, output.end_logits)]
        found.append(torch.stack(best, 1))
    return torch.cat(found), torch.cat(truth)


def trainer_arguments(args: argparse.Namespace):
    """Make the Trainer's arguments from the flags; joins the process group, if any."""
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
        **{name: getattr(args, name) for name in TRAINING_FLAGS},
        **evaluation,
    )


def require_readable(checkpoint: Path) -> None:
    """Raise InputError where a file that the Trainer resumes from is damaged."""
    read = functools.partial(torch.load, map_location="cpu", weights_only=True)
    readers = {
        "trainer_state.json": transformers.TrainerState.load_from_json,
        "optimizer.pt": read,
        "scheduler.pt": read,
    }
    for name, reader in readers.items():
        what = f"--model_name_or_path {checkpoint}: its {name} can't be read"
        with naming_failures(what, "; take an earlier checkpoint"):
            reader(str(checkpoint / name))


def train(args: argparse.Namespace, trainer: SpanTrainer) -> None:
    """Train, or resume from a checkpoint; save the model and its tokenizer."""
    start = checkpoint_to_resume(args)
    if start:
        require_readable(start)
        logger.info("Resuming from %s.", start)
    elif trainer.is_world_process_zero():
        for checkpoint in checkpoints_in(Path(args.output_dir)):  # --overwrite_output_dir was given
            if not is_regular(checkpoint / "trainer_state.json"):
                continue
            logger.warning("Removing %s, of an earlier run.", checkpoint)
            if left := remove_files(checkpoint, [*MODEL_FILES, *TRAINER_FILES]):
                logger.warning("%s: kept %s, which no run wrote.", checkpoint, ", ".join(left))
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    trainer.save_model(args.output_dir)
    # Otherwise another process could list the checkpoints before the last one is saved.
    trainer.accelerator.wait_for_everyone()


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
