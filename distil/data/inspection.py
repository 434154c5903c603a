"""The report on a token file as plain values: counts, shares, decoded sequences, contradictions."""

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distil.data.survey import MAX_ID, ShownSequence, Survey, percentile
from distil.data.token_files import MANY_UNKNOWN, MIN_LENGTH, TokenFile

# First lengths of the histogram's bins: the shortest that is trained on, and the limits of BERT
# (512) and GPT-2 (1024).
BIN_STARTS = (1, MIN_LENGTH + 1, 32, 64, 128, 256, 512, 513, 1024, 1025, 4096)
PERCENTILES = {"median": 50, "p90": 90, "p99": 99}
DECODED_IDS, SHOWN_IDS, SHOWN_CHARS = 800, 20, 200  # a character takes up to four ids
ROLES = ("start", "end", "pad", "unknown")


def section(card: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """Return a part of a card; {} if the card lacks it."""
    for name in names:
        card = card.get(name) if isinstance(card, Mapping) else None
    return card if isinstance(card, Mapping) else {}


def special_of(card: Mapping[str, Any], kind: str | None, tokenizer) -> dict[str, int | None]:
    """Return special ids by role: the card's, else the tokenizer's, else None."""
    found = section(card, "tokenizer", "special_ids")
    if not found and tokenizer is not None:
        from distil.models.architectures import architecture_named
        from distil.models.tokenizer_roles import special_ids

        found = dataclasses.asdict(special_ids(architecture_named(kind), tokenizer))
    return {role: found[role] if isinstance(found.get(role), int) else None for role in ROLES}


def token_of(tokenizer, number: int) -> str | None:
    """Return an id's token; None if the vocabulary lacks it, or without a tokenizer."""
    if tokenizer is None or not 0 <= number < 2**31:
        return None
    return tokenizer.convert_ids_to_tokens([number])[0]


def decode(tokenizer, ids: Sequence[int]) -> str:
    """Return the text of ids on one line, with <id N> for ids outside the vocabulary."""
    parts = []
    for is_known, run in itertools.groupby(
        ids, lambda number: token_of(tokenizer, number) is not None
    ):
        run = list(run)
        parts += (
            [tokenizer.decode(run, skip_special_tokens=False)]
            if is_known
            else [f" <id {number}> " for number in run]
        )
    text = " ".join("".join(parts).split())
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def contradictions(survey: Survey, tokens: TokenFile, vocab_size: int | None) -> list[str]:
    """Compare the file with its card and its vocabulary: one clause per difference."""
    card, special = tokens.card, survey.special
    bounds = {special["start"], special["end"]} - {None}
    counted = {
        "sequences": len(tokens.lengths_N),
        "ids": len(tokens.ids_M),
        "longest": max(survey.length_counts),
        "largest_id": survey.largest,
    }
    if section(card, "tokenizer", "special_ids"):
        counted["unknown"] = survey.count(special["unknown"]) if survey.has_unknown else 0
        counted["boundary_ids_inside"] = sum(map(survey.inside, bounds))
    counts = section(card, "counts")
    found = [
        f"the card counts {name} {counts[name]}, the file has {value}"
        for name, value in counted.items()
        if counts.get(name, value) != value
    ]
    for name, value in {"kind": tokens.format, "dtype": tokens.ids_M.dtype.name}.items():
        if card.get(name, value) != value:
            found.append(f"the card says {name} {card[name]}, the file is {value}")
    listed = card.get("many_unknown")
    if isinstance(listed, list) and not set(survey.many_unknown) <= set(listed):
        number = min(set(survey.many_unknown) - set(listed))
        found.append(
            f"sequence {number} has {MANY_UNKNOWN} unknown ids or more, but is not in the card's"
            " list of such sequences"
        )
    if vocab_size is not None and survey.outside(vocab_size):
        found.append(
            f"{survey.outside(vocab_size)} ids are outside the vocabulary, ids 0 to"
            f" {vocab_size - 1} (smallest {survey.smallest}, largest {survey.largest})"
        )
    if survey.num_wrong:
        begins = "" if special["start"] is None else f"begin with id {special['start']} and "
        found.append(
            f"{survey.num_wrong} sequences, sequence {survey.first_wrong} the first, do not"
            f" {begins}end with id {special['end']}"
        )
    return found


def make_report(
    survey: Survey, tokens: TokenFile, paths: Sequence[str], tokenizer, top: int
) -> dict[str, Any]:
    """Gather the report's values, ready for JSON. paths: of the token file's files."""
    vocab_size = section(tokens.card, "tokenizer").get("vocab_size")
    if not isinstance(vocab_size, int):
        vocab_size = None if tokenizer is None else len(tokenizer)
    sizes = [
        {"path": path, "bytes": os.path.getsize(path)} for path in paths if os.path.exists(path)
    ]
    return {
        "path": tokens.path,
        "format": tokens.format,
        "dtype": tokens.ids_M.dtype.name,
        "files": sizes,
        "bytes": sum(file["bytes"] for file in sizes),
        "card": _card_facts(tokens.card),
        "sequences": len(tokens.lengths_N),
        "ids": len(tokens.ids_M),
        "lengths": _length_facts(survey.length_counts),
        "vocabulary": _vocabulary_facts(survey, vocab_size),
        "unknown": _unknown_facts(survey, len(tokens.ids_M)),
        "special": _special_facts(survey, tokenizer),
        "boundaries": _boundary_facts(survey),
        "most_frequent": _frequent_facts(survey, tokenizer, top, len(tokens.ids_M)),
        "shown": [
            _shown_facts(sequence, survey.has_unknown, tokens, tokenizer)
            for sequence in survey.shown()
        ],
        "problems": contradictions(survey, tokens, vocab_size),
    }


def _card_facts(card: Mapping[str, Any]) -> dict[str, Any]:
    # Checksums and the list of sequences are for programs, and may take megabytes.
    return {
        name: value
        for name, value in card.items()
        if name not in ("checksums", "sha256", "many_unknown")
    }


def _length_facts(length_counts: Mapping[int, int]) -> dict[str, Any]:
    num_sequences = sum(length_counts.values())
    num_ids = sum(length * count for length, count in length_counts.items())
    histogram = []
    for start, end in itertools.pairwise([*BIN_STARTS, None]):
        within = {k: v for k, v in length_counts.items() if k >= start and (end is None or k < end)}
        histogram.append(
            {
                "from": start,
                "to": end and end - 1,
                "sequences": sum(within.values()),
                "ids": sum(k * v for k, v in within.items()),
            }
        )
    return {
        "mean": num_ids / num_sequences,
        **{name: percentile(length_counts, percent) for name, percent in PERCENTILES.items()},
        "shortest": min(length_counts),
        "longest": max(length_counts),
        "short": sum(count for length, count in length_counts.items() if length <= MIN_LENGTH),
        "histogram": histogram,
    }


def _vocabulary_facts(survey: Survey, vocab_size: int | None) -> dict[str, int | None]:
    occur = int(np.count_nonzero(survey.counts_V[:vocab_size]))
    known = vocab_size is not None
    return {
        "size": vocab_size,
        "occur": occur,
        "never": vocab_size - occur if known else None,
        "outside": survey.outside(vocab_size) if known else None,
        "smallest": survey.smallest,
        "largest": survey.largest,
    }


def _unknown_facts(survey: Survey, num_ids: int) -> dict[str, Any] | None:
    if not survey.has_unknown:
        return None
    number = survey.special["unknown"]
    count = survey.count(number)
    return {
        "id": number,
        "count": count,
        "share": count / num_ids,
        "half_unknown_sequences": survey.half_unknown,
    }


def _special_facts(survey: Survey, tokenizer) -> list[dict[str, Any]]:
    numbers = {number for number in survey.special.values() if number is not None}
    numbers |= set() if tokenizer is None else set(tokenizer.all_special_ids)
    return [
        {
            "id": number,
            "token": token_of(tokenizer, number),
            "roles": [role for role, of_role in survey.special.items() if of_role == number],
            "first": int(survey.first_V[number]),
            "last": int(survey.last_V[number]),
            "inside": survey.inside(number),
        }
        for number in sorted(numbers)
        if 0 <= number < MAX_ID
    ]


def _boundary_facts(survey: Survey) -> dict[str, Any] | None:
    if survey.special["start"] is None or survey.special["end"] is None:
        return None
    return {
        "start": survey.special["start"],
        "end": survey.special["end"],
        "wrong_sequences": survey.num_wrong,
        "first_wrong": survey.first_wrong,
    }


def _frequent_facts(survey: Survey, tokenizer, top: int, num_ids: int) -> list[dict[str, Any]]:
    order = np.argsort(-survey.counts_V, kind="stable")[:top]
    return [
        {
            "id": number,
            "count": count,
            "share": count / num_ids,
            "token": token_of(tokenizer, number),
        }
        for number, count in zip(order.tolist(), survey.counts_V[order].tolist(), strict=True)
        if count
    ]


def _shown_facts(
    sequence: ShownSequence, has_unknown: bool, tokens: TokenFile, tokenizer
) -> dict[str, Any]:
    ids = tokens.ids_M[sequence.start : sequence.start + min(sequence.length, DECODED_IDS)].tolist()
    text = None if tokenizer is None else decode(tokenizer, ids)
    if text is not None and (len(text) > SHOWN_CHARS or len(ids) < sequence.length):
        text = text[:SHOWN_CHARS] + "..."
    return {
        "number": sequence.number,
        "why": sequence.reason,
        "length": sequence.length,
        "unknown": sequence.unknown if has_unknown else None,
        "ids": ids[:SHOWN_IDS],
        "text": text,
    }
