"""Rows of tensors that are needed again: in memory up to a bound, then in a file without a name.

Used for what a teacher answers to held-out text: it does not change during a run, and costs twice
what the student's own answers do.
"""

import os
import tempfile
import weakref
from collections.abc import Hashable

import torch

from utils import logger, one_line

MEMORY_BYTES = 2**28  # kept in memory by each process


class KeptRows:
    """Tensors by key, on the host, each as it was given, to the bit.

    folder: where the file lies, which vanishes with the process; None, or a folder that this
    machine lacks: the system's temporary folder. The file takes at most half of what is free there,
    so that it does not take a checkpoint's room. What cannot be kept is forgotten, with a notice.
    """

    def __init__(self, folder: str | os.PathLike | None = None, memory_bytes: int | None = None):
        self.folder = folder
        self.memory_bytes = MEMORY_BYTES if memory_bytes is None else memory_bytes
        self.in_memory: dict[Hashable, torch.Tensor] = {}
        self.in_file: dict[Hashable, tuple[int, torch.Size, torch.dtype]] = {}  # offset first
        self.num_bytes = {"memory": 0, "file": 0}
        self.file = None
        self.is_closed = False  # True once the file failed

    def keep(self, key: Hashable, rows: torch.Tensor) -> None:
        """Keep a copy of a tensor, if there is room."""
        if self.num_bytes["memory"] + rows.nbytes <= self.memory_bytes:
            self.num_bytes["memory"] += rows.nbytes
            self.in_memory[key] = rows.to("cpu", copy=True)
        elif not self.is_closed and rows.nbytes:
            try:
                self._write(key, rows.cpu().contiguous())
            except OSError as error:
                self._close(error)

    def recall(self, key: Hashable) -> torch.Tensor | None:
        """Return the tensor kept under a key; None where none is."""
        if key in self.in_memory:
            return self.in_memory[key]
        if key not in self.in_file:
            return None
        offset, shape, dtype = self.in_file[key]
        rows = torch.empty(shape, dtype=dtype)
        try:
            left = memoryview(rows.view(torch.uint8).numpy()).cast("B")
            while left:
                if not (num := os.preadv(self.file.fileno(), [left], offset)):
                    raise OSError("the file is shorter than what was written")
                left, offset = left[num:], offset + num
        except OSError as error:
            self._close(error)
            return None
        return rows

    def _write(self, key: Hashable, rows: torch.Tensor) -> None:
        """Append a tensor to the file. Raises OSError."""
        if self.file is None:
            folder = self.folder if self.folder and os.path.isdir(self.folder) else None
            self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
            weakref.finalize(self, self.file.close)
        first = offset = self.num_bytes["file"]
        disk = os.fstatvfs(self.file.fileno())
        if disk.f_bavail * disk.f_frsize < first + 2 * rows.nbytes:
            raise OSError("less than half of the disk's free room would be left")
        left = memoryview(rows.view(torch.uint8).numpy()).cast("B")
        while left:
            num = os.pwrite(self.file.fileno(), left, offset)
            left, offset = left[num:], offset + num
        self.num_bytes["file"] = offset
        self.in_file[key] = first, rows.shape, rows.dtype

    def _close(self, error: OSError) -> None:
        """Give the disk its room back; say that nothing more is kept there."""
        if self.file is not None:
            self.file.close()
        self.file, self.is_closed = None, True
        self.in_file.clear()
        text = "The teacher's answers to held-out text are computed anew each time: %s."
        logger.info(text, one_line(error))
