"""Text on the disk as blocks of about a megabyte: read here, in one process; made into strings by
whoever gets them.

A path is a file, a folder or a glob. Files are told by their names: `.txt` (or no ending that is
known) holds a sequence a line, `.jsonl` an object a line with the text in one of its fields; `.csv`
and `.tsv` have it in a column. These also compressed (`.gz`, `.bz2`, `.xz`). `.parquet` is read by
the column; what else the `datasets` library opens from local files (`.arrow`, `.json`) goes through
it.
"""

import bz2
import contextlib
import csv
import dataclasses
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from distil.data.cards import is_card
from distil.system.files import require_file
from utils import InputError, logger, one_line

BLOCK_BYTES = 2**20
MAX_LINE_BYTES = 2**26  # a longer one is no line of text: a binary, or a file without line ends
ROWS_PER_BLOCK = 1000
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# How a file is read, by its ending: see READERS.
KINDS = {
    ".txt": "lines",
    ".text": "lines",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
}
CSV_OPTIONS = {"csv": {}, "tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}
PACKED = (".zip", ".tar", ".tgz", ".zst", ".lz4", ".7z", ".rar", ".z")  # to be unpacked first
ERRORS = ("strict", "skip", "replace")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Source:
    """One file. kind: see KINDS; num_bytes: its size on the disk."""

    path: str
    kind: str
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Block:
    """Some whole lines of a file (kind "lines" or "jsonl", as bytes), or texts (kind "texts":
    bytes, str, None or odd).

    first: number of the first line or row, from 1; num_bytes: how much of the file on the disk it
    stands for.
    """

    path: str
    kind: str
    first: int
    content: bytes | list
    num_bytes: int


def find_sources(path: str, flag: str = "--file_path") -> list[Source]:
    """List the files that `path` (a file, a folder or a glob) stands for, in a fixed order. Raises
    InputError.
    """
    if os.path.isdir(path):
        files = _chosen(_files_below(path), flag, path)
        if not files:
            raise InputError(
                f"{flag} {path}: the folder holds no text; expected files that end in"
                f" {', '.join(KINDS)}"
            )
    elif not os.path.exists(path) and glob.has_magic(path):
        files = _chosen(
            filter(os.path.isfile, sorted(glob.glob(path, recursive=True))),
            flag,
            path,
            any_ending=True,
        )
        if not files:
            raise InputError(f"{flag} {path}: no file matches; quote the pattern, and check it")
    else:
        require_file(path, flag)
        files = [path]
    sources = [Source(file, _known_kind(file) or "lines", os.path.getsize(file)) for file in files]
    sources = [source for source in sources if source.num_bytes]
    if not sources:
        raise InputError(f"{flag} {path}: every file that it stands for is empty; expected text")
    for source in sources:
        require_file(source.path, flag)
        if source.path.lower().endswith(PACKED):
            raise InputError(
                f"{flag} {source.path}: is packed in a way that is not read; unpack it, or pack it"
                " as .gz"
            )
    return sources


def _files_below(folder: str) -> Iterator[str]:
    """Yield the files of a folder and of those in it, in a fixed order; links are followed, to each
    folder once.
    """
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = sorted(
            f
            for f in folders
            if f[0] != "." and os.path.realpath(os.path.join(place, f)) not in seen
        )
        yield from (os.path.join(place, file) for file in sorted(files) if file[0] != ".")


def _chosen(files: Iterable[str], flag: str, path: str, any_ending: bool = False) -> list[str]:
    """Leave out what is no text, or was named before under another name; say how many."""
    chosen: dict[str, str] = {}
    left_out = []
    for file in files:
        is_text = os.path.isfile(file) and (
            any_ending or _known_kind(file) or not Path(_uncompressed(file)).suffix
        )
        # The cards of token files end in .json, too.
        if (
            not is_text
            or (file.endswith(".json") and is_card(file))
            or os.path.realpath(file) in chosen
        ):
            left_out.append(file)
        else:
            chosen[os.path.realpath(file)] = file
    if left_out:
        logger.warning(
            "%s %s: left out %d files (of unknown ending, broken links, named twice, or cards of"
            " token files), such as %s.",
            flag,
            path,
            len(left_out),
            left_out[0],
        )
    return list(chosen.values())


def _uncompressed(path: str) -> str:
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in OPENERS else path


def _known_kind(path: str) -> str | None:
    return KINDS.get(os.path.splitext(_uncompressed(path))[1].lower())


# --------------------------------------------------------------------------------------------------
# Reading: files -> blocks
# --------------------------------------------------------------------------------------------------


def read_blocks(
    source: Source, text_field: str, flag: str = "--file_path", block_bytes: int = BLOCK_BYTES
) -> Iterator[Block]:
    """Yield a file's blocks, in constant memory. Raises InputError naming file and place where it
    can't be read.
    """
    if source.kind in ("lines", "jsonl"):
        yield from _lines(source, flag, block_bytes)
    else:
        yield from _rows(source, text_field, flag)


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file: (as it is on the disk, uncompressed)."""
    opener = OPENERS.get(os.path.splitext(source.path)[1].lower())
    with open(source.path, "rb") as raw:
        yield raw, (opener(raw, "rb") if opener else raw)


def _lines(source: Source, flag: str, block_bytes: int) -> Iterator[Block]:
    number, position = 1, 0
    with _opened(source) as (raw, file):
        for data in _whole_lines(file, source, flag, block_bytes):
            yield Block(source.path, source.kind, number, data, raw.tell() - position)
            number, position = number + count_lines(data), raw.tell()


def _whole_lines(file: BinaryIO, source: Source, flag: str, block_bytes: int) -> Iterator[bytes]:
    parts: list[bytes] = []  # of a line whose end has not come yet
    number, size = 1, 0
    while True:
        try:
            chunk = file.read(block_bytes)
        except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
            where = f"{source.path}: behind line {number - 1}"
            raise InputError(
                f"{flag} {where} the compressed data is damaged or cut off ({one_line(error)})"
            ) from error
        except OSError as error:  # bz2 has no error of its own
            raise InputError(
                f"{flag} {source.path}: can't be read ({one_line(error)}); check the file"
            ) from error
        # A carriage return at the end may be the first half of a line end.
        cut = max(chunk.rfind(b"\n"), chunk.rfind(b"\r", 0, max(len(chunk) - 1, 0))) + 1
        if cut or not chunk:
            data = b"".join([*parts, chunk[:cut]])
            if data:
                yield data
            number += count_lines(data)
            parts, size = [], 0
        if not chunk:
            return
        parts.append(chunk[cut:])
        size += len(parts[-1])
        if size > MAX_LINE_BYTES:
            raise InputError(
                f"{flag} {source.path}:{number}: the line has more than {MAX_LINE_BYTES >> 20} MiB;"
                " expected a sequence a line: break it up (scripts/prepare_text.py), or is it no"
                " text?"
            )


def count_lines(data: bytes) -> int:
    """Count the line ends: \\n, \\r\\n, and \\r alone."""
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")


def _rows(source: Source, text_field: str, flag: str) -> Iterator[Block]:
    first, done = 1, 0
    try:
        for texts, share in READERS[source.kind](source, text_field, flag):
            position = int(share * source.num_bytes)
            yield Block(source.path, "texts", first, texts, position - done)
            first, done = first + len(texts), position
    except (InputError, GeneratorExit):
        raise
    except Exception as error:  # what a damaged file can raise has no end
        where = f"{flag} {source.path}: from row {first} on it can't be read as {source.kind}"
        raise InputError(f"{where} ({one_line(error)}); check the file") from error
    yield Block(source.path, "texts", first, [], source.num_bytes - done)


def _parquet_rows(source: Source, text_field: str, flag: str) -> Iterator[tuple[list, float]]:
    import pyarrow
    import pyarrow.parquet

    # Without pre_buffer and with a buffer: else the whole column's bytes are fetched first.
    with pyarrow.parquet.ParquetFile(
        source.path, pre_buffer=False, buffer_size=BLOCK_BYTES
    ) as file:
        if text_field not in file.schema_arrow.names:
            raise InputError(_no_field(flag, source.path, 1, text_field, file.schema_arrow.names))
        done = 0
        for batch in file.iter_batches(ROWS_PER_BLOCK, columns=[text_field]):
            column = batch.column(0)
            column = (
                column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
            )
            is_text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(
                column.type
            )
            done += len(column)
            # As bytes: what is no UTF-8 is then found a row at a time, by whoever decodes.
            yield (
                (column.cast(pyarrow.large_binary()) if is_text else column).to_pylist(),
                done / file.metadata.num_rows,
            )


def _csv_rows(source: Source, text_field: str, flag: str) -> Iterator[tuple[list, float]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    with _opened(source) as (raw, file):
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.DictReader(text, strict=True, **CSV_OPTIONS[source.kind])
        if text_field not in (reader.fieldnames or []):
            raise InputError(_no_field(flag, source.path, 1, text_field, reader.fieldnames or []))
        while rows := list(itertools.islice(reader, ROWS_PER_BLOCK)):
            texts = [row[text_field] for row in rows]
            share = raw.tell() / source.num_bytes
            yield (
                [None if t is None else t.encode("utf-8", "surrogateescape") for t in texts],
                share,
            )


def _datasets_rows(source: Source, text_field: str, flag: str) -> Iterator[tuple[list, float]]:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(
        datasets.logging.CRITICAL
    )  # what is wrong is said by us, in one line
    datasets.config.TORCH_AVAILABLE = (
        False  # it would be imported, and take more memory than all the rest
    )
    table = datasets.load_dataset(
        source.kind, data_files=[glob.escape(source.path)], split="train", streaming=True
    )
    first = 1
    for batch in table.iter(batch_size=ROWS_PER_BLOCK):
        if text_field not in batch:
            raise InputError(_no_field(flag, source.path, first, text_field, batch))
        first += len(batch[text_field])
        yield batch[text_field], 0.0


READERS = {
    "parquet": _parquet_rows,
    "csv": _csv_rows,
    "tsv": _csv_rows,
    "arrow": _datasets_rows,
    "json": _datasets_rows,
}


def _no_field(flag: str, path: str, number: int, text_field: str, fields) -> str:
    # Of a table that is none, any characters may stand for its fields: line ends, too, and
    # megabytes of them.
    known = ", ".join(repr(str(field))[1:-1][:40] for field in list(fields)[:8]) or "none"
    return (
        f"{flag} {path}:{number}: has no field {text_field!r}, only {known}; name the text's with"
        " --text_field"
    )


# --------------------------------------------------------------------------------------------------
# Decoding: blocks -> strings
# --------------------------------------------------------------------------------------------------


def texts_of(
    block: Block, text_field: str, errors: str = "strict", flag: str = "--file_path"
) -> tuple[list[str], int]:
    """Make a block into strings: (one a line, record or row, as it stands; how many were left out
    or mended).

    errors: what becomes of text that is not UTF-8, and of records that are no JSON: "strict" raises
    InputError naming file and line, "skip" leaves the line out, "replace" puts U+FFFD for what is
    no text (broken JSON remains an error).
    """
    if block.kind != "texts":
        lines, num_bad = _decoded(block, errors, flag)
        if block.kind == "lines":
            return [line for line in lines if line is not None], num_bad
        records = [
            (number, line)
            for number, line in enumerate(lines, start=block.first)
            if line is not None
        ]
    else:
        records, num_bad = list(enumerate(block.content, start=block.first)), 0
    texts = []
    for number, record in records:
        text, is_bad = _text_of(record, number, block, text_field, errors, flag)
        num_bad += is_bad
        if text is not None:
            texts.append(text)
    return texts, num_bad


def _text_of(
    record, number: int, block: Block, text_field: str, errors: str, flag: str
) -> tuple[str | None, bool]:
    """Make a record or row into a string: (None where it is left out, whether something was wrong
    with it).
    """
    value = _field(record, number, block, text_field, errors, flag)
    if value is None:
        return None, True
    try:
        # Half of a surrogate pair, which JSON can write as an escape, is no text either.
        return (value.decode() if isinstance(value, bytes) else value.encode().decode()), False
    except UnicodeError as error:
        if errors == "strict":
            raise InputError(
                f"{flag} {block.path}:{number}: {text_field!r} is not UTF-8, or holds half of a"
                f" surrogate pair ({one_line(error)}); mend it, or pass --errors skip or replace"
            ) from error
        if errors == "skip":
            return None, True
        raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
        return raw.decode("utf-8", "replace"), True


def _decoded(block: Block, errors: str, flag: str) -> tuple[list[str | None], int]:
    data = block.content.removeprefix(BYTE_ORDER_MARK) if block.first == 1 else block.content
    try:
        return _split(data.decode()), 0
    except UnicodeDecodeError as error:
        if errors == "strict":
            before = data[: error.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            number, place = block.first + before.count(b"\n"), len(before) - before.rfind(b"\n")
            hint = (
                "it looks like UTF-16; "
                if data[:2] in (b"\xff\xfe", b"\xfe\xff") and block.first == 1
                else ""
            )
            raise InputError(
                f"{flag} {block.path}:{number}: byte {place} of the line is not UTF-8"
                f" (0x{data[error.start]:02x}); {hint}convert the file to UTF-8, or pass --errors"
                " skip or replace"
            ) from error
    # Bytes of no text become lone surrogates, which no valid UTF-8 decodes to.
    lines = _split(data.decode("utf-8", "surrogateescape"))
    is_bad = [
        not line.isascii() and any("\udc80" <= character <= "\udcff" for character in line)
        for line in lines
    ]
    if errors == "skip":
        return [None if bad else line for line, bad in zip(lines, is_bad, strict=True)], sum(is_bad)
    mended = [
        line.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if bad else line
        for line, bad in zip(lines, is_bad, strict=True)
    ]
    return mended, sum(is_bad)


def _split(text: str) -> list[str]:
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _field(
    line, number: int, block: Block, text_field: str, errors: str, flag: str
) -> str | bytes | None:
    """Read the text of a record or row: "" where it is null or the line blank; None where the
    record is to be left out.
    """
    if block.kind == "jsonl":
        if not line.strip():
            return ""
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"a {type(record).__name__}, expected an object")
        except (ValueError, RecursionError) as error:
            if errors == "skip":
                return None
            raise InputError(
                f"{flag} {block.path}:{number}: is no JSON object ({one_line(error)}); mend the"
                " line"
            ) from error
        if text_field not in record:
            raise InputError(_no_field(flag, block.path, number, text_field, record))
        line = record[text_field]
    if line is None:
        return ""
    if not isinstance(line, str | bytes):
        found = f"{text_field!r} is of type {type(line).__name__}"
        raise InputError(
            f"{flag} {block.path}:{number}: {found}, expected text; name another --text_field"
        )
    return line
