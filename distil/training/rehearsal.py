"""A rehearsal of a run: each thing that it does, once or a few times, timed, and nothing written.

The memory that the process has had by then is the run's, by construction.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import psutil
import torch

from distil.system.files import save_plain
from distil.system.memory import ADDRESSES, DATA, RESIDENT, process_memory
from distil.system.prefetch import MICRO_BATCHES_AHEAD, prefetched
from distil.training.checkpointing import OPTIMIZER, WRITE_BYTES, as_safetensors, bytes_of
from distil.training.log import gradient_statistics, parameter_statistics
from distil.training.plan_verdict import FileSizes
from distil.training.state import check_finite_state

NUM_LAUNCHES = 6  # a round, of micro-batches from the smallest to the largest
LAUNCH_S, LEAST_S = 3.0, 10.0  # a launch takes up to about so long; all that are timed at least
LEAST_ROUNDS = 2
GOLDEN = (5**0.5 - 1) / 2  # whose multiples, but for whole numbers, lie evenly from 0 to 1
THREAD_BYTES = 2**16  # so many come from a heap
SPARE_THREADS = 2  # whether a thread gets a heap of its own, or one that another left, is chance
COPIES = 2  # a checkpoint is written, and read back

Costs = np.ndarray  # (wall, processor) seconds


@dataclasses.dataclass(frozen=True)
class Rehearsed:
    """The parts of a run that are rehearsed.

    distiller, sampler: the run's. ready: updates -> each, then its micro-batches, as the loop takes
    them. batch_sizes: (sequences, padded length, ..) of the micro-batches of an epoch. held_out,
    evaluate: data to evaluate, or None, and what evaluates some of it. accumulation: micro-batches
    of an update on one process. first: number of the first micro-batch that is left; left: how
    many are. num_threads: that a log keeps.
    """

    distiller: object
    sampler: object
    ready: Callable
    batch_sizes: np.ndarray
    held_out: object
    evaluate: Callable
    accumulation: int
    first: int
    left: int
    num_threads: int


@dataclasses.dataclass
class Measured:
    """What a run's parts cost, and the memory that they take."""

    start: Costs
    pass_fit: np.ndarray
    update: Costs
    log: Costs
    save: Costs
    plain: Costs
    first_evaluation: Costs
    evaluation: Costs
    end: Costs
    num_passes: int
    peaks: Mapping[str, int]
    fixed: int
    device: str
    on_gpu: Mapping[str, int]

    @property
    def memory(self) -> dict[str, int]:
        """Return the most memory that a process takes, in bytes, by kind."""
        return {"main": self.peaks[RESIDENT], **self.on_gpu}

    def pass_costs(self, shapes: np.ndarray) -> Costs:
        """Return what micro-batches take, by rows of (sequences, padded length, how many)."""
        return (features(shapes[:, :2]) * shapes[:, 2:]).sum(0) @ self.pass_fit


# --------------------------------------------------------------------------------------------------
# Costs by shape
# --------------------------------------------------------------------------------------------------


def features(shapes_N2: np.ndarray) -> np.ndarray:
    """Return what a pass over a padded batch costs in proportion to: 1, B T, B T^2."""
    num, length = shapes_N2.astype(np.float64).T
    return np.stack([np.ones_like(num), num * length, num * length**2], axis=1)


def fit_costs(features_NF: np.ndarray, costs_N: np.ndarray) -> np.ndarray:
    """Fit costs to features with coefficients that are not negative: (F,).

    Least squares over the features that get no negative one; with few, all subsets can be tried.
    """
    scale_F = features_NF.max(axis=0)
    best, least = np.zeros(len(scale_F)), np.inf
    for size in range(1, len(scale_F) + 1):
        for chosen in itertools.combinations(range(len(scale_F)), size):
            columns = list(chosen)
            scaled = features_NF[:, columns] / scale_F[columns]
            found, *_ = np.linalg.lstsq(scaled, costs_N, rcond=None)
            error = float(((scaled @ found - costs_N) ** 2).sum())
            if (found >= 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(len(scale_F)), error
                best[columns] = found / scale_F[columns]
    return best


def fit_both(features_NF: np.ndarray, costs_N2: np.ndarray) -> np.ndarray:
    """Fit wall and processor seconds apart: (F, 2)."""
    return np.stack([fit_costs(features_NF, column) for column in costs_N2.T], axis=1)


class Clock:
    """The clock of a device, and the most memory that was seen at its readings."""

    def __init__(self, device: torch.device):
        self.device = device
        self.data = 0

    def now(self) -> Costs:
        """Return (wall, processor) seconds once the device has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.data = max(self.data, process_memory(DATA))
        return np.array([time.perf_counter(), time.process_time()])

    def time(self, work: Callable[[], object]) -> Costs:
        """Return what a piece of work takes."""
        started = self.now()
        work()
        return self.now() - started

    def describe(self) -> tuple[str, dict[str, int]]:
        """Name the device; return the most of its memory that tensors have had, if it is a GPU."""
        if self.device.type != "cuda":
            num = torch.get_num_threads()
            return f"{num} thread{'s' * (num > 1)} of the CPU", {}
        peak = torch.cuda.max_memory_allocated(self.device)
        return torch.cuda.get_device_name(self.device), {"gpu": peak}

    def spent_s(self, costs: Costs) -> float:
        """Return wall seconds; on a CPU, which others may use too, no more than its own seconds."""
        return float(costs.min() if self.device.type == "cpu" else costs[0])

    def peaks(self) -> dict[str, int]:
        """Return the most memory that this process has had, by field of /proc/self/status."""
        self.now()
        return {DATA: self.data, **{f: process_memory(f) for f in (RESIDENT, ADDRESSES)}}


# --------------------------------------------------------------------------------------------------
# Updates
# --------------------------------------------------------------------------------------------------


def choose_launches(
    batch_sizes: np.ndarray, num_each: int, accumulation: int, turn: int = 0
) -> list[list[int]]:
    """Choose micro-batches, by place in the epoch, that stand for all of it: some launches of them.

    Whole updates from all over the epoch where num_each, what a launch may take, reaches one's
    micro-batches; else launches from small micro-batches to large ones. turn: number of the round:
    each takes others, for memory depends on how many shapes there were.
    """
    num, shift = len(batch_sizes), (0.5 + turn * GOLDEN) % 1
    if num_each >= min(accumulation, num):
        firsts = np.arange(0, num, accumulation)
        shares = (np.arange(NUM_LAUNCHES) + shift) / NUM_LAUNCHES
        starts = np.unique(firsts[(shares * len(firsts)).astype(int)]).tolist()
        return [list(range(start, min(start + accumulation, num))) for start in starts]
    padded_N = batch_sizes[:, 0] * batch_sizes[:, 1]
    order_N = np.argsort(padded_N, kind="stable")
    shares_N = np.cumsum(padded_N[order_N]) / padded_N.sum()
    # Spread over their sixth of the cost, not side by side: kernels are made for each new shape.
    targets = (np.arange(num_each) + shift) / num_each
    chosen = [np.searchsorted(shares_N, (k + targets) / NUM_LAUNCHES) for k in range(NUM_LAUNCHES)]
    return [order_N[np.unique(places)].tolist() for places in chosen]


def largest_places(batch_sizes: np.ndarray, num: int) -> list[int]:
    """Return the places of the micro-batches that take the most memory, largest first."""
    wide_N = batch_sizes[:, 0] * batch_sizes[:, 1]
    return np.lexsort((batch_sizes[:, 1], wide_N))[::-1][:num].tolist()


class Launches:
    """Updates of chosen micro-batches, launched and timed as the loop of training does."""

    def __init__(self, parts: Rehearsed, clock: Clock):
        self.parts, self.clock = parts, clock
        per_epoch = len(parts.batch_sizes)
        self.offset = parts.first // per_epoch * per_epoch
        end = parts.first + parts.accumulation
        self.example = next(parts.sampler.updates(end, parts.accumulation, 0, 1, parts.first))

    def _update(self, places: Sequence[int]) -> tuple[object, list]:
        """Return an update of these micro-batches, and the share of it that is computed: all."""
        numbers = [self.offset + place for place in places]
        chosen = (next(self.parts.sampler.micro_batches(n + 1, first=n)) for n in numbers)
        # An update's micro-batches have numbers in a row.
        planned = [dataclasses.replace(one, number=k) for k, one in enumerate(chosen, self.offset)]
        passes = self.parts.sampler.deal(planned, 0, 1)
        return dataclasses.replace(self.example, planned=planned, passes=passes)

    def run(self, chosen: Sequence[Sequence[int]]) -> list[Costs]:
        """Launch an update of each list of micro-batches, given by place in the epoch."""
        distiller, found = self.parts.distiller, []
        updates = [self._update(places) for places in chosen]
        stream = prefetched(self.parts.ready(updates), MICRO_BATCHES_AHEAD)
        with contextlib.closing(stream) as items:
            for update in items:
                passes = itertools.islice(items, len(update.passes))
                numbers = [batch.number for batch in update.planned]
                started = self.clock.now()
                distiller.launch(passes, numbers, len(update.passes)).read()
                found.append(self.clock.now() - started)
        return found

    def run_without_passes(self) -> Costs:
        """Launch an update of no micro-batch: what clipping and the optimizer take."""
        number = self.example.planned[0].number
        launch = self.parts.distiller.launch
        return self.clock.time(lambda: launch(iter(()), [number], 0).read())


def measure_passes(launches: Launches, parts: Rehearsed) -> tuple[Costs, np.ndarray, Costs, int]:
    """Return what the first passes took beyond others, the fit of passes, an update, and how many.

    The largest micro-batches come first, twice: the caches of libraries and of the heap settle.
    """
    sizes = parts.batch_sizes
    largest = largest_places(sizes, min(2, parts.accumulation))
    (first,), (again,) = launches.run([largest]), launches.run([largest])
    update = np.mean([launches.run_without_passes() for _ in range(3)], axis=0)
    most = min(parts.accumulation, len(sizes))
    num_each = int(np.clip(LAUNCH_S * len(largest) / launches.clock.spent_s(again), 1, most))
    num_each = most if parts.sampler.shape else num_each  # a packed pass costs what a full one does
    if num_each == most:  # a pass may join several
        launches.run([largest_places(sizes, most)])
    rows, costs, spent_s, num_passes, turn = [], [], 0.0, 0, 0
    while not turn or (num_passes < parts.left and (turn < LEAST_ROUNDS or spent_s < LEAST_S)):
        chosen = choose_launches(sizes, num_each, parts.accumulation, turn)
        turn += 1
        found = launches.run(chosen)
        rows += [features(sizes[places, :2]).sum(0) for places in chosen]
        costs += [np.maximum(cost - update, 0) for cost in found]
        spent_s += sum(map(launches.clock.spent_s, found))
        num_passes += sum(map(len, chosen))
    fit = fit_both(np.stack(rows), np.stack(costs))
    return np.maximum(first - again, 0), fit, update, num_passes


# --------------------------------------------------------------------------------------------------
# What is written
# --------------------------------------------------------------------------------------------------


class Sink:
    """A file that keeps nothing: what is written is copied, as to a disk's cache, and counted."""

    def __init__(self):
        self.num_bytes = 0
        self.room = memoryview(bytearray(WRITE_BYTES))

    def write(self, part) -> int:
        """Copy a part into the same few bytes of memory."""
        view = memoryview(part).cast("B")
        for start in range(0, len(view), WRITE_BYTES):
            block = view[start : start + WRITE_BYTES]
            self.room[: len(block)] = block
        self.num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Do nothing."""


def rehearse_checkpoint(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Do what writing and reading back a checkpoint does, but for the disk."""
    check_finite_state(tensors)
    for content in tensors.values():
        digest, sink = hashlib.sha256(), Sink()
        for part in as_safetensors(content):
            for _ in range(COPIES):
                digest.update(part)
                sink.write(part)


def rehearse_export(network: torch.nn.Module) -> None:
    """Hold a copy of all weights, as the library does that saves a model."""
    copies = [bytes(bytes_of(tensor)) for tensor in network.state_dict().values()]
    del copies


def file_sizes(distiller) -> FileSizes:
    """Return the sizes of a run's files, from their headers, and of a plain state dict."""
    tensors, sink = distiller.tensors(), Sink()
    save_plain(distiller.model.student.state_dict(), sink)
    sizes = {
        name: len(next(as_safetensors(content))) + sum(t.nbytes for t in content.values())
        for name, content in tensors.items()
    }
    whole = sum(sizes.values())
    return FileSizes(whole - sizes[OPTIMIZER], whole, sink.num_bytes, sizes["student"])


# --------------------------------------------------------------------------------------------------
# All of it
# --------------------------------------------------------------------------------------------------


def measure_evaluations(parts: Rehearsed, clock: Clock) -> tuple[Costs, Costs]:
    """Return what the first evaluation of held-out data takes, and a later one.

    Some batches are evaluated, from the longest to the shortest; the last one twice.
    """
    if parts.held_out is None:
        return np.zeros(2), np.zeros(2)
    lengths, batches = parts.held_out.dataset.lengths, parts.held_out.batches
    shapes = np.array([(len(batch), lengths[batch].max()) for batch in batches])
    places = sorted({0, len(batches) // 2, len(batches) - 1})
    one_each = [parts.held_out.only([batches[k]]) for k in places]
    costs = [clock.time(lambda one=one: parts.evaluate(one)) for one in one_each]
    again = clock.time(lambda: parts.evaluate(one_each[-1]))
    fit = fit_both(features(shapes[places]), np.stack(costs))
    first = features(shapes).sum(0) @ fit
    return first, first * np.minimum(again / costs[-1], 1)


@contextlib.contextmanager
def waiting_threads(num: int) -> Iterator[None]:
    """Keep threads within the block: each takes a stack and a heap, of addresses at least.

    TensorBoard's writers have one each.
    """
    is_over = threading.Event()

    def wait() -> None:
        own = bytearray(THREAD_BYTES)
        is_over.wait()
        del own

    threads = [threading.Thread(target=wait, daemon=True) for _ in range(num)]
    try:
        for thread in threads:
            thread.start()
        yield
    finally:
        is_over.set()


def rehearse(parts: Rehearsed, is_timed: bool) -> Measured:
    """Rehearse a run. is_timed: False: only what shows how much memory it takes."""
    with waiting_threads(parts.num_threads + SPARE_THREADS):
        return _rehearse(parts, is_timed)


def _rehearse(parts: Rehearsed, is_timed: bool) -> Measured:
    distiller, clock = parts.distiller, Clock(parts.distiller.device)
    network, nothing = distiller.model.student, np.zeros(2)
    age_s = time.time() - psutil.Process().create_time()
    start = np.array([age_s, time.process_time()])
    fixed = process_memory("VmRSS")
    launches, num_passes, update = Launches(parts, clock), 0, nothing
    fit = np.zeros((3, 2))
    if is_timed:
        extra, fit, update, num_passes = measure_passes(launches, parts)
        start += extra
    else:
        num_each = min(2, parts.accumulation, len(parts.batch_sizes))
        launches.run([largest_places(parts.batch_sizes, num_each)])
        launches.run(choose_launches(parts.batch_sizes, num_each, parts.accumulation))
    log = clock.time(lambda: (gradient_statistics(network), parameter_statistics(network)))
    evaluations = measure_evaluations(parts, clock)
    tensors = distiller.tensors()
    save = clock.time(lambda: rehearse_checkpoint(tensors))
    plain = clock.time(lambda: save_plain(network.state_dict(), Sink()))
    end = clock.time(lambda: rehearse_export(network))
    costs = start, fit, update, log, save, plain, *evaluations, end
    return Measured(*costs, num_passes, clock.peaks(), fixed, *clock.describe())
