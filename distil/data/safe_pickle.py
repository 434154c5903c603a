"""A restricted unpickler: lists of integers and of numpy arrays, without executing anything.

pickle.load runs whatever a file asks for. Here the opcodes are checked before anything is loaded,
numpy's constructors are replaced by our own, and every other name is refused. A pickled list of
id arrays is read into one buffer, without an object per array.
"""

import array
import itertools
import os
import pickle
import re
from typing import Any, BinaryIO

import numpy as np

from distil.system.files import require_file
from utils import InputError, one_line

# The dtypes that arrays of a token file may have, as numpy spells them.
NUMBERS = re.compile(r"[<>|=]?[biuf][1248]")


def read_pickle(path: str | os.PathLike, flag: str) -> Any:
    """Read a pickle of lists, ints and numpy arrays; raise InputError for any other content."""
    require_file(path, flag)
    try:
        return _load(path, _ArrayMaker())
    except OSError:
        raise
    except Exception as error:  # pickle can raise nearly anything on damaged files
        raise InputError(
            f"{flag} {path}: not a readable pickle of token ids ({one_line(error)}); make it again"
        ) from error


def read_arrays(path: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Read a pickled list of 1-D arrays of one integer type: (ids_M, lengths_N); else None."""
    collector = _IdCollector()
    try:
        content = _load(path, collector)
    except OSError:
        raise
    except Exception:  # read_pickle reports it
        return None
    is_flat = isinstance(content, list) and len(content) == len(collector.lengths) > 0
    if not is_flat or not all(
        item is _IdCollector.COLLECTED or isinstance(item, _CollectedArray) for item in content
    ):
        return None
    ids_M = np.frombuffer(collector.ids, collector.dtype)
    return ids_M, np.frombuffer(collector.lengths, np.int64)


def _load(path: str | os.PathLike, maker: "_ArrayMaker | _IdCollector") -> Any:
    with open(path, "rb") as file:
        _check_opcodes(file)
        return _ArrayUnpickler(file, maker).load()


# --------------------------------------------------------------------------------------------------
# Opcodes
# --------------------------------------------------------------------------------------------------


def _check_opcodes(file: BinaryIO) -> None:
    """Raise UnpicklingError for opcodes outside the subset, and for sizes beyond the file.

    A single memo index can make pickle allocate 64 GB, and nested tuples as a dict's key can end
    the process.
    """
    data = file.read()  # not mapped: a file that is cut off meanwhile would end the process
    file.seek(0)
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


def _opcodes(size: int) -> re.Pattern[bytes]:
    """Match opcodes of values, lists, tuples and calls, up to the length of variable-length data.

    Memo indices and frames must fit into a file of `size` bytes.
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
    lower = max(number.bit_length() - 1, 0) // 8
    top = number.to_bytes(num_bytes, "little").rstrip(b"\0")[-1:]
    return rb".{%d}[\x00-\x%02x]\x00{%d}" % (lower, top[0], num_bytes - 1 - lower)


# --------------------------------------------------------------------------------------------------
# Unpickling
# --------------------------------------------------------------------------------------------------


class _Dtype:
    """Replace numpy.dtype: plain numbers only, because object arrays can hold forged pointers."""

    __slots__ = ("dtype",)

    def __init__(self, name: str, *_is_copied: bool):
        if not NUMBERS.fullmatch(name):
            raise pickle.UnpicklingError(f"it has values of numpy type {name!r}, expected integers")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _RebuiltArray(np.ndarray):
    """Replace an array that older protocols make in two steps: empty, then its state."""

    def __new__(cls, *_arguments: Any) -> "_RebuiltArray":
        return super().__new__(cls, (0,), np.int8)

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, is_fortran, buffer = state
        super().__setstate__((version, shape, dtype.dtype, is_fortran, buffer))


class _ArrayMaker:
    """Make the arrays of a pickle."""

    rebuilt = _RebuiltArray

    def take(self, shape: tuple, dtype: _Dtype, buffer: Any, *_order: str) -> Any:
        """Replace numpy.ndarray(shape, dtype, buffer)."""
        return np.frombuffer(buffer, dtype.dtype).reshape(shape)

    def take_frombuffer(self, buffer: Any, dtype: _Dtype, shape: tuple, *_order: str) -> Any:
        """Replace numpy's _frombuffer, by which protocol 5 makes arrays."""
        return self.take(shape, dtype, buffer)


class _IdCollector:
    """Append the ids of a pickle's arrays to one buffer, without making the arrays."""

    COLLECTED = None  # the item that replaces a collected array in the list

    def __init__(self) -> None:
        self.dtype: np.dtype | None = None
        self.ids = bytearray()
        self.lengths = array.array("q")
        self.rebuilt = type(
            "_CollectedArray", (_CollectedArray,), {"__slots__": (), "collector": self}
        )

    def take(self, shape: tuple, dtype: _Dtype, buffer: Any, *_order: str) -> None:
        """Replace numpy.ndarray(shape, dtype, buffer).

        Raises ValueError for anything but a 1-D array of the integer type of those before.
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
        """Replace numpy's _frombuffer, by which protocol 5 makes arrays."""
        self.take(shape, dtype, buffer)


class _CollectedArray:
    """Replace an array that older protocols make in two steps: empty, then its state."""

    __slots__ = ()
    collector: _IdCollector  # set in a subclass made for each file

    def __new__(cls, *_arguments: Any) -> "_CollectedArray":
        return object.__new__(cls)

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, _is_fortran, buffer = state
        self.collector.take(shape, dtype, buffer)


class _ArrayUnpickler(pickle.Unpickler):
    """Load lists of numpy arrays and ints, and refuse every other name."""

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

    def __init__(self, file: BinaryIO, maker: _ArrayMaker | _IdCollector):
        super().__init__(file)
        # Numpy's constructors do more than arrays need: numpy.ndarray((1,), "O", eight bytes)
        # takes the bytes for a pointer.
        self.replacements = {
            "dtype": _Dtype,
            "ndarray": maker.take,
            "_frombuffer": maker.take_frombuffer,
            "_reconstruct": maker.rebuilt,
            "scalar": self._make_scalar,
            "encode": self._encode,
        }

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of an admitted name; raise UnpicklingError for any other."""
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no token file needs")
        return self.replacements[name]

    def _make_scalar(self, dtype: _Dtype, buffer: bytes) -> np.generic:
        return np.frombuffer(buffer, dtype.dtype)[0]

    def _encode(self, text: str, _encoding: str) -> bytes:
        return text.encode("latin1")  # protocols before 3 hold bytes in this encoding
