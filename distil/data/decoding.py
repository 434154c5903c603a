"""Blocks of text to strings, one per sequence: decode UTF-8, parse JSON, select the text's field.

--errors says what happens to text that is not UTF-8 and to records that are not JSON: "strict"
raises InputError naming file and line, "skip" skips the line, "replace" puts U+FFFD for invalid
bytes (invalid JSON remains an error).
"""

import json

from distil.data.text_sources import Block, missing_field
from utils import InputError, one_line

ERRORS = ("strict", "skip", "replace")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def texts_of(
    block: Block, text_field: str, errors: str = "strict", flag: str = "--file_path"
) -> tuple[list[str], int]:
    """Decode a block: (strings, one per line, record or row; number skipped or repaired)."""
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
    """Decode a record or row: (its text or None to skip it, whether it was invalid)."""
    value = _field(record, number, block, text_field, errors, flag)
    if value is None:
        return None, True
    try:
        # JSON can also escape half of a surrogate pair, which UTF-8 can't encode.
        return (value.decode() if isinstance(value, bytes) else value.encode().decode()), False
    except UnicodeError as error:
        if errors == "strict":
            raise InputError(
                f"{flag} {block.path}:{number}: {text_field!r} is not UTF-8, or holds half of a"
                f" surrogate pair ({one_line(error)}); repair it, or pass --errors skip or replace"
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
    # Invalid bytes become lone surrogates, which valid UTF-8 never decodes to.
    lines = _split(data.decode("utf-8", "surrogateescape"))
    is_bad = [
        not line.isascii() and any("\udc80" <= character <= "\udcff" for character in line)
        for line in lines
    ]
    if errors == "skip":
        return [None if bad else line for line, bad in zip(lines, is_bad, strict=True)], sum(is_bad)
    repaired = [
        line.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if bad else line
        for line, bad in zip(lines, is_bad, strict=True)
    ]
    return repaired, sum(is_bad)


def _split(text: str) -> list[str]:
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _field(
    line, number: int, block: Block, text_field: str, errors: str, flag: str
) -> str | bytes | None:
    """Return the text of a record or row, "" if it is null or blank, None to skip the record."""
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
                f"{flag} {block.path}:{number}: is not a JSON object ({one_line(error)}); repair"
                " the line"
            ) from error
        if text_field not in record:
            raise InputError(missing_field(flag, block.path, number, text_field, record))
        line = record[text_field]
    if line is None:
        return ""
    if not isinstance(line, str | bytes):
        found = f"{text_field!r} is of type {type(line).__name__}"
        raise InputError(
            f"{flag} {block.path}:{number}: {found}, expected text; name another --text_field"
        )
    return line
