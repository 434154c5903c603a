"""The TensorBoard log of a run."""

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from distil.system.files import flush_to_disk, naming
from utils import logger


class Log:
    """Event files of a run; a system error names their folder."""

    def __init__(self, path: Path):
        self.path = path
        # The writer's thread prints a traceback where the disk is full, and raises the error too.
        self.kept_hook, threading.excepthook = threading.excepthook, self._thread_failed
        with naming(path):
            self.writer = SummaryWriter(str(path))

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        is_writer = type(failure.thread).__name__ == "_AsyncWriterThread"
        if not (is_writer and issubclass(failure.exc_type, OSError)):
            self.kept_hook(failure)

    def add_texts(self, texts: Mapping[str, str]) -> None:
        """Write texts by tag, as code."""
        with naming(self.path):
            for tag, text in texts.items():
                self.writer.add_text(tag, f"    {text}", 0)

    def add_scalars(self, scalars: Mapping[str, float], x: int) -> None:
        """Write a point for each tag."""
        with naming(self.path):
            for tag, value in scalars.items():
                self.writer.add_scalar(tag, value, x)

    def flush(self) -> None:
        """Flush buffered points to the event files."""
        with naming(self.path):
            self.writer.flush()

    def flushed_sizes(self) -> dict[str, int]:
        """Flush the event files to the disk; return their sizes in bytes by name."""
        self.flush()
        files = sorted(self.path.iterdir())
        for file in files:
            flush_to_disk(file)
        return {file.name: file.stat().st_size for file in files}

    def restore_thread_hook(self) -> None:
        """Print errors of threads as before this log."""
        threading.excepthook = self.kept_hook

    def close(self) -> None:
        """Write buffered points and close the event files."""
        with naming(self.path):
            self.writer.close()


def cut_log(folder: Path, sizes: Mapping[str, int]) -> None:
    """Truncate event files to their sizes at a checkpoint: later points will be written again."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        size = sizes.get(file.name, 0)
        if file.stat().st_size < size:
            logger.warning("%s is shorter than it was: the log lacks points.", file)
        elif size:
            os.truncate(file, size)
        elif file.name.startswith("events.out.tfevents."):
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
