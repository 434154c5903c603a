"""The pickled list of 2019, one format of token files: a list of 1-D arrays of ids, one a sequence.

It is read into memory by the restricted unpickler of safe_pickle.py, and written one sequence at a
time. The card beside it holds its SHA-256.
"""

import contextlib
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from distil.data.cards import file_digest, read_verified_card, write_card_to
from distil.data.safe_pickle import read_arrays, read_pickle
from distil.system.files import atomic_paths
from utils import InputError


def find(path: str) -> str:
    """Return the pickle that `path` names, itself or by its card."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix == ".json" and os.path.isfile(stem) else path


def files(path: str) -> list[str]:
    """List the files of the token file at `path`, its card last."""
    return [path, f"{path}.json"]


def digest(path: str, card: Mapping[str, Any]) -> str:
    """Return a SHA-256 of the content, from the card if there is one."""
    return card.get("sha256") or file_digest(path)


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def read(path: str, flag: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any], None]:
    """Read a pickle: (ids_M, lengths_N, its card, no blocks). Raises InputError."""
    card = read_verified_card(path, flag)
    sequences = read_arrays(path)
    if sequences is not None:
        return *sequences, card, None
    content = read_pickle(path, flag)
    if not isinstance(content, list) or not content:
        found = "an empty list" if isinstance(content, list) else type(content).__name__
        raise InputError(
            f"{flag} {path}: expected a list of token-id arrays, got {found}; make it with"
            " binarized_data.py"
        )
    sequences = [_as_ids(sequence, number, path, flag) for number, sequence in enumerate(content)]
    del content
    lengths_N = np.fromiter(map(len, sequences), np.int64, len(sequences))
    ids_M = np.concatenate(sequences)
    if ids_M.dtype.kind not in "iu":  # uint64 and int64 together give floats
        ids_M = ids_M.astype(np.int64)
    return ids_M, lengths_N, card, None


def _as_ids(sequence: Any, number: int, path: str, flag: str) -> np.ndarray:
    try:
        array = np.asarray(sequence) if isinstance(sequence, (list, np.ndarray)) else None
    except ValueError:  # a list of lists of unequal lengths
        array = None
    if array is None or array.ndim != 1 or array.dtype.kind not in "iu" or array.size == 0:
        found = (
            type(sequence).__name__ if array is None else f"{array.dtype} of shape {array.shape}"
        )
        raise InputError(
            f"{flag} {path}: sequence {number} is {found}, expected a 1-D array of integers; make"
            " it again"
        )
    return array


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


class PickleWriter:
    """Write a pickled list of numpy arrays one sequence at a time, in constant memory.

    The opcodes are written by hand because pickle.dump wants the whole list in memory. Protocol 5;
    an array is numpy.ndarray(shape, dtype, bytes), by public names that every version of numpy has.
    """

    # numpy.ndarray is memo 0, the dtype memo 1; then an empty list.
    BEGINNING = b"\x80\x05cnumpy\nndarray\nq\x000cnumpy\ndtype\n\x8c\x03%s\x85Rq\x010]"
    # Get memo 0; an int32 as 1-tuple; get memo 1; bytes with a 64-bit length.
    SEQUENCE = struct.Struct("<2sBi1s2sBQ")
    PER_APPEND = 1000  # sequences after one mark, as pickle.dump writes them

    def __init__(self, file: BinaryIO, dtype: np.dtype):
        self.file = file
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.num_open = 0
        file.write(self.BEGINNING % self.dtype.str.encode())

    def append(self, ids_M: np.ndarray, lengths_N: np.ndarray) -> None:
        """Write sequences: their ids end to end, and their lengths."""
        data = memoryview(np.ascontiguousarray(ids_M, self.dtype)).cast("B")
        parts, place = [], 0
        for length in lengths_N.tolist():
            if self.num_open == 0:
                parts.append(b"(")
            size = length * self.dtype.itemsize
            parts += [self._head(length, size), data[place : place + size], b"\x87R"]
            place += size
            self.num_open = (self.num_open + 1) % self.PER_APPEND
            if self.num_open == 0:
                parts.append(b"e")
        self.file.write(b"".join(parts))

    def _head(self, length: int, size: int) -> bytes:
        return self.SEQUENCE.pack(b"h\x00", ord("J"), length, b"\x85", b"h\x01", 0x96, size)

    def close(self) -> None:
        """Write the end of the pickle."""
        self.file.write((b"e" if self.num_open else b"") + b".")


@contextlib.contextmanager
def writing(path: str, dtype: np.dtype) -> Iterator[tuple[PickleWriter, dict[str, Any]]]:
    """Yield (a writer, the card to fill in) of a pickle that appears at `path` on success."""
    card: dict[str, Any] = {"kind": "pickle"}
    with atomic_paths(*files(path), stale=[f"{path}.json"]) as (temporary, card_path):
        with open(temporary, "wb") as file:
            writer = PickleWriter(file, dtype)
            yield writer, card
            writer.close()
        write_card_to(card_path, {**card, "sha256": file_digest(temporary)})
