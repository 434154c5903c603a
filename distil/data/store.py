"""The store, one format of token files, in the layout of Megatron-LM's indexed dataset.

`.bin` holds all ids end to end; `.idx` a header, the sequences' lengths (int32), their byte offsets
(int64) and the document index (int64). Opening a store reads its index only; ids are read as they
are needed (disk.py), and all processes of a machine share one copy of them in the page cache. The
card, `.json`, holds a checksum of each block of either file; a block of ids is verified when it is
first read.
"""

import contextlib
import hashlib
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from distil.data.cards import read_card, write_card_to
from distil.data.disk import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    BlockDigests,
    CheckedBlocks,
    DiskArray,
    DiskFile,
    block_digests,
)
from distil.system.files import atomic_paths
from utils import InputError, logger

MAGIC, STORE_VERSION = b"MMIDIDX\x00\x00", 1
# Magic, version, dtype code, number of sequences, entries of the document index.
HEADER = struct.Struct("<9sQBQQ")
# Megatron-LM's codes.
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
CHUNK_SEQUENCES = 2**20  # of an index, read or written at a time


def find(path: str) -> str | None:
    """Return the prefix of the store that `path` names; None if it names none."""
    stem, suffix = os.path.splitext(path)
    if suffix in (".bin", ".idx") and os.path.isfile(path):
        return stem
    for prefix in (path, *[stem] * (suffix in (".bin", ".idx", ".json"))):
        if not os.path.isfile(prefix) and any(
            os.path.isfile(prefix + part) for part in (".idx", ".bin")
        ):
            return prefix
    return None


def files(prefix: str) -> list[str]:
    """List the files of the store with this prefix, its card last."""
    return [f"{prefix}{suffix}" for suffix in (".bin", ".idx", ".json")]


def digest(prefix: str, card: Mapping[str, Any]) -> str:
    """Return a SHA-256 of the content, from the card's checksums if there is a card."""
    checksums = card.get("checksums") or {
        name: block_digests(f"{prefix}.{name}") for name in ("bin", "idx")
    }
    return hashlib.sha256(f"{checksums['bin']} {checksums['idx']}".encode()).hexdigest()


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def read(
    prefix: str, flag: str
) -> tuple[DiskArray, DiskArray, dict[str, Any], CheckedBlocks | None]:
    """Open a store: (ids_M, lengths_N, its card, blocks to check if it has a card).

    Raises InputError naming the file that is cut off, damaged or foreign.
    """
    data, index = (DiskFile(path, flag) for path in files(prefix)[:2])
    card_path = files(prefix)[2]
    card = read_card(card_path, flag)
    if card:
        for _ in CheckedBlocks(index, _checksums(card, "idx", card_path, flag)).check_all():
            pass
    else:
        logger.info("%s %s: has no card (%s), so it is not verified.", flag, data.path, card_path)
    dtype, lengths_N = _read_index(index, data, is_checked=bool(card))
    blocks = CheckedBlocks(data, _checksums(card, "bin", card_path, flag)) if card else None
    return DiskArray(data, dtype, 0, data.size // dtype.itemsize), lengths_N, card, blocks


def _checksums(card: Mapping[str, Any], name: str, card_path: str, flag: str) -> str:
    try:
        return card["checksums"][name]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{flag} {card_path}: is not the card of a store, it has no checksums; make the store"
            " again"
        ) from error


def _read_index(index: DiskFile, data: DiskFile, is_checked: bool) -> tuple[np.dtype, DiskArray]:
    """Check a store's index against the size of its data: (dtype of ids, lengths_N).

    is_checked: its checksums are right, so the offsets that StoreWriter wrote are, too.
    """
    code, num_sequences, num_documents = _read_header(index)
    expected = HEADER.size + 12 * num_sequences + 8 * num_documents
    # Megatron-LM's modes add a byte a sequence.
    if num_sequences == 0 or index.size not in (expected, expected + num_sequences):
        raise InputError(
            f"{index.flag} {index.path}: has {index.size} bytes, {num_sequences} sequences take"
            f" {expected}: cut off or damaged; make it again"
        )
    dtype, after = np.dtype(DTYPES[code]), HEADER.size + 4 * num_sequences
    lengths_N = DiskArray(index, "<i4", HEADER.size, num_sequences)
    offsets_N = DiskArray(index, "<i8", after, num_sequences)
    end = int(offsets_N[-1]) + int(lengths_N[-1]) * dtype.itemsize
    if not is_checked:
        end = _check_offsets(lengths_N, offsets_N, dtype.itemsize, f"{index.flag} {index.path}")
    if end != data.size:
        raise InputError(
            f"{data.flag} {data.path}: has {data.size} bytes, its index expects {end}: cut off or"
            " foreign; make it again"
        )
    return dtype, lengths_N


def _read_header(index: DiskFile) -> tuple[int, int, int]:
    """Read and check an index's header: (dtype code, sequences, entries of the document index)."""
    where = f"{index.flag} {index.path}"
    head = index.read(0, min(HEADER.size, index.size))
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise InputError(
            f"{where}: is not the index of a store (it does not begin with {MAGIC!r}); make it"
            " again"
        )
    _, version, code, num_sequences, num_documents = HEADER.unpack(head)
    if version != STORE_VERSION:
        raise InputError(
            f"{where}: is of version {version}, expected {STORE_VERSION}; make it again"
        )
    if code not in DTYPES:
        raise InputError(
            f"{where}: its dtype code {code} is not of integers; expected one of {sorted(DTYPES)}"
        )
    return code, num_sequences, num_documents


def _check_offsets(lengths_N: DiskArray, offsets_N: DiskArray, itemsize: int, where: str) -> int:
    """Check that each sequence begins where the previous one ends; return the last end in bytes."""
    end = 0
    for start in range(0, len(lengths_N), CHUNK_SEQUENCES):
        lengths = lengths_N[start : start + CHUNK_SEQUENCES].astype(np.int64)
        offsets = offsets_N[start : start + CHUNK_SEQUENCES]
        ends = end + np.cumsum(lengths) * itemsize
        wrong = (lengths <= 0) | (offsets != ends - lengths * itemsize)
        if wrong.any():
            number = start + int(np.flatnonzero(wrong)[0])
            raise InputError(
                f"{where}: sequence {number} has length {lengths_N[number]} at byte"
                f" {offsets_N[number]}, which does not follow from those before it; make the store"
                " again"
            )
        end = int(ends[-1])
    return end


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


class StoreWriter:
    """Write `.bin` and `.idx` with their checksums, a chunk at a time, in constant memory."""

    def __init__(self, data: BinaryIO, index: BinaryIO, lengths: BinaryIO, dtype: np.dtype):
        """lengths: a readable scratch file for the lengths, which go into the index at the end."""
        self.data, self.index, self.lengths = data, index, lengths
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.digests = {"bin": BlockDigests(), "idx": BlockDigests()}
        self.num_sequences = 0

    def append(self, ids_M: np.ndarray, lengths_N: np.ndarray) -> None:
        """Write sequences: their ids end to end, and their lengths."""
        data = np.ascontiguousarray(ids_M, self.dtype).tobytes()
        self.data.write(data)
        self.digests["bin"].update(data)
        self.lengths.write(lengths_N.astype("<i4").tobytes())
        self.num_sequences += len(lengths_N)

    def close(self) -> None:
        """Write the index: header, lengths, byte offsets, and one document per sequence."""
        code = CODES[self.dtype.newbyteorder("=")]
        num_documents = self.num_sequences + 1
        self._to_index(HEADER.pack(MAGIC, STORE_VERSION, code, self.num_sequences, num_documents))
        for lengths in self._written_lengths():
            self._to_index(lengths.tobytes())
        end = 0
        for lengths in self._written_lengths():
            sizes = lengths.astype(np.int64) * self.dtype.itemsize
            ends = end + np.cumsum(sizes)
            self._to_index((ends - sizes).astype("<i8").tobytes())
            end = int(ends[-1])
        for start in range(0, num_documents, CHUNK_SEQUENCES):
            stop = min(start + CHUNK_SEQUENCES, num_documents)
            self._to_index(np.arange(start, stop, dtype="<i8").tobytes())

    def _written_lengths(self) -> Iterator[np.ndarray]:
        self.lengths.seek(0)
        while data := self.lengths.read(4 * CHUNK_SEQUENCES):
            yield np.frombuffer(data, "<i4")

    def _to_index(self, data: bytes) -> None:
        self.index.write(data)
        self.digests["idx"].update(data)

    def checksums(self) -> dict[str, Any]:
        """Return the checksums of both files for the card."""
        return {
            "algorithm": (
                f"first {DIGEST_BYTES} bytes of the SHA-256 of each block of {BLOCK_BYTES} bytes,"
                " base64"
            ),
            **{name: digests.text() for name, digests in self.digests.items()},
        }


@contextlib.contextmanager
def writing(prefix: str, dtype: np.dtype) -> Iterator[tuple[StoreWriter, dict[str, Any]]]:
    """Yield (a writer, the card to fill in) of a store that appears at `prefix` on success."""
    card: dict[str, Any] = {"kind": "store"}
    paths = files(prefix)
    folder = os.path.dirname(os.path.abspath(prefix))
    # The old index is removed first: without it, a half-replaced store is not taken for one.
    with atomic_paths(*paths, stale=paths[1:]) as (data_path, index_path, card_path):
        with (
            open(data_path, "wb") as data,
            open(index_path, "wb") as index,
            tempfile.TemporaryFile(dir=folder) as lengths,
        ):
            writer = StoreWriter(data, index, lengths, dtype)
            yield writer, card
            writer.close()
        write_card_to(card_path, {**card, "checksums": writer.checksums()})
