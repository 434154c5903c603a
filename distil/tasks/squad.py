"""SQuAD's files and metric: questions from JSON (v1.1 and v2.0), exact match and F1 of answers.

First and last step of run_squad_w_distillation.py; squad_spans.py is between them: from questions
to windows of tokens, and from logits to answers. Sources: Rajpurkar et al., 2016 (v1.1), section
6.1 for the metric; Rajpurkar et al., 2018 (v2.0).
"""

import dataclasses
import os
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from distil.system.files import require_file
from distil.system.json_files import read_json
from utils import InputError, logger

MAX_BYTES = 2**31  # of a file of questions; SQuAD's have 45 MB


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about one context.

    answers: gold texts; none where the context doesn't answer the question (v2.0). answer_start:
    position of the first answer's first character in the context; None without an answer, and
    outside of training.
    """

    id: str
    text: str
    context: str
    answers: tuple[str, ...]
    answer_start: int | None = None

    @property
    def is_impossible(self) -> bool:
        """Return whether the context has no answer."""
        return not self.answers


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def read_squad_json(path: str | os.PathLike, what: str) -> Any:
    """Read a JSON file; raise InputError naming the flag `what`, the file and the error's place."""
    require_file(path, what)
    where, remedy = f"{what} {path}", "take another copy of the file"
    return read_json(path, where, remedy, ..., strict=False, max_bytes=MAX_BYTES)


def read_questions(
    path: str | os.PathLike,
    flag: str,
    *,
    with_impossible: bool,
    for_training: bool,
    skip_misplaced: bool = False,
) -> list[Question]:
    """Read and check the questions of a SQuAD file, in its order.

    with_impossible: admit v2.0's questions without an answer. for_training: require each first
    answer at its answer_start in the context; skip_misplaced: skip the others with a warning.
    Raises InputError naming file and question.
    """
    content = read_squad_json(path, flag)
    questions, misplaced, seen = [], [], set()
    for where, context, entry in _entries(content, f"{flag} {path}"):
        question = _question(entry, context, where, with_impossible)
        if question.id in seen:
            raise InputError(
                f"{flag} {path}: id {question.id!r} is there twice; predictions are matched by id,"
                " give each question another id"
            )
        seen.add(question.id)
        if for_training and not question.is_impossible:
            question = dataclasses.replace(question, answer_start=_answer_start(entry, where))
            if not _is_at_its_place(question):
                misplaced.append(question)
                continue
        questions.append(question)
    _report_misplaced(misplaced, f"{flag} {path}", skip_misplaced)
    if not questions:
        raise InputError(
            f"{flag} {path}: holds no questions; expected some under data / paragraphs / qas"
        )
    return questions


def _entries(content: Any, where: str):
    """Yield (place for messages, context, entry of qas) for each question of a file."""
    for i, article in enumerate(_list_of(content, "data", where)):
        for j, paragraph in enumerate(_list_of(article, "paragraphs", f"{where}: article {i + 1}")):
            at = f"{where}: article {i + 1}, paragraph {j + 1}"
            context = _text_of(paragraph, "context", at)
            for k, entry in enumerate(_list_of(paragraph, "qas", at)):
                yield f"{at}, question {k + 1}", context, entry


def _member(holder: Any, name: str, kind: type, where: str) -> Any:
    if (
        not isinstance(holder, dict)
        or not isinstance(holder.get(name), kind)
        or isinstance(holder[name], bool)
    ):
        got = (
            f"a {type(holder[name]).__name__}"
            if isinstance(holder, dict) and name in holder
            else "none"
        )
        expected = {list: "a list", str: "a text", int: "a whole number"}[kind]
        raise InputError(
            f"{where}: {name} has to be {expected}, got {got}; expected SQuAD's own JSON,"
            " correct it"
        )
    return holder[name]


def _list_of(holder: Any, name: str, where: str) -> list:
    return _member(holder, name, list, where)


def _text_of(holder: Any, name: str, where: str) -> str:
    text = _member(holder, name, str, where)
    if not text.strip():
        raise InputError(f"{where}: {name} is empty; fill it, or take the entry out")
    _require_unicode(text, name, where)
    return text


def _require_unicode(text: str, name: str, where: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(
            f"{where}: {name} holds half a surrogate pair, which is no character; correct it"
        )


def _question(entry: Any, context: str, where: str, with_impossible: bool) -> Question:
    """Make a question without answer_start."""
    name = _text_of(entry, "id", where)
    at = f"{where} (id {name!r})"
    text = _text_of(entry, "question", at)
    is_impossible = entry.get("is_impossible", False)
    if is_impossible not in (True, False):
        raise InputError(
            f"{at}: is_impossible is {is_impossible!r}, expected true or false; correct it"
        )
    if is_impossible and not with_impossible:
        raise InputError(
            f"{at}: is_impossible is true, as in SQuAD v2.0; add --version_2_with_negative"
        )
    answers = entry.get("answers", []) if is_impossible else _list_of(entry, "answers", at)
    if is_impossible and answers:
        raise InputError(f"{at}: is_impossible is true, but it has answers; correct one of the two")
    if not is_impossible and not answers:
        raise InputError(
            f"{at}: has no answers, expected at least one (v2.0: or is_impossible true); add it"
        )
    texts = tuple(
        _member(answer, "text", str, f"{at}, answer {n + 1}") for n, answer in enumerate(answers)
    )
    for answer in texts:
        _require_unicode(answer, "an answer", at)
    return Question(name, text, context, texts)


def _answer_start(entry: dict, where: str) -> int:
    return _member(
        entry["answers"][0], "answer_start", int, f"{where} (id {entry['id']!r}), answer 1"
    )


def _is_at_its_place(question: Question) -> bool:
    start, answer = question.answer_start, question.answers[0]
    return (
        start >= 0
        and bool(answer.strip())
        and question.context[start : start + len(answer)] == answer
    )


def _report_misplaced(misplaced: Sequence[Question], where: str, skip: bool) -> None:
    """Raise InputError for answers that are not at their place, or warn where they are skipped."""
    # Differs from the original: 2019 searched the answer's words anywhere in the context and
    # skipped, with a line in the log, those not found. A wrong position silently trains on wrong
    # words.
    if not misplaced:
        return
    first, others = misplaced[0], len(misplaced) - 1
    found = first.context[max(first.answer_start, 0) :][: len(first.answers[0])]
    message = (
        f"{where}: id {first.id!r}: the answer {first.answers[0][:60]!r} is not at character"
        f" {first.answer_start} of its context ({found[:60]!r}"
        f" is){f', nor are {others} others at theirs' if others else ''}"
    )
    if not skip:
        raise InputError(
            f"{message}; correct answer_start, or skip such questions with --skip_misplaced_answers"
        )
    logger.warning("%s: skipped in training.", message)


def read_predictions(path: str | os.PathLike, flag: str) -> dict[str, str]:
    """Read a file of predictions, {id: answer}; raise InputError for any other content."""
    content = read_squad_json(path, flag)
    if not isinstance(content, dict):
        raise InputError(
            f"{flag} {path}: holds a {type(content).__name__}, expected an object {{id: answer}}"
        )
    for name, answer in content.items():
        if not isinstance(answer, str):
            raise InputError(
                f"{flag} {path}: id {name!r} has a {type(answer).__name__}, expected the answer's"
                " text; correct it"
            )
    return content


# --------------------------------------------------------------------------------------------------
# Exact match and F1
# --------------------------------------------------------------------------------------------------


def score_predictions(
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    *,
    with_impossible: bool = False,
) -> dict[str, float]:
    """Score the whole set: exact, f1 (x100) and total; a question without a prediction counts 0.

    with_impossible: also HasAns_ and NoAns_ figures, as v2.0's script.
    """
    # Differs from the original: v2.0's script leaves questions without a prediction out of the
    # means; a part of the answers would look like a better model. v1.1's script counts 0, too.
    scored = [
        score_answer(question, predictions[question.id], with_impossible)
        if question.id in predictions
        else (0.0, 0.0)
        for question in questions
    ]
    scores = _means(scored, "")
    if with_impossible:
        for name, is_impossible in (("HasAns_", False), ("NoAns_", True)):
            of_kind = [
                pair
                for question, pair in zip(questions, scored, strict=True)
                if question.is_impossible is is_impossible
            ]
            scores |= _means(of_kind, name) if of_kind else {}
    return scores


def check_ids(questions: Sequence[Question], predictions: Mapping[str, str], what: str) -> None:
    """Warn of questions without a prediction and of predictions for unknown ids.

    Raises InputError naming `what` where no id is known.
    """
    known = {question.id for question in questions}
    missing, unknown = known - predictions.keys(), predictions.keys() - known
    if missing == known:
        raise InputError(
            f"{what}: none of its {len(predictions)} ids is a question's, such as"
            f" {questions[0].id!r}; name the file that the predictions were made for"
            " (--predict_file)"
        )
    for names, problem in (
        (missing, "questions without a prediction, counted as 0"),
        (unknown, "predictions for unknown ids, ignored"),
    ):
        if names:
            logger.warning("%s: %s: %d, such as %r.", what, problem, len(names), min(names))


def _means(scored: Sequence[tuple[float, float]], prefix: str) -> dict[str, float]:
    exact, f1 = (statistics.fmean(column) for column in zip(*scored, strict=True))
    return {f"{prefix}exact": exact, f"{prefix}f1": f1, f"{prefix}total": len(scored)}


def score_answer(
    question: Question, prediction: str, with_impossible: bool = False
) -> tuple[float, float]:
    """Return exact match and F1 (0 to 100) of one answer, each the best over the gold answers.

    with_impossible: apply v2.0's rule: ignore gold answers of articles and punctuation only; where
    no other is left, the empty answer is right.
    """
    gold = list(question.answers)
    if with_impossible:
        gold = [answer for answer in gold if not _torchmetrics_scores(answer, [""])[0]] or [""]
    return _torchmetrics_scores(prediction, gold)


def _torchmetrics_scores(prediction: str, gold: list[str]) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics' optional dependencies
        from torchmetrics.functional.text.squad import squad  # takes a second to import

    answers = {"text": gold, "answer_start": [0] * len(gold)}
    found = squad({"id": "1", "prediction_text": prediction}, {"id": "1", "answers": answers})
    return found["exact_match"].item(), found["f1"].item()
