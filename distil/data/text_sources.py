"""Text files to blocks of about a megabyte, read in one process; decoding.py makes them strings.

A path is a file, a folder or a glob. The file name tells the kind: `.txt` (or an unknown ending)
holds a sequence per line, `.jsonl` an object per line with the text in one of its fields; `.csv`
and `.tsv` have it in a column. These may be compressed (`.gz`, `.bz2`, `.xz`). `.parquet` is read
by column, `.json` by record; the `datasets` library reads `.arrow`. A path may be a named pipe, or
`-` for the standard input. hub_datasets.py lists the shards of data sets, which are sources, too.
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
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from distil.data.cards import is_card
from distil.data.json_values import json_values
from distil.system.files import require_file
from utils import InputError, logger, one_line

BLOCK_BYTES = 2**20
MAX_LINE_BYTES = 2**26  # a longer one is not a line of text, but a binary or without line ends
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
DATASET = "dataset"  # the kind of a data set's shard
STDIN = "-"
PACKED = (".zip", ".tar", ".tgz", ".zst", ".lz4", ".7z", ".rar", ".z")  # must be unpacked first


@dataclasses.dataclass(frozen=True)
class Source:
    """One file, pipe or shard of a data set. kind: see KINDS; num_bytes: on the disk, 0 if unknown.

    start, end: the part that is read, bytes of lines or rows of a shard; end None: to its end. A
    line belongs to the part in which its first byte lies. is_pipe: it can be read only once. table:
    the shard, of the `datasets` library; tag: a digest of its data set's content.
    """

    path: str
    kind: str
    num_bytes: int
    start: int = 0
    end: int | None = None
    is_pipe: bool = False
    table: Any = None
    tag: str = ""

    @property
    def part_bytes(self) -> int:
        """The bytes on the disk of the part that is read, 0 if they are unknown."""
        end = self.num_bytes if self.end is None else self.end
        return end - self.start if self.num_bytes else 0


@dataclasses.dataclass(frozen=True)
class Block:
    """Whole lines of a file (kind "lines" or "jsonl", as bytes), or the values of rows ("texts").

    first: number of the first line or row, from 1. content of "texts": bytes, str, None or a value
    of another type. num_bytes: the block's share of the file on the disk.
    """

    path: str
    kind: str
    first: int
    content: bytes | list
    num_bytes: int


def find_sources(path: str, flag: str = "--file_path") -> list[Source]:
    """List the text files of a file, folder or glob in a fixed order; raise InputError if none."""
    if is_pipe(path):
        logger.info(
            "%s %s: a pipe is read only once: after an interruption, start again with its source.",
            flag,
            path,
        )
        kind = _known_kind(path) or "lines"
        if kind not in ("lines", "jsonl"):
            raise InputError(
                f"{flag} {path}: is a pipe of {kind}, expected lines or JSON Lines; write it to a"
                " file"
            )
        return [Source(path, kind, 0, is_pipe=True)]
    if os.path.isdir(path):
        files = _select(_files_below(path), flag, path)
        if not files:
            raise InputError(
                f"{flag} {path}: the folder holds no text; expected files that end in"
                f" {', '.join(KINDS)}"
            )
    elif not os.path.exists(path) and glob.has_magic(path):
        files = _select(
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
        raise InputError(f"{flag} {path}: every file of it is empty; expected text")
    for source in sources:
        require_file(source.path, flag)
        if source.path.lower().endswith(PACKED):
            raise InputError(
                f"{flag} {source.path}: is compressed in an unsupported format; unpack it, or"
                " compress it as .gz"
            )
    return sources


def is_pipe(path: str) -> bool:
    """True for the standard input and for a named pipe, or one that a shell names (<(command))."""
    return path == STDIN or (os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode))


def _files_below(folder: str) -> Iterator[str]:
    """Yield the files below a folder in a fixed order; follow links, to each folder once."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = sorted(
            f
            for f in folders
            if f[0] != "." and os.path.realpath(os.path.join(place, f)) not in seen
        )
        yield from (os.path.join(place, file) for file in sorted(files) if file[0] != ".")


def _select(files: Iterable[str], flag: str, path: str, any_ending: bool = False) -> list[str]:
    """Select the text files, each once under any of its names; warn of the skipped ones."""
    selected: dict[str, str] = {}
    skipped = []
    for file in files:
        is_text = os.path.isfile(file) and (
            any_ending or _known_kind(file) or not Path(_uncompressed(file)).suffix
        )
        # The cards of token files end in .json, too.
        if (
            not is_text
            or (file.endswith(".json") and is_card(file))
            or os.path.realpath(file) in selected
        ):
            skipped.append(file)
        else:
            selected[os.path.realpath(file)] = file
    if skipped:
        logger.warning(
            "%s %s: skipped %d files (of unknown ending, broken links, named twice, or cards of"
            " token files), such as %s.",
            flag,
            path,
            len(skipped),
            skipped[0],
        )
    return list(selected.values())


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
    """Yield a file's blocks in constant memory; raise InputError naming the unreadable place."""
    if source.kind in ("lines", "jsonl"):
        yield from _lines(source, flag, block_bytes)
    else:
        yield from _rows(source, text_field, flag)


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yield a file's streams: (as it is on the disk, uncompressed)."""
    opener = OPENERS.get(os.path.splitext(source.path)[1].lower())
    is_stdin = source.is_pipe and source.path == STDIN
    with open(0 if is_stdin else source.path, "rb", closefd=not is_stdin) as raw:
        yield raw, (opener(raw, "rb") if opener else raw)


def _lines(source: Source, flag: str, block_bytes: int) -> Iterator[Block]:
    number, position, place = 1, 0, 0  # place: in the uncompressed bytes
    kind = source.kind
    with _opened(source) as (raw, file):
        for data in _whole_lines(file, source, flag, block_bytes):
            if source.is_pipe and not place and kind == "lines" and _is_record(data):
                logger.info("%s %s: begins with a JSON object: read as .jsonl.", flag, source.path)
                kind = "jsonl"
            first = line_start(data, source.start - place)
            last = len(data) if source.end is None else line_start(data, source.end - place)
            if first < last:
                is_whole = source.end is None and not source.is_pipe
                num_bytes = raw.tell() - position if is_whole else last - first
                first_number = number + count_lines(data[:first])
                yield Block(source.path, kind, first_number, data[first:last], num_bytes)
            number, place = number + count_lines(data), place + len(data)
            position = 0 if source.is_pipe else raw.tell()
            if source.end is not None and place >= source.end:
                return


def _is_record(data: bytes) -> bool:
    """True if the first line is a JSON object, as in .jsonl."""
    try:
        return isinstance(json.loads(data.split(b"\n", 1)[0]), dict)
    except (ValueError, RecursionError):
        return False


def line_start(data: bytes, place: int) -> int:
    """Return where in whole lines the first line begins that begins at `place` or after it."""
    if place <= 0:
        return 0
    ends = [end for mark in (b"\n", b"\r") if (end := data.find(mark, place - 1)) >= 0]
    if not ends:
        return len(data)
    end = min(ends)
    return end + (2 if data[end : end + 2] == b"\r\n" else 1)


def _whole_lines(file: BinaryIO, source: Source, flag: str, block_bytes: int) -> Iterator[bytes]:
    parts: list[bytes] = []  # of a line that has not ended yet
    number, size = 1, 0
    while True:
        try:
            chunk = file.read(block_bytes)
        except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
            where = f"{source.path}: after line {number - 1}"
            raise InputError(
                f"{flag} {where} the compressed data is damaged or cut off ({one_line(error)})"
            ) from error
        except OSError as error:  # bz2 defines no error class
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
                " expected a sequence per line: split it (scripts/prepare_text.py), or is the file"
                " not text?"
            )


def count_lines(data: bytes) -> int:
    """Count the line ends: \\n, \\r\\n, and single \\r."""
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")


def _rows(source: Source, text_field: str, flag: str) -> Iterator[Block]:
    first, done = source.start + 1, 0
    try:
        for texts, share in READERS[source.kind](source, text_field, flag):
            position = int(share * source.num_bytes)
            num_bytes = position - done
            if source.kind == DATASET:  # its size on the disk is unknown
                num_bytes = sum(len(text) for text in texts if isinstance(text, str | bytes))
            yield Block(source.path, "texts", first, texts, num_bytes)
            first, done = first + len(texts), position
    except (InputError, GeneratorExit):
        raise
    except Exception as error:  # loaders can raise anything on damaged files
        where = f"{flag} {source.path}: from row {first} on it can't be read as {source.kind}"
        remedy = "run again to continue" if source.kind == DATASET else "check the file"
        raise InputError(f"{where} ({one_line(error)}); {remedy}") from error
    yield Block(source.path, "texts", first, [], source.num_bytes - done)


def _parquet_rows(source: Source, text_field: str, flag: str) -> Iterator[tuple[list, float]]:
    import pyarrow
    import pyarrow.parquet

    # With pre_buffer or without buffer_size, the bytes of the whole column are read first.
    with pyarrow.parquet.ParquetFile(
        source.path, pre_buffer=False, buffer_size=BLOCK_BYTES
    ) as file:
        if text_field not in file.schema_arrow.names:
            raise InputError(
                missing_field(flag, source.path, 1, text_field, file.schema_arrow.names)
            )
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
            # As bytes, so that decoding finds invalid UTF-8 row by row.
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
            raise InputError(
                missing_field(flag, source.path, 1, text_field, reader.fieldnames or [])
            )
        while rows := list(itertools.islice(reader, ROWS_PER_BLOCK)):
            texts = [row[text_field] for row in rows]
            share = raw.tell() / source.num_bytes
            yield (
                [None if t is None else t.encode("utf-8", "surrogateescape") for t in texts],
                share,
            )


def quiet_datasets():
    """Import the `datasets` library without torch, its progress bars and its own messages."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported here
    datasets.config.TORCH_AVAILABLE = False  # else torch is imported, and takes most of the memory
    return datasets


def _datasets_rows(source: Source, text_field: str, flag: str) -> Iterator[tuple[list, float]]:
    table = quiet_datasets().load_dataset(
        source.kind, data_files=[glob.escape(source.path)], split="train", streaming=True
    )
    yield from _table_rows(dataclasses.replace(source, table=table), text_field, flag)


def _table_rows(source: Source, text_field: str, flag: str) -> Iterator[tuple[list, float]]:
    table = source.table.skip(source.start) if source.start else source.table
    first = source.start + 1
    for batch in table.iter(batch_size=ROWS_PER_BLOCK):
        if text_field not in batch:
            raise InputError(missing_field(flag, source.path, first, text_field, batch))
        first += len(batch[text_field])
        yield batch[text_field], 0.0


def _json_rows(source: Source, text_field: str, flag: str) -> Iterator[tuple[list, float]]:
    with _opened(source) as (raw, file):
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape")
        values, first = json_values(text), 1
        while rows := list(itertools.islice(values, ROWS_PER_BLOCK)):
            for number, row in enumerate(rows, start=first):
                if isinstance(row, dict) and text_field not in row:
                    raise InputError(missing_field(flag, source.path, number, text_field, row))
            texts = [row[text_field] if isinstance(row, dict) else row for row in rows]
            yield texts, raw.tell() / source.num_bytes
            first += len(rows)


READERS = {
    "parquet": _parquet_rows,
    "csv": _csv_rows,
    "tsv": _csv_rows,
    "arrow": _datasets_rows,
    "json": _json_rows,
    DATASET: _table_rows,
}


def missing_field(flag: str, path: str, number: int, text_field: str, fields: Iterable) -> str:
    """Return the message for a record or table without the text's field."""
    # The "fields" of a file that is not a table can be anything, even megabytes with line ends.
    known = ", ".join(repr(str(field))[1:-1][:40] for field in list(fields)[:8]) or "none"
    return (
        f"{flag} {path}:{number}: has no field {text_field!r}, only {known}; name the field with"
        " --text_field"
    )
