"""A model's predictions for a task: as rows of predictions.tsv, and read back from such a file."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distil.system.files import atomic_path
from distil.tasks.readers import checked_label, entity_label, is_number, read_lines
from distil.tasks.schema import Example, Task
from utils import InputError, and_others


def prediction_rows(
    task: Task, examples: Sequence[Example], predictions: Sequence
) -> list[tuple[str, str]]:
    """List (id, prediction), the rows of a file of predictions: one per example, or per word."""
    if task.head != "tokens":
        return [
            (example.id, str(prediction))
            for example, prediction in zip(examples, predictions, strict=True)
        ]
    return [
        (word_id, label)
        for example, labels in zip(examples, predictions, strict=True)
        for word_id, label in zip(word_ids(example), labels, strict=True)
    ]


def word_ids(example: Example) -> list[str]:
    """List the ids of a sentence's words: stem of the file and number of the row."""
    stem, first = example.id.rsplit("-", 1)
    return [f"{stem}-{int(first) + place}" for place in range(len(example.texts))]


def write_predictions(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Write a file of predictions: columns id and prediction, tabs between."""
    with atomic_path(path) as temporary:
        temporary.write_text(
            "".join(f"{a}\t{b}\n" for a, b in [("id", "prediction"), *rows]),
            encoding="utf-8",
            newline="\n",
        )


def read_predictions(path: str | os.PathLike, task: Task, examples: Sequence[Example]) -> list:
    """Read a file of predictions, columns id and prediction; return one per example, in order.

    Raises InputError for unknown, missing or repeated ids, and for labels unknown to the task.
    """
    lines = read_lines(Path(path), "utf-8")
    if lines[0].split("\t") != ["id", "prediction"]:
        raise InputError(
            f"{path}:1: {lines[0][:60]!r}, expected the columns id and prediction with a tab"
            " between"
        )
    gold = prediction_rows(task, examples, [example.label for example in examples])
    known, found = {row_id for row_id, _ in gold}, {}
    for row, line in enumerate(lines[1:], 2):
        row_id, tab, label = line.partition("\t")
        if not tab:
            raise InputError(
                f"{path}:{row}: {line[:60]!r}, expected an id and a prediction with a tab between;"
                " correct the row"
            )
        if row_id not in known or row_id in found:
            what = (
                "there twice"
                if row_id in found
                else f"not one of the scored set's ({gold[0][0]}, ..)"
            )
            raise InputError(
                f"{path}:{row}: id {row_id} is {what}; are the predictions for this task and"
                " --data_dir?"
            )
        found[row_id] = _checked_prediction(label, task, f"{path}:{row}")
    if missing := [row_id for row_id, _ in gold if row_id not in found]:
        raise InputError(
            f"{path}: has no prediction for {and_others(missing[0], len(missing))}; predict for"
            " the whole set"
        )
    if task.head != "tokens":
        return [found[row_id] for row_id, _ in gold]
    return [tuple(found[word_id] for word_id in word_ids(example)) for example in examples]


def _checked_prediction(label: str, task: Task, where: str) -> str | float:
    if task.head == "tokens":
        return entity_label(label, where)
    if task.head == "values":
        if not is_number(label):
            raise InputError(f"{where}: prediction {label!r}, expected a number")
        return float(label)
    return checked_label(label, task, where)


def finite(values: np.ndarray, where: str) -> np.ndarray:
    """Return `values`; raise InputError where one is NaN or infinite."""
    if not np.isfinite(values).all():
        raise InputError(
            f"{where}: the model's outputs are NaN or infinite; lower --learning_rate, or train in"
            " float32"
        )
    return values
