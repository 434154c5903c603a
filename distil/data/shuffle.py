"""A uniform, seeded shuffle of sequences that do not fit into memory.

Sequences are spooled to the disk as they come. A spool too large for memory is scattered: each
sequence goes to one of several smaller spools, drawn uniformly and independently; those are
shuffled one after the other, and their concatenation is a uniform permutation of all (Rao 1961;
Sandelius 1962). All reads and writes are sequential.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from utils import concatenate_runs, keyed_numpy_generator

CHUNK_IDS = 2**20  # moved at a time
CHUNK_SEQUENCES = 2**16
SPOOL_IDS = 2**23  # shuffled in memory: 16 or 32 MiB
MAX_FAN_OUT = 64
BUFFER_BYTES = 2**16
LENGTH_BYTES = 4


class Spool:
    """Sequences on the disk in the order of writing: a file of ids and one of lengths (int32)."""

    def __init__(self, path: Path, dtype: np.dtype, kept: tuple[int, int] = (0, 0)):
        """kept: sequences and ids of an earlier spool to continue, cut to them."""
        self.path, self.dtype = path, np.dtype(dtype)
        self.num_sequences, self.num_ids = kept
        self.ids_file, self.lengths_file = (
            open(path.with_name(f"{path.name}.{kind}"), "ab", BUFFER_BYTES)  # noqa: SIM115
            for kind in ("ids", "lengths")
        )
        self.ids_file.truncate(self.num_ids * self.dtype.itemsize)
        self.lengths_file.truncate(self.num_sequences * LENGTH_BYTES)

    @staticmethod
    def holds(path: Path, dtype: np.dtype, kept: tuple[int, int]) -> bool:
        """True if the files of an earlier spool hold that many sequences and ids or more."""
        sizes = kept[0] * LENGTH_BYTES, kept[1] * np.dtype(dtype).itemsize
        files = (path.with_name(f"{path.name}.{kind}") for kind in ("lengths", "ids"))
        return all(
            file.is_file() and file.stat().st_size >= size
            for file, size in zip(files, sizes, strict=True)
        )

    def append(self, ids_M: np.ndarray, lengths_N: np.ndarray) -> None:
        """Write sequences: their ids end to end, and their lengths."""
        self.ids_file.write(np.ascontiguousarray(ids_M, self.dtype).data)
        self.lengths_file.write(lengths_N.astype(np.int32).data)
        self.num_ids += len(ids_M)
        self.num_sequences += len(lengths_N)

    def flush(self) -> None:
        """Write to the disk what was appended."""
        for file in (self.ids_file, self.lengths_file):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close both files after the last append."""
        self.ids_file.close()
        self.lengths_file.close()

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (ids_M, lengths_N) of consecutive sequences, in the ranges of `cuts`."""
        with (
            open(self.ids_file.name, "rb") as ids_file,
            open(self.lengths_file.name, "rb") as lengths_file,
        ):
            while len(lengths_N := np.fromfile(lengths_file, np.int32, CHUNK_SEQUENCES)):
                for first, last in cuts(lengths_N):
                    part = lengths_N[first:last]
                    yield np.fromfile(ids_file, self.dtype, int(part.sum(dtype=np.int64))), part

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Read everything: (ids_M, lengths_N)."""
        ids_M = np.fromfile(self.ids_file.name, self.dtype)
        return ids_M, np.fromfile(self.lengths_file.name, np.int32)

    def remove(self) -> None:
        """Delete the files."""
        os.unlink(self.ids_file.name)
        os.unlink(self.lengths_file.name)


def cuts(lengths_N: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield ranges [first, last) of sequences with at most CHUNK_IDS ids, or one longer one."""
    ends = np.cumsum(lengths_N, dtype=np.int64)
    first = 0
    while first < len(lengths_N):
        limit = (ends[first - 1] if first else 0) + CHUNK_IDS
        last = max(int(np.searchsorted(ends, limit, side="right")), first + 1)
        yield first, last
        first = last


def shuffled(
    spool: Spool, *key: int | str, keeps: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield a spool's sequences in an order that depends on `key` and them only.

    keeps: leave the spool on the disk; otherwise it is removed.
    """
    if spool.num_ids <= SPOOL_IDS or spool.num_sequences == 1:
        ids_M, lengths_N = spool.read()
        if not keeps:
            spool.remove()
        order = keyed_numpy_generator(*key, "within").permutation(len(lengths_N))
        yield from _in_pieces(ids_M, lengths_N, order)
        return
    for number, part in enumerate(_scatter(spool, *key, keeps=keeps)):
        yield from shuffled(part, *key, number)


def _in_pieces(
    ids_M: np.ndarray, lengths_N: np.ndarray, order: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the sequences in `order`, CHUNK_IDS ids at a time: the index takes 8 bytes per id."""
    starts_N = np.cumsum(lengths_N, dtype=np.int64) - lengths_N
    for first, last in cuts(lengths_N[order]):
        yield concatenate_runs(ids_M, starts_N, lengths_N, order[first:last])


def _scatter(spool: Spool, *key: int | str, keeps: bool) -> list[Spool]:
    num_parts = min(-(-spool.num_ids // SPOOL_IDS) + 1, MAX_FAN_OUT)
    parts = [
        Spool(spool.path.with_name(f"{spool.path.name}-{number}"), spool.dtype)
        for number in range(num_parts)
    ]
    generator = keyed_numpy_generator(*key, "scatter")
    for ids_M, lengths_N in spool.chunks():
        part_of_sequence = generator.integers(num_parts, size=len(lengths_N))
        starts_N = np.cumsum(lengths_N, dtype=np.int64) - lengths_N
        ids_M, lengths = concatenate_runs(
            ids_M, starts_N, lengths_N, np.argsort(part_of_sequence, kind="stable")
        )
        counts = np.bincount(part_of_sequence, minlength=num_parts)
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        first = 0
        for part, count in zip(parts, counts.tolist(), strict=True):
            part.append(ids_M[ends[first] : ends[first + count]], lengths[first : first + count])
            first += count
    for part in parts:
        part.close()
    if not keeps:
        spool.remove()
    return parts
