"""From questions to windows of tokens, and from a model's start and end logits to answers.

run_squad_w_distillation.py trains and predicts on these windows; squad.py reads the questions and
scores the answers. A context longer than a model's input is divided into overlapping windows, each
after the whole question (Devlin et al., 2018, section 4.2); an answer is the span with the greatest
sum of start logit and end logit.

Shape suffixes: W windows, T padded length, C tokens of a context in a window, S start candidates, E
end candidates.
"""

import dataclasses
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel

from distil.tasks.squad import Question
from utils import InputError, logger

CLS_POSITION = 0
NOTHING_FOUND = "empty"  # the answer where no span is admissible (v1.1), as in 2019
TEXTS_AT_ONCE = 1000

# --------------------------------------------------------------------------------------------------
# Windows
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Limits:
    """Lengths in tokens.

    max_seq_length: of a window with special tokens. doc_stride: between two windows' first tokens.
    """

    max_seq_length: int = 384
    doc_stride: int = 128
    max_query_length: int = 64


@dataclasses.dataclass(frozen=True)
class Window:
    """A question and a part of its context.

    question: index among the questions given. ids: token ids with special tokens, without padding.
    context_at: position of the first context token in ids. first: index of that token in the whole
    context. offsets: (C, 2), first and last + 1 character of each context token. span: positions of
    the answer's first and last token; [CLS] twice where the window doesn't contain the answer.
    """

    question: int
    ids: np.ndarray
    context_at: int
    first: int
    offsets: np.ndarray
    span: tuple[int, int] = (CLS_POSITION, CLS_POSITION)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A text's token ids; offsets: (tokens, 2), first and last + 1 character of each token."""

    ids: np.ndarray
    offsets: np.ndarray


def encode(texts: Sequence[str], tokenizer) -> Iterator[Encoded]:
    """Encode texts without special tokens; offsets are those of the original text."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # "[SEP]" in a text is text, not a separator
    # RoBERTa's tokens include the space before them: read the first word as one after a space, too.
    byte_level = isinstance(backend.pre_tokenizer, ByteLevel)
    lead = " " if byte_level and not backend.pre_tokenizer.add_prefix_space else ""
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        chunk = texts[start : start + TEXTS_AT_ONCE]
        encodings = backend.encode_batch(
            [lead + _with_plain_spaces(text) for text in chunk], add_special_tokens=False
        )
        for text, encoding in zip(chunk, encodings, strict=True):
            offsets = [
                _trimmed(text, max(a - len(lead), 0), b - len(lead)) for a, b in encoding.offsets
            ]
            offsets = offsets if text.isascii() else _with_marks(text, offsets)
            yield Encoded(
                np.array(encoding.ids, dtype=np.int32),
                np.array(offsets, dtype=np.int32).reshape(-1, 2),
            )


def _with_plain_spaces(text: str) -> str:
    """Replace line ends and tabs by spaces; all characters keep their positions."""
    return text.translate(dict.fromkeys(map(ord, "\t\n\r\u202f"), " "))


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Exclude white space at both ends from a token's characters; byte-level tokens include it."""
    piece = text[start:end]
    return (
        (start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip()))
        if piece.strip()
        else (end, end)
    )


def _with_marks(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Extend each token by the combining accents after it, which a tokenizer may strip."""
    marked = []
    for number, (start, end) in enumerate(offsets):
        stop = offsets[number + 1][0] if number + 1 < len(offsets) else len(text)
        while end < stop and unicodedata.category(text[end]) == "Mn":
            end += 1
        marked.append((start, end))
    return marked


def make_windows(questions: Sequence[Question], tokenizer, limits: Limits) -> list[Window]:
    """Make the windows of all questions, in order, each question's from left to right.

    Questions with an answer_start get spans; those whose answer has no token are skipped with a
    warning.
    """
    contexts = list(dict.fromkeys(question.context for question in questions))
    encoded = dict(zip(contexts, encode(contexts, tokenizer), strict=True))
    windows, num_without = [], 0
    for number, query in enumerate(encode([question.text for question in questions], tokenizer)):
        question, context = questions[number], encoded[questions[number].context]
        answer = _answer_tokens(question, context.offsets)
        if question.answer_start is not None and answer is None:
            num_without += 1
            continue
        windows += _windows_of(
            number, query.ids[: limits.max_query_length], context, answer, tokenizer, limits
        )
    if num_without:
        logger.warning(
            "%d questions are skipped in training: the tokenizer makes no token of their answer.",
            num_without,
        )
    if not windows:
        raise InputError("the tokenizer makes no token of any answer; is it the model's own?")
    return windows


def _answer_tokens(question: Question, offsets: np.ndarray) -> tuple[int, int] | None:
    """Return the indices of the answer's first and last context token; None without any."""
    if question.answer_start is None:
        return None
    end = question.answer_start + len(question.answers[0])
    holds = (
        (offsets[:, 1] > question.answer_start)
        & (offsets[:, 0] < end)
        & (offsets[:, 0] < offsets[:, 1])
    )
    tokens = np.flatnonzero(holds)
    return (int(tokens[0]), int(tokens[-1])) if len(tokens) else None


def _windows_of(
    number: int,
    query: np.ndarray,
    context: Encoded,
    answer: tuple[int, int] | None,
    tokenizer,
    limits: Limits,
) -> Iterator[Window]:
    # After the question BERT has one separator, RoBERTa two.
    num_separators = tokenizer.num_special_tokens_to_add(pair=True) - 2
    head = np.array(
        [tokenizer.cls_token_id, *query, *[tokenizer.sep_token_id] * num_separators], dtype=np.int32
    )
    room = limits.max_seq_length - len(head) - 1
    for first in window_starts(len(context.ids), room, limits.doc_stride):
        part = slice(first, first + room)
        ids = np.concatenate([head, context.ids[part], [tokenizer.sep_token_id]]).astype(np.int32)
        span = _span_here(answer, first, len(context.ids[part]), len(head))
        yield Window(number, ids, len(head), first, context.offsets[part], span)


def window_starts(num_tokens: int, room: int, doc_stride: int) -> range:
    """Return the indices of the context tokens at which windows of `room` tokens begin."""
    step = min(room, doc_stride)
    return range(0, max(num_tokens - room, 0) + step, step)


def _span_here(
    answer: tuple[int, int] | None, first: int, num_tokens: int, context_at: int
) -> tuple[int, int]:
    if answer is None or answer[0] < first or answer[1] >= first + num_tokens:
        return (CLS_POSITION, CLS_POSITION)
    return (answer[0] - first + context_at, answer[1] - first + context_at)


class WindowDataset(torch.utils.data.Dataset):
    """Windows as inputs, padded to max_seq_length; the loss's softmax includes the padding."""

    def __init__(
        self, windows: Sequence[Window], max_seq_length: int, pad_id: int, *, with_spans: bool
    ):
        self.windows, self.max_seq_length, self.pad_id, self.with_spans = (
            windows,
            max_seq_length,
            pad_id,
            with_spans,
        )

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        window = self.windows[number]
        ids_T = torch.full((self.max_seq_length,), self.pad_id)
        ids_T[: len(window.ids)] = torch.from_numpy(window.ids)
        position_T = torch.arange(self.max_seq_length)
        is_real_T = position_T < len(window.ids)
        item = {
            "input_ids": ids_T,
            "attention_mask": is_real_T.long(),
            "token_type_ids": (is_real_T & (position_T >= window.context_at)).long(),
        }
        if self.with_spans:
            item |= {
                "start_positions": torch.tensor(window.span[0]),
                "end_positions": torch.tensor(window.span[1]),
            }
        return item


# --------------------------------------------------------------------------------------------------
# Answers
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules by which answers are chosen.

    n_best_size: number of starts, ends and answers considered. max_answer_length: in tokens.
    with_null: v2.0, whose answer is "" where its score exceeds the best span's by more than
    null_score_diff_threshold.
    """

    n_best_size: int = 20
    max_answer_length: int = 30
    with_null: bool = False
    null_score_diff_threshold: float = 0.0


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A possible answer: its text and the logits of its first and last token."""

    text: str
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        return self.start_logit + self.end_logit


@dataclasses.dataclass
class Answers:
    """By question id: answer, n best with probabilities, null's score minus best span's (v2.0)."""

    predictions: dict[str, str] = dataclasses.field(default_factory=dict)
    nbest: dict[str, list[dict]] = dataclasses.field(default_factory=dict)
    null_odds: dict[str, float] = dataclasses.field(default_factory=dict)


def decode(
    questions: Sequence[Question],
    windows: Sequence[Window],
    start_logits_WT: np.ndarray,
    end_logits_WT: np.ndarray,
    rules: Rules,
) -> Answers:
    """Choose each question's answer from its windows' logits; raise InputError unless finite."""
    if not (np.isfinite(start_logits_WT).all() and np.isfinite(end_logits_WT).all()):
        raise InputError(
            "the model's logits are not finite: its training diverged; lower --learning_rate"
        )
    assert len(start_logits_WT) == len(end_logits_WT) == len(windows), (
        "each window must be read exactly once"
    )
    by_question = defaultdict(list)
    for row, window in enumerate(windows):
        by_question[window.question].append(row)
    answers = Answers()
    for number, question in enumerate(questions):
        rows = by_question[number]
        mine = [windows[row] for row in rows]
        _choose(question, mine, start_logits_WT[rows], end_logits_WT[rows], rules, answers)
    return answers


def _choose(
    question: Question, windows: Sequence[Window], start_WT, end_WT, rules: Rules, answers: Answers
) -> None:
    null = _null(start_WT, end_WT) if rules.with_null else None
    candidates = [
        Candidate(question.context[a:b], start, end)
        for window, is_max_C, start_T, end_T in zip(
            windows, is_max_context(windows), start_WT, end_WT, strict=True
        )
        for a, b, start, end in window_spans(window, is_max_C, start_T, end_T, rules)
    ]
    best = best_texts(candidates, null, rules.n_best_size)
    span = next((candidate for candidate in best if candidate.text), None)
    if null is None:
        answers.predictions[question.id] = best[0].text
    else:
        # Differs from the original: "" where no span is admissible. 2019's "empty" counts as wrong.
        odds = null.score - (span.score if span else 0.0)
        answers.null_odds[question.id] = odds
        is_null = span is None or odds > rules.null_score_diff_threshold
        answers.predictions[question.id] = "" if is_null else span.text
    answers.nbest[question.id] = _with_probabilities(best)


def _null(start_WT: np.ndarray, end_WT: np.ndarray) -> Candidate:
    """Make the candidate "" from the logits at [CLS] of the window with the lowest sum."""
    row = int(np.argmin(start_WT[:, CLS_POSITION] + end_WT[:, CLS_POSITION]))
    return Candidate("", float(start_WT[row, CLS_POSITION]), float(end_WT[row, CLS_POSITION]))


def is_max_context(windows: Sequence[Window]) -> list[np.ndarray]:
    """Return for each window of a question, (C,): whether a token has its largest context there.

    The context's size is min(tokens on the left, tokens on the right) + 0.01 x tokens in the
    window; of equal windows the first one counts.
    """
    num_tokens = max(window.first + len(window.offsets) for window in windows)
    around = np.full((len(windows), num_tokens), -np.inf)
    for row, window in enumerate(windows):
        left_C = np.arange(len(window.offsets))
        around[row, window.first + left_C] = np.minimum(left_C, left_C[::-1]) + 0.01 * len(left_C)
    best = around.argmax(axis=0)
    return [best[w.first : w.first + len(w.offsets)] == row for row, w in enumerate(windows)]


def window_spans(
    window: Window, is_max_C: np.ndarray, start_T: np.ndarray, end_T: np.ndarray, rules: Rules
) -> Iterator[tuple[int, int, float, float]]:
    """Yield (first character, last + 1, start logit, end logit) of a window's admissible spans."""
    starts_S, ends_E = (
        _top(logits_T, rules.n_best_size) - window.context_at for logits_T in (start_T, end_T)
    )
    num_tokens = len(window.offsets)
    starts_S = starts_S[(starts_S >= 0) & (starts_S < num_tokens)]
    starts_S = starts_S[is_max_C[starts_S]]
    ends_E = ends_E[(ends_E >= 0) & (ends_E < num_tokens)]
    length_SE = ends_E[None, :] - starts_S[:, None] + 1
    for s, e in np.argwhere((length_SE >= 1) & (length_SE <= rules.max_answer_length)):
        first, last = starts_S[s], ends_E[e]
        a, b = window.offsets[first, 0], window.offsets[last, 1]
        if a < b:  # otherwise tokens without characters, such as white space
            yield (
                a,
                b,
                float(start_T[first + window.context_at]),
                float(end_T[last + window.context_at]),
            )


def _top(logits_T: np.ndarray, num: int) -> np.ndarray:
    return np.argsort(-logits_T, kind="stable")[:num]


def best_texts(
    candidates: Sequence[Candidate], null: Candidate | None, num: int
) -> list[Candidate]:
    """Return the best candidate of each of the best `num` texts, best first, always with the null.

    Without any candidate return NOTHING_FOUND.
    """
    # Differs from the original: texts are slices of the context. 2019 joined tokens to words and
    # aligned these with the context's words.
    ranked = sorted(
        [*candidates, *([null] if null else [])],
        key=lambda candidate: candidate.score,
        reverse=True,
    )
    best: dict[str, Candidate] = {}
    for candidate in ranked:
        if len(best) == num:
            break
        best.setdefault(candidate.text, candidate)
    if null:
        best.setdefault("", null)
    return list(best.values()) or [Candidate(NOTHING_FOUND, 0.0, 0.0)]


def _with_probabilities(best: Sequence[Candidate]) -> list[dict]:
    scores = np.array([candidate.score for candidate in best])
    weights = np.exp(scores - scores.max())
    return [
        {
            "text": c.text,
            "probability": float(p),
            "start_logit": c.start_logit,
            "end_logit": c.end_logit,
        }
        for c, p in zip(best, weights / weights.sum(), strict=True)
    ]
