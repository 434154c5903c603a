"""Counters and means of a run, what falls due after an update, and the progress bar.

Units: micro-batches are counted over all processes, iterations on each, steps are updates.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import psutil
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from distil.held_out_options import DRAWN
from distil.reporting.tables import digits
from distil.training.log import Place
from utils import bar_options, logger

FILE_LINE_S = 60  # between two lines of the bar in a log file


@dataclasses.dataclass(frozen=True)
class Intervals:
    """When something is done. log, checkpoint: micro-batches of one process between two times.

    evaluation: updates between two evaluations; None: the first and the last weights only;
    has_held_out: False: none.
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

    loss_names: of the columns of losses_MK. per_update: micro-batches of an update, over all
    processes. lengths: ids of each sequence of the data. batch_flops: lengths_B -> model FLOPs of a
    micro-batch; peak_flops: a second, of all devices; both None where they are unknown.
    """

    def __init__(
        self,
        loss_names: Sequence[str],
        num_micro_batches: int,
        batches_per_epoch: int,
        per_update: int,
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
        self.per_update, self.num_updates = per_update, -(-num_micro_batches // per_update)
        self.world_size = world_size
        self.lengths, self.intervals = lengths, intervals
        self.batch_flops, self.peak_flops = batch_flops, peak_flops
        self.step = 0  # updates done
        self.micro_batches = 0  # done, over all processes
        self.log_sums_K, self.log_count = torch.zeros(len(self.names), dtype=torch.float64), 0
        # Of all ranks, since the last log:
        self.num_tokens, self.num_flops, self.logged_at = 0, 0, time.perf_counter()
        # What was done when this process began to train, and when that was:
        self.first_done, self.started_at = 0, self.logged_at
        self.epoch_sums: dict[int, tuple[float, int]] = {}
        self.evaluated_step = -1  # the last update after which held-out data was evaluated
        # Held-out figures by name, those that are finite: of the first weights, of the last ones.
        self.held_out: dict[str, dict[str, float]] = {}
        self.best: dict[str, Any] | None = None  # what best.json holds
        self.curve: list[float] | None = None  # each update's loss, where a program sets a list
        self.shows_bar = shows_bar
        self.bar: tqdm | None = None
        # What the bar shows, the most important first:
        self.training_texts: list[str] = []
        self.held_out_texts: list[str] = []
        self.time_left = ""

    # ---- what falls due --------------------------------------------------------------------------

    @property
    def iterations(self) -> int:
        """Micro-batches that each process has taken."""
        return -(-self.micro_batches // self.world_size)

    @property
    def place(self) -> Place:
        """The counters after the last update, for a log."""
        epoch = max(self.micro_batches - 1, 0) // self.batches_per_epoch
        return Place(self.step, self.micro_batches, epoch, self.iterations)

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
            is_last or step == 0 or (every is not None and step % every == 0)
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
            "held_out": self.held_out,
            **({} if self.curve is None else {"curve": self.curve}),
        }

    def load(self, step: int, state: Mapping[str, Any]) -> None:
        """Load what `state` returned after update number `step`. Raises ValueError on a misfit."""
        if len(state["log_sums"]) != len(self.names):
            raise ValueError(f"{len(state['log_sums'])} log_sums of {len(self.names)} losses")
        self.step, self.micro_batches = step, state["micro_batches"]
        self.log_sums_K = torch.tensor(state["log_sums"], dtype=torch.float64)
        self.log_count = state["log_count"]
        self.epoch_sums = {epoch: (total, count) for epoch, total, count in state["epoch_sums"]}
        self.evaluated_step, self.best = state.get("evaluated_step", 0), state.get("best")
        self.held_out = dict(state.get("held_out") or {})
        self.curve = None if self.curve is None else [*state["curve"]]

    def start_clock(self) -> None:
        """Measure rates from now on: a checkpoint was read or written before."""
        self.logged_at = self.started_at = time.perf_counter()
        self.first_done = self.micro_batches

    def advance(self, planned: Sequence) -> None:
        """Count an update that was launched."""
        self.step += 1
        self.micro_batches = planned[-1].number + 1

    def record(self, planned: Sequence, losses_MK: torch.Tensor) -> None:
        """Add an update's losses to the means, and show them."""
        self.log_sums_K += losses_MK.sum(0)
        self.log_count += len(planned)
        if self.curve is not None:
            self.curve.append(losses_MK[:, 0].mean().item())
        for batch, loss in zip(planned, losses_MK[:, 0].tolist(), strict=True):
            total, count = self.epoch_sums.get(batch.epoch, (0.0, 0))
            self.epoch_sums[batch.epoch] = (total + loss, count + 1)
            lengths_B = self.lengths[batch.sequences]
            self.num_tokens += int(lengths_B.sum())
            self.num_flops += 0 if self.batch_flops is None else self.batch_flops(lengths_B)
        now, num_done = time.perf_counter(), planned[-1].number + 1
        # The mean since the start contains evaluations and checkpoints, as what is left does.
        per_batch_s = (now - self.started_at) / (num_done - self.first_done)
        self.time_left = f"{duration(per_batch_s * (self.num_micro_batches - num_done))} left"
        self.training_texts = [f"loss {losses_MK[:, 0].mean():.3f}", *speed_texts(self.rates(now))]
        self._move_bar(num_done)

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

    def take_scalars(self, learning_rate: float, grad_norm: float) -> dict[str, float]:
        """Return the scalars of a log by TensorBoard tag, and begin the means of the next one."""
        now = time.perf_counter()
        # Differs from the original: means since the last log over all ranks; 2019: one micro-batch.
        means = (self.log_sums_K / self.log_count).tolist()
        scalars = {f"losses/{name}": mean for name, mean in zip(self.names, means, strict=True)}
        scalars |= {
            "losses/cum_avg_loss_epoch": self.epoch_mean(self.place.epoch),
            "learning_rate/lr": learning_rate,
            "global/grad_norm": grad_norm,
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
        if self.micro_batches == self.first_done:  # nothing was trained: no rate contains it
            self.started_at += elapsed_s
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        self.held_out |= {"last": finite} | ({"first": finite} if self.step == 0 else {})
        measure = "kl" if "kl" in figures else "loss"
        self.held_out_texts = [
            f"eval {MEASURES[measure]} {figures[measure]:.3f}",
            f"top-1 {figures['accuracy']:.1%}",
        ]
        self._move_bar(self.micro_batches)
        # A comparison with NaN is false: such a student is never the best.
        lowest = math.inf if self.best is None else self.best["figures"][measure]
        is_best = figures[measure] < lowest
        if is_best:
            figures = dict(figures)
            self.best = {"step": self.step, "lowest": measure, "figures": figures, "data": data}
        return is_best

    def log_gain(self) -> None:
        """Say by how much the student beats its first weights on held-out text; warn where not."""
        if self.evaluated_step == self.step and "first" in self.held_out:
            compared = self.held_out["first"], self.held_out.get("last", {})
            beats, text = describe_gain(*compared, self.best)
            logger.log(logging.INFO if beats else logging.WARNING, "%s", text)

    # ---- the bar and the log ---------------------------------------------------------------------

    @contextlib.contextmanager
    def showing(self, *loggers: logging.Logger) -> Iterator[None]:
        """Show the bar, with the lines of loggers above it; in a file, lines instead.

        The bar begins here: a line that is logged before would be written over it.
        """
        options = bar_options(FILE_LINE_S)
        options |= {"bar_format": "{desc}" if "file" in options else "{desc} {bar}"}
        options |= {"total": self.num_micro_batches, "initial": self.micro_batches}
        self.bar = tqdm(desc=self.text(None), disable=not self.shows_bar, **options)
        with self.bar, logging_redirect_tqdm(list(loggers)):
            yield

    def moving_bar(self, batches: Iterator, num_planned: int) -> Iterator:
        """Yield this rank's passes; each one done moves the bar by its micro-batches on every rank.

        num_planned: micro-batches of the update, beyond which the bar does not go.
        """
        end = self.micro_batches + num_planned
        for batch in batches:
            yield batch
            self._move_bar(min(self.bar.n + len(batch.parts) * self.world_size, end))

    def _move_bar(self, num_done: int) -> None:
        """Move the bar forward to a number of micro-batches: the next update may have moved it."""
        if self.bar is not None and not self.bar.disable:
            self.bar.set_description_str(self.text(self.bar.format_dict["ncols"]), refresh=False)
            self.bar.update(max(num_done - self.bar.n, 0))

    def text(self, columns: int | None) -> str:
        """Say how far the run is; leave out from the end what more columns would take."""
        epoch = min(self.micro_batches, self.num_micro_batches - 1) // self.batches_per_epoch
        text = f"epoch {epoch}, update {self.step}/{self.num_updates}"
        training, held_out = self.training_texts, self.held_out_texts
        for part in (self.time_left, *training[:2], *held_out, *training[2:]):
            if columns is not None and len(text) + len(f", {part}") > columns:
                break
            text += f", {part}" if part else ""
        return text

    def describe_log(self, scalars: Mapping[str, float]) -> str:
        """Write a log's scalars as a line: every term of the loss, rate, norm, speed, time left."""
        loss, *terms = (
            f"{name.removeprefix('loss_')} {scalars[f'losses/{name}']:.4f}" for name in self.names
        )
        rates = {name: scalars.get(f"global/{name}") for name in ("tokens_per_s", "mfu")}
        rate, norm = scalars["learning_rate/lr"], scalars["global/grad_norm"]
        listed = f"{loss} ({', '.join(terms)}), lr {rate:.3g}, gradient norm {norm:.3g}"
        speed = ", ".join(speed_texts(rates))
        reached = f"Update {self.step} of {self.num_updates}, epoch {self.place.epoch}"
        return f"{reached}: {listed}, {speed}, {self.time_left}."


def describe_gain(
    first: Mapping[str, float], last: Mapping[str, float], best: Mapping[str, Any] | None
) -> tuple[bool, str]:
    """Compare held-out figures of the last weights with those of the first: (better, a line).

    best: what best.json holds.
    """
    name = next((name for name in MEASURES if name in first), None)
    if name is None or name not in last:
        return False, "Held out: the first or the last figures are not finite: not compared."
    parts = []
    for prefix, measure in (("", MEASURES[name]), (DRAWN, "on masks drawn by rarity")):
        if (measured := f"{prefix}{name}") in first.keys() & last.keys():
            before, after = first[measured], last[measured]
            change = f" ({after / before - 1:+.1%})" if before else ""
            parts.append(f"{measure} {before:.4f} -> {after:.4f}{change}")
    text = f"Held out, first weights -> last: {', '.join(parts)}"
    if last[name] < first[name]:
        return True, f"{text}."
    kept = "" if best is None else f"; best/ holds update {best['step']}"
    return False, (
        f"{text}: training made this student no better{kept}. docs/evaluating.md says what helps."
    )


def speed_texts(rates: Mapping[str, float | None]) -> list[str]:
    """Write tokens a second with three digits, and MFU where it is known."""
    speed = rates["tokens_per_s"]
    unit, size = next(row for row in (("M", 1e6), ("k", 1e3), ("", 0)) if speed >= row[1])
    texts = [f"{digits(speed / (size or 1))}{unit} tok/s"]
    return texts if rates.get("mfu") is None else [*texts, f"{rates['mfu']:.1%} MFU"]


def duration(seconds: float) -> str:
    """Write a duration with its two largest units."""
    seconds = round(seconds)
    for unit, size, next_unit, next_size in DURATIONS:
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // next_size:02d}{next_unit}"
    return f"{seconds}s"


DURATIONS = (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1))
MEASURES = {"kl": "KL", "loss": "loss"}  # names of what the best student has least of
