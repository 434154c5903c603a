"""Counters and means of a run, what falls due after an update, and the progress bar.

Units: micro-batches are counted over all processes, iterations on each, steps are updates.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import psutil
import torch
from tqdm import tqdm

from utils import bar_options


@dataclasses.dataclass(frozen=True)
class Intervals:
    """When something is done. log, checkpoint: micro-batches of one process between two times.

    evaluation: updates between two evaluations; None: one, at the end; has_held_out: False: none.
    """

    log: int
    checkpoint: int
    evaluation: int | None = None
    has_held_out: bool = False


@dataclasses.dataclass(frozen=True)
class Actions:
    """What is to be done after an update. epochs: those that end with it."""

    is_last: bool
    is_logged: bool
    is_saved: bool
    is_evaluated: bool
    epochs: list[int]

    @property
    def any(self) -> bool:
        """True where the update must be read at once."""
        return any(
            (self.is_last, self.is_logged, self.is_saved, self.is_evaluated, bool(self.epochs))
        )


class Progress:
    """Counters and means of a run; on the main process with a bar.

    loss_names: of the columns of losses_MK. lengths: ids of each sequence of the data.
    batch_flops: lengths_B -> model FLOPs of a micro-batch; peak_flops: a second, of all devices;
    both None where they are unknown.
    """

    def __init__(
        self,
        loss_names: Sequence[str],
        num_micro_batches: int,
        batches_per_epoch: int,
        world_size: int,
        lengths: np.ndarray,
        intervals: Intervals,
        *,
        shows_bar: bool,
        batch_flops: Callable[[np.ndarray], int] | None = None,
        peak_flops: float | None = None,
    ):
        self.names = list(loss_names)
        self.num_micro_batches, self.batches_per_epoch = num_micro_batches, batches_per_epoch
        self.world_size, self.lengths, self.intervals = world_size, lengths, intervals
        self.batch_flops, self.peak_flops = batch_flops, peak_flops
        self.step = 0  # updates done
        self.micro_batches = 0  # done, over all processes
        self.log_sums_K, self.log_count = torch.zeros(len(self.names), dtype=torch.float64), 0
        # Of all ranks, since the last log:
        self.num_tokens, self.num_flops, self.logged_at = 0, 0, time.perf_counter()
        self.epoch_sums: dict[int, tuple[float, int]] = {}
        self.evaluated_step = 0  # the last update after which held-out data was evaluated
        self.best: dict[str, Any] | None = None  # what best.json holds
        self.training_text = self.held_out_text = ""  # what the bar shows
        self.bar = tqdm(
            total=num_micro_batches,
            unit="batch",
            desc="epoch 0",
            smoothing=0.05,
            disable=not shows_bar,
            **bar_options(),
        )

    # ---- what falls due --------------------------------------------------------------------------

    @property
    def iterations(self) -> int:
        """Micro-batches that each process has taken."""
        return -(-self.micro_batches // self.world_size)

    @property
    def is_done(self) -> bool:
        """True where the last micro-batch was taken."""
        return self.micro_batches == self.num_micro_batches

    def actions(self, planned: Sequence) -> Actions:
        """Say what falls due after the next update, of these planned micro-batches."""
        num_iterations = -(-len(planned) // self.world_size)
        is_last = planned[-1].number == self.num_micro_batches - 1
        ends = [b for b in planned if (b.number + 1) % self.batches_per_epoch == 0]
        return Actions(
            is_last,
            is_logged=is_last or self._crosses(self.intervals.log, num_iterations),
            is_saved=is_last or self._crosses(self.intervals.checkpoint, num_iterations),
            is_evaluated=self._evaluates_after(self.step + 1, is_last),
            epochs=[batch.epoch for batch in ends],
        )

    def _crosses(self, interval: int, num_iterations: int) -> bool:
        """True where the next num_iterations micro-batches reach a multiple of the interval."""
        return (self.iterations + num_iterations) // interval > self.iterations // interval

    def evaluation_is_due(self) -> bool:
        """True where held-out data is to be evaluated after the last update, and was not yet."""
        return self.step > self.evaluated_step and self._evaluates_after(self.step, self.is_done)

    def _evaluates_after(self, step: int, is_last: bool) -> bool:
        every = self.intervals.evaluation
        return self.intervals.has_held_out and (
            is_last or (every is not None and step % every == 0)
        )

    # ---- counters and means ----------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the counters and sums as numbers, for a checkpoint."""
        return {
            "micro_batches": self.micro_batches,
            "log_sums": self.log_sums_K.tolist(),
            "log_count": self.log_count,
            "epoch_sums": [[epoch, *sums] for epoch, sums in self.epoch_sums.items()],
            "evaluated_step": self.evaluated_step,
            "best": self.best,
        }

    def load(self, step: int, state: Mapping[str, Any]) -> None:
        """Load what `state` returned after update number `step`."""
        self.step, self.micro_batches = step, state["micro_batches"]
        self.log_sums_K = torch.tensor(state["log_sums"], dtype=torch.float64)
        self.log_count = state["log_count"]
        self.epoch_sums = {epoch: (total, count) for epoch, total, count in state["epoch_sums"]}
        self.evaluated_step, self.best = state.get("evaluated_step", 0), state.get("best")
        self.bar.initial = self.micro_batches  # the bar's rate is of what is done now
        self.bar.update(self.micro_batches - self.bar.n)

    def start_clock(self) -> None:
        """Measure rates from now on: a checkpoint was read or written before."""
        self.logged_at = time.perf_counter()

    def moving_bar(self, batches: Iterator) -> Iterator:
        """Yield this rank's micro-batches; each one done moves the bar by one for every rank."""
        for batch in batches:
            yield batch
            self.bar.update(self.world_size)

    def advance(self, planned: Sequence) -> None:
        """Count an update that was launched."""
        self.step += 1
        self.micro_batches = planned[-1].number + 1

    def record(self, planned: Sequence, losses_MK: torch.Tensor) -> None:
        """Add an update's losses to the means, and show them."""
        self.log_sums_K += losses_MK.sum(0)
        self.log_count += len(planned)
        for batch, loss in zip(planned, losses_MK[:, 0].tolist(), strict=True):
            total, count = self.epoch_sums.get(batch.epoch, (0.0, 0))
            self.epoch_sums[batch.epoch] = (total + loss, count + 1)
            lengths_B = self.lengths[batch.sequences]
            self.num_tokens += int(lengths_B.sum())
            self.num_flops += 0 if self.batch_flops is None else self.batch_flops(lengths_B)
        rates = self.rates(time.perf_counter())
        self.bar.set_description(f"epoch {planned[-1].epoch}", refresh=False)
        loss = losses_MK[:, 0].mean()
        self.training_text = f"loss {loss:.4f}, {rates['tokens_per_s']:,.0f} tokens/s"
        if "mfu" in rates:
            self.training_text += f", {rates['mfu']:.1%} MFU"
        self.bar.set_postfix_str(self.training_text + self.held_out_text, refresh=False)
        # The next update may have moved the bar already.
        self.bar.update(max(planned[-1].number + 1 - self.bar.n, 0))

    def rates(self, now: float) -> dict[str, float]:
        """Return real tokens a second over all ranks, and MFU where the peak is known.

        Measured since the last log, or since this process began to train.
        """
        elapsed_s = now - self.logged_at
        rates = {"tokens_per_s": self.num_tokens / elapsed_s}
        if self.peak_flops is not None:
            rates["mfu"] = self.num_flops / elapsed_s / self.peak_flops
        return rates

    def epoch_mean(self, epoch: int) -> float:
        """Return the mean loss over an epoch's micro-batches so far."""
        total, count = self.epoch_sums[epoch]
        return total / count

    def take_scalars(self, epoch: int, learning_rate: float) -> dict[str, float]:
        """Return the scalars of a log, and begin the means of the next one."""
        now = time.perf_counter()
        # Differs from the original: means since the last log over all ranks; 2019: one micro-batch.
        means = (self.log_sums_K / self.log_count).tolist()
        scalars = {f"losses/{name}": mean for name, mean in zip(self.names, means, strict=True)}
        scalars |= {
            "losses/cum_avg_loss_epoch": self.epoch_mean(epoch),
            "learning_rate/lr": learning_rate,
            "global/memory_usage": psutil.virtual_memory().used / 1e6,
            "global/speed": now - self.logged_at,
            **{f"global/{name}": rate for name, rate in self.rates(now).items()},
        }
        self.log_sums_K.zero_()
        self.log_count, self.num_tokens, self.num_flops, self.logged_at = 0, 0, 0, now
        return scalars

    def take_figures(
        self, figures: Mapping[str, float], elapsed_s: float, data: str | None
    ) -> bool:
        """Record an evaluation, its time left out of the rates; True for the best student so far.

        data: digest of the held-out file, kept with the best figures.
        """
        self.evaluated_step = self.step
        self.logged_at += elapsed_s
        measure = "kl" if "kl" in figures else "loss"
        self.held_out_text = (
            f", held-out {measure} {figures[measure]:.4f}, top-1 {figures['accuracy']:.1%}"
        )
        self.bar.set_postfix_str(self.training_text + self.held_out_text)
        # A comparison with NaN is false: such a student is never the best.
        lowest = math.inf if self.best is None else self.best["figures"][measure]
        is_best = figures[measure] < lowest
        if is_best:
            figures = dict(figures)
            self.best = {"step": self.step, "lowest": measure, "figures": figures, "data": data}
        return is_best
