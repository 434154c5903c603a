"""The plan of micro-batches: which sequences form one, in which order, pass and rank.

The plan is a pure function of (lengths, seed, epoch): every rank computes it alone, without
communication. A batch holds sequences of similar length, which keeps padding small, as in the
sampler of 2019. New here: whole updates are dealt to the ranks, so that W ranks with A accumulation
steps train on the same micro-batches as one rank with A x W; and a pass may join several of an
update's micro-batches, planned before they are dealt.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from distil.data.packing import (
    LAUNCH_TOKENS,
    Shape,
    choose_rows,
    num_rows,
    padded_rows,
    plan_packed,
    width_of,
)
from utils import InputError, concatenate_runs, keyed_numpy_generator

BIN_WIDTH = 4
CHUNK_BATCHES = 2**16
# Of the default on a GPU: most padded tokens of a pass, and the memory reserved for one of them,
# of which DistilBERT's activations take about 0.4 MB in float32.
MAX_TOKENS_PER_PASS, BYTES_PER_TOKEN = 2**16, 2**20
PASS_TOKENS = 2**9  # tokens of padding that one pass less is worth
CPU_TOKENS = 2**12  # of a packed pass on a CPU, by default at most
SAMPLED_UPDATES = 64  # that the default size of a packed pass is chosen by


def length_groups(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """Number each sequence's group: the count of edges 3, 7, 11, .. < max_length up to its length.

    max_length 0 means a single edge, 10.
    """
    edges = np.arange(3, max_length, BIN_WIDTH) if max_length > 0 else np.array([10])
    group_of_length = np.searchsorted(edges, np.arange(max(max_length, 11) + 1), side="right")
    longest = len(group_of_length) - 1
    return group_of_length.astype(np.min_scalar_type(len(edges)))[np.minimum(lengths, longest)]


@dataclasses.dataclass(frozen=True)
class Batches(Sequence):
    """Batches of sequences, concatenated in one array: 4 bytes per sequence, 8 per batch.

    sequences: all batches in order. ends: end of each batch in it.
    """

    sequences: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> np.ndarray:
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        start = self.ends[number - 1] if number else 0
        return self.sequences[start : self.ends[number]]


def plain_batches(order: np.ndarray, batch_size: int) -> Batches:
    """Cut `order` into consecutive batches; the last may be shorter."""
    ends = np.arange(batch_size, len(order) + batch_size, batch_size)
    return Batches(order, np.minimum(ends, len(order)))


def grouped_batches(order: np.ndarray, groups: np.ndarray, batch_size: int) -> Batches:
    """Cut `order` (a permutation of the sequences) into batches of one group each.

    Full batches are emitted as groups fill up while `order` is read. Left-over sequences are
    concatenated by ascending group, keeping their order within a group, and cut again. Gives
    ceil(N / batch_size) batches with each sequence once.
    """
    full, rest, _ = _fill_groups(order, groups, np.full(_num_groups(groups), batch_size))
    return _joined(full, plain_batches(rest, batch_size))


def budget_batches(
    order: np.ndarray, groups: np.ndarray, longest: np.ndarray, max_tokens: int
) -> Batches:
    """Cut `order` into batches of one group each, as large as a padded size of max_tokens admits.

    longest: upper bound of the length in each group, at most max_tokens. Order and left-overs as in
    grouped_batches. The number of batches depends only on the groups' sizes, so every epoch has the
    same.
    """
    full, rest, groups_of_rest = _fill_groups(order, groups, max_tokens // longest)
    return _joined(full, Batches(rest, _ends_within(longest[groups_of_rest], max_tokens)))


def _num_groups(groups: np.ndarray) -> int:
    return int(groups.max(initial=0)) + 1


def _fill_groups(
    order: np.ndarray, groups: np.ndarray, sizes: np.ndarray
) -> tuple[Batches, np.ndarray, np.ndarray]:
    """Fill batches of `sizes` per group from `order`: (full batches, left-overs, their groups)."""
    group_of_place = groups[order]
    places_by_group = np.argsort(group_of_place, kind="stable")  # in reading order inside a group
    bounds = np.searchsorted(group_of_place[places_by_group], np.arange(_num_groups(groups) + 1))
    place_type = np.int32 if len(order) < 2**31 else np.int64
    by_group, num_full = np.empty_like(order), 0
    filled_at, rest, groups_of_rest, batch_sizes = [], [], [], []
    for group in range(_num_groups(groups)):
        places = places_by_group[bounds[group] : bounds[group + 1]]
        size = int(sizes[group])
        num_batches = len(places) // size
        count = num_batches * size
        by_group[num_full : num_full + count] = order[places[:count]]
        num_full += count
        filled_at.append(places[size - 1 : count : size].astype(place_type))
        batch_sizes.append(np.full(num_batches, size, np.int32))
        rest.append(order[places[count:]])
        groups_of_rest.append(np.full(len(rest[-1]), group))
    del places_by_group, places
    in_order = np.argsort(np.concatenate(filled_at))
    full = _reordered(by_group[:num_full], np.concatenate(batch_sizes), in_order)
    return full, np.concatenate(rest), np.concatenate(groups_of_rest)


def _reordered(sequences: np.ndarray, sizes: np.ndarray, batches: np.ndarray) -> Batches:
    """Reorder consecutive batches of the given sizes, CHUNK_BATCHES at a time to save memory."""
    starts = np.cumsum(sizes) - sizes
    ends = np.cumsum(sizes[batches])
    result, place = np.empty_like(sequences), 0
    for k in range(0, len(batches), CHUNK_BATCHES):
        part, _ = concatenate_runs(sequences, starts, sizes, batches[k : k + CHUNK_BATCHES])
        result[place : place + len(part)] = part
        place += len(part)
    return Batches(result, ends)


def _ends_within(longest: np.ndarray, max_tokens: int) -> np.ndarray:
    """Return the ends of batches within max_tokens, given ascending bounds of the lengths."""
    ends, start = [], 0
    while start < len(longest):
        bounds = longest[start : start + max_tokens // int(longest[start])]
        start += int(np.count_nonzero(bounds * np.arange(1, len(bounds) + 1) <= max_tokens))
        ends.append(start)
    return np.array(ends, np.int64)


def _joined(first: Batches, second: Batches) -> Batches:
    offset = len(first.sequences)
    return Batches(
        np.concatenate([first.sequences, second.sequences]),
        np.concatenate([first.ends, second.ends + offset]),
    )


def _gpu_limit(gpu_bytes: int) -> int:
    return max(min(MAX_TOKENS_PER_PASS, gpu_bytes // BYTES_PER_TOKEN), 1)


def plan_passes(nums: np.ndarray, lengths: np.ndarray, tokens_per_pass: int) -> list[list[int]]:
    """Divide an update's micro-batches into passes: ascending indices of each, in ascending order.

    nums, lengths: sequences and padded length of each micro-batch. Of all divisions of the
    micro-batches, ordered by length, into passes of at most tokens_per_pass padded tokens (or of
    one micro-batch) this is the one with the fewest padded tokens, where a pass counts as
    PASS_TOKENS more. 0: a pass for each.
    """
    if tokens_per_pass == 0:
        return [[k] for k in range(len(nums))]
    order = np.argsort(-lengths, kind="stable")
    lengths, ends = lengths[order].astype(np.int64), np.cumsum(nums[order], dtype=np.int64)
    starts = ends - nums[order]
    # Of the first n micro-batches: the lowest cost, and where the last pass begins.
    costs, firsts = np.zeros(len(order) + 1, np.int64), np.zeros(len(order) + 1, np.int64)
    for end in range(1, len(order) + 1):
        padded = lengths[:end] * (ends[end - 1] - starts[:end])  # of a pass that begins at each
        fits = padded <= tokens_per_pass
        fits[-1] = True
        found = np.where(fits, costs[:end] + padded + PASS_TOKENS, np.iinfo(np.int64).max)
        firsts[end] = found.argmin()
        costs[end] = found[firsts[end]]
    passes, end = [], len(order)
    while end:
        passes.append(sorted(order[firsts[end] : end].tolist()))
        end = firsts[end]
    return sorted(passes)


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """One micro-batch: its number in the run, its epoch, and its sequences."""

    number: int
    epoch: int
    sequences: np.ndarray


@dataclasses.dataclass(frozen=True)
class Update:
    """One optimizer update: all its micro-batches, and the passes that this rank computes.

    A rank may have no pass. The micro-batches of a pass are in the order of their numbers.
    """

    planned: list[PlannedBatch]
    passes: list[list[PlannedBatch]]

    @property
    def mine(self) -> list[PlannedBatch]:
        """The micro-batches that this rank computes."""
        return [batch for one in self.passes for batch in one]


class GroupedBatchSampler:
    """Plan the micro-batches of a whole run from the sequences' lengths."""

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        max_length: int,
        *,
        group_by_size: bool,
        seed: int,
        max_tokens: int | None = None,
    ):
        """Group the sequences by length, unless group_by_size is False.

        max_tokens: limit a micro-batch's padded size instead of its number of sequences. Raises
        InputError if a sequence is longer than max_tokens or sequences are not grouped.
        """
        self.lengths = np.asarray(lengths)
        self.longest = int(self.lengths.max(initial=0))
        self.batch_size = batch_size
        self.seed = seed
        self.groups = length_groups(self.lengths, max_length) if group_by_size else None
        self.max_tokens = max_tokens
        self.tokens_per_pass, self.packs = 0, False
        self._planned_epoch: tuple[int, Batches] | None = None
        self._num_batches: int | None = None
        if max_tokens is not None:
            self._bound_groups(max_length)

    def _bound_groups(self, max_length: int) -> None:
        if self.groups is None:
            raise InputError(
                "--max_tokens with --no-group_by_size: the budget is planned by length; leave one"
                " of them out"
            )
        if self.longest > self.max_tokens:
            raise InputError(
                f"--max_tokens {self.max_tokens}: the longest sequence has {self.longest} ids;"
                " raise it, or set --max_length"
            )
        # Group k ends below edge 3 + 4 k; the last one is open.
        self.longest_of_group = np.arange(_num_groups(self.groups)) * BIN_WIDTH + 2
        self.longest_of_group[-1] = self.longest

    def join(
        self,
        tokens_per_pass: int | None,
        accumulation: int,
        gpu_bytes: int | None,
        packs: bool | None = False,
        num_ranks: int = 1,
    ) -> None:
        """Let passes join an update's micro-batches, up to so many padded tokens; 0: do not.

        None: the default of a new run with `accumulation` micro-batches an update on each rank. It
        is 0 on a CPU (gpu_bytes None), which gains little. On a GPU it is what a rank's part of an
        update fills evenly, at most MAX_TOKENS_PER_PASS, and less where memory is small. packs: lay
        the sequences into rows, so that passes have one shape, or two; None: where it is cheaper.
        The default is then what makes updates cheapest. Raises InputError below the longest
        sequence.
        """
        if packs is None:
            self._join_cheaper(tokens_per_pass, accumulation, gpu_bytes, num_ranks)
            return
        longest = self.longest
        if tokens_per_pass is None and packs:
            tokens_per_pass = self._packed_pass(accumulation * num_ranks, num_ranks, gpu_bytes)
        elif tokens_per_pass is None:
            on_gpu = 0 if gpu_bytes is None else self._even_pass(accumulation, gpu_bytes)
            tokens_per_pass = max(on_gpu, longest) if on_gpu else 0
        if 0 < tokens_per_pass < longest:
            raise InputError(
                f"--tokens_per_pass {tokens_per_pass}: the longest sequence has {longest} ids;"
                " raise it, set --max_length, or 0 for a pass each micro-batch"
            )
        self.tokens_per_pass, self.packs = tokens_per_pass, packs

    @property
    def shape(self) -> Shape | None:
        """The rows of packed passes, but for small ones, and their width; None: none is packed."""
        if not (self.packs and self.tokens_per_pass):
            return None
        return max(self.tokens_per_pass // self._width, 1), self._width

    @property
    def _width(self) -> int:
        """The width of packed rows."""
        return width_of(max(self.longest, 1))

    @property
    def passes(self) -> tuple[int, Shape | None]:
        """The padded tokens up to which passes join micro-batches, and the shape of packed ones."""
        return self.tokens_per_pass, self.shape

    def _join_cheaper(self, tokens_per_pass, accumulation, gpu_bytes, num_ranks) -> None:
        """Join, or pack, by the tokens of sampled updates and those that their passes are worth."""
        ways = []
        for packs in (False, True):
            self.join(tokens_per_pass, accumulation, gpu_bytes, packs, num_ranks)
            planned = [self._passes(one) for one in self._sampled(accumulation * num_ranks)]
            tokens = sum(int(sum(sizes)) for _, sizes in planned)
            cost = tokens + LAUNCH_TOKENS * sum(len(passes) for passes, _ in planned)
            ways.append((cost, packs, self.tokens_per_pass))
        _, self.packs, self.tokens_per_pass = min(ways)  # of equal ones, not packed

    def _sampled(self, per_update: int) -> list[list[np.ndarray]]:
        """List updates that lie evenly over the first epoch, by their micro-batches' lengths."""
        batches, last = self.epoch_batches(0), max(len(self) - per_update, 0)
        firsts = dict.fromkeys(np.linspace(0, last, SAMPLED_UPDATES).astype(int).tolist())
        ranges = [range(first, min(first + per_update, len(self))) for first in firsts]
        return [[self.lengths[batches[k]] for k in places] for places in ranges]

    def _packed_pass(self, per_update: int, num_ranks: int, gpu_bytes: int | None) -> int:
        """Choose the tokens of a packed pass by sampled updates."""
        width = self._width
        limit = CPU_TOKENS if gpu_bytes is None else _gpu_limit(gpu_bytes)
        return choose_rows(self._sampled(per_update), width, limit // width, num_ranks) * width

    def _even_pass(self, accumulation: int, gpu_bytes: int) -> int:
        """Divide the tokens of a mean update evenly; a quarter more, for padding and spread."""
        tokens = -(-int(self.lengths.sum(dtype=np.int64)) * accumulation // len(self))
        limit = _gpu_limit(gpu_bytes)
        num_passes = -(-tokens // limit)
        return min(-(-tokens * 5 // (4 * num_passes * PASS_TOKENS)) * PASS_TOKENS, limit)

    def __len__(self) -> int:
        """Return the number of micro-batches in an epoch."""
        if self._num_batches is None:
            num = -(-len(self.lengths) // self.batch_size)
            self._num_batches = num if self.max_tokens is None else len(self.epoch_batches(0))
        return self._num_batches

    def epoch_batches(self, epoch: int) -> Batches:
        """Plan an epoch; each (seed, epoch) has its own order of the sequences."""
        if self._planned_epoch is None or self._planned_epoch[0] != epoch:
            self._planned_epoch = None  # free its memory before planning the next one
            self._planned_epoch = (epoch, self._plan(self._order(epoch)))
        return self._planned_epoch[1]

    def _order(self, epoch: int) -> np.ndarray:
        # Differs from the original: shuffled anew each epoch. 2019 repeated the first one's order.
        num = len(self.lengths)
        in_file_order = np.arange(num, dtype=np.int32 if num < 2**31 else np.int64)
        generator = keyed_numpy_generator(self.seed, epoch, "order")
        generator.shuffle(in_file_order)
        return in_file_order

    def _plan(self, order: np.ndarray) -> Batches:
        if self.groups is None:
            return plain_batches(order, self.batch_size)
        if self.max_tokens is None:
            return grouped_batches(order, self.groups, self.batch_size)
        return budget_batches(order, self.groups, self.longest_of_group, self.max_tokens)

    def micro_batches(self, num_micro_batches: int, first: int = 0) -> Iterator[PlannedBatch]:
        """Yield micro-batches `first` .. num_micro_batches - 1 of the run, across epochs."""
        for number in range(first, num_micro_batches):
            epoch, place = divmod(number, len(self))
            yield PlannedBatch(number, epoch, self.epoch_batches(epoch)[place])

    def updates(
        self, num_micro_batches: int, accumulation: int, rank: int, world_size: int, first: int = 0
    ) -> Iterator[Update]:
        """Yield the run's updates of accumulation x world_size micro-batches, dealt to the ranks.

        first: number of the first micro-batch, above 0 in a resumed run.
        """
        # Differs from the original: counted over the run. 2019 counted from 0 in each epoch, and
        # left-over gradients leaked into the next one.
        planned: list[PlannedBatch] = []
        for batch in self.micro_batches(num_micro_batches, first):
            planned.append(batch)
            if len(planned) == accumulation * world_size or batch.number == num_micro_batches - 1:
                yield Update(planned, self.deal(planned, rank, world_size))
                planned = []

    def deal(
        self, planned: list[PlannedBatch], rank: int, world_size: int
    ) -> list[list[PlannedBatch]]:
        """Select this rank's share of an update's passes: see `shares`."""
        return self.shares(planned, world_size)[rank]

    def shares(
        self, planned: list[PlannedBatch], world_size: int
    ) -> list[list[list[PlannedBatch]]]:
        """Deal an update's passes to the ranks, balancing padded sizes.

        Passes are dealt from large to small, to ranks 0 .. W-1, then W-1 .. 0, and so on, so that
        the ranks' counts differ by at most 1.
        """
        passes, sizes = self._passes([self.lengths[batch.sequences] for batch in planned])
        shares: list[list[list[int]]] = [[] for _ in range(world_size)]
        for place, index in enumerate(np.argsort(np.negative(sizes), kind="stable")):
            lap, seat = divmod(place, world_size)
            shares[seat if lap % 2 == 0 else world_size - 1 - seat].append(passes[index])
        return [[[planned[k] for k in one] for one in sorted(share)] for share in shares]

    def _passes(self, lengths: list[np.ndarray]) -> tuple[list[list[int]], list[int]]:
        """Divide an update into passes: (micro-batches of each, padded tokens of each).

        lengths: of the sequences of each micro-batch.
        """
        if self.shape is not None:
            passes, (rows, width) = plan_packed(lengths, self.shape), self.shape
            packed = (np.concatenate([lengths[k] for k in one]) for one in passes)
            return passes, [padded_rows(num_rows(own, width), rows) * width for own in packed]
        nums = np.array([len(own) for own in lengths])
        longest = np.array([int(own.max()) for own in lengths])
        passes = plan_passes(nums, longest, self.tokens_per_pass)
        return passes, [nums[one].sum() * longest[one].max() for one in passes]
