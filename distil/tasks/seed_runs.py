"""The run of one seed: fine-tune, predict, score, save; and which seed's model is kept."""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from distil.models.export import MODEL_FILES, save_folder, tokenizer_for
from distil.system.files import is_regular, remove_files, write_json
from distil.tasks.features import collator
from distil.tasks.fine_tuning import IGNORED_LABEL, Trainer, require_an_update, training_arguments
from distil.tasks.heads import HEADS, require_no_look_ahead
from distil.tasks.label_order import check_scored
from distil.tasks.loading import load_for_task, require_ids
from distil.tasks.metrics import num_words, perplexities, score
from distil.tasks.plan import Plan
from distil.tasks.predictions import finite, prediction_rows, write_predictions
from distil.tasks.task_options import (
    FILES_OF_EVERY_SEED,
    is_of_a_seed,
    seed_folder,
    seed_folders,
)
from utils import logger

TRAINING_FLAGS = (
    *("learning_rate", "num_train_epochs", "max_steps", "gradient_accumulation_steps"),
    *("weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "logging_steps"),
    *("bf16", "fp16"),
)

# --------------------------------------------------------------------------------------------------
# Model and Trainer
# --------------------------------------------------------------------------------------------------


def load_student(plan: Plan) -> torch.nn.Module:
    """Load the model to fine-tune, its new head drawn from torch's seed, or the one to score."""
    args, head = plan.args, HEADS[plan.task.head]
    options: dict[str, Any] = {"pad_token_id": plan.tokenizer.pad_token_id}
    if plan.task.head != "next tokens":
        names = dict(enumerate(plan.labels or ["value"]))
        options |= {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {label: n for n, label in names.items()},
            "problem_type": head.problem_type,
        }
    is_fine_tuned = not args.do_train or plan.task.head == "next tokens"
    name, flag = args.model_name_or_path, "--model_name_or_path"
    model = load_for_task(head.auto_class, name, flag, is_fine_tuned=is_fine_tuned, **options)
    require_ids(model, plan.tokenizer, name, flag)
    if plan.task.head == "next tokens":
        require_no_look_ahead(model, name, flag)
        if model.loss_type is None:
            # GPT-2's class name doesn't tell, and the library would warn.
            model.loss_type = "ForCausalLM"
    model.config.finetuning_task = args.task
    return model


def make_trainer(plan: Plan, seed: int) -> Trainer:
    """Make a Trainer with a fresh model; raise InputError where an epoch has no whole update."""
    args = plan.args
    transformers.set_seed(seed)
    arguments = training_arguments(
        seed_folder(args, seed),
        seed=seed,
        batch_size=args.per_gpu_train_batch_size,
        eval_batch_size=args.per_gpu_eval_batch_size,
        use_cpu=args.no_cuda or not torch.cuda.is_available(),
        **{name: getattr(args, name) for name in TRAINING_FLAGS},
    )
    if args.do_train:
        require_an_update(len(plan.train_features), arguments)
    return Trainer(
        distance=plan.task.head,
        teacher=plan.teacher,
        alpha_task=args.alpha_task if plan.teacher is not None else 1.0,
        alpha_ce=args.alpha_ce,
        temperature=args.temperature,
        num_entries=max(plan.tokenizer.get_vocab().values()) + 1,
        model=load_student(plan),
        args=arguments,
        train_dataset=plan.train_features or None,
        data_collator=collator(plan.tokenizer.pad_token_id),
        preprocess_logits_for_metrics=HEADS[plan.task.head].reduce,
    )


# --------------------------------------------------------------------------------------------------
# One seed
# --------------------------------------------------------------------------------------------------


def remove_earlier_run(args: argparse.Namespace) -> None:
    """Remove the files of an earlier run, which --overwrite_output_dir allows."""
    scores = Path(args.output_dir) / "scores.json"
    if is_regular(scores):
        scores.unlink()
    for folder in filter(is_of_a_seed, seed_folders(args)):
        logger.warning("Removing %s, of an earlier run.", folder)
        if left := remove_files(folder, [*FILES_OF_EVERY_SEED, *MODEL_FILES]):
            logger.warning("%s: kept %s, which no run wrote.", folder, ", ".join(left))


def run_seed(plan: Plan, seed: int) -> dict[str, Any] | None:
    """Fine-tune and score with one seed, and write its folder.

    Return the seed's entry of scores.json; None without --do_eval.
    """
    trainer, folder = make_trainer(plan, seed), seed_folder(plan.args, seed)
    if plan.args.do_train:
        if trainer.is_world_process_zero() and seed == plan.args.seeds[0]:
            remove_earlier_run(plan.args)
        trainer.train()
    outputs = trainer.predict(plan.scored_features).predictions if plan.args.do_eval else None
    if outputs is not None:
        check_scored(plan, outputs)
    if trainer.is_world_process_zero():
        write_seed(plan, trainer, folder)
    if outputs is None:
        return None
    if len(outputs) != len(plan.scored_features):
        raise AssertionError(f"{len(outputs)} outputs for {len(plan.scored_features)} inputs")
    metrics, predictions = INTERPRET[plan.task.head](plan, outputs)
    if trainer.is_world_process_zero():
        write_predictions(
            folder / "predictions.tsv", prediction_rows(plan.task, plan.scored, predictions)
        )
    return {"seed": seed, "metrics": metrics, "num_examples": num_examples(plan)}


def write_seed(plan: Plan, trainer: Trainer, folder: Path) -> None:
    """Save a fine-tuned model, its tokenizer and the log of its training."""
    folder.mkdir(parents=True, exist_ok=True)
    if not plan.args.do_train:
        return
    write_json(folder / "log.json", trainer.state.log_history)
    if plan.args.save_models != "none":
        model = trainer.accelerator.unwrap_model(trainer.model)
        save_folder(model, tokenizer_for(model, plan.tokenizer), folder)


def num_examples(plan: Plan) -> dict[str, int]:
    """Count the examples trained on and scored."""
    counts = {"train": len(plan.train)} if plan.args.do_train else {}
    if plan.task.head == "next tokens":
        text = plan.scored[0].texts[0]
        counts = {"train": len(plan.train_features)} if plan.args.do_train else {}
        return counts | {
            plan.args.split: len(plan.scored_features),
            "tokens": plan.scored_features[0]["num_tokens"],
            "words_and_line_ends": num_words(text),
        }
    return counts | {plan.args.split: len(plan.scored)}


# --------------------------------------------------------------------------------------------------
# From outputs to metrics and predictions
# --------------------------------------------------------------------------------------------------


def _classes(plan: Plan, logits_NC: np.ndarray) -> tuple[dict[str, float], list]:
    best = finite(logits_NC, plan.args.output_dir).argmax(-1)
    predictions = [plan.labels[number] for number in best]
    return score(plan.task, plan.scored, predictions), predictions


def _values(plan: Plan, logits_N1: np.ndarray) -> tuple[dict[str, float], list]:
    predictions = [float(value) for value in finite(logits_N1, plan.args.output_dir).reshape(-1)]
    return score(plan.task, plan.scored, predictions), predictions


def _words(plan: Plan, best_NT: np.ndarray) -> tuple[dict[str, float], list]:
    """Join the pieces of split sentences; a word without tokens gets the label O."""
    # Differs from the original: whole sentences are scored, however the tokenizer splits them, so
    # that models of different vocabularies are measured on the same entities.
    predictions = [["O"] * len(example.texts) for example in plan.scored]
    for best_T, feature in zip(best_NT, plan.scored_features, strict=True):
        labelled = [
            place for place, label in enumerate(feature["labels"]) if label != IGNORED_LABEL
        ]
        best_of_words = best_T[labelled]
        finite(np.where(best_of_words < 0, np.nan, best_of_words), plan.args.output_dir)
        for (sentence, word), best in zip(feature["places"], best_of_words, strict=True):
            predictions[sentence][word] = plan.labels[best]
    return score(plan.task, plan.scored, predictions), predictions


def _text(plan: Plan, nll_N: np.ndarray) -> tuple[dict[str, float], list]:
    total = float(finite(nll_N, plan.args.output_dir).sum())
    num_scored = sum(len(feature["labels"]) - 1 for feature in plan.scored_features)
    num_tokens = plan.scored_features[0]["num_tokens"]
    return perplexities(total, num_scored, num_tokens, num_words(plan.scored[0].texts[0])), [total]


INTERPRET: dict[str, Callable[[Plan, np.ndarray], tuple[dict[str, float], list]]] = {
    "classes": _classes,
    "values": _values,
    "tokens": _words,
    "next tokens": _text,
}


# --------------------------------------------------------------------------------------------------
# All seeds
# --------------------------------------------------------------------------------------------------


def median_run(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the run whose score is nearest to the median, the first of equally near ones."""
    middle = statistics.median(run["metrics"]["score"] for run in runs)
    return min(runs, key=lambda run: abs(run["metrics"]["score"] - middle))


def keep_median_model(args: argparse.Namespace, runs: Sequence[Mapping[str, Any]]) -> None:
    """Remove the models of all seeds but the median one; keep predictions and logs."""
    kept = median_run(runs)["seed"]
    for run in runs:
        if run["seed"] != kept:
            remove_files(seed_folder(args, run["seed"]), MODEL_FILES)
