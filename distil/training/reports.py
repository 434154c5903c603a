"""The result of an update, read when the device has computed it."""

import dataclasses
import functools
from collections.abc import Callable

import torch


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
