"""One pass over a token file that counts ids, lengths, boundaries and unknown tokens.

It counts ids as they are in the file, before training splits and filters sequences, and selects the
sequences that inspect_data.py shows.
"""

import collections
import dataclasses
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from distil.data.token_files import CHUNK_IDS, MANY_UNKNOWN, MAX_LISTED, TokenFile
from utils import bar_options

CHUNK_SEQUENCES = 2**17  # counted at a time
MAX_ID = 2**20  # larger than any vocabulary; ids from here on share one counter


@dataclasses.dataclass(frozen=True)
class ShownSequence:
    """A sequence that is shown: the reason, its number, first id's index, length, unknown ids."""

    reason: str
    number: int
    start: int
    length: int
    unknown: int


class Survey:
    """Count the ids and sequences of a token file, a chunk at a time.

    length_counts: length -> sequences. counts_V, first_V, last_V: occurrences of the ids below
    MAX_ID anywhere, as first id, and as last id of a sequence of two or more. half_unknown:
    sequences of which at least half is unknown. many_unknown: numbers of those with MANY_UNKNOWN or
    more, MAX_LISTED + 1 at most.
    """

    def __init__(self, special: Mapping[str, int | None], sampled: Sequence[int] = ()):
        """special: role -> id, None if unknown. sampled: numbers of sequences to show, in order."""
        self.special = special
        self.sampled = np.asarray(sampled, np.int64)
        self.length_counts: collections.Counter[int] = collections.Counter()
        self.counts_V, self.first_V, self.last_V = (np.zeros(MAX_ID, np.int64) for _ in range(3))
        self.num_odd, self.smallest, self.largest = 0, sys.maxsize, -sys.maxsize
        self.num_wrong, self.first_wrong = 0, None
        self.half_unknown = 0
        self.many_unknown: list[int] = []
        self.sampled_sequences: list[ShownSequence] = []
        self.extremes: dict[str, tuple[float, ShownSequence]] = {}

    @property
    def has_unknown(self) -> bool:
        """True if an unknown token exists that is not also a boundary token, as GPT-2's is."""
        return self.special["unknown"] not in (None, self.special["start"], self.special["end"])

    def read(self, tokens: TokenFile) -> "Survey":
        """Count a whole file, with a progress bar."""
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
                    self._count_ids(ids)
                    unknown += self._unknown_by_sequence(ids, start, ends)
                    bar.update(len(ids))
                self._count_boundaries(
                    first, tokens.ids_M[ends - lengths], tokens.ids_M[ends - 1], lengths
                )
                self._count_sequences(first, ends - lengths, lengths, unknown)
                first_id = int(ends[-1])
        return self

    def _count_ids(self, ids: np.ndarray) -> None:
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

    def _count_boundaries(
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

    def _count_sequences(
        self, first: int, starts: np.ndarray, lengths: np.ndarray, unknown: np.ndarray
    ) -> None:
        for length, count in zip(*np.unique(lengths, return_counts=True), strict=True):
            self.length_counts[int(length)] += int(count)
        self.half_unknown += int((2 * unknown >= lengths).sum())
        many = np.flatnonzero(unknown >= MANY_UNKNOWN) + first
        self.many_unknown += many[: MAX_LISTED + 1 - len(self.many_unknown)].tolist()

        def sequence(reason: str, k: int) -> ShownSequence:
            figures = (int(column[k]) for column in (starts, lengths, unknown))
            return ShownSequence(reason, first + k, *figures)

        begin, end = np.searchsorted(self.sampled, (first, first + len(lengths)))
        here = (self.sampled[begin:end] - first).tolist()
        self.sampled_sequences += [sequence("", k) for k in here]
        scores = {"shortest": -lengths, "longest": lengths, "most unknown": unknown / lengths}
        for reason, score in scores.items():
            k = int(score.argmax())
            if score[k] > self.extremes.get(reason, (-np.inf,))[0]:
                self.extremes[reason] = (score[k], sequence(reason, k))

    def shown(self) -> list[ShownSequence]:
        """List the sequences to show: samples, then shortest, longest, most unknown (or none)."""
        extremes = [
            sequence
            for _, sequence in self.extremes.values()
            if sequence.reason != "most unknown" or (sequence.unknown and self.has_unknown)
        ]
        shown: dict[int, ShownSequence] = {}
        for sequence in self.sampled_sequences + extremes if self.sampled_sequences else []:
            known = shown.get(sequence.number)
            reasons = [known.reason if known else "", sequence.reason]
            reason = ", ".join(filter(None, reasons))
            shown[sequence.number] = dataclasses.replace(sequence, reason=reason)
        return list(shown.values())

    def count(self, number: int) -> int:
        """Return an id's occurrences."""
        return int(self.counts_V[number]) if 0 <= number < MAX_ID else 0

    def inside(self, number: int) -> int:
        """Return an id's occurrences that are neither first nor last in a sequence."""
        if not 0 <= number < MAX_ID:
            return 0
        return int(self.counts_V[number] - self.first_V[number] - self.last_V[number])

    def outside(self, vocab_size: int) -> int:
        """Return the number of ids that are negative, or vocab_size and above."""
        return self.num_odd + int(self.counts_V[vocab_size:].sum())


def _count(counts_V: np.ndarray, ids: np.ndarray) -> None:
    counts = np.bincount(ids.astype(np.int64, copy=False))
    counts_V[: len(counts)] += counts


def percentile(length_counts: Mapping[int, int], percent: int) -> int:
    """Return the smallest length that at least `percent` % of the sequences do not exceed."""
    lengths = sorted(length_counts)
    ends = np.cumsum([length_counts[length] for length in lengths])
    return lengths[int(np.searchsorted(100 * ends, percent * ends[-1]))]
