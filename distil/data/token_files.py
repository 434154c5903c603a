"""Token files: sequences of token ids on the disk, in one of the formats that FORMATS lists.

A token file is recognised by its content, and all formats give the same sequences. Beside it lies a
JSON file, the *card* (cards.py): the tokenizer with its vocabulary's fingerprint, what was counted,
and checksums. Files without a card are read, too, with a notice.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distil.data import pickled_list, store
from distil.data.cards import require_card_output
from distil.data.disk import CheckedBlocks, DiskArray
from distil.system.files import require_file, require_output
from distil.system.outputs import is_beside_card
from utils import InputError, concatenate_runs

MIN_LENGTH = 11  # sequences of this many ids or fewer, boundary tokens included, are not trained on
MAX_UNKNOWN_SHARE = 0.5  # nor are those with this share of unknown tokens or more
# With fewer unknown ids than this in a sequence, no piece of it that is long enough has too many.
MANY_UNKNOWN = math.ceil((MIN_LENGTH + 1) * MAX_UNKNOWN_SHARE)
MAX_LISTED = 2**16  # sequences with MANY_UNKNOWN that a card lists
CHUNK_IDS = 2**20  # read at a time


@dataclasses.dataclass(frozen=True)
class TokenFormat:
    """A format of token files; its functions take the path, or prefix, that `find` returns.

    find: return the token file's path that a name stands for, None if it is of another format.
    files: list its files, the card last. read: return (ids_M, lengths_N, card, blocks to check or
    None). writing: context manager of (a writer with append(ids_M, lengths_N), the card to fill
    in). digest: SHA-256 of the content. suffix: follows the name that binarized_data.py gives.
    """

    description: str
    find: Callable[[str], str | None]
    files: Callable[[str], list[str]]
    read: Callable[[str, str], tuple]
    writing: Callable[[str, np.dtype], contextlib.AbstractContextManager]
    digest: Callable[[str, Mapping[str, Any]], str]
    suffix: str = ""


# In the order in which they are tried: the last takes every file.
FORMATS = {
    "store": TokenFormat(
        "read as it is needed, for large corpora",
        store.find,
        store.files,
        store.read,
        store.writing,
        store.digest,
    ),
    "pickle": TokenFormat(
        "the list of 2019, read into memory",
        pickled_list.find,
        pickled_list.files,
        pickled_list.read,
        pickled_list.writing,
        pickled_list.digest,
        ".pickle",
    ),
}


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """Sequences of ids: ids_M, all of them end to end, and lengths_N, of each sequence.

    card: {} if there is none. blocks: checks ids when they are read. format: a key of FORMATS; None
    for sequences that were made in memory.
    """

    path: str
    ids_M: np.ndarray | DiskArray
    lengths_N: np.ndarray | DiskArray
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    blocks: CheckedBlocks | None = None
    format: str | None = None

    def check(self, starts: np.ndarray, ends: np.ndarray) -> None:
        """Verify the blocks that hold ids[start:end], each once; raise InputError if damaged."""
        if self.blocks is not None:
            size = self.ids_M.itemsize
            self.blocks.check(starts * size, ends * size)

    def runs(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the ids of the runs that begin at `starts`, end to end, verified."""
        self.check(starts, starts + lengths)
        if isinstance(self.ids_M, DiskArray):
            return self.ids_M.runs(starts, lengths)
        return concatenate_runs(self.ids_M, starts, lengths, np.arange(len(starts)))[0]

    def forget(self) -> None:
        """Verify every block again when it is read next."""
        if self.blocks is not None:
            self.blocks.forget()

    def digest(self) -> str:
        """Return a SHA-256 of the content, the same with a card and without."""
        return FORMATS[self.format].digest(self.path, self.card)


def open_token_file(path: str | os.PathLike, flag: str = "--data_file") -> TokenFile:
    """Open a token file, named by its path, its prefix or any of its files.

    Raises InputError naming the file if it is missing, cut off, damaged or of another kind.
    """
    name, place = find_token_file(path)
    for file in files_of(path)[:-1]:
        require_file(file, flag)
    return TokenFile(place, *FORMATS[name].read(place, flag), format=name)


def token_file_problem(path: str | os.PathLike, flag: str) -> str | None:
    """Return one line that says which file of a token file can't be read; None if all can."""
    try:
        for file in files_of(path)[:-1]:
            require_file(file, flag)
    except InputError as error:
        return str(error)
    return None


def files_of(path: str | os.PathLike) -> list[str]:
    """List the files of the token file that `path` names, the card last."""
    name, place = find_token_file(path)
    return FORMATS[name].files(place)


def find_token_file(path: str | os.PathLike) -> tuple[str, str]:
    """Return (format, path or prefix) of the token file that `path` names."""
    found = ((name, row.find(os.fspath(path))) for name, row in FORMATS.items())
    return next((name, place) for name, place in found if place is not None)


def check_ids_below(
    ids_M: np.ndarray, vocab_size: int, path: str | os.PathLike, model: str
) -> None:
    """Raise InputError naming the file and its first id outside the vocabulary of `model`."""
    for start in range(0, len(ids_M), CHUNK_IDS):
        chunk = ids_M[start : start + CHUNK_IDS]
        if int(chunk.max()) >= vocab_size or int(chunk.min()) < 0:
            wrong = int(chunk[np.flatnonzero((chunk >= vocab_size) | (chunk < 0))[0]])
            raise InputError(
                f"{path}: token id {wrong} is outside the vocabulary of {model}, ids 0 to"
                f" {vocab_size - 1}; binarize with the tokenizer of that vocabulary, or correct the"
                " size"
            )


def writing_tokens(
    path: str, file_format: str, dtype: np.dtype
) -> contextlib.AbstractContextManager[tuple[Any, dict]]:
    """Return a context manager of (a writer, the card to fill in); on success the file appears.

    Everything is written under temporary names. The card of an older file is removed first and the
    new one renamed last, so that a card never describes another file.
    """
    return FORMATS[file_format].writing(path, dtype)


def require_counts_output(
    path: str, flag: str, inputs: Sequence[str] = (), *, force: bool = False
) -> None:
    """Raise InputError if counts and their card can't be written, or take a name of a store's."""
    require_output(path, flag, inputs, is_own=is_beside_card, force=force)
    name = find_token_file(path)[0]
    if name != "pickle":
        raise InputError(
            f"{flag} {path}: is the prefix of a {name}, whose card is {path}.json; choose another"
            " name"
        )
    require_card_output(f"{path}.json", flag, inputs, force=force)


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Token ids by role.

    start, unknown: None where the tokenizer has no such token; sequences then begin without it.
    """

    start: int | None
    end: int
    pad: int
    unknown: int | None = None
