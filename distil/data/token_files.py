"""Token files: sequences of token ids on the disk, in either of two formats, told apart by what is
in them.

- The pickled list of 2019: one 1-D array of ids a sequence. It is read into memory, without
  executing anything in it.
- The store, in the layout of Megatron-LM's indexed dataset: `.bin` holds all ids end to end, `.idx`
  a header, the sequences' lengths (int32), their byte offsets (int64) and the document index
  (int64). It is memory-mapped: opening it costs nothing, and all processes of a machine share one
  copy in the page cache.

Beside either stands a JSON file, the *card*: tokenizer and its vocabulary's fingerprint, what was
counted, and checksums. Files without a card are read, too, with a notice.
"""

import array
import base64
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import mmap
import os
import pickle
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from distil.system.files import atomic_path, atomic_paths, json_digest, require_file, require_output
from utils import InputError, RankError, logger, one_line

CARD_FORMAT, CARD_VERSION = "distil-tokens", 1
MAGIC, STORE_VERSION = b"MMIDIDX\x00\x00", 1
HEADER = struct.Struct(
    "<9sQBQQ"
)  # magic, version, dtype code, number of sequences, entries of the document index
DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}  # Megatron-LM's codes
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
BLOCK_BYTES = 2**16  # one checksum each
DIGEST_BYTES = 8  # the beginning of a block's SHA-256
CHUNK = 2**20  # sequences or ids that are looked at in one go
MIN_LENGTH = 11  # sequences of this many ids, boundary tokens included, or fewer are not trained on
MAX_UNKNOWN_SHARE = 0.5  # nor are those with this share of unknown tokens or more
# With fewer unknown ids than this in a sequence, no piece of it that is long enough has too many.
MANY_UNKNOWN = math.ceil((MIN_LENGTH + 1) * MAX_UNKNOWN_SHARE)
MAX_LISTED = 2**16
MAX_VOCAB_SIZE = 2**27


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """Sequences of ids. ids_M: all of them end to end; lengths_N: of each sequence; card: {} where
    there is none.
    """

    path: str
    ids_M: np.ndarray
    lengths_N: np.ndarray
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    blocks: "CheckedBlocks | None" = None

    def check(self, starts: np.ndarray, ends: np.ndarray) -> None:
        """Compare the blocks that hold ids[start:end] with their checksums, each once. Raises
        InputError.
        """
        if self.blocks is not None:
            size = self.ids_M.itemsize
            self.blocks.check(starts * size, ends * size)

    def digest(self) -> str:
        """Return a SHA-256 of the content, the same with a card (from the checksums in it) and
        without.
        """
        if os.path.isfile(self.path):
            return self.card.get("sha256") or file_digest(self.path)
        checksums = self.card.get("checksums") or {
            name: _block_digests(f"{self.path}.{name}") for name in ("bin", "idx")
        }
        return hashlib.sha256(f"{checksums['bin']} {checksums['idx']}".encode()).hexdigest()


# --------------------------------------------------------------------------------------------------
# Cards and checksums
# --------------------------------------------------------------------------------------------------


def write_card(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write a card: format and version in front, a checksum of its own behind."""
    with atomic_path(path) as temporary:
        _write_card_to(temporary, content)


def _write_card_to(path: Path, content: Mapping[str, Any]) -> None:
    card = {"format": CARD_FORMAT, "version": CARD_VERSION, **content}
    path.write_text(
        json.dumps({**card, "card_sha256": json_digest(card)}, indent=2) + "\n", encoding="utf-8"
    )


def check_vocab_size(vocab_size: int) -> None:
    """Raise InputError where --vocab_size is no vocabulary's: no vocabulary comes near the largest,
    a slip of the hand.
    """
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise InputError(f"--vocab_size {vocab_size}: expected 1 to {MAX_VOCAB_SIZE}")


def is_card(path: str | os.PathLike) -> bool:
    """True for a file that begins as cards do, damaged or not."""
    with open(path, "rb") as file:
        return f'"format": "{CARD_FORMAT}"'.encode() in file.read(100)


def require_card_output(path: str, flag: str, inputs: Sequence[str] = ()) -> None:
    """Raise InputError where a card can't be written to `path`, or would overwrite what is no
    card.
    """
    require_output(path, flag, inputs)
    if os.path.isfile(path) and not is_card(path):
        raise InputError(
            f"{flag}: would overwrite {path}, which this program did not make; choose another name"
        )


def require_counts_output(path: str, flag: str, inputs: Sequence[str] = ()) -> None:
    """Raise InputError where counts and their card can't be written, or would stand where a store's
    card does.
    """
    require_output(path, flag, inputs)
    if store_prefix(path) is not None:
        raise InputError(
            f"{flag} {path}: is the prefix of a store, whose card is {path}.json; choose another"
            " name"
        )
    require_card_output(f"{path}.json", flag, inputs)


def read_card(path: str | os.PathLike, what: str) -> dict[str, Any]:
    """Read a card; {} where there is none. Raises InputError where it is damaged, foreign or newer
    than this program.
    """
    if not os.path.isfile(path):
        return {}
    try:
        card = json.loads(Path(path).read_bytes())
        is_ours = card["format"] == CARD_FORMAT
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{what} {path}: is no card of a token file ({one_line(error)}); make the token file"
            " again"
        ) from error
    if not is_ours:
        raise InputError(
            f"{what} {path}: has format {card['format']!r}, expected {CARD_FORMAT!r}; make the"
            " token file again"
        )
    if card.get("version") != CARD_VERSION:
        raise InputError(
            f"{what} {path}: is of version {card.get('version')}, this program reads version"
            f" {CARD_VERSION}; update the program"
        )
    if card.pop("card_sha256", None) != json_digest(card):
        raise InputError(
            f"{what} {path}: its checksum is wrong: damaged, or edited; make the token file again"
        )
    return card


def check_vocabulary(
    card: Mapping[str, Any], vocabulary: str | None, source: str, model: str
) -> None:
    """Raise InputError where a file's card says that it was made with another vocabulary than the
    model's.

    vocabulary: the fingerprint of the model's; None: not known. source, model: name the file and
    the model.
    """
    _check_parts(card, source)
    of_file = card.get("tokenizer") or {}
    fingerprint = of_file.get("vocabulary_sha256")
    if None not in (vocabulary, fingerprint) and fingerprint != vocabulary:
        raise InputError(
            f"{source}: was made with the tokenizer {of_file.get('name')}"
            f" ({of_file.get('vocab_size')} entries, fingerprint {fingerprint[:12]}), the"
            f" vocabulary of {model} is another (fingerprint {vocabulary[:12]}); binarize and count"
            " with that model's tokenizer"
        )


# What parts of a card are, where it has them: parents first.
CARD_PARTS = {
    "tokenizer": dict,
    "tokenizer vocabulary_sha256": str,
    "tokenizer special_ids": dict,
    "counts": dict,
    "counts largest_id": int,
    "counts boundary_ids_inside": int,
    "many_unknown": list,
}


def _check_parts(card: Mapping[str, Any], source: str) -> None:
    for names, kind in CARD_PARTS.items():
        part: Any = card
        for name in names.split():
            part = None if part is None else part.get(name)
        items = part if isinstance(part, list) else []
        if not isinstance(part, kind | None) or not all(
            type(item) is int and 0 <= item < 2**63 for item in items
        ):
            raise InputError(
                f"{source}: its card's {names} is {part!r:.40}, expected {kind.__name__}; make the"
                " file again"
            )


def file_digest(path: str | os.PathLike) -> str:
    """Return a file's SHA-256 as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(block: bytes | memoryview) -> bytes:
    return hashlib.sha256(block).digest()[:DIGEST_BYTES]


class BlockDigests:
    """Collect the checksums of a file that is being written, a block at a time."""

    def __init__(self) -> None:
        self._digests = bytearray()
        self._rest = b""

    def update(self, data: bytes) -> None:
        """Take what is written next."""
        data = self._rest + data
        whole = len(data) - len(data) % BLOCK_BYTES
        for start in range(0, whole, BLOCK_BYTES):
            self._digests += _digest(memoryview(data)[start : start + BLOCK_BYTES])
        self._rest = data[whole:]

    def text(self) -> str:
        """Return all checksums as text, for the card."""
        last = _digest(self._rest) if self._rest else b""
        return base64.b64encode(bytes(self._digests) + last).decode()


def _block_digests(path: str) -> str:
    digests = BlockDigests()
    with open(path, "rb") as file:
        while data := file.read(BLOCK_BYTES):
            digests.update(data)
    return digests.text()


class CheckedBlocks:
    """A memory-mapped file whose blocks are compared with their checksums when they are first
    touched.
    """

    def __init__(self, path: str, digests: str, what: str):
        """digests: text from the card. Raises InputError where it does not fit the file's size."""
        self.path, self.what = path, what
        self.data = memoryview(np.memmap(path, dtype=np.uint8, mode="r"))
        try:
            expected = np.frombuffer(
                base64.b64decode(digests, validate=True), dtype=f"V{DIGEST_BYTES}"
            )
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{what} {path}: the checksums in its card are none ({one_line(error)}); make it"
                " again"
            ) from error
        num_blocks = -(-len(self.data) // BLOCK_BYTES)
        if len(expected) != num_blocks:
            raise InputError(
                f"{what} {path}: has {len(self.data)} bytes, its card counts {len(expected)} blocks"
                f" of {BLOCK_BYTES}: cut off, or of another file; make it again"
            )
        self.expected = expected
        self.is_checked = np.zeros(num_blocks, bool)

    def check(self, starts: np.ndarray, ends: np.ndarray) -> None:
        """Check the blocks under the byte ranges [start, end). Raises InputError naming file, block
        and place.
        """
        first, last = starts // BLOCK_BYTES, (ends - 1) // BLOCK_BYTES
        widest = int((last - first).max(initial=-1))
        for step in range(widest + 1):
            touched = first[first + step <= last] + step
            for block in np.unique(touched[~self.is_checked[touched]]).tolist():
                self._check_block(block)

    def check_all(self) -> Iterator[int]:
        """Check every block; yield the bytes of each, for a progress bar."""
        for block in range(len(self.expected)):
            self._check_block(block)
            yield min(BLOCK_BYTES, len(self.data) - block * BLOCK_BYTES)

    def _check_block(self, block: int) -> None:
        start = block * BLOCK_BYTES
        if _digest(self.data[start : start + BLOCK_BYTES]) != self.expected[block].tobytes():
            end = min(start + BLOCK_BYTES, len(self.data))
            raise RankError(
                f"{self.what} {self.path}: bytes {start} to {end - 1} differ from their checksum:"
                " the file is damaged; restore it from a copy, or make it again"
            )
        self.is_checked[block] = True


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def open_token_file(path: str | os.PathLike, what: str = "--data_file") -> TokenFile:
    """Open a token file of either format. A store is named by its prefix, or by any of its files.

    Raises InputError naming the file where it is missing, cut off, damaged or of another kind.
    """
    prefix = store_prefix(path)
    if prefix is not None:
        return _open_store(prefix, what)
    stem, suffix = os.path.splitext(path)
    path = (
        stem if suffix == ".json" and os.path.isfile(stem) else os.fspath(path)
    )  # a pickle, named by its card
    require_file(path, what)
    return _open_pickle(path, what)


def store_prefix(path: str | os.PathLike) -> str | None:
    """Return the prefix of the store that `path` names; None where it names none."""
    path = os.fspath(path)
    stem, suffix = os.path.splitext(path)
    if suffix in (".bin", ".idx") and os.path.isfile(path):
        return stem
    for prefix in (path, *[stem] * (suffix in (".bin", ".idx", ".json"))):
        if not os.path.isfile(prefix) and any(
            os.path.isfile(prefix + part) for part in (".idx", ".bin")
        ):
            return prefix
    return None


def token_file_problem(path: str | os.PathLike, what: str) -> str | None:
    """Say in one line why `path` names no token file that can be read; None if it may be one."""
    try:
        prefix = store_prefix(path)
        for name in (path,) if prefix is None else (f"{prefix}.idx", f"{prefix}.bin"):
            require_file(name, what)
    except InputError as error:
        return str(error)
    return None


def _open_store(prefix: str, what: str) -> TokenFile:
    index, data = f"{prefix}.idx", f"{prefix}.bin"
    for path in (index, data):
        require_file(path, what)
    card = read_card(f"{prefix}.json", what)
    if card:
        checked_index = CheckedBlocks(index, _checksums(card, "idx", prefix, what), what)
        for _ in checked_index.check_all():
            pass
    else:
        logger.info(
            "%s %s: no %s.json stands beside it, so its checksums are unknown.", what, data, prefix
        )
    dtype, lengths_N = _read_index(index, data, what, is_checked=bool(card))
    blocks = CheckedBlocks(data, _checksums(card, "bin", prefix, what), what) if card else None
    ids_M = np.memmap(data, dtype=dtype, mode="r").view(np.ndarray)
    return TokenFile(prefix, ids_M, lengths_N, card, blocks)


def _checksums(card: Mapping[str, Any], name: str, prefix: str, what: str) -> str:
    try:
        return card["checksums"][name]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{what} {prefix}.json: is no card of a store, it has no checksums; make the store"
            " again"
        ) from error


def _read_index(index: str, data: str, what: str, is_checked: bool) -> tuple[np.dtype, np.ndarray]:
    """Check a store's index against the size of its data: (dtype of ids, lengths_N, memory-mapped).

    is_checked: its checksums are right, so that what StoreWriter wrote need not be checked against
    itself.
    """
    size, data_size = os.path.getsize(index), os.path.getsize(data)
    with open(index, "rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise InputError(
            f"{what} {index}: is no index of a store (it does not begin with {MAGIC!r}); make it"
            " again"
        )
    _, version, code, num_sequences, num_documents = HEADER.unpack(head)
    if version != STORE_VERSION:
        raise InputError(
            f"{what} {index}: is of version {version}, expected {STORE_VERSION}; make it again"
        )
    if code not in DTYPES:
        raise InputError(
            f"{what} {index}: its dtype code {code} is none of integers; expected one of"
            f" {sorted(DTYPES)}"
        )
    expected = HEADER.size + 12 * num_sequences + 8 * num_documents
    if num_sequences == 0 or size not in (
        expected,
        expected + num_sequences,
    ):  # the latter with Megatron-LM's modes
        raise InputError(
            f"{what} {index}: has {size} bytes, {num_sequences} sequences take {expected}: cut off"
            " or damaged; make it again"
        )
    dtype = np.dtype(DTYPES[code])
    lengths_N = np.memmap(index, "<i4", "r", HEADER.size, (num_sequences,)).view(np.ndarray)
    offsets_N = np.memmap(
        index, "<i8", "r", HEADER.size + 4 * num_sequences, (num_sequences,)
    ).view(np.ndarray)
    end = int(offsets_N[-1]) + int(lengths_N[-1]) * dtype.itemsize
    if not is_checked:
        end = _check_offsets(lengths_N, offsets_N, dtype.itemsize, f"{what} {index}")
    if end != data_size:
        raise InputError(
            f"{what} {data}: has {data_size} bytes, its index expects {end}: cut off or foreign;"
            " make it again"
        )
    return dtype, lengths_N


def _check_offsets(lengths_N: np.ndarray, offsets_N: np.ndarray, itemsize: int, where: str) -> int:
    """Check that each sequence begins where the one before it ends; return the end of the last, in
    bytes.
    """
    end = 0
    for start in range(0, len(lengths_N), CHUNK):
        lengths = lengths_N[start : start + CHUNK].astype(np.int64)
        ends = end + np.cumsum(lengths) * itemsize
        wrong = (lengths <= 0) | (offsets_N[start : start + CHUNK] != ends - lengths * itemsize)
        if wrong.any():
            number = start + int(np.flatnonzero(wrong)[0])
            raise InputError(
                f"{where}: sequence {number} has length {lengths_N[number]} at byte"
                f" {offsets_N[number]}, which does not follow from those before it; make the store"
                " again"
            )
        end = int(ends[-1])
    return end


NUMBERS = re.compile(
    r"[<>|=]?[biuf][1248]"
)  # dtypes that an array of a token file may have, as numpy spells them


class _Dtype:
    """Stand for numpy.dtype, of plain numbers: arrays of other types can be made to hold forged
    pointers to objects.
    """

    __slots__ = ("dtype",)

    def __init__(self, name: str, *_is_copied: bool):
        if not NUMBERS.fullmatch(name):
            raise pickle.UnpicklingError(f"it has values of numpy type {name!r}, expected integers")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _RebuiltArray(np.ndarray):
    """Stand for an array that older protocols make in two steps: empty, then its state."""

    def __new__(cls, *_arguments: Any) -> "_RebuiltArray":
        return super().__new__(cls, (0,), np.int8)

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, is_fortran, buffer = state
        super().__setstate__((version, shape, dtype.dtype, is_fortran, buffer))


class _Maker:
    """Make the arrays of a pickle."""

    rebuilt = _RebuiltArray

    def take(self, shape: tuple, dtype: _Dtype, buffer: Any, *_order: str) -> Any:
        """Stand for numpy.ndarray(shape, dtype, buffer)."""
        return np.frombuffer(buffer, dtype.dtype).reshape(shape)

    def take_frombuffer(self, buffer: Any, dtype: _Dtype, shape: tuple, *_order: str) -> Any:
        """Stand for numpy's _frombuffer, by which protocol 5 makes arrays."""
        return self.take(shape, dtype, buffer)


class _ArrayUnpickler(pickle.Unpickler):
    """Load lists of numpy arrays and ints, and nothing else: a pickle may otherwise execute what it
    likes.
    """

    # Differs from the original: 2019 unpickled, and so executed, anything.

    ADMITTED = {
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("_codecs", "encode"),
        *itertools.product(("numpy._core.numeric", "numpy.core.numeric"), ("_frombuffer",)),
        *itertools.product(
            ("numpy._core.multiarray", "numpy.core.multiarray"), ("_reconstruct", "scalar")
        ),
    }

    def __init__(self, file: BinaryIO, maker: "_Maker | _Sink"):
        super().__init__(file)
        # Numpy's own would do what no array needs: numpy.ndarray((1,), "O", eight bytes) takes the
        # bytes for a pointer.
        self.stand_ins = {
            "dtype": _Dtype,
            "ndarray": maker.take,
            "_frombuffer": maker.take_frombuffer,
            "_reconstruct": maker.rebuilt,
            "scalar": self._make_scalar,
            "encode": self._encode,
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no token file needs")
        return self.stand_ins[name]

    def _make_scalar(self, dtype: _Dtype, buffer: bytes) -> np.generic:
        return np.frombuffer(buffer, dtype.dtype)[0]

    def _encode(self, text: str, _encoding: str) -> bytes:
        return text.encode("latin1")  # as which protocols before 3 hold bytes


def _opcodes(size: int) -> re.Pattern[bytes]:
    """Match opcodes of values, lists, tuples and calls, up to and with the size of one that data of
    any length follow.

    An index of the memo, and a frame, must fit into a file of `size` bytes.
    """
    index = _at_most(min(size, 2**32 - 1), 4)
    return re.compile(
        rb"(?s:(?:[()\]}tl012aeNRb\x85-\x89\x93\x94]|[Khq\x80].|[Jj].{4}"
        rb"|M..|r%s|\x95%s|G.{8}|[ILFVSg][^\n]*\n"
        rb"|p[0-9]{1,%d}\n|c[^\n]*\n[^\n]*\n){0,4096}+"
        rb"(?:[\x8d\x8e\x96](.{8})|[CU\x8a\x8c](.)|[BXT\x8b](.{4}))?)"
        % (index, _at_most(size, 8), len(str(size)))
    )


def _at_most(number: int, num_bytes: int) -> bytes:
    """Match little-endian integers that are not much above `number`."""
    lower, top = (
        (max(number.bit_length() - 1, 0)) // 8,
        number.to_bytes(num_bytes, "little").rstrip(b"\0")[-1:],
    )
    return rb".{%d}[\x00-\x%02x]\x00{%d}" % (lower, top[0], num_bytes - 1 - lower)


def _check_opcodes(file: BinaryIO) -> None:
    """Raise UnpicklingError for opcodes that no token file needs, and for sizes and indices beyond
    the file.

    An index of the memo alone can make pickle take 64 GB, and tuples in tuples as a dict's key can
    end the process.
    """
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        size, place = len(data), 0
        match = _opcodes(size).match
        while place < size:
            found = match(data, place)
            group, end = found.lastindex, found.end()
            if group:
                place = end + int.from_bytes(found[group], "little")
            elif end > place:
                place = end
            elif data[place] == ord("."):
                return
            else:
                wrong = data[place : place + 1]
                raise pickle.UnpicklingError(
                    f"byte {place} is {wrong!r}: expected a list of counts, or of arrays"
                )
        raise pickle.UnpicklingError("it is cut off")


def _load_arrays(path: str | os.PathLike, maker: "_Maker | _Sink") -> Any:
    with open(path, "rb") as file:
        _check_opcodes(file)
        return _ArrayUnpickler(file, maker).load()


def read_pickle(path: str | os.PathLike, what: str) -> Any:
    """Read a pickle of lists, ints and numpy arrays. Raises InputError for any other content or a
    damaged file.
    """
    require_file(path, what)
    try:
        return _load_arrays(path, _Maker())
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise InputError(
            f"{what} {path}: not a readable pickle of token ids ({one_line(error)}); make it again"
        ) from error


class _Sink:
    """Take the arrays of a pickle as they are read: their ids go end to end into one buffer, and no
    array is made.
    """

    TAKEN = None  # what stands in the list for an array that was taken

    def __init__(self) -> None:
        self.dtype: np.dtype | None = None
        self.ids = bytearray()
        self.lengths = array.array("q")
        self.rebuilt = type("_SunkArray", (_SunkArray,), {"__slots__": (), "sink": self})

    def take(self, shape: tuple, dtype: _Dtype, buffer: Any, *_order: str) -> None:
        """Stand for numpy.ndarray(shape, dtype, buffer). Raises ValueError for what is no sequence
        like those before.
        """
        self.dtype = self.dtype or dtype.dtype
        is_ids = (
            dtype.dtype == self.dtype
            and self.dtype.kind in "iu"
            and len(shape) == 1
            and shape[0] > 0
        )
        if not is_ids or memoryview(buffer).nbytes != shape[0] * self.dtype.itemsize:
            raise ValueError("not a 1-D array of integers of one width")
        self.ids += buffer
        self.lengths.append(shape[0])

    def take_frombuffer(self, buffer: Any, dtype: _Dtype, shape: tuple, *_order: str) -> None:
        """Stand for numpy's _frombuffer, by which protocol 5 makes arrays."""
        self.take(shape, dtype, buffer)


class _SunkArray:
    """Stand for an array that older protocols make in two steps: empty, then its state."""

    __slots__ = ()
    sink: _Sink  # set in a subclass made for each file

    def __new__(cls, *_arguments: Any) -> "_SunkArray":
        return object.__new__(cls)

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, _is_fortran, buffer = state
        self.sink.take(shape, dtype, buffer)


def _read_sequences(path: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Read a pickled list of 1-D arrays of one integer type: (ids_M, lengths_N). None where it is
    anything else.
    """
    sink = _Sink()
    try:
        content = _load_arrays(path, sink)
    except OSError:
        raise
    except Exception:  # said by who looks closer
        return None
    is_flat = isinstance(content, list) and len(content) == len(sink.lengths) > 0
    if not is_flat or not all(
        item is _Sink.TAKEN or isinstance(item, _SunkArray) for item in content
    ):
        return None
    return np.frombuffer(sink.ids, sink.dtype), np.frombuffer(sink.lengths, np.int64)


def read_checked_card(path: str | os.PathLike, what: str) -> dict[str, Any]:
    """Read the card beside a pickle and compare the pickle with the checksum in it; {} where there
    is no card.
    """
    card = read_card(f"{path}.json", what)
    if not card:
        logger.info(
            "%s %s: no %s.json stands beside it, so its checksum is unknown.", what, path, path
        )
    elif "sha256" not in card:
        raise InputError(
            f"{what} {path}: {path}.json is the card of a {card.get('kind')}, not of this file;"
            " give one of them another name"
        )
    elif card["sha256"] != file_digest(path):
        raise InputError(
            f"{what} {path}: differs from the checksum in {path}.json: damaged, or changed since;"
            " make it again, or remove the .json if the change was meant"
        )
    return card


def _open_pickle(path: str, what: str) -> TokenFile:
    card = read_checked_card(path, what)
    sequences = _read_sequences(path)
    if sequences is not None:
        return TokenFile(path, *sequences, card)
    content = read_pickle(path, what)
    if not isinstance(content, list) or not content:
        found = "an empty list" if isinstance(content, list) else type(content).__name__
        raise InputError(
            f"{what} {path}: expected a list of token-id arrays, got {found}; make it with"
            " binarized_data.py"
        )
    sequences = [_as_ids(sequence, number, path, what) for number, sequence in enumerate(content)]
    del content
    lengths_N = np.fromiter(map(len, sequences), np.int64, len(sequences))
    ids_M = np.concatenate(sequences)
    ids_M = (
        ids_M if ids_M.dtype.kind in "iu" else ids_M.astype(np.int64)
    )  # uint64 beside int64 gives floats
    return TokenFile(path, ids_M, lengths_N, card)


def _as_ids(sequence: Any, number: int, path: str, what: str) -> np.ndarray:
    try:
        array = np.asarray(sequence) if isinstance(sequence, (list, np.ndarray)) else None
    except ValueError:  # a list of lists of unequal lengths
        array = None
    if array is None or array.ndim != 1 or array.dtype.kind not in "iu" or array.size == 0:
        found = (
            type(sequence).__name__ if array is None else f"{array.dtype} of shape {array.shape}"
        )
        raise InputError(
            f"{what} {path}: sequence {number} is {found}, expected a 1-D array of integers; make"
            " it again"
        )
    return array


def check_ids_below(ids_M: np.ndarray, vocab_size: int, path: str | os.PathLike, what: str) -> None:
    """Raise InputError that names the first id outside, the file and the vocabulary's source."""
    for start in range(0, len(ids_M), CHUNK):
        chunk = ids_M[start : start + CHUNK]
        if int(chunk.max()) >= vocab_size or int(chunk.min()) < 0:
            wrong = int(chunk[np.flatnonzero((chunk >= vocab_size) | (chunk < 0))[0]])
            raise InputError(
                f"{path}: token id {wrong} is outside the vocabulary of {what}, ids 0 to"
                f" {vocab_size - 1}; binarize with the tokenizer of that vocabulary, or correct the"
                " size"
            )


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


class PickleWriter:
    """Write the pickled list of 2019 one sequence at a time: what pickle.load returns is a list of
    numpy arrays.

    The opcodes are written by hand, for pickle.dump wants the whole list in memory. Protocol 5; an
    array is numpy.ndarray(shape, dtype, bytes), by public names that every version of numpy has.
    """

    # numpy.ndarray is memo 0, the dtype memo 1; then an empty list.
    BEGINNING = b"\x80\x05cnumpy\nndarray\nq\x000cnumpy\ndtype\n\x8c\x03%s\x85Rq\x010]"
    SEQUENCE = struct.Struct(
        "<2sBi1s2sBQ"
    )  # get memo 0; an int32 as 1-tuple; get memo 1; bytes of a 64-bit length
    PER_APPEND = 1000  # sequences behind one mark, as pickle.dump has it

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


class StoreWriter:
    """Write a store's `.bin` and `.idx` one chunk of sequences at a time, in constant memory, with
    their checksums.
    """

    def __init__(self, data: BinaryIO, index: BinaryIO, lengths: BinaryIO, dtype: np.dtype):
        """lengths: a scratch file, readable, for what goes into the index at the end."""
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
        """Write the index: header, lengths, byte offsets, and one document a sequence."""
        code = CODES[self.dtype.newbyteorder("=")]
        self._to_index(
            HEADER.pack(MAGIC, STORE_VERSION, code, self.num_sequences, self.num_sequences + 1)
        )
        for lengths in self._written_lengths():
            self._to_index(lengths.tobytes())
        end = 0
        for lengths in self._written_lengths():
            ends = end + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            self._to_index(
                (ends - lengths.astype(np.int64) * self.dtype.itemsize).astype("<i8").tobytes()
            )
            end = int(ends[-1])
        for start in range(0, self.num_sequences + 1, CHUNK):
            self._to_index(
                np.arange(start, min(start + CHUNK, self.num_sequences + 1), dtype="<i8").tobytes()
            )

    def _written_lengths(self) -> Iterator[np.ndarray]:
        self.lengths.seek(0)
        while data := self.lengths.read(4 * CHUNK):
            yield np.frombuffer(data, "<i4")

    def _to_index(self, data: bytes) -> None:
        self.index.write(data)
        self.digests["idx"].update(data)

    def checksums(self) -> dict[str, Any]:
        """Return the checksums of both files, as the card has them."""
        return {
            "algorithm": (
                f"first {DIGEST_BYTES} bytes of the SHA-256 of each block of {BLOCK_BYTES} bytes,"
                " base64"
            ),
            **{name: digests.text() for name, digests in self.digests.items()},
        }


@contextlib.contextmanager
def writing_tokens(
    path: str, file_format: str, dtype: np.dtype
) -> Iterator[tuple["PickleWriter | StoreWriter", dict]]:
    """Yield (a writer, the card to be filled in) for a pickle at `path`, or a store whose prefix is
    `path`.

    Everything is written under temporary names. On success the card goes last; a card of an earlier
    file goes first, so that none ever stands beside a file that it does not describe.
    """
    card: dict[str, Any] = {"kind": file_format}
    if file_format == "pickle":
        with atomic_paths(path, f"{path}.json", stale=[f"{path}.json"]) as (temporary, card_path):
            with open(temporary, "wb") as file:
                writer = PickleWriter(file, dtype)
                yield writer, card
                writer.close()
            _write_card_to(card_path, {**card, "sha256": file_digest(temporary)})
        return
    # Half-way no index is there, without which nothing is taken for a store.
    files = [f"{path}{suffix}" for suffix in (".bin", ".idx", ".json")]
    with atomic_paths(*files, stale=files[1:]) as (data_path, index_path, card_path):
        with (
            open(data_path, "wb") as data,
            open(index_path, "wb") as index,
            _scratch_beside(path) as lengths,
        ):
            writer = StoreWriter(data, index, lengths, dtype)
            yield writer, card
            writer.close()
        _write_card_to(card_path, {**card, "checksums": writer.checksums()})


@contextlib.contextmanager
def _scratch_beside(path: str) -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile(dir=os.path.dirname(os.path.abspath(path))) as file:
        yield file


def write_token_counts(
    path: str | os.PathLike, counts_V: np.ndarray, card: Mapping[str, Any]
) -> None:
    """Write counts as 2019 did, a pickled list of ints, with a card beside it."""
    with atomic_paths(path, f"{path}.json", stale=[f"{path}.json"]) as (temporary, card_path):
        temporary.write_bytes(pickle.dumps(counts_V.tolist(), protocol=pickle.HIGHEST_PROTOCOL))
        _write_card_to(card_path, {"kind": "counts", **card, "sha256": file_digest(temporary)})
