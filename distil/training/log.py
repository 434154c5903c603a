"""The log of a run: metrics.jsonl, TensorBoard's event files, and trackers.

log/train holds the figures of a run, log/parameters the means and deviations of every parameter and
gradient, metrics.jsonl the figures again, for programs. A resumed run truncates all three to their
sizes at its checkpoint.
"""

import contextlib
import dataclasses
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from distil.system.files import flush_to_disk, naming
from distil.training.trackers import Tracker
from utils import logger

METRICS = "metrics.jsonl"
EVENTS = {"train": "log/train", "parameters": "log/parameters"}
# Scalars that metrics.jsonl leaves out: others' sums, and facts of the machine.
LEFT_OUT = {"losses/cum_avg_loss_epoch", "global/memory_usage", "global/speed"}


@dataclasses.dataclass(frozen=True)
class Place:
    """The counters of a run at a log. micro_batches: of all processes; x: of each, TensorBoard's.

    epoch: that of the last micro-batch, from 0.
    """

    update: int
    micro_batches: int
    epoch: int
    x: int


class Log:
    """Where a run's figures go; a system error names the file or folder.

    path: the run folder. shows_events: write TensorBoard's files. trackers: get what metrics.jsonl
    gets.
    """

    def __init__(self, path: Path, shows_events: bool = True, trackers: Sequence[Tracker] = ()):
        self.path, self.trackers = path, trackers
        # The writer's thread prints a traceback where the disk is full, and raises the error too.
        self.kept_hook, threading.excepthook = threading.excepthook, self._thread_failed
        self.writers: dict[str, SummaryWriter] = {}
        with naming(path / METRICS):
            self.metrics = (path / METRICS).open("a", encoding="utf-8")
        for name, folder in EVENTS.items() if shows_events else ():
            with naming(path / folder):
                self.writers[name] = SummaryWriter(str(path / folder))

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        is_writer = type(failure.thread).__name__ == "_AsyncWriterThread"
        if not (is_writer and issubclass(failure.exc_type, OSError)):
            self.kept_hook(failure)

    def add_texts(self, texts: Mapping[str, str]) -> None:
        """Write texts by tag, as code."""
        if writer := self.writers.get("train"):
            with naming(self.path / EVENTS["train"]):
                for tag, text in texts.items():
                    writer.add_text(tag, f"    {text}", 0)

    def add_scalars(self, scalars: Mapping[str, float], x: int, run: str = "train") -> None:
        """Write a point for each tag to the event files of `run`, one of EVENTS."""
        if writer := self.writers.get(run):
            with naming(self.path / EVENTS[run]):
                for tag, value in scalars.items():
                    if math.isfinite(value):  # a float16 gradient overflows now and then
                        writer.add_scalar(tag, value, x)

    def add_figures(self, scalars: Mapping[str, float], place: Place) -> None:
        """Write figures by TensorBoard's tag everywhere: a line of metrics.jsonl, points, trackers.

        A figure that is not finite is null.
        """
        self.add_scalars(scalars, place.x)
        figures = {metric_name(tag): value for tag, value in scalars.items() if tag not in LEFT_OUT}
        counters = {name: getattr(place, name) for name in ("update", "micro_batches", "epoch")}
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        line = json.dumps({**counters, **dict.fromkeys(figures), **finite}, allow_nan=False)
        with naming(self.path / METRICS):
            self.metrics.write(f"{line}\n")
            self.metrics.flush()  # for those who follow the file
        for tracker in self.trackers:
            tracker.log({**finite, "epoch": place.epoch}, place.update)

    def flush(self) -> None:
        """Flush buffered points to the files."""
        for run, writer in self.writers.items():
            with naming(self.path / EVENTS[run]):
                writer.flush()

    def flushed_sizes(self) -> dict[str, int]:
        """Flush the files to the disk; return their sizes in bytes by path in the run folder."""
        self.flush()
        files = growing_files(self.path)
        for file in files:
            flush_to_disk(file)
        return {file.relative_to(self.path).as_posix(): file.stat().st_size for file in files}

    def release(self) -> None:
        """End the trackers; print errors of threads as before this log."""
        for tracker in self.trackers:
            tracker.finish()
        with contextlib.suppress(OSError):  # each line was flushed: nothing is lost
            self.metrics.close()
        threading.excepthook = self.kept_hook

    def close(self) -> None:
        """Write buffered points and close the files."""
        with naming(self.path / METRICS):
            self.metrics.close()
        for run, writer in self.writers.items():
            with naming(self.path / EVENTS[run]):
                writer.close()


def metric_name(tag: str) -> str:
    """Return the key in metrics.jsonl of a TensorBoard tag: losses/loss_ce -> loss_ce."""
    group, _, name = tag.partition("/")
    return tag if group == "eval" else name


def growing_files(run_path: Path) -> list[Path]:
    """List the files of a run that grow while it trains: metrics.jsonl and the event files."""
    folders = (run_path / folder for folder in EVENTS.values())
    found = [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())]
    return [*([run_path / METRICS] if (run_path / METRICS).is_file() else []), *found]


def cut_log(run_path: Path, sizes: Mapping[str, int]) -> None:
    """Truncate the log's files to their sizes at a checkpoint: later points come again.

    sizes: see `Log.flushed_sizes`; older checkpoints name files of log/train without their folder.
    """
    for file in growing_files(run_path):
        name = file.relative_to(run_path).as_posix()
        size = sizes.get(name, sizes.get(file.name, 0))
        if file.stat().st_size < size:
            logger.warning("%s is shorter than it was: the log lacks points.", file)
        elif size:
            os.truncate(file, size)
        elif file.name.startswith(("events.out.tfevents.", METRICS)):
            file.unlink()  # written by this run after the checkpoint


def parameter_statistics(model: torch.nn.Module) -> dict[str, float]:
    """Mean and standard deviation of each parameter, by TensorBoard tag."""
    scalars = {}
    for name, parameter in model.named_parameters():
        scalars[f"parameter_mean/{name}"], scalars[f"parameter_std/{name}"] = mean_and_std(
            parameter.detach()
        )
    return scalars


def gradient_statistics(model: torch.nn.Module) -> dict[str, float]:
    """Mean and standard deviation of each parameter's gradient, by TensorBoard tag."""
    scalars = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scalars[f"grad_mean/{name}"], scalars[f"grad_std/{name}"] = mean_and_std(parameter.grad)
    return scalars


def mean_and_std(tensor: torch.Tensor) -> tuple[float, float]:
    """Return the mean, and the standard deviation, which is 0 of a single entry."""
    return tensor.mean().item(), tensor.std(correction=int(tensor.numel() > 1)).item()
