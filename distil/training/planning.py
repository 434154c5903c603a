"""The plan of a run, told before anything is trained: updates, tokens, hours, memory, disk, cost.

The counts are exact: they come from the run's own sampler and its own rules of what falls due. The
costs are measured by distil/training/rehearsal.py, on this device, or follow from a given rate.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from distil.reporting.tables import digits
from distil.system.files import existing_parent
from distil.system.memory import RESIDENT, Limit, memory_limits
from distil.training.config import TrainConfig
from distil.training.layout import EVENTS
from distil.training.plan_verdict import (
    DiskUse,
    FileSizes,
    Needs,
    disk_problem,
    disk_use,
    memory_problem,
    size,
)
from distil.training.progress import Progress, duration
from distil.training.rehearsal import Measured, Rehearsed, file_sizes, rehearse
from distil.training.trackers import TENSORBOARD
from utils import InputError, is_out_of_memory, logger, one_line, raise_problems

# --------------------------------------------------------------------------------------------------
# Counts
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a run will do, exactly.

    shapes: rows of (sequences, padded length, micro-batches of that shape). saves: updates after
    which a checkpoint is written. epochs: updates that end an epoch.
    """

    updates: int
    micro_batches: int
    real_tokens: int
    padded_tokens: int
    shapes: np.ndarray
    logs: int
    evaluations: int
    saves: Sequence[int]
    epochs: Sequence[int]
    is_resumed: bool


def count_shapes(sampler, first: int, num: int) -> tuple[np.ndarray, int]:
    """Count the micro-batches first .. num - 1 of a run by shape: (shapes, real tokens)."""
    per_epoch, counts, real_tokens = len(sampler), {}, 0
    for epoch in range(first // per_epoch, -(-num // per_epoch)):
        begin, end = (min(max(k - epoch * per_epoch, 0), per_epoch) for k in (first, num))
        sizes_N3 = batch_sizes(sampler, epoch)[begin:end]
        real_tokens += int(sizes_N3[:, 2].sum())
        shapes, nums = np.unique(sizes_N3[:, :2], axis=0, return_counts=True)
        for shape, count in zip(map(tuple, shapes.tolist()), nums.tolist(), strict=True):
            counts[shape] = counts.get(shape, 0) + count
    rows = [(*shape, count) for shape, count in sorted(counts.items())]
    return np.array(rows, np.int64).reshape(-1, 3), real_tokens


def batch_sizes(sampler, epoch: int) -> np.ndarray:
    """Return (sequences, padded length, real tokens) of each micro-batch of an epoch."""
    batches = sampler.epoch_batches(epoch)
    lengths = sampler.lengths[batches.sequences].astype(np.int64)
    starts = np.concatenate([[0], batches.ends[:-1]])
    columns = np.diff(batches.ends, prepend=0), np.maximum.reduceat(lengths, starts)
    return np.stack([*columns, np.add.reduceat(lengths, starts)], axis=1)


class _Numbered(NamedTuple):
    """A micro-batch as far as `Progress` asks."""

    number: int
    epoch: int


def count_run(sampler, progress: Progress) -> Counts:
    """Count what is left of a run, by its own rules. progress: where it is; it is led to the end.

    A run that begins writes a checkpoint before its first update; one that resumes has its own.
    """
    first, num, per_epoch = progress.micro_batches, progress.num_micro_batches, len(sampler)
    shapes, real_tokens = count_shapes(sampler, first, num)
    started_at, logs, evaluations = progress.step, 0, _evaluate_if_due(progress)
    saves, epochs = [started_at], [started_at] * (first // per_epoch)
    while not progress.is_done:
        begin = progress.micro_batches
        numbers = range(begin, min(begin + progress.per_update, num))
        planned = [_Numbered(number, number // per_epoch) for number in numbers]
        actions = progress.actions(planned)
        progress.advance(planned)
        evaluations += _evaluate_if_due(progress)
        logs += actions.is_logged
        saves += [progress.step] * actions.is_saved
        epochs += [progress.step] * len(actions.epochs)
    return Counts(
        updates=progress.step - started_at,
        micro_batches=num - first,
        real_tokens=real_tokens,
        padded_tokens=int(shapes.prod(axis=1).sum()),
        shapes=shapes,
        logs=logs,
        evaluations=evaluations,
        saves=saves,
        epochs=epochs,
        is_resumed=started_at > 0,
    )


def _evaluate_if_due(progress: Progress) -> int:
    is_due = progress.evaluation_is_due()
    if is_due:
        progress.evaluated_step = progress.step
    return int(is_due)


# --------------------------------------------------------------------------------------------------
# Time
# --------------------------------------------------------------------------------------------------


def time_parts(counts: Counts, measured: Measured, world_size: int) -> dict[str, np.ndarray]:
    """Return what each part of a run takes, (wall, processor) seconds of one process."""
    passes = measured.pass_costs(counts.shapes)
    evaluations = measured.first_evaluation + measured.evaluation * (counts.evaluations - 1)
    num_written = len(counts.saves) - counts.is_resumed
    num_plain = len({*counts.saves, *counts.epochs}) - counts.is_resumed + counts.evaluations
    return {
        "start": measured.start,
        "training": passes / world_size + counts.updates * measured.update,
        "logs": counts.logs * measured.log,
        "evaluations": evaluations * (counts.evaluations > 0) / world_size,
        "checkpoints": num_written * measured.save + num_plain * measured.plain,
        "end": measured.end,
    }


# --------------------------------------------------------------------------------------------------
# The plan
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is told of a run, in plain values, as --plan json prints it.

    time_s: wall seconds by part, cpu_s: processor seconds of all processes; of a given rate
    training alone. memory: bytes by kind. disk_free: with what a resumed run's folder holds.
    """

    num_processes: int
    device: str
    updates: int
    micro_batches: int
    real_tokens: int
    padded_tokens: int
    evaluations: int
    num_passes: int
    tokens_per_second: float
    time_s: dict[str, float]
    cpu_s: dict[str, float]
    hours: float
    cost: float | None
    memory: dict[str, int]
    checkpoints: int
    checkpoint_bytes: int
    disk: DiskUse
    disk_free: int


def free_bytes(config: TrainConfig, is_resumed: bool) -> int:
    """Return what is free for a run: of its volume, and what it holds itself where it resumes."""
    folder = existing_parent(config.dump_path)
    free = shutil.disk_usage(folder).free
    if is_resumed:
        stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
        free += sum({stat.st_ino: stat.st_size for stat in stats}.values())
    return free


def disk_problem_of(config: TrainConfig, counts: Counts, sizes: FileSizes, free: int) -> str | None:
    """Say that a run does not fit on its disk, with the flag that would make it fit."""

    def with_fewer(**changes):
        return disk_use(sizes, counts.saves, counts.epochs, dataclasses.replace(config, **changes))

    lowered = {}
    if config.keep_checkpoints > 2:
        lowered["--keep_checkpoints to 2"] = with_fewer(keep_checkpoints=2)
    if (config.keep_epochs or len(counts.epochs)) > 1:
        lowered["--keep_epochs to 1"] = with_fewer(keep_epochs=1)
        name = "--keep_epochs to 1 and --keep_checkpoints to 2"
        lowered[name] = with_fewer(keep_epochs=1, keep_checkpoints=2)
    return disk_problem(config, free, with_fewer(), lowered)


def make_plan(
    config: TrainConfig, counts: Counts, measured: Measured, sizes: FileSizes, free: int
) -> Plan:
    """Put together what was counted and measured. free: bytes on the disk."""
    num, is_given = config.num_processes(1), config.tokens_per_second is not None
    parts = time_parts(counts, measured, num)
    if is_given:
        parts = {"training": np.array([counts.real_tokens / config.tokens_per_second, 0.0])}
    training_s, hours = parts["training"][0], sum(part[0] for part in parts.values()) / 3600
    return Plan(
        num_processes=num,
        device=measured.device,
        updates=counts.updates,
        micro_batches=counts.micro_batches,
        real_tokens=counts.real_tokens,
        padded_tokens=counts.padded_tokens,
        evaluations=counts.evaluations,
        num_passes=measured.num_passes,
        tokens_per_second=counts.real_tokens / training_s if training_s else 0.0,
        time_s={name: float(part[0]) for name, part in parts.items()},
        cpu_s={} if is_given else {name: float(part[1] * num) for name, part in parts.items()},
        hours=hours,
        cost=None if config.price_per_hour is None else hours * config.price_per_hour,
        memory=measured.memory,
        checkpoints=len(counts.saves) - counts.is_resumed,
        checkpoint_bytes=sizes.checkpoint,
        disk=disk_use(sizes, counts.saves, counts.epochs, config),
        disk_free=free,
    )


MEMORIES = {"main": "of main memory", "gpu": "of the GPU's"}


def lines_of(plan: Plan, config: TrainConfig) -> list[str]:
    """Write a plan as lines for people."""
    times = {name: duration(seconds) for name, seconds in plan.time_s.items() if seconds >= 0.5}
    is_given = config.tokens_per_second is not None
    source = "given" if is_given else f"measured over {plan.num_passes} micro-batches"
    whole = duration(plan.hours * 3600)
    if is_given:
        spent = f"{whole} of training; evaluations and checkpoints are not counted"
    else:
        spent = f"{whole}: {', '.join(f'{name} {text}' for name, text in times.items())}"
    processes = f"{plan.num_processes} process{'es' * (plan.num_processes > 1)}"
    padding = 1 - plan.real_tokens / max(plan.padded_tokens, 1)
    memory = ", ".join(f"{size(num)} {MEMORIES[kind]}" for kind, num in plan.memory.items())
    rows = {
        "run": f"{processes}, {'each ' * (plan.num_processes > 1)}on {plan.device}",
        "updates": f"{plan.updates:,} of {plan.micro_batches:,} micro-batches in all",
        "tokens": f"{plan.real_tokens:,}, {plan.padded_tokens:,} with padding ({padding:.1%})",
        "rate": f"{digits(plan.tokens_per_second)} real tokens/s ({source})",
        "time": spent,
        "memory": f"{memory} at the peak{', each process' * (plan.num_processes > 1)}",
        "checkpoints": f"{plan.checkpoints:,} of {size(plan.checkpoint_bytes)},"
        f" {plan.disk.kept} kept; {plan.evaluations:,} evaluations",
        "disk": f"{size(plan.disk.final)} at the end, {size(plan.disk.peak)} at the peak, logs not"
        f" counted; {size(plan.disk_free)} are free",
    }
    if plan.num_processes > 1 and not is_given:
        rows["rate"] += "; the exchange between processes is not counted"
    if plan.cost is not None:
        rows["cost"] = f"{plan.cost:,.2f} at {config.price_per_hour:g} an hour"
    return [f"{name:<12} {text}" for name, text in rows.items()]


def tell_plan(
    config: TrainConfig,
    progress: Progress,
    distiller,
    sampler,
    ready: Callable,
    held_out,
    evaluate: Callable,
) -> None:
    """Rehearse a run and print its plan. Raises InputError where the run cannot fit.

    progress: where the run is. The others: see `Rehearsed`.
    """
    first, per_epoch = progress.micro_batches, len(sampler)
    sizes = batch_sizes(sampler, min(first, progress.num_micro_batches - 1) // per_epoch)
    parts = Rehearsed(
        *(distiller, sampler, ready, sizes, held_out, evaluate),
        accumulation=config.gradient_accumulation_steps,
        first=first,
        left=progress.num_micro_batches - first,
        num_threads=1 + len(EVENTS) * (TENSORBOARD in config.report_to),  # one waits for git
    )
    counts, files = count_run(sampler, progress), file_sizes(distiller)
    free = free_bytes(config, counts.is_resumed)
    raise_problems([disk_problem_of(config, counts, files, free)])
    logger.info("Measuring: a few micro-batches are computed, nothing is written.")
    measured = rehearse(parts, config.tokens_per_second is None)
    needs = Needs(measured.peaks, measured.fixed)
    raise_problems([memory_problem(config, memory_limits(), needs)])
    plan = make_plan(config, counts, measured, files, free)
    as_json = json.dumps(dataclasses.asdict(plan), indent=2)
    print(as_json if config.plan == "json" else "\n".join(lines_of(plan, config)))


@contextlib.contextmanager
def naming_limits(config: TrainConfig) -> Iterator[None]:
    """Raise InputError that names limits and a flag to lower where a plan runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if config.plan is None or not is_out_of_memory(error):
            raise
        limits = memory_limits()
        if "CUDA" in str(error):
            whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            limits = [Limit("the GPU's memory", whole, RESIDENT)]
        raise InputError(memory_problem(config, limits, None, one_line(error, 80))) from error
