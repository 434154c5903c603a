"""The log of a run: metrics.jsonl, TensorBoard's event files, and trackers.

log/train holds the figures of a run, log/parameters the means and deviations of every parameter and
gradient, metrics.jsonl the figures again, for programs. A resumed run cuts all three to their sizes
at its checkpoint. The names of its event files end with the run's id: others are left alone.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from distil.system.files import atomic_path, flush_to_disk, is_folder, is_regular, naming
from distil.training.layout import EVENTS, METRICS
from distil.training.trackers import Tracker
from utils import logger

BLOCK_BYTES = 2**20
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

    path: the run folder. run_id: of the names of event files. shows_events: write TensorBoard's
    files. trackers: get what metrics.jsonl gets. earlier: names of the files that the run wrote
    before it was resumed.
    """

    def __init__(
        self,
        path: Path,
        run_id: str,
        shows_events: bool = True,
        trackers: Sequence[Tracker] = (),
        earlier: Collection[str] = (),
    ):
        self.path, self.trackers = path, trackers
        self.run_id, self.earlier = run_id, earlier
        # The writer's thread prints a traceback where the disk is full, and raises the error too.
        self.kept_hook, threading.excepthook = threading.excepthook, self._thread_failed
        self.writers: dict[str, SummaryWriter] = {}
        with naming(path / METRICS):
            self.metrics = (path / METRICS).open("a", encoding="utf-8")
        for name, folder in EVENTS.items() if shows_events else ():
            with naming(path / folder):
                suffix = suffix_of(run_id)
                self.writers[name] = SummaryWriter(str(path / folder), filename_suffix=suffix)

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
        files = own_files(self.path, self.run_id, self.earlier)
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


def suffix_of(run_id: str) -> str:
    """Return the end of the names of a run's event files."""
    return f".distil-{run_id}"


def run_id_of(names: Collection[str]) -> str | None:
    """Return the run's id in the names of its event files; None where they have none."""
    found = (re.search(rf"{suffix_of('([0-9a-f]+)')}$", name) for name in names)
    return next((match[1] for match in found if match), None)


def own_files(run_path: Path, run_id: str, earlier: Collection[str]) -> list[Path]:
    """List the regular files of a run that grow while it trains: metrics.jsonl and event files.

    earlier: names of event files from before they had the run's id.
    """
    folders = [run_path / folder for folder in EVENTS.values()]
    found = [
        file
        for folder in folders
        if is_folder(folder)
        for file in sorted(folder.iterdir())
        if file.name.endswith(suffix_of(run_id)) or size_of(file, run_path, earlier) is not None
    ]
    return [path for path in (run_path / METRICS, *found) if is_regular(path)]


def size_of(file: Path, run_path: Path, sizes: Collection[str]) -> str | None:
    """Return the name under which `sizes` has a file; None where it lacks it.

    Older checkpoints name files of log/train without their folder.
    """
    names = file.relative_to(run_path).as_posix(), file.name
    return next((name for name in names if name in sizes), None)


def cut_log(run_path: Path, sizes: Mapping[str, int], run_id: str) -> None:
    """Cut the log's files to their sizes at a checkpoint: later points come again.

    sizes: see `Log.flushed_sizes`.
    """
    for file in own_files(run_path, run_id, sizes):
        name, facts = size_of(file, run_path, sizes), os.lstat(file)
        if name is None and file.name != METRICS:
            file.unlink()  # written by this run after the checkpoint
            continue
        size = 0 if name is None else sizes[name]
        if facts.st_size < size:
            logger.warning("%s is shorter than it was: the log lacks points.", file)
        elif facts.st_size > size or facts.st_nlink > 1:
            _cut(file, size)


def _cut(file: Path, size: int) -> None:
    """Put a file's first bytes in its place; its other names, a backup's, keep the whole."""
    with atomic_path(file) as temporary, open(file, "rb") as whole, open(temporary, "wb") as part:
        while size and (block := whole.read(min(size, BLOCK_BYTES))):
            part.write(block)
            size -= len(block)


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
