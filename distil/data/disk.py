"""Arrays in files, read by pread and compared with the checksums of their blocks.

Not mapped into memory: where a mapped file is cut off, or its disk fails, the system ends the
process by SIGBUS, without a word. A short read is an error with the file's name. Processes of one
machine still share one copy of the bytes, in the page cache.
"""

import base64
import hashlib
import itertools
import os
import weakref
from collections.abc import Iterator

import numpy as np

from distil.system.files import naming
from utils import InputError, RankError, one_line

BLOCK_BYTES = 2**16  # per checksum, and read at a time for single places
DIGEST_BYTES = 8  # of a block's SHA-256, its first

Stamp = tuple[int, int]  # size, time of the last change in ns


class DiskFile:
    """A file that stays open, and its size and time when it was opened."""

    def __init__(self, path: str, flag: str):
        self.path, self.flag = path, flag
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self.stamp = self._stamp_now()

    @property
    def size(self) -> int:
        """Return the size in bytes when the file was opened."""
        return self.stamp[0]

    def _stamp_now(self) -> Stamp:
        facts = os.fstat(self.descriptor)
        return facts.st_size, facts.st_mtime_ns

    def is_changed(self) -> bool:
        """Return True if the file was written to, or its time set, since it was opened."""
        return self._stamp_now() != self.stamp

    def read(self, start: int, num_bytes: int) -> bytes:
        """Read bytes. Raises RankError where the file ends before them."""
        with naming(self.path):
            data = os.pread(self.descriptor, num_bytes, start)
            while len(data) < num_bytes:  # a system call returns 2 GB at most
                more = os.pread(self.descriptor, num_bytes - len(data), start + len(data))
                if not more:
                    raise self.cut_off()
                data += more
        return data

    def read_runs(self, starts: np.ndarray, sizes: np.ndarray) -> bytes:
        """Read ranges of bytes, and join them. Raises RankError where one is not there."""
        pread, descriptor = os.pread, self.descriptor
        ranges = list(zip(starts.tolist(), sizes.tolist(), strict=True))
        with naming(self.path):
            data = b"".join([pread(descriptor, size, start) for start, size in ranges])
        if len(data) < int(sizes.sum()):
            data = b"".join([self.read(start, size) for start, size in ranges])
        return data

    def cut_off(self) -> RankError:
        """Make the error of a file that is shorter than it was."""
        return RankError(
            f"{self.flag} {self.path}: has {os.fstat(self.descriptor).st_size} bytes, it had"
            f" {self.size} when it was opened: cut off since; restore it from a copy"
        )


class DiskArray:
    """A flat array of integers in a file: slices and places of it are read as numpy arrays."""

    def __init__(self, file: DiskFile, dtype: np.dtype | str, start: int, length: int):
        """start: byte of the first value; length: number of values."""
        self.file, self.dtype, self.start = file, np.dtype(dtype), start
        self.shape = (length,)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def itemsize(self) -> int:
        """Return the bytes of a value."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Return the bytes of all values."""
        return len(self) * self.itemsize

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self[:], dtype=dtype)

    def __getitem__(self, key: slice | int | np.ndarray) -> np.ndarray:
        if isinstance(key, slice):
            first, end, _ = key.indices(len(self))
            size = max(end - first, 0) * self.itemsize
            return np.frombuffer(
                self.file.read(self.start + first * self.itemsize, size), self.dtype
            )
        if isinstance(key, (int, np.integer)):
            place = range(len(self))[key]  # raises IndexError
            return self[place : place + 1][0]
        return self._at(np.asarray(key))

    def _at(self, places: np.ndarray) -> np.ndarray:
        """Read values at single places, a block of the file at a time."""
        values, per_block = np.empty(len(places), self.dtype), BLOCK_BYTES // self.itemsize
        order = np.argsort(places, kind="stable")
        blocks = places[order] // per_block
        bounds = [*np.flatnonzero(np.diff(blocks, prepend=-1)).tolist(), len(places)]
        for first, end in itertools.pairwise(bounds):
            mine, start = order[first:end], int(blocks[first]) * per_block
            values[mine] = self[start : start + per_block][places[mine] - start]
        return values

    def runs(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Read the runs that begin at `starts`, end to end."""
        size = self.itemsize
        return np.frombuffer(
            self.file.read_runs(self.start + starts * size, lengths * size), self.dtype
        )


# --------------------------------------------------------------------------------------------------
# Checksums
# --------------------------------------------------------------------------------------------------


class BlockDigests:
    """Compute the checksums of a file's blocks while it is written."""

    def __init__(self) -> None:
        self._digests = bytearray()
        self._rest = b""

    def update(self, data: bytes) -> None:
        """Add the bytes that follow."""
        data = self._rest + data
        whole = len(data) - len(data) % BLOCK_BYTES
        for start in range(0, whole, BLOCK_BYTES):
            self._digests += _digest(memoryview(data)[start : start + BLOCK_BYTES])
        self._rest = data[whole:]

    def text(self) -> str:
        """Return all checksums as text for the card."""
        last = _digest(self._rest) if self._rest else b""
        return base64.b64encode(bytes(self._digests) + last).decode()


def _digest(block: bytes | memoryview) -> bytes:
    return hashlib.sha256(block).digest()[:DIGEST_BYTES]


def block_digests(path: str) -> str:
    """Compute the checksums of a file's blocks, as text."""
    digests = BlockDigests()
    with open(path, "rb") as file:
        while data := file.read(BLOCK_BYTES):
            digests.update(data)
    return digests.text()


class CheckedBlocks:
    """The blocks of a file, compared with their checksums when they are read first."""

    def __init__(self, file: DiskFile, digests: str):
        """digests: text from the file's card. Raises InputError if their number is wrong."""
        self.file = file
        path, flag = file.path, file.flag
        try:
            expected = np.frombuffer(
                base64.b64decode(digests, validate=True), dtype=f"V{DIGEST_BYTES}"
            )
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{flag} {path}: the checksums in its card are invalid ({one_line(error)}); make it"
                " again"
            ) from error
        num_blocks = -(-file.size // BLOCK_BYTES)
        if len(expected) != num_blocks:
            raise InputError(
                f"{flag} {path}: has {file.size} bytes, its card counts {len(expected)} blocks"
                f" of {BLOCK_BYTES}: cut off, or of another file; make it again"
            )
        self.expected = expected
        self.is_checked = np.zeros(num_blocks, bool)

    def check(self, starts: np.ndarray, ends: np.ndarray) -> None:
        """Check the blocks under byte ranges [start, end); raise RankError if one is damaged."""
        first, last = starts // BLOCK_BYTES, (ends - 1) // BLOCK_BYTES
        widest = int((last - first).max(initial=-1))
        for step in range(widest + 1):
            touched = first[first + step <= last] + step
            for block in np.unique(touched[~self.is_checked[touched]]).tolist():
                self._check_block(block)

    def check_all(self) -> Iterator[int]:
        """Check every block and yield its size in bytes, for a progress bar."""
        for block in range(len(self.expected)):
            yield self._check_block(block)

    def check_again(self) -> None:
        """Check the blocks again that were read; raise RankError if one is damaged since."""
        if os.fstat(self.file.descriptor).st_size < self.file.size:
            raise self.file.cut_off()
        for block in np.flatnonzero(self.is_checked).tolist():
            self._check_block(block)

    def forget(self) -> None:
        """Check every block again when it is read next."""
        self.is_checked[:] = False

    def _check_block(self, block: int) -> int:
        start = block * BLOCK_BYTES
        size = min(BLOCK_BYTES, self.file.size - start)
        if _digest(self.file.read(start, size)) != self.expected[block].tobytes():
            raise RankError(
                f"{self.file.flag} {self.file.path}: bytes {start} to {start + size - 1} differ"
                " from their checksum: the file is damaged; restore it from a copy, or make it"
                " again"
            )
        self.is_checked[block] = True
        return size
