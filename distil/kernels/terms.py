"""Which of the selected rows an objective reads, and what its sum over them weighs in the total.

Shape suffixes: N selected positions, C positions of a chunk, X any.
"""

import dataclasses
import functools
from collections.abc import Sequence

import torch

from distil.data.batches import to_device
from distil.objectives import Loss


@dataclasses.dataclass(frozen=True)
class Term:
    """One active objective of one micro-batch; a pass that joins several has a term for each.

    rows_N: ascending positions, on the device, in the selected rows. offsets: the same on the host,
    so that cutting chunks never waits for the device. labels_N: one for each row, only where the
    formula reads them. weight: of its sum in the total: alpha / count x the update's scale (a
    number, or a scalar tensor where a gradient scaler provides it).
    """

    loss: Loss
    rows_N: torch.Tensor
    offsets: torch.Tensor
    labels_N: torch.Tensor | None
    weight: float | torch.Tensor

    @functools.cached_property
    def bounds(self) -> tuple[int, int]:
        """Its first row, and the one after its last; (0, 0) without a row."""
        ends = self.offsets[[0, -1]].tolist() if len(self.offsets) else [0, -1]
        return ends[0], ends[1] + 1

    def within(self, first: int, last: int) -> tuple[int, int]:
        """Return the range of its rows that lie in rows first .. last of the selection."""
        start, end = self.bounds
        if start >= last or end <= first:  # as most of many terms are
            return 0, 0
        low, high = torch.searchsorted(self.offsets, torch.tensor([first, last])).tolist()
        return low, high

    def places(self, low: int, high: int, first: int) -> slice | torch.Tensor:
        """Say where its rows low .. high are in rows from `first`: a slice where none is skipped.

        A slice copies nothing.
        """
        start, last = self.offsets[[low, high - 1]].tolist()
        if last - start == high - 1 - low:
            return slice(start - first, last + 1 - first)
        return self.rows_N[low:high] - first

    def select(self, low: int, high: int, student_CX, teacher_CX, first: int):
        """Select its rows low .. high of rows first .. first + C: (student, teacher, labels)."""
        labels = None if self.labels_N is None else self.labels_N[low:high]
        if high - low < len(student_CX):
            rows = self.places(low, high, first)
            student_CX = student_CX[rows]
            teacher_CX = None if teacher_CX is None else teacher_CX[rows]
        return student_CX, teacher_CX, labels


def terms_of_micro_batches(
    loss: Loss,
    weights: Sequence[float | torch.Tensor],
    sizes: list[int],
    offsets: torch.Tensor,
    labels_N: torch.Tensor | None,
    device: torch.device,
) -> list[Term]:
    """Divide an objective's rows of a pass by micro-batch, each with its weight and number of rows.

    offsets, labels_N: of a Selection, on the host.
    """
    rows, labels = to_device(offsets, device).split(sizes), [None] * len(sizes)
    if labels_N is not None:
        labels = to_device(labels_N, device).split(sizes)
    parts = zip(rows, offsets.split(sizes), labels, weights, strict=True)
    return [Term(loss, *part) for part in parts]
