"""The plan of micro-batches: which sequences make which micro-batch, in which order, on which rank.

A pure function of (lengths, seed, epoch), so that every rank makes the same plan by itself, none sees another's data
and none waits. Batches hold sequences of like lengths, which keeps padding small (the 2019 program's sampler); dealing
whole updates to the ranks is ours: W ranks at accumulation A take what one rank at A x W would take.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from utils import keyed_numpy_generator

BIN_WIDTH = 4


def length_groups(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """Number each sequence's group: how many of the edges 3, 7, 11, .. below max_length are <= its length.

    max_length 0 leaves one edge, 10.
    """
    edges = np.arange(3, max_length, BIN_WIDTH) if max_length > 0 else np.array([10])
    return np.searchsorted(edges, lengths, side="right")


def grouped_batches(order: np.ndarray, groups: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cut `order` (a permutation of the sequences) into batches of one group each.

    Batches come in the order in which groups fill up while `order` is read; what is left over is joined by ascending
    group, reading order inside, and cut again. ceil(N / batch_size) batches, each sequence once.
    """
    order = np.asarray(order)
    by_group = np.argsort(groups[order], kind="stable")  # places in the reading order, group by group
    sorted_groups = groups[order][by_group]
    starts = np.flatnonzero(np.r_[True, sorted_groups[1:] != sorted_groups[:-1]]) if len(order) else np.array([], int)
    full, left_over, filled_at = [], [], []
    for places in np.split(by_group, starts[1:]):
        num_full = len(places) // batch_size
        for k in range(num_full):
            batch = places[k * batch_size : (k + 1) * batch_size]
            full.append(order[batch])
            filled_at.append(batch[-1])
        left_over.append(order[places[num_full * batch_size :]])
    batches = [full[k] for k in np.argsort(filled_at)] if full else []
    return batches + plain_batches(np.concatenate(left_over), batch_size)


def plain_batches(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cut `order` into consecutive batches; the last may be shorter."""
    return [order[k : k + batch_size] for k in range(0, len(order), batch_size)]


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """One micro-batch: its number over the whole run, the epoch it belongs to, and its sequences."""

    number: int
    epoch: int
    sequences: np.ndarray


@dataclasses.dataclass(frozen=True)
class Update:
    """One optimizer update: every micro-batch in it, and those of them that this rank computes (maybe none)."""

    planned: list[PlannedBatch]
    mine: list[PlannedBatch]


class GroupedBatchSampler:
    """Plan the micro-batches of a whole run from the sequences' lengths."""

    def __init__(self, lengths: np.ndarray, batch_size: int, max_length: int, *, group_by_size: bool, seed: int):
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.groups = length_groups(self.lengths, max_length) if group_by_size else None
        self._planned_epoch: tuple[int, list[np.ndarray]] | None = None

    def __len__(self) -> int:
        """Count the micro-batches of an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def epoch_batches(self, epoch: int) -> list[np.ndarray]:
        """Plan one epoch: a new order of the sequences for each (seed, epoch)."""
        if self._planned_epoch is None or self._planned_epoch[0] != epoch:
            # Differs from the original: 2019 gave every epoch the order of the first.
            order = keyed_numpy_generator(self.seed, epoch, "order").permutation(len(self.lengths))
            if self.groups is None:
                batches = plain_batches(order, self.batch_size)
            else:
                batches = grouped_batches(order, self.groups, self.batch_size)
            self._planned_epoch = (epoch, batches)
        return self._planned_epoch[1]

    def micro_batches(self, num_micro_batches: int) -> Iterator[PlannedBatch]:
        """Yield the run's micro-batches 0, 1, .. as a single process would take them, over the ends of epochs."""
        for number in range(num_micro_batches):
            epoch, place = divmod(number, len(self))
            yield PlannedBatch(number, epoch, self.epoch_batches(epoch)[place])

    def updates(self, num_micro_batches: int, accumulation: int, rank: int, world_size: int) -> Iterator[Update]:
        """Yield the run's updates: the next accumulation x world_size micro-batches, dealt to the ranks."""
        # Differs from the original: counted over the run. 2019 counted anew each epoch, and left-over gradients leaked.
        planned: list[PlannedBatch] = []
        for batch in self.micro_batches(num_micro_batches):
            planned.append(batch)
            if len(planned) == accumulation * world_size or batch.number == num_micro_batches - 1:
                yield Update(planned, self.deal(planned, rank, world_size))
                planned = []

    def deal(self, planned: list[PlannedBatch], rank: int, world_size: int) -> list[PlannedBatch]:
        """Choose this rank's share of an update: counts differ by 1 at most, padded sizes are balanced."""
        sizes = [-len(batch.sequences) * int(self.lengths[batch.sequences].max()) for batch in planned]
        share = []
        for place, index in enumerate(np.argsort(sizes, kind="stable")):
            lap, seat = divmod(place, world_size)
            if (seat if lap % 2 == 0 else world_size - 1 - seat) == rank:  # there and back again: 0 1 1 0 0 1 ..
                share.append(planned[index])
        return sorted(share, key=lambda batch: batch.number)
