"""Counts of a text while it becomes token ids: for the card, the summary and a histogram."""

from collections.abc import Mapping

import numpy as np

from distil.data.encoding import EncodedBlock, Encoding
from distil.data.shuffle import Spool
from distil.data.token_files import MANY_UNKNOWN, MAX_LISTED, MIN_LENGTH
from distil.reporting.plots import LOOKS, count_on, picture, set_heading, set_log
from utils import logger

MOST_BARS = 60  # of the histogram, where a bar is of one length
WARN_UNKNOWN = 0.05  # share of unknown ids from which the tokenizer hardly fits the text


class Tally:
    """Count encoded blocks in constant memory."""

    def __init__(self, encoding: Encoding):
        self.encoding = encoding
        self.counts_V = np.zeros(encoding.largest_id + 1, np.int64)
        self.num_of_length: dict[int, int] = {}
        self.num_words = self.num_blank = self.num_bad = 0
        self.num_bytes = 0  # of text on the disk

    def add(self, block: EncodedBlock) -> None:
        """Count a block."""
        self.counts_V += np.bincount(block.ids_M, minlength=len(self.counts_V))
        for length, number in zip(
            *(a.tolist() for a in np.unique(block.lengths_N, return_counts=True)), strict=True
        ):
            self.num_of_length[length] = self.num_of_length.get(length, 0) + number
        self.num_words += block.num_words
        self.num_blank += block.num_blank
        self.num_bad += block.num_bad
        self.num_bytes += block.num_bytes

    def add_spool(self, spool: Spool) -> None:
        """Count the ids and lengths of a closed or flushed spool."""
        for ids_M, lengths_N in spool.chunks():
            self.add(EncodedBlock(ids_M, lengths_N, 0, 0, 0, 0))

    def counts(self) -> dict[str, int]:
        """Return the counts for the card."""
        num_sequences = sum(self.num_of_length.values())
        ends = {self.encoding.start_id, self.encoding.end_id} - {None}
        unknown = self.encoding.unknown_id
        return {
            "sequences": num_sequences,
            "ids": int(self.counts_V.sum()),
            "words": self.num_words,
            "unknown": 0 if unknown is None or unknown in ends else int(self.counts_V[unknown]),
            "blank_lines": self.num_blank,
            "bad_lines": self.num_bad,
            "longest": max(self.num_of_length, default=0),
            "largest_id": int(np.flatnonzero(self.counts_V)[-1]) if num_sequences else -1,
            "boundary_ids_inside": (
                int(self.counts_V[list(ends)].sum())
                - (1 if self.encoding.start_id is None else 2) * num_sequences
            ),
        }


class ManyUnknown:
    """List the numbers of sequences with MANY_UNKNOWN unknown ids or more; None if too many."""

    def __init__(self, unknown_id: int | None):
        self.unknown_id = unknown_id
        self.numbers: list[int] | None = []
        self.num_seen = 0

    def add(self, ids_M: np.ndarray, lengths_N: np.ndarray) -> None:
        """Add the sequences that follow."""
        is_unknown = ids_M == self.unknown_id
        if self.numbers is not None and self.unknown_id is not None and is_unknown.any():
            starts_N = np.cumsum(lengths_N, dtype=np.int64) - lengths_N
            per_sequence = np.add.reduceat(is_unknown, starts_N, dtype=np.int64)
            self.numbers += (np.flatnonzero(per_sequence >= MANY_UNKNOWN) + self.num_seen).tolist()
            self.numbers = self.numbers if len(self.numbers) <= MAX_LISTED else None
        self.num_seen += len(lengths_N)


def draw_lengths(num_of_length: dict[int, int], path: str, facts: Mapping[str, str]) -> None:
    """Draw a histogram of the sequences' lengths in ids, on a logarithmic axis.

    A bar is of one length, or of a third of a doubling: 32 to 39, to 50, to 63. facts: for
    the title, {"tokenizer": its name, ..}.
    """
    lengths, numbers = (
        np.array(list(column)) for column in zip(*sorted(num_of_length.items()), strict=True)
    )
    least, most = max(int(lengths.min()), 1), int(lengths.max())
    edges = np.arange(least, most + 2)
    if most - least >= MOST_BARS:
        thirds = np.arange(np.floor(3 * np.log2(least)), np.ceil(3 * np.log2(most + 1)) + 1)
        edges = np.unique(np.round(2 ** (thirds / 3)))
    with picture(path, 1, (9, 3.8)) as (figure, (panel,)):
        panel.hist(lengths, bins=edges - 0.5, weights=numbers, **LOOKS["count"].bar)
        panel.set(xlabel="length with boundary tokens (ids)", ylabel="sequences (number)")
        set_log(panel, "x", least, most)
        count_on(panel.yaxis)
        set_heading(figure, f"Lengths of {numbers.sum():,} sequences", facts)


def log_summary(tally: Tally) -> None:
    """Log a few lines on what was made, and warn of many unknown ids."""
    for line in summary(tally):
        logger.info("%s", line)
    share = unknown_share(tally)
    if share >= WARN_UNKNOWN:
        logger.warning(
            "%.1f%% of the ids between the boundaries are unknown to the tokenizer: text without"
            " spaces (FASTA, ..), another script or case? Words it does not know are lost; take a"
            " tokenizer that fits.",
            100 * share,
        )


def unknown_share(tally: Tally) -> float:
    """Return the share of unknown ids among those that are not a sequence's boundaries."""
    counts = tally.counts()
    num_ends = 1 if tally.encoding.start_id is None else 2
    return counts["unknown"] / max(counts["ids"] - num_ends * counts["sequences"], 1)


def summary(tally: Tally) -> list[str]:
    """Return a few lines on what was made."""
    counts = tally.counts()
    words, ids = max(counts["words"], 1), counts["ids"]
    unknown = counts["unknown"] / max(ids, 1)
    per_word = (ids - 2 * counts["sequences"]) / words
    num_short = sum(num for length, num in tally.num_of_length.items() if length <= MIN_LENGTH)
    short = f"{num_short:,} of them of {MIN_LENGTH} ids or fewer, which are not trained on"
    return [
        (
            f"{counts['sequences']:,} sequences ({short}), {ids:,} ids ({tally.encoding.dtype}),"
            f" longest {counts['longest']:,}."
        ),
        (
            f"{counts['words']:,} words, {per_word:.3f} ids a word, {unknown:.4%} of the ids"
            " unknown."
        ),
        (
            f"Skipped {counts['blank_lines']:,} blank lines; {counts['bad_lines']:,} lines held"
            f" invalid text (--errors {tally.encoding.errors})."
        ),
    ]
