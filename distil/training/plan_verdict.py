"""Whether a planned run fits into memory and disk, and if not, which flag to lower.

Imports no torch.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from distil.system.memory import ADDRESSES, DATA, RESIDENT, Limit
from distil.training.config import TrainConfig

FIELDS = {RESIDENT: "memory", ADDRESSES: "addresses", DATA: "data"}


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes that a run takes at its peak, by field of /proc/self/status.

    fixed: of these, in memory, what is taken before the first micro-batch.
    """

    peaks: Mapping[str, int]
    fixed: int = 0


def size(num_bytes: float) -> str:
    """Write a number of bytes with three digits."""
    unit, name = next((u, n) for u, n in UNITS if num_bytes >= u or u == 1)
    return f"{num_bytes / unit:,.3g} {name}" if unit > 1 else f"{num_bytes:.0f} B"


UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))


def memory_remedy(config: TrainConfig) -> str:
    """Name the flag to lower where a micro-batch takes too much memory."""
    if config.tokens_per_pass:
        remedy = f"lower --tokens_per_pass ({config.tokens_per_pass})"
    elif config.max_tokens is not None:
        remedy = f"lower --max_tokens ({config.max_tokens})"
    elif config.batch_size > 1:
        remedy = f"lower --batch_size ({config.batch_size})"
    else:
        given = "" if config.max_length is None else f" ({config.max_length})"
        remedy = f"lower --max_length{given}"
    has_more = not config.activation_checkpointing
    return f"{remedy}, or add --activation_checkpointing" if has_more else remedy


def memory_problem(
    config: TrainConfig, limits: Sequence[Limit], needs: Needs | None, ended: str = ""
) -> str | None:
    """Say which limit a run exceeds, and the flag to lower; None: it fits.

    needs: None where the measured pass failed, as `ended` says.
    """
    if needs is None:
        limits = [limit for limit in limits if limit.field != RESIDENT] or limits
        named = " and ".join(f"{limit.name}, {size(limit.num_bytes)}" for limit in limits)
        return f"--plan: out of memory ({ended}) within {named}; {memory_remedy(config)}"
    for limit in limits:
        if (needed := needs.peaks.get(limit.field, 0)) > limit.num_bytes:
            what = f"--plan: the run takes {size(needed)} of {FIELDS[limit.field]}"
            remedy = memory_remedy(config)
            if limit.field == RESIDENT and needs.fixed > limit.num_bytes:
                remedy = (
                    f"{size(needs.fixed)} before the first micro-batch: take a smaller"
                    f" {'--student' if config.student else '--student_config'} or --teacher_name"
                )
            return f"{what}, {limit.name} is {size(limit.num_bytes)}; {remedy}"
    return None


# --------------------------------------------------------------------------------------------------
# Disk
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FileSizes:
    """Bytes of a run's files: a checkpoint, of step 0 and later; a plain state dict; a model."""

    first_checkpoint: int
    checkpoint: int
    plain: int
    model: int


@dataclasses.dataclass(frozen=True)
class DiskUse:
    """Bytes of a run's folder: at its end, and at the most meanwhile. kept: checkpoints."""

    final: int
    peak: int
    kept: int


def disk_use(
    sizes: FileSizes, steps: Sequence[int], epochs: Sequence[int], config: TrainConfig
) -> DiskUse:
    """Add up what a run leaves on the disk. Logs and files of a few kB are not counted.

    steps: saved, ascending. epochs: steps at which an epoch ended. Files of one update are stored
    once. A checkpoint is written before an old one goes.
    """
    by_step = [sizes.checkpoint if step else sizes.first_checkpoint for step in steps]
    keep = config.keep_checkpoints
    num_epochs = len(epochs) if config.keep_epochs is None else min(len(epochs), config.keep_epochs)
    num_plain = num_epochs + (not epochs or epochs[-1] != steps[-1])
    best = sizes.model if config.eval_data_file else 0
    final = sum(by_step[-keep:]) + num_plain * sizes.plain + sizes.model + best
    is_older = len(steps) > 1  # then checkpoint.pth of the last save is there, too
    before_the_end = sum(by_step[-keep - 1 :]) + (num_plain + is_older) * sizes.plain + best
    return DiskUse(final, max(final, before_the_end), len(by_step[-keep:]))


def disk_problem(
    config: TrainConfig, free: int, use: DiskUse, lowered: Mapping[str, DiskUse]
) -> str | None:
    """Say that a run does not fit on its disk, and the flag to lower; None: it fits.

    lowered: flag and lower value -> what the run takes with it.
    """
    if use.peak <= free:
        return None
    fitting = (flag for flag, with_it in lowered.items() if with_it.peak <= free)
    remedy = f"lower {flag}" if (flag := next(fitting, None)) else "name another volume"
    return (
        f"--dump_path {config.dump_path}: the run takes {size(use.peak)} on the disk,"
        f" {size(free)} are free; {remedy}"
    )
