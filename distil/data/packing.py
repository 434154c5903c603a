"""Packed passes: sequences of several micro-batches in rows of one width, so that shapes are few.

Flow: GroupedBatchSampler.deal (plan_packed) -> prepared micro-batches -> make_pass -> the models,
which attend within a sequence only (distil/models/forward.py).

Shape suffixes: B rows, T their width, S sequences, L positions of micro-batches laid end to end,
M real tokens, N selected positions.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from distil.data.batches import MicroBatch, Packing, end_to_end, join
from distil.losses import IGNORED_LABEL

WIDTH_MULTIPLE = 16  # to which a GPU's attention with a mask would pad each layer's mask anew
LAUNCH_TOKENS = 3000  # tokens of padding that launching a packed pass less is worth, on an H200
SMALL_SHARE = 4  # of a pass's rows, a smaller pass has one part: what is left of an update

Shape = tuple[int, int]  # rows of a pass, and their width


def width_of(longest: int) -> int:
    """Return the width of rows that the longest sequence fits in."""
    return -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def lay(lengths_S: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay sequences into rows: (row of each, its first column), by first-fit decreasing.

    The longest come first, those of one length as they are given; each goes to the first row that
    has room for it.
    """
    assert lengths_S.max(initial=0) <= width, "a sequence is longer than a row"
    room = np.full(len(lengths_S), width)
    rows_S, columns_S = np.zeros(len(lengths_S), np.int64), np.zeros(len(lengths_S), np.int64)
    for place in np.argsort(-lengths_S, kind="stable").tolist():
        row = int((room >= lengths_S[place]).argmax())
        rows_S[place], columns_S[place] = row, width - room[row]
        room[row] -= lengths_S[place]
    return rows_S, columns_S


def num_rows(lengths_S: np.ndarray, width: int) -> int:
    """Count the rows that sequences take."""
    return int(lay(lengths_S, width)[0].max(initial=-1)) + 1


def padded_rows(needed, most: int):
    """Return the rows of a pass that needs so many: one of two sizes, or a multiple of the larger.

    needed: a number, or an array.
    """
    small = -(-most // SMALL_SHARE)
    return np.where(needed <= small, small, -(-needed // most) * most)


# --------------------------------------------------------------------------------------------------
# The plan
# --------------------------------------------------------------------------------------------------


def plan_packed(lengths: Sequence[np.ndarray], shape: Shape) -> list[list[int]]:
    """Divide an update's micro-batches into passes of at most `shape`: ascending indices of each.

    lengths: of the sequences of each micro-batch. A pass takes the next micro-batches, as many as
    fit; one that does not fit alone is a pass.
    """
    passes, start = [], 0
    while start < len(lengths):
        end = start + _num_fitting(lengths[start:], shape)
        passes.append(list(range(start, end)))
        start = end
    return passes


def _num_fitting(lengths: Sequence[np.ndarray], shape: Shape) -> int:
    """Find how many of the first micro-batches fit in a pass, at least 1, by bisection."""
    sums = np.cumsum([own.sum() for own in lengths])
    fitting, beyond = 1, 1 + int(np.searchsorted(sums, shape[0] * shape[1], side="right"))
    trial = beyond - 1  # most often all of them
    while beyond - fitting > 1:
        if num_rows(np.concatenate(lengths[:trial]), shape[1]) <= shape[0]:
            fitting = trial
        else:
            beyond = trial
        trial = (fitting + beyond) // 2
    return fitting


def choose_rows(updates: Sequence[Sequence[np.ndarray]], width: int, most: int, ranks: int) -> int:
    """Choose the rows of a pass, at most `most`, that make an update cheapest for `ranks` ranks.

    updates: some of the run's, each the lengths of its micro-batches' sequences. A pass costs its
    tokens, padding included, and LAUNCH_TOKENS; ranks compute at the same time, so the one with
    most passes counts. Where an update is several passes, each may leave a micro-batch's rows.
    """
    rows_U = np.array([num_rows(np.concatenate(lengths), width) for lengths in updates])
    spare_U = rows_U / np.array([len(lengths) for lengths in updates])
    costs = []
    for num in range(1, max(most, 1) + 1):
        filled_U = np.where(rows_U <= num, num, np.maximum(num - spare_U, 0.5))
        full_U = np.ceil(rows_U / filled_U).astype(int) - 1  # passes before the last one
        last_U = padded_rows(np.ceil(rows_U - full_U * filled_U), num)
        # Passes are dealt from large to small: the last one is a rank's own in a lap of its own.
        last_U = np.where(full_U % ranks == 0, last_U, num)
        tokens_U = (full_U // ranks * num + last_U) * width
        costs.append(np.mean(tokens_U + (full_U // ranks + 1) * LAUNCH_TOKENS))
    return int(np.argmin(costs)) + 1


# --------------------------------------------------------------------------------------------------
# The batch
# --------------------------------------------------------------------------------------------------


def make_pass(batches: Iterable[MicroBatch], pad_id: int, shape: Shape | None) -> MicroBatch:
    """Make one pass of micro-batches: packed to a shape, or, with None, joined as they are."""
    return join(batches, pad_id) if shape is None else pack(batches, pad_id, shape)


def pack(batches: Iterable[MicroBatch], pad_id: int, shape: Shape) -> MicroBatch:
    """Pack micro-batches into one pass of `shape`, or of other rows: see `padded_rows`.

    Nothing is drawn anew: masks and labels are those of each micro-batch. Rows of each kind keep
    the order that they have in micro-batches, so they are not ascending.
    """
    batches, width = list(batches), shape[1]
    flat = end_to_end(batches)
    lengths_S, starts_S = _sequences(batches)
    rows_S, columns_S = (torch.from_numpy(found) for found in lay(lengths_S.numpy(), width))
    size = int(padded_rows(int(rows_S.max()) + 1, shape[0])), width
    sequences_M = torch.arange(len(lengths_S)).repeat_interleave(lengths_S)
    columns_M = torch.arange(len(sequences_M)) - (lengths_S.cumsum(0) - lengths_S)[sequences_M]
    given_M = starts_S[sequences_M] + columns_M
    places_M = (rows_S * width + columns_S)[sequences_M] + columns_M

    def placed(values_M: torch.Tensor, padding: int) -> torch.Tensor:
        result = torch.full(size, padding)
        result.view(-1)[places_M] = values_M
        return result

    places_L = torch.zeros(flat.input_ids_BT.numel(), dtype=torch.int64)
    places_L[given_M] = places_M
    return MicroBatch(
        number=batches[0].number,
        input_ids_BT=placed(flat.input_ids_BT.flatten()[given_M], pad_id),
        attention_mask_BT=None,
        labels_BT=placed(flat.labels_BT.flatten()[given_M], IGNORED_LABEL),
        rows={kind: places_L[rows_N] for kind, rows_N in flat.rows.items()},
        num_tokens=len(places_M),
        joined=tuple(batches),
        packing=Packing(placed(sequences_M, -1), placed(columns_M, 0), places_L),
    )


def _sequences(batches: Sequence[MicroBatch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lengths of all sequences, and where they start in micro-batches end to end."""
    lengths, starts, first = [], [], 0
    for batch in batches:
        num, length = batch.input_ids_BT.shape
        lengths.append(torch.bincount(batch.rows["real"] // length, minlength=num))
        starts.append(first + torch.arange(num) * length)
        first += num * length
    return torch.cat(lengths), torch.cat(starts)
