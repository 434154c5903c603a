"""Say what is in a token file, a pickle or a store: counts, lengths, frequent and unknown ids, some
sequences decoded.

The file is read once, a piece at a time. Ids are counted as they are, before training splits and
filters sequences.
"""

import argparse
import collections
import dataclasses
import itertools
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distil.data import store
from distil.data.store import BLOCK_BYTES
from distil.data.token_files import (
    CHUNK_IDS,
    MANY_UNKNOWN,
    MAX_LISTED,
    MIN_LENGTH,
    TokenFile,
    files_of,
    open_token_file,
)
from distil.system.files import require_output, write_json
from utils import InputError, OneLineParser, bar_options, logger, run_program, setup_logging

# Where the bins of the histogram begin: at what training removes, and around the limits of BERT
# (512) and GPT-2 (1024).
BIN_STARTS = (1, MIN_LENGTH + 1, 32, 64, 128, 256, 512, 513, 1024, 1025, 4096)
PERCENTILES = {"median": 50, "p90": 90, "p99": 99}
CHUNK_SEQUENCES = 2**17  # that are looked at in one go
MAX_ID = 2**20  # ids from here on are counted together: no vocabulary comes near
MAX_SHOWN = 10_000  # sequences or ids; more is a slip of the hand
DECODED_IDS, SHOWN_IDS, SHOWN_CHARS, BAR_WIDTH = (
    800,
    20,
    200,
    40,
)  # a character takes up to four ids
ROLES = ("start", "end", "pad", "unknown")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises InputError naming the flag that is out of range."""
    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "file", metavar="FILE", help="a pickle, or a store: its prefix, or any of its files"
    )
    parser.add_argument(
        "--tokenizer_type",
        choices=["bert", "roberta", "gpt2"],
        help="(default: what the file's card says)",
    )
    parser.add_argument(
        "--tokenizer_name", help="hub name or local folder (default: what the file's card says)"
    )
    parser.add_argument(
        "--do_lower_case",
        action=argparse.BooleanOptionalAction,
        help="bert only (default: as in the card)",
    )
    parser.add_argument(
        "--num_sequences",
        type=int,
        default=5,
        help="sequences shown, evenly spaced (default: %(default)s)",
    )
    parser.add_argument(
        "--top", type=int, default=20, help="most frequent ids shown (default: %(default)s)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare every checksum, and the card with the file; status 2 where they differ",
    )
    parser.add_argument(
        "--json", metavar="PATH", help="write what is printed to this file, too, as JSON"
    )
    args = parser.parse_args(argv)
    for flag in ("num_sequences", "top"):
        if not 0 <= getattr(args, flag) <= MAX_SHOWN:
            raise InputError(f"--{flag} {getattr(args, flag)}: expected 0 to {MAX_SHOWN}")
    return args


# --------------------------------------------------------------------------------------------------
# One pass over the file
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a sequence is. why: it is shown; start: of its first id."""

    why: str
    number: int
    start: int
    length: int
    unknown: int


class Survey:
    """Count what is in a token file, a chunk of sequences at a time.

    length_counts: length -> sequences. counts_V, first_V, last_V: occurrences of the ids below
    MAX_ID anywhere, as a sequence's first, and as its last where that is another. half_unknown:
    sequences at least half of which is unknown;
    many_unknown: numbers of those with MANY_UNKNOWN or more, MAX_LISTED + 1 at most.
    """

    def __init__(self, special: Mapping[str, int | None], sampled: Sequence[int] = ()):
        """special: role -> id, None where it isn't known. sampled: numbers of sequences to be
        found, ascending.
        """
        self.special = special
        self.sampled = np.asarray(sampled, np.int64)
        self.length_counts: collections.Counter[int] = collections.Counter()
        self.counts_V, self.first_V, self.last_V = (np.zeros(MAX_ID, np.int64) for _ in range(3))
        self.num_odd, self.smallest, self.largest = 0, sys.maxsize, -sys.maxsize
        self.num_wrong, self.first_wrong = 0, None
        self.half_unknown = 0
        self.many_unknown: list[int] = []
        self.places: list[Place] = []
        self.extremes: dict[str, tuple[float, Place]] = {}

    @property
    def has_unknown(self) -> bool:
        """True where there is an unknown token, which no boundary token stands in for, as GPT-2's
        does.
        """
        return self.special["unknown"] not in (None, self.special["start"], self.special["end"])

    def read(self, tokens: TokenFile) -> "Survey":
        """Take a whole file, with a progress bar."""
        with tqdm(
            total=len(tokens.ids_M), unit="ids", unit_scale=True, desc="read", **bar_options()
        ) as bar:
            first_id = 0
            for first in range(0, len(tokens.lengths_N), CHUNK_SEQUENCES):
                lengths = tokens.lengths_N[first : first + CHUNK_SEQUENCES].astype(np.int64)
                ends = first_id + np.cumsum(lengths)
                unknown = np.zeros(len(lengths), np.int64)
                for start in range(first_id, int(ends[-1]), CHUNK_IDS):
                    ids = tokens.ids_M[start : min(start + CHUNK_IDS, int(ends[-1]))]
                    self._take_ids(ids)
                    unknown += self._unknown_by_sequence(ids, start, ends)
                    bar.update(len(ids))
                self._take_boundaries(
                    first, tokens.ids_M[ends - lengths], tokens.ids_M[ends - 1], lengths
                )
                self._take_sequences(first, ends - lengths, lengths, unknown)
                first_id = int(ends[-1])
        return self

    def _take_ids(self, ids: np.ndarray) -> None:
        smallest, largest = int(ids.min()), int(ids.max())
        self.smallest, self.largest = min(self.smallest, smallest), max(self.largest, largest)
        if smallest < 0 or largest >= MAX_ID:
            is_odd = (ids < 0) | (ids >= MAX_ID)
            self.num_odd += int(is_odd.sum())
            ids = ids[~is_odd]
        _count(self.counts_V, ids)

    def _unknown_by_sequence(
        self, ids: np.ndarray, start: int, ends: np.ndarray
    ) -> np.ndarray | int:
        if self.special["unknown"] is None:
            return 0
        places = np.flatnonzero(ids == self.special["unknown"]) + start
        return np.bincount(np.searchsorted(ends, places, side="right"), minlength=len(ends))

    def _take_boundaries(
        self, first: int, first_ids: np.ndarray, last_ids: np.ndarray, lengths: np.ndarray
    ) -> None:
        for counts_V, ids in ((self.first_V, first_ids), (self.last_V, last_ids[lengths > 1])):
            _count(counts_V, ids[(ids >= 0) & (ids < MAX_ID)])
        start, end = self.special["start"], self.special["end"]
        if end is None:
            return
        is_wrong = last_ids != end
        if start is not None:  # some tokenizers have no start token
            is_wrong |= (first_ids != start) | (lengths < 2)
        wrong = np.flatnonzero(is_wrong)
        self.num_wrong += len(wrong)
        if self.first_wrong is None and len(wrong):
            self.first_wrong = first + int(wrong[0])

    def _take_sequences(
        self, first: int, starts: np.ndarray, lengths: np.ndarray, unknown: np.ndarray
    ) -> None:
        for length, count in zip(*np.unique(lengths, return_counts=True), strict=True):
            self.length_counts[int(length)] += int(count)
        self.half_unknown += int((2 * unknown >= lengths).sum())
        many = np.flatnonzero(unknown >= MANY_UNKNOWN) + first
        self.many_unknown += many[: MAX_LISTED + 1 - len(self.many_unknown)].tolist()

        def place(why: str, k: int) -> Place:
            return Place(why, first + k, int(starts[k]), int(lengths[k]), int(unknown[k]))

        here = self.sampled[
            np.searchsorted(self.sampled, first) : np.searchsorted(
                self.sampled, first + len(lengths)
            )
        ]
        self.places += [place("", k) for k in (here - first).tolist()]
        for why, score in {
            "shortest": -lengths,
            "longest": lengths,
            "most unknown": unknown / lengths,
        }.items():
            k = int(score.argmax())
            if score[k] > self.extremes.get(why, (-np.inf,))[0]:
                self.extremes[why] = (score[k], place(why, k))

    def shown(self) -> list[Place]:
        """List the sequences to be shown: the sampled, then shortest, longest and most unknown;
        none without samples.
        """
        extremes = [place for _, place in self.extremes.values()]
        extremes = [
            place
            for place in extremes
            if place.why != "most unknown" or (place.unknown and self.has_unknown)
        ]
        shown: dict[int, Place] = {}
        for place in self.places + extremes if self.places else []:
            why = [shown[place.number].why, place.why] if place.number in shown else [place.why]
            shown[place.number] = dataclasses.replace(place, why=", ".join(filter(None, why)))
        return list(shown.values())

    def count(self, number: int) -> int:
        """Count an id's occurrences."""
        return int(self.counts_V[number]) if 0 <= number < MAX_ID else 0

    def inside(self, number: int) -> int:
        """Count an id's occurrences that are neither the first nor the last of a sequence."""
        return (
            int(self.counts_V[number] - self.first_V[number] - self.last_V[number])
            if 0 <= number < MAX_ID
            else 0
        )

    def outside(self, vocab_size: int) -> int:
        """Count the ids that are negative, or of vocab_size and above."""
        return self.num_odd + int(self.counts_V[vocab_size:].sum())


def _count(counts_V: np.ndarray, ids: np.ndarray) -> None:
    counts = np.bincount(ids.astype(np.int64, copy=False))
    counts_V[: len(counts)] += counts


def percentile(length_counts: Mapping[int, int], percent: int) -> int:
    """Return the smallest length that at least `percent` % of the sequences do not exceed."""
    lengths = sorted(length_counts)
    ends = np.cumsum([length_counts[length] for length in lengths])
    return lengths[int(np.searchsorted(100 * ends, percent * ends[-1]))]


# --------------------------------------------------------------------------------------------------
# Card and tokenizer
# --------------------------------------------------------------------------------------------------


def section(card: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """Return a part of a card; {} where the card has none."""
    for name in names:
        card = card.get(name) if isinstance(card, Mapping) else None
    return card if isinstance(card, Mapping) else {}


def choose_tokenizer(args: argparse.Namespace, card: Mapping[str, Any]) -> tuple[Any, str]:
    """Load the tokenizer that the flags name, else the card's: (it, or None; one line that says
    which, or why none).

    Raises InputError where one that a flag names can't be loaded.
    """
    of_card = section(card, "tokenizer")
    kind, name = (
        args.tokenizer_type or of_card.get("type"),
        args.tokenizer_name or of_card.get("name"),
    )
    is_asked_for = bool(args.tokenizer_type or args.tokenizer_name)
    if not (kind and name):
        if is_asked_for:
            given, missing = (
                ("tokenizer_type", "tokenizer_name")
                if args.tokenizer_type
                else ("tokenizer_name", "tokenizer_type")
            )
            raise InputError(
                f"--{given} {getattr(args, given)}: the file has no card that says the rest; add"
                f" --{missing}"
            )
        return (
            None,
            "unknown, so ids are not decoded; name it with --tokenizer_type and --tokenizer_name",
        )
    from distil.models.tokenizers import (  # transformers takes half a second
        load_tokenizer,
        vocabulary_fingerprint,
    )

    lower_case = of_card.get("do_lower_case") if args.do_lower_case is None else args.do_lower_case
    try:
        tokenizer = load_tokenizer(kind, name, "--tokenizer_name", lower_case)
    except InputError as error:
        if is_asked_for:
            raise
        reason = str(error).removeprefix(f"--tokenizer_name {name}: ")
        return (
            None,
            (
                f"{name} ({kind}), not loaded, so ids are not decoded: {reason}; name its place"
                " with --tokenizer_name"
            ),
        )
    if of_card.get("vocabulary_sha256", "") in ("", vocabulary_fingerprint(tokenizer)):
        return tokenizer, f"{name} ({kind})"
    if is_asked_for:
        return (
            tokenizer,
            f"{name} ({kind}), whose vocabulary is not the card's: texts and tokens may be wrong",
        )
    return (
        None,
        (
            f"{name} ({kind}) is another now than the card says, so ids are not decoded; name it"
            " with --tokenizer_name"
        ),
    )


def special_of(card: Mapping[str, Any], kind: str | None, tokenizer) -> dict[str, int | None]:
    """Find the ids by role: the card's, else the tokenizer's, else None."""
    found = section(card, "tokenizer", "special_ids")
    if not found and tokenizer is not None:
        from distil.models.tokenizers import special_ids

        found = special_ids(kind, tokenizer)
    return {role: found[role] if isinstance(found.get(role), int) else None for role in ROLES}


def token_of(tokenizer, number: int) -> str | None:
    """Return an id's token; None where the vocabulary has none, or no tokenizer is known."""
    if tokenizer is None or not 0 <= number < 2**31:
        return None
    return tokenizer.convert_ids_to_tokens([number])[0]


def decode(tokenizer, ids: Sequence[int]) -> str:
    """Return the text of ids on one line, <id N> for those that the vocabulary does not have."""
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
    """Compare the card with the file: one clause for everything in which they differ."""
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
            f"sequence {number} has {MANY_UNKNOWN} unknown ids or more, which the card's list of"
            " such lacks"
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


def verify(tokens: TokenFile, paths: Sequence[str]) -> dict[str, int]:
    """Compare every checksum: {blocks, bytes}. Opening has checked the card, and a store's index or
    a whole pickle.

    Raises InputError naming file and place.
    """
    if not tokens.card:
        raise InputError(
            f"--verify {tokens.path}: has no card beside it ({paths[-1]}), so there are no"
            " checksums to verify; make the file again with binarized_data.py, which writes one"
        )
    if tokens.blocks is not None:
        with tqdm(
            total=len(tokens.blocks.data), unit="B", unit_scale=True, desc="verify", **bar_options()
        ) as bar:
            for num_bytes in tokens.blocks.check_all():
                bar.update(num_bytes)
    sizes = [os.path.getsize(path) for path in paths[:-1]]
    return {
        "blocks": sum(-(-size // BLOCK_BYTES) for size in sizes) if tokens.blocks else 1,
        "bytes": sum(sizes),
    }


# --------------------------------------------------------------------------------------------------
# The report: plain values, then text
# --------------------------------------------------------------------------------------------------


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
            _shown_facts(place, place.unknown if survey.has_unknown else None, tokens, tokenizer)
            for place in survey.shown()
        ],
        "problems": contradictions(survey, tokens, vocab_size),
    }


def _card_facts(card: Mapping[str, Any]) -> dict[str, Any]:
    # Checksums and the list of sequences serve programs, and may be megabytes.
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


def _shown_facts(place: Place, unknown: int | None, tokens: TokenFile, tokenizer) -> dict[str, Any]:
    ids = tokens.ids_M[place.start : place.start + min(place.length, DECODED_IDS)].tolist()
    text = None if tokenizer is None else decode(tokenizer, ids)
    if text is not None and (len(text) > SHOWN_CHARS or len(ids) < place.length):
        text = text[:SHOWN_CHARS] + "..."
    return {
        "number": place.number,
        "why": place.why,
        "length": place.length,
        "unknown": unknown,
        "ids": ids[:SHOWN_IDS],
        "text": text,
    }


def as_text(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a report."""
    yield from _file_lines(report)
    yield from _card_lines(report["card"])
    yield from _length_lines(report)
    yield from _id_lines(report)
    yield from _frequent_lines(report)
    yield from _shown_lines(report)
    if report["problems"]:
        yield from ["", "PROBLEMS: the file is not what its card, or its tokenizer, says"]
        yield from (f"  {problem}" for problem in report["problems"])
    if "verified" in report:
        num_blocks, num_bytes = report["verified"]["blocks"], report["verified"]["bytes"]
        yield from [
            "",
            f"verified: {num_blocks:,} block{'s' if num_blocks > 1 else ''}, {num_bytes:,} bytes",
        ]


def _row(name: str, value: object) -> str:
    return f"{name:<20} {value}"


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / whole:.2f} %)"


def _size(num_bytes: int) -> str:
    power = next((power for power in (9, 6, 3) if num_bytes >= 10**power), 0)
    unit = {9: "GB", 6: "MB", 3: "kB", 0: "bytes"}[power]
    return f"{num_bytes / 10**power:,.1f} {unit}" if power else f"{num_bytes} bytes"


def _file_lines(report: Mapping[str, Any]) -> Iterator[str]:
    files = ", ".join(
        f"{os.path.basename(file['path'])} {_size(file['bytes'])}" for file in report["files"]
    )
    yield _row("path", report["path"])
    yield _row("format", f"{report['format']} of {report['dtype']}")
    yield _row("on disk", f"{_size(report['bytes'])} ({files})")
    yield _row("tokenizer", report["tokenizer"])


def _card_lines(card: Mapping[str, Any]) -> Iterator[str]:
    if not card:
        yield _row("card", "none")
        return
    tokenizer, counts = section(card, "tokenizer"), section(card, "counts")
    if tokenizer:
        lower_case = {True: ", lower-cased", False: ", not lower-cased"}.get(
            tokenizer.get("do_lower_case"), ""
        )
        size, fingerprint = (
            tokenizer.get("vocab_size"),
            str(tokenizer.get("vocabulary_sha256"))[:12],
        )
        yield _row(
            "made with",
            f"{tokenizer.get('name')} ({tokenizer.get('type')}{lower_case}), {size} entries, "
            f"fingerprint {fingerprint}",
        )
    made = {"seed": "seed of the shuffle", "errors": "text not UTF-8"}
    yield from (
        _row(label, card[name]) for name, label in made.items() if card.get(name) is not None
    )
    for label, source in _first_sources(card.get("sources")):
        yield _row(label, source)
    skipped = [
        f"{counts[name]:,} {name.replace('_', ' ')}"
        for name in ("blank_lines", "bad_lines")
        if name in counts
    ]
    if skipped:
        yield _row("left out of them", ", ".join(skipped))
    if counts.get("words"):
        in_text = counts.get("ids", 0) - 2 * counts.get("sequences", 0)
        yield _row("words", f"{counts['words']:,}, {in_text / counts['words']:.2f} ids a word")


def _first_sources(sources: object, limit: int = 5) -> Iterator[tuple[str, str]]:
    sources = (
        [source for source in sources if isinstance(source, Mapping)]
        if isinstance(sources, list)
        else []
    )
    for k, source in enumerate(sources[:limit]):
        size = f" {_size(source['bytes'])}" if isinstance(source.get("bytes"), int) else ""
        yield ("made from" if k == 0 else ""), f"{source.get('path')}{size}"
    if len(sources) > limit:
        yield "", f"and {len(sources) - limit} more files"


def _length_lines(report: Mapping[str, Any]) -> Iterator[str]:
    lengths, num_sequences = report["lengths"], report["sequences"]
    percentiles = ", ".join(f"{name} {lengths[name]:,}" for name in PERCENTILES)
    yield ""
    yield _row("sequences", f"{num_sequences:,}")
    yield _row("ids", f"{report['ids']:,}")
    yield _row(
        "ids a sequence",
        f"mean {lengths['mean']:.1f}, {percentiles}, shortest {lengths['shortest']:,}, "
        f"longest {lengths['longest']:,}",
    )
    yield _row(
        "too short to train",
        f"{_share(lengths['short'], num_sequences)}: {MIN_LENGTH} ids or fewer",
    )
    yield ""
    yield f"{'ids a sequence':>14} {'sequences':>13} {'':>7} {'their ids':>15}"
    most = max(row["sequences"] for row in lengths["histogram"])
    for row in lengths["histogram"]:
        if row["from"] <= lengths["longest"]:
            share, bar = (
                row["sequences"] / num_sequences,
                "#" * -(-BAR_WIDTH * row["sequences"] // most),
            )
            line = (
                f"{_range(row):>14} {row['sequences']:>13,} {share:>7.1%} {row['ids']:>15,}  {bar}"
            )
            yield line.rstrip()


def _range(row: Mapping[str, Any]) -> str:
    if row["to"] is None:
        return f"{row['from']} and more"
    return str(row["from"]) if row["from"] == row["to"] else f"{row['from']} to {row['to']}"


def _id_lines(report: Mapping[str, Any]) -> Iterator[str]:
    vocabulary, unknown, boundaries = report["vocabulary"], report["unknown"], report["boundaries"]
    yield ""
    yield _row("smallest, largest id", f"{vocabulary['smallest']}, {vocabulary['largest']}")
    if vocabulary["size"] is None:
        yield _row("ids that occur", f"{vocabulary['occur']:,}")
    else:
        yield _row(
            "vocabulary",
            f"{vocabulary['size']:,} entries: {vocabulary['occur']:,} occur,"
            f" {vocabulary['never']:,} never; ids outside it: {vocabulary['outside']:,}",
        )
    if unknown is not None:
        yield _row("unknown ids", f"{_share(unknown['count'], report['ids'])}: id {unknown['id']}")
        yield _row(
            "mostly unknown",
            f"{_share(unknown['half_unknown_sequences'], report['sequences'])} of the sequences:"
            " half or more",
        )
    if boundaries is not None:
        first = boundaries["first_wrong"]
        where = "" if first is None else f", sequence {first:,} the first"
        yield _row(
            "without boundaries",
            f"{_share(boundaries['wrong_sequences'], report['sequences'])} of the sequences do "
            f"not begin with id {boundaries['start']} and end with id {boundaries['end']}"
            f"{where}",
        )
    if report["special"]:
        yield ""
        yield from _special_lines(report["special"])


def _special_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    roles = [", ".join(row["roles"]) or "-" for row in rows]
    width = max(map(len, ["role", *roles]))
    yield (
        f"{'special id':>10}  {'token':<14} {'role':<{width}} {'first':>13} {'last':>13}"
        f" {'inside':>13}  of a sequence"
    )
    for row, role in zip(rows, roles, strict=True):
        counts = " ".join(f"{row[place]:>13,}" for place in ("first", "last", "inside"))
        yield f"{row['id']:>10}  {row['token'] or '-':<14} {role:<{width}} {counts}"


def _frequent_lines(report: Mapping[str, Any]) -> Iterator[str]:
    if report["most_frequent"]:
        yield ""
        yield f"{'frequent id':>11} {'occurrences':>15} {'share':>7}  token"
        for row in report["most_frequent"]:
            figures = f"{row['id']:>11} {row['count']:>15,} {row['share']:>7.2%}"
            yield f"{figures}  {row['token'] or ''}".rstrip()


def _shown_lines(report: Mapping[str, Any]) -> Iterator[str]:
    for row in report["shown"]:
        why = f" ({row['why']})" if row["why"] else ""
        unknown = f", {row['unknown']:,} unknown" if row["unknown"] else ""
        yield ""
        yield f"sequence {row['number']:,}{why}: {row['length']:,} ids{unknown}"
        rest = " ..." if row["length"] > len(row["ids"]) else ""
        yield f"  {' '.join(map(str, row['ids'])) + rest if row['text'] is None else row['text']}"


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


def check_output(path: str, inputs: Sequence[str]) -> None:
    """Raise InputError where --json can't be written, or would stand where a token file or its card
    does.
    """
    require_output(path, "--json", inputs)
    names_card = path.endswith(".json") and os.path.isfile(path.removesuffix(".json"))
    if names_card or store.find(path) is not None:
        raise InputError(
            f"--json {path}: is the name of a token file's own file or card; choose another name"
        )


def print_lines(lines: Iterator[str]) -> None:
    """Print text that any terminal takes, to a reader that may have gone (`| head`)."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: list[str] | None = None) -> None:
    """Run the program: open, verify, count, print, write. Raises InputError for bad input, and for
    what --verify finds.
    """
    args = parse(argv)
    setup_logging(logging.INFO)
    paths = files_of(args.file)
    if args.json is not None:
        check_output(args.json, paths)
    tokens = open_token_file(args.file, "FILE")
    tokenizer, said_of_tokenizer = choose_tokenizer(args, tokens.card)
    verified = {"verified": verify(tokens, paths)} if args.verify else {}
    special = special_of(
        tokens.card, args.tokenizer_type or section(tokens.card, "tokenizer").get("type"), tokenizer
    )
    num_shown = min(args.num_sequences, len(tokens.lengths_N))
    sampled = np.linspace(0, len(tokens.lengths_N) - 1, num_shown).round().astype(np.int64)
    survey = Survey(special, sampled).read(tokens)
    report = {
        "tokenizer": said_of_tokenizer,
        **make_report(survey, tokens, paths, tokenizer, args.top),
    }
    report |= {} if report["problems"] else verified
    print_lines(as_text(report))
    if args.json is not None:
        write_json(args.json, report)
        logger.info("Wrote %s.", args.json)
    if args.verify and report["problems"]:
        raise InputError(
            "\n".join(
                f"--verify {tokens.path}: {problem}; make the file again"
                for problem in report["problems"]
            )
        )


if __name__ == "__main__":
    run_program(main)
