"""Text on the disk as blocks of about a megabyte: read here, in one process; made into strings by whoever gets them.

A path is a file, a folder or a glob. Files are told by their names: `.txt` (or no ending that is known) holds a sequence
a line, `.jsonl` an object a line with the text in one of its fields; both also compressed (`.gz`, `.bz2`, `.xz`). What
else the `datasets` library opens from local files (`.parquet`, `.arrow`, `.csv`, `.tsv`, `.json`) goes through it.
"""

import bz2
import dataclasses
import glob
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from utils import InputError, logger, one_line, require_file

BLOCK_BYTES = 2**20
MAX_LINE_BYTES = 2**26  # a longer one is no line of text: a binary, or a file without line ends
ROWS_PER_BLOCK = 1000
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# How a file is read, by its ending. "lines", "jsonl", or the name of a builder of `datasets` and its options.
KINDS = {
    ".txt": "lines", ".text": "lines", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".parquet": ("parquet", {}), ".arrow": ("arrow", {}), ".json": ("json", {}), ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
}  # fmt: skip
ERRORS = ("strict", "skip", "replace")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Source:
    """One file. kind: see KINDS; num_bytes: its size on the disk."""

    path: str
    kind: str | tuple[str, dict]
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Block:
    """Some whole lines (kind "lines" or "jsonl", as bytes) or texts (kind "texts") of a file.

    first: number of the first line or row, from 1; num_bytes: how much of the file on the disk it stands for.
    """

    path: str
    kind: str
    first: int
    content: bytes | list
    num_bytes: int


def find_sources(path: str, flag: str = "--file_path") -> list[Source]:
    """List the files that `path` (a file, a folder or a glob) stands for, in a fixed order. Raises InputError."""
    if os.path.isdir(path):
        files = [str(file) for file in sorted(Path(path).rglob("*")) if file.is_file() and not _is_hidden(file, path)]
        left_out = [file for file in files if Path(_uncompressed(file)).suffix and _known_kind(file) is None]
        if left_out:
            logger.warning("%s %s: left out %d files of unknown ending, such as %s.", flag, path, len(left_out), left_out[0])
        files = [file for file in files if file not in set(left_out)]
        if not files:
            raise InputError(f"{flag} {path}: the folder holds no text; expected files that end in {', '.join(KINDS)}")
    elif not os.path.exists(path) and glob.has_magic(path):
        files = [file for file in sorted(glob.glob(path, recursive=True)) if os.path.isfile(file)]
        if not files:
            raise InputError(f"{flag} {path}: no file matches; quote the pattern, and check it")
    else:
        require_file(path, flag)
        files = [path]
    sources = [Source(file, _known_kind(file) or "lines", os.path.getsize(file)) for file in files]
    if not any(source.num_bytes for source in sources):
        raise InputError(f"{flag} {path}: every file that it stands for is empty; expected text")
    for source in sources:
        if source.num_bytes:
            require_file(source.path, flag)
    return sources


def _is_hidden(file: Path, folder: str) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _uncompressed(path: str) -> str:
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in OPENERS else path


def _known_kind(path: str) -> str | tuple[str, dict] | None:
    return KINDS.get(os.path.splitext(_uncompressed(path))[1].lower())


# --------------------------------------------------------------------------------------------------------------------
# Reading: files -> blocks
# --------------------------------------------------------------------------------------------------------------------


def read_blocks(source: Source, text_field: str, flag: str = "--file_path", block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Yield a file's blocks, in constant memory. Raises InputError naming file and place where it can't be read."""
    if isinstance(source.kind, tuple):
        yield from _rows(source, text_field, flag)
    else:
        yield from _lines(source, flag, block_bytes)


def _lines(source: Source, flag: str, block_bytes: int) -> Iterator[Block]:
    opener = OPENERS.get(os.path.splitext(source.path)[1].lower())
    number, position = 1, 0
    with open(source.path, "rb") as raw:
        file = opener(raw, "rb") if opener else raw
        for data in _whole_lines(file, source, flag, block_bytes):
            yield Block(source.path, source.kind, number, data, raw.tell() - position)
            number, position = number + count_lines(data), raw.tell()


def _whole_lines(file: BinaryIO, source: Source, flag: str, block_bytes: int) -> Iterator[bytes]:
    rest, number = b"", 1
    while True:
        try:
            chunk = file.read(block_bytes)
        except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
            where = f"{source.path}: behind line {number - 1 + count_lines(rest)}"
            raise InputError(f"{flag} {where} the compressed data is damaged or cut off ({one_line(error)})") from error
        except OSError as error:  # bz2 has no error of its own
            raise InputError(f"{flag} {source.path}: can't be read ({one_line(error)}); check the file") from error
        data = rest + chunk
        # A carriage return at the end may be the first half of a line end.
        cut = max(data.rfind(b"\n"), data.rfind(b"\r", 0, max(len(data) - 1, 0))) + 1 if chunk else len(data)
        if len(data) - cut > MAX_LINE_BYTES:
            number += count_lines(data[:cut])
            raise InputError(
                f"{flag} {source.path}:{number}: the line has more than {MAX_LINE_BYTES >> 20} MiB; expected a sequence a "
                "line: break it up (scripts/prepare_text.py), or is it no text?"
            )
        if cut:
            yield data[:cut]
            number += count_lines(data[:cut])
        rest = data[cut:]
        if not chunk:
            return


def count_lines(data: bytes) -> int:
    """Count the line ends: \\n, \\r\\n, and \\r alone."""
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")


def _rows(source: Source, text_field: str, flag: str) -> Iterator[Block]:
    builder, options = source.kind
    first = 1
    try:
        import datasets

        datasets.disable_progress_bars()
        datasets.config.TORCH_AVAILABLE = False  # it would be imported, and take more memory than all the rest
        table = datasets.load_dataset(builder, data_files=[source.path], split="train", streaming=True, **options)
        for batch in table.iter(batch_size=ROWS_PER_BLOCK):
            if text_field not in batch:
                raise InputError(_no_field(flag, source.path, first, text_field, batch))
            texts = batch[text_field]
            yield Block(source.path, "texts", first, texts, 0)
            first += len(texts)
    except (InputError, GeneratorExit):
        raise
    except Exception as error:  # what a damaged file can raise has no end
        where = f"{flag} {source.path}: from row {first} on it can't be read as {builder}"
        raise InputError(f"{where} ({one_line(error)}); check the file") from error
    yield Block(source.path, "texts", first, [], source.num_bytes)


def _no_field(flag: str, path: str, number: int, text_field: str, fields) -> str:
    known = ", ".join(map(str, list(fields)[:8])) or "none"
    return f"{flag} {path}:{number}: has no field {text_field!r}, only {known}; name the text's with --text_field"


# --------------------------------------------------------------------------------------------------------------------
# Decoding: blocks -> strings
# --------------------------------------------------------------------------------------------------------------------


def texts_of(block: Block, text_field: str, errors: str = "strict", flag: str = "--file_path") -> tuple[list[str], int]:
    """Make a block into strings: (one a line, record or row, as it stands; how many were left out or mended).

    errors: what becomes of text that is not UTF-8, and of records that are no JSON: "strict" raises InputError naming
    file and line, "skip" leaves the line out, "replace" puts U+FFFD for what is no text (broken JSON remains an error).
    """
    if block.kind == "texts":
        lines, num_bad = block.content, 0
    else:
        lines, num_bad = _decoded(block, errors, flag)
    if block.kind == "lines":
        return [line for line in lines if line is not None], num_bad
    texts = []
    for number, line in enumerate(lines, start=block.first):
        if line is None and block.kind == "jsonl":  # left out, and counted, by _decoded
            continue
        text = _field(line, number, block, text_field, errors, flag)
        if text is None:
            num_bad += 1
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, written as an escape
            if errors == "strict":
                found = f"{text_field!r} holds half of a surrogate pair, which is no text"
                raise InputError(f"{flag} {block.path}:{number}: {found}; mend it, or pass --errors skip or replace") from error
            num_bad += 1
            if errors == "skip":
                continue
            text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        texts.append(text)
    return texts, num_bad


def _decoded(block: Block, errors: str, flag: str) -> tuple[list[str | None], int]:
    data = block.content.removeprefix(BYTE_ORDER_MARK) if block.first == 1 else block.content
    try:
        return _split(data.decode()), 0
    except UnicodeDecodeError as error:
        if errors == "strict":
            before = data[: error.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            number, place = block.first + before.count(b"\n"), len(before) - before.rfind(b"\n")
            hint = "it looks like UTF-16; " if data[:2] in (b"\xff\xfe", b"\xfe\xff") and block.first == 1 else ""
            raise InputError(
                f"{flag} {block.path}:{number}: byte {place} of the line is not UTF-8 "
                f"(0x{data[error.start]:02x}); {hint}convert the file to UTF-8, or pass --errors skip or replace"
            ) from error
    # Bytes of no text become lone surrogates, which no valid UTF-8 decodes to.
    lines = _split(data.decode("utf-8", "surrogateescape"))
    is_bad = [not line.isascii() and any("\udc80" <= character <= "\udcff" for character in line) for line in lines]
    if errors == "skip":
        return [None if bad else line for line, bad in zip(lines, is_bad, strict=True)], sum(is_bad)
    mended = [line.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if bad else line
              for line, bad in zip(lines, is_bad, strict=True)]  # fmt: skip
    return mended, sum(is_bad)


def _split(text: str) -> list[str]:
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _field(line, number: int, block: Block, text_field: str, errors: str, flag: str) -> str | None:
    """Read the text of a record or row: "" where it is null or the line blank; None where the record is to be left out."""
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
            raise InputError(f"{flag} {block.path}:{number}: is no JSON object ({one_line(error)}); mend the line") from error
        if text_field not in record:
            raise InputError(_no_field(flag, block.path, number, text_field, record))
        line = record[text_field]
    if line is None:
        return ""
    if not isinstance(line, str):
        found = f"{text_field!r} is of type {type(line).__name__}"
        raise InputError(f"{flag} {block.path}:{number}: {found}, expected text; name another --text_field")
    return line
