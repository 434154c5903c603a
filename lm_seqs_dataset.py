"""The training sequences as views of a token file, and their batches.

`LmSeqsDataset` splits long sequences and removes short and unknown ones by index arithmetic over
one flat array of ids: a sequence is a view of 14 bytes, and ids are copied only into batches. Facts
of the file's card (no boundary token inside a sequence, which sequences have many unknown tokens)
are not recomputed, so that opening a store does not read its ids.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from distil.data.batches import MlmPreparation, mlm_preparation, prepare_clm
from distil.data.cards import check_tokenizer, read_verified_card
from distil.data.safe_pickle import read_pickle
from distil.data.token_files import (
    MAX_UNKNOWN_SHARE,
    MIN_LENGTH,
    SpecialIds,
    TokenFile,
    check_ids_below,
    open_token_file,
)
from distil.evaluation import HeldOut
from utils import InputError, logger

if TYPE_CHECKING:  # a caller that makes a LanguageModel has paid for its imports
    from distil.models.language_model import LanguageModel

CHUNK_SEQUENCES = 2**18  # split and filtered at a time
CHUNK_IDS = 2**22  # searched for unknown ids at a time


def read_token_counts(path: str | os.PathLike, model: LanguageModel) -> np.ndarray:
    """Read the occurrences of each entry of a model's tokenizer: int64 (num_entries,).

    Rows of the model beyond the tokenizer's have no counts, or counts of 0. Raises InputError for
    anything but a list of so many non-negative ints, and for counts of another vocabulary, where
    the file has a card.
    """
    flag = "--token_counts"
    content = read_pickle(path, flag)
    try:
        counts_V = np.asarray(content)
    except ValueError:
        counts_V = np.empty(0)
    if (
        counts_V.ndim != 1
        or counts_V.dtype.kind not in "iu"
        or counts_V.size == 0
        or not 0 <= counts_V.min() <= counts_V.max() < 2**63
    ):
        raise InputError(
            f"{flag} {path}: expected a list of counts, one per token id; make it with"
            " token_counts.py"
        )
    card = read_verified_card(path, flag)
    check_tokenizer(card, model.tokenizer_facts, f"{flag} {path}", model.source)
    num_entries = model.num_entries
    remedy = f"count the ids of that tokenizer's data, with --vocab_size {num_entries}"
    if not num_entries <= len(counts_V) <= max(num_entries, model.vocab_size):
        raise InputError(
            f"{flag} {path}: has {len(counts_V)} entries, the vocabulary of {model.source} has"
            f" {num_entries}; {remedy}"
        )
    if counts_V[num_entries:].any():
        counted = num_entries + int(np.flatnonzero(counts_V[num_entries:])[0])
        raise InputError(
            f"{flag} {path}: counts the id {counted}, but the vocabulary of {model.source} has"
            f" {num_entries} entries; {remedy}"
        )
    return counts_V[:num_entries].astype(np.int64)


def make_preparation(
    model: LanguageModel,
    token_counts: str | os.PathLike | None,
    smoothing: float,
    seed: int,
    mask_prop: float = 0.15,
    fates: tuple[float, float, float] = (0.8, 0.1, 0.1),
    restrict_ce_to_mask: bool = False,
) -> Callable:
    """Choose how batches are prepared: masked, by the token counts, or causal.

    seed, mask_prop, fates: see batches.mlm_preparation. Raises InputError where the tokenizer has
    no mask.
    """
    if not model.is_masked:
        return functools.partial(prepare_clm, with_mask=model.architecture.pads_by_mask)
    if model.tokenizer.mask_token_id is None:
        raise InputError(
            f"{model.source}: its tokenizer has no mask_token, which --mlm needs; add it"
        )
    if token_counts is None:  # smoothing 0: all tokens weigh the same
        counts_V = np.ones(model.num_entries, np.int64)
    else:
        counts_V = read_token_counts(token_counts, model)
    counts_V, drawn = torch.from_numpy(counts_V), (smoothing, seed, mask_prop, fates)
    return mlm_preparation(model.tokenizer, counts_V, *drawn, restrict_ce_to_mask)


# --------------------------------------------------------------------------------------------------
# The dataset
# --------------------------------------------------------------------------------------------------


class LmSeqsDataset:
    """Sequences of token ids, split at the model's maximum, filtered; views of one flat array.

    The steps are those of 2019, in the same order: split, remove short, remove unknown. A sequence
    is a slice of the file's ids, with the start id prepended and the end id appended if the split
    took them away. One entry per sequence: starts (int64, of the slice), lengths (int32, boundary
    tokens included), adds_start, adds_end (bool).
    """

    def __init__(
        self, tokens: TokenFile, special: SpecialIds, max_length: int, source: str = "the data"
    ):
        """source: the token file's name in messages. Raises InputError without boundary tokens."""
        if max_length <= MIN_LENGTH:
            raise InputError(
                f"--max_length {max_length}: sequences of {MIN_LENGTH} ids or fewer are removed;"
                " expected more"
            )
        self.tokens = tokens
        self.special = special
        self.max_length = max_length
        self._known = _facts_of_the_card(tokens, special)
        self._select(source)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike,
        model: LanguageModel,
        max_length: int | None = None,
        flag: str = "--data_file",
    ):
        """Open, check and filter a token file for a model; max_length: lowers the model's maximum.

        Raises InputError naming flag and path where the file is unreadable, of another vocabulary,
        has ids outside the vocabulary, sequences without boundary tokens, or nothing left after
        filtering.
        """
        source = f"{flag} {path}"
        tokens = open_token_file(path, flag)
        check_tokenizer(tokens.card, model.tokenizer_facts, source, model.source)
        largest_id = (tokens.card.get("counts") or {}).get("largest_id")
        ids = tokens.ids_M if largest_id is None else np.array([largest_id])
        check_ids_below(ids, model.num_entries, source, model.source)
        longest = min(max_length or model.max_length, model.max_length)
        dataset = cls(tokens, model.special_ids, longest, source)
        if len(dataset) == 0:
            raise InputError(
                f"{source}: none of its {len(tokens.lengths_N)} sequences is left after filtering"
                f" (more than {MIN_LENGTH} ids, less than half unknown tokens); put more text on a"
                " line, or check --max_length and the tokenizer"
            )
        return dataset

    def _select(self, source: str) -> None:
        """Split and filter the file's sequences, a chunk at a time."""
        raw_N = self.tokens.lengths_N
        num_views = sum(
            int(self._num_pieces(raw_N[k : k + CHUNK_SEQUENCES]).sum())
            for k in range(0, len(raw_N), CHUNK_SEQUENCES)
        )
        self.starts = np.empty(num_views, np.int64)  # untouched pages take no memory
        self.lengths = np.empty(num_views, np.int32)
        self.adds_start, self.adds_end = np.empty(num_views, bool), np.empty(num_views, bool)
        num_kept = first_id = num_short = num_unknown = num_long = 0
        for first in range(0, len(raw_N), CHUNK_SEQUENCES):
            raw_lengths = raw_N[first : first + CHUNK_SEQUENCES].astype(np.int64)
            ends = first_id + np.cumsum(raw_lengths)
            self._check_boundaries(first, ends - raw_lengths, ends, source)
            views = self._split(ends - raw_lengths, raw_lengths)
            is_short = views["lengths"] <= MIN_LENGTH
            is_unknown = ~is_short & self._is_mostly_unknown(views, first, first_id, ends)
            kept = ~(is_short | is_unknown)
            place = slice(num_kept, num_kept + int(kept.sum()))
            for name, values in views.items():
                getattr(self, name)[place] = values[kept]
            num_long += int((raw_lengths > self.max_length).sum())
            num_short += int(is_short.sum())
            num_unknown += int(is_unknown.sum())
            num_kept, first_id = place.stop, int(ends[-1])
        for name in ("starts", "lengths", "adds_start", "adds_end"):
            getattr(self, name).resize(num_kept, refcheck=False)
        self._log(num_long, num_views, num_short, num_unknown)

    def _log(self, num_long: int, num_views: int, num_short: int, num_unknown: int) -> None:
        logger.info(
            "Split %d sequences longer than %d ids: %d sequences.",
            num_long,
            self.max_length,
            num_views,
        )
        logger.info(
            "Removed %d sequences of %d ids or fewer: %d left.",
            num_short,
            MIN_LENGTH,
            num_views - num_short,
        )
        if self.special.unknown is not None:
            logger.info(
                "Removed %d sequences with %.0f%% unknown tokens or more: %d left.",
                num_unknown,
                100 * MAX_UNKNOWN_SHARE,
                len(self.starts),
            )

    def _check_boundaries(
        self, first: int, starts: np.ndarray, ends: np.ndarray, source: str
    ) -> None:
        if self._known.has_boundaries:
            return
        ids_M = self.tokens.ids_M
        wrong = ids_M[ends - 1] != self.special.end
        if self.special.start is not None:
            wrong |= ids_M[starts] != self.special.start
        if wrong.any():
            number = int(np.flatnonzero(wrong)[0])
            begins, finishes = int(ids_M[starts[number]]), int(ids_M[ends[number] - 1])
            num_wrong = int(wrong.sum())
            count = f"{num_wrong} such sequence{'s' if num_wrong > 1 else ''}"
            raise InputError(
                f"{source}: sequence {first + number} begins with id {begins} and ends with id"
                f" {finishes}, expected"
                f" {'any' if self.special.start is None else self.special.start} and"
                f" {self.special.end} ({count} near it); binarize the"
                " text with the teacher's tokenizer and its --tokenizer_type"
            )

    def _num_pieces(self, lengths: np.ndarray) -> np.ndarray:
        size = self.max_length - 2
        return np.where(lengths > self.max_length, -(-lengths // size), 1)

    def _split(self, starts: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """Cut sequences longer than max_length into pieces of max_length - 2 ids of the file."""
        size = self.max_length - 2
        num_pieces = self._num_pieces(lengths)
        piece = np.arange(num_pieces.sum()) - np.repeat(
            np.cumsum(num_pieces) - num_pieces, num_pieces
        )
        left = np.repeat(lengths, num_pieces) - piece * size
        is_cut = np.repeat(lengths > self.max_length, num_pieces)
        own = np.where(is_cut, np.minimum(left, size), left)
        views = {"starts": np.repeat(starts, num_pieces) + piece * size}
        views["adds_start"] = self._lacks(is_cut & (piece > 0), views["starts"], self.special.start)
        views["adds_end"] = self._lacks(
            is_cut & (left > own), views["starts"] + own - 1, self.special.end
        )
        views["lengths"] = own + views["adds_start"] + views["adds_end"]
        return views

    def _lacks(
        self, is_inside: np.ndarray, places: np.ndarray, boundary_id: int | None
    ) -> np.ndarray:
        """Return which pieces lack the boundary id at a cut, given by is_inside and places."""
        if boundary_id is None:
            return np.zeros_like(is_inside)
        if self._known.has_inner_boundaries:
            is_inside[is_inside] = self.tokens.ids_M[places[is_inside]] != boundary_id
        return is_inside

    def _is_mostly_unknown(
        self, views: dict[str, np.ndarray], first: int, first_id: int, ends: np.ndarray
    ) -> np.ndarray:
        unknown = self.special.unknown
        if unknown is None:
            return np.zeros(len(views["starts"]), bool)
        places = self._places_of(unknown, first, first_id, ends)
        view_ends = views["starts"] + views["lengths"] - views["adds_start"] - views["adds_end"]
        counts = np.searchsorted(places, view_ends) - np.searchsorted(places, views["starts"])
        for adds, boundary_id in (
            (views["adds_start"], self.special.start),
            (views["adds_end"], self.special.end),
        ):
            counts = counts + adds * (boundary_id == unknown)
        return counts / views["lengths"] >= MAX_UNKNOWN_SHARE

    def _places_of(self, unknown: int, first: int, first_id: int, ends: np.ndarray) -> np.ndarray:
        """Return the ascending places of unknown ids in a chunk, or only those that can matter."""
        ranges = [(first_id, int(ends[-1]))]
        if self._known.many_unknown is not None:
            listed = self._known.many_unknown
            begin, end = np.searchsorted(listed, (first, first + len(ends)))
            numbers = listed[begin:end] - first
            ranges = [(int(ends[k - 1]) if k else first_id, int(ends[k])) for k in numbers.tolist()]
        found = [
            np.flatnonzero(self.tokens.ids_M[k : min(k + CHUNK_IDS, end)] == unknown) + k
            for start, end in ranges
            for k in range(start, end, CHUNK_IDS)
        ]
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one sequence's ids as int64, boundary tokens included."""
        return self.collate([index])[0][0].numpy()

    def collate(self, indices: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Make a batch: token_ids_BT, padded to the longest, and lengths_B; int64.

        Raises RankError if the ids' bytes differ from their checksum, or the file was cut off.
        """
        index_B = np.asarray(indices)
        starts_B, lengths_B = self.starts[index_B], self.lengths[index_B].astype(np.int64)
        adds_start_B, adds_end_B = self.adds_start[index_B], self.adds_end[index_B]
        ends_B = lengths_B - adds_end_B
        ids_M = self.tokens.runs(starts_B, ends_B - adds_start_B)
        column_T = np.arange(lengths_B.max())
        token_ids_BT = np.full((len(lengths_B), len(column_T)), self.special.pad, np.int64)
        token_ids_BT[(column_T >= adds_start_B[:, None]) & (column_T < ends_B[:, None])] = ids_M
        if self.special.start is not None:
            token_ids_BT[adds_start_B, 0] = self.special.start
        token_ids_BT[adds_end_B, ends_B[adds_end_B]] = self.special.end
        return torch.from_numpy(token_ids_BT), torch.from_numpy(lengths_B)

    def collate_longest(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Make a batch of the longest sequence alone."""
        return self.collate([int(np.argmax(self.lengths))])


@dataclasses.dataclass(frozen=True)
class _Known:
    """Facts that need not be computed from the ids.

    many_unknown: numbers of the sequences with MANY_UNKNOWN unknown ids or more; None if unlisted.
    """

    has_boundaries: bool = False
    has_inner_boundaries: bool = True
    many_unknown: np.ndarray | None = None


def _facts_of_the_card(tokens: TokenFile, special: SpecialIds) -> _Known:
    ids = (tokens.card.get("tokenizer") or {}).get("special_ids") or {}
    if (ids.get("start"), ids.get("end")) != (special.start, special.end):
        return _Known()
    listed = tokens.card.get("many_unknown") if ids.get("unknown") == special.unknown else None
    many_unknown = None if listed is None else np.array(listed, np.int64)
    counts = tokens.card.get("counts") or {}
    return _Known(True, counts.get("boundary_ids_inside") != 0, many_unknown)


def read_held_out(
    path: str | None,
    teacher: LanguageModel,
    max_length: int | None,
    prepare: MlmPreparation | None = None,
    folder: str | None = None,
) -> HeldOut | None:
    """Read held-out sequences and plan how they are evaluated; None without a file.

    prepare, folder: see HeldOut.of.
    """
    if path is None:
        return None
    logger.info("Held out: %s.", path)
    dataset = LmSeqsDataset.from_file(path, teacher, max_length, "--eval_data_file")
    return HeldOut.of(dataset, teacher.tokenizer, teacher.is_masked, prepare, folder)
