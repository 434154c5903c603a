"""What is said of a run and its updates, and the result of one, read when it is computed."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import torch

from distil.training.config import TrainConfig
from utils import logger


@dataclasses.dataclass(frozen=True)
class StepReport:
    """The result of an update.

    losses_MK: float64, each micro-batch's weighted loss, then its unweighted terms. statistics: of
    gradients, by log tag. num_asking: ranks that asked to stop after it, the same on every rank.
    """

    losses_MK: torch.Tensor
    grad_norm: float
    statistics: dict[str, float]
    num_asking: int = 0


class PendingUpdate:
    """An update that was launched, and that the device may still compute."""

    def __init__(self, read: Callable[[], StepReport]):
        self._read = functools.cache(read)

    def read(self) -> StepReport:
        """Wait for the update. Raises NonFiniteError on every rank where it was not applied."""
        return self._read()


def log_sizes(
    config: TrainConfig,
    student: torch.nn.Module,
    lengths: np.ndarray,
    num_micro_batches: int,
    world_size: int,
    tokens_per_pass: int,
    shape: tuple[int, int] | None,
) -> None:
    """Say how much is trained on how much, and how large an update is: see `describe_update`."""
    parameters, num_ids = f"{student.num_parameters():,}", int(lengths.sum())
    logger.info(
        "Training %s parameters on %d sequences (%d ids), %d micro-batches in all.",
        *(parameters, len(lengths), num_ids, num_micro_batches),
    )
    sizes = config.gradient_accumulation_steps, config.batch_size, config.max_tokens
    logger.info("%s", describe_update(*sizes, world_size, tokens_per_pass, shape))


def describe_update(
    accumulation: int,
    batch_size: int,
    max_tokens: int | None,
    world_size: int,
    tokens_per_pass: int = 0,
    shape: tuple[int, int] | None = None,
) -> str:
    """Say how large an update is, which grows with the number of processes, and its passes.

    shape: of packed passes.
    """
    size, unit = (batch_size, "sequences") if max_tokens is None else (max_tokens, "padded tokens")
    batches = f"{accumulation} micro-batch{'es' * (accumulation > 1)}"
    of_one = f"{batches} of {'up to ' * (max_tokens is not None)}{size:,} {unit}"
    num_of_one = accumulation * size
    joined = f" A pass joins micro-batches up to {tokens_per_pass:,} padded tokens."
    joined = joined if tokens_per_pass else ""
    if shape is not None:
        joined = f" A pass packs their sequences into up to {shape[0]} rows of {shape[1]} tokens."
    if world_size == 1:
        return f"An update: {of_one}, {num_of_one:,} in all.{joined}"
    return (
        f"An update: {world_size} processes x {of_one}, {world_size * num_of_one:,} in all; one"
        f" process alone: {num_of_one:,}. Divide --gradient_accumulation_steps by {world_size} to"
        f" keep that.{joined}"
    )
