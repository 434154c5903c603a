"""Measure a fine-tuned model on labelled examples: do its outputs mean what they are taken for?

A head's classes are numbers, and many published models call them LABEL_0, LABEL_1, .. only. Taken
in the wrong order, a teacher teaches wrong answers, and a score is that of wrong answers. Outputs
that depend on the labels show their order.
"""

import os
import random
from collections.abc import Sequence

import numpy as np
import torch

from distil.kernels.cpu import faster_for
from distil.tasks.agreement import falls, find_better_order, is_beyond_luck
from distil.tasks.features import Feature, collator
from distil.tasks.fine_tuning import IGNORED_LABEL, inputs_of
from distil.tasks.heads import HEADS
from distil.tasks.metrics import correlations
from distil.tasks.plan import Plan
from distil.tasks.predictions import finite
from utils import InputError, logger

NUM_MEASURED = 256  # training examples on which a teacher is measured

# --------------------------------------------------------------------------------------------------
# Outputs against labels
# --------------------------------------------------------------------------------------------------


def describe_classes(
    outputs: np.ndarray, labels: np.ndarray, names: Sequence[str], what: str
) -> tuple[str, str, bool]:
    """Compare outputs with labels, both as class numbers.

    names: of the classes, in the assumed order. what: "training examples", .. Returns (how many are
    right; what another order would give, "" where none is better; whether luck can't explain that).
    """
    counts_CC = np.zeros((len(names), len(names)))
    np.add.at(counts_CC, (outputs, labels), 1)
    found = f"right on {_shares(counts_CC, f' of {len(labels)} {what}')}"
    order_C, deviations = find_better_order(counts_CC)
    if not deviations:
        return found, "", False
    order = " ".join(names[number] for number in order_C)
    better = (
        f" with its outputs taken as {' '.join(names)}; taken as {order}, it would be right on"
        f" {_shares(counts_CC[:, order_C])}: name their order by --label_order {order}"
    )
    return found, better, is_beyond_luck(deviations, len(names))


def _shares(counts_CC: np.ndarray, of_what: str = "") -> str:
    """Write how many examples are right, and the share that independent outputs would get."""
    num, right = counts_CC.sum(), int(np.trace(counts_CC))
    guessed = 100 * (counts_CC.sum(0) @ counts_CC.sum(1)) / num**2
    return f"{right}{of_what} ({100 * right / num:.1f} %, guessing gets {guessed:.1f} %)"


def describe_values(outputs: np.ndarray, labels: np.ndarray, what: str) -> tuple[str, str, bool]:
    """Compare predicted with true values: see `describe_classes`."""
    pearson = correlations(outputs.tolist(), labels.tolist())["pearson"] / 100
    found = f"Pearson correlation {pearson:.3f} on {len(labels)} {what}"
    if falls(pearson, len(labels)):
        return found, ", its values fall where the labels rise", True
    if ((outputs - labels) ** 2).mean() <= labels.var():
        return found, "", False
    # Not refused: a teacher of few updates, too, is further away than the mean.
    return (
        found,
        f", its values (mean {outputs.mean():.2f}) are further from the labels (mean"
        f" {labels.mean():.2f}) than a constant: were they of another scale?",
        False,
    )


def describe_outputs(
    plan: Plan, outputs: Sequence[np.ndarray], features: Sequence[Feature], what: str, where: str
) -> tuple[str, str, bool]:
    """Compare a head's outputs for `features` with their labels: see `describe_classes`.

    where: for the message of outputs that are not finite.
    """
    if plan.task.head == "tokens":
        pairs = [
            (best, label)
            for best_T, feature in zip(outputs, features, strict=True)
            for best, label in zip(best_T, feature["labels"], strict=False)  # outputs are padded
            if label != IGNORED_LABEL
        ]
        best, labels = np.array(pairs).T
        finite(np.where(best < 0, np.nan, best), where)
        return describe_classes(best, labels, plan.labels, f"words of {what}")
    values = finite(np.stack(outputs), where)
    labels = np.array([feature["labels"] for feature in features])
    if plan.task.head == "values":
        return describe_values(values.reshape(-1), labels, what)
    return describe_classes(values.argmax(-1), labels, plan.labels, what)


# --------------------------------------------------------------------------------------------------
# A teacher; a model that is scored
# --------------------------------------------------------------------------------------------------


def check_teacher(plan: Plan) -> None:
    """Measure the teacher on some of the training examples and log the result.

    Raises InputError where another order of its classes agrees with the labels better than luck
    explains, or where its values fall as the labels rise.
    """
    if plan.teacher is None or plan.task.head == "next tokens":
        return
    # Evenly spaced examples could all be of one class; IMDb's come class by class.
    num = min(NUM_MEASURED, len(plan.train_features))
    features = random.Random(0).sample(plan.train_features, num)
    name = f"--teacher_name_or_path {plan.args.teacher_name_or_path}"
    found, problem, is_sure = describe_outputs(
        plan, outputs_of_teacher(plan, features), features, "training examples", name
    )
    if is_sure:
        else_ = "name" if plan.task.head == "values" else "or name"
        raise InputError(f"{name}: {found}{problem}; {else_} another teacher")
    logger.info("The teacher: %s.", found)
    if problem:
        logger.warning("%s: %s%s. Too little to tell: used as it is.", name, found, problem)


@torch.no_grad()
def outputs_of_teacher(plan: Plan, features: Sequence[Feature]) -> list[np.ndarray]:
    """Return what the head's row of HEADS keeps of the teacher's outputs, a row per feature."""
    args, collate, rows = plan.args, collator(plan.tokenizer.pad_token_id), []
    is_on_gpu = torch.cuda.is_available() and not args.no_cuda
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if is_on_gpu else "cpu"
    teacher, size = plan.teacher.to(device).eval(), args.per_gpu_eval_batch_size
    for first in range(0, len(features), size):
        batch = collate(features[first : first + size])
        labels = batch.pop("labels")
        given = {name: tensor.to(device) for name, tensor in batch.items()}
        with faster_for(teacher):
            logits = teacher(**inputs_of(teacher, given)).logits
        rows.extend(HEADS[plan.task.head].reduce(logits, labels).cpu().numpy())
    return rows


def check_scored(plan: Plan, outputs: Sequence[np.ndarray]) -> None:
    """Compare a scored model's outputs with the labels.

    Raises InputError where the order of its classes was assumed (LABEL_0, LABEL_1, ..) and another
    agrees better than luck explains; warns where names or --label_order say what the order is.
    """
    if plan.args.do_train or plan.task.head == "next tokens":
        return
    name = f"--model_name_or_path {plan.args.model_name_or_path}"
    found, problem, is_sure = describe_outputs(
        plan, outputs, plan.scored_features, "scored examples", name
    )
    if is_sure and plan.is_order_assumed:
        order = " ".join(plan.labels)
        raise InputError(f"{name}: {found}{problem}, or --label_order {order} to keep this one")
    if problem:
        logger.warning("%s: %s%s.", name, found, problem)
