"""The sequences that a model is trained on, out of a token file.

Here: reading the pickled list of the 2019 kind (without executing anything in it), and `LmSeqsDataset`, which splits
long sequences and filters short and unknown ones as index arithmetic over one flat array of ids.
"""

import dataclasses
import itertools
import os
import pickle
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from utils import InputError, logger, one_line, require_file

MIN_LENGTH = 11  # sequences of this many ids, boundary tokens included, or fewer are removed
MAX_UNKNOWN_SHARE = 0.5  # sequences with this share of unknown tokens or more are removed


# --------------------------------------------------------------------------------------------------------------------
# Reading pickles of the 2019 kind
# --------------------------------------------------------------------------------------------------------------------


class _ArrayUnpickler(pickle.Unpickler):
    """Load lists of numpy arrays and ints, and nothing else: a pickle may otherwise execute what it likes."""

    # Differs from the original: 2019 unpickled, and so executed, anything.

    ADMITTED = {
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("_codecs", "encode"),
        *itertools.product(("numpy._core.numeric", "numpy.core.numeric"), ("_frombuffer",)),
        *itertools.product(("numpy._core.multiarray", "numpy.core.multiarray"), ("_reconstruct", "scalar")),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no token file needs")
        return super().find_class(module, name)


def read_pickle(path: str | os.PathLike, what: str) -> Any:
    """Read a pickle of lists, ints and numpy arrays. Raises InputError for any other content or a damaged file."""
    require_file(path, what)
    try:
        with open(path, "rb") as file:
            return _ArrayUnpickler(file).load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise InputError(f"{what} {path}: not a readable pickle of token ids ({one_line(error)}); make it again") from error


def read_token_file(path: str | os.PathLike, what: str = "--data_file") -> tuple[np.ndarray, np.ndarray]:
    """Read a token file: (ids_M of all sequences end to end, lengths_N as int64). Raises InputError."""
    content = read_pickle(path, what)
    if not isinstance(content, list) or not content:
        found = "an empty list" if isinstance(content, list) else type(content).__name__
        raise InputError(f"{what} {path}: expected a list of token-id arrays, got {found}; make it with binarized_data.py")
    sequences = [_as_ids(sequence, number, path, what) for number, sequence in enumerate(content)]
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    ids_M = np.concatenate(sequences)
    return ids_M if ids_M.dtype.kind in "iu" else ids_M.astype(np.int64), lengths  # uint64 beside int64 gives floats


def _as_ids(sequence: Any, number: int, path: str | os.PathLike, what: str) -> np.ndarray:
    try:
        array = np.asarray(sequence) if isinstance(sequence, (list, np.ndarray)) else None
    except ValueError:  # a list of lists of unequal lengths
        array = None
    if array is None or array.ndim != 1 or array.dtype.kind not in "iu" or array.size == 0:
        found = type(sequence).__name__ if array is None else f"{array.dtype} of shape {array.shape}"
        raise InputError(f"{what} {path}: sequence {number} is {found}, expected a 1-D array of integers; make it again")
    return array


def read_token_counts(path: str | os.PathLike, vocab_size: int, model: str) -> np.ndarray:
    """Read the occurrences of each id, int64 (V,), for the model that `model` names (its flag and name).

    Raises InputError for anything but a list of vocab_size non-negative ints.
    """
    what = "--token_counts"
    content = read_pickle(path, what)
    try:
        counts_V = np.asarray(content)
    except ValueError:
        counts_V = np.empty(0)
    if counts_V.ndim != 1 or counts_V.dtype.kind not in "iu" or counts_V.size == 0 or counts_V.min() < 0:
        raise InputError(f"{what} {path}: expected a list of counts, one a token id; make it with token_counts.py")
    if len(counts_V) != vocab_size:
        raise InputError(
            f"{what} {path}: has {len(counts_V)} entries, the vocabulary of {model} has {vocab_size}; "
            f"count again with --vocab_size {vocab_size}"
        )
    return counts_V.astype(np.int64)


def check_ids_below(ids_M: np.ndarray, vocab_size: int, path: str | os.PathLike, what: str) -> None:
    """Raise InputError that names the largest id, the file and the vocabulary's source, if an id is out of it."""
    largest, smallest = int(ids_M.max()), int(ids_M.min())
    if largest >= vocab_size or smallest < 0:
        wrong = largest if largest >= vocab_size else smallest
        raise InputError(
            f"{path}: token id {wrong} is outside the vocabulary of {what}, ids 0 to {vocab_size - 1}; "
            "binarize with the tokenizer of that vocabulary, or correct the size"
        )


# --------------------------------------------------------------------------------------------------------------------
# The dataset
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Token ids by role. unknown is None where the tokenizer has no unknown token."""

    start: int
    end: int
    pad: int
    unknown: int | None = None


class LmSeqsDataset:
    """Sequences of token ids, cut to the model's maximum and filtered, as views of one flat array.

    A sequence is ids[start : start + length], with the start id in front and the end id behind where the cut took
    them away. Steps and order as in 2019: split, remove short, remove unknown.
    """

    def __init__(
        self, ids_M: np.ndarray, raw_lengths_N: np.ndarray, special: SpecialIds, max_length: int, source: str = "the data"
    ):
        """ids_M: all sequences end to end; raw_lengths_N: their lengths; source: names them in an error."""
        if max_length <= MIN_LENGTH:
            raise InputError(f"--max_length {max_length}: sequences of {MIN_LENGTH} ids or fewer are removed; expected more")
        self.ids = ids_M
        self.special = special
        self.max_length = max_length
        ends = np.cumsum(raw_lengths_N)
        self._check_boundaries(ends - raw_lengths_N, ends, source)
        self._split(ends - raw_lengths_N, raw_lengths_N)
        self._remove(self.lengths <= MIN_LENGTH, f"of {MIN_LENGTH} ids or fewer")
        if special.unknown is not None:
            self._remove(self._unknown_share() >= MAX_UNKNOWN_SHARE, f"with {MAX_UNKNOWN_SHARE:.0%} unknown tokens or more")

    @classmethod
    def from_file(cls, path: str | os.PathLike, special: SpecialIds, max_length: int, vocab_size: int, model: str):
        """Read, check and filter a token file for the model that `model` names (its flag and name).

        Raises InputError naming the file where it is unreadable, has ids outside the vocabulary, sequences without
        boundary tokens, or nothing left after filtering.
        """
        ids_M, lengths_N = read_token_file(path)
        check_ids_below(ids_M, vocab_size, f"--data_file {path}", model)
        dataset = cls(ids_M, lengths_N, special, max_length, f"--data_file {path}")
        if len(dataset) == 0:
            raise InputError(
                f"--data_file {path}: none of its {len(lengths_N)} sequences is left after filtering (more than {MIN_LENGTH} "
                "ids, less than half unknown tokens); put more text on a line, or check --max_length and the tokenizer"
            )
        return dataset

    def _check_boundaries(self, starts: np.ndarray, ends: np.ndarray, source: str) -> None:
        wrong = (self.ids[starts] != self.special.start) | (self.ids[ends - 1] != self.special.end)
        if wrong.any():
            number = int(np.flatnonzero(wrong)[0])
            first, last = int(self.ids[starts[number]]), int(self.ids[ends[number] - 1])
            raise InputError(
                f"{source}: sequence {number} begins with id {first} and ends with id {last}, expected "
                f"{self.special.start} and {self.special.end} ({int(wrong.sum())} such sequences); "
                "binarize the text with the teacher's tokenizer and its --tokenizer_type"
            )

    def _split(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Cut sequences longer than max_length into pieces of max_length - 2 ids, and restore their boundaries."""
        size = self.max_length - 2
        is_long = lengths > self.max_length
        num_pieces = np.where(is_long, -(-lengths // size), 1)
        piece = np.arange(num_pieces.sum()) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        long_of_piece = np.repeat(is_long, num_pieces)
        left = np.repeat(lengths, num_pieces) - piece * size
        self.starts = np.repeat(starts, num_pieces) + piece * size
        self.num_own = np.where(long_of_piece, np.minimum(left, size), left)
        self.adds_start = self.ids[self.starts] != self.special.start
        self.adds_end = self.ids[self.starts + self.num_own - 1] != self.special.end
        self.lengths = self.num_own + self.adds_start + self.adds_end
        logger.info("Split %d sequences longer than %d ids: %d sequences.", is_long.sum(), self.max_length, len(self.lengths))

    def _unknown_share(self) -> np.ndarray:
        unknown = self.special.unknown
        places = np.flatnonzero(self.ids == unknown)  # few, beside a running count at every id
        counts = np.searchsorted(places, self.starts + self.num_own) - np.searchsorted(places, self.starts)
        counts = counts + self.adds_start * (self.special.start == unknown) + self.adds_end * (self.special.end == unknown)
        return counts / self.lengths

    def _remove(self, is_removed: np.ndarray, which: str) -> None:
        kept = ~is_removed
        for name in ("starts", "num_own", "adds_start", "adds_end", "lengths"):
            setattr(self, name, getattr(self, name)[kept])
        logger.info("Removed %d sequences %s: %d left.", is_removed.sum(), which, kept.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one sequence's ids as int64, its boundary tokens included."""
        start = self.starts[index]
        own = self.ids[start : start + self.num_own[index]].astype(np.int64)
        front = [self.special.start] if self.adds_start[index] else []
        behind = [self.special.end] if self.adds_end[index] else []
        return np.concatenate([np.array(front, np.int64), own, np.array(behind, np.int64)])

    def collate(self, indices: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Make a batch: token_ids_BT padded to the longest with the pad id, and lengths_B, both int64."""
        sequences = [torch.from_numpy(self[index]) for index in indices]
        lengths_B = torch.tensor([len(sequence) for sequence in sequences])
        padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=self.special.pad)
        return padded, lengths_B
