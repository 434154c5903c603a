"""Check a tokenizer's vocabulary files before it is loaded: vocab.txt, vocab.json, merges.txt.

A line of vocab.txt is a token, and its number the token's id. The loaders take blank lines and
byte-order marks for tokens or parts of them; here the cause is named. Files beside a tokenizer.json
are not read by the loaders.
"""

import codecs
import collections
from collections.abc import Mapping, Sequence
from pathlib import Path

from distil.system.json_files import load_json, parse_json
from utils import InputError, logger, one_line

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def check_vocabulary_files(files: Mapping[str, str], source: str) -> None:
    """Raise InputError, naming file and line, where a loader would take a fault for tokens.

    files: file name -> path. source: the tokenizer's flag and name.
    """
    if "tokenizer.json" in files:
        return
    checks = {"vocab.txt": _check_lines, "vocab.json": _check_ids, "merges.txt": _check_end}
    for file in files.keys() & checks:
        text = _read(files[file], f"{source}: {file}")
        checks[file](text, files[file], f"{source}: {file}")


def _read(path: str, where: str) -> str:
    content = Path(path).read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{where} is UTF-16; save it as UTF-8 without a byte-order mark")
    if content.startswith(codecs.BOM_UTF8):
        raise InputError(
            f"{where} begins with a byte-order mark, which would become part of its first token;"
            " save it as UTF-8 without one"
        )
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 ({one_line(error)}); save it as UTF-8") from error


def _num_blank_last(lines: Sequence[str]) -> int:
    """Count the blank lines at the end."""
    kept = len(lines)
    while kept and not lines[kept - 1].strip():
        kept -= 1
    return len(lines) - kept


def _check_lines(text: str, path: str, where: str) -> None:
    """Check a WordPiece vocabulary: a token a line."""
    if "\r" in text and "\n" not in text:
        raise InputError(f"{where} ends its lines with carriage returns; use line feeds")
    lines = [line.rstrip() for line in text.removesuffix("\n").split("\n")]
    num_blank = _num_blank_last(lines)
    if 0 < num_blank < len(lines) and len(lines) > _num_rows(path):
        raise InputError(
            f"{where} ends with {num_blank} blank line(s), which would be token(s) up to id"
            f" {len(lines) - 1}; delete them"
        )
    for number, line in enumerate(lines, start=1):
        if (first := line.split()[:1]) and first[0] in SPECIAL and first[0] != line:
            raise InputError(
                f"{where} has {line!r:.40} on line {number}, expected {first[0]} alone; write"
                " nothing but a token on a line"
            )
    repeated = [t for t, num in collections.Counter(filter(None, lines)).items() if num > 1]
    if repeated:
        token = repeated[0]
        last = len(lines) - lines[::-1].index(token)
        text = "%s has %d tokens on several lines, %r first: the id is of the last line, here %d."
        logger.warning(text, where, len(repeated), token, last - 1)


def _num_rows(path: str) -> int:
    """Return the rows of the model in the same folder; 0 without one."""
    try:
        config = Path(path).with_name("config.json")
        return load_json(config, {"vocab_size": int}, strict=False)["vocab_size"]
    except (OSError, ValueError):
        return 0


def _check_ids(text: str, path: str, where: str) -> None:
    """Check a BPE vocabulary: a token has an id of its own. Numbers may be left out."""
    try:
        numbers = collections.Counter(parse_json(text, {...: int}, strict=False).values())
    except ValueError as error:
        raise InputError(
            f"{where} is no JSON object of token and id ({one_line(error)}); copy it anew"
        ) from error
    number, count = numbers.most_common(1)[0] if numbers else (0, 0)
    if count > 1:
        raise InputError(f"{where} gives {count} tokens the id {number}; copy it anew")


def _check_end(text: str, path: str, where: str) -> None:
    """Check a list of merges: the loader refuses blank lines without naming them."""
    num_blank = _num_blank_last(text.removesuffix("\n").split("\n"))
    if num_blank and text.strip():
        raise InputError(f"{where} ends with {num_blank} blank line(s); delete them")
